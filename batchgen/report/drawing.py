"""Figures that are drawn once and shown twice: inside the page, in the reader's light or dark, and as PNG files.

Each colour stands for a part. A PNG has the colour itself; in the page's SVG it is replaced by the style sheet's
variable of the part's name, so that it follows the page. Text stays text, in the reader's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Parts and their colours on white; page.css has the same names. No two are the same, or the SVG could not tell them.
INK, SOFT, LINE, PAPER = "#1d2733", "#5d6b7c", "#e3e8ee", "#ffffff"
BLUE, ORANGE, TEAL, RED, VIOLET, BROWN = "#2463c9", "#d9730d", "#0f8a7e", "#c0362c", "#7a4fc4", "#8a6d3b"
SERIES = (BLUE, ORANGE, TEAL, VIOLET, BROWN, RED)
_NAMES = {
    INK: "ink",
    SOFT: "soft",
    LINE: "line",
    PAPER: "paper",
    BLUE: "blue",
    ORANGE: "orange",
    TEAL: "teal",
    RED: "red",
    VIOLET: "violet",
    BROWN: "brown",
}

WIDE, HALF = 11.6, 5.6  # inches: the page's whole width, and half of it

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "batchgen",  # the same page again from the same folder
}


@dataclass(frozen=True)
class Plot:
    """One figure of the report."""

    name: str  # of its PNG file, without the ending
    title: str
    caption: str  # what it shows, in numbers, for those who cannot see it too
    svg: str
    png: bytes
    wide: bool


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside look as the report's do."""
    with mpl.rc_context(_STYLE):
        yield


def axes(count: int = 1, *, wide: bool = False, height: float = 2.7, widths: Sequence[float] = ()) -> list[Axes]:
    """The axes of a new figure, beside each other."""
    figure = Figure(figsize=(WIDE if wide else HALF, height), layout="constrained")
    grid = figure.add_gridspec(1, count, width_ratios=widths or [1.0] * count)
    return [figure.add_subplot(grid[number]) for number in range(count)]


def rows_of_bars(drawn: Axes, count: int) -> None:
    """The first bar at the top, and one alone no thicker than others."""
    middle, half = (count - 1) / 2, max(count, 3) / 2
    drawn.set_ylim(middle + half, middle - half)
    drawn.grid(visible=False)
    drawn.tick_params(axis="y", labelcolor=INK)


def finished(name: str, title: str, caption: str, drawn: Axes) -> Plot:
    """The plot of the figure that `drawn` is in."""
    figure = drawn.get_figure(root=True)
    assert figure is not None
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=160, facecolor=PAPER)
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    wide = figure.get_figwidth() > HALF + 0.1
    return Plot(name, title, caption, _inline(svg.getvalue(), name, f"{title}. {caption}"), png.getvalue(), wide)


def _inline(svg: str, name: str, label: str) -> str:
    """The SVG as an element of the page: ids of its own, colours by name, described for a screen reader."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, part in _NAMES.items():
        svg = svg.replace(colour, f"var(--{part})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    quoted = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = re.search(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', svg)
    assert head is not None
    return f'<svg viewBox="{head[1]}" role="img" aria-label="{quoted}">{svg[head.end() :]}'


def short(number: float) -> str:
    """A number for the tick of an axis: 1.2k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


SHORT = FuncFormatter(lambda number, _: short(number))


def plain_numbers(axis: Axis) -> None:
    """Writes plain numbers on a logarithmic axis: its own labels are formulas, which no part of the page can show."""
    axis.set_major_formatter(SHORT)
    axis.set_minor_formatter(NullFormatter())
