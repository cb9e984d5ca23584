"""Muon: momentum whose update of each weight matrix is made orthogonal, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.training.run import native_precision

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic whose iterates take every singular value in (0, 1] to about 1 (0.7 to 1.2), found by Jordan et al. 2024."""
NEWTON_SCHULZ_STEPS = 5
RMS = 0.2
"""Root mean square of AdamW's updates in practice: both kinds share a learning rate (Liu et al. 2025, eq. 4)."""


def orthogonalized(matrix: Tensor, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return about ``U V^T`` for ``matrix = U S V^T``, (R, C) float32, by Newton-Schulz (no SVD) in `dtype`."""
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = (wide / (wide.norm() + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.float()
    return x if wide is matrix else x.T


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
        }
        super().__init__(params, defaults)
        self._dtype = torch.bfloat16 if native_precision("auto") == "bf16" else torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; a `closure` is called first and its value returned, as in any torch optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._orthogonal if group["orthogonal"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update(parameter, self.state[parameter], group), alpha=group["lr"])
        return loss

    def _orthogonal(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])  # type: ignore[union-attr]
        matrix = orthogonalized(nesterov.flatten(1), dtype=self._dtype)
        scale: float = RMS * max(matrix.shape) ** 0.5
        return (matrix * scale).view_as(parameter)

    @staticmethod
    def _adam(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        steps = float(state["step"])
        root = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(group["eps"])
        update: Tensor = state["exp_avg"] / (1 - first**steps) / root
        return update
