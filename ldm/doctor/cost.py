"""The cost of a run on this machine: seconds a step, hours, memory, floating-point operations."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import OptimConfig
from ldm.data.batches import Batch, PositionDataset
from ldm.data.loader import training_batches
from ldm.doctor.overfit import bounded
from ldm.doctor.plan import Plan
from ldm.machine import memory_bytes
from ldm.training.loop import Loop
from ldm.training.optim import update_norms, weights
from ldm.training.run import Run
from ldm.training.steps import Step

GIB = 2**30
WARM_UP_STEPS = 2
MEASURED_STEPS = 3
"""Fewest steps that are timed. More are, up to `MAX_MEASURED_STEPS`, while they take less than `MEASURED_SECONDS`."""
MAX_MEASURED_STEPS = 20
MEASURED_SECONDS = 8.0
GENTLE = OptimConfig(learning_rate=1e-4)


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds at its peak, by kind."""

    weights: int
    """Weights of all networks, trained and frozen."""
    gradients: int
    averages: int
    optimizer: int
    activations: int
    """Tensors that the forward pass of one micro-batch keeps for the backward pass."""
    update: int
    """Temporary tensors of a logged step's update: copies of the weights, and those of the optimiser. The activations
    are freed by then."""

    @property
    def total(self) -> int:
        """Bytes at the peak: activations and update are never held together."""
        kept = self.weights + self.gradients + self.averages + self.optimizer
        return kept + max(self.activations, self.update)

    def __str__(self) -> str:
        """Return the total and its parts in GiB, in words."""
        last = "activations" if self.activations >= self.update else "update"
        names = ("weights", "gradients", "averages", "optimizer", last)
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in names)
        return f"{self.total / GIB:.2f} GiB of memory ({parts})"


@dataclass(frozen=True)
class Cost:
    """The measured cost of a run's steps, validations and checkpoints."""

    step_seconds: float
    """Median time of a step, as the loop counts it."""
    loading_seconds: float
    """Median time that a step waits for its batch."""
    validation_seconds: float
    checkpoint_seconds: float
    step_flops: int
    """Floating-point operations of forward and backward pass, over all processes."""
    step_operations: int
    """Calls of torch's operators in forward and backward pass, of one process."""
    memory: Memory
    peak_bytes: int | None
    """Most bytes that the GPU's allocator held; None without a GPU."""

    def steps(self, max_train_seconds: float) -> int:
        """Return the number of steps that the loop will take in ``loop.max_train_seconds``; see `fix_total_steps`."""
        return max(2, round(max_train_seconds / self.step_seconds))

    def seconds(self, plan: Plan) -> float:
        """Return the seconds of a run from its first step to its last checkpoint."""
        steps = plan.steps * (self.step_seconds + self.loading_seconds)
        return steps + plan.validations * self.validation_seconds + plan.checkpoints * self.checkpoint_seconds

    def text(self, plan: Plan, price_per_hour: float | None) -> str:
        """Return the cost of a run in words; `price_per_hour` is that of this machine."""
        hours = self.seconds(plan) / 3600
        peak = f"{self.memory}" if self.peak_bytes is None else f"{self.peak_bytes / GIB:.2f} GiB of GPU memory at peak"
        price = "" if price_per_hour is None else f", which costs {hours * price_per_hour:.2f}"
        return (
            f"{self.step_seconds:.3g} s a step and {self.loading_seconds:.2g} s for its batch, "
            f"{self.validation_seconds:.2g} s a validation, {self.checkpoint_seconds:.2g} s a checkpoint: "
            f"{duration(hours)} in all{price}; {peak}; {self.step_flops / 1e9:.3g} GFLOP a step, "
            f"{self.step_flops / self.step_seconds / 1e12:.3g} TFLOP/s"
        )

    def memory_fault(self) -> str | None:
        """Return why this machine has too little memory, or None; None on a GPU, where the steps have run."""
        if self.peak_bytes is not None or self.memory.total <= memory_bytes():
            return None
        return (
            f"this machine has {memory_bytes() / GIB:.2f} GiB of memory; use more loop.gradient_accumulation_steps, or "
            "loop.gradient_checkpointing"
        )


def measure_cost(
    step: Step,
    train: PositionDataset,
    optim: OptimConfig,
    run: Run,
    validate: Callable[[], None],
) -> Cost:
    """Return the cost of real steps on real batches, of a call of `validate`, and of a checkpoint.

    The optimiser is the run's own, with so small a learning rate that the training cannot diverge. Leaves a folder
    ``checkpoints`` in the run's folder.
    """
    gentle = replace(GENTLE, optimizer=optim.optimizer)
    micro_steps = run.config.gradient_accumulation_steps
    flops, operations, activations = _one_pass(step, next(training_batches(train, 0, micro_steps=micro_steps))[0], run)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # some steps are logged, as in training: the peak includes a logged step, and the median is that of the others
    limits = replace(bounded(run.config, WARM_UP_STEPS + MAX_MEASURED_STEPS), log_every_steps=MEASURED_STEPS)
    loop: Loop[Batch] = Loop(step, gentle, limits, run, epoch_steps=1, resumable=False)
    watch = Stopwatch()
    loop.fit(partial(watch.timed, partial(training_batches, train)))
    memory = kept_memory(step, {name: one.optimizer for name, one in loop.optimizers.items()}, activations)

    def save() -> None:
        loop.save()
        loop.store.wait()

    checkpoint_seconds = seconds_of(save)
    validation_seconds = seconds_of(validate)
    peak = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None
    run.accelerator.free_memory()
    return Cost(
        step_seconds=statistics.median(watch.step_seconds[WARM_UP_STEPS:]),
        loading_seconds=statistics.median(watch.loading_seconds[WARM_UP_STEPS:]),
        validation_seconds=validation_seconds,
        checkpoint_seconds=checkpoint_seconds,
        step_flops=flops * micro_steps,
        step_operations=operations * micro_steps,
        memory=memory,
        peak_bytes=peak,
    )


def kept_memory(step: Step, optimizers: Mapping[str, torch.optim.Optimizer], activations: int) -> Memory:
    """Return the memory of a training that has taken its first steps; `activations` as in `Memory`.

    Takes one more step, with gradients of zero.
    """
    trained = [parameter for parameter in parameters(step.modules.values()) if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    made = _Made()
    for name, optimizer in optimizers.items():
        with made:
            before = weights(name, step.modules[name])
            optimizer.step()
            update_norms(name, step.modules[name], before)
            del before
        optimizer.zero_grad(set_to_none=True)
    states = (state for optimizer in optimizers.values() for state in optimizer.state.values())
    averaged = (
        ours
        for average in step.averages.values()
        for ours, theirs in zip(average.module.parameters(), average.original.parameters(), strict=True)
        if theirs.requires_grad
    )
    return Memory(
        weights=tensor_bytes(parameters(everything(step))),
        gradients=tensor_bytes(trained),
        averages=tensor_bytes(averaged),
        optimizer=tensor_bytes(value for state in states for value in state.values() if isinstance(value, Tensor)),
        activations=activations,
        update=made.peak,
    )


class Stopwatch:
    """Seconds of each step of a loop, and of each wait for a batch."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.loading_seconds: list[float] = []

    def timed(
        self, batches: Callable[..., Iterator[list[Batch]]], start_step: int, **shares: int
    ) -> Iterator[list[Batch]]:
        """Yield the batches of the steps to measure, and time them: see `MEASURED_STEPS`."""
        steps = batches(start_step, **shares)
        while len(self.step_seconds) < WARM_UP_STEPS + MAX_MEASURED_STEPS:
            measured = self.step_seconds[WARM_UP_STEPS:]
            if len(measured) >= MEASURED_STEPS and sum(measured) >= MEASURED_SECONDS:
                break
            asked = time.perf_counter()
            batch = next(steps)
            given = time.perf_counter()
            yield batch
            self.step_seconds.append(time.perf_counter() - given)
            self.loading_seconds.append(given - asked)


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors; one that comes twice counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of all `modules`."""
    return [parameter for module in modules for parameter in module.parameters()]


def everything(step: Step) -> list[nn.Module]:
    """Return the networks of a step, trained and frozen, without the averages."""
    return [*step.modules.values(), *step.frozen_networks]


@contextlib.contextmanager
def kept_for_backward(weights: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Yield the bytes of each storage that is kept for a backward pass in this context, without those of `weights`."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A counter of the operators that are called in this context."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak bytes of the tensors that are made in this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        new = _storages(made).items() - _storages((args, kwargs)).items()  # no views, nothing done in place
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()} | dict(new)
        self.peak = max(self.peak, sum(self._live.values()))
        return made


def _storages(tree: Any) -> dict[Any, int]:
    """Return weak references to the storages of the tensors in `tree`, with their bytes."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}  # type: ignore[no-untyped-call]


def _one_pass(step: Step, batch: Batch, run: Run) -> tuple[int, int, int]:
    """Return FLOPs and operator calls of forward and backward pass on `batch`, and the bytes kept between them."""
    with run.attention(), FlopCounterMode(display=False) as counter, _Operations() as operations:  # type: ignore[no-untyped-call]
        with kept_for_backward(parameters(step.modules.values())) as kept:
            losses = step.losses(batch, 0)
        for name in step.modules:
            if name in losses:
                torch.autograd.backward(losses[name])
    for module in step.modules.values():
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops(), operations.count, sum(kept.values())


def duration(hours: float) -> str:
    """Return a time in words, such as "1.5 hours" or "12.0 minutes"."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
