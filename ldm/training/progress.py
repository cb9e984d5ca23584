"""The progress of a run: the steps taken, and those to take."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from ldm.config import LoopConfig

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Counts of a run. With weights and optimisers they are all that a resume needs."""

    global_step: int = 0
    total_steps: int | None = None
    train_seconds: float = 0.0
    images: int = 0
    skipped_steps: int = 0
    """Those of the steps whose loss or gradient was not finite: they changed nothing."""
    skipped_in_a_row: int = 0

    @property
    def steps_taken(self) -> int:
        """Return the steps that changed the weights: where the learning rate and the averages stand."""
        return self.global_step - self.skipped_steps

    @property
    def images_per_second(self) -> float:
        """Return the images trained on per second of training, over the whole run."""
        return self.images / self.train_seconds if self.train_seconds else 0.0


def planned_steps(config: LoopConfig, epoch_steps: float) -> int | None:
    """Return the number of optimiser steps, None if seconds decide; raises ValueError unless one limit is set."""
    limits = {
        "max_train_steps": config.max_train_steps,
        "max_train_epochs": config.max_train_epochs,
        "max_train_seconds": config.max_train_seconds,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    if len(given) != 1 or min(given.values()) <= 0:
        raise ValueError(f"loop: set one of {', '.join(limits)} to a positive number; got {given or 'none'}")
    if config.max_train_steps is not None:
        return config.max_train_steps
    if config.max_train_epochs is not None:
        steps = math.ceil(config.max_train_epochs * epoch_steps)
        log.info("%g epochs of %.1f steps: %d steps", config.max_train_epochs, epoch_steps, steps)
        return steps
    return None
