"""What an evaluation says: rows of numbers beside their baselines, curves and images, in sections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from PIL import Image

from .measure import Measure

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

BESIDE = ("floor", "chance", "copy", "shuffled", "ceiling")
"""Usual baselines of a row, in the order of their columns; others stand after them."""

COPIERS = ("copy", "shuffled")
"""Baselines that follow no caption: a copier of training images, and our images under exchanged captions."""


@dataclass(frozen=True)
class Row:
    """One number, and what it has to be read beside.

    `better` says which way is better; "none" is a number that only describes. `beside` are baselines by their names,
    `BESIDE` or any other, measured in the same way. `name` and `note` are plain text.
    """

    name: str
    measure: Measure
    better: Literal["higher", "lower", "none"]
    beside: Mapping[str, Measure]
    note: str = ""

    @property
    def copied(self) -> bool:
        """Return whether a model that follows no caption gets there too.

        So it is where one of `COPIERS` is as good as the worse end of our interval, or better. Never where nothing is
        better, or where a number is missing (NaN).
        """
        copiers = [self.beside[name].value for name in COPIERS if name in self.beside]
        if self.better == "higher":
            return any(value >= self.measure.low for value in copiers)
        return self.better == "lower" and any(value <= self.measure.high for value in copiers)


@dataclass(frozen=True)
class Curve:
    """Lines in one plot, by their names: points (x, measure) of ascending x, positive where `log_x`."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, Measure]]]
    log_x: bool = False


@dataclass(frozen=True)
class Figure:
    """An image of any mode with a title and a caption, both plain text; shown whole, in its own pixels."""

    title: str
    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Section:
    """One question and what was measured to answer it.

    `text` is plain, its paragraphs apart by an empty line. The first row is the section's headline: it stands in the
    summary of the report.
    """

    title: str
    text: str = ""
    rows: Sequence[Row] = ()
    curves: Sequence[Curve] = ()
    figures: Sequence[Figure] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """Return the names of the baselines that any row has: the usual ones in their order, then the others."""
        found = dict.fromkeys(name for row in self.rows for name in row.beside)
        return (*(name for name in BESIDE if name in found), *(name for name in found if name not in BESIDE))


@dataclass(frozen=True)
class Report:
    """An evaluation of one model.

    `settings` are what the numbers depend on: the network that measures and its hash, how it resizes, guidance,
    sampler, steps, seeds, fingerprint of the data, hash of what was held out, hardware, versions. The report travels
    with the model: whoever fills it in names no path, host or user, in `model` neither.
    """

    title: str
    model: str
    settings: Mapping[str, JSON]
    sections: Sequence[Section]

    @property
    def headlines(self) -> tuple[Row, ...]:
        """Return the first row of each section that has rows."""
        return tuple(section.rows[0] for section in self.sections if section.rows)

    def as_json(self) -> dict[str, JSON]:
        """Return everything but the images, for `json.dumps`; numbers that are not finite are None."""
        sections: list[JSON] = [
            {
                "title": section.title,
                "text": section.text,
                "rows": [_row(row) for row in section.rows],
                "curves": [_curve(curve) for curve in section.curves],
            }
            for section in self.sections
        ]
        settings = _finite(self.settings)
        return {"title": self.title, "model": self.model, "settings": settings, "sections": _finite(sections)}


def _row(row: Row) -> dict[str, JSON]:
    return {
        "name": row.name,
        **asdict(row.measure),
        "better": row.better,
        "beside": {name: asdict(measure) for name, measure in row.beside.items()},
        "copied": row.copied,
        "note": row.note,
    }


def _curve(curve: Curve) -> dict[str, JSON]:
    axes: dict[str, JSON] = {"x_label": curve.x_label, "y_label": curve.y_label, "log_x": curve.log_x}
    lines = {name: [{"x": x, **asdict(measure)} for x, measure in points] for name, points in curve.lines.items()}
    return {"title": curve.title, **axes, "lines": lines}


def _finite(value: JSON) -> JSON:
    """Return the same in plain dicts and lists, with None for NaN and infinity, which strict JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
