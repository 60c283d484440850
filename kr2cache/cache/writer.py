"""Write a cache so that at any instant every ``shard-*.h5`` on disk is valid HDF5.

A shard is built under a temporary name, with all HDF5 metadata and the whole index; its space is reserved, it is
synced, and only then renamed. From then on HDF5 is not involved: states are written in place with ``pwrite`` (a full
disk is then an error, where a store into a map would be a signal), synced, and only then marked complete. A machine
that loses power between two steps has lost work, never bytes that a mark vouches for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import (
    ON_DISK,
    TAIL_MARK,
    SequenceIndex,
    ShardHeader,
    all_finite,
    chunk_rows,
    decode,
    header_copy,
    row_bytes,
    shard_name,
    states_xxh3,
)
from kr2cache.cache.layout import read_layout
from kr2cache.cache.shard import Shard, fixed_xxh3, headers_left, is_structure_sound, open_shard, shard_paths
from kr2cache.errors import CacheError, CacheVersionError, DiskSpaceError, ValueRangeError

PAGE = 4096
SYNC_EVERY_S = 0.5
"""At most this much computing is lost with the power; and what is not synced at the end of an extraction is waited for:
with 5 seconds that was a tenth of a short one.
"""
PENDING_BATCHES = 4
"""Batches that may wait for the disk; bounds memory when the disk is slower than the model."""


def shard_cuts(n_tokens: NDArray[np.int32], token_bytes: int, shard_bytes: int) -> list[int]:
    """Where to cut the sequences into shards of at most ``shard_bytes`` of states: ``[0, ..., n]``.

    A sequence larger than a shard gets one of its own.
    """
    cuts, held = [0], 0
    for i, tokens in enumerate(n_tokens.tolist()):
        wanted = tokens * token_bytes
        if held and held + wanted > shard_bytes:
            cuts.append(i)
            held = 0
        held += wanted
    return [*cuts, len(n_tokens)]


def create_shards(folder: Path, header: ShardHeader, index: SequenceIndex, shard_bytes: int) -> list[Path]:
    """Make the shards of a cache, space reserved and nothing complete. Those that are there already are kept; one that
    is damaged, or is not what ``header`` and ``index`` say, is made again with the sequences that are left of it.

    Returns:
        The shards that were made again.

    Raises:
        DiskSpaceError: If the space cannot be reserved; no unfinished file stays.
        CacheVersionError: For a shard of another version of the format; it is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token_bytes = row_bytes(header.width, header.dtype) * len(header.layers)
    cuts = shard_cuts(index.n_tokens, token_bytes, shard_bytes)
    paths = [folder / shard_name(number, len(cuts) - 1) for number in range(len(cuts) - 1)]
    made_again = []
    for path, start, stop in zip(paths, cuts[:-1], cuts[1:], strict=True):
        part = index.part(start, stop)
        if not path.exists():
            create_shard(path, header, part)
        elif not _is_shard_of(path, header, part):
            create_shard(path, header, part, salvage=path)
            made_again.append(path)
    return made_again


def _is_shard_of(path: Path, header: ShardHeader, index: SequenceIndex) -> bool:
    """Whether the file is a shard of this cache, its index as it was written."""
    try:
        shard = open_shard(path)
        layers = len(header.layers)
        same = shard.header == header and shard.tokens().xxh3(layers) == index.xxh3(layers)
        return same and is_structure_sound(shard) and _can_be_completed(shard)
    except CacheVersionError:
        raise
    except CacheError:
        return False


def create_shard(path: Path, header: ShardHeader, index: SequenceIndex, salvage: Path | None = None) -> None:
    """Build one shard under a temporary name, reserve its space, sync it, rename it.

    Args:
        salvage: A damaged shard whose sound sequences are copied into the new one before it gets its name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        # Twice: a disk that fills while HDF5 builds the file leaves HDF5 unable to close it, and the process dies.
        with partial.open("wb") as file:
            reserved = _reserve(file.fileno(), _size(header, index))
        if not reserved and shutil.disk_usage(path.parent).free < _size(header, index) - _state_bytes(header, index):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _build(partial, header, index)
        with partial.open("ab") as file:
            file.write(header_copy(header))
        fixed = struct.pack("<Q", fixed_xxh3(partial, read_layout(partial)))
        descriptor = os.open(partial, os.O_RDWR)
        try:
            size = os.fstat(descriptor).st_size
            write_whole(descriptor, fixed, size - len(fixed) - len(TAIL_MARK))
            _reserve(descriptor, size)
            if salvage is not None:
                _salvage(salvage, open_shard(partial), descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path, _size(header, index)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _salvage(damaged: Path, fresh: Shard, descriptor: int) -> None:
    """Copy the sequences of a damaged file that are marked complete, equal their checksum, and have the id and the
    tokens that the new file has. Equal content lies at equal offsets, so the damaged file's own structures need not be
    read.
    """
    places = {name: fresh.place(name) for name in ("examples/id", "tokens/input_id", "examples/xxh3", "hidden")}
    marks, width = fresh.place("examples/complete"), fresh.header.row_bytes
    id_bytes = fresh.ids.dtype.itemsize
    first_token = fresh.first_row // len(fresh.header.layers)
    # The same corpus by another model has the same ids and tokens: the file has to be of this cache.
    if not any(header.fingerprint == fresh.header.fingerprint for header in headers_left(damaged)):
        return
    old = os.open(damaged, os.O_RDONLY)
    try:
        for i in range(len(fresh.ids)):
            start, stop = int(fresh.first_row[i]), int(fresh.first_row[i + 1])
            tokens = 4 * int(first_token[i]), 4 * int(first_token[i + 1] - first_token[i])
            same = all(
                os.pread(old, count, at) == os.pread(descriptor, count, at)
                for at, count in (
                    (places["examples/id"] + i * id_bytes, id_bytes),
                    (places["tokens/input_id"] + tokens[0], tokens[1]),
                )
            )
            if not same or os.pread(old, 1, marks + i) != b"\x01":
                continue
            raw = np.frombuffer(os.pread(old, (stop - start) * width, places["hidden"] + start * width), dtype=np.uint8)
            scale = None
            if fresh.header.dtype == "int8":
                at = fresh.place("hidden_scale") + start * 4
                scale = np.frombuffer(os.pread(old, (stop - start) * 4, at), dtype=np.uint8)
            digest = os.pread(old, 8, places["examples/xxh3"] + 8 * i)
            if states_xxh3(raw, scale) != int.from_bytes(digest, "little") or len(raw) != (stop - start) * width:
                continue
            write_whole(descriptor, raw.data, places["hidden"] + start * width)
            if scale is not None:
                write_whole(descriptor, scale.data, fresh.place("hidden_scale") + start * 4)
            write_whole(descriptor, digest, places["examples/xxh3"] + 8 * i)
            write_whole(descriptor, b"\x01", marks + i)
    finally:
        os.close(old)


def write_whole(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """``pwrite`` all of it; returns how many bytes."""
    view = memoryview(data).cast("B")
    count = len(view)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
    return count


def unmark(shard: Shard, sequences: Sequence[int]) -> None:
    """Take back the marks of damaged sequences; they count as never written from then on.

    Raises:
        CacheError: If another tool rewrote the file.
    """
    offset = shard.offset("examples/complete")
    if offset is None:
        raise _rewritten(shard)
    descriptor = os.open(shard.path, os.O_RDWR)
    try:
        for i in sequences:
            os.pwrite(descriptor, b"\0", offset + i)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _can_be_completed(shard: Shard) -> bool:
    """Whether states, checksums and marks are plain arrays of the file."""
    return shard.mappable and all(shard.offset(name) is not None for name in ("examples/xxh3", "examples/complete"))


def _rewritten(shard: Shard) -> CacheError:
    return CacheError(
        f"{shard.path} was rewritten by another tool, so it cannot be completed in place.",
        "Remove its folder and run kr2cache extract again.",
    )


def _not_finite(shard: Shard, i: int, raw: NDArray[Any], scale: NDArray[np.float32] | None) -> ValueRangeError:
    header = shard.header
    finite = np.isfinite(decode(raw, None, header.dtype) if scale is None else scale[:, None]).all(axis=1)
    layer = header.layers[int(np.argmin(finite)) // (len(raw) // len(header.layers))]
    return ValueRangeError(
        f"A state of {shard.ids[i].decode('utf-8')!r} at layer {layer} is not a finite {header.dtype} value.",
        "float16 ends at 65,504: --dtype bfloat16 or float32 holds larger values. If it is nan there too, the model "
        "itself gives nan. What is complete is kept.",
    )


def _reserve(descriptor: int, size: int) -> bool:
    """Reserve space where the platform can; elsewhere (False) a full disk is noticed when it is written to."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True


def _state_bytes(header: ShardHeader, index: SequenceIndex) -> int:
    rows = int(index.n_tokens.sum(dtype=np.int64)) * len(header.layers)
    return rows * row_bytes(header.width, header.dtype)


def _size(header: ShardHeader, index: SequenceIndex) -> int:
    """Bytes of a shard, within a few pages: states, index (29 bytes a sequence beside its id), tokens, HDF5's own."""
    beside = len(index) * (index.ids.dtype.itemsize + 29) + 8 * len(index.input_id) + len(header_copy(header)) * 2
    return _state_bytes(header, index) + beside + 32 * PAGE


def _preempt_nobody() -> None:
    """Let this thread, when there is something to write, not take a core from the model at once: all of the model's
    threads wait for the slowest. It has as large a share of the cores as before. (A lower priority would take less
    from the model, but on a busy machine the states would wait for the disk, and the model for this thread's hold on
    the interpreter.)
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) != os.SCHED_OTHER:
                return  # the user chose another
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))


def _sync(descriptor: int) -> None:
    """The bytes on disk; macOS knows no fdatasync."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path, needed: int) -> Exception:
    """``error`` as the project's own where it says that the disk is full, else itself.

    Args:
        path: A file or folder that is there, or whose folder is.
        needed: Bytes that had yet to be found room for.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        limit = "" if free < needed else " and a quota or limit of this process allows no more"
        return DiskSpaceError(
            f"No space left for {path}: it needs {needed:,} more bytes, {free:,} are free{limit}.",
            "Make room (or give another --cache-dir) and run the same command again: what is complete is kept.",
        )
    return error


def _build(path: Path, header: ShardHeader, index: SequenceIndex) -> None:
    layers = len(header.layers)
    first_row = index.first_row(layers)
    rows = int(first_row[-1])
    dtype = ON_DISK[header.dtype]
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    creation.set_attr_phase_change(32, 16)  # all attributes in the root's header: layout.py looks nowhere else
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, PAGE)  # however small: a mapped array should start on a page
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    with h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)) as file:
        # First, so that they lie in front: a file that is cut off still says what it was.
        for name, value in header.attributes().items():
            file.attrs[name] = value
        file.attrs["index_xxh3"] = np.uint64(index.xxh3(layers))
        for group in ("examples", "tokens"):
            properties = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
            properties.set_obj_track_times(False)
            h5py.h5g.create(file.id, group.encode(), gcpl=properties)
        _dataset(
            file,
            "hidden",
            (rows, header.width),
            dtype,
            chunks=(chunk_rows(rows, header.width, header.dtype), header.width),
        )
        if header.dtype == "int8":
            _dataset(file, "hidden_scale", (rows,), np.dtype("<f4"))
        string = h5py.string_dtype("utf-8", index.ids.dtype.itemsize)
        n = len(index)
        fixed: dict[str, NDArray[Any]] = {
            "examples/id": index.ids.astype(string),
            "examples/first_row": first_row,
            "examples/n_tokens": index.n_tokens,
            "examples/text_xxh3": index.text_xxh3,
            "examples/xxh3": np.zeros(n, dtype=np.uint64),
            "examples/complete": np.zeros(n, dtype=np.uint8),
            "tokens/input_id": index.input_id,
            "tokens/word_index": index.word_index,
        }
        for name, array in fixed.items():
            _dataset(file, name, array.shape, array.dtype)[...] = array


def _dataset(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, int] | None = None
) -> h5py.Dataset:
    """A data set with its space allocated at once, never filled, without times."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    if chunks:
        properties.set_chunk(chunks)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(dtype, logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, properties))


@dataclass(frozen=True)
class PackedStates:
    """Sequences of one shard, ready to be written."""

    shard: int
    sequences: Sequence[int]
    """Positions within the shard."""
    raw: NDArray[Any]
    """Stored values, shape (rows, D): the sequences one after the other, each layer by layer."""
    scale: NDArray[np.float32] | None
    """(rows,) for int8."""


class CacheWriter:
    """Fills the shards of one cache from a thread of its own, so that the model never waits for the disk.

    Leaving the ``with`` block, in whatever way, writes, syncs and marks what was handed over.
    """

    def __init__(self, folder: Path) -> None:
        self.shards = [open_shard(path) for path in shard_paths(folder)]
        for shard in self.shards:
            if not _can_be_completed(shard):
                raise _rewritten(shard)
        self.bytes_written = 0
        self._files = [os.open(shard.path, os.O_RDWR) for shard in self.shards]
        # Simple queues: a Ctrl-C inside leaves neither lock nor waiter behind, so the thread needs no watch.
        self._states: queue.SimpleQueue[PackedStates | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(PENDING_BATCHES):
            self._room.put(None)
        self._unmarked: list[tuple[int, int]] = []
        self._failure: BaseException | None = None
        self._synced_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="cache-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states.put(None)
        self._thread.join()
        for descriptor in self._files:
            os.close(descriptor)
        if error is None:
            self._raise_failure()

    def unfinished(self, shard: int) -> NDArray[np.bool_]:
        """(n,) which sequences of a shard were incomplete when it was opened."""
        return ~self.shards[shard].complete

    def write(self, states: PackedStates) -> None:
        """Hand over a batch; returns at once unless ``PENDING_BATCHES`` wait already.

        Sequences that were complete when the shards were opened are left as they are.

        Raises:
            DiskSpaceError: If an earlier batch did not fit on the disk.
            ValueRangeError: If a state of an earlier batch is not a finite value of the stored dtype.
        """
        self._raise_failure()
        self._room.get()
        self._states.put(states)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        _preempt_nobody()
        while (states := self._states.get()) is not None:
            self._room.put(None)
            if self._failure is not None:
                continue  # keep taking, so that the model's thread is not left waiting for room
            try:
                self._write(states)
                if time.monotonic() - self._synced_at > SYNC_EVERY_S:
                    self._mark()
            except BaseException as error:
                self._fail(error)
        try:
            self._mark()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        # Set once, in our own words: the model's thread may take it at any moment.
        if self._failure is None:
            self._failure = self._explained(error)

    def _explained(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError):
            return error
        try:
            files = [shard.path.stat() for shard in self.shards]
            missing = sum(max(0, file.st_size - file.st_blocks * 512) for file in files)
            return disk_error(error, self.shards[0].path.parent, missing)
        except OSError:  # the files are gone as well
            return error

    def _write(self, states: PackedStates) -> None:
        shard, descriptor = self.shards[states.shard], self._files[states.shard]
        row = 0
        for i in states.sequences:
            first, rows = int(shard.first_row[i]), int(shard.first_row[i + 1] - shard.first_row[i])
            raw, scale = states.raw[row : row + rows], None if states.scale is None else states.scale[row : row + rows]
            row += rows
            if shard.complete[i]:
                continue  # it ran with its batch, and others may be reading what is there
            if not all_finite(raw, scale, shard.header.dtype):
                raise _not_finite(shard, i, raw, scale)
            self._pwrite(descriptor, raw, shard.place("hidden") + first * shard.header.row_bytes)
            if scale is not None:
                self._pwrite(descriptor, scale, shard.place("hidden_scale") + first * scale.itemsize)
            digest = np.array([states_xxh3(raw, scale)], dtype="<u8")
            self._pwrite(descriptor, digest, shard.place("examples/xxh3") + i * digest.itemsize)
            self._unmarked.append((states.shard, i))

    def _pwrite(self, descriptor: int, array: NDArray[Any], offset: int) -> None:
        self.bytes_written += write_whole(descriptor, array.data, offset)

    def _mark(self) -> None:
        """Sync the states, and only then the marks that vouch for them."""
        # Taken out first: what a failed sync may have lost must never be marked by a later one.
        unmarked, self._unmarked = self._unmarked, []
        touched = sorted({shard for shard, _ in unmarked})
        for shard in touched:
            _sync(self._files[shard])
        for shard, i in unmarked:
            os.pwrite(self._files[shard], b"\x01", self.shards[shard].place("examples/complete") + i)
        for shard in touched:
            _sync(self._files[shard])
        self._synced_at = time.monotonic()
