"""Overfitting of a few images: a model that cannot learn eight images cannot learn more of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ldm.config import LoopConfig, OptimConfig
from ldm.data.batches import Batch
from ldm.training.loop import Loop
from ldm.training.run import Run
from ldm.training.state import load_trained, trained_state
from ldm.training.steps import DiffusionStep, Step

MAX_STEPS = 300
MAX_SECONDS = 25.0
NOISE_DRAWS = 32
"""Number of fixed draws of noise and times, which the steps take in turn."""
MEASURED_DRAWS = 8
"""Number of these draws that `mean_loss` uses."""
WARM_UP = 10


@dataclass(frozen=True)
class Overfit:
    """The loss (or error) before and after; `end` is NaN or infinite if the training diverged."""

    start: float
    end: float
    steps: int
    seconds: float

    @property
    def left(self) -> float:
        """The share of the starting loss that is left; more than 1 if the loss rose."""
        return self.end / self.start


def fixed_draws(batch: Batch) -> list[Batch]:
    """Return `batch` with `NOISE_DRAWS` different draws of noise and times, the same in every run."""
    count = len(batch)
    return [replace(batch, positions=list(range(draw * count, (draw + 1) * count))) for draw in range(NOISE_DRAWS)]


@torch.no_grad()
def mean_loss(step: DiffusionStep, batches: Sequence[Batch]) -> float:
    """Return the mean loss over the first `MEASURED_DRAWS` batches, with the weights that are trained, not averaged."""
    losses = [step.losses(batch, 0)["denoiser"].mean() for batch in batches[:MEASURED_DRAWS]]
    return float(torch.stack(losses).mean())


def overfit(step: Step, batch: Batch, optim: OptimConfig, run: Run, measure: Callable[[], float]) -> Overfit:
    """Train on `batch` alone for `MAX_STEPS` or `MAX_SECONDS`, and return `measure` before and after.

    Loop, losses and optimiser are the run's, at its peak learning rate after a warm-up of at most `WARM_UP` steps. Even
    a slow machine takes `WARM_UP` steps: before that, the learning rate to be tested is not reached. The weights stay
    changed; `restored` puts them back.
    """
    began, taken, start = time.perf_counter(), 0, measure()

    def batches(start_step: int, *, micro_steps: int, rank: int, world: int) -> Iterator[list[Batch]]:
        nonlocal taken
        draws = fixed_draws(batch)
        while taken < MAX_STEPS and (taken < WARM_UP or time.perf_counter() - began < MAX_SECONDS):
            yield [draws[taken % NOISE_DRAWS]]
            taken += 1

    peak = replace(optim, decay="constant", warmup_steps=min(optim.warmup_steps, WARM_UP))
    limits = bounded(run.config, MAX_STEPS)
    loop: Loop[Batch] = Loop(step, peak, limits, run, epoch_steps=1, resumable=False)
    try:
        loop.fit(batches)
        end = measure()
    except FloatingPointError:
        end = float("nan")
    run.accelerator.free_memory()
    return Overfit(start, end, taken, time.perf_counter() - began)


def bounded(config: LoopConfig, steps: int) -> LoopConfig:
    """Return `config` for a loop that ends when its batches do, after at most `steps`, and saves and logs nothing."""
    beyond = steps + 1
    return replace(
        config,
        max_train_steps=beyond,
        max_train_epochs=None,
        max_train_seconds=None,
        save_every_steps=beyond,
        log_every_steps=beyond,
        trackers=(),
    )


@contextlib.contextmanager
def restored(step: Step) -> Iterator[None]:
    """Restore the weights, averages and memory of a step at the end of this context."""
    pairs = [(module, module) for module in step.modules.values()]
    pairs += [(average.module, average.original) for average in step.averages.values()]
    kept = [{name: value.clone() for name, value in trained_state(*pair).items()} for pair in pairs]
    memory = {name: tensor.clone() for name, tensor in step.memory.items()}
    try:
        yield
    finally:
        for name, tensor in memory.items():
            step.memory[name].copy_(tensor)
        for pair, tensors in zip(pairs, kept, strict=True):
            load_trained(*pair, tensors)
