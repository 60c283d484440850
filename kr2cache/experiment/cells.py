"""The cells of a grid: their settings, and why some cannot run (each reason is listed once).

Names and settings are checked here without torch, whose import takes seconds; data and models by ``sweep``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError, DataError, InterruptedWorkError, KR2CacheError
from kr2cache.experiment.checks import check_names
from kr2cache.experiment.grid import Grid, Line
from kr2cache.system.console import count_text
from kr2cache.tasks import find_task
from kr2cache.tasks.files import data_folder
from kr2cache.tasks.udpos import UdPos

if TYPE_CHECKING:
    from kr2cache.experiment.pipeline import TrainResult

CELLS_NAMED = 4
"""In one message; of more, the number is said."""


@dataclass(kw_only=True)
class Cell:
    """One configuration of the grid, and what became of it."""

    row: Line
    column: Line
    config: TrainConfig
    folder: str | None = None
    """Of its runs, relative to the run folder; None until it is known."""
    error: str | None = None
    remedy: str = ""
    """Of the error."""
    result: TrainResult | None = None

    @property
    def name(self) -> str:
        return f"{self.column.name} · {self.row.name}"

    def json(self) -> dict[str, Any]:
        """The cell in the manifest."""
        config = self.config
        return {
            "row": self.row.name,
            "column": self.column.name,
            "folder": self.folder,
            "seeds": list(config.seeds),
            "task": config.task,
            "method": config.method,
            "fusion": config.fusion if config.frozen_model else None,
            "reader": config.trained_model,
            "resource": config.frozen_model,
            "teacher": config.teacher,
            "settings": self.settings,
            "error": self.error,
            **({"remedy": self.remedy} if self.remedy else {}),
        }

    @property
    def settings(self) -> str:
        """A digest of everything that was asked for, the place of files aside."""
        aside = dict.fromkeys(("run_dir", "cache_dir", "device", "keep_readers", "temporary_readers"))
        fields = {**dataclasses.asdict(self.config), **aside}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cells_of(grid: Grid, cell_config: Callable[[Line, Line], TrainConfig]) -> list[Cell]:
    """The cells of a grid, column by column.

    Args:
        cell_config: The configuration of a row in a column.

    Raises:
        KR2CacheError: For cells that could not run whatever is on this machine: an unknown name, a setting that makes
            no sense, two languages in one folder.
    """
    cells = [
        Cell(row=row, column=column, config=cell_config(row, column)) for column in grid.columns for row in grid.rows
    ]
    if faults := find_faults((cell, [partial(check_names, cell.config)]) for cell in cells):
        raise refusal(faults, grid, "")
    _check_languages(grid, cells)
    return cells


def _check_languages(grid: Grid, cells: Sequence[Cell]) -> None:
    """A folder has sentences of one language: under the names of two a table would be wrong without a word."""
    first: dict[Path, tuple[str, Cell]] = {}
    for cell in cells:
        task = find_task(cell.config.task)
        try:
            folder = data_folder(cell.config.data)
        except DataError:  # the cell will say so; others can be run
            continue
        if not isinstance(task, UdPos) or task.language is None or folder is None:
            continue
        language, other = first.setdefault(folder.resolve(), (task.language, cell))
        if language != task.language:
            raise ConfigError(
                f"{grid.name}: {other.row.name} / {other.column.name} ({other.config.task}) and {cell.row.name} / "
                f"{cell.column.name} ({cell.config.task}) would read the same sentences, {cell.config.data}.",
                "Give each column data of its own; what [defaults] of kr2cache.toml says serves all that have none.",
            )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One reason, and all cells that cannot run because of it."""

    error: KR2CacheError
    cells: list[Cell]


def find_faults(cells: Iterable[tuple[Cell, Iterable[Callable[[], object]]]]) -> list[Fault]:
    """What the checks of these cells raise, each fault once."""
    found: dict[tuple[str, str], Fault] = {}
    for cell, checks in cells:
        for check in checks:
            try:
                check()
            except Exception as raised:
                error = explained(raised)
                fault = found.setdefault((error.message, error.remedy), Fault(error=error, cells=[]))
                if all(one is not cell for one in fault.cells):
                    fault.cells.append(cell)
    return list(found.values())


def count_cells(faults: Sequence[Fault]) -> int:
    return len({id(cell) for fault in faults for cell in fault.cells})


def explained(error: Exception) -> KR2CacheError:
    """``error`` with words for people; an interruption is none of a cell's errors and goes on."""
    if isinstance(error, InterruptedWorkError):
        raise error
    if isinstance(error, KR2CacheError):
        return error
    return KR2CacheError(
        f"{type(error).__name__}: {error}", "This error was not expected: train this cell with --debug and report it."
    )


def refusal(faults: Sequence[Fault], grid: Grid, remedy: str) -> KR2CacheError:
    """One error for all faults."""
    total = len(grid.rows) * len(grid.columns)
    cells = count_cells(faults)
    start = f"{cells} of {count_text(total, 'cell')} cannot run; nothing was trained."
    if len(faults) == 1:
        error = faults[0].error
        message = f"{start} {cells_text(faults[0].cells, grid)}: {error.message}"
        return type(error)(message, f"{error.remedy} {remedy}".strip())
    lines = [start]
    for fault in faults:
        lines.append(f"- {cells_text(fault.cells, grid)}: {fault.error.message}")
        if fault.error.remedy:
            lines.append(f"  {fault.error.remedy}")
    return ConfigError("\n".join(lines), remedy)


def cells_text(cells: Sequence[Cell], grid: Grid) -> str:
    """The cells by their names; whole columns in short, and of many the first few."""
    if len(cells) == len(grid.rows) * len(grid.columns) > 1:
        return "every cell"
    parts = []
    for column in grid.columns:
        own = [cell.name for cell in cells if cell.column is column]
        parts += [f"{column.name} (every row)"] if len(own) == len(grid.rows) > 1 else own
    more = f" and {len(parts) - CELLS_NAMED} more" if len(parts) > CELLS_NAMED else ""
    return ", ".join(parts[:CELLS_NAMED]) + more
