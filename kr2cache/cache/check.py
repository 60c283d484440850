"""Read every byte of a cache against its checksums, and say what is damaged.

Files are read with ``preadv`` into buffers of their own, not through maps: a file that shrinks, or a disk that fails,
is then an error and not a signal. Reading releases Python's lock, and XXH3 runs at memory speed, so a few threads keep
a disk busy.
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
"""Read at once; a larger sequence is a block of its own."""
THREADS = min(8, os.cpu_count() or 1)


@dataclass(kw_only=True)
class ShardCheck:
    """What was found in one shard."""

    path: Path
    unreadable: str = ""
    """Why the file is no shard; its sequences are lost to reading."""
    index_damaged: bool = False
    """The index contradicts ``index_xxh3``: ids, lengths, tokens or text hashes are not what was written."""
    structure_damaged: bool = False
    """Something else beside the states is not as it was made: HDF5's own structures, attributes, unused space."""
    damaged: list[int] = field(default_factory=list)
    """Positions whose states, scales, checksum or mark are not what was written."""
    incomplete: list[int] = field(default_factory=list)
    """Positions that are not marked complete."""
    ids: list[str] = field(default_factory=list)
    bytes: int = 0
    """States and scales that were read."""

    @property
    def needs_rebuild(self) -> bool:
        """Whether it has to be made again around its sound sequences."""
        return bool(self.unreadable) or self.index_damaged or self.structure_damaged

    @property
    def intact(self) -> bool:
        return not (self.needs_rebuild or self.damaged)


@dataclass(kw_only=True)
class CacheCheck:
    """What was found in a cache."""

    folder: Path
    shards: list[ShardCheck]
    faults: list[str]
    """Of the folder as a whole: missing shards, shards of other caches, ids that occur twice."""
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
        """Nothing is damaged; something may still be incomplete."""
        return not self.faults and all(shard.intact for shard in self.shards)


def check_cache(folder: Path, advance: Callable[[int], None] = lambda count: None) -> CacheCheck:
    """Check structure, index and every complete sequence of a cache.

    Args:
        advance: Called with bytes as they are read.

    Raises:
        CacheError: If the folder holds no shard at all.
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
    """Fill ``found`` with what the bytes of one shard say."""
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
            damaged += _check_block_of_hdf5(shard, block, digests)
            advance(_block_bytes(shard, block))
    else:
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for block, bad in zip(
                    blocks, pool.map(lambda one: _check_block(shard, one, digests, descriptor), blocks), strict=True
                ):
                    damaged += bad
                    advance(_block_bytes(shard, block))
        finally:
            os.close(descriptor)
    found.damaged = sorted(set(damaged))
    found.bytes = sum(_block_bytes(shard, block) for block in blocks)


def _blocks(shard: Shard) -> Iterator[NDArray[np.int64]]:
    """Complete sequences that are neighbours, about ``BLOCK_BYTES`` together."""
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
    except OSError:  # the disk cannot read it, or it is not there any more
        return [int(i) for i in block]
    bad = []
    for i in block.tolist():
        first, last = int(shard.first_row[i]) - start, int(shard.first_row[i + 1]) - start
        scales: Any = None if scale is None else scale[first * SCALE_BYTES : last * SCALE_BYTES]
        if states_xxh3(raw[first * width : last * width], scales) != int(digests[i]):
            bad.append(i)
    return bad


def _check_block_of_hdf5(shard: Shard, block: NDArray[np.int64], digests: NDArray[np.uint64]) -> list[int]:
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
            raise OSError("the file ends here")
        done += read
    return buffer
