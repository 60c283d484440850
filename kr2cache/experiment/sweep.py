"""Sweeps: the trainings of a grid, one after the other.

A sweep checks all cells before the first training, and skips runs that are finished. If a cell fails while it runs,
the sweep reports it and goes on. Processes that run the same sweep share its cells (``shared_cells``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.errors import (
    ConfigError,
    InterruptedWorkError,
    KR2CacheError,
    UnsupportedModelError,
    ValueRangeError,
)
from kr2cache.experiment.cells import Cell, cells_text, count_cells, explained, find_faults, group_errors, refusal
from kr2cache.experiment.checks import Training, check_names
from kr2cache.experiment.grid import Grid
from kr2cache.experiment.manifest import MANIFESTS
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.ready import check_ready, labelled, open_models, read_corpus
from kr2cache.experiment.resource import look_for_resources
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.shared_cells import HeldCell, SharedCells
from kr2cache.experiment.teacher import check_run, teacher_config
from kr2cache.system.allocator import objects_set_aside
from kr2cache.system.console import console, count_text, failed, heading, note, note_waiting, silent
from kr2cache.system.disk import check_writable
from kr2cache.system.interrupt import cause
from kr2cache.tasks import find_task
from kr2cache.training.runs import Metrics, RunFolder, mean_and_std


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
            "cells": [cell.json() | {"mean": self.mean(cell)} for cell in self.cells],
            "failed": len(self.failed),
        }

    def mean(self, cell: Cell) -> Metrics | None:
        """The scores of a cell, mean over its seeds; None if it failed. Any process may have trained it."""
        if cell.folder is None:
            return None
        runs = [RunFolder.of_seed(self.run_dir / cell.folder, seed) for seed in cell.config.seeds]
        return mean_and_std([run.read_metrics() for run in runs])[0]


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
        self._looked: dict[tuple[object, ...], KR2CacheError | None] = {}
        """Resources that were looked at, with their data and settings: what is wrong, if anything is. The fusion counts
        among the settings only if no cache fits: there may be one for another fusion."""
        self.run_dir = cells[0].config.run_dir
        self.manifest = self.run_dir / MANIFESTS / f"{grid.name}.json"

    @objects_set_aside()
    def run(self, *, keep_going: bool = False) -> SweepResult:
        """Check all cells, then train them one after another, together with other processes that run the same sweep.

        Args:
            keep_going: If some cells cannot run, report them and train the others. Otherwise nothing is trained.

        Raises:
            KR2CacheError: If cells cannot run. The message gives the cells and the reasons.
            BusyError: If other processes train another version of the grid.
            InterruptedWorkError: On Ctrl-C. Finished runs stay, and the manifest lists them.
        """
        self.check(keep_going=keep_going)
        order = self._in_order()
        place = "between two cells"
        with SharedCells(self.grid, self.cells, self.manifest) as shared:
            try:
                while (held := shared.take(order)) is not None:
                    number, name = order.index(held.cell) + 1, held.cell.name
                    place = f"at cell {number} of {len(order)} ({name})"
                    heading(f"{number}/{len(order)}  {name}")
                    with held:
                        self._train(held, shared)
                    self._drop_readers(shared)
                    place = "between two cells"
            except (KeyboardInterrupt, InterruptedWorkError) as error:
                message = error.message if isinstance(error, InterruptedWorkError) else cause()
                raise InterruptedWorkError(
                    f"{message.rstrip('.')}. The sweep {self.grid.name} stopped {place}.",
                    "Run the same command again: it skips finished runs.",
                ) from None
            self._drop_readers(shared)
        return SweepResult(grid=self.grid, manifest=self.manifest, cells=self.cells)

    def check(self, *, keep_going: bool) -> None:
        """Check the settings, the data and the models of all cells. Arguments and errors are those of ``run``."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "torchrun is for one training; its processes cannot share the cells of a sweep.",
                "Start kr2cache sweep once for each GPU, without torchrun: the processes share the cells.",
            )
        check_writable(self.run_dir, "--run-dir")
        for cell in self.cells:
            cell.config = dataclasses.replace(
                cell.config,
                keep_readers=self.keep_readers or self._teaches(cell),
                temporary_readers=not self.keep_readers,
            )
        self._check(keep_going)

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
        """The checks of one cell. Data and models are checked separately, so that the user sees the faults of both."""
        config = cell.config
        training = check_names(config)
        checks: list[Callable[[], object]] = [
            lambda: read_corpus(labelled(training, self._shared), self._shared),
            lambda: open_models(labelled(training, self._shared), self._shared),
            lambda: check_ready(config, self._shared),
        ]
        if training.positions is not None:
            checks.append(lambda: self._check_appends(training))
            checks.append(lambda: self._check_resources(training))
        if cell.method.needs_teacher:
            checks.append(lambda: self._check_teacher(training))
        return checks

    def _check_appends(self, training: Training) -> None:
        """Check that the reader can have states appended, which only its weights in memory show."""
        task = labelled(training, self._shared).task
        checkpoint = self._shared.checkpoint(training.reader, task, keep_head=training.config.keep_head)
        self._shared.check_reader(checkpoint, None, positions=training.positions)

    def _check_resources(self, training: Training) -> None:
        """Look for the caches of a cell, and try the models that have to make some. Cells of the same resources, data
        and settings of states are checked once.
        """
        config = training.config
        data = (config.task, config.data, config.limit, config.train_limit)
        states = (config.resource_max_length, config.pool, config.dtype, config.compute_dtype, config.weights_dtype)
        key = (*data, *training.resources, *states)
        own = (*key, config.fusion, config.projection)
        if key not in self._looked and own not in self._looked:
            try:
                look_for_resources(labelled(training, self._shared), self._shared)
                self._looked[key] = None
            except KR2CacheError as error:  # a new one, as for ``Cell.fail``
                cannot_serve = isinstance(error, UnsupportedModelError | ValueRangeError)
                self._looked[key if cannot_serve else own] = type(error)(error.message, error.remedy)
        if (found := self._looked.get(key) or self._looked.get(own)) is not None:
            raise found

    def _check_teacher(self, training: Training) -> None:
        if (teacher := teacher_config(training.config)) is not None:
            check_ready(teacher, self._shared)
        else:
            check_run(labelled(training, self._shared).task, training.config, self._shared)

    def _train(self, held: HeldCell, shared: SharedCells) -> None:
        cell = held.cell
        try:
            cell.result = train(cell.config, self._shared)
        except KeyboardInterrupt:
            raise InterruptedWorkError(f"{cause()}.") from None
        except Exception as raised:  # the other cells may still run, whatever failed here
            error = explained(raised)
            if not held.is_held:
                note(
                    f"Another process took over {cell.name}: this process was stopped, or cut off from the file "
                    "system, for too long."
                )
                return
            earlier = next((one for one in self.cells if one is not cell and str(one.error) == str(error)), None)
            cell.fail(error)
            if earlier is None:
                _print_error(cell.name, error)
            else:
                failed(f"{cell.name}: the same error as {earlier.name}")
            shared.settle(cell)
            if not shared.is_settled(cell):
                note_waiting(f"Another process of this sweep tries {cell.name} once more.")
            return
        cell.error = None  # another process may have failed before
        cell.folder = Path(os.path.relpath(cell.result.runs[0].folder.parent, self.run_dir)).as_posix()
        shared.settle(cell)
        show_score(cell, cell.result.json()["mean"])

    def _in_order(self) -> list[Cell]:
        """The cells that can run, column by column. Teachers come first, so that no model is fine-tuned twice."""
        order = []
        for column in self.grid.columns:
            cells = [cell for cell in self.cells if cell.column is column and cell.error is None]
            order += sorted(cells, key=lambda cell: not self._teaches(cell))
        return order

    def _teaches(self, cell: Cell) -> bool:
        return any(map(cell.teaches, self.cells))

    def _drop_readers(self, shared: SharedCells) -> None:
        """Remove readers that this sweep trained, once no cell will learn from them any more. 120 readers of the size
        of XLM-R take 130 GB.
        """
        for cell in self.cells:
            learn = [other for other in self.cells if cell.teaches(other)]
            if self.keep_readers or cell.folder is None or not learn or not all(map(shared.is_settled, [cell, *learn])):
                continue
            for seed in cell.config.seeds:
                RunFolder.of_seed(self.run_dir / cell.folder, seed).drop_temporary_reader()


def show_score(cell: Cell, mean: Metrics) -> None:
    """Print the score of a cell that is done."""
    metric, split = find_task(cell.config.task, cell.config.tasks).metric, "test" if "test" in mean else "dev"
    console.print(f"{cell.name}: {metric} {100 * mean[split][metric]:.1f}", markup=False)


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
