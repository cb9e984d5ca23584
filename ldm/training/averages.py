"""Averaged weights (EMA): what validation, export and evaluation use; never swapped into the trained ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of a module's trained parameters, in `module`, a copy of it.

    `module` is in eval mode, takes no gradient and stays on the device of the copied one: make the average
    when the trained module is where it will train, and before anything (DDP, `torch.compile`) wraps it. It is
    the whole state: save ``average.module.state_dict()``, load with ``average.module.load_state_dict``.

    Trained are the parameters that require grad now. The memory of the others, frozen for good, is shared: a
    second copy of a large text encoder would buy nothing.

    Raises:
        ValueError: `decay` outside [0, 1), or trained parameters in half precision, where a step of
            ``1 - decay`` is lost to rounding and the average would stand still.

    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"optim.ema_decay: got {decay}; expected 0 (no average) or more, and less than 1")
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
        self._original = module
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        trained = [(ours, theirs) for ours, theirs in pairs if theirs.requires_grad]
        self._averaged: list[Tensor] = [ours for ours, _ in trained]
        self._trained: list[Tensor] = [theirs for _, theirs in trained]

    @torch.no_grad()
    def update(self, global_step: int) -> None:
        """Average in the trained parameters; copy the buffers.

        `global_step` is the number of optimiser steps done *before* the one that has just been taken: 0 right
        after the first. The decay is ``min(decay, (1 + global_step) / (10 + global_step))``, which is 0.1 for
        the first step, so that the random start is soon forgotten.
        """
        decay = min(self.decay, (1 + global_step) / (10 + global_step))
        if self._averaged:
            torch._foreach_lerp_(self._averaged, self._trained, 1 - decay)
        for ours, theirs in zip(self.module.buffers(), self._original.buffers(), strict=True):
            ours.copy_(theirs)
