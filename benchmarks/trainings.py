"""Trainings in processes of their own, for the benchmarks, and the time of their steps."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
STEPS_TIMED = 120  # fewer were wrong by a tenth, on cores that others use too
FIRST_STEPS = 15
"""First steps of a training, which are slower and not counted."""


def train(folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run ``train_text2img.py`` into `folder`; return its training.json, with the last value of each logged number."""
    command = [sys.executable, "train_text2img.py", *words, "--output_dir", str(folder), "--loop.trackers", "[]"]
    subprocess.run(command, cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        found |= json.loads(line)
    return found


def step_seconds(trainings: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Return the seconds of a step of each training, by name: the median of `rounds`, in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, words in trainings.items():
            seconds[name].append(_timed(words))
            print(json.dumps({"timed": name, "seconds a step": round(seconds[name][-1], 4)}), flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(words: Sequence[str]) -> float:
    more = ["--loop.max_train_seconds", "null", "--loop.max_train_steps", str(STEPS_TIMED), "--optim.warmup_steps", "1"]
    more += ["--loop.log_every_steps", "1", "--validation.loss_images", "2", "--validation.num_images", "1"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, [*words, *more])
        rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rates = [row["images_per_second"] for row in rows if "images_per_second" in row]  # each over all steps so far
        batch_size = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["batch_size"]
    passed = [step * batch_size / rate for step, rate in enumerate(rates, start=1)]
    return statistics.median(later - sooner for sooner, later in pairwise(passed[FIRST_STEPS:]))
