"""The cells of a sweep are units of work: any number of processes, on any number of machines, share them.

Each process claims a cell that nobody holds, trains it, lets it go, and takes the next. They meet at the manifest
``RUN_DIR/sweeps/NAME.json``: it says which run belongs to which cell, and ``report`` reads it at any moment. While
processes work, its cells also have

    done        true once the runs of the cell are there. Runs of earlier sweeps do not count: the data may have changed
    failed_by   the processes that tried the cell and failed
    not_for     the processes whose checks found that they cannot train the cell

A cell is settled if it is done, if two processes failed at it, or if no process is left that may try it. The first
process to come starts anew, and the last one to leave removes these entries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from kr2cache.errors import BusyError, KR2CacheError
from kr2cache.experiment.cells import Cell
from kr2cache.experiment.grid import Grid
from kr2cache.system.claims import Claim, claimed, ended_units, held_units, holder, try_claim
from kr2cache.system.console import note
from kr2cache.training.runs import write_json

MANIFESTS = "sweeps"
"""The folder of the manifests, in the run folder."""
MANIFEST = "manifest"
"""The unit that a process holds while it changes the manifest."""
PRESENT = "process-"
"""How the units begin that say which processes work on the grid."""
WORK_KEYS = ("done", "failed_by", "not_for")
"""What a cell of the manifest has only while processes work."""
TRIES = 2
"""So many processes try a cell that fails."""
LOOK_EVERY_S = 0.5
"""A process that waits for other processes looks this often."""

Entry = dict[str, Any]
"""One cell of the manifest."""


class HeldCell:
    """A cell that this process may train. Leave its ``with`` block to let it go."""

    def __init__(self, cell: Cell, claim: Claim) -> None:
        self.cell = cell
        self._claim = claim

    @property
    def is_held(self) -> bool:
        """False once another process has taken the cell over, because this one was silent for too long."""
        return self._claim.is_held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._claim.release()


class SharedCells:
    """The cells of one grid, as this process sees them. Inside its ``with`` block it counts as one that works on them.

    What other processes find out (folder, error) is written into the cells.
    """

    def __init__(self, grid: Grid, cells: Sequence[Cell], manifest: Path) -> None:
        """
        Args:
            cells: All cells of the grid. Those that have an error when the ``with`` block begins cannot be trained by
                this process.
        """
        self.grid = grid
        self.cells = cells
        self.manifest = manifest
        self._unit = {cell: unit_of(cell) for cell in cells}
        self._process = uuid.uuid4().hex[:8]
        self._entries: dict[str, Entry] = {}
        self._present: set[str] = set()
        self._presence: Claim | None = None
        self._said = False

    def __enter__(self) -> Self:
        """Join the other processes.

        Raises:
            BusyError: If processes work on another version of the grid.
        """
        try:
            self._change(self._join)
        except BaseException:
            if self._presence is not None:
                self._presence.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._change(self._leave)

    def take(self, order: Iterable[Cell]) -> HeldCell | None:
        """Claim the next cell. If other processes hold all cells that are left, wait.

        Args:
            order: The cells that this process can train. A distillation is not taken before its teacher is settled.

        Returns:
            None once all cells are settled.
        """
        order = list(order)
        while True:
            self._look()
            for cell in filter(self._is_open, order):
                if (held := self._claim(cell)) is not None:
                    return held
            left = [cell for cell in self.cells if not self.is_settled(cell)]
            if not left:
                return None
            self._say_waiting(left)
            time.sleep(LOOK_EVERY_S)

    def _claim(self, cell: Cell) -> HeldCell | None:
        claim = try_claim(self.manifest, self._unit[cell])
        if claim is None:
            return None
        with contextlib.ExitStack() as until_handed_over:
            until_handed_over.enter_context(claim)
            claim.fenced()  # it has no files of its own
            self._look()
            if not self._is_open(cell):  # another process has trained it meanwhile
                return None
            until_handed_over.pop_all()
        return HeldCell(cell, claim)

    def settle(self, cell: Cell) -> None:
        """Write down what this process found out about a cell: the folder of its runs, or its error."""

        def change(entries: dict[str, Entry]) -> None:
            unit = self._unit[cell]
            if cell.error is None:
                entries[unit] = cell.json() | {"done": True}
            else:
                entries[unit] = cell.json() | self._with_us(entries.get(unit, {}), "failed_by")

        self._change(change)

    def is_settled(self, cell: Cell) -> bool:
        """Whether no process will train this cell any more, as far as this process knows."""
        entry = self._entries[self._unit[cell]]
        failed_by = set(entry.get("failed_by", ()))
        may_try = self._present - failed_by - set(entry.get("not_for", ()))
        return "done" in entry or len(failed_by) >= TRIES or not may_try

    def _is_open(self, cell: Cell) -> bool:
        """Whether this process may train a cell, if nobody holds it."""
        teachers = [other for other in self.cells if other.teaches(cell)]
        failed = self._process in self._entries[self._unit[cell]].get("failed_by", ())
        return not failed and not self.is_settled(cell) and all(map(self.is_settled, teachers))

    def _say_waiting(self, left: Sequence[Cell]) -> None:
        if self._said:
            return
        self._said = True
        held = held_units(self.manifest)
        for cell in left:
            if self._unit[cell] in held:
                note(f"{cell.name} is being trained by {holder(self.manifest, self._unit[cell])}; waiting for it.")
                return
        note(f"Another process of this sweep tries {left[0].name} once more; waiting for it.")

    # The manifest ----------------------------------------------------------------------------------------------------

    def _join(self, entries: dict[str, Entry]) -> None:
        if not self._others():
            for cell, unit in self._unit.items():
                # Where the runs of an earlier sweep are, so that a report shows them meanwhile.
                cell.folder = entries.get(unit, {}).get("folder") if cell.error is None else None
            entries.clear()
        elif entries and entries.keys() != set(self._unit.values()):
            others = (unit for unit in held_units(self.manifest) if unit.startswith(PRESENT))
            raise BusyError(
                f"Another version of the grid {self.grid.name} is being trained in {self.manifest.parent.parent} by "
                f"{holder(self.manifest, next(others, ''))}.",
                "Give the same grid and options as there, or another --run-dir, or wait until it is done.",
            )
        self._presence = try_claim(self.manifest, PRESENT + self._process)
        for cell in self.cells:
            if cell.error is None:
                continue
            entry = entries.get(self._unit[cell], {})
            entries[self._unit[cell]] = (entry if "done" in entry else cell.json()) | self._with_us(entry, "not_for")

    def _with_us(self, entry: Entry, key: str) -> Entry:
        """What ``entry`` has only while processes work, with this process under ``key``."""
        work = {name: entry[name] for name in WORK_KEYS if name in entry}
        return work | {key: [*work.get(key, ()), self._process]}

    def _leave(self, entries: dict[str, Entry]) -> None:
        if self._presence is not None:
            self._presence.release()
        for unit in ended_units(self.manifest) - {MANIFEST}:
            if (claim := try_claim(self.manifest, unit)) is not None:
                claim.fenced()
                claim.release()
        if not self._others():
            for entry in entries.values():
                for key in WORK_KEYS:
                    entry.pop(key, None)

    def _others(self) -> set[str]:
        """The other processes that work on the grid."""
        units = held_units(self.manifest)
        return {unit.removeprefix(PRESENT) for unit in units if unit.startswith(PRESENT)} - {self._process}

    def _look(self) -> None:
        """See what the other processes have found out, and say that this one works."""
        if self._presence is None or not self._presence.is_held:  # stopped for so long that it counted as ended
            self._presence = try_claim(self.manifest, PRESENT + self._process)
        entries = read_manifest(self.manifest)
        if any(unit not in entries for unit in self._unit.values()):  # removed or damaged meanwhile
            self._change(lambda _: None)
        else:
            self._take_in(entries)

    def _take_in(self, entries: dict[str, Entry]) -> None:
        self._present = {self._process} | self._others()
        self._entries = entries
        for cell in self.cells:
            take_in(cell, entries[self._unit[cell]])

    def _change(self, change: Callable[[dict[str, Entry]], None]) -> None:
        """Read the manifest, change its cells and write it. No other process changes it meanwhile."""
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.manifest, MANIFEST) as claim:
            entries = read_manifest(self.manifest)
            change(entries)
            written = {unit: entries.get(unit, cell.json()) for cell, unit in self._unit.items()}
            new = claim.folder / self.manifest.name
            write_json(new, _head(self.grid) | {"cells": list(written.values())})
            new.replace(self.manifest)
        self._take_in(written)


def read_manifest(manifest: Path) -> dict[str, Entry]:
    """The cells of the manifest, by unit; empty without a manifest and for a damaged one: ``train`` finds the finished
    runs itself.
    """
    try:
        cells = json.loads(manifest.read_text("utf-8"))["cells"]
        if not all({"folder", "error"} <= cell.keys() for cell in cells):
            return {}
        return {_digest(cell["row"], cell["column"], cell["settings"]): cell for cell in cells}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def take_in(cell: Cell, entry: Entry) -> None:
    """Write into a cell what the manifest says about it."""
    cell.folder, error = entry["folder"], entry["error"]
    cell.error = None if error is None else KR2CacheError(error, entry.get("remedy") or "")


def _head(grid: Grid) -> dict[str, Any]:
    """What the manifest says about the grid."""
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
    """The name of a cell as a unit of work: a digest of its place in the grid and of its settings."""
    return _digest(cell.row.name, cell.column.name, cell.settings)


def _digest(*text: str) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]
