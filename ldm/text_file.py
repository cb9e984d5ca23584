"""Text files that a person hands over, whoever wrote them: lists of captions, metadata, factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO


def open_text(path: str | Path, errors: str = "strict", newline: str | None = None) -> TextIO:
    r"""Return the file opened as text, as `open` does it: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    The encoding is known from the first four bytes, as RFC 4627, section 3, does it: without a mark the text must begin
    with a character of ASCII to be known for UTF-16 or UTF-32. Line ends of every system are "\n" unless `newline`
    says otherwise. Raises FileNotFoundError if there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; paths are relative to the folder that the command is run in")
    with file.open("rb") as data:
        encoding = json.detect_encoding(data.read(4))
    return file.open(encoding=encoding, errors=errors, newline=newline)


def read_text(path: str | Path) -> str:
    """Return what is in a file, as `open_text` reads it; raises ValueError, which names the byte, if it is no text."""
    with open_text(path) as lines:
        try:
            return lines.read()
        except UnicodeError as error:
            where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
            raise ValueError(f"{path}: not text in {lines.encoding.upper()}{where}") from None


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a file without spaces around them, empty ones left out; raises as `read_text`."""
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]
