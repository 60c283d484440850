"""From a matplotlib figure to SVG that can stand in a page, and to PNG.

Text stays text (it can be read aloud, searched and copied), colours are Okabe and Ito's, which colour-blind readers
tell apart, and every line has its own marker besides. The same runs give the same bytes: no date, ids by a fixed salt.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))
GREY = "#666666"
WIDTH = 5.2
"""Inches. At 72 points an inch that is about a phone's width: text is hardly scaled down there."""

LONGEST_NAME = 120
PNG_DPI = 200
"""Dots an inch: sharp in a paper's column."""

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "kr2cache",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Plot:
    """A figure of the page."""

    title: str
    caption: str
    described: str
    """What is drawn, for those who cannot see it."""
    svg: str
    """An element for a page, and with an XML declaration a file."""
    png: bytes
    name: str
    """File name without ending."""


@contextlib.contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """An empty figure, ``height`` inches, in the report's style whatever the user's own matplotlib settings."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def draw(figure: Figure, title: str, caption: str, described: str) -> Plot:
    """Render ``figure``."""
    file, pixels = io.StringIO(), io.BytesIO()
    figure.savefig(file, format="svg")
    figure.savefig(pixels, format="png", dpi=PNG_DPI, metadata={"Software": None})
    text = file.getvalue()
    svg = text[text.index("<svg") :]
    # The date of drawing among it.
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Its one rule is for the whole page; joined to the figure's own root it stays with the figure.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:LONGEST_NAME]
    label = html.escape(described, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" stroke-linejoin="round" ', 1)
    return Plot(title=title, caption=caption, described=described, svg=svg, png=pixels.getvalue(), name=name)


def named_apart(plots: Sequence[Plot]) -> list[Plot]:
    """The same with names that are all different, for little is left of a title in another script. The ids in each SVG
    get its name as prefix, since all plots stand in one document.
    """
    taken: set[str] = set()
    apart = []
    for plot in plots:
        name, again = plot.name, 1
        while name in taken:
            again += 1
            name = f"{plot.name}-{again}"
        taken.add(name)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", plot.svg)
        apart.append(replace(plot, name=name, svg=svg))
    return apart
