"""A folder of files with a manifest of their sizes and sha256 values: written last, checked on every read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from ldm.config.places import PLAIN_NAME
from ldm.files import sync_folder

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Chunk: TypeAlias = bytes | memoryview

FORMAT = 1
"""Version of the checkpoint layout; a reader refuses every other."""
MANIFEST = "manifest.json"

BYTES_AHEAD = 2**30
"""Most bytes, copied from a GPU perhaps, that are kept in memory until they are hashed."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, does not verify or does not fit; the message says what to do."""


def write_folder(folder: Path, global_step: int, files: Mapping[str, Iterable[Chunk]]) -> None:
    """Write each name's chunks, then ``manifest.json``, into the existing `folder`; flush all to the disk."""
    with ThreadPoolExecutor(1) as hashing, ExitStack() as stack:
        written = []
        for name, chunks in files.items():
            file = stack.enter_context((folder / name).open("xb", buffering=0))
            written.append((name, file, *_write(file, chunks, hashing)))
        for _, file, _, _ in written:  # when all are written: the disk and the hashes are busy beside each other
            os.fsync(file.fileno())
        entries: dict[str, JSON] = {}
        for name, _, size, digest in written:
            entries[name] = {"size": size, "sha256": digest.result()}
        content: dict[str, JSON] = {"format": FORMAT, "global_step": global_step, "files": entries}
        manifest = json.dumps({**content, "sha256": _digest_of(content)}, indent=1)
        file = stack.enter_context((folder / MANIFEST).open("xb", buffering=0))
        _write(file, [manifest.encode()], hashing)
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest: ``global_step`` and ``files``, ``{name: {"size": ..., "sha256": ...}}``.

    It holds its own sha256: a change in the manifest is not mistaken for a change in a file.

    Raises:
        CheckpointError: it is missing, changed or of another format, or names a file that is not in the folder.

    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest_of(manifest):
        raise bad_file(path, "does not have the sha256 that it says it has: it was changed")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')}, expected {FORMAT}: use the version of ldm that wrote it"
        )
    files = manifest.get("files")  # its own sha256 tells of accidents; anybody can write one that is right
    if not isinstance(files, dict) or not isinstance(manifest.get("global_step"), int):
        raise bad_file(path, "has no global_step or no files")
    for name, entry in files.items():
        if not PLAIN_NAME.fullmatch(name):
            raise bad_file(path, f"names {name!r}, which is no file of its folder")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise bad_file(path, f"says neither size nor sha256 of {name}")
    return manifest


def read_verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    """Return the bytes of `path`, which have the size and sha256 of its manifest entry.

    Raises:
        CheckpointError: they do not, or cannot be read.

    """
    data = _read(path)
    if len(data) != entry["size"]:
        raise bad_file(path, f"has {len(data)} bytes, the manifest says {entry['size']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise bad_file(path, "does not have the sha256 that the manifest says: its bytes were changed")
    return data


def bad_file(path: Path, reason: str) -> CheckpointError:
    """Return the error that says why the file `path` cannot be used, and what to do."""
    return CheckpointError(
        f"{path} {reason}. Restore the file, or delete its folder and resume from an older checkpoint"
    )


def _write(file: FileIO, chunks: Iterable[Chunk], hashing: Executor) -> tuple[int, Future[str]]:
    """Write the chunks; return their size and, to come, their sha256."""
    digest = hashlib.sha256()
    size = 0
    ahead: deque[tuple[int, Future[None]]] = deque()
    for chunk in chunks:
        rest = memoryview(chunk)
        size += len(rest)
        ahead.append((size, hashing.submit(digest.update, chunk)))  # both it and the write release the interpreter lock
        while len(rest):
            rest = rest[os.write(file.fileno(), rest) :]
        while size - ahead[0][0] > BYTES_AHEAD:
            ahead.popleft()[1].result()
    return size, hashing.submit(digest.hexdigest)


def _digest_of(content: Mapping[str, JSON]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise bad_file(path, "is missing") from error
    except OSError as error:
        raise bad_file(path, f"cannot be read ({error.strerror})") from error
