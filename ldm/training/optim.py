"""The optimiser: its learning rate as a pure function of the step, its updates, its state as tensors and JSON."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ldm.config import OptimConfig
from ldm.training.checkpoint import JSON, CheckpointError
from ldm.training.muon import Muon

Weights = dict[str, list[Tensor]]
_NOT_SAVED = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
"""Keys of a parameter group that say where and how a step is computed, not what: they stay the machine's."""


def build_optimizer(
    parameters: Iterable[Parameter], config: OptimConfig, tables: Iterable[Parameter] = ()
) -> Optimizer:
    """Return the optimiser over the parameters that require grad, in two groups: weights, then norms and biases.

    `tables` are those of the weights that are looked up row by row (embeddings): ``muon`` orthogonalises the
    weights but these, which step with the second group. The second group, everything of fewer than two dimensions,
    has no weight decay. ``adamw`` is fused on a machine without an accelerator (three times faster on CPU; with one
    it is not, because fused steps hide from accelerate that float16 gradients overflowed). ``adamw_8bit`` keeps its
    moments in 8 bits.

    Raises:
        ValueError: no parameter requires grad.
        ImportError, RuntimeError: ``adamw_8bit`` without bitsandbytes, without a GPU.

    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("got no parameter that requires grad; expected at least one: is everything frozen?")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "muon":
        looked_up = {id(table) for table in tables}
        groups[1]["params"] += [p for p in groups[0]["params"] if id(p) in looked_up]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in looked_up]
        groups[0]["orthogonal"] = True
        return Muon(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(groups, config)
    fused = True if not torch.accelerator.is_available() else None
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def lookup_tables(module: nn.Module) -> list[Parameter]:
    """Return the weights of the embeddings in `module`."""
    return [cast(Parameter, part.weight) for part in module.modules() if isinstance(part, nn.Embedding)]


def _adamw_8bit(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    remedy = "or set optim.optimizer to adamw"
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            f"optim.optimizer: adamw_8bit needs bitsandbytes and a GPU; pip install bitsandbytes, {remedy}"
        ) from error
    if not torch.accelerator.is_available():
        raise RuntimeError(f"optim.optimizer: adamw_8bit needs a GPU, there is none; train on one, {remedy}")
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps
    )
    return optimizer


def learning_rate(
    global_step: int, total_steps: int | None, config: OptimConfig, decay_start: int | None = None
) -> float:
    """Return the learning rate of the step that follows `global_step` steps, 0 <= it < `total_steps`.

    Warm-up: ``learning_rate * (global_step + 1) / warmup_steps``, the full value on its last step. After it the full
    value, until `decay` leads from it to `final_fraction` of it at the last step, ``total_steps - 1``. The decay begins
    at step `decay_start`; None: for the last `decay_fraction` of the steps, but not before the warm-up is over. While
    the number of steps is not known (None) nothing decays. A warm-up longer than the run is allowed where nothing
    decays after it.

    Raises:
        ValueError: a step outside the run; a setting outside its range; a decay without a step to decay in.

    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if global_step < 0 or (total_steps is not None and global_step >= total_steps):
        steps = "or more" if total_steps is None else f"to {total_steps - 1}, of {total_steps} steps"
        raise ValueError(f"global_step: got {global_step}; expected 0 {steps}")
    if not 0 < peak < math.inf:
        raise ValueError(f"optim.learning_rate: got {peak}; expected a positive number, such as 1e-4")
    if warmup < 0:
        raise ValueError(f"optim.warmup_steps: got {warmup}; expected 0 (none) or more")
    if not 0 <= config.final_fraction <= 1:
        raise ValueError(f"optim.final_fraction: got {config.final_fraction}; expected 0 to 1")
    if not 0 < config.decay_fraction <= 1:
        raise ValueError(f"optim.decay_fraction: got {config.decay_fraction}; expected above 0, to 1")
    warm = peak * (global_step + 1) / warmup if global_step < warmup else peak
    if config.decay == "constant" or total_steps is None:
        return warm
    start = _decay_start(total_steps, config) if decay_start is None else decay_start
    if global_step < max(warmup, start):
        return warm
    last = total_steps - 1
    progress = (global_step - start) / (last - start) if last > start else 1.0  # 0 .. 1
    left = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_fraction + (1 - config.final_fraction) * left)


def _decay_start(total_steps: int, config: OptimConfig) -> int:
    if config.warmup_steps >= total_steps:
        raise ValueError(
            f"optim.warmup_steps: got {config.warmup_steps}, which leaves none of {total_steps} steps for decay: "
            f"{config.decay}; expected less than {total_steps}, or decay: constant"
        )
    start = round((1 - config.decay_fraction) * total_steps)
    return max(config.warmup_steps, min(total_steps - 1, start))


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Return ``(tensors, description)``: all of the state, the way `CheckpointStore.save` takes it.

    `tensors` (not copied) are named ``<index of the parameter>.<key>``; `description` holds the rest:
    parameter shapes, the groups' settings, numbers.

    Raises:
        CheckpointError: a value that is neither a tensor, a number, a string, a bool nor None (nor, in
            the settings, a tuple of those).

    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, JSON] = {}
    for index, parameter, _ in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values[f"{index}.{key}"] = _plain(key, value)
    groups = [
        {key: _settings(key, value) for key, value in group.items() if key not in _NOT_SAVED}
        for group in optimizer.param_groups
    ]
    return tensors, {
        "groups": groups,
        "shapes": _shapes(optimizer),
        "tensors": sorted(tensors),
        "values": values,
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Give `optimizer` the state that `flatten_optimizer` returned; its next step is then bitwise the same.

    Parameters that were saved without a state, because they never had a gradient, may be missing now: what the loss
    does not depend on is frozen since 0.2.0.

    Data types are kept (`Optimizer.load_state_dict` casts to the parameter's). Step counts go
    to the CPU unless the group is fused or capturable, everything else goes where its parameter is, in its
    memory format: as torch.optim makes them. How a step is computed (fused, foreach, ...) stays as built.

    Raises:
        CheckpointError: the number or shapes of the parameters, the settings or the tensors are those of
            another optimiser; nothing has been changed then.

    """
    tensors, description = _without_idle(optimizer, tensors, description)
    _check_fit(optimizer, tensors, description)
    for group, saved in zip(optimizer.param_groups, description["groups"], strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) else value
    optimizer.state.clear()
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*description["values"].items(), *tensors.items()]:
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    for index, parameter, group in _parameters(optimizer):
        if index in entries:
            optimizer.state[parameter] = {
                key: _placed(key, value, parameter, group) if isinstance(value, Tensor) else value
                for key, value in entries[index].items()
            }


def _parameters(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield ``(index, parameter, its group)``, counted through all groups as `Optimizer.state_dict` does."""
    index = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield index, parameter, group
            index += 1


def _shapes(optimizer: Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _plain(key: str, value: object) -> JSON:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"optimiser state {key!r} is a {type(value).__name__}; only tensors, numbers, strings, bools and "
        "None can be saved: choose another optimiser"
    )


def _settings(key: str, value: object) -> JSON:
    return [_plain(key, item) for item in value] if isinstance(value, tuple | list) else _plain(key, value)


def _without_idle(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Return ``(tensors, description)`` without parameters that have no state, if there are more than in `optimizer`.

    The remaining parameters are numbered anew.
    """
    shapes: list[list[list[int]]] = description["shapes"]
    if sum(map(len, shapes)) <= sum(map(len, _shapes(optimizer))):
        return tensors, description
    stepped = {int(name.partition(".")[0]) for name in (*tensors, *description["values"])}
    place = {old: new for new, old in enumerate(sorted(stepped))}

    def renamed(name: str) -> str:
        index, _, key = name.partition(".")
        return f"{place[int(index)]}.{key}"

    numbered, kept = enumerate(chain.from_iterable(shapes)), list[list[list[int]]]()
    for group in shapes:
        kept.append([shape for index, shape in islice(numbered, len(group)) if index in stepped])
    return {renamed(name): tensor for name, tensor in tensors.items()}, {
        **description,
        "shapes": kept,
        "tensors": [renamed(name) for name in description["tensors"]],
        "values": {renamed(name): value for name, value in description["values"].items()},
    }


def _check_fit(optimizer: Optimizer, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    remedy = "resume with the configuration that wrote the checkpoint, or start a new run"
    saved, ours = description["shapes"], _shapes(optimizer)
    counts = [len(group) for group in saved], [len(group) for group in ours]
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"the checkpoint's optimiser has {sum(counts[0])} parameters (by group {counts[0]}), this one "
            f"{sum(counts[1])} ({counts[1]}); {remedy}"
        )
    pairs = zip(chain.from_iterable(saved), chain.from_iterable(ours), strict=True)
    for index, (shape, our_shape) in enumerate(pairs):
        if shape != our_shape:
            raise CheckpointError(
                f"parameter {index} has shape {our_shape}, in the checkpoint's optimiser {shape}; {remedy}"
            )
    for group, settings in zip(optimizer.param_groups, description["groups"], strict=True):
        if unknown := sorted(settings.keys() - group.keys()):
            raise CheckpointError(
                f"the checkpoint's optimiser has settings that {type(optimizer).__name__} does not: "
                f"{', '.join(unknown)}; {remedy}"
            )
    if differing := sorted(set(description["tensors"]) ^ tensors.keys()):
        raise CheckpointError(
            f"the optimiser's tensors and their description differ by {len(differing)} names, the first is "
            f"{differing[0]!r}: they were not saved together; {remedy}"
        )


def _placed(key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a copy of the state `key` of a parameter where and how torch.optim would have made it."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value.to("cpu", copy=True)
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)


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
