"""One sweep by several workers: a driver that checks the cells, starts workers and shows what becomes of each cell."""

from __future__ import annotations

from dataclasses import dataclass

from kr2cache.config import SweepWorkers
from kr2cache.errors import InterruptedWorkError
from kr2cache.experiment.cells import Cell
from kr2cache.experiment.grid import Grid
from kr2cache.experiment.shared_cells import SharedCells, read_manifest, take_in, unit_of
from kr2cache.experiment.sweep import Sweep, SweepResult, show_score
from kr2cache.extraction.checks import check_workers
from kr2cache.system.console import WorkProgress, count_text, failed
from kr2cache.workers import run_workers


@dataclass(frozen=True)
class Share:
    """What every worker of a sweep gets: all of them the same."""

    grid: Grid
    cells: list[Cell]
    keep_readers: bool


def sweep_with_workers(sweep: Sweep, workers: SweepWorkers, *, keep_going: bool = False) -> SweepResult:
    """Check all cells, then let workers train them.

    Args:
        keep_going: As for ``Sweep.run``, and so are the errors.

    Raises:
        ConfigError: If the engine is not installed, or one GPU is named for several workers.
    """
    for device in {cell.config.device for cell in sweep.cells}:
        check_workers(workers.engine, workers.workers, device)
    sweep.check(keep_going=keep_going)
    with SharedCells(sweep.grid, sweep.cells, sweep.manifest):
        pass  # the manifest is there, without what a killed sweep left in it
    result = SweepResult(grid=sweep.grid, manifest=sweep.manifest, cells=sweep.cells)
    share = Share(sweep.grid, sweep.cells, sweep.keep_readers)
    with WorkProgress(sweep.grid.title, "cells", len(sweep.cells)) as progress:
        progress.advance(len(result.failed), count_text(workers.workers, "worker"))
        shown = _Shown(result, progress)
        try:
            run_workers(
                workers.engine,
                workers.workers,
                train_share,
                share,
                watch=shown.look,
                gpus_per_worker=workers.gpus_per_worker,
            )
        except KeyboardInterrupt:
            raise InterruptedWorkError(
                f"Interrupted. The sweep {sweep.grid.name} stopped after {shown.done} of "
                f"{count_text(len(sweep.cells), 'cell')}.",
                "Run the same command again: it skips finished runs.",
            ) from None
        shown.finish()
    return result


def train_share(share: Share) -> None:
    """What each worker does. Cells that its own checks refuse are left to the others."""
    Sweep(share.grid, share.cells, keep_readers=share.keep_readers).run(keep_going=True)


class _Shown:
    """What the driver has shown of the cells."""

    def __init__(self, result: SweepResult, progress: WorkProgress) -> None:
        self._result = result
        self._progress = progress
        self._left = [cell for cell in result.cells if cell.error is None]
        self._failed: set[Cell] = set()

    @property
    def done(self) -> int:
        return len(self._result.cells) - len(self._left)

    def look(self) -> None:
        """Show the cells that were done, or failed, since the last look."""
        entries = read_manifest(self._result.manifest)
        for cell in list(self._left):
            entry = entries.get(unit_of(cell), {})
            if "failed_by" in entry and cell not in self._failed:
                self._failed.add(cell)
                failed(f"{cell.name}: {entry['error']}")
            if "done" in entry:
                self._show(cell, entry)

    def finish(self) -> None:
        """Show the cells that are left, and take over what became of all."""
        entries = read_manifest(self._result.manifest)
        for cell in self._left[:]:
            self._show(cell, entries[unit_of(cell)])
        for cell in self._result.cells:
            take_in(cell, entries[unit_of(cell)])

    def _show(self, cell: Cell, entry: dict[str, object]) -> None:
        take_in(cell, entry)
        self._left.remove(cell)
        self._progress.advance(1)
        if (mean := self._result.mean(cell)) is not None:
            show_score(cell, mean)
