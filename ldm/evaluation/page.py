"""A report as one self-contained HTML file: no script, no other file, no connection."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from PIL import Image

from .markdown import ARROWS, COPIED, setting_text
from .plot import LINE_HUES, svg
from .report import BESIDE, Report, Row

ENLARGED_TO = 256
"""Greatest width, in CSS pixels, that a narrower image is enlarged to, by a whole factor."""

COLUMN_WIDTH = 440
"""Width of a column in CSS pixels; a wider image has a row of its own."""


@dataclass(frozen=True)
class Strip:
    """The positions of a row's numbers on a line, in percent of its length."""

    value: float
    low: float
    high: float
    marks: tuple[tuple[str, float], ...]
    """Names of the baselines and their positions."""


def html(report: Report) -> str:
    """Return the page: the headlines on top, then the sections, then the settings; for phones too, light and dark.

    It contains everything: style, plots as SVG, images as PNG, without metadata. Names, texts and captions are escaped.
    The same report gives the same page, and the page can be written as UTF-8.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"strip": strip, "svg": svg, "png": png, "setting": setting_text, "paragraphs": _paragraphs}
    template = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8"))
    words = {"arrows": ARROWS, "copied": COPIED, "usual": BESIDE, "line_colours": LINE_HUES}
    words |= {"enlarged_to": ENLARGED_TO, "column_width": COLUMN_WIDTH}
    page = template.render(report=report, **words)
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair, which captions may have, is a "?"


def strip(row: Row) -> Strip | None:
    """Return the row on a line that ends at its largest number, and begins at 0 or at its smallest if that is negative.

    Baselines that are not finite are left out. None if the value or an end of its interval is not finite.
    """
    measure = row.measure
    own = (measure.value, measure.low, measure.high)
    if not all(map(math.isfinite, own)):
        return None
    beside = {name: other.value for name, other in row.beside.items() if math.isfinite(other.value)}
    start, end = min(0, *own, *beside.values()), max(*own, *beside.values())

    def place(number: float) -> float:
        return round(3 + 94 * (number - start) / (end - start or 1), 2)

    marks = tuple((name, place(number)) for name, number in beside.items())
    return Strip(place(measure.value), place(measure.low), place(measure.high), marks)


def png(image: Image.Image) -> str:
    """Return the image's pixels as a ``data:`` address of a PNG without metadata, RGB, or RGBA where transparent."""
    pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    pixels.info.clear()  # a colour profile would be written, and may name a device
    written = io.BytesIO()
    pixels.save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
