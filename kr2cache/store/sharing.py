"""The shards of a cache are units of work: any number of processes, on any number of machines, fill them together.

Each process claims a shard that is not complete and that no other process holds, fills it, releases it, and claims the
next shard. If a process dies, another process takes over its shard. If the first process may still be alive, the new
one replaces the shard by a copy of what is written in it. The first process then writes to a file that nobody reads.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from kr2cache.cache.create import ShardPart, create_shard, is_shard_of, shard_parts
from kr2cache.cache.format import SequenceIndex, ShardHeader
from kr2cache.cache.shard import open_shard, readable_headers
from kr2cache.cache.writer import ShardWriter
from kr2cache.errors import CacheError, CacheVersionError
from kr2cache.system.claims import Claim, claimed, held_units, holder, taken_over, try_claim, wait_for_claim
from kr2cache.system.console import WorkProgress, note, note_waiting

CACHE = "cache"
"""The unit that a process holds while it decides which shards a cache has."""
LOOK_EVERY_S = 0.5
"""A process that waits for other processes checks again after so many seconds."""


class LostClaimError(Exception):
    """Another process took over the shard."""


@dataclass
class HeldShard:
    """A shard that this process may fill. The end of the ``with`` block releases it."""

    part: ShardPart
    claim: Claim
    check_interrupt: Callable[[], object]

    def check(self) -> None:
        """Call this after every batch. It raises KeyboardInterrupt if Ctrl-C was pressed. If another process took over
        the shard, it ends the ``with`` block, and the program continues after the block.
        """
        self._check_held()
        self.check_interrupt()

    @contextlib.contextmanager
    def writer(self) -> Iterator[ShardWriter]:
        """A writer of the shard. Once another process has taken over the shard, it writes nothing."""
        with ShardWriter(self.part.path, self.part.start, self._check_held) as writer:
            # Check after opening: if this process was stopped before that, the file may belong to another process now.
            self._check_held()
            writer.keep_written()
            yield writer

    def _check_held(self) -> None:
        if not self.claim.is_held:
            raise LostClaimError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        # Once the claim is lost, errors such as a missing file are ignored: another process does the work.
        lost = isinstance(error, Exception) and not self.claim.is_held
        self.claim.release()
        if lost:
            note(
                f"Another process took over {self.part.path.name}: this process was stopped, or cut off from the file "
                "system, for too long."
            )
        return lost


class SharedShards:
    """The shards of one cache."""

    def __init__(self, folder: Path, header: ShardHeader, index: SequenceIndex) -> None:
        """
        Raises:
            CacheError: If the arrays of the index have lengths that contradict each other.
        """
        self.folder = folder
        self.header = header
        self.index = index
        self.parts = shard_parts(folder, header, index, int(header.batch_plan["shard_bytes"]))
        self._marks: dict[ShardPart, int] = {}
        """Offset of the completion marks in the file of a shard. It is the same in a file that replaces the shard."""

    def create(self, build_in: Path) -> None:
        """Make the shards that do not exist. Their space is reserved, and no sequence in them is complete.

        Args:
            build_in: The folder of the claim on ``CACHE``; files are built there.

        Raises:
            DiskSpaceError: If the space cannot be reserved. The unfinished file is removed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            if not part.path.exists():
                create_shard(part.path, self.header, self.index.part(part.start, part.stop), build_in)

    def complete_count(self) -> int:
        """How many sequences are complete now."""
        return sum(map(self._complete_in, self.parts))

    def unfinished(self, check_interrupt: Callable[[], object], progress: WorkProgress) -> Iterator[HeldShard]:
        """Claim one unfinished shard after another, until all are complete. A damaged shard is first made again, with
        its intact sequences. If other processes hold all unfinished shards, wait for them.

        Args:
            check_interrupt: Raises KeyboardInterrupt if Ctrl-C was pressed.
            progress: Gets its total here. After each shard, and during a wait, it shows what all processes completed.

        Raises:
            CacheError: If a shard was removed.
            DiskSpaceError: If there is no space to make a damaged shard again.
            CacheVersionError: If a shard has another version of the format. It is not changed.
        """
        # If other processes are working, they have checked every shard already.
        unchecked = set() if held_units(self.folder) - {CACHE} else set(self.parts)
        before = self.complete_count()
        progress.total = len(self.index) - before
        left, noted = list(self.parts), False
        while left:
            held_by_others = []
            for part in left:
                if part not in unchecked and self._is_complete(part):
                    continue
                claim = try_claim(self.folder, part.path.name)
                if claim is None:
                    held_by_others.append(part)
                    continue
                unchecked.discard(part)
                held = HeldShard(part, claim, check_interrupt)
                with contextlib.ExitStack() as until_handed_over:
                    until_handed_over.enter_context(held)
                    self._restore(held)
                    if self._is_complete(part):
                        continue
                    until_handed_over.pop_all()
                    yield held
                if not self._is_complete(part):
                    held_by_others.append(part)
                progress.show(self.complete_count() - before)
            left = held_by_others
            progress.show(self.complete_count() - before)
            if left and all(not self._is_complete(part) for part in left):
                if not noted:
                    name = left[0].path.name
                    note_waiting(f"{name} is being written by {holder(self.folder, name)}; waiting for it.")
                    noted = True
                check_interrupt()
                time.sleep(LOOK_EVERY_S)

    def _restore(self, held: HeldShard) -> None:
        """Make sure that the shard is intact and that no earlier holder can write to it."""
        part, claim = held.part, held.claim
        index = self.index.part(part.start, part.stop)
        if not part.path.exists():
            raise CacheError(f"{part.path} was removed.", "Run the same command again.")
        intact = is_shard_of(part.path, self.header, index)
        if not intact or claim.earlier_may_live:
            create_shard(part.path, self.header, index, claim.folder, recover=True)
            self._marks.pop(part, None)
        claim.fenced()
        if not intact:
            note(f"{part.path.name} was damaged. It was made again, with its intact sequences.")

    def _is_complete(self, part: ShardPart) -> bool:
        return self._complete_in(part) == part.stop - part.start

    def _complete_in(self, part: ShardPart) -> int:
        """How many sequences of a shard are complete; 0 if it cannot be read or belongs to another cache."""
        try:
            if part not in self._marks:
                shard = open_shard(part.path)
                if shard.header != self.header or len(shard.ids) != part.stop - part.start or not shard.completable:
                    return 0
                self._marks[part] = shard.array_offset("examples/complete")
            descriptor = os.open(part.path, os.O_RDONLY)
            try:
                marks = os.pread(descriptor, part.stop - part.start, self._marks[part])
            finally:
                os.close(descriptor)
        except CacheVersionError:
            raise
        except (OSError, CacheError):
            return 0
        return int(np.count_nonzero(np.frombuffer(marks, dtype=np.uint8)))


def existing_header(folder: Path, fingerprint: str) -> ShardHeader | None:
    """The header with this fingerprint from any shard in ``folder``, even a damaged one; None if there is none."""
    for path in sorted(folder.glob("*.h5")):
        for header in readable_headers(path):
            if header.fingerprint == fingerprint:
                return header
    return None


@dataclass
class HeldCache:
    """A cache that this process holds as a whole."""

    folder: Path
    claims: dict[str, Claim]
    """By unit: ``CACHE``, and the name of every shard."""

    @property
    def build_in(self) -> Path:
        """Where a missing shard is made."""
        return self.claims[CACHE].folder

    def check(self, shard: str) -> None:
        """To be called before a shard is changed in place, when its file is open. A process that takes the shard over
        later makes a copy of the file.

        Raises:
            BusyError: If another process took the shard over.
        """
        if not self.claims[shard].is_held:
            raise taken_over(self.folder)


@contextlib.contextmanager
def whole_cache(folder: Path, *, wait: bool = True) -> Iterator[HeldCache]:
    """Claim a whole cache: inside the block, no other process writes to it.

    Args:
        folder: The folder of the cache.
        wait: Whether to wait for other processes.

    Raises:
        BusyError: If another process writes to the cache and ``wait`` is False.
    """
    with contextlib.ExitStack() as held:
        claims = {CACHE: held.enter_context(claimed(folder, CACHE, wait=wait))}
        names = {path.name for path in folder.glob("*.h5")} | held_units(folder)
        for name in sorted(names - {CACHE}):
            claims[name] = held.enter_context(wait_for_claim(folder, name, wait=wait))
        yield HeldCache(folder, claims)
