"""Sweeps: the trainings of a grid, one after the other.

All cells are checked before the first training. What is done is skipped; a cell that fails while it runs is reported
and the others go on. ``RUN_DIR/sweeps/NAME.json`` says which run belongs where; ``report`` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kr2cache.config import PLAIN_METHODS, TrainConfig
from kr2cache.errors import ConfigError, DataError, InterruptedWorkError, KR2CacheError
from kr2cache.experiment.checks import check_names
from kr2cache.experiment.grid import Grid, Line
from kr2cache.experiment.pipeline import TrainResult, train
from kr2cache.experiment.ready import check_ready, open_models, read_corpus
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.teacher import teacher_config
from kr2cache.system.allocator import objects_set_aside
from kr2cache.system.console import console, count_text, failed, heading, silent
from kr2cache.system.locks import check_writable
from kr2cache.tasks import find_task
from kr2cache.tasks.files import data_folder
from kr2cache.tasks.udpos import UdPos
from kr2cache.training import runs

MANIFESTS = "sweeps"
"""Folder in the run folder."""
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
        frozen = config.reader if config.method == "kreader2" else config.resource
        return {
            "row": self.row.name,
            "column": self.column.name,
            "folder": self.folder,
            "seeds": list(config.seeds),
            "task": config.task,
            "method": config.method,
            "fusion": config.fusion if config.method in ("kr2", "kreader2") else None,
            "reader": config.resource if config.method == "kresource" else config.reader,
            "resource": frozen if config.method in ("kr2", "kreader2") else None,
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


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep left."""

    grid: Grid
    manifest: Path
    cells: list[Cell]

    @property
    def run_dir(self) -> Path:
        return self.manifest.parent.parent

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.error is not None]

    def json(self) -> dict[str, Any]:
        return {
            "manifest": str(self.manifest),
            "cells": [
                cell.json() | {"mean": cell.result.json()["mean"] if cell.result is not None else None}
                for cell in self.cells
            ],
            "failed": len(self.failed),
        }


class Sweep:
    """A grid on its way."""

    def __init__(self, grid: Grid, cell_config: Callable[[Line, Line], TrainConfig], *, keep_readers: bool) -> None:
        """
        Args:
            cell_config: The configuration of a row in a column.
            keep_readers: Whether trained readers stay on disk after their predictions are written.

        Raises:
            KR2CacheError: For a cell that could not be run whatever is on this machine: an unknown name, a setting that
                makes no sense.
        """
        self.grid = grid
        self.keep_readers = keep_readers
        self.cells = [
            Cell(row=row, column=column, config=cell_config(row, column))
            for column in grid.columns
            for row in grid.rows
        ]
        self._shared = Shared()
        if faults := _faults((cell, [partial(check_names, cell.config)]) for cell in self.cells):
            raise _refusal(faults, grid, "")
        _check_languages(grid, self.cells)
        self.run_dir = self.cells[0].config.run_dir
        self.manifest = self.run_dir / MANIFESTS / f"{grid.name}.json"

    @objects_set_aside()
    def run(self, *, keep_going: bool = False) -> SweepResult:
        """Check every cell, then fill them one after the other.

        Args:
            keep_going: Whether cells that cannot run are reported and left out; otherwise nothing is trained.

        Raises:
            KR2CacheError: If cells cannot run; it says which, and why.
            InterruptedWorkError: On Ctrl-C; what is complete is kept, and the manifest says what there is.
        """
        check_writable(self.run_dir, "--run-dir")
        for cell in self.cells:
            cell.config = dataclasses.replace(
                cell.config,
                keep_readers=self.keep_readers or self._teaches(cell),
                temporary_readers=not self.keep_readers,
            )
        self._take_over()
        self._check(keep_going)
        self._write()
        order = self._in_order()
        for number, cell in enumerate(order, 1):
            heading(f"{number}/{len(order)}  {cell.name}")
            try:
                self._fill(cell)
            except InterruptedWorkError as error:
                raise InterruptedWorkError(
                    f"{error.message.rstrip('.')}. The sweep {self.grid.name} stopped at cell {number} of "
                    f"{len(order)} ({cell.name}).",
                    "Run the same command again: it skips what is done.",
                ) from None
            finally:
                self._write()
            if not any(other.config.method == "kd" for other in order[number:] if other.column is cell.column):
                self._drop_readers(cell.column)
        return SweepResult(grid=self.grid, manifest=self.manifest, cells=self.cells)

    def _check(self, keep_going: bool) -> None:
        """Find out what keeps cells from running: data, models, and settings that do not fit them."""
        console.print(
            f"Checking the data and models of {count_text(len(self.cells), 'cell')} before the first training."
        )
        with silent():  # each training says the same again, under its own heading
            faults = _faults((cell, self._checks(cell.config)) for cell in self._in_order())
        if faults and not keep_going:
            some_run = _count_cells(faults) < len(self.cells)
            raise _refusal(faults, self.grid, "--keep-going trains the other cells." if some_run else "")
        for fault in faults:
            for cell in fault.cells:
                if cell.error is None:  # the first reason is kept
                    self._failed(cell, fault.error)
            _say_failed(cells_text(fault.cells, self.grid), fault.error.message, fault.error.remedy)

    def _checks(self, config: TrainConfig) -> list[Callable[[], object]]:
        """The checks of one cell; data and models apart, so that a fault of one does not hide a fault of the other."""
        training = check_names(config)
        checks: list[Callable[[], object]] = [
            lambda: read_corpus(training, self._shared),
            lambda: open_models(training, self._shared),
            lambda: check_ready(config, self._shared),
        ]
        if config.method == "kd":
            checks.append(lambda: self._check_teacher(config))
        return checks

    def _check_teacher(self, config: TrainConfig) -> None:
        if (teacher := teacher_config(config)) is not None:
            check_ready(teacher, self._shared)

    def _fill(self, cell: Cell) -> None:
        try:
            cell.result = train(cell.config, self._shared)
        except KeyboardInterrupt:
            raise InterruptedWorkError("Interrupted.") from None
        except Exception as raised:  # one cell's unforeseen failure is no reason to lose the others
            error = _explained(raised)
            before = next((one for one in self.cells if (one.error, one.remedy) == (error.message, error.remedy)), None)
            self._failed(cell, error)
            if before is None:
                _say_failed(cell.name, error.message, error.remedy)
            else:
                failed(f"{cell.name}: the same as {before.name}")
            return
        cell.folder = Path(os.path.relpath(cell.result.runs[0].folder.parent, self.run_dir)).as_posix()
        mean, metric = cell.result.json()["mean"], cell.result.task.metric
        split = "test" if "test" in mean else "dev"
        console.print(f"{cell.name}: {metric} {100 * mean[split][metric]:.1f}", markup=False)

    def _failed(self, cell: Cell, error: KR2CacheError) -> None:
        cell.error, cell.remedy = error.message, error.remedy
        cell.folder = None  # an earlier configuration's score is not this one's

    def _in_order(self) -> list[Cell]:
        """The cells that can run, column by column; plain trainings first where they teach, so that no model is
        fine-tuned twice."""
        order = []
        for column in self.grid.columns:
            cells = [cell for cell in self.cells if cell.column is column and cell.error is None]
            order += sorted(cells, key=lambda cell: not self._teaches(cell))
        return order

    def _teaches(self, cell: Cell) -> bool:
        """Whether a distillation in the same column learns from this cell's model."""
        if cell.config.method not in PLAIN_METHODS:
            return False
        model = cell.config.resource if cell.config.method == "kresource" else cell.config.reader
        return any(
            other.config.method == "kd" and other.config.teacher == model
            for other in self.cells
            if other.column is cell.column
        )

    def _drop_readers(self, column: Line) -> None:
        """Of the runs that a sweep trained: 120 readers of the size of XLM-R are 130 GB."""
        for cell in self.cells:
            if not self.keep_readers and cell.column is column and cell.folder is not None:
                for seed in cell.config.seeds:
                    runs.drop_temporary_reader(runs.seed_folder(self.run_dir / cell.folder, seed))

    def _take_over(self) -> None:
        """Where an earlier call of the same sweep left its runs, so that a report shows them while this one goes on."""
        try:
            earlier = json.loads(self.manifest.read_text("utf-8"))
            known = {(cell["row"], cell["column"], cell["settings"]): cell["folder"] for cell in earlier["cells"]}
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or not readable: the runs themselves say what is done
        for cell in self.cells:
            cell.folder = known.get((cell.row.name, cell.column.name, cell.settings))

    def _write(self) -> None:
        grid = self.grid
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        partial = self.manifest.with_suffix(".partial")
        runs.write_json(
            partial,
            {
                "name": grid.name,
                "title": grid.title,
                "paper": grid.paper,
                "baseline": grid.baseline,
                "baselines": {row.name: row.baseline for row in grid.rows if row.baseline is not None},
                "rows": [row.name for row in grid.rows],
                "columns": [column.name for column in grid.columns],
                "cells": [cell.json() for cell in self.cells],
            },
        )
        partial.replace(self.manifest)


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


# What keeps cells from running ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One reason, and all cells that cannot run because of it."""

    error: KR2CacheError
    cells: list[Cell]


def _faults(cells: Iterable[tuple[Cell, Iterable[Callable[[], object]]]]) -> list[Fault]:
    """What the checks of these cells raise, each fault once."""
    found: dict[tuple[str, str], Fault] = {}
    for cell, checks in cells:
        for check in checks:
            try:
                check()
            except Exception as raised:
                error = _explained(raised)
                fault = found.setdefault((error.message, error.remedy), Fault(error=error, cells=[]))
                if all(one is not cell for one in fault.cells):
                    fault.cells.append(cell)
    return list(found.values())


def _count_cells(faults: Sequence[Fault]) -> int:
    return len({id(cell) for fault in faults for cell in fault.cells})


def _explained(error: Exception) -> KR2CacheError:
    """``error`` with words for people; an interruption is none of a cell's errors and goes on."""
    if isinstance(error, InterruptedWorkError):
        raise error
    if isinstance(error, KR2CacheError):
        return error
    return KR2CacheError(
        f"{type(error).__name__}: {error}", "This failure was not foreseen: train this cell with --debug and report it."
    )


def _refusal(faults: Sequence[Fault], grid: Grid, remedy: str) -> KR2CacheError:
    """One error for all faults."""
    total = len(grid.rows) * len(grid.columns)
    cells = _count_cells(faults)
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


def describe_sweep(result: SweepResult) -> None:
    """What was filled and what failed, each reason once."""
    filled: Sequence[Cell] = [cell for cell in result.cells if cell.error is None]
    heading(result.grid.title)
    console.print(f"{len(filled)} of {count_text(len(result.cells), 'cell')} filled.")
    reasons: dict[tuple[str, str], list[Cell]] = {}
    for cell in result.failed:
        reasons.setdefault((str(cell.error), cell.remedy), []).append(cell)
    for (error, remedy), cells in reasons.items():
        _say_failed(cells_text(cells, result.grid), error, remedy)
    if reasons:
        console.print("Mend what failed and run the same command again: what is done is skipped.", style="cyan")


def _say_failed(what: str, error: str, remedy: str) -> None:
    failed(f"{what}: {error}")
    if remedy:
        console.print(f"  {remedy}", markup=False, soft_wrap=True, style="cyan")
