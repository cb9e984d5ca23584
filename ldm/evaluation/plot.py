"""A curve as SVG; its colours are CSS variables of the page."""

from __future__ import annotations

import math
import re
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .report import Curve

SIZE_INCHES = (4.3, 2.5)
LINE_HUES = 6
"""Number of line colours, ``--line-0`` and so on; a seventh line has the first one again."""

TICKED_PLACES = 9
"""Most points of a logarithmic axis that are all labelled, as in a sweep."""

INK, RULE = "#000001", "#000002"
COLOURS = {INK: "var(--muted)", RULE: "var(--rule)"} | {f"#0001{n:02x}": f"var(--line-{n})" for n in range(LINE_HUES)}
"""Colour given to matplotlib -> CSS variable of the page that replaces it."""

STYLE: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "ldm", "font.family": "DejaVu Sans", "font.size": 9},
    **{"axes.edgecolor": RULE, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
    **{"axes.grid": True, "grid.color": RULE, "axes.grid.axis": "y", "axes.facecolor": "none"},
    **{"xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": INK, "ytick.labelcolor": INK},
    **{"ytick.major.size": 0, "axes.formatter.useoffset": False, "axes.formatter.use_mathtext": False},
}


def svg(curve: Curve) -> str:
    """Return one ``<svg>`` element: axes with numbers, each line with its 95 % interval as a band.

    Its only text is numbers: the page writes title, labels and names. It holds no date and no program's name, so that
    the same curve gives the same text. Points that are not finite are gaps.
    """
    written = StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's matplotlibrc says
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor="none")
        axes = figure.add_subplot()
        _draw(axes, curve)
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = written.getvalue()
    element = re.sub(r'<g id="[^"]*"', "<g", element[element.index("<svg") :])  # ids that the next plot would have too
    return re.sub("|".join(COLOURS), lambda found: COLOURS[found[0]], element)


def _draw(axes: Axes, curve: Curve) -> None:
    if curve.log_x:
        axes.set_xscale("log")
        places = sorted({x for points in curve.lines.values() for x, _ in points})
        axes.xaxis.set_minor_locator(NullLocator())
        if len(places) <= TICKED_PLACES:
            axes.set_xticks(places, [f"{x:g}" for x in places])
    for number, points in enumerate(curve.lines.values()):
        colour = f"#0001{number % LINE_HUES:02x}"
        xs = [x for x, _ in points]
        values, lows, highs = ([_or_gap(getattr(m, end)) for _, m in points] for end in ("value", "low", "high"))
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
        axes.plot(xs, values, color=colour, marker="o", markersize=3.5, linewidth=1.6)


def _or_gap(number: float) -> float:
    return number if math.isfinite(number) else math.nan
