"""The batches of a training, loaded by worker processes if ``data.workers`` is above 0."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import active_children, get_all_start_methods
from queue import Empty, SimpleQueue
from types import FrameType
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ldm.data.batches import Batch, PositionDataset, Sample, collate
from ldm.data.positions import step_positions

_LIVE: WeakSet[Iterator[Batch]] = WeakSet()
"""The DataLoader iterators of this process that have worker processes."""
_ABANDONED: list[Iterator[Batch]] = []
"""Iterators whose loader processes were killed, kept until this process ends. A deleted DataLoader iterator sets an
event; a killed process may have held its lock, and this process would wait forever. Torch skips that at exit."""


class LoadingError(RuntimeError):
    """A loader process died or hung; the message names the images that the loader processes were loading."""


class _Watched(Dataset[Sample]):
    """A data set that records in `places` the position that each loader process is loading; -1 before its first."""

    def __init__(self, dataset: PositionDataset, workers: int):
        self.dataset = dataset
        self.places = torch.full((workers,), -1).share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, position: int) -> Sample:
        if (worker := get_worker_info()) is not None:
            self.places[worker.id] = position
        return self.dataset[position]

    def failed(self, error: BaseException) -> LoadingError:
        """Return the error that says what failed and at which images."""
        positions = [int(place) for place in self.places if place >= 0]
        rows = [self.dataset.row(position) for position in positions]
        return LoadingError(
            f"{error}. The loader processes were at the images {rows} (positions {positions}); "
            "look at those, at the memory, or set data.workers to 0"
        )


def training_batches(
    dataset: PositionDataset, start_step: int, *, micro_steps: int = 1, rank: int = 0, world: int = 1
) -> Iterator[list[Batch]]:
    """Yield, for each optimiser step from `start_step` on, this process's micro-batches.

    Raises:
        LoadingError: a loader process died, or took longer than ``data.timeout_seconds`` for a batch. When one dies,
            the error is raised by a signal handler, anywhere in the main thread.

    """
    config = dataset.images.config
    step_positions(0, config.batch_size, 0, micro_steps, 0, world)  # refuses a batch size that cannot be shared

    def plan() -> Iterator[list[int]]:
        step = start_step
        while True:
            for micro in range(micro_steps):
                yield list(step_positions(step, config.batch_size, micro, micro_steps, rank, world))
            step += 1

    watched = _Watched(dataset, config.workers)
    loader = DataLoader(
        watched,
        batch_sampler=plan(),  # endless; the loop decides when to stop
        num_workers=config.workers,
        collate_fn=collate,
        persistent_workers=False,
        worker_init_fn=_leave_process_group,
        multiprocessing_context="fork" if config.workers and "fork" in get_all_start_methods() else None,
    )
    micro_batches: Iterator[Batch] = iter(loader)
    following: Callable[[], Batch] = partial(next, micro_batches)
    if config.workers:
        _LIVE.add(micro_batches)
        _name_what_died(watched)
        following = partial(_from_processes, watched, config.timeout_seconds, following)
    while True:
        yield [following() for _ in range(micro_steps)]


def _from_processes(watched: _Watched, timeout_seconds: float, following: Callable[[], Batch]) -> Batch:
    """Return the next batch; LoadingError if a loader process ends or hangs; errors of the data are not changed."""
    try:
        return _within(timeout_seconds, following)
    except LoadingError:
        raise
    except Exception as error:
        _kill_loaders()
        if isinstance(error, RuntimeError | OSError | EOFError):  # the last two: it ended while it sent a batch
            raise watched.failed(error) from error
        raise


def _within(seconds: float, following: Callable[[], Batch]) -> Batch:
    """Return the batch of `following`, or raise its error; TimeoutError if it has not finished after `seconds`.

    It runs in a thread, which is abandoned after a timeout. DataLoader's own timeout is not enough: it covers the
    announcement of a batch, but the tensors are then fetched from the worker, and a stopped one is waited for forever.
    """
    answers: SimpleQueue[Batch | BaseException] = SimpleQueue()

    def answer() -> None:
        try:
            answers.put(following())
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=answer, name="next batch", daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"No batch came within {seconds:g} seconds (data.timeout_seconds)") from None
    if isinstance(found, BaseException):
        raise found
    return found


def _leave_process_group(worker: int) -> None:
    """Leave the run's process group: a loader ended by a signal to the run would look like one that failed."""
    os.setpgid(0, 0)


class _Death:
    """Torch's signal handler for the death of a loader process; its error also names the images of one stream."""

    def __init__(self, handler: Callable[[int, FrameType | None], object], watched: _Watched):
        self.handler, self.watched = handler, watched

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            _kill_loaders()
            raise self.watched.failed(error) from error


def _name_what_died(watched: _Watched) -> None:
    """Make the error of a dead loader process name the images of this stream, no longer those of an earlier one."""
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, _Death):
        handler = handler.handler
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGCHLD, _Death(handler, watched))


def _kill_loaders() -> None:
    """Kill all loader processes of this process, which would otherwise wait for them at its end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # their deaths are expected
    _ABANDONED.extend(_LIVE)
    for process in active_children():
        process.kill()
