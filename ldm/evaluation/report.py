"""The report of an evaluation: sections with rows of numbers beside their baselines, curves and images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from PIL import Image

from .measure import Measure

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

BESIDE = ("floor", "chance", "copy", "shuffled", "ceiling")
"""Usual baselines of a row, in the order of their columns; columns of others follow."""

COPIERS = ("copy", "shuffled")
"""Baselines that ignore the caption: a copier of training images, and the model's images for other captions."""


@dataclass(frozen=True)
class Row:
    """One number and its baselines.

    `better` says which direction is better; "none" is for a number that only describes. `beside` holds the baselines by
    name, `BESIDE` or any other, measured in the same way. `name` and `note` are plain text.
    """

    name: str
    measure: Measure
    better: Literal["higher", "lower", "none"]
    beside: Mapping[str, Measure]
    note: str = ""

    @property
    def copied(self) -> bool:
        """Return whether a baseline that ignores the caption is as good as the model.

        True if one of `COPIERS` reaches the worse end of the model's interval. False for a number that only describes,
        and where a number is missing (NaN).
        """
        copiers = [self.beside[name].value for name in COPIERS if name in self.beside]
        if self.better == "higher":
            return any(value >= self.measure.low for value in copiers)
        return self.better == "lower" and any(value <= self.measure.high for value in copiers)


@dataclass(frozen=True)
class Curve:
    """A plot of named lines: points (x, measure) in ascending order of x, which is positive if `log_x`."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, Measure]]]
    log_x: bool = False


@dataclass(frozen=True)
class Figure:
    """An image of any mode, with a title and a caption in plain text; shown whole and unscaled."""

    title: str
    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Section:
    """One question and the measurements that answer it.

    `text` is plain; an empty line separates paragraphs. The first row is the section's headline, which the summary of
    the report shows. `meaning` says in a sentence what that number means.
    """

    title: str
    text: str = ""
    rows: Sequence[Row] = ()
    curves: Sequence[Curve] = ()
    figures: Sequence[Figure] = ()
    meaning: str = ""

    @property
    def beside(self) -> tuple[str, ...]:
        """Return the names of the baselines that any row has: the usual ones in their order, then the others."""
        found = dict.fromkeys(name for row in self.rows for name in row.beside)
        return (*(name for name in BESIDE if name in found), *(name for name in found if name not in BESIDE))


@dataclass(frozen=True)
class Report:
    """An evaluation of one model.

    `settings` are what the numbers depend on: the network that measures and its hash, how it resizes, guidance,
    sampler, steps, seeds, fingerprint of the data, hash of the held-out images, hardware, versions. The report is
    published with the model, so `model` and `settings` must not name a path, a host or a user.
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
        """Return the report without its images, for `json.dumps`; numbers that are not finite become None."""
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
    """Return the value in plain dicts and lists, with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
