"""Fill a shard of a cache. A sequence is marked complete only after its bytes are safe on disk.

``create`` made the shard, so HDF5 is not needed here. States are written in place with ``pwrite``, synced, and then
marked complete. (If the disk is full, ``pwrite`` raises an error; a memory map would cause a signal.) If the machine
loses power between two steps, work is lost, but every marked sequence is complete.

What a process has passed to ``pwrite`` belongs to the system: it is not lost if the process is killed. The next writer
finds it by its checksum (``keep_written``). So a process that is killed loses only what its own memory holds: the batch
that the model computes, the batch that is being written, and those that wait for it (``PENDING_BATCHES`` at most; none
if the disk is faster than the model). On a GPU, one more batch is being copied to this memory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import not_finite
from kr2cache.cache.format import states_xxh3
from kr2cache.cache.shard import Shard, open_shard, read_intact
from kr2cache.errors import CacheError
from kr2cache.system.disk import disk_error, sync, write_whole

SYNC_EVERY_S = 0.5
"""Seconds between two syncs. So a power failure loses the work of half a second, and of the time that a sync takes. The
end of an extraction waits for unsynced bytes: with 5 seconds, this wait was a tenth of a short extraction.
"""
SYNC_EVERY_BYTES = 2**26
"""Sync earlier if so many bytes are unsynced. Until the sync, the disk may be idle."""
PENDING_BATCHES = 4
"""The largest number of batches that wait for the disk. It limits memory if the disk is slower than the model."""


def unmark(shard: Shard, sequences: Sequence[int], check: Callable[[], object] = lambda: None) -> None:
    """Remove the marks of damaged sequences. From then on they count as not written.

    Args:
        sequences: Positions in the shard.
        check: Called when the file is open, before the first change. What it raises ends the work.

    Raises:
        CacheError: If another tool rewrote the file.
    """
    offset = shard.offset("examples/complete")
    if offset is None:
        raise _rewritten(shard)
    descriptor = os.open(shard.path, os.O_RDWR)
    try:
        check()
        for i in sequences:
            os.pwrite(descriptor, b"\0", offset + i)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rewritten(shard: Shard) -> CacheError:
    return CacheError(
        f"{shard.path} was rewritten by another tool, so it cannot be completed in place.",
        "Remove its folder and run kr2cache extract again.",
    )


def _use_batch_scheduling() -> None:
    """Let this thread wake up without interrupting a thread of the model, whose threads all wait for the slowest.

    This thread still gets its share of the cores. A lower priority would disturb the model less. But on a busy machine,
    states would then wait too long for the disk, and the model would wait for the interpreter lock that this thread
    holds.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) != os.SCHED_OTHER:
                return  # the user chose another policy
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))


@dataclass(frozen=True)
class PackedStates:
    """States of several sequences as stored, ready to be written."""

    sequences: Sequence[int]
    """Positions in the cache."""
    raw: NDArray[Any]
    """Stored values, shape (rows, D): one sequence after the other, and within a sequence layer by layer."""
    scale: NDArray[np.float32] | None
    """(rows,) if rows have scales, else None."""


class ShardWriter:
    """Fills one shard.

    Two threads work while the model computes. One thread checks, writes and hashes states. The other syncs and marks
    written sequences, so that the disk also works while states are hashed.

    At the end of the ``with`` block, every batch that was passed to ``write`` is written, synced and marked. This is
    also true after an error in the block.
    """

    def __init__(self, path: Path, first: int = 0, check: Callable[[], object] = lambda: None) -> None:
        """
        Args:
            path: The shard.
            first: Position in the cache of its first sequence.
            check: Called before a batch is written and before it is marked. What it raises ends the writing.
        """
        self.shard = open_shard(path)
        if not self.shard.completable:
            raise _rewritten(self.shard)
        self.first = first
        self._check = check
        self.unfinished = ~self.shard.complete
        """(n,) True for sequences of the shard that are neither complete nor passed to ``write``."""
        self.kept = 0
        """Sequences that ``keep_written`` found."""
        self.bytes_written = 0
        self._file = os.open(path, os.O_RDWR)
        # Ctrl-C inside a SimpleQueue leaves no lock held, so no thread can wait for ever.
        self._states: queue.SimpleQueue[PackedStates | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(PENDING_BATCHES):
            self._room.put(None)
        self._written: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        """(sequence in the shard, bytes written) of sequences that are not marked yet."""
        self._failure: BaseException | None = None
        self._writer = threading.Thread(target=self._write_all, name="cache-writer", daemon=True)
        self._syncer = threading.Thread(target=self._mark_all, name="cache-syncer", daemon=True)

    def __enter__(self) -> Self:
        self._writer.start()
        self._syncer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for queued, thread in ((self._states, self._writer), (self._written, self._syncer)):
            queued.put(None)
            thread.join()
        os.close(self._file)
        if error is None:
            self._raise_failure()

    def keep_written(self) -> None:
        """Mark the sequences that an earlier process wrote and did not mark before it ended. To be called before
        ``unfinished`` is read.

        They are written once more: if a sync of the earlier process failed, the next sync would not say so.
        """
        n, start = len(self.unfinished), self.shard.array_offset("examples/xxh3")
        digests = np.frombuffer(os.pread(self._file, 8 * n, start), dtype="<u8")
        for i in np.flatnonzero(self.unfinished & (digests != 0)).tolist():
            intact = read_intact(self._file, self.shard, i)
            if intact is not None:
                self.write(PackedStates([self.first + i], intact.raw, intact.scale))
                self.kept += 1

    def write(self, states: PackedStates) -> None:
        """Pass a batch to the writing thread. Returns at once unless ``PENDING_BATCHES`` batches are already waiting.

        Sequences that were complete when the shard was opened are not written again.

        Raises:
            DiskSpaceError: If an earlier batch did not fit on the disk.
            ValueRangeError: If a state of an earlier batch is not a finite value of the stored dtype.
        """
        self._raise_failure()
        self._room.get()
        self._states.put(states)
        self.unfinished[np.asarray(states.sequences) - self.first] = False

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write_all(self) -> None:
        _use_batch_scheduling()
        while (states := self._states.get()) is not None:
            self._room.put(None)
            if self._failure is not None:
                continue  # keep taking batches, or the model's thread would wait for ever
            try:
                self._write(states)
            except BaseException as error:
                self._fail(error)

    def _mark_all(self) -> None:
        _use_batch_scheduling()
        unmarked: list[int] = []
        unsynced, synced_at, more = 0, time.monotonic(), True
        while more:
            with contextlib.suppress(queue.Empty):
                patience = max(0.0, synced_at + SYNC_EVERY_S - time.monotonic()) if unmarked else None
                written = self._written.get(timeout=patience)
                more = written is not None
                if written is not None:
                    i, size = written
                    unmarked.append(i)
                    unsynced += size
                    self.bytes_written += size
            is_due = unsynced > SYNC_EVERY_BYTES or time.monotonic() - synced_at > SYNC_EVERY_S
            if unmarked and ((is_due and self._written.empty()) or not more):
                try:
                    self._mark(unmarked)
                except BaseException as error:
                    self._fail(error)
                    return  # a failed sync may have lost bytes: no later sync may mark their sequences
                unmarked, unsynced, synced_at = [], 0, time.monotonic()

    def _fail(self, error: BaseException) -> None:
        # Explain the error before setting it: the model's thread may raise it at any moment.
        if self._failure is None:
            self._failure = self._explained(error)

    def _explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError):
            return error
        try:
            file = self.shard.path.stat()
            return disk_error(error, self.shard.path, max(0, file.st_size - file.st_blocks * 512))
        except OSError:  # the file does not exist any more
            return error

    def _write(self, states: PackedStates) -> None:
        shard, row = self.shard, 0
        self._check()
        for position in states.sequences:
            i = position - self.first
            first, rows = int(shard.first_row[i]), int(shard.first_row[i + 1] - shard.first_row[i])
            raw, scale = states.raw[row : row + rows], None if states.scale is None else states.scale[row : row + rows]
            row += rows
            if shard.complete[i]:
                continue  # the model ran it again only as part of its batch; another process may be reading it
            if not shard.header.stored.all_finite(raw, scale):
                error = not_finite(shard.ids[i], shard.header.stored, shard.header.layers, raw, scale)
                error.remedy += " Complete sequences are kept."
                raise error
            size = self._pwrite(raw, shard.array_offset("hidden") + first * shard.header.hidden_row_bytes)
            if scale is not None:
                size += self._pwrite(scale, shard.array_offset("hidden_scale") + first * scale.itemsize)
            digest = np.array([states_xxh3(raw, scale)], dtype="<u8")
            size += self._pwrite(digest, shard.array_offset("examples/xxh3") + i * digest.itemsize)
            self._written.put((i, size))

    def _pwrite(self, array: NDArray[Any], offset: int) -> int:
        return write_whole(self._file, array.data, offset)

    def _mark(self, unmarked: Sequence[int]) -> None:
        """Sync the states first, then write and sync the marks."""
        sync(self._file)
        self._check()
        for i in unmarked:
            os.pwrite(self._file, b"\x01", self.shard.array_offset("examples/complete") + i)
        sync(self._file)
