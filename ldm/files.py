"""Files that a kill or a power cut leaves whole, and that one process at a time writes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield the path of a new file in `folder`, to be written and put in place; what is left of it is deleted."""
    aside = folder / f"{uuid4().hex}.tmp"
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def put_in_place(aside: Path, path: Path) -> None:
    """Flush the file `aside` to the disk and let it take the place of `path`: never is a part of it found there."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: without it a new or renamed file may not outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with this `folder`, which is made if there is none.

    The system keeps the lock, so a killed process leaves none. Nobody waits where none can be had, as in a folder that
    cannot be written.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.lockf(stack.enter_context((folder / ".lock").open("a")), fcntl.LOCK_EX)
        yield
