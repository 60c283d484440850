"""The states of a cache's sequences as rows of its shards: finds them, reads them, and prefetches them.

A shard is memory-mapped if its states are one plain array in the file, else read through HDF5.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import SCALE_BYTES
from kr2cache.cache.format import offsets
from kr2cache.cache.hdf5 import read_rows
from kr2cache.cache.shard import Shard

PAGE = mmap.PAGESIZE
READ_AHEAD: int | None = getattr(mmap, "MADV_WILLNEED", None)
READ_AHEAD_BYTES = max(2**17, PAGE)
"""Asked for at once: of more than a disk's own read-ahead, 128 KiB by default, Linux may drop the rest in silence."""


class StoredRows:
    """The rows of all shards, found by a sequence's position in the cache."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._first_of_shard = offsets(np.array([len(shard.ids) for shard in shards]))
        self._later: list[int] = self._first_of_shard[1:-1].tolist()
        """Where each shard but the first begins."""
        self._layers = len(shards[0].header.layers)
        self._maps = [_map(shard) for shard in shards]
        self._hidden = [_mapped(shard, one, "hidden") for shard, one in zip(shards, self._maps, strict=True)]
        self._scale = [_mapped(shard, one, "hidden_scale") for shard, one in zip(shards, self._maps, strict=True)]
        self.mapped = all(hidden is not None for hidden in self._hidden)
        """Whether every shard is memory-mapped."""

    def is_mapped(self, number: int) -> bool:
        """Whether this shard is."""
        return self._hidden[number] is not None

    def span(self, position: int, lowest: int, highest: int) -> tuple[int, int, int]:
        """Shard, and the rows from the first to the last of a sequence's layers at these places, those between
        included. Python's own numbers throughout: arrays of so few cost more than what they hold.
        """
        number = bisect.bisect_right(self._later, position)
        local = position - self._first_of_shard.item(number)
        first_row = self._shards[number].first_row
        first = first_row.item(local)
        tokens = (first_row.item(local + 1) - first) // self._layers
        return number, first + lowest * tokens, first + (highest + 1) * tokens

    def read(self, number: int, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Rows of a shard as they are on disk, (rows, D), and for int8 their scales, (rows,); views if it is mapped."""
        hidden, scale = self._hidden[number], self._scale[number]
        if hidden is not None:
            return hidden[start:stop], None if scale is None else scale[start:stop]
        shard = self._shards[number]
        return (
            read_rows(shard.path, "hidden", start, stop),
            read_rows(shard.path, "hidden_scale", start, stop) if shard.header.stored.has_scales else None,
        )

    def copy(self, positions: list[int], lowest: int, highest: int, out: NDArray[Any]) -> None:
        """The ``span`` of each sequence, of mapped shards, one after the other into ``out``."""
        at = 0
        for position in positions:
            number, start, stop = self.span(position, lowest, highest)
            end = at + stop - start
            out[at:end] = self._hidden[number][start:stop]  # type: ignore[index]
            at = end

    def ask_for(self, number: int, start: int, stop: int) -> None:
        """Ask the system for these rows, so that it reads them at once. Nothing happens for a file that is not mapped,
        or where the system knows no such advice.
        """
        if (one := self._maps[number]) is None or READ_AHEAD is None:
            return
        shard = self._shards[number]
        arrays = {"hidden": shard.header.row_bytes}
        if shard.header.stored.has_scales:
            arrays["hidden_scale"] = SCALE_BYTES
        for name, width in arrays.items():
            first, end = shard.place(name) + start * width, shard.place(name) + stop * width
            for at in range(first // PAGE * PAGE, end, READ_AHEAD_BYTES):
                with contextlib.suppress(OSError):  # advice that the system will not take
                    one.madvise(READ_AHEAD, at, min(READ_AHEAD_BYTES, end - at))


def _map(shard: Shard) -> mmap.mmap | None:
    """The file, read-only; None where the states are not one plain array of it."""
    if not shard.mappable:
        return None
    with shard.path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _mapped(shard: Shard, whole: mmap.mmap | None, name: str) -> NDArray[Any] | None:
    """A data set of a mapped file; None if the file is not mapped or has no such data set."""
    if whole is None or (name == "hidden_scale" and not shard.header.stored.has_scales):
        return None
    dataset = shard.layout.datasets[name]
    count = math.prod(dataset.shape)
    return np.frombuffer(whole, dtype=dataset.dtype, count=count, offset=shard.place(name)).reshape(dataset.shape)
