"""Batches along the stream of positions, loaded beside the training if it asks for that.

A batch is a function of its position, so loader processes need no orders: each of W loads every W-th batch and writes
it into a socket of its own, which holds it up until the training has read it. The processes share nothing else. One
that dies closes its socket, and the wait for one that hangs or stops, even in the middle of a batch, has an end. In
torch's DataLoader it has not: the loaders share locks that one can die with, and tensors that one must be alive to
hand over.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized

import torch
from torch import Tensor

from ldm.data.batches import Batch, PositionDataset, Sample, collate
from ldm.data.positions import step_positions

BYTES_AHEAD = 2**20
"""Batches of latents are small, and many fit into a socket: a loader process then need not wait for the training."""


class LoadingError(RuntimeError):
    """A loader process died or hung; the message names the image that it was at."""


def training_batches(
    dataset: PositionDataset, start_step: int, *, micro_steps: int = 1, rank: int = 0, world: int = 1
) -> Iterator[list[Batch]]:
    """Yield, for each optimiser step from `start_step` on, this process's micro-batches.

    Raises:
        LoadingError: the loader process whose turn it is has died, or sends nothing for ``data.timeout_seconds``. What
            the data raises in a loader process is raised as it is.

    """
    config = dataset.images.config

    def positions(number: int) -> range:
        step, micro_step = divmod(number, micro_steps)
        return step_positions(start_step + step, config.batch_size, micro_step, micro_steps, rank, world)

    positions(0)  # refuses a batch size that cannot be shared
    loaders: list[_Loader] = []
    try:
        for first in range(config.workers):
            loaders.append(_start(dataset, map(positions, count(first, config.workers))))
        here = (collate([dataset[position] for position in positions(number)]) for number in count())
        batches = (loader.next_batch() for loader in cycle(loaders)) if loaders else here
        while True:
            yield [next(batches) for _ in range(micro_steps)]
    finally:
        for loader in loaders:
            loader.process.kill()  # a signal that also ends one that hangs


@dataclass(frozen=True)
class _Loader:
    """A loader process, as the training sees it."""

    dataset: PositionDataset
    process: BaseProcess
    place: Synchronized[int]
    """The position that it is at, -1 before its first."""
    batches: Connection
    """A socket, whose reads raise BlockingIOError after ``data.timeout_seconds``."""

    def next_batch(self) -> Batch:
        """Return its next batch; raises as `training_batches`."""
        try:
            if self.process.exitcode is not None:
                raise EOFError  # whatever it has sent, it will send no more
            found = self.batches.recv()
            if isinstance(found, Batch):
                return found.with_tensors(partial(_read, self.batches))
        except Exception as error:
            raise LoadingError(f"{self._reason(error)}. {self._where()}") from error
        raise found

    def _reason(self, error: Exception) -> str:
        match error:
            case BlockingIOError():
                seconds = self.dataset.images.config.timeout_seconds
                return f"No batch came within {seconds:g} seconds (data.timeout_seconds)"
            case EOFError() | ConnectionError():
                self.process.join(timeout=10)
                return f"A loader process ended with exit code {self.process.exitcode}"
        return f"{type(error).__name__}: {error}"

    def _where(self) -> str:
        position = self.place.value
        where = f"image {self.dataset.row(position)} (position {position})" if position >= 0 else "no image yet"
        return f"The loader process was at {where}; look at that, at the memory, or set data.workers to 0"


def _start(dataset: PositionDataset, plan: Iterator[Sequence[int]]) -> _Loader:
    """Start a process that loads the batches of `plan`, given by their positions, one after another."""
    forking = get_context("fork")
    place = forking.Value("q", -1, lock=False)
    ours, theirs = forking.Pipe()
    seconds = dataset.images.config.timeout_seconds
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with (
        socket.socket(fileno=os.dup(ours.fileno())) as reading,
        socket.socket(fileno=os.dup(theirs.fileno())) as writing,
    ):
        reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BYTES_AHEAD)
    process = forking.Process(target=_load, args=(dataset, plan, place, ours, theirs), daemon=True)
    process.start()
    theirs.close()  # the process holds its end alone: it is closed when the process dies
    return _Loader(dataset, process, place, ours)


def _load(
    dataset: PositionDataset,
    plan: Iterator[Sequence[int]],
    place: Synchronized[int],
    ours: Connection,
    theirs: Connection,
) -> None:
    """Load and send, in the loader process, until it is killed or the training is gone."""
    os.setpgid(0, 0)  # signals to the group are for the training, which ends its loaders
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    ours.close()

    def sample(position: int) -> Sample:
        place.value = position
        return dataset[position]

    with suppress(BrokenPipeError):
        for positions in plan:
            try:
                batch = collate([*map(sample, positions)])
            except Exception as error:
                error.add_note(traceback.format_exc())
                theirs.send(error)
            else:
                theirs.send(batch.with_tensors(lambda tensor: tensor.to("meta")))  # shapes and types
                batch.with_tensors(partial(_write, theirs))


def _write(connection: Connection, tensor: Tensor) -> Tensor:
    rest = _bytes(tensor)
    while rest:
        rest = rest[os.write(connection.fileno(), rest) :]
    return tensor


def _read(connection: Connection, like: Tensor) -> Tensor:
    tensor = torch.empty_like(like, device="cpu")
    rest = _bytes(tensor)
    while rest:
        if not (length := os.readv(connection.fileno(), [rest])):
            raise EOFError
        rest = rest[length:]
    return tensor


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
