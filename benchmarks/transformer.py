"""U-Net against transformer of as many parameters, after ten minutes of training: python -m benchmarks.transformer

configs/stable_diffusion/openmoji/text2img.yaml against text2img_transformer.yaml. First the steps of both are timed, in
turn. This gives each the number of steps that it can take in `--seconds` on this machine; `--steps N M` gives the two
numbers instead. Then each trains for that many steps with every seed, so that other load on the machine does not
matter. All are measured by ``ldm evaluate`` on the held-out captions, with the demo's guidance. Results that `--out`
holds already are kept. The table is printed as Markdown, and the numbers are written to docs/transformer.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ldm.machine import hardware

from .trainings import ROOT, step_seconds, train

CONFIGS = {
    "U-Net": ["--config", "configs/stable_diffusion/openmoji/text2img.yaml"],
    "transformer": ["--config", "configs/stable_diffusion/openmoji/text2img_transformer.yaml"],
}
HELD_OUT = (
    *("--captions", "configs/openmoji/heldout.txt", "--validation_captions", "configs/openmoji/validation.txt"),
    *("--factors", "configs/openmoji/factors.json", "--guidance_scale", "1.25", "--trust_remote_code", "true"),
)
SHOWN = ("R@1, pixels", "R@5, pixels", "skin tone", "gender", "KID, efficientnet_lite0")


def measured(name: str, steps: int, seed: int, out: Path) -> dict[str, Any]:
    """Return the results of a training of so many steps: its speed, held-out loss and evaluation."""
    folder = out / f"{name}-{seed}"
    words = [*CONFIGS[name], "--seed", str(seed), "--loop.max_train_seconds", "null"]
    trained = train(folder, [*words, "--loop.max_train_steps", str(steps), "--loop.validate_every_steps", "1000000"])
    command = [
        "from ldm.commands.cli import main; main()",
        "evaluate",
        str(folder / "model"),
        "--data",
        "openmoji",
        *HELD_OUT,
    ]
    command += ["--out", str(folder / "evaluation")]
    if not (folder / "evaluation" / "report.json").exists():
        subprocess.run([sys.executable, "-c", *command], cwd=ROOT, check=True)
    report = json.loads((folder / "evaluation" / "report.json").read_text(encoding="utf-8"))
    rows = [row for section in report["sections"] for row in section["rows"]]
    found = {row["name"]: [row["value"], row["low"], row["high"]] for row in rows}
    summary = {"denoiser": name, "seed": seed, "steps": steps, "images_per_second": trained["images_per_second"]}
    return summary | {"hardware": trained["hardware"], "held_out_loss": trained["validation/loss"], "measured": found}


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the runs."""
    titles = ["denoiser", "seed", "steps", "images/s", "held-out loss", *SHOWN]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for run in runs:
        numbers = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in map(run["measured"].get, SHOWN)]
        first = [run["denoiser"], run["seed"], run["steps"], f"{run['images_per_second']:.0f}"]
        lines.append("| " + " | ".join(map(str, [*first, f"{run['held_out_loss']:.4f}", *numbers])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=2)
    parser.add_argument("--at_once", type=int, default=1, help="number of trainings that run at the same time")
    parser.add_argument("--out", default="out/transformer")
    parser.add_argument("--json", default="docs/transformer.json")
    known = parser.parse_args()
    result: dict[str, Any] = {"hardware": hardware(), "steps": known.steps}
    if known.steps is None:
        timed = step_seconds(CONFIGS, rounds=3)
        result |= {"step_seconds": timed, "steps": [round(known.seconds / timed[name]) for name in CONFIGS]}
        print(json.dumps(result), flush=True)
    steps = dict(zip(CONFIGS, result["steps"], strict=True))
    with ThreadPoolExecutor(known.at_once) as pool:
        asked = [(name, steps[name], seed, Path(known.out)) for seed in known.seeds for name in CONFIGS]
        result["runs"] = list(pool.map(lambda one: measured(*one), asked))
    print(table(result["runs"]))
    Path(known.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
