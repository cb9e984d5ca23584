"""Problems of data from others: what is wrong with an image, a clip, a caption or a row."""

from __future__ import annotations

from dataclasses import dataclass

STOPPING = frozenset(
    {"missing", "outside", "too large", "too short", "unreadable", "bad row", "bad caption", "bad class", "bad split"}
)
"""Kinds of problems that stop a training before it begins; the others are only reported."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with one image or row."""

    where: str
    """Path relative to the folder, or "row 7"."""
    kind: str
    reason: str
    row: int | None = None
    """Index of the row in the source; None if the problem is not of one row."""
    like: tuple[int, ...] = ()
    """Rows with the same image or one that looks alike."""

    @property
    def stops(self) -> bool:
        """True if a training cannot begin with this problem."""
        return self.kind in STOPPING

    def __str__(self) -> str:
        """Return kind, place and reason in one line that can be printed, even if a file name is not valid Unicode."""
        return f"{self.kind}: {self.where}: {self.reason}".encode(errors="backslashreplace").decode()


def caption_fault(value: object) -> str | None:
    """Return the fault of a caption column's value, None if it has none.

    Allowed are null, a text in valid Unicode, and a list of such texts.
    """
    for caption in value if isinstance(value, list | tuple) else [value]:
        if caption is None:
            continue
        if not isinstance(caption, str):
            return f"the caption is a {type(caption).__name__}; expected text or a list of texts"
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            return f"the caption is not valid Unicode at character {error.start}"
    return None


def label_fault(value: object) -> str | None:
    """Return the fault of a class column's value; None if it is a whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        return "the row has no class" if value is None else f"the class is a {type(value).__name__}; expected a number"
    return f"the class is {value}; expected 0 or more" if value < 0 else None
