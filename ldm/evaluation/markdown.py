"""A report as Markdown, for model cards and terminals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from .report import JSON, Curve, Report, Row, Section

COPIED = "a copier reaches this"
"""The note of a row where a baseline that ignores the caption is as good as the model."""

ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}


def markdown(report: Report) -> str:
    """Return the report without its images: a heading of level 2, sections of level 3, curves as tables.

    The tables are in GitHub's syntax. Names, texts and notes are escaped: they are shown as they are.
    """
    parts = [f"## {plain(report.title)}", f"Model: {plain(report.model)}. ↑ higher is better, ↓ lower is better."]
    for section in report.sections:
        parts += _section(section)
    if report.settings:
        items = (f"- {plain(key)}: {plain(setting_text(value))}" for key, value in report.settings.items())
        parts += ["### Settings", "\n".join(items)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Return Markdown that shows `text` in one line; white space becomes one space, control characters are removed."""
    words = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
    escaped = re.sub(r"([\\`*_\[\]|~#$!:@])", r"\\\1", words.replace("&", "&amp;"))
    escaped = escaped.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([-+](?=[- ]|$)|\d+(?=[.)]( |$)))", lambda start: _start(start[0]), escaped)


def setting_text(value: JSON) -> str:
    """Return the value of a setting as one line of text: members are joined by commas, other values are as in JSON."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting_text(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(setting_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _start(mark: str) -> str:
    """Return the mark of a list or a rule, escaped so that it begins neither."""
    return f"&#{ord(mark[0])};{mark[1:]}"


def _section(section: Section) -> list[str]:
    parts = [f"### {plain(section.title)}"]
    parts += [plain(paragraph) for paragraph in re.split(r"\n\s*\n", section.text) if paragraph.strip()]
    if section.rows:
        names = ["measure", "value (95 % interval)", "n", *section.beside, "note"]
        parts.append(_table(names, (_cells(row, section.beside) for row in section.rows)))
    return [*parts, *(part for curve in section.curves for part in _curve(curve))]


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    beside = [f"{row.beside[name]}" if name in row.beside else "" for name in names]
    note = "; ".join(filter(None, [COPIED if row.copied else "", row.note]))
    return [row.name + ARROWS[row.better], str(row.measure), f"{row.measure.n:,}", *beside, note]


def _curve(curve: Curve) -> list[str]:
    """Return the title, and a table with a row for each x that a line has; x is rounded to three decimals."""
    lines = {name: dict(points) for name, points in curve.lines.items()}
    places = sorted({x for points in lines.values() for x in points})
    rows = [[f"{round(x, 3):g}", *(str(points.get(x, "")) for points in lines.values())] for x in places]
    return [f"{plain(curve.title)}: {plain(curve.y_label)}", _table([curve.x_label, *lines], rows)]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruled = [[plain(name) for name in names], ["---"] * len(names), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
