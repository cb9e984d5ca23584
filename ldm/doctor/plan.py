"""The plan of a run: its steps, epochs, validations and checkpoints, with faults and oddities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ldm.config import LoopConfig, OptimConfig

EARLY_DECAY = 0.4
"""Share of a run that may decay: a change of the machine's speed in the first half is known before it does."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run of `steps` optimiser steps."""

    images: int
    batch_size: int
    steps: int
    loop: LoopConfig
    optim: OptimConfig

    @property
    def epoch_steps(self) -> float:
        """Steps in which each image is seen once."""
        return self.images / self.batch_size

    @property
    def epochs(self) -> float:
        """Number of times that each image is seen."""
        return self.steps / self.epoch_steps

    @property
    def validations(self) -> int:
        """Number of validations in the run, including that of the last step."""
        return math.ceil(self.steps / self.loop.validate_every_steps)

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints in the run, including that of the last step."""
        return math.ceil(self.steps / self.loop.save_every_steps)

    @property
    def average_half_life(self) -> float:
        """Half-life of the averages at the end of the run: steps after which a weight counts half.

        The decay grows during the run, see `Average.update`. The last is ``min(ema_decay, steps / (steps + 9))``, so
        the half-life stays below ``steps / 12``, and the random start has no influence left.
        """
        decay = min(self.optim.ema_decay, self.steps / (self.steps + 9))
        return math.log(0.5) / math.log(decay) if decay else 0.0

    def text(self) -> str:
        """Return the plan in words."""
        loop, seconds = self.loop, self.loop.max_train_seconds
        what = f"{self.steps:,} steps" if seconds is None else f"{seconds:g} s are about {self.steps:,} steps"
        return (
            f"{self.images:,} training images, {self.batch_size:,} a step: {self.epoch_steps:.1f} steps an epoch; "
            f"{what} = {self.epochs:.1f} epochs: each image is seen {_times(self.epochs)}; validation every "
            f"{loop.validate_every_steps:,} steps ({self.validations:,} in all), checkpoints every "
            f"{loop.save_every_steps:,} ({self.checkpoints:,} in all); warm-up is "
            f"{self.optim.warmup_steps / self.steps:.1%} of the steps, the half-life of the averages "
            f"{self.average_half_life:.0f} steps"
        )

    def faults(self) -> Iterator[str]:
        """Yield the reasons why the run would not train as meant."""
        if self.optim.warmup_steps >= self.steps:
            yield (
                f"optim.warmup_steps {self.optim.warmup_steps:,} is no shorter than the run of {self.steps:,} steps: "
                "the learning rate never reaches its peak; use about a tenth of the steps"
            )

    def oddities(self) -> Iterator[str]:
        """Yield the settings that are allowed but seldom meant."""
        loop = self.loop
        if 0.3 * self.steps < self.optim.warmup_steps < self.steps:
            share = self.optim.warmup_steps / self.steps
            yield f"optim.warmup_steps: {share:.0%} of the run is warm-up; a tenth is usual"
        decays_early = self.optim.decay != "constant" and self.optim.decay_fraction > EARLY_DECAY
        if loop.max_train_seconds is not None and decays_early:
            yield (
                f"optim.decay_fraction {self.optim.decay_fraction:g}: the number of steps is fixed when the decay "
                f"begins, and a machine that becomes slower after it takes longer than {loop.max_train_seconds:g} s; "
                "0.3 is usual"
            )
        if self.epochs < 1:
            yield f"less than one epoch: {1 - self.epochs:.0%} of the images are never seen; train longer"
        if self.batch_size > self.images:
            yield (
                f"data.batch_size {self.batch_size:,} is larger than the data: each step sees an image "
                f"{self.batch_size / self.images:.1f} times; use a smaller one"
            )
        for name, every in (("save", loop.save_every_steps), ("validate", loop.validate_every_steps)):
            if every > self.steps:
                lost = "a kill would lose all of it" if name == "save" else "it is validated only at the end"
                yield f"loop.{name}_every_steps {every:,} is longer than the run of {self.steps:,} steps: {lost}"


def _times(epochs: float) -> str:
    return f"{epochs:.1f} times" if epochs < 10 else f"{epochs:.0f} times"
