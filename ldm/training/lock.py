"""One run in one folder."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout


def lock_folder(folder: Path) -> FileLock:
    """Return the lock of `folder`, held by this process until it releases it or ends, however it ends.

    The system keeps it, so a killed run leaves no stale one; loader processes do not inherit it. ``.lock`` in the
    folder holds the number of the process that locked it last.

    Raises:
        RuntimeError: another run holds it.

    """
    file = folder / ".lock"
    lock = FileLock(file, blocking=False, fallback_to_soft=False, on_acquired=_write_number)
    try:
        lock.acquire()
    except Timeout:
        holder = file.read_text(encoding="ascii").strip() or "of an unknown number"
        raise RuntimeError(
            f"output_dir {folder.name}: process {holder} trains in this folder; wait for it, stop it, or set "
            "output_dir to another folder"
        ) from None
    return lock


def _write_number(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
