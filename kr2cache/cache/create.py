"""Make the shards of a cache: write all HDF5 metadata and the whole index, and reserve space for the states.

A shard is built in another folder, synced, and then renamed. So every ``shard-*.h5`` on disk is valid HDF5 at any
moment. The writer later fills it in place.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import SCALE_BYTES
from kr2cache.cache.format import (
    TAIL_MARK,
    SequenceIndex,
    ShardHeader,
    chunk_rows,
    header_copy,
    shard_name,
)
from kr2cache.cache.layout import read_layout
from kr2cache.cache.shard import (
    OF_POOLED,
    Shard,
    fixed_xxh3,
    is_structure_intact,
    open_shard,
    read_intact,
    readable_headers,
)
from kr2cache.errors import CacheError, CacheVersionError
from kr2cache.system.disk import disk_error, free_bytes, reserve, sync_folder, write_whole

PAGE = 4096


def shard_boundaries(n_tokens: NDArray[np.int32], token_bytes: int, shard_bytes: int) -> list[int]:
    """Split the sequences into shards with at most ``shard_bytes`` of states.

    A sequence that is larger than a shard gets a shard of its own.

    Args:
        n_tokens: (n,) the tokens of each sequence.
        token_bytes: Bytes of the stored states of one token, all layers together.
        shard_bytes: The largest size of a shard's states.

    Returns:
        The first sequence of each shard, then n.
    """
    cuts, held = [0], 0
    for i, tokens in enumerate(n_tokens.tolist()):
        wanted = tokens * token_bytes
        if held and held + wanted > shard_bytes:
            cuts.append(i)
            held = 0
        held += wanted
    return [*cuts, len(n_tokens)]


@dataclass(frozen=True)
class ShardPart:
    """One shard of a cache, and which sequences it holds."""

    path: Path
    start: int
    """Position in the cache of its first sequence."""
    stop: int
    """Exclusive."""


def shard_parts(folder: Path, header: ShardHeader, index: SequenceIndex, shard_bytes: int) -> list[ShardPart]:
    """The shards of a cache, whether they exist or not.

    Raises:
        CacheError: If lengths of the index contradict each other.
    """
    tokens = int(index.n_tokens.sum(dtype=np.int64))
    empty = int((index.n_tokens < 1).sum())
    if empty or not tokens == len(index.input_id) == len(index.word_index):
        raise CacheError(
            f"{folder} is not made: the index has {tokens} tokens, {len(index.input_id)} token ids and "
            f"{len(index.word_index)} word numbers; {empty} sequences have no token.",
            "Give each sequence one token or more, and each token an id and a word number (-1 for special tokens).",
        )
    token_bytes = header.stored.row_bytes(header.width) * len(header.layers)
    cuts = shard_boundaries(index.n_tokens, token_bytes, shard_bytes)
    return [
        ShardPart(folder / shard_name(number, len(cuts) - 1), start, stop)
        for number, (start, stop) in enumerate(pairwise(cuts))
    ]


def is_shard_of(path: Path, header: ShardHeader, index: SequenceIndex) -> bool:
    """Whether the file is an intact shard of this cache that the writer can complete.

    Args:
        index: The shard's sequences.

    Raises:
        CacheVersionError: For a shard of another version of the format.
    """
    try:
        shard = open_shard(path)
        layers = len(header.layers)
        same = shard.header == header and shard.tokens().xxh3(layers) == index.xxh3(layers)
        return same and is_structure_intact(shard) and shard.completable
    except CacheVersionError:
        raise
    except CacheError:
        return False


def create_shard(
    path: Path, header: ShardHeader, index: SequenceIndex, build_in: Path, *, recover: bool = False
) -> None:
    """Build one shard, reserve its space, sync it, and give it its name. Nothing in it is complete.

    Args:
        index: The shard's sequences.
        build_in: A folder of the same file system, in which no other process writes.
        recover: Whether to copy the intact sequences of the existing file ``path`` into the new file.

    Raises:
        DiskSpaceError: If the space cannot be reserved; the unfinished file is removed.
    """
    partial = build_in / (path.name + ".partial")
    try:
        # Reserve before HDF5 builds the file, and again after: if the disk becomes full while HDF5 writes, HDF5 cannot
        # close the file and the process dies.
        with partial.open("wb") as file:
            reserved = reserve(file.fileno(), _size(header, index))
        if not reserved and free_bytes(path.parent) < _size(header, index) - _state_bytes(header, index):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _build(partial, header, index)
        with partial.open("ab") as file:
            file.write(header_copy(header))
        fixed = struct.pack("<Q", fixed_xxh3(partial, read_layout(partial)))
        descriptor = os.open(partial, os.O_RDWR)
        try:
            size = os.fstat(descriptor).st_size
            write_whole(descriptor, fixed, size - len(fixed) - len(TAIL_MARK))
            reserve(descriptor, size)
            if recover:
                _recover(path, open_shard(partial), descriptor)
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


def _recover(damaged: Path, fresh: Shard, descriptor: int) -> None:
    """Copy sequences from a damaged file: those that match their checksum, and have the id and tokens of the new file.
    They need not be marked: a process that was killed or stopped may have written them and not marked them yet. Both
    files have the same offsets, so the structures of the damaged file are not read.
    """
    ids, tokens = fresh.array_offset("examples/id"), fresh.array_offset("tokens/input_id")
    id_bytes = fresh.ids.dtype.itemsize
    first_token = fresh.first_row // len(fresh.header.layers)
    # Check the fingerprint: a cache of the same corpus and another model can have the same ids and tokens.
    if not any(header.fingerprint == fresh.header.fingerprint for header in readable_headers(damaged)):
        return
    old = os.open(damaged, os.O_RDONLY)
    try:
        for i in range(len(fresh.ids)):
            start, stop = 4 * int(first_token[i]), 4 * int(first_token[i + 1])
            same = all(
                os.pread(old, count, at) == os.pread(descriptor, count, at)
                for at, count in ((ids + i * id_bytes, id_bytes), (tokens + start, stop - start))
            )
            intact = read_intact(old, fresh, i) if same else None
            if intact is None:
                continue
            row = int(fresh.first_row[i])
            write_whole(descriptor, intact.raw.data, fresh.array_offset("hidden") + row * fresh.header.hidden_row_bytes)
            if intact.scale is not None:
                write_whole(descriptor, intact.scale.data, fresh.array_offset("hidden_scale") + row * SCALE_BYTES)
            write_whole(descriptor, intact.digest, fresh.array_offset("examples/xxh3") + 8 * i)
            write_whole(descriptor, b"\x01", fresh.array_offset("examples/complete") + i)
    finally:
        os.close(old)


def _build(path: Path, header: ShardHeader, index: SequenceIndex) -> None:
    layers = len(header.layers)
    first_row = index.first_row(layers)
    rows = int(first_row[-1])
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    creation.set_attr_phase_change(32, 16)  # all attributes in the root's header, the only place that layout.py reads
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(1, PAGE)  # align everything to pages, so that a mapped array starts on a page
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    with h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, creation, access)) as file:
        # Write the attributes first, so that they are near the start: a file that is cut off still has them.
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
            header.stored.on_disk,
            chunks=(chunk_rows(rows, header.width, header.dtype), header.width),
        )
        if header.stored.has_scales:
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
        if index.tokens_xxh3 is not None:
            fixed[OF_POOLED] = index.tokens_xxh3
        for name, array in fixed.items():
            _dataset(file, name, array.shape, array.dtype)[...] = array


def _dataset(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, int] | None = None
) -> h5py.Dataset:
    """Make a data set. Its space is allocated now and not filled with a default value; no times are stored."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    if chunks:
        properties.set_chunk(chunks)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(dtype, logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, properties))


def _state_bytes(header: ShardHeader, index: SequenceIndex) -> int:
    rows = int(index.n_tokens.sum(dtype=np.int64)) * len(header.layers)
    return rows * header.stored.row_bytes(header.width)


def _size(header: ShardHeader, index: SequenceIndex) -> int:
    """Bytes of a shard, accurate to a few pages: states, index (the id and 29 more bytes per sequence; 37 if they are
    pooled), tokens and HDF5's own structures.
    """
    pooled = 0 if index.tokens_xxh3 is None else index.tokens_xxh3.itemsize
    beside = len(index) * (index.ids.dtype.itemsize + 29 + pooled)
    beside += 8 * len(index.input_id) + len(header_copy(header)) * 2
    return _state_bytes(header, index) + beside + 32 * PAGE
