"""Find the positions of sequence ids: with a dictionary for few ids, with sorted 64-bit hashes for many.

A dictionary of Python strings takes about 200 bytes per id, but finds the ids of a batch ten times faster. The hashes
take 12 bytes per id, and worker processes that are forked after the first lookup share them.
"""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio. Multiplying by it spreads similar values over all bits."""
BULK_LOOKUP = 32
"""Look up fewer ids than this one by one, and more ids together in NumPy."""
DICTIONARY_MAX = 2**16
"""The largest number of ids in a dictionary, which then takes 12 MB."""


class IdIndex:
    """Finds the position of each id. The first lookup makes the dictionary or sorts the hashes (0.2 s per million)."""

    def __init__(self, ids: NDArray[np.bytes_]) -> None:
        """
        Args:
            ids: (n,) UTF-8, fixed length.
        """
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, position: int) -> str:
        """The id at ``position``."""
        return bytes(self.ids[position]).decode("utf-8")

    def names(self) -> list[str]:
        """All ids, by position."""
        return [raw.decode("utf-8") for raw in self.ids.tolist()]

    def find(self, wanted: Sequence[str]) -> list[int]:
        """The position of each id, or -1 if it is absent."""
        if (known := self._dictionary) is not None:
            try:
                return [known.get(name, -1) for name in wanted]
            except TypeError:  # an object that cannot be a dictionary key, so it is not a string
                return [known.get(name, -1) if isinstance(name, str) else -1 for name in wanted]
        # An object that is not a string is never an id. A NUL, which no id contains, replaces it.
        raw = [name.encode("utf-8", "surrogatepass") if isinstance(name, str) else b"\0" for name in wanted]
        if len(raw) < BULK_LOOKUP:
            return [self._find_raw(name) for name in raw]
        found = np.full(len(raw), -1, dtype=np.int64)
        possible = [i for i, name in enumerate(raw) if self._is_possible(name)]
        keys = np.array([raw[i] for i in possible], dtype=self.ids.dtype)
        hashes, order = self._sorted_hashes
        candidates = order[np.minimum(np.searchsorted(hashes, _hash(keys)), len(order) - 1)].astype(np.int64)
        for k in np.flatnonzero(self.ids[candidates] != keys).tolist():  # absent, or another id has the same hash
            candidates[k] = self._find_raw(raw[possible[k]])
        found[possible] = candidates
        return found.tolist()

    def _is_possible(self, raw: bytes) -> bool:
        """Whether ``raw`` can be an id: NumPy would shorten a longer name or one with final NULs to another id."""
        return len(raw) <= self.ids.dtype.itemsize and b"\0" not in raw and len(self.ids) > 0

    def find_one(self, name: str) -> int:
        """The position of one id, or -1 if it is absent."""
        if (known := self._dictionary) is not None:
            return known.get(name, -1)
        return self._find_raw(name.encode("utf-8", "surrogatepass"))

    def _find_raw(self, raw: bytes) -> int:
        if not self._is_possible(raw):
            return -1
        order, values = self._sorted_hashes[1], self._hash_values
        sought = _hash_one(raw, self.ids.dtype.itemsize)
        # Hashes are spread evenly, so the value tells roughly where it is. A search near this place is faster.
        guess = sought * len(values) >> 64
        low, high = max(0, guess - self._search_radius), min(len(values), guess + self._search_radius)
        if (low > 0 and values[low - 1] >= sought) or (high < len(values) and values[high] < sought):
            low, high = 0, len(values)
        place = bisect.bisect_left(values, sought, low, high)
        while place < len(values) and values[place] == sought:
            position: int = order.item(place)
            if self.ids.item(position) == raw:
                return position
            place += 1
        return -1

    def duplicate(self) -> tuple[int, int] | None:
        """The first two positions of an id that occurs more than once, or None."""
        if self._dictionary is not None and len(self._dictionary) == len(self.ids):
            return None
        hashes, order = self._sorted_hashes
        for k in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            end = int(np.searchsorted(hashes, hashes[k], side="right"))
            others = order[k + 1 : end]
            if len(same := others[self.ids[others] == self.ids[order[k]]]):
                first, second = sorted([int(order[k]), *same.tolist()])[:2]
                return first, second
        return None

    @cached_property
    def _dictionary(self) -> dict[str, int] | None:
        """The position of each id; None if there are too many ids."""
        return {name: i for i, name in enumerate(self.names())} if len(self.ids) <= DICTIONARY_MAX else None

    @cached_property
    def _hash_values(self) -> memoryview:
        """The sorted hashes; indexing gives Python numbers."""
        return self._sorted_hashes[0].data

    @cached_property
    def _search_radius(self) -> int:
        """Largest distance of a hash from its expected place that is searched first.

        It is four standard deviations of a hash in the middle, where the deviation is largest.
        """
        return 2 * math.isqrt(len(self.ids)) + 1

    @cached_property
    def _sorted_hashes(self) -> tuple[NDArray[np.uint64], NDArray[Any]]:
        """The hashes in ascending order, and the position of the id of each."""
        hashes = _hash(self.ids)
        order: NDArray[Any] = np.argsort(hashes).astype(np.int32 if len(hashes) < 2**31 else np.int64)
        return hashes[order], order


def _hash(ids: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """(n,) a hash of each id. Hashes can be compared only between arrays of the same string width."""
    words = -(-ids.dtype.itemsize // 8)
    columns = ids.astype(f"S{8 * words}").view("<u8").reshape(len(ids), words)
    result = np.zeros(len(ids), dtype=np.uint64)
    for column in columns.T:
        result = (result ^ column) * np.uint64(MULTIPLIER)
        result ^= result >> np.uint64(32)
    return result


def _hash_one(raw: bytes, width: int) -> int:
    """``_hash`` of one id in pure Python: ten times as fast as an array of one id."""
    result, words = 0, -(-width // 8)
    for word in struct.unpack(f"<{words}Q", raw.ljust(8 * words, b"\0")):
        result = (result ^ word) * MULTIPLIER & 0xFFFF_FFFF_FFFF_FFFF
        result ^= result >> 32
    return result
