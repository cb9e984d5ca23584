"""The one loop: counts, accumulates, clips, steps, averages, logs, saves, validates, stops. It knows no loss."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config import LoopConfig, OptimConfig
from ldm.data.positions import draw_key
from ldm.models.network import weights_hash
from ldm.terminal import progress_bar
from ldm.training.averages import Average
from ldm.training.checkpoint import CheckpointStore
from ldm.training.optim import build_optimizer, learning_rate, lookup_tables, update_norms, weights
from ldm.training.processes import refuse_apart
from ldm.training.progress import Progress, expected_steps, fix_total_steps, limits, planned_steps
from ldm.training.record import RunRecord
from ldm.training.resume import agreed_checkpoint
from ldm.training.run import CHECKPOINTS, Run
from ldm.training.signals import Stopped, unwrapped
from ldm.training.state import not_finite, restore_training, training_state

log = logging.getLogger(__name__)
MAX_SKIPPED_IN_A_ROW = 10
Event = tuple[int | None, Callable[[int], None]]
"""Every how many steps, the last step included, and what is called with the step; None: never."""


class SizedBatch(Protocol):
    """A micro-batch: has a length."""

    def __len__(self) -> int:
        """Return the number of samples."""


B = TypeVar("B", bound=SizedBatch, contravariant=True)
C = TypeVar("C", bound=SizedBatch, covariant=True)


class Batches(Protocol[C]):
    """The source of a step's samples."""

    def __call__(self, start_step: int, *, micro_steps: int, rank: int, world: int) -> Iterator[Sequence[C]]:
        """Yield, for each optimiser step from `start_step` on, the micro-batches of process `rank` of `world`."""


class TrainingStep(Protocol[B]):
    """The trained modules, and the way from a batch to losses."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Return the trained modules, one optimiser each, in the order in which they are stepped."""

    @property
    def forwards(self) -> Mapping[str, nn.Module]:
        """Return the same, as prepared for devices and processes."""

    @property
    def averages(self) -> Mapping[str, Average]:
        """Return the averaged weights of those that have them."""

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """Return the other tensors that a checkpoint keeps, changed in place; the same in every process."""

    def losses(self, batch: B, global_step: int) -> dict[str, Tensor]:
        """Return a scalar loss with gradient for modules by their names; scalars by other names are only logged."""

    def after_step(self) -> None:
        """Keep in `memory` what the next steps need of the one just taken; not called for a skipped one."""


class Loop(Generic[B]):
    """Trains one `TrainingStep` to its end, from wherever the newest checkpoint stands."""

    def __init__(
        self,
        step: TrainingStep[B],
        optim: OptimConfig,
        config: LoopConfig,
        run: Run,
        epoch_steps: float,
        resumable: bool = True,
    ):
        """Build the optimisers; `epoch_steps` is the (fractional) number of optimiser steps in an epoch.

        The training begins anew unless `resume` is called. What is not `resumable` saves no checkpoint when it is
        stopped: a trial, of which nothing is kept.
        """
        self.step, self.optim, self.config, self.run = step, optim, config, run
        self.record, self.resumable = RunRecord(), resumable
        self.optimizers = {
            name: run.accelerator.prepare_optimizer(build_optimizer(module.parameters(), optim, lookup_tables(module)))
            for name, module in step.modules.items()
        }
        self.progress = Progress(total_steps=planned_steps(config, epoch_steps))
        self.store = CheckpointStore(run.folder / CHECKPOINTS, config.keep_checkpoints)
        self._saved_step = self.start_step = 0

    @property
    def done(self) -> bool:
        """Return whether the last step has been taken."""
        return self.progress.total_steps is not None and self.progress.global_step >= self.progress.total_steps

    @property
    def _trained(self) -> tuple[Any, ...]:
        inner = {name: optimizer.optimizer for name, optimizer in self.optimizers.items()}
        return self.step.modules, self.step.averages, inner, self.step.memory, self.run.accelerator.scaler

    def fit(self, batches: Batches[B], *events: Event) -> Progress:
        """Return the progress after the last step; between steps, `events` happen, in this order."""
        progress = self.progress
        if self.done:
            log.info("nothing to train: %d of %s steps are done", progress.global_step, progress.total_steps)
            return progress
        total = expected_steps(progress, self.config)
        bar = progress_bar(total, "training", "step", not self.run.is_main, initial=progress.global_step)
        together = self.run.accelerator.num_processes > 1  # one process must not stop while others wait for it
        with bar, self.run.stop.held() if together else contextlib.nullcontext():
            try:
                with unwrapped():
                    self._train(batches, events, bar)
            except Stopped as stopped:
                if self.resumable:
                    if progress.global_step != self._saved_step:
                        self.save()
                    total = expected_steps(progress, self.config)
                    step = f"{progress.global_step}" if total is None else f"{progress.global_step} of {total}"
                    stopped.reached = f" at step {step}; the same command goes on from there"
                raise
        self.store.wait()
        log.info("step %d: trained, at %.3g images/s", progress.global_step, progress.images_per_second)
        return progress

    def _train(self, batches: Batches[B], events: Sequence[Event], bar: tqdm[None]) -> None:
        progress, config, accelerator = self.progress, self.config, self.run.accelerator
        for micro_batches in batches(
            progress.global_step,
            micro_steps=config.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        ):
            with self.run.stop.held():
                began = time.perf_counter()
                metrics = self._take_step(micro_batches)
                self._count(micro_batches, time.perf_counter() - began)
                bar.total = expected_steps(progress, config)
                rate = progress.images_per_second
                bar.update()
                if self._due(config.log_every_steps):
                    values = {name: float(value) for name, value in metrics.items()} | {"images_per_second": rate}
                    self.run.log_metrics(values, progress.global_step)
                    loss = values[next(iter(values))]
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.3g} images/s", refresh=False)
            self.run.stop_if_asked()
            for every_steps, happen in events:
                if self._due(every_steps):
                    happen(progress.global_step)
            if self._due(config.save_every_steps):
                self.save()
                self.run.stop_if_asked()
            if self.done:
                break

    def _due(self, every_steps: int | None, after: int | None = None) -> bool:
        """Return whether something is due after this step, or after another number of steps."""
        step = self.progress.global_step if after is None else after
        return every_steps is not None and (
            step % every_steps == 0 or step >= (self.progress.total_steps or sys.maxsize)
        )

    def _take_step(self, micro_batches: Sequence[B]) -> dict[str, Tensor | float]:
        """Return the metrics of one optimiser step; a non-finite loss or gradient changes nothing and is counted."""
        step, run, progress = self.step, self.run, self.progress
        # dropout layers draw from the global generator; everything else from its sample's position
        torch.manual_seed(draw_key(run.seed, progress.global_step, f"dropout-{run.accelerator.process_index}"))
        means: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            with contextlib.ExitStack() as stack:
                stack.enter_context(run.attention())
                if number < len(micro_batches) - 1:
                    for forward in step.forwards.values():
                        stack.enter_context(run.accelerator.no_sync(forward))
                for name, loss in step.losses(batch, progress.global_step).items():
                    if name in step.modules:
                        run.accelerator.backward(loss / len(micro_batches))
                    means[name] = means.get(name, 0) + loss.detach() / len(micro_batches)
        metrics: dict[str, Tensor | float] = {}
        for name, value in means.items():
            metrics[f"loss/{name}"] = run.accelerator.reduce(value, reduction="mean")
        rate = self._learning_rate()
        for name, optimizer in self.optimizers.items():
            parameters = [p for p in step.modules[name].parameters() if p.grad is not None]
            metrics[f"grad_norm/{name}"] = run.accelerator.clip_grad_norm_(parameters, self.optim.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
        # of the means over processes: all of them take the step, or none does
        if all(math.isfinite(value) for value in metrics.values()):
            logged = self._due(self.config.log_every_steps, progress.global_step + 1)
            for name, optimizer in self.optimizers.items():
                before = weights(name, step.modules[name]) if logged else None
                optimizer.step()
                if before is not None:
                    metrics |= update_norms(name, step.modules[name], before)
                    del before
            for average in step.averages.values():
                average.update(progress.steps_taken)
            step.after_step()
            progress.skipped_in_a_row = 0
        else:
            self._skip(micro_batches, all(math.isfinite(metrics[f"loss/{name}"]) for name in means))
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return metrics | {"learning_rate": rate}

    def _skip(self, micro_batches: Sequence[B], finite_loss: bool) -> None:
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        samples = [getattr(batch, "rows", None) for batch in micro_batches]
        if (scaler := self.run.accelerator.scaler) is not None:  # float16: the loss was scaled out of its range
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        log.warning("step %d skipped: loss or gradient is not finite", self.progress.global_step)
        row = {"skipped_steps": self.progress.skipped_steps, "finite_loss": float(finite_loss)}
        self.run.log_metrics(row, self.progress.global_step + 1)
        if self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite; the last one "
                f"on images {samples}. Lower optim.learning_rate or look at those images; the run resumes from its "
                "newest checkpoint"
            )

    def _learning_rate(self) -> float:
        progress = self.progress
        return learning_rate(progress.steps_taken, progress.total_steps, self.optim, progress.decay_start)

    def _count(self, micro_batches: Sequence[B], seconds: float) -> None:
        progress = self.progress
        if progress.total_steps is None:
            seconds = self.run.agreed(seconds)  # clocks differ, and all must fix the same number of steps
        progress.count(sum(map(len, micro_batches)) * self.run.accelerator.num_processes, seconds)
        if fix_total_steps(progress, self.config, self.optim):
            log.info(
                "step %d: the number of steps is fixed, %d for the %g s asked for, at %.3g s a step",
                progress.global_step,
                progress.total_steps,
                self.config.max_train_seconds,
                progress.step_seconds,
            )

    def save(self) -> None:
        """Write a checkpoint of weights, averages, optimisers and progress.

        Raises:
            FloatingPointError: a weight is not finite; the newest checkpoint stays what it was.

        """
        self._saved_step = self.progress.global_step
        self.run.accelerator.wait_for_everyone()
        if not self.run.is_main:
            return
        tensors, state = training_state(*self._trained)
        if (bad := not_finite(tensors)) is not None:
            raise FloatingPointError(
                f"step {self.progress.global_step}: {bad} is not finite, so nothing was saved; lower "
                "optim.learning_rate; the run resumes from its newest checkpoint"
            )
        tensors |= self.record.tensors()
        state |= {"progress": asdict(self.progress), **self.record.state()}
        with self.run.stop.held():
            self.store.save(self.progress.global_step, tensors, state)

    def resume(self, record: RunRecord | None = None, allow_changes: bool = False) -> None:
        """Go on from the newest checkpoint of the run's folder, if there is one.

        `record` says what is trained, see `run_record`, and goes into every checkpoint.

        Raises:
            ConfigError: the checkpoint is of a training of something else, and that is not allowed.
            CheckpointError: it cannot be read, or the processes do not agree on one.

        """
        self.record = record or RunRecord()
        if self.run.is_main:
            self.store.remove_leftovers()
        path = agreed_checkpoint(self.store)
        if path is None:
            return
        saved = self.store.load(path)
        self.record = self.record.going_on_from(saved, allow_changes)
        planned, before = self.progress.total_steps, saved.state.get("record", {}).get("config", {}).get("loop", {})
        other_limit = any(before.get(name, value) != value for name, value in limits(self.config).items())
        self.progress = Progress(**saved.state["progress"])
        if planned is not None or other_limit:
            self.progress.total_steps, self.progress.decay_start = planned, None
        restore_training(saved, *self._trained)
        if self.run.accelerator.num_processes > 1:
            refuse_apart("weights", {name: weights_hash(module) for name, module in self.step.modules.items()})
        self._saved_step = self.start_step = self.progress.global_step
        self.run.forget_metrics_after(self.progress.global_step)
        log.info("resumed %s at step %d", path.name, self.progress.global_step)
