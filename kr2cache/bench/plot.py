"""All races in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kr2cache.errors import ConfigError
from kr2cache.report.svg import GREY, PALETTE, canvas
from kr2cache.system.disk import check_writable

ROW = 0.2
"""Inches."""
OVER_LINES = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
"""Background of a text, so that the line at 1 does not cross it."""
FORMATS = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Raise ``ConfigError`` before anything is measured if ``path`` cannot be written or has another suffix."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path} is none of {', '.join(FORMATS)}.", "Use a name such as bench.svg.")
    check_writable(path.absolute().parent, "--plot")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw one bar per contender: its time divided by the limit of its race. Error bars show the smallest and largest
    time; for ours they show the confidence interval of the median. The suffix of ``path`` sets the format.
    """
    rows = [(race, place, name) for race in result["races"] for place, name in enumerate(race["medians"])]
    with canvas((len(rows) + 2 * len(result["races"]) + 3) * ROW) as figure:
        axes = figure.add_subplot()
        at, ticks, labels = 0.0, [], []
        for race in result["races"]:
            limit, limits = race["limit"], race["limits"]
            at += 2
            beginning = axes.get_yaxis_transform()
            axes.text(0.01, at - 0.9, race["title"], transform=beginning, weight="bold", fontsize=8, bbox=OVER_LINES)
            for place, (name, median) in enumerate(race["medians"].items()):
                times = race["seconds"][name]
                ratio, low, high = (seconds / limit for seconds in (median, min(times), max(times)))
                if place == limits:
                    ratio, (low, high) = race["ratio"], race["ratio_range"]
                colour = GREY if place < limits else PALETTE[0 if place == limits else 4]
                axes.barh(at, ratio, color=colour, height=0.8)
                axes.errorbar(ratio, at, xerr=[[ratio - low], [high - ratio]], color="black", linewidth=0.8, capsize=2)
                axes.text(high * 1.05, at, f"{ratio:.2f}", va="center", fontsize=7, bbox=OVER_LINES)
                ticks.append(at)
                labels.append(name if len(name) <= 46 else name[:45] + "…")
                at += 1
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(ticks, labels, fontsize=7)
        axes.set_xscale("log")
        smallest = min(median / race["limit"] for race in result["races"] for median in race["medians"].values())
        ticks_x = [tick for tick in (0.01, 0.1, 0.5, 1, 2, 4, 8, 16) if tick > 0.7 * smallest or tick >= 0.5]
        axes.set_xticks(ticks_x, [f"{tick:g}" for tick in ticks_x])
        axes.set_xlim(min(0.4, 0.7 * smallest), None)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("times the limit (grey)", fontsize=8)
        figure.savefig(path, dpi=150)
