"""What the doctor predicts, against the real run: python -m benchmarks.doctor_time --seconds 300 [--config FILE] [...].

The doctor looks at a run of so many seconds, which is then trained; steps and wall time are compared. More words are
overrides of the config. The result is printed as a line of JSON; exit code 1 if a prediction is more than 25 % off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldm.provenance import hardware

ROOT = Path(__file__).parent.parent
WITHIN = 0.25


def run(words: list[str]) -> float:
    """Return the seconds that train_text2img.py takes with these words."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "train_text2img.py", *words], cwd=ROOT, check=False)
    if done.returncode and "--doctor" not in words:  # what it finds wrong is no matter here
        done.check_returncode()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/openmoji/text2img.yaml")
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
        doctor_seconds = run([*words, "--doctor"])
        report = json.loads((folder / "doctor" / "report.json").read_text())
        wall_seconds = run(words)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        training = json.loads((folder / "model" / "training.json").read_text())
    (predicted,) = (finding["numbers"] for finding in report["findings"] if finding["name"] == "cost")
    start_up, steps = doctor_seconds - report["seconds"], max(row["step"] for row in rows)
    result = {
        "steps": {"predicted": predicted["steps"], "real": steps},
        "training_seconds": {
            "predicted": round(predicted["steps"] * predicted["step_seconds"], 1),
            "real": training["train_seconds"],
        },
        "wall_seconds": {
            "predicted": round(predicted["seconds"] + start_up, 1),
            "real": round(wall_seconds, 1),
        },
    }
    off = {key: round(value["predicted"] / value["real"] - 1, 3) for key, value in result.items()}
    print(json.dumps({**result, "off": off, "doctor_seconds": round(doctor_seconds, 1), "on": hardware()}))
    if any(abs(value) > WITHIN for value in off.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
