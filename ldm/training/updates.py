"""The size of a step's update, for each trained part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Weights = dict[str, list[Tensor]]


def weights(name: str, module: nn.Module) -> Weights:
    """Return a copy of the trained weights of each part of module `name`, none of a part that is frozen.

    A part is a named child that has parameters, ``name.child``; a module without children is one part, ``name``.
    """
    return {part: [parameter.clone() for parameter in trained] for part, trained in _trained(name, module).items()}


def update_norms(name: str, module: nn.Module, before: Weights) -> dict[str, Tensor]:
    """Return ``||new - old|| / ||old||`` of each part since `weights` gave `before`, shape (); 0 if it is frozen.

    `before` holds the differences afterwards: a second copy would be as large as the weights once more.
    """
    norms = {}
    for part, trained in _trained(name, module).items():
        old = _norm(before[part])
        if trained:
            torch._foreach_sub_(before[part], trained)
        norms[f"update_norm/{part}"] = _norm(before[part]) / old.clamp(min=1e-12)
    return norms


def _trained(name: str, module: nn.Module) -> Weights:
    parts = {f"{name}.{child}": part for child, part in module.named_children()} or {name: module}
    return {
        part: [parameter.detach() for parameter in child.parameters() if parameter.requires_grad]
        for part, child in parts.items()
        if any(True for _ in child.parameters())
    }


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm() if tensors else torch.zeros(())
