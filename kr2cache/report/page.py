"""The report as one HTML page, without scripts, network access or other files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from kr2cache.report.svg import Plot
from kr2cache.report.tables import Table, characters

TEMPLATE = "page.html.j2"
_REM_A_CHARACTER, _REM_A_COLUMN, _REM_BESIDE = 0.56, 1.6, 2.0
"""Widths in rem: a character of a table, the padding of a cell, the margins of the page."""


def page(
    title: str,
    summary: Sequence[str],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    failures: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The HTML text. Everything except the SVG of plots is escaped.

    Args:
        summary: Sentences for the head of the page.
        tables: In this order. A table with ``details`` is folded under the table before it.
        failures: A sentence for each cell that failed.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = resources.files("kr2cache.report").joinpath(TEMPLATE).read_text("utf-8")
    return environment.from_string(text).render(
        title=title,
        summary=summary,
        tables=tables,
        widths={table.name: _rem(table) for table in tables},
        plots=plots,
        failures=failures,
        notes=notes,
    )


def _rem(table: Table) -> int:
    """About how wide a window must be to show the whole table, in rem (16 pixels)."""
    return round(sum(_REM_A_CHARACTER * longest + _REM_A_COLUMN for longest in characters(table)) + _REM_BESIDE)
