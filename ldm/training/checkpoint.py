"""Crash-safe checkpoints: safetensors and JSON, listed in a manifest, put in place by one rename.

::

    folder/step-100/<name>.safetensors    one file for each name in `tensors`
                    state.json            everything that is not a tensor
                    manifest.json         format, global_step, size and sha256 of each file; written last
    folder/.tmp-*                         a save or a deletion that did not end; removed at the next start
    folder/step-100.replaced-0            what step-100 was, while a second save of that step takes its place
    folder/step-200.rolled-back-0         a step later than one saved since; never read, never deleted
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.config.places import PLAIN_NAME
from ldm.files import sync_folder
from ldm.training.manifest import (
    JSON,
    CheckpointError,
    Chunk,
    bad_file,
    read_manifest,
    read_verified,
    write_folder,
)

__all__ = ["JSON", "Checkpoint", "CheckpointError", "CheckpointStore"]

_FOLDER = re.compile(r"step-(\d+)(\.replaced-\d+)?")
IGNORE = {"ignore_errors": True}
_HEADER_BYTES, _SLACK_BYTES = 256, 65536
"""Allowance for a tensor's entry in the safetensors header; for the manifest, folder entries and blocks."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The safetensors names of the data types that weights, optimisers and counters have."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """The arguments of `CheckpointStore.save`, read back: tensors on the CPU, tuples as lists."""

    global_step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class CheckpointStore:
    """The newest `keep` checkpoints of one run, in `folder`.

    One process writes. Reading needs no store: `load` is static.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints: got {keep}; expected 1 or more, so that a run can always be resumed")
        self.folder = folder
        self.keep = keep
        self._deleting: list[threading.Thread] = []

    def save(self, global_step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]) -> Path:
        """Return the folder ``step-<global_step>``, complete and on disk, older ones pruned to `keep`.

        Tensors of any device and layout are written contiguous, tensors that share memory each for itself.
        Until the new folder is in place nothing else is deleted: a kill at any moment leaves the previous
        checkpoint or the new one. An existing folder of that step is replaced. Folders of later steps (the
        run was resumed from before them) are renamed, with a warning: `latest` must not go back to them.

        Raises:
            CheckpointError: too little room, or the system refused a write; the previous checkpoint stays.
            TypeError, ValueError: `state` is not JSON, a name is not a plain file name, safetensors has no
                such data type, the step is negative.

        """
        _check_arguments(global_step, tensors)
        text = json.dumps(state).encode()
        needed = len(text) + _SLACK_BYTES
        for group in tensors.values():
            needed += sum(tensor.nbytes + len(name) + _HEADER_BYTES for name, tensor in group.items())
        final = self.folder / f"step-{global_step}"
        temporary = self.folder / f".tmp-{final.name}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.remove_leftovers()
            if needed > (free := shutil.disk_usage(self.folder).free):
                raise OSError(errno.ENOSPC, f"{free} bytes are free")
            temporary.mkdir()
            files = {f"{name}.safetensors": _safetensors(group) for name, group in tensors.items()}
            write_folder(temporary, global_step, {**files, "state.json": [text]})
            if final.exists():
                _set_aside(final, "replaced")
            os.replace(temporary, final)
            sync_folder(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"{final}, which needs {needed} bytes, was not written: {error}. Earlier checkpoints are "
                "untouched: make room, or set output_dir to another disk, and resume"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something was raised
        self._prune(global_step)
        return final

    def wait(self) -> None:
        """Wait until the checkpoints that were pruned are deleted."""
        while self._deleting:
            self._deleting.pop().join()

    def latest(self) -> Path | None:
        """Return the newest checkpoint that verifies (size and sha256 of every file), None without any.

        Each newer one that does not verify is logged as a warning that names the bad file. None after such
        warnings means that every checkpoint is bad, not that there was none.
        """
        for _, path in found(self.folder):
            try:
                for name, entry in read_manifest(path)["files"].items():
                    read_verified(path / name, entry)
            except CheckpointError as error:
                logger.warning("checkpoint skipped: %s", error)
            else:
                return path
        return None

    def newest(self) -> Path | None:
        """Return the newest checkpoint, whether or not it verifies, None without any."""
        return next((path for _, path in found(self.folder)), None)

    @staticmethod
    def newest_state(folder: Path) -> dict[str, Any]:
        """Return ``state.json`` of the newest checkpoint in `folder` whose state verifies, {} without any."""
        for _, path in found(folder):
            try:
                entry = read_manifest(path)["files"]["state.json"]
                state: dict[str, Any] = json.loads(read_verified(path / "state.json", entry))
            except (CheckpointError, KeyError, ValueError):
                continue  # `latest` says what is wrong with it
            return state
        return {}

    @staticmethod
    def load(path: Path) -> Checkpoint:
        """Return the checkpoint in the folder `path`; every byte used has been verified.

        Raises:
            CheckpointError: a file is missing, cut, changed or of another format; names the file.

        """
        manifest = read_manifest(path)
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {}
        for name, entry in manifest["files"].items():
            data = read_verified(path / name, entry)
            try:
                if name == "state.json":
                    state = json.loads(data)
                    if not isinstance(state, dict):
                        raise ValueError(f"a {type(state).__name__}; expected an object")
                else:
                    tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
            except (ValueError, RecursionError, SafetensorError) as error:
                raise bad_file(path / name, f"is as it was written, but cannot be read: {error}") from error
        return Checkpoint(manifest["global_step"], tensors, state)

    def _prune(self, global_step: int) -> None:
        kept: set[int] = set()
        for step, path in found(self.folder):
            if step > global_step:
                aside = _set_aside(path, "rolled-back")
                logger.warning(
                    "%s is of a later step than the one just saved (%d): now %s, delete it if not wanted",
                    *(path, global_step, aside.name),
                )
            elif step in kept or len(kept) == self.keep:
                # Renamed first: a deletion that is cut short must not look like a damaged checkpoint.
                trash = path.with_name(f".tmp-{path.name}-{os.getpid()}")
                os.replace(path, trash)
                self._deleting.append(threading.Thread(target=shutil.rmtree, args=(trash,), kwargs=IGNORE))
                self._deleting[-1].start()  # which takes half as long as writing: training need not wait for it
            else:
                kept.add(step)

    def remove_leftovers(self) -> None:
        """Delete what killed saves have left behind; only for the process that writes."""
        self.wait()
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)


def found(folder: Path) -> list[tuple[int, Path]]:
    """Return ``(global_step, path)`` of checkpoints in `folder`: newest first, a plain one before what it replaced."""
    matches = [(_FOLDER.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir()]
    ranked = [(int(match[1]), match[2] is None, path) for match, path in matches if match]
    return [(step, path) for step, _, path in sorted(ranked, reverse=True)]


def _check_arguments(global_step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    if global_step < 0:
        raise ValueError(f"global_step: got {global_step}; expected the optimiser steps done, 0 or more")
    for file, group in tensors.items():
        if not PLAIN_NAME.fullmatch(file):
            raise ValueError(
                f"tensors: got the name {file!r}; expected a plain file name, such as 'denoiser' (letters, "
                "digits, '_', '-' and '.')"
            )
        for name, tensor in group.items():
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"tensors: {file}: {name} is {tensor.dtype}; expected one of {[*_DTYPES]}")


def _safetensors(group: Mapping[str, Tensor]) -> Iterator[Chunk]:
    """Yield a safetensors file: the header, then tensor after tensor.

    The library's own writer would copy the whole group first, which takes as long as writing it.
    """
    tensors = sorted(group.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    header: dict[str, JSON] = {}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        offsets = [start, end]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        yield memoryview(data)


def _set_aside(path: Path, label: str) -> Path:
    """Return the new path of `path`, renamed to the first free ``<step>.<label>-<k>``."""
    step = path.name.partition(".")[0]
    aside = next(name for k in count() if not (name := path.with_name(f"{step}.{label}-{k}")).exists())
    os.replace(path, aside)
    return aside
