"""The trained state in a checkpoint: weights, averages, optimisers; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.training.averages import Average
from ldm.training.checkpoint import Checkpoint
from ldm.training.manifest import JSON, CheckpointError
from ldm.training.optim import flatten_optimizer, restore_optimizer

T = TypeVar("T")
Scaler = torch.amp.GradScaler


def training_state(
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Average],
    optimizers: Mapping[str, Optimizer],
    memory: Mapping[str, Tensor] = MappingProxyType({}),
    scaler: Scaler | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
    """Return ``(tensors, state)`` as `CheckpointStore.save` takes them; tensors are not copied."""
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, JSON] = {}
    for name, module in modules.items():
        tensors[f"{name}-weights"] = trained_state(module, module)
        tensors[f"{name}-optimizer"], state[f"{name}-optimizer"] = flatten_optimizer(optimizers[name])
    for name, average in averages.items():
        tensors[f"{name}-average"] = trained_state(average.module, average.original)
    if memory:
        tensors["memory"] = dict(memory)
    if scaler is not None:
        state["scaler"] = scaler.state_dict()
    return tensors, state


def restore_training(
    saved: Checkpoint,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Average],
    optimizers: Mapping[str, Optimizer],
    memory: Mapping[str, Tensor] = MappingProxyType({}),
    scaler: Scaler | None = None,
) -> None:
    """Put back what `training_state` returned; raises CheckpointError if it is of another model."""
    for name, module in modules.items():
        load_trained(module, module, _of(saved.tensors, f"{name}-weights"))
        description: Mapping[str, Any] = _of(saved.state, f"{name}-optimizer")
        restore_optimizer(optimizers[name], _of(saved.tensors, f"{name}-optimizer"), description)
    for name, average in averages.items():
        load_trained(average.module, average.original, _of(saved.tensors, f"{name}-average"))
    for name, tensor in memory.items():
        kept = _of(_of(saved.tensors, "memory"), name)
        if kept.shape != tensor.shape:
            shapes = f"{tuple(kept.shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"the checkpoint's {name} have the shape {shapes}: it is of another objective")
        tensor.copy_(kept)
    if scaler is not None and "scaler" in saved.state:  # a run in float32 may go on in float16
        scaler.load_state_dict(saved.state["scaler"])


def not_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Return the name of a weight or average that is not finite, None if all are."""
    for group, entries in tensors.items():
        if not group.endswith("-optimizer"):
            for name, tensor in entries.items():
                # the extremes are one pass: 50 times faster than `isfinite` of each element
                if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    return f"{group}: {name}"
    return None


def trained_state(module: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `module` and those of its parameters that are trained in `like`, a module of its kind."""
    trained = {name for name, parameter in like.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in like.named_parameters()} - trained
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trained(module: nn.Module, like: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `trained_state` returned; raises CheckpointError, and changes nothing, if its names are others.

    It may hold parameters that are frozen now: version 0.1.0 froze none of those that the loss does not depend on.
    """
    trained, known = trained_state(module, like).keys(), module.state_dict().keys()
    if differing := sorted((trained - tensors.keys()) | (tensors.keys() - known)):
        where = "the checkpoint" if differing[0] in tensors else "this model"
        raise CheckpointError(
            f"only {where} has {differing[0]} ({len(differing)} names differ): it is of another model; resume with the "
            "configuration that wrote it, or choose another output_dir"
        )
    module.load_state_dict(dict(tensors), strict=False)


def _of(entries: Mapping[str, T], name: str) -> T:
    if name not in entries:
        raise CheckpointError(
            f"the checkpoint holds no {name}: it is of another model, or of a training that tracked other averages "
            "(snapshot_sigma_rels); resume with the configuration that wrote it, or choose another output_dir"
        )
    return entries[name]
