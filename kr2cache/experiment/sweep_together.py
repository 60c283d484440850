"""One sweep by several workers. This process, the driver, checks the cells, starts the workers and shows results."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kr2cache.config import SweepWorkers
from kr2cache.errors import InterruptedWorkError
from kr2cache.experiment.cells import Cell
from kr2cache.experiment.grid import Grid
from kr2cache.experiment.manifest import count_outcomes, failures_of, read_manifest, unit_of, update_cell
from kr2cache.experiment.shared_cells import DIED, DrivenCells
from kr2cache.experiment.sweep import Sweep, SweepResult, show_score
from kr2cache.extraction.checks import check_workers
from kr2cache.system.console import WorkProgress, count_text, failed
from kr2cache.system.interrupt import cause
from kr2cache.workers import run_workers


@dataclass(frozen=True)
class Share:
    """What the driver sends to the workers of a sweep. All of them get the same."""

    grid: Grid
    cells: list[Cell]
    keep_readers: bool


def sweep_with_workers(sweep: Sweep, workers: SweepWorkers, *, keep_going: bool = False) -> SweepResult:
    """Check all cells, then let workers train them.

    Args:
        sweep: The sweep.
        workers: How many workers there are, and what starts them.
        keep_going: As in ``Sweep.run``.

    Raises:
        ConfigError: If the engine is not installed, or if the setting for the device names one GPU for several workers.
        KR2CacheError: The errors of ``Sweep.run``.
        WorkerLostError: If too many workers die outside of cells.
    """
    for device in {cell.config.device for cell in sweep.cells}:
        check_workers(workers.engine, workers.workers, device)
    sweep.check(keep_going=keep_going)
    result = SweepResult(grid=sweep.grid, manifest=sweep.manifest, cells=sweep.cells)
    # The cells as they are now: an error that other processes of this sweep met must not keep the workers from trying.
    share = Share(sweep.grid, [replace(cell) for cell in sweep.cells], sweep.keep_readers)
    with WorkProgress(sweep.grid.title, "cells", len(sweep.cells)) as progress:
        progress.advance(len(result.failed), count_text(workers.workers, "worker"))
        driven = DrivenCells(sweep.grid, sweep.cells, sweep.manifest)
        display = _Display(result, progress, driven)
        with driven:
            try:
                run_workers(
                    workers.engine,
                    workers.workers,
                    train_share,
                    share,
                    watch=display.update,
                    gpus_per_worker=workers.gpus_per_worker,
                )
            except KeyboardInterrupt:
                raise InterruptedWorkError(
                    f"{cause()}. The sweep {sweep.grid.name} stopped after {display.shown_count} of "
                    f"{count_text(len(sweep.cells), 'cell')}.",
                    "Run the same command again: it skips finished runs.",
                ) from None
            display.finish()
    return result


def train_share(share: Share) -> None:
    """What each worker does. If its own checks refuse a cell, it leaves this cell to the other workers."""
    Sweep(share.grid, share.cells, keep_readers=share.keep_readers).run(keep_going=True)


class _Display:
    """Shows each cell once when it is done, its first failure, and every worker that died in it."""

    def __init__(self, result: SweepResult, progress: WorkProgress, driven: DrivenCells) -> None:
        self._result = result
        self._progress = progress
        self._driven = driven
        self._left = [cell for cell in result.cells if cell.error is None]
        self._failures = dict.fromkeys(result.cells, 0)
        """How often each cell failed, as far as it was shown."""

    @property
    def shown_count(self) -> int:
        return len(self._result.cells) - len(self._left)

    def update(self) -> int:
        """Show the cells that were done, or failed, since the last call.

        Returns:
            How many outcomes there are.
        """
        entries = read_manifest(self._result.manifest)
        for cell in list(self._left):
            entry = entries.get(unit_of(cell), {})
            for count, error in enumerate(failures_of(entry).values(), start=1):
                if count > self._failures[cell]:
                    self._failures[cell] = count
                    if count == 1 or error == DIED.message:
                        failed(f"{cell.name}: {error} {self._driven.what_next(cell, count)}")
            if "done" in entry:
                self._show(cell, entry)
        return count_outcomes(entries.values())

    def finish(self) -> None:
        """Show the cells that are left, and copy the results of all cells from the manifest."""
        entries = read_manifest(self._result.manifest)
        for cell in self._left[:]:
            self._show(cell, entries[unit_of(cell)])
        for cell in self._result.cells:
            update_cell(cell, entries[unit_of(cell)])

    def _show(self, cell: Cell, entry: dict[str, object]) -> None:
        update_cell(cell, entry)
        self._left.remove(cell)
        self._progress.advance(1)
        if (mean := self._result.mean(cell)) is not None:
            show_score(cell, mean)
