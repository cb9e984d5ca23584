"""Muon: momentum whose update of each weight matrix is made orthogonal, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ldm.machine import native_precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic whose iterates take every singular value in (0, 1] to about 1 (0.7 to 1.2), found by Jordan et al. 2024."""
NEWTON_SCHULZ_STEPS = 5
RMS = 0.2
"""Root mean square of AdamW's updates in practice: both kinds share a learning rate (Liu et al. 2025, eq. 4)."""


def orthogonalized(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return about ``U V^T`` of each ``U S V^T`` in (N, R, C) float32, by Newton-Schulz (no SVD) in `dtype`."""
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x: Tensor = (wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.float()
    return x if wide is matrices else x.mT


class Muon(Optimizer):
    """Muon for groups with ``orthogonal=True``, AdamW for the others; one learning rate for both.

    A weight of more than two dimensions counts as a matrix of its outputs (Jordan et al. 2024). The iteration runs in
    bf16 where that is faster and in float32 elsewhere; the stock `torch.optim.Muon` takes two dimensions only and
    always uses bf16, which is ten times slower than float32 on processors without it.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "orthogonal": False,
            "iterate_in": native_precision(),  # a setting, so that a resumed run keeps what was measured at its start
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; a `closure` is called first and its value returned, as in any torch optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._orthogonal if group["orthogonal"] else self._adamw)(trained, group)
        return loss

    def _orthogonal(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape[0], parameter.shape[1:].numel()].append(parameter)
        for shape, alike in by_shape.items():  # as one batch: a GPU waits for each kernel's launch, not for its work
            momenta = self._kept(alike, "momentum")
            gradients = [cast(Tensor, parameter.grad) for parameter in alike]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
            matrices = torch.stack([update.flatten(1) for update in nesterov])
            dtype = torch.bfloat16 if group["iterate_in"] == "bf16" else torch.float32
            updates = orthogonalized(matrices, dtype=dtype).unbind()
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            views = [update.reshape_as(parameter) for update, parameter in zip(updates, alike, strict=True)]
            torch._foreach_add_(alike, views, alpha=-group["lr"] * RMS * max(shape) ** 0.5)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.zeros(()))
        adamw(
            parameters,
            [cast(Tensor, parameter.grad) for parameter in parameters],
            self._kept(parameters, "exp_avg"),
            self._kept(parameters, "exp_avg_sq"),
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _kept(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return each parameter's state of this name, zeros to begin with."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]
