"""Find the positions of sequence ids: with a dictionary for few ids, with a table of 64-bit hashes for many.

A dictionary of Python strings takes about 200 bytes per id, but finds the ids of a batch ten times faster. The table
takes 5.5 bytes per id, and worker processes that are forked after the first lookup share it.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import offsets, range_indices

MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio. Multiplying by it spreads similar values over all bits."""
BULK_LOOKUP = 32
"""Fewer ids than this are looked up one by one; more ids are looked up together in NumPy."""
DICTIONARY_MAX = 2**16
"""The largest number of ids in a dictionary. Such a dictionary takes 12 MB."""
BUCKET = 8
"""The largest mean number of ids in a bucket of the table. The mean is at least half of it."""
LOOKUPS = 2**16
"""The largest number of ids that NumPy looks up at once."""
SORTED_AT_ONCE = 2**23
"""If there are as many hashes as this, they are sorted in groups, which have half to all of this number on average."""


class IdIndex:
    """Finds the position of each id. The first lookup makes the dictionary or the table of hashes (0.1 s per million).

    The ids are not copied. They stay in one array for each shard, which may be mapped from its file.
    """

    def __init__(self, parts: Sequence[NDArray[np.bytes_]]) -> None:
        """
        Args:
            parts: The ids, one array after the other. Shape (n_i,) each, UTF-8, fixed length.
        """
        self.parts = list(parts)
        self._starts: list[int] = offsets(np.array([len(part) for part in parts])).tolist()
        self._later_starts = self._starts[1:-1]
        self._width = max(part.dtype.itemsize for part in parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, position: int) -> str:
        """The id at ``position``."""
        return self._raw(position).decode("utf-8")

    def _raw(self, position: int) -> bytes:
        number = bisect.bisect_right(self._later_starts, position)
        raw: bytes = self.parts[number].item(position - self._starts[number])
        return raw

    def names(self) -> list[str]:
        """All ids, by position."""
        return [raw.decode("utf-8") for part in self.parts for raw in part.tolist()]

    def find(self, wanted: Sequence[str]) -> list[int]:
        """The position of each id, or -1 if it is absent."""
        if (known := self._dictionary) is not None:
            try:
                return [known.get(name, -1) for name in wanted]
            except TypeError:  # an object that cannot be a dictionary key, so it is not a string
                return [known.get(name, -1) if isinstance(name, str) else -1 for name in wanted]
        # An object that is not a string is never an id. It is replaced by a NUL, which no id contains.
        raw = [name.encode("utf-8", "surrogatepass") if isinstance(name, str) else b"\0" for name in wanted]
        if len(raw) < BULK_LOOKUP:
            return [self._find_raw(name) for name in raw]
        return [position for at in range(0, len(raw), LOOKUPS) for position in self._find_many(raw[at : at + LOOKUPS])]

    def find_one(self, name: str) -> int:
        """The position of one id, or -1 if it is absent."""
        if (known := self._dictionary) is not None:
            return known.get(name, -1)
        return self._find_raw(name.encode("utf-8", "surrogatepass"))

    def _is_possible(self, raw: bytes) -> bool:
        """Whether ``raw`` can be an id. NumPy would cut off what is too long, and final NULs, and find a wrong id."""
        return len(raw) <= self._width and b"\0" not in raw

    def _find_raw(self, raw: bytes) -> int:
        if not self._is_possible(raw):
            return -1
        table, sought = self._table, _hash_one(raw, self._width)
        bucket = sought >> table.shift
        end = table.first.item(bucket + 1)
        place = table.tags.find(sought & 0xFF, table.first.item(bucket), end)
        while place >= 0:
            position: int = table.order.item(place)
            if self._raw(position) == raw:
                return position
            place = table.tags.find(sought & 0xFF, place + 1, end)
        return -1

    def _find_many(self, raw: list[bytes]) -> list[int]:
        """``_find_raw`` for many ids. NumPy finds the places with the right bucket and tag: mostly one for each id."""
        table, found = self._table, [-1] * len(raw)
        possible = [i for i, name in enumerate(raw) if self._is_possible(name)]
        hashes = _hash(np.array([raw[i] for i in possible], dtype=f"S{self._width}"), self._width)
        buckets = (hashes >> np.uint64(table.shift)).astype(np.int64)
        starts = table.first[buckets].astype(np.int64)
        lengths = table.first[buckets + 1] - starts
        places = range_indices(starts, lengths)
        tags = np.frombuffer(table.tags, dtype=np.uint8)
        fits = np.flatnonzero(tags[places] == np.repeat(hashes.astype(np.uint8), lengths))
        asked = np.searchsorted(offsets(lengths), fits, side="right") - 1  # which of ``possible`` each place is for
        for k, position in zip(asked.tolist(), table.order[places[fits]].tolist(), strict=True):
            if self._raw(position) == raw[possible[k]]:
                found[possible[k]] = position
        return found

    def duplicate(self) -> tuple[int, int] | None:
        """Two positions of an id that occurs more than once, or None."""
        if (known := self._dictionary) is None:
            return self._table.duplicate
        if len(known) < len(self):
            for position, name in enumerate(self.names()):
                if known[name] != position:  # the dictionary has the last position of each id
                    return position, known[name]
        return None

    @cached_property
    def _dictionary(self) -> dict[str, int] | None:
        """The position of each id; None if there are too many ids."""
        return {name: i for i, name in enumerate(self.names())} if len(self) <= DICTIONARY_MAX else None

    @cached_property
    def _table(self) -> _Table:
        hashes = np.empty(len(self), dtype="<u8")
        for start, part in zip(self._starts, self.parts, strict=False):
            hashes[start : start + len(part)] = _hash(part, self._width)
        return self._sorted(hashes)

    def _sorted(self, hashes: NDArray[np.uint64]) -> _Table:
        """Sort one range of hashes after another, so that sorting takes little memory."""
        n = len(hashes)
        bits = max(1, (n // BUCKET).bit_length())
        ranges = min(8, (n // SORTED_AT_ONCE).bit_length())
        range_of = hashes.view(np.uint8)[7::8] >> np.uint8(8 - ranges)  # from the uppermost byte of each hash
        order = np.empty(n, dtype=np.int32 if n < 2**31 else np.int64)
        first = np.empty(2**bits + 1, dtype=np.uint32 if n < 2**32 else np.int64)
        tags, at, duplicate, last = bytearray(n), 0, None, 0
        for number in range(2**ranges):
            inside = np.flatnonzero(range_of == number)
            inside = inside[np.argsort(hashes[inside])]
            values = hashes[inside]
            order[at : at + len(inside)] = inside
            np.frombuffer(tags, dtype=np.uint8)[at : at + len(inside)] = values.astype(np.uint8)
            end = (number + 1) << (bits - ranges)
            numbers = np.arange(last, end, dtype=np.uint64)
            first[last:end] = at + np.searchsorted(values >> np.uint64(64 - bits), numbers)
            duplicate = duplicate or self._same(values, inside)
            at, last = at + len(inside), end
        first[-1] = n
        return _Table(order=order, tags=tags, first=first, shift=64 - bits, duplicate=duplicate)

    def _same(self, hashes: NDArray[np.uint64], positions: NDArray[np.int64]) -> tuple[int, int] | None:
        """Two positions with the same id, or None. ``hashes`` are in ascending order; each has its position."""
        for k in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            end = int(np.searchsorted(hashes, hashes[k], side="right"))
            one, *others = positions[k:end].tolist()
            for other in others:
                if self._raw(one) == self._raw(other):
                    return min(one, other), max(one, other)
        return None


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The positions of n ids in the order of their hashes. The upper bits of a hash are the number of its bucket."""

    order: NDArray[Any]
    """(n,) the positions."""
    tags: bytearray
    """(n,) the lowest byte of each hash. Few ids in a bucket have the same one, so few ids are compared."""
    first: NDArray[Any]
    """(buckets + 1,) the first place of each bucket in ``order``, then n."""
    shift: int
    """How far to shift a hash to the right to get the number of its bucket, in bits."""
    duplicate: tuple[int, int] | None
    """Two positions with the same id."""


def _hash(ids: NDArray[np.bytes_], width: int) -> NDArray[np.uint64]:
    """(n,) a hash of each id; the id is first filled with NULs up to ``width`` bytes."""
    words = -(-width // 8)
    columns = ids.astype(f"S{8 * words}").view("<u8").reshape(len(ids), words)
    result = np.zeros(len(ids), dtype=np.uint64)
    for column in columns.T:
        result = (result ^ column) * np.uint64(MULTIPLIER)
        result ^= result >> np.uint64(32)
    return result


def _hash_one(raw: bytes, width: int) -> int:
    """``_hash`` of one id in pure Python: ten times as fast as ``_hash`` with an array of one id."""
    result, words = 0, -(-width // 8)
    for word in struct.unpack(f"<{words}Q", raw.ljust(8 * words, b"\0")):
        result = (result ^ word) * MULTIPLIER & 0xFFFF_FFFF_FFFF_FFFF
        result ^= result >> 32
    return result
