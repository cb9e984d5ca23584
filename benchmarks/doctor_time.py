"""The doctor's predictions against the real run: python -m benchmarks.doctor_time --seconds 300 [--config FILE] [...].

The doctor examines a run of so many seconds, which is then trained. Compared are the steps and the wall time from the
first step on. Further words override the config. The result is printed as a line of JSON; the exit code is 1 if a
prediction is more than 25 % off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ldm.machine import hardware

ROOT = Path(__file__).parent.parent
WITHIN = 0.25


def run(words: list[str]) -> None:
    """Run train_text2img.py with these words; faults that a doctor finds are ignored."""
    done = subprocess.run([sys.executable, "train_text2img.py", *words], cwd=ROOT, check=False)
    if "--doctor" not in words:
        done.check_returncode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stable_diffusion/openmoji/text2img.yaml")
    parser.add_argument("--seconds", type=float, default=300.0)
    known, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            "--config",
            known.config,
            "--output_dir",
            name,
            "--loop.max_train_seconds",
            f"{known.seconds:g}",
            *more,
        ]
        run([*words, "--doctor"])
        report = json.loads((folder / "doctor" / "report.json").read_text())
        run(words)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        training = json.loads((folder / "model" / "training.json").read_text())
        # the config is written before the first step, this after the last checkpoint
        wall_seconds = (folder / "model" / "training.json").stat().st_mtime - (folder / "config.yaml").stat().st_mtime
    (predicted,) = (finding["numbers"] for finding in report["findings"] if finding["name"] == "cost")
    steps = max(row["step"] for row in rows)
    result = {
        "steps": {"predicted": predicted["steps"], "real": steps},
        "training_seconds": {
            "predicted": round(predicted["steps"] * predicted["step_seconds"], 1),
            "real": training["train_seconds"],
        },
        "wall_seconds": {
            "predicted": round(predicted["seconds"], 1),
            "real": round(wall_seconds, 1),
        },
    }
    off = {key: round(value["predicted"] / value["real"] - 1, 3) for key, value in result.items()}
    print(json.dumps({**result, "off": off, "doctor_seconds": report["seconds"], "on": hardware()}))
    if any(abs(value) > WITHIN for value in off.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
