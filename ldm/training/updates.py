"""How far a step moves each part of what is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Weights = dict[str, list[Tensor]]


def weights(modules: Mapping[str, nn.Module]) -> Weights:
    """Return a copy of the trained weights of each part of each module, none of a part that is frozen.

    A part is a named child that has parameters, ``module.child``; a module without children is one part, ``module``.
    """
    return {name: [parameter.clone() for parameter in trained] for name, trained in _trained(modules).items()}


def update_norms(modules: Mapping[str, nn.Module], before: Weights) -> dict[str, Tensor]:
    """Return ``||new - old|| / ||old||`` of each part since `weights` gave `before`, shape (); 0 if it is frozen."""
    norms = {}
    for name, trained in _trained(modules).items():
        moved = [new - old for new, old in zip(trained, before[name], strict=True)]
        norms[f"update_norm/{name}"] = _norm(moved) / _norm(before[name]).clamp(min=1e-12)
    return norms


def _trained(modules: Mapping[str, nn.Module]) -> Weights:
    parts: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parts |= {f"{name}.{child}": part for child, part in module.named_children()} or {name: module}
    return {
        name: [parameter.detach() for parameter in part.parameters() if parameter.requires_grad]
        for name, part in parts.items()
        if any(True for _ in part.parameters())
    }


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm() if tensors else torch.zeros(())
