"""Sweeps: the trainings of a grid, one after the other.

A sweep checks all cells before the first training, and skips runs that are finished. If a cell fails while it runs,
the sweep reports it and goes on. The manifest ``RUN_DIR/sweeps/NAME.json`` says which run belongs to which cell;
``report`` reads it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.config import TrainConfig
from kr2cache.errors import InterruptedWorkError, KR2CacheError
from kr2cache.experiment.cells import Cell, cells_text, count_cells, explained, find_faults, group_errors, refusal
from kr2cache.experiment.checks import check_names
from kr2cache.experiment.grid import Grid, Line
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.ready import check_ready, open_models, read_corpus
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.teacher import teacher_config
from kr2cache.system.allocator import objects_set_aside
from kr2cache.system.console import console, count_text, failed, heading, silent
from kr2cache.system.disk import check_writable
from kr2cache.training.runs import RunFolder, write_json

MANIFESTS = "sweeps"
"""The folder of the manifests, in the run folder."""


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The result of a sweep."""

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
    """The trainings of one grid."""

    def __init__(self, grid: Grid, cells: list[Cell], *, keep_readers: bool) -> None:
        """
        Args:
            cells: The result of ``cells_of``.
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
        """Check all cells, then train them one after the other.

        Args:
            keep_going: If some cells cannot run, report them and train the others. Otherwise nothing is trained.

        Raises:
            KR2CacheError: If cells cannot run. The message gives the cells and the reasons.
            InterruptedWorkError: On Ctrl-C. Finished runs stay, and the manifest lists them.
        """
        check_writable(self.run_dir, "--run-dir")
        for cell in self.cells:
            cell.config = dataclasses.replace(
                cell.config,
                keep_readers=self.keep_readers or self._teaches(cell),
                temporary_readers=not self.keep_readers,
            )
        self._read_folders()
        self._check(keep_going)
        self._write()
        order = self._in_order()
        for number, cell in enumerate(order, 1):
            heading(f"{number}/{len(order)}  {cell.name}")
            try:
                self._train(cell)
            except InterruptedWorkError as error:
                raise InterruptedWorkError(
                    f"{error.message.rstrip('.')}. The sweep {self.grid.name} stopped at cell {number} of "
                    f"{len(order)} ({cell.name}).",
                    "Run the same command again: it skips finished runs.",
                ) from None
            finally:
                self._write()
            if not any(other.method.needs_teacher for other in order[number:] if other.column is cell.column):
                self._drop_readers(cell.column)
        return SweepResult(grid=self.grid, manifest=self.manifest, cells=self.cells)

    def _check(self, keep_going: bool) -> None:
        """Check the data, the models and the settings of all cells."""
        console.print(
            f"Checking the data and models of {count_text(len(self.cells), 'cell')} before the first training."
        )
        with silent():  # each training shows the same messages again, under its own heading
            faults = find_faults((cell, check) for cell in self._in_order() for check in self._checks(cell))
        if faults and not keep_going:
            some_run = count_cells(faults) < len(self.cells)
            raise refusal(faults, self.grid, "--keep-going trains the other cells." if some_run else "")
        for fault in faults:
            for cell in fault.cells:
                if cell.error is None:  # the first reason is kept
                    cell.fail(fault.error)
            _print_error(cells_text(fault.cells, self.grid), fault.error)

    def _checks(self, cell: Cell) -> list[Callable[[], object]]:
        """The checks of one cell. Data and models are checked apart, so that the user sees the faults of both."""
        config = cell.config
        training = check_names(config)
        checks: list[Callable[[], object]] = [
            lambda: read_corpus(training, self._shared),
            lambda: open_models(training, self._shared),
            lambda: check_ready(config, self._shared),
        ]
        if cell.method.needs_teacher:
            checks.append(lambda: self._check_teacher(config))
        return checks

    def _check_teacher(self, config: TrainConfig) -> None:
        if (teacher := teacher_config(config)) is not None:
            check_ready(teacher, self._shared)

    def _train(self, cell: Cell) -> None:
        try:
            cell.result = train(cell.config, self._shared)
        except KeyboardInterrupt:
            raise InterruptedWorkError("Interrupted.") from None
        except Exception as raised:  # the other cells may still run, whatever failed here
            error = explained(raised)
            earlier = next((other for other in self.cells if str(other.error) == str(error)), None)
            cell.fail(error)
            if earlier is None:
                _print_error(cell.name, error)
            else:
                failed(f"{cell.name}: the same error as {earlier.name}")
            return
        cell.folder = Path(os.path.relpath(cell.result.runs[0].folder.parent, self.run_dir)).as_posix()
        mean, metric = cell.result.json()["mean"], cell.result.task.metric
        split = "test" if "test" in mean else "dev"
        console.print(f"{cell.name}: {metric} {100 * mean[split][metric]:.1f}", markup=False)

    def _in_order(self) -> list[Cell]:
        """The cells that can run, column by column. Teachers come first, so that no model is fine-tuned twice."""
        order = []
        for column in self.grid.columns:
            cells = [cell for cell in self.cells if cell.column is column and cell.error is None]
            order += sorted(cells, key=lambda cell: not self._teaches(cell))
        return order

    def _teaches(self, cell: Cell) -> bool:
        """Whether a distillation in the same column learns from this cell's model."""
        return cell.method.is_plain and any(
            other.column is cell.column
            and other.method.needs_teacher
            and other.config.teacher == cell.config.trained_model
            for other in self.cells
        )

    def _drop_readers(self, column: Line) -> None:
        """Remove the readers that this sweep trained in the column: 120 readers of the size of XLM-R take 130 GB."""
        for cell in self.cells:
            if not self.keep_readers and cell.column is column and cell.folder is not None:
                for seed in cell.config.seeds:
                    RunFolder.of_seed(self.run_dir / cell.folder, seed).drop_temporary_reader()

    def _read_folders(self) -> None:
        """Read from the manifest of an earlier call where its runs are, so that a report shows them meanwhile."""
        try:
            earlier = json.loads(self.manifest.read_text("utf-8"))
            known = {(cell["row"], cell["column"], cell["settings"]): cell["folder"] for cell in earlier["cells"]}
        except (OSError, ValueError, KeyError, TypeError):
            return  # no manifest, or a damaged one: ``train`` finds the finished runs itself
        for cell in self.cells:
            cell.folder = known.get((cell.row.name, cell.column.name, cell.settings))

    def _write(self) -> None:
        """Write the manifest."""
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


def describe_sweep(result: SweepResult) -> None:
    """Print how many cells were filled, and each error once."""
    heading(result.grid.title)
    total = len(result.cells)
    console.print(f"{total - len(result.failed)} of {count_text(total, 'cell')} filled.")
    for fault in group_errors((cell, cell.error) for cell in result.cells if cell.error is not None):
        _print_error(cells_text(fault.cells, result.grid), fault.error)
    if result.failed:
        console.print("Correct the errors and run the same command again: it skips finished runs.", style="cyan")


def _print_error(cells: str, error: KR2CacheError) -> None:
    failed(f"{cells}: {error.message}")
    if error.remedy:
        console.print(f"  {error.remedy}", markup=False, soft_wrap=True, style="cyan")
