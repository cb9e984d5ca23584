"""The progress of a run: the steps taken, and those to take."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from ldm.config import LoopConfig, OptimConfig
from ldm.config.check import LIMITS
from ldm.errors import ConfigError

log = logging.getLogger(__name__)
TIMED_STEPS = 20
"""Steps before which the speed of a run is not known: the first ones are slower."""
RECENT = 10
"""The last tenth of the steps has most of the weight in `Progress.step_seconds`."""


@dataclass
class Progress:
    """Counts of a run. With weights and optimisers they are all that a resume needs."""

    global_step: int = 0
    total_steps: int | None = None
    """None until it is known, see `fix_total_steps`."""
    decay_start: int | None = None
    """Steps taken when the decay of the learning rate began, if seconds decided it."""
    train_seconds: float = 0.0
    step_seconds: float = 0.0
    """Mean of a step, in which the t-th of t steps has the share 10 / t: the speed of late."""
    images: int = 0
    skipped_steps: int = 0
    """Those of the steps whose loss or gradient was not finite: they changed nothing."""
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        """Take the mean speed of all steps where a checkpoint of version 0.1.0 does not hold the recent one."""
        self.step_seconds = self.step_seconds or self.train_seconds / max(1, self.global_step)

    def count(self, images: int, seconds: float) -> None:
        """Count a step that has taken `seconds`."""
        self.global_step += 1
        self.images += images
        self.train_seconds += seconds
        self.step_seconds += (seconds - self.step_seconds) * min(1.0, RECENT / self.global_step)

    @property
    def steps_taken(self) -> int:
        """Return the steps that changed the weights: where the learning rate and the averages stand."""
        return self.global_step - self.skipped_steps

    @property
    def images_per_second(self) -> float:
        """Return the images trained on per second of training, over the whole run."""
        return self.images / self.train_seconds if self.train_seconds else 0.0


def limits(config: LoopConfig) -> dict[str, float | None]:
    """Return what can end a training, by the names of the fields: at most one is not None, see `ldm.config.check`."""
    return {name: getattr(config, name) for name in LIMITS}


def planned_steps(config: LoopConfig, epoch_steps: float) -> int | None:
    """Return the number of optimiser steps, None if seconds decide; raises ConfigError if nothing does."""
    if not any(limits(config).values()):
        raise ConfigError(f"loop: got no end of the training; expected one of {', '.join(LIMITS)}")
    if config.max_train_steps is not None:
        return config.max_train_steps
    if config.max_train_epochs is not None:
        steps = math.ceil(config.max_train_epochs * epoch_steps)
        log.info("%g epochs of %.1f steps: %d steps", config.max_train_epochs, epoch_steps, steps)
        return steps
    return None


def expected_steps(progress: Progress, config: LoopConfig) -> int | None:
    """Return the number of steps of the whole run; None if it is not known and fewer than `TIMED_STEPS` are done.

    Where seconds decide and the number is not fixed yet: what the seconds left are enough for, at the speed of late.
    """
    if progress.total_steps is not None or config.max_train_seconds is None or progress.global_step < TIMED_STEPS:
        return progress.total_steps
    left = max(0.0, config.max_train_seconds - progress.train_seconds)
    return progress.global_step + max(1, round(left / progress.step_seconds))


def fix_total_steps(progress: Progress, config: LoopConfig, optim: OptimConfig) -> bool:
    """Fix the number of steps, where seconds decide it, when the learning rate begins to decay; return if it was now.

    That is as late as a learning rate allows that is a function of the step: once ``1 - optim.decay_fraction`` of the
    seconds are spent and the warm-up is over. A constant one allows it when the time is over. The speed is that of the
    last steps, so that a machine that has become slower since the start still ends in time. It depends on nothing
    but the arguments: a resumed run fixes the same number.
    """
    if progress.total_steps is not None or config.max_train_seconds is None:
        return False
    share = 0.0 if optim.decay == "constant" else optim.decay_fraction
    warm = progress.global_step >= TIMED_STEPS and progress.steps_taken >= optim.warmup_steps
    constant_seconds = (1 - share if warm else 1) * config.max_train_seconds
    if progress.train_seconds < constant_seconds:
        return False
    progress.total_steps = expected_steps(progress, config) or progress.global_step + 1
    progress.decay_start = progress.steps_taken
    return True
