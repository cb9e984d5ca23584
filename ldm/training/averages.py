"""Averaged weights: what validation, export and evaluation use; never swapped into the trained ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Decay = Callable[[int], float]
"""From the optimiser steps done *before* the one that has just been taken to the share of the average that stays."""
LONGEST = 0.28
"""Largest `sigma_rel`; 0.2887 is that of the plain mean of all steps."""


def exponential(decay: float) -> Decay:
    """Return ``min(decay, (1 + step) / (10 + step))``.

    That is 0.1 for the first step, so that the random start is soon forgotten.

    Raises:
        ValueError: `decay` outside [0, 1).

    """
    if not 0 <= decay < 1:
        raise ValueError(f"optim.ema_decay: got {decay}; expected 0 (no average) or more, and less than 1")
    return lambda step: min(decay, (1 + step) / (10 + step))


def power_function(sigma_rel: float) -> Decay:
    """Return ``(1 - 1 / t) ** (gamma + 1)`` for the t-th step, t = step + 1 (Karras et al. 2024, eq. 127).

    The average at t is exactly the weights after step s times the integral from s - 1 to s of the profile
    ``(gamma + 1) tau ** gamma / t ** (gamma + 1)``. Nothing is left of the start. Raises ValueError as `gamma_of`.
    """
    exponent = gamma_of(sigma_rel) + 1
    return lambda step: (1 - 1 / (step + 1)) ** exponent


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the power function whose standard deviation is the share `sigma_rel` of the training.

    The largest root of ``sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3))`` (Karras et al. 2024, eq. 126):
    16.97 for 0.05, 6.94 for 0.10. Raises ValueError unless 0 < sigma_rel <= 0.28.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise ValueError(f"sigma_rel: got {sigma_rel}; expected a number above 0, to {LONGEST}")
    squared = sigma_rel**-2
    return float(np.roots([1, 7, 16 - squared, 12 - squared]).real.max())


class Average:
    """A moving average of a module's trained parameters, in `module`, a copy of `original`.

    `module` is in eval mode, takes no gradient and stays on the device of the copied one: make the average
    when the trained module is where it will train, and before anything (DDP, `torch.compile`) wraps it. It is
    the whole state: save ``average.module.state_dict()``, load with ``average.module.load_state_dict``.

    Trained are the parameters that require grad now. The memory of the others, frozen for good, is shared: a
    second copy of a large text encoder would buy nothing.

    Raises:
        ValueError: trained parameters in half precision, where a step of ``1 - decay`` is lost to rounding and the
            average would stand still.

    """

    def __init__(self, module: nn.Module, decay: Decay) -> None:
        shared: dict[int, Any] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            elif parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{name} is {parameter.dtype}, in which an average does not move; train float32 weights "
                    "(loop.mixed_precision computes in half precision all the same)"
                )
        self.module = copy.deepcopy(module, shared).eval().requires_grad_(False)
        self.decay = decay
        self.original = module
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        trained = [(ours, theirs) for ours, theirs in pairs if theirs.requires_grad]
        self._averaged: list[Tensor] = [ours for ours, _ in trained]
        self._trained: list[Tensor] = [theirs for _, theirs in trained]

    @torch.no_grad()
    def update(self, global_step: int) -> None:
        """Average in the trained parameters; copy the buffers.

        `global_step` is the number of optimiser steps done *before* the one that has just been taken: 0 right
        after the first.
        """
        if self._averaged:
            torch._foreach_lerp_(self._averaged, self._trained, 1 - self.decay(global_step))
        for ours, theirs in zip(self.module.buffers(), self.original.buffers(), strict=True):
            ours.copy_(theirs)
