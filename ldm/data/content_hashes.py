"""Names of files by their bytes, each of which is read once, and of the images in them."""

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
"""Bytes."""
KEPT = 2**20
"""Hashes that are kept of each root beyond those that were asked for last."""
FILES_AT_ONCE, READERS = 4096, 8
SAVE_SECONDS = 60.0
TIME_STEP, COARSE_TIME_STEP = 20_000_000, 2_000_000_000
"""Nanoseconds after which a change of a file shows in its ctime, and where file systems have whole seconds only."""

Hashes = dict[bytes, bytes]
"""Of bytes, by a hash of the path and state of the file that had them."""


def images_fingerprint(hashes: Iterable[bytes | None]) -> str:
    """Return a name of images, given hashes of their bytes: equal names, equal images in this order.

    None stands for an image that cannot be read.
    """
    return f"images-{joint_hash(hashes).hex()}"


def joint_hash(hashes: Iterable[bytes | None]) -> bytes:
    """Return the name of several contents in their order."""
    return content_hash(b"".join(value or bytes(DIGEST_SIZE) for value in hashes))


def content_hash(data: bytes | memoryview) -> bytes:
    """Return the name of these bytes."""
    return blake2b(data, digest_size=DIGEST_SIZE).digest()


def file_hash(path: str | Path) -> bytes:
    """Return the `content_hash` of a file's bytes; memory stays flat."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: blake2b(digest_size=DIGEST_SIZE)).digest()


def content_hashes(root: str, paths: Sequence[str | None]) -> list[bytes | None]:
    """Return the `content_hash` of each file's bytes, None where there is no file or none that can be read.

    `paths` are real ones. Hashes are kept, those of the files in folder `root` together, and a file is read again if
    its path, size, mtime, ctime or inode is another than before: nobody can set a ctime back. Of several processes
    one reads, and the others wait for what it finds.
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
    """Yield path, key and hash of each file that can be read; the key is None if another file may come to have it."""
    _let_settle(files.values())

    def read(path: str) -> tuple[str, bytes | None, bytes] | None:
        try:
            state = os.stat(path)  # before its bytes: if they change meanwhile, that state will not come again
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
    """Return the time, in ns, from which on a change of the file gives it another ctime."""
    return state.st_ctime_ns + (TIME_STEP if state.st_ctime_ns % 10**9 else COARSE_TIME_STEP)


def _let_settle(states: Iterable[os.stat_result]) -> None:
    """Wait until files that have just been written would show a change."""
    wait = max(map(_settled_at, states), default=0) - time.time_ns()
    time.sleep(min(max(wait, 0), COARSE_TIME_STEP) / 10**9)


def _load(folder: Path) -> Hashes:
    """Return the hashes that are kept, none if their file is missing or damaged."""
    path = folder / "hashes.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            rows, seal = file.get_tensor("hashes").tobytes(), (file.metadata() or {}).get("blake2b")
        if content_hash(rows).hex() != seal:
            raise SafetensorError("its bytes were changed")
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged (%s); the files that it has hashes of are read again", path, error)
        return {}
    table = np.frombuffer(rows, f"V{DIGEST_SIZE}").reshape(-1, 2)
    return dict(zip(table[:, 0].tolist(), table[:, 1].tolist(), strict=True))


def _save(folder: Path, known: Hashes, wanted: Iterable[bytes]) -> None:
    """Keep the hashes of the `wanted` keys, and some of the others."""
    rows = {key: known[key] for key in wanted if key in known}
    rows |= dict(islice(((key, value) for key, value in known.items() if key not in rows), KEPT))
    table = np.frombuffer(b"".join(key + value for key, value in rows.items()), np.uint8)
    try:
        with written_aside(folder) as aside:
            save_file({"hashes": table}, aside, {"blake2b": content_hash(table.data).hex()})
            put_in_place(aside, folder / "hashes.safetensors")
    except OSError as error:
        log.warning("hashes of files cannot be kept, and are computed again by the next run: %s", error)
