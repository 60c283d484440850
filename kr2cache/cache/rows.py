"""Read the rows of a cache's sequences from its shards, and prefetch them.

A shard is memory-mapped if its states are one plain array in the file. Other shards are read through HDF5.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import mmap
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import SCALE_BYTES
from kr2cache.cache.format import offsets, ranges
from kr2cache.cache.hdf5 import read_rows
from kr2cache.cache.shard import Shard
from kr2cache.system.memory import total_memory

PAGE = mmap.PAGESIZE
READ_AHEAD: int | None = getattr(mmap, "MADV_WILLNEED", None)
READ_AHEAD_BYTES = max(2**17, PAGE)
"""Bytes of one request. A disk reads ahead 128 KiB by default; Linux may ignore the rest of a larger request."""
MEMORY_SHARE = 0.5
"""A cache larger than this share of the machine's memory counts as too large to stay in memory."""

MAPPED_INDEX = ("examples/id", "examples/n_tokens", "examples/text_xxh3", "examples/first_row")
"""The data sets of the index that are used from the map."""


class StoredRows:
    """The rows of all shards. A sequence is named by its position in the cache, a layer by its place in the file."""

    def __init__(self, shards: Sequence[Shard], maps: Sequence[mmap.mmap | None]) -> None:
        """
        Args:
            shards: All shards, in order.
            maps: The map of each, from ``map_shard``.
        """
        header = shards[0].header
        self._shards = list(shards)
        self._shard_starts = offsets(np.array([len(shard.ids) for shard in shards]))
        self._later_starts: list[int] = self._shard_starts[1:-1].tolist()
        """The first position of each shard except the first shard."""
        self._maps = list(maps)
        self._hidden = [_array(shard, file, "hidden") for shard, file in zip(shards, self._maps, strict=True)]
        self._scale = [_array(shard, file, "hidden_scale") for shard, file in zip(shards, self._maps, strict=True)]
        self._layers = len(header.layers)
        self.every_layer = list(range(self._layers))
        """The places of all layers."""
        self.mapped = all(hidden is not None for hidden in self._hidden)
        """Whether every shard is memory-mapped."""
        self.stored_bytes = sum(shard.rows for shard in shards) * header.stored.row_bytes(header.width)
        """Bytes of the states, with their scales."""
        self.is_large = self.stored_bytes > MEMORY_SHARE * total_memory()
        """Whether the cache is too large to stay in memory."""
        self.prefetched = np.zeros(int(self._shard_starts[-1]), dtype=bool)
        """(n,) whether all layers of the sequence were prefetched; always False if the cache is large."""
        self._prefetched_layers: dict[tuple[int, ...], NDArray[np.bool_]] = {}
        """The same for each choice of layers."""

    def is_mapped(self, number: int) -> bool:
        """Whether shard ``number`` is memory-mapped."""
        return self._hidden[number] is not None

    def span(self, position: int, lowest: int, highest: int) -> tuple[int, int, int]:
        """Find the layers ``lowest`` to ``highest`` (inclusive) of a sequence.

        Only Python numbers are used: NumPy is slower for single numbers.

        Returns:
            The number of the shard, the first row, and the row after the last.
        """
        number = bisect.bisect_right(self._later_starts, position)
        local = position - self._shard_starts.item(number)
        first_row = self._shards[number].first_row
        first = first_row.item(local)
        tokens = (first_row.item(local + 1) - first) // self._layers
        return number, first + lowest * tokens, first + (highest + 1) * tokens

    def word_index(self, position: int) -> NDArray[np.int32]:
        """(T,) the input word of each token of a sequence; -1 for a special token. A view."""
        number, start, stop = self.span(position, 0, 0)
        first = start // self._layers
        return self._word_index[number][first : first + stop - start]

    @cached_property
    def _word_index(self) -> list[NDArray[np.int32]]:
        """(t,) for each shard: from the map, or read once."""
        name = "tokens/word_index"
        mapped = [
            None if shard.offset(name) is None else _array(shard, file, name)
            for shard, file in zip(self._shards, self._maps, strict=True)
        ]
        return [shard.read(name) if array is None else array for shard, array in zip(self._shards, mapped, strict=True)]

    def read(self, number: int, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Read rows of a shard as stored. The result is a view if the shard is mapped.

        Returns:
            Values, shape (rows, D), and scales, shape (rows,), or None if rows have no scales.
        """
        hidden, scale = self._hidden[number], self._scale[number]
        if hidden is not None:
            return hidden[start:stop], None if scale is None else scale[start:stop]
        shard = self._shards[number]
        return (
            read_rows(shard.path, "hidden", start, stop),
            read_rows(shard.path, "hidden_scale", start, stop) if shard.header.stored.has_scales else None,
        )

    def copy(self, positions: list[int], lowest: int, highest: int, out: NDArray[Any]) -> None:
        """Copy the ``span`` of each sequence into ``out``, one after the other. All shards must be mapped."""
        at = 0
        for position in positions:
            number, start, stop = self.span(position, lowest, highest)
            end = at + stop - start
            out[at:end] = self._hidden[number][start:stop]  # type: ignore[index]
            at = end

    def prefetch(self, positions: list[int], layers: list[int]) -> None:
        """Ask the system to load these layers of these sequences.

        A cache that fits in memory asks for each sequence once, because asking for loaded states takes about half as
        long as copying them. A larger cache asks every time.
        """
        if not self.is_large:
            prefetched = self._prefetched(layers)
            if all(map(prefetched.item, positions)):
                return
            positions = [position for position in positions if not prefetched.item(position)]
            prefetched[positions] = True
        for start, stop in ranges(layers):
            for position in positions:
                self._advise(*self.span(position, start, stop - 1))

    def _prefetched(self, layers: list[int]) -> NDArray[np.bool_]:
        if layers == self.every_layer:  # comparing is faster than the lookup of a long key
            return self.prefetched
        key = tuple(sorted(set(layers)))
        if (prefetched := self._prefetched_layers.get(key)) is None:
            prefetched = self._prefetched_layers[key] = np.zeros(len(self.prefetched), dtype=bool)
        return prefetched

    def _advise(self, number: int, start: int, stop: int) -> None:
        """Ask for these rows of a shard. Does nothing if the file is not mapped or the system has no such call."""
        if (file := self._maps[number]) is None or READ_AHEAD is None:
            return
        shard = self._shards[number]
        arrays = {"hidden": shard.header.hidden_row_bytes}
        if shard.header.stored.has_scales:
            arrays["hidden_scale"] = SCALE_BYTES
        for name, width in arrays.items():
            first, end = shard.array_offset(name) + start * width, shard.array_offset(name) + stop * width
            for at in range(first // PAGE * PAGE, end, READ_AHEAD_BYTES):
                with contextlib.suppress(OSError):  # the system may refuse: states are then loaded when they are used
                    file.madvise(READ_AHEAD, at, min(READ_AHEAD_BYTES, end - at))


def map_shard(shard: Shard) -> tuple[Shard, mmap.mmap | None]:
    """Map a shard's file, and take the large arrays of its index from the map. The system then loads them when
    they are used, and all processes share them.

    Returns:
        The shard with mapped arrays, and the map. If its states are not one plain array, the shard as it is and None.
    """
    if not shard.mappable:
        return shard, None
    with shard.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    places = {name.rpartition("/")[2]: name for name in MAPPED_INDEX if shard.offset(name) is not None}
    arrays: dict[str, Any] = {field: _array(shard, mapped, name) for field, name in places.items()}
    if "id" in arrays:
        arrays["ids"] = arrays.pop("id")
    return dataclasses.replace(shard, **arrays), mapped


def _array(shard: Shard, file: mmap.mmap | None, name: str) -> NDArray[Any] | None:
    """A data set of a mapped file; None if the file is not mapped or has no such data set."""
    if file is None or (name == "hidden_scale" and not shard.header.stored.has_scales):
        return None
    dataset = shard.layout.datasets[name]
    count = math.prod(dataset.shape)
    return np.frombuffer(file, dtype=dataset.dtype, count=count, offset=shard.array_offset(name)).reshape(dataset.shape)
