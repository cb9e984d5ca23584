"""Lines and bars that are read while something runs: short lines with the time, and one bar at a time."""

from __future__ import annotations

import io
import logging
import os
import sys
from datetime import datetime
from typing import Any

from tqdm.auto import tqdm

log = logging.getLogger(__name__)
FILE_SECONDS = 60.0
"""Seconds between lines on a progress where stderr is no terminal."""


class Lines(logging.Handler):
    """Writes each record to stderr as ``12:03:05 message``, above a bar if there is one; warnings say that they are."""

    def createLock(self) -> None:  # noqa: N802  (logging's name)
        """Take tqdm's lock: with one of its own, a thread that logs and one that draws a bar would each wait."""
        self.lock = tqdm.get_lock()

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {level}{super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every handler: a line that cannot be written ends nothing
            self.handleError(record)


def write_lines() -> None:
    """Write the log lines of this package, and the warnings of libraries, to stderr, as `Lines` do.

    Of several processes that a launcher started, all but the first write warnings alone.
    """
    level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING
    logging.basicConfig(format="%(message)s", handlers=[Lines()], level=logging.WARNING)
    logging.getLogger("ldm").setLevel(level)


class _LogLines(io.StringIO):
    """A file for tqdm where there is no terminal: each state of a bar becomes a line of the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            log.info("%s", line)
        return len(text)


def progress_bar(total: int | None, desc: str, unit: str, disable: bool = False, **more: Any) -> tqdm[Any]:
    """Return a bar over `total` units, shown after a second and gone when it is done.

    One is read at a time: inside another bar that has begun to move it is not shown. Where stderr is no terminal, a
    line a minute is logged in its place. `more` is tqdm's.
    """
    shown: dict[str, Any] = {"file": sys.stderr, "delay": 1, "mininterval": 0.5, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        shown = {
            "file": _LogLines(),
            "delay": FILE_SECONDS,
            "mininterval": FILE_SECONDS,
            "maxinterval": FILE_SECONDS,
            "bar_format": "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}",
        }
    others = [other for other in list(getattr(tqdm, "_instances", ())) if not other.disable]
    inside = any(other.n > other.initial for other in others)
    return tqdm(total=total, desc=desc, unit=unit, leave=False, position=0, disable=disable or inside, **shown | more)
