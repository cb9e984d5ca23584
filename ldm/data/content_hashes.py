"""Hashes of files' bytes, cached so that each file is read once, and fingerprints of the images in them."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ldm.data.cache_folder import entry_folder
from ldm.files import locked, put_in_place, written_aside
from ldm.terminal import progress_bar

log = logging.getLogger(__name__)

DIGEST_SIZE = 16
"""Bytes of a hash."""
KEPT = 2**20
"""Hashes that are kept for each root besides those of the last call."""
FILES_AT_ONCE, READERS = 4096, 8
SAVE_SECONDS = 60.0
TIME_STEP, COARSE_TIME_STEP = 20_000_000, 2_000_000_000
"""Nanoseconds after which a change of a file shows in its ctime; the second is for file systems with whole seconds."""

Hashes = dict[bytes, bytes]
"""From a hash of a file's path and state to the hash of its bytes."""


def images_fingerprint(hashes: Iterable[bytes | None]) -> str:
    """Return a name for images in this order, given the hashes of their bytes; None: an unreadable image."""
    return f"images-{joint_hash(hashes).hex()}"


def joint_hash(hashes: Iterable[bytes | None]) -> bytes:
    """Return one hash of several hashes in this order."""
    return content_hash(b"".join(value or bytes(DIGEST_SIZE) for value in hashes))


def content_hash(data: bytes | memoryview) -> bytes:
    """Return the hash of these bytes."""
    return blake2b(data, digest_size=DIGEST_SIZE).digest()


def file_hash(path: str | Path) -> bytes:
    """Return the `content_hash` of a file's bytes; memory stays flat."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=DIGEST_SIZE)).digest()


def content_hashes(root: str, paths: Sequence[str | None]) -> list[bytes | None]:
    """Return the `content_hash` of each file's bytes, None for a missing or unreadable file.

    `paths` are real paths. Hashes are cached, together for all files of folder `root`. A file is read again if its
    path, size, mtime, ctime or inode has changed: nobody can set a ctime back. If several processes call this, one
    reads and the others wait for its results.
    """
    if not any(paths):
        return [None] * len(paths)
    folder = entry_folder("file-hashes", root)
    with locked(folder):
        known = _load(folder)
        states = {path: state for path in paths if path is not None and (state := _state(path)) is not None}
        keys = {path: _key(path, state) for path, state in states.items()}
        found = {path: known[key] for path, key in keys.items() if key in known}
        unread = {path: state for path, state in states.items() if path not in found}
        saved = time.monotonic()
        for path, key, value in _read(unread):
            found[path] = value
            if key is not None:
                known[key] = value
                keys[path] = key
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(folder, known, keys.values())
                saved = time.monotonic()
        if unread:
            _save(folder, known, keys.values())
    return [None if path is None else found.get(path) for path in paths]


def _state(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _key(path: str, state: os.stat_result) -> bytes:
    text = f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\0{state.st_ino}"
    return content_hash(os.fsencode(text))


def _read(files: dict[str, os.stat_result]) -> Iterator[tuple[str, bytes | None, bytes]]:
    """Yield path, key and hash of each readable file; the key is None if a later change might not alter it."""
    _let_settle(files.values())

    def read(path: str) -> tuple[str, bytes | None, bytes] | None:
        try:
            state = os.stat(path)  # before the bytes: if they change meanwhile, this state never occurs again
            settled = _settled_at(state) < time.time_ns()
            return path, _key(path, state) if settled else None, file_hash(path)
        except OSError:
            return None

    total, rest = sum(state.st_size for state in files.values()), iter(files)
    with (
        ThreadPoolExecutor(READERS) as readers,  # reading and hashing release the interpreter lock
        progress_bar(total, "hashing files", "B", unit_scale=True) as bar,
    ):
        while some := list(islice(rest, FILES_AT_ONCE)):
            for done in readers.map(read, some):
                if done is not None:
                    bar.update(files[done[0]].st_size)
                    yield done


def _settled_at(state: os.stat_result) -> int:
    """Return the time, in ns, after which every change of the file alters its ctime."""
    return state.st_ctime_ns + (TIME_STEP if state.st_ctime_ns % 10**9 else COARSE_TIME_STEP)


def _let_settle(states: Iterable[os.stat_result]) -> None:
    """Wait until a change of any of the files would alter its ctime."""
    wait = max(map(_settled_at, states), default=0) - time.time_ns()
    time.sleep(min(max(wait, 0), COARSE_TIME_STEP) / 10**9)


def _load(folder: Path) -> Hashes:
    """Return the cached hashes, none if their file is missing or damaged."""
    path = folder / "hashes.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            rows, seal = file.get_tensor("hashes").tobytes(), (file.metadata() or {}).get("blake2b")
        if content_hash(rows).hex() != seal:
            raise SafetensorError("its bytes were changed")
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged (%s); the files whose hashes it holds are read again", path, error)
        return {}
    table = np.frombuffer(rows, f"V{DIGEST_SIZE}").reshape(-1, 2)
    return dict(zip(table[:, 0].tolist(), table[:, 1].tolist(), strict=True))


def _save(folder: Path, known: Hashes, wanted: Iterable[bytes]) -> None:
    """Save the hashes of the `wanted` keys, and up to `KEPT` others."""
    rows = {key: known[key] for key in wanted if key in known}
    rows |= dict(islice(((key, value) for key, value in known.items() if key not in rows), KEPT))
    table = np.frombuffer(b"".join(key + value for key, value in rows.items()), np.uint8)
    try:
        with written_aside(folder) as aside:
            save_file({"hashes": table}, aside, {"blake2b": content_hash(table.data).hex()})
            put_in_place(aside, folder / "hashes.safetensors")
    except OSError as error:
        log.warning("hashes of files cannot be kept; the next run computes them again: %s", error)
