"""Convert a matplotlib figure to SVG for an HTML page, and to PNG.

Text stays text: it can be searched, copied and read aloud. Colours are those of Okabe and Ito, which colour-blind
readers can distinguish, and each line has its own marker. The same runs give the same bytes: no date, and ids with a
fixed salt.
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
"""Inches. At 72 points per inch this is about the width of a phone, so text there keeps its size."""

LONGEST_NAME = 120
PNG_DPI = 200
"""Dots per inch: sharp in the column of a paper."""

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
    """Describes the plot in words, for readers who cannot see it."""
    svg: str
    """An ``<svg>`` element. With an XML declaration it is a file."""
    png: bytes
    name: str
    """File name without ending."""


@contextlib.contextmanager
def canvas(height: float) -> Iterator[Figure]:
    """An empty figure in the style of the report, independent of the user's matplotlib settings.

    Args:
        height: Inches.
    """
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
    # Metadata contain the date.
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # This CSS rule would apply to the whole page. An attribute of the root, added below, applies to this figure only.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:LONGEST_NAME]
    label = html.escape(described, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" stroke-linejoin="round" ', 1)
    return Plot(title=title, caption=caption, described=described, svg=svg, png=pixels.getvalue(), name=name)


def named_apart(plots: Sequence[Plot]) -> list[Plot]:
    """Give all plots different names: titles in a non-Latin script leave few characters for a name. Ids in each SVG get
    the name as prefix, because all plots are in one HTML document.
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
