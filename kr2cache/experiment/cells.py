"""The cells of a grid: their settings, and the reasons why some cannot run (each reason once, with all its cells).

This module checks names and settings without importing torch, which takes seconds. ``sweep`` checks data and models.
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
from kr2cache.methods import METHODS, Method
from kr2cache.system import interrupt
from kr2cache.system.console import count_text
from kr2cache.tasks import find_task
from kr2cache.tasks.files import data_path
from kr2cache.tasks.udpos import UdPos

if TYPE_CHECKING:
    from kr2cache.experiment.pipeline import TrainResult

MAX_NAMES = 4
"""A message names at most this many cells and gives the number of the others."""


@dataclass(kw_only=True, eq=False)
class Cell:
    """One configuration of the grid, and its result or error."""

    row: Line
    column: Line
    config: TrainConfig
    folder: str | None = None
    """The folder of its runs, relative to the run folder; None until it is known."""
    error: KR2CacheError | None = None
    result: TrainResult | None = None

    @property
    def name(self) -> str:
        return f"{self.column.name} · {self.row.name}"

    @property
    def method(self) -> Method:
        return METHODS[self.config.method]

    def teaches(self, other: Cell) -> bool:
        """Whether ``other`` is a distillation in the same column that learns from this cell's model."""
        return (
            self.method.is_plain
            and other.method.needs_teacher
            and other.column is self.column
            and other.config.teacher == self.config.trained_model
        )

    def fail(self, error: KR2CacheError) -> None:
        # Make a new error. The one that was caught refers to the functions it passed, and so keeps models in memory.
        self.error = KR2CacheError(error.message, error.remedy)
        self.folder = None  # it may hold the scores of an earlier configuration

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
            "fusion": config.fusion if config.frozen_models else None,
            "reader": config.trained_model,
            "resource": " + ".join(config.frozen_models) or None,
            "teacher": config.teacher,
            "settings": self.settings,
            "error": self.error.message if self.error else None,
            **({"remedy": self.error.remedy} if self.error and self.error.remedy else {}),
        }

    @property
    def settings(self) -> str:
        """A digest of the settings, without the run and cache folders, the devices, and whether readers are kept."""
        excluded = dict.fromkeys(("run_dir", "cache_dir", "device", "device_map", "keep_readers", "temporary_readers"))
        fields = {**dataclasses.asdict(self.config), **excluded}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cells_of(grid: Grid, cell_config: Callable[[Line, Line], TrainConfig]) -> list[Cell]:
    """The cells of a grid, column by column.

    Args:
        cell_config: Gives the configuration of a row in a column.

    Raises:
        KR2CacheError: For cells that cannot run on any machine: an unknown name, a setting that makes no sense, two
            languages in one folder.
    """
    cells = [
        Cell(row=row, column=column, config=cell_config(row, column)) for column in grid.columns for row in grid.rows
    ]
    if faults := find_faults((cell, partial(check_names, cell.config)) for cell in cells):
        raise refusal(faults, grid, "")
    _check_languages(grid, cells)
    return cells


def _check_languages(grid: Grid, cells: Sequence[Cell]) -> None:
    """Refuse two languages that read the same folder: the table would show one language's scores under two names."""
    first: dict[Path, tuple[str, Cell]] = {}
    for cell in cells:
        task = find_task(cell.config.task, cell.config.tasks)
        try:
            folder = data_path(cell.config.data)
        except DataError:  # ``sweep`` reports it; the other cells may run
            continue
        if not isinstance(task, UdPos) or task.language is None or folder is None:
            continue
        language, other = first.setdefault(folder.resolve(), (task.language, cell))
        if language != task.language:
            raise ConfigError(
                f"{grid.name}: {other.row.name} / {other.column.name} ({other.config.task}) and {cell.row.name} / "
                f"{cell.column.name} ({cell.config.task}) would read the same sentences, {cell.config.data}.",
                "Give data in each column. Columns without data use that of [defaults] in kr2cache.toml.",
            )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One reason, and all cells that cannot run because of it."""

    error: KR2CacheError
    cells: list[Cell]


def find_faults(checks: Iterable[tuple[Cell, Callable[[], object]]]) -> list[Fault]:
    """Run the checks of all cells and collect what they raise."""
    errors = []
    for cell, check in checks:
        try:
            check()
        except Exception as raised:
            errors.append((cell, explained(raised)))
    return group_errors(errors)


def group_errors(errors: Iterable[tuple[Cell, KR2CacheError]]) -> list[Fault]:
    """One fault for all errors with the same message and remedy."""
    faults: dict[str, Fault] = {}
    for cell, error in errors:
        fault = faults.setdefault(str(error), Fault(error=error, cells=[]))
        if cell not in fault.cells:
            fault.cells.append(cell)
    return list(faults.values())


def count_cells(faults: Sequence[Fault]) -> int:
    return len({cell for fault in faults for cell in fault.cells})


def explained(error: Exception) -> KR2CacheError:
    """The error with a message and a remedy. An interruption is raised again, because it stops the whole sweep."""
    if isinstance(error, InterruptedWorkError):
        raise error
    if isinstance(error, KR2CacheError):
        return error
    if interrupt.was_pressed():  # a library turned Ctrl-C into its own error
        raise InterruptedWorkError(f"{interrupt.cause()}.") from None
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
    """The names of the cells; a column whose cells are all there is named once."""
    if len(cells) == len(grid.rows) * len(grid.columns) > 1:
        return "every cell"
    parts = []
    for column in grid.columns:
        own = [cell.name for cell in cells if cell.column is column]
        parts += [f"{column.name} (every row)"] if len(own) == len(grid.rows) > 1 else own
    more = f" and {len(parts) - MAX_NAMES} more" if len(parts) > MAX_NAMES else ""
    return ", ".join(parts[:MAX_NAMES]) + more
