"""One run in one folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderLock:
    """Held by the process that trains in `folder`, until it releases it or ends, however it ends.

    The system keeps it, so a killed run leaves no stale one; loader processes do not inherit it. ``.lock`` in the
    folder holds the number of the process that locked it last.

    Raises:
        RuntimeError: another process holds it.

    """

    def __init__(self, folder: Path):
        self._file = (folder / ".lock").open("a+", encoding="ascii")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "of an unknown number"
            self._file.close()
            raise RuntimeError(
                f"output_dir {folder.name}: process {holder} trains in this folder; wait for it, stop it, or set "
                "output_dir to another folder"
            ) from error
        self._file.seek(0)
        self._file.truncate()
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Let another process train in the folder."""
        self._file.close()
