"""The proof, on a user's own config, that a killed and resumed training equals one that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.training.checkpoint import Checkpoint, CheckpointStore

STEPS = 4
"""Optimiser steps before and after the resume."""


def check_resume(script: str, arguments: Sequence[str], folder: Path) -> None:
    """Run the training `script` for a few steps, and again in a new process from the middle on; compare to the bit.

    Writes into ``folder/resume_check``, which it empties first.

    Raises:
        SystemExit: with code 1 and a line for each difference, or where a run failed; prints one line if all is equal.

    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("resume_check: runs in one process; start it without several of them")
    place = folder / "resume_check"
    shutil.rmtree(place, ignore_errors=True)
    whole, resumed = place / "whole", place / "resumed"
    _train(script, arguments, whole)
    for name in ("checkpoints", "metrics.jsonl"):
        copy = shutil.copytree if name == "checkpoints" else shutil.copyfile
        resumed.mkdir(exist_ok=True)
        copy(whole / name, resumed / name)
    shutil.rmtree(resumed / "checkpoints" / f"step-{2 * STEPS}")  # as if killed before it
    _train(script, arguments, resumed)
    found = list(differences(whole, resumed))
    if found:
        sys.exit("\n".join([f"resume_check: {len(found)} differences after {2 * STEPS} steps", *found[:20]]))
    print(f"resume_check: {STEPS} + {STEPS} steps equal {2 * STEPS}, to the bit: weights, averages, optimiser, metrics")


def differences(whole: Path, resumed: Path) -> Iterator[str]:
    """Yield a line for each tensor, number and logged value in which the last checkpoints of two runs differ."""
    one, two = (_last(folder) for folder in (whole, resumed))
    for group in sorted(one.tensors.keys() | two.tensors.keys()):
        ours, theirs = one.tensors.get(group, {}), two.tensors.get(group, {})
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs:
                yield f"{group}: {name} is in one checkpoint only"
            elif not torch.equal(ours[name], theirs[name]):
                yield f"{group}: {name} differs by {float((ours[name] - theirs[name]).abs().max()):g}"
    if (states := [_untimed(checkpoint.state) for checkpoint in (one, two)])[0] != states[1]:
        yield "state.json differs"
    rows = [_metrics(folder / "metrics.jsonl") for folder in (whole, resumed)]
    if len(rows[0]) != len(rows[1]):
        yield f"metrics.jsonl has {len(rows[0])} and {len(rows[1])} lines"
    for ours, theirs in zip(*rows, strict=False):
        for name in ours:
            if ours[name] != theirs.get(name):
                yield f"step {ours['step']}: {name} is {ours[name]!r} and {theirs.get(name)!r}"


def _train(script: str, arguments: Sequence[str], folder: Path) -> None:
    overrides: dict[str, Any] = {
        "output_dir": folder,
        "resume_check": "false",
        "doctor": "null",
        "push_to_hub": "null",
        "push_every_steps": "null",
        "push_private": "false",
        "optim.warmup_steps": STEPS // 2,  # more would leave no step for a decay
        "loop.max_train_steps": 2 * STEPS,
        "loop.max_train_epochs": "null",
        "loop.max_train_seconds": "null",
        "loop.save_every_steps": STEPS,
        "loop.keep_checkpoints": 2,
        "loop.validate_every_steps": STEPS,
        "loop.log_every_steps": 1,
        "loop.trackers": "[]",
    }
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, script, *arguments, *words], check=False)  # noqa: S603 (this very script)
    if done.returncode:
        sys.exit(f"resume_check: a run failed with exit code {done.returncode}; see above")


def _last(folder: Path) -> Checkpoint:
    return CheckpointStore.load(folder / "checkpoints" / f"step-{2 * STEPS}")


def _untimed(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state without what the clock and the folder decide."""
    progress = {name: value for name, value in state["progress"].items() if not name.endswith("_seconds")}
    return {name: value for name, value in state.items() if name != "record"} | {"progress": progress}


def _metrics(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]
