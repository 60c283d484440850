"""Compare every byte of a cache with its checksums, and report the damaged sequences.

Files are read with ``preadv`` into buffers, not through memory maps: a file that shrinks or a disk that fails then
raises an error instead of a signal. A few threads keep a disk busy, because reading releases Python's global
interpreter lock and XXH3 runs at the speed of memory.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import SCALE_BYTES
from kr2cache.cache.format import shard_name, states_xxh3
from kr2cache.cache.hdf5 import read_rows
from kr2cache.cache.shard import Shard, is_structure_intact, open_shard, shard_files
from kr2cache.errors import CacheError

BLOCK_BYTES = 32 * 2**20
"""The size of one read. A sequence that is larger is read as one block."""
THREADS = min(8, os.cpu_count() or 1)


@dataclass(kw_only=True)
class ShardCheck:
    """The result of checking one shard."""

    path: Path
    unreadable: str = ""
    """Why the file cannot be read as a shard; empty if it can be read."""
    index_damaged: bool = False
    """Whether the index does not match ``index_xxh3``: ids, lengths, tokens or text hashes changed."""
    structure_damaged: bool = False
    """Whether other fixed bytes changed: HDF5's own structures, attributes or unused space."""
    damaged: list[int] = field(default_factory=list)
    """Positions in the shard of sequences whose states, scales, checksum or mark changed."""
    incomplete: list[int] = field(default_factory=list)
    """Positions in the shard of sequences that are not marked complete."""
    ids: list[str] = field(default_factory=list)
    """All ids of the shard, by position."""
    bytes: int = 0
    """Bytes of states and scales that were read."""

    @property
    def needs_rebuild(self) -> bool:
        """Whether the file must be made again; its intact sequences are then copied."""
        return bool(self.unreadable) or self.index_damaged or self.structure_damaged

    @property
    def intact(self) -> bool:
        return not (self.needs_rebuild or self.damaged)


@dataclass(kw_only=True)
class CacheCheck:
    """The result of checking a cache."""

    folder: Path
    shards: list[ShardCheck]
    faults: list[str]
    """Faults of the whole folder: missing shards, shards of other caches, ids that occur twice."""
    seconds: float

    @property
    def sequences(self) -> int:
        return sum(len(shard.ids) for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def damaged_ids(self) -> list[str]:
        return [shard.ids[i] for shard in self.shards for i in shard.damaged]

    @property
    def incomplete_ids(self) -> list[str]:
        return [shard.ids[i] for shard in self.shards for i in shard.incomplete]

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged. Sequences may still be incomplete."""
        return not self.faults and all(shard.intact for shard in self.shards)


def check_cache(folder: Path, advance: Callable[[int], None] = lambda count: None) -> CacheCheck:
    """Check structure, index and every complete sequence of a cache.

    Args:
        advance: Called after each block with the number of bytes read.

    Raises:
        CacheError: If the folder holds no shard.
    """
    started = time.monotonic()
    paths = shard_files(folder)
    faults, opened = [], []
    shards = [ShardCheck(path=path) for path in paths]
    total = paths[0].stem.rpartition("-")[2]
    expected = (
        {shard_name(number, int(total)) for number in range(int(total))} if len(paths) == _number(total) else None
    )
    if expected != {path.name for path in paths}:
        faults.append(f"it should hold {total} shards, but holds {len(paths)}")
    for found in shards:
        try:
            shard = open_shard(found.path)
        except CacheError as error:
            found.unreadable = error.message
            continue
        opened.append(shard)
        found.ids = [raw.decode("utf-8") for raw in shard.ids.tolist()]
        check_shard(shard, found, advance)
    for shard in opened[1:]:
        if shard.header != opened[0].header:
            faults.append(f"{shard.path.name} belongs to another cache than {opened[0].path.name}")
    twice = [name for name, count in Counter(name for found in shards for name in found.ids).items() if count > 1]
    if twice:
        faults.append(f"the id {twice[0]!r} occurs twice" + (f", and {len(twice) - 1} more" if twice[1:] else ""))
    return CacheCheck(folder=folder, shards=shards, faults=faults, seconds=time.monotonic() - started)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def check_shard(shard: Shard, found: ShardCheck, advance: Callable[[int], None] = lambda count: None) -> None:
    """Check the bytes of one shard and write the result into ``found``."""
    layers = len(shard.header.layers)
    try:
        found.index_damaged = shard.tokens().xxh3(layers) != int(shard.layout.attributes["index_xxh3"])
    except (CacheError, LookupError, TypeError, ValueError, OSError):
        found.index_damaged = True
    found.structure_damaged = not found.index_damaged and not is_structure_intact(shard)
    marks = shard.read("examples/complete")
    digests = shard.read("examples/xxh3")
    found.incomplete = np.flatnonzero(marks == 0).tolist()
    damaged = np.flatnonzero(marks > 1).tolist()
    blocks = list(_blocks(shard))
    if not shard.mappable:
        for block in blocks:
            damaged += _check_block_with_hdf5(shard, block, digests)
            advance(_block_bytes(shard, block))
    else:
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for block, bad in zip(
                    blocks, pool.map(lambda block: _check_block(shard, block, digests, descriptor), blocks), strict=True
                ):
                    damaged += bad
                    advance(_block_bytes(shard, block))
        finally:
            os.close(descriptor)
    found.damaged = sorted(set(damaged))
    found.bytes = sum(_block_bytes(shard, block) for block in blocks)


def _blocks(shard: Shard) -> Iterator[NDArray[np.int64]]:
    """Blocks of adjacent complete sequences, each about ``BLOCK_BYTES`` large."""
    complete = np.flatnonzero(shard.complete)
    if not len(complete):
        return
    ends = shard.first_row[1:][complete] * shard.header.hidden_row_bytes
    starts = shard.first_row[:-1][complete] * shard.header.hidden_row_bytes
    first = 0
    while first < len(complete):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + BLOCK_BYTES, side="right")))
        gap = np.flatnonzero(np.diff(complete[first:last]) > 1)
        if len(gap):
            last = first + int(gap[0]) + 1
        yield complete[first:last]
        first = last


def _block_bytes(shard: Shard, block: NDArray[np.int64]) -> int:
    rows = int(shard.first_row[block[-1] + 1] - shard.first_row[block[0]])
    return rows * shard.header.stored.row_bytes(shard.header.width)


def _check_block(shard: Shard, block: NDArray[np.int64], digests: NDArray[np.uint64], descriptor: int) -> list[int]:
    start, stop = int(shard.first_row[block[0]]), int(shard.first_row[block[-1] + 1])
    width = shard.header.hidden_row_bytes
    try:
        raw = _pread(descriptor, shard.array_offset("hidden") + start * width, (stop - start) * width)
        scale = None
        if shard.header.stored.has_scales:
            scale = _pread(
                descriptor, shard.array_offset("hidden_scale") + start * SCALE_BYTES, (stop - start) * SCALE_BYTES
            )
    except OSError:  # the disk fails, or the file became shorter
        return [int(i) for i in block]
    bad = []
    for i in block.tolist():
        first, last = int(shard.first_row[i]) - start, int(shard.first_row[i + 1]) - start
        scales: Any = None if scale is None else scale[first * SCALE_BYTES : last * SCALE_BYTES]
        if states_xxh3(raw[first * width : last * width], scales) != int(digests[i]):
            bad.append(i)
    return bad


def _check_block_with_hdf5(shard: Shard, block: NDArray[np.int64], digests: NDArray[np.uint64]) -> list[int]:
    bad = []
    for i in block.tolist():
        start, stop = int(shard.first_row[i]), int(shard.first_row[i + 1])
        try:
            raw = read_rows(shard.path, "hidden", start, stop)
            scale = read_rows(shard.path, "hidden_scale", start, stop) if shard.header.stored.has_scales else None
        except CacheError:
            bad.append(i)
            continue
        if states_xxh3(np.ascontiguousarray(raw), scale) != int(digests[i]):
            bad.append(i)
    return bad


def _pread(descriptor: int, offset: int, count: int) -> NDArray[np.uint8]:
    buffer = np.empty(count, dtype=np.uint8)
    done = 0
    while done < count:
        read = os.preadv(descriptor, [buffer[done:].data], offset + done)
        if read == 0:
            raise OSError("the file ends too early")
        done += read
    return buffer
