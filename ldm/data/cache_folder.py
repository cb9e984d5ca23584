"""The cache folder: everything in it can be computed again."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from ldm.config.places import expanded

DIGEST_SIZE = 12
_ENTRY = rf"[0-9a-f]{{{2 * DIGEST_SIZE}}}"
_OURS = re.compile(
    rf"{_ENTRY}/(\d{{9}}(-[0-9a-f]{{32}})?\.safetensors|hashes\.safetensors|[\w.]+\.tmp|\.lock)"
    r"|openmoji-[\d.]+-\d+(\.\d+)?\.(safetensors|tmp)"  # written by version 0.1.0, as are shards without a hash
)
"""Paths, relative to a kind's folder, of files that this project writes; the folder may contain other files."""


def cache_folder() -> Path:
    """Return ``$LDM_CACHE``, with ``~`` and variables expanded, else ``~/.cache/ldm``.

    Raises:
        ValueError: there is no such variable or user.

    """
    chosen = os.environ.get("LDM_CACHE")
    return Path(expanded(chosen, "LDM_CACHE")) if chosen else Path.home() / ".cache" / "ldm"


def entry_folder(kind: str, key: str) -> Path:
    """Return the folder of one entry of a kind; `key` names everything the entry depends on."""
    return cache_folder() / kind / blake2b(key.encode(errors="surrogateescape"), digest_size=DIGEST_SIZE).hexdigest()


@dataclass(frozen=True)
class Kind:
    """A kind of cache entries: their number, their size in bytes, and the time at which the newest was written."""

    name: str
    entries: int
    size: int
    written: float


def kinds() -> list[Kind]:
    """Return the kinds that the cache has entries of, in alphabetical order."""
    found = []
    for name in sorted(os.listdir(cache_folder())) if cache_folder().is_dir() else []:
        states = {path: path.lstat() for path in _files(name)}
        if states:
            top = cache_folder() / name
            entries = {path.relative_to(top).parts[0] for path in states}
            size = sum(state.st_size for state in states.values())
            found.append(Kind(name, len(entries), size, max(state.st_mtime for state in states.values())))
    return found


def clear(kind: str) -> None:
    """Delete the entries of a kind, and no other file; links are neither followed nor deleted."""
    files = list(_files(kind))
    for file in files:
        file.unlink(missing_ok=True)
    for folder in [*{file.parent for file in files}, cache_folder() / kind]:
        with suppress(OSError):  # it holds other files, or is gone
            folder.rmdir()


def _files(kind: str) -> Iterator[Path]:
    top = cache_folder() / kind
    if top.is_symlink():
        return
    for parent, folders, names in os.walk(top):
        folders[:] = [name for name in folders if re.fullmatch(_ENTRY, name)]
        for path in (Path(parent) / name for name in names):
            if _OURS.fullmatch(path.relative_to(top).as_posix()) and stat.S_ISREG(path.lstat().st_mode):
                yield path
