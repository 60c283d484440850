"""Sweeps: the trainings of a grid, one after the other.

All cells are checked before the first training. What is done is skipped; a cell that fails while it runs is reported
and the others go on. ``RUN_DIR/sweeps/NAME.json`` says which run belongs where; ``report`` reads it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.config import TrainConfig
from kr2cache.errors import InterruptedWorkError, KR2CacheError
from kr2cache.experiment.cells import Cell, cells_text, count_cells, explained, find_faults, refusal
from kr2cache.experiment.checks import check_names
from kr2cache.experiment.grid import Grid, Line
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.ready import check_ready, open_models, read_corpus
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.teacher import teacher_config
from kr2cache.methods import METHODS
from kr2cache.system.allocator import objects_set_aside
from kr2cache.system.console import console, count_text, failed, heading, silent
from kr2cache.system.locks import check_writable
from kr2cache.training.runs import RunFolder, write_json

MANIFESTS = "sweeps"
"""Folder in the run folder."""


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

    def __init__(self, grid: Grid, cells: list[Cell], *, keep_readers: bool) -> None:
        """
        Args:
            cells: As ``cells_of`` gives them.
            keep_readers: Whether trained readers stay on disk after their predictions are written.
        """
        self.grid = grid
        self.keep_readers = keep_readers
        self.cells = cells
        self._shared = Shared()
        self.run_dir = cells[0].config.run_dir
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
            if not any(_is_taught(other) for other in order[number:] if other.column is cell.column):
                self._drop_readers(cell.column)
        return SweepResult(grid=self.grid, manifest=self.manifest, cells=self.cells)

    def _check(self, keep_going: bool) -> None:
        """Find out what keeps cells from running: data, models, and settings that do not fit them."""
        console.print(
            f"Checking the data and models of {count_text(len(self.cells), 'cell')} before the first training."
        )
        with silent():  # each training says the same again, under its own heading
            faults = find_faults((cell, self._checks(cell.config)) for cell in self._in_order())
        if faults and not keep_going:
            some_run = count_cells(faults) < len(self.cells)
            raise refusal(faults, self.grid, "--keep-going trains the other cells." if some_run else "")
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
        if METHODS[config.method].needs_teacher:
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
            error = explained(raised)
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
        if not METHODS[cell.config.method].is_plain:
            return False
        model = cell.config.trained_model
        return any(
            _is_taught(other) and other.config.teacher == model for other in self.cells if other.column is cell.column
        )

    def _drop_readers(self, column: Line) -> None:
        """Of the runs that a sweep trained: 120 readers of the size of XLM-R are 130 GB."""
        for cell in self.cells:
            if not self.keep_readers and cell.column is column and cell.folder is not None:
                for seed in cell.config.seeds:
                    RunFolder.of_seed(self.run_dir / cell.folder, seed).drop_temporary_reader()

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
        write_json(
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


def _is_taught(cell: Cell) -> bool:
    return METHODS[cell.config.method].needs_teacher


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
