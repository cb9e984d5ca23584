"""Time to save a checkpoint, against a plain write of its bytes with fsync: python benchmarks/checkpoint_speed.py

The checkpoint has 10 million parameters with AdamW and averages, 160 MB. The two alternate, and medians are reported.
The result is printed as a line of JSON.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldm.config import OptimConfig
from ldm.machine import hardware
from ldm.training.averages import Average, exponential
from ldm.training.checkpoint import CheckpointStore
from ldm.training.optim import build_optimizer
from ldm.training.state import not_finite, training_state

ROUNDS = 15
WIDTH, LAYERS = 578, 30


def seconds(work: Callable[[], object]) -> float:
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    average = Average(module, exponential(0.99))
    optimizer = build_optimizer(module.parameters(), OptimConfig(), [])
    module(torch.randn(2, WIDTH)).square().mean().backward()
    optimizer.step()

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        store = CheckpointStore(folder / "checkpoints", 2)
        step = 0

        def save() -> None:
            nonlocal step
            step += 1
            tensors, state = training_state({"main": module}, {"main": average}, {"main": optimizer})
            not_finite(tensors)  # as the loop does before it saves
            store.save(step, tensors, {**state})

        save()
        latest = store.latest()
        blob = b"".join(file.read_bytes() for file in sorted(latest.iterdir())) if latest else b""

        def plain() -> None:
            with (folder / "plain").open("wb", buffering=0) as file:
                file.write(blob)
                os.fsync(file.fileno())

        plain()
        times: dict[str, list[float]] = {"checkpoint": [], "plain": []}
        for _ in range(ROUNDS):
            (folder / "plain").unlink()
            times["plain"].append(seconds(plain))
            times["checkpoint"].append(seconds(save))
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    ratio = round(medians["checkpoint"] / medians["plain"], 2)
    print(json.dumps({"parameters": parameters, "bytes": len(blob), **medians, "ratio": ratio, "on": hardware()}))


if __name__ == "__main__":
    main()
