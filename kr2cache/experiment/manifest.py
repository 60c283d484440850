"""The manifest of a sweep, ``RUN_DIR/sweeps/NAME.json``: which run belongs to which cell.

``report`` can read it at any time. While processes work, each cell in it also has

    done        true once the runs of the cell exist. Runs of earlier sweeps do not count: the data may have changed
    taken_by    the processes that began to train the cell
    failed_by   the processes that tried the cell and failed, or died in it, each with its error
    not_for     the processes that cannot train the cell, as their checks found
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kr2cache.errors import KR2CacheError
from kr2cache.experiment.cells import Cell
from kr2cache.experiment.grid import Grid

MANIFESTS = "sweeps"
"""The folder of the manifests, in the run folder."""
WORK_KEYS = ("done", "taken_by", "failed_by", "not_for")
"""The entries that a cell has in the manifest only while processes work."""

Entry = dict[str, Any]
"""One cell of the manifest."""


def work_of(entry: Entry) -> Entry:
    """What ``entry`` has only while processes work."""
    return {key: entry[key] for key in WORK_KEYS if key in entry}


def one_more(entry: Entry, key: str, process: str) -> Entry:
    """The list of processes that ``entry`` has under ``key``, with one more."""
    return {key: [*entry.get(key, ()), process]}


def failures_of(entry: Entry) -> dict[str, str]:
    """The errors of a cell that failed, by process, in the order in which they were found."""
    failures: dict[str, str] = entry.get("failed_by", {})
    return failures


def dead_in(entry: Entry) -> list[str]:
    """The processes that took a cell and left no result. If nobody holds the cell, they died in it."""
    return [process for process in entry.get("taken_by", ()) if process not in failures_of(entry)]


def count_outcomes(entries: Iterable[Entry]) -> int:
    """How many cells are done, and how often processes failed at cells, also by dying in them."""
    return sum(("done" in entry) + len(failures_of(entry)) for entry in entries)


def read_manifest(manifest: Path) -> dict[str, Entry]:
    """The cells of the manifest, by unit. Empty if the manifest is missing or damaged. Nothing is lost then, because
    ``train`` finds finished runs without it.
    """
    try:
        cells = json.loads(manifest.read_text("utf-8"))["cells"]
        if not all({"folder", "error"} <= cell.keys() for cell in cells):
            return {}
        return {_digest(cell["row"], cell["column"], cell["settings"]): cell for cell in cells}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def update_cell(cell: Cell, entry: Entry) -> None:
    """Give a cell the folder and the error that the manifest has for it."""
    cell.folder, error = entry["folder"], entry["error"]
    cell.error = None if error is None else KR2CacheError(error, entry.get("remedy") or "")


def grid_fields(grid: Grid) -> dict[str, Any]:
    """What the manifest holds about the grid."""
    return {
        "name": grid.name,
        "title": grid.title,
        "paper": grid.paper,
        "baseline": grid.baseline,
        "baselines": {row.name: row.baseline for row in grid.rows if row.baseline is not None},
        "rows": [row.name for row in grid.rows],
        "columns": [column.name for column in grid.columns],
    }


def unit_of(cell: Cell) -> str:
    """The name of the unit of work for a cell: a digest of its place in the grid and of its settings."""
    return _digest(cell.row.name, cell.column.name, cell.settings)


def _digest(*text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
