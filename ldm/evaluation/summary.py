"""A report in a terminal: its headlines as a table, each with a sentence that says what it means."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill, wrap

from .markdown import ARROWS, COPIED
from .report import Report, Row, Section

WIDTH, NAME_WIDTH = 100, 34
"""Columns of a terminal that sentences and names are wrapped at."""
COLUMNS = {
    "floor": "true images against each other",
    "chance": "guessing",
    "copy": "a copier of training images",
    "shuffled": "this model, captions exchanged",
    "ceiling": "the true images, or what the autoencoder makes of them",
    "pixel by pixel": "each colour value sent alone",
}
"""The meaning of each baseline, by name."""


def summary(report: Report) -> str:
    """Return a line for each headline of the report, with its baselines, and under it what it means."""
    headlines = report.headlines
    if not headlines:
        return "nothing was measured"
    columns = Section("", rows=headlines).beside
    names = [wrap(row.name + ARROWS[row.better], NAME_WIDTH) for row in headlines]
    cells = [["", "value (95 % interval)", *columns]]
    cells += [[name[0], *_values(row, columns)] for name, row in zip(names, headlines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    meanings = [section.meaning for section in report.sections if section.rows]
    parts = [head]
    for name, line, row, meaning in zip(names, lines, headlines, meanings, strict=True):
        said = " ".join(filter(None, [meaning, f"Here {COPIED}." if row.copied else ""]))
        parts += [line, *name[1:], *wrap(said, WIDTH, initial_indent="    ", subsequent_indent="    ")]
    legend = "; ".join(f"{name}: {COLUMNS[name]}" for name in columns if name in COLUMNS)
    return "\n".join([*parts, *([fill(legend, WIDTH)] if legend else [])])


def _values(row: Row, columns: Sequence[str]) -> list[str]:
    return [str(row.measure), *(f"{row.beside[name].value:.3g}" if name in row.beside else "" for name in columns)]
