"""Files: reading those of others, with errors that name the file, and writing ours so that a kill leaves them whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

MAX_JSON_BYTES = 2**26


def open_text(path: str | Path, errors: str = "strict", newline: str | None = None) -> TextIO:
    r"""Return the file opened as text, as `open` does it: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    The encoding is found from the first four bytes, as in RFC 4627, section 3: UTF-16 and UTF-32 without a mark only if
    the text begins with an ASCII character. Line ends of every system become "\n" unless `newline` says
    otherwise. Raises FileNotFoundError if there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; paths are relative to the folder that the command is run in")
    with file.open("rb") as data:
        encoding = json.detect_encoding(data.read(4))
    return file.open(encoding=encoding, errors=errors, newline=newline)


def read_text(path: str | Path) -> str:
    """Return the text of a file, as `open_text` reads it; ValueError, which names the byte, if it is not text."""
    with open_text(path) as lines:
        try:
            return lines.read()
        except UnicodeError as error:
            where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
            raise ValueError(f"{path}: not text in {lines.encoding.upper()}{where}") from None


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a file, stripped and without empty ones; raises as `read_text`."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises ValueError, which names the file, for other content, and OSError if there is no file.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_JSON_BYTES}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}; expected an object")
    return found


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield the path of a temporary file in `folder`, for `put_in_place`; deleted at the end if it still exists."""
    aside = folder / f"{uuid4().hex}.tmp"
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def put_in_place(aside: Path, path: Path) -> None:
    """Flush the file `aside` to the disk and rename it to `path`, where a reader never finds half of it."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk; otherwise a new or renamed file may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: wait until no other process holds it. The folder is created if needed.

    The operating system keeps the lock, so a killed process leaves none. Where no lock is possible, as in a folder that
    cannot be written, there is no waiting.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.lockf(stack.enter_context((folder / ".lock").open("a")), fcntl.LOCK_EX)
        yield
