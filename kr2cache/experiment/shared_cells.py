"""The cells of a sweep are units of work: any number of processes, on any number of machines, share them.

Each process claims a cell that no other process holds, trains it, releases it, and claims the next one. The processes
share the manifest (``manifest.py``).

A process died in a cell if it took the cell, left no result and does not hold the cell any more: the system killed it
because memory was too small, or it crashed. The next process that takes the cell counts this as a failure.

A cell is settled if it is done, if two processes failed, or if no process is left that may try it. The first process
that joins starts a new manifest. The last process that leaves removes ``WORK_KEYS`` from it. Only a death is
remembered: its cell comes last in the next sweep. Otherwise it could end every sweep before the other cells are
trained.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kr2cache.errors import BusyError, KR2CacheError
from kr2cache.experiment.cells import Cell
from kr2cache.experiment.grid import Grid
from kr2cache.experiment.manifest import (
    WORK_KEYS,
    Entry,
    dead_in,
    failures_of,
    grid_fields,
    one_more,
    read_manifest,
    unit_of,
    update_cell,
    work_of,
)
from kr2cache.system.claims import Claim, claimed, ended_units, held_units, holder, try_claim
from kr2cache.system.console import failed, note_waiting
from kr2cache.system.interrupt import check_asked
from kr2cache.training.runs import write_json

MANIFEST = "manifest"
"""The unit that a process holds while it changes the manifest."""
WORKER = "process-"
"""Each process that trains cells of the grid holds a unit whose name begins with this."""
DRIVER = "driver-"
"""Each process that has workers for the grid holds a unit whose name begins with this."""
TRIES = 2
"""How many processes try a cell that fails."""
LOOK_EVERY_S = 0.5
"""A process that waits for other processes checks again after so many seconds."""
DIED = KR2CacheError(
    "The process that trained this cell was killed, or it crashed.",
    "If memory was too small (the system then sends SIGKILL), give a smaller --batch-size or fewer --workers.",
)
NOT_AGAIN = "It is not tried again."


class HeldCell:
    """A cell that this process may train. The end of the ``with`` block releases it."""

    def __init__(self, cell: Cell, claim: Claim, give_back: Callable[[Cell], None]) -> None:
        """
        Args:
            give_back: Called if the ``with`` block ends by an error: the cell was not tried.
        """
        self.cell = cell
        self._claim = claim
        self._give_back = give_back

    @property
    def is_held(self) -> bool:
        """False once another process has taken over the cell, because this one was stopped or cut off for too long."""
        return self._claim.is_held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._give_back(self.cell)
        finally:
            self._claim.release()


class SharedCells:
    """The cells of one grid, shared with other processes. Inside the ``with`` block, this process counts as working.

    The results of other processes (folder, error) are copied from the manifest into ``cells``.
    """

    role = WORKER

    def __init__(self, grid: Grid, cells: Sequence[Cell], manifest: Path) -> None:
        """
        Args:
            cells: All cells of the grid. This process cannot train a cell that has an error when the ``with`` block
                begins.
        """
        self.grid = grid
        self.cells = cells
        self.manifest = manifest
        self._unit = {cell: unit_of(cell) for cell in cells}
        self._process = uuid.uuid4().hex[:8]
        self._sign = self.role + self._process
        self._entries: dict[str, Entry] = {}
        self._present: set[str] = set()
        self._presence: Claim | None = None
        self._noted_waiting = False

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
            order: The cells that this process can train. Cells that were tried before come last. A distillation is not
                claimed before its teacher is settled.

        Returns:
            The claimed cell; None once all cells are settled.

        Raises:
            KeyboardInterrupt: If the driver asked this process to stop.
        """
        order = list(order)
        while True:
            check_asked()
            self._refresh()
            for cell in sorted(filter(self._is_open, order), key=self._count_tries):
                if (held := self._claim(cell)) is not None:
                    return held
            left = [cell for cell in self.cells if not self.is_settled(cell)]
            if not left:
                return None
            self._note_waiting(left)
            time.sleep(LOOK_EVERY_S)

    def _claim(self, cell: Cell) -> HeldCell | None:
        claim = try_claim(self.manifest, self._unit[cell])
        if claim is None:
            return None
        with contextlib.ExitStack() as until_handed_over:
            until_handed_over.enter_context(claim)
            claim.fenced()  # this unit has no files: each run has its own claim
            self._refresh()
            self._count_dead(cell)
            if not self._is_open(cell):  # another process has trained it meanwhile, or too many died in it
                return None
            until_handed_over.callback(self._give_back, cell)
            self._begin(cell)
            until_handed_over.pop_all()
        return HeldCell(cell, claim, self._give_back)

    def _count_dead(self, cell: Cell) -> None:
        """Count as failures the processes that died in a cell, which this process holds now."""
        if dead := dead_in(self._entries[self._unit[cell]]):
            cell.fail(DIED)
            self._write_failures(cell, *dead)
            what_next = "This process tries it again." if self._is_open(cell) else NOT_AGAIN
            failed(f"{cell.name}: {DIED.message} {what_next}")

    def _begin(self, cell: Cell) -> None:
        def change(entries: dict[str, Entry]) -> None:
            entry = entries.get(self._unit[cell], cell.json())
            entries[self._unit[cell]] = entry | one_more(entry, "taken_by", self._process)

        self._change(change)

    def _give_back(self, cell: Cell) -> None:
        def change(entries: dict[str, Entry]) -> None:
            entry = entries.get(self._unit[cell], {})
            self._forget_taken(entry)

        self._change(change)

    def _forget_taken(self, entry: Entry) -> None:
        """This process has not died in a cell that it took and did not try to the end."""
        if self._process in dead_in(entry):
            entry["taken_by"].remove(self._process)

    def settle(self, cell: Cell) -> None:
        """Write the result of a cell into the manifest: the folder of its runs, or its error."""
        if cell.error is not None:
            self._write_failures(cell, self._process)
            return

        def change(entries: dict[str, Entry]) -> None:
            unit = self._unit[cell]
            entries[unit] = cell.json() | {"done": True, "failed_by": failures_of(entries.get(unit, {}))}

        self._change(change)

    def _write_failures(self, cell: Cell, *processes: str) -> None:
        def change(entries: dict[str, Entry]) -> None:
            entry = entries.get(self._unit[cell], {})
            new = cell.json()
            failures = failures_of(entry) | dict.fromkeys(processes, new["error"])
            entries[self._unit[cell]] = new | work_of(entry) | {"failed_by": failures}

        self._change(change)

    def is_settled(self, cell: Cell) -> bool:
        """Whether no process will train this cell any more, as far as this process knows from its last refresh."""
        entry = self._entries[self._unit[cell]]
        failed_by = failures_of(entry).keys()
        may_try = self._present - failed_by - set(entry.get("not_for", ()))
        return "done" in entry or len(failed_by) >= TRIES or not may_try

    def _is_open(self, cell: Cell) -> bool:
        """Whether this process may train a cell if no other process holds it."""
        teachers = [other for other in self.cells if other.teaches(cell)]
        failed = self._process in failures_of(self._entries[self._unit[cell]])
        return not failed and not self.is_settled(cell) and all(map(self.is_settled, teachers))

    def _count_tries(self, cell: Cell) -> int:
        return len(self._entries[self._unit[cell]].get("taken_by", ()))

    def _note_waiting(self, left: Sequence[Cell]) -> None:
        if self._noted_waiting:
            return
        self._noted_waiting = True
        held = held_units(self.manifest)
        for cell in left:
            if self._unit[cell] in held:
                by = holder(self.manifest, self._unit[cell])
                note_waiting(f"{cell.name} is being trained by {by}; waiting for it.")
                return
        note_waiting(f"Another process of this sweep tries {left[0].name} once more; waiting for it.")

    # The manifest ----------------------------------------------------------------------------------------------------

    def _join(self, entries: dict[str, Entry]) -> None:
        if not self._others():
            for cell, unit in self._unit.items():
                # Keep the folder of an earlier sweep, so that a report shows its runs until there are new ones.
                entry = entries.pop(unit, {})
                cell.folder = entry.get("folder") if cell.error is None else None
                if dead := dead_in(entry):
                    entries[unit] = cell.json() | {"taken_by": dead[:1]}  # one: it is tried at least once
        elif entries and entries.keys() != set(self._unit.values()):
            raise BusyError(
                f"Another version of the grid {self.grid.name} is being trained in {self.manifest.parent.parent} by "
                f"{holder(self.manifest, next(iter(self._others()), ''))}.",
                "Give the same grid and options as there, or another --run-dir, or wait until it is done.",
            )
        self._presence = try_claim(self.manifest, self._sign)
        for cell in self.cells:
            if cell.error is None:
                continue
            entry = entries.get(self._unit[cell], {})
            work = work_of(entry) | one_more(entry, "not_for", self._process)
            entries[self._unit[cell]] = (entry if "done" in entry else cell.json()) | work

    def _leave(self, entries: dict[str, Entry]) -> None:
        for entry in entries.values():
            self._forget_taken(entry)
        if self._presence is not None:
            self._presence.release()
        for unit in ended_units(self.manifest) - {MANIFEST}:
            if (claim := try_claim(self.manifest, unit)) is not None:
                claim.fenced()
                claim.release()
        if not self._others():
            for entry in entries.values():
                dead = dead_in(entry)
                for key in WORK_KEYS:
                    entry.pop(key, None)
                if dead:
                    entry["taken_by"] = dead

    def _others(self) -> set[str]:
        """The signs of the other processes that work on the grid."""
        return {unit for unit in held_units(self.manifest) if unit.startswith((WORKER, DRIVER))} - {self._sign}

    def _refresh(self) -> None:
        """Read the results of the other processes, and make sure that this process counts as working."""
        if self._presence is None or not self._presence.is_held:  # it was stopped for so long that it counted as ended
            self._presence = try_claim(self.manifest, self._sign)
        entries = read_manifest(self.manifest)
        if any(unit not in entries for unit in self._unit.values()):  # the file was removed or damaged
            self._change(lambda _: None)
        else:
            self._update_cells(entries)

    def _update_cells(self, entries: dict[str, Entry]) -> None:
        signs = {self._sign} | self._others()
        self._present = {sign.removeprefix(WORKER) for sign in signs if sign.startswith(WORKER)}
        self._entries = entries
        for cell in self.cells:
            update_cell(cell, entries[self._unit[cell]])

    def _change(self, change: Callable[[dict[str, Entry]], None]) -> None:
        """Read the manifest, change its cells and write it again. Meanwhile no other process can change it."""
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        with claimed(self.manifest, MANIFEST) as claim:
            entries = read_manifest(self.manifest)
            change(entries)
            written = {unit: entries.get(unit, cell.json()) for cell, unit in self._unit.items()}
            new = claim.folder / self.manifest.name
            write_json(new, grid_fields(self.grid) | {"cells": list(written.values())})
            new.replace(self.manifest)
        self._update_cells(written)


class DrivenCells(SharedCells):
    """The cells as the driver of workers sees them. It takes none. While it is there, what workers that died have found
    out is kept, even if no worker is left.
    """

    role = DRIVER

    def what_next(self, cell: Cell, failures: int) -> str:
        """What happens to a cell after it failed so many times, as a sentence. A worker that died is replaced."""
        self._refresh()
        entry = self._entries[self._unit[cell]]
        tried_again = "done" in entry or len(failures_of(entry)) > failures
        replaced = entry["error"] == DIED.message and failures < TRIES
        return "Another worker tries it again." if tried_again or replaced or not self.is_settled(cell) else NOT_AGAIN
