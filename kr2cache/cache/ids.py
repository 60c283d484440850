"""Sequence ids to positions: a dictionary for few ids; for millions, sorted 64-bit hashes and the ids as stored.

A dictionary of Python strings takes about 200 bytes per id. The hashes take 12, and forked worker processes share them
after the first lookup. The dictionary finds the ids of a batch ten times faster.
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
"""2**64 over the golden ratio: spreads neighbouring values over all bits."""
BULK_LOOKUP = 32
"""Fewer ids are looked up one by one."""
DICTIONARY_MAX = 2**16
"""So many ids or fewer have a dictionary: 12 MB at most."""


class IdIndex:
    """Where each id is. The dictionary is made, or the hashes are sorted (0.2 s a million), when something is first
    looked up.
    """

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
        """All of them, by position."""
        return [raw.decode("utf-8") for raw in self.ids.tolist()]

    def find(self, wanted: Sequence[str]) -> list[int]:
        """The position of each, -1 for one that is not there."""
        if (known := self._dictionary) is not None:
            try:
                return [known.get(name, -1) for name in wanted]
            except TypeError:  # of what cannot be the key of a dictionary, and so is no text
                return [known.get(name, -1) if isinstance(name, str) else -1 for name in wanted]
        # What is no text is no id: a NUL stands for it, which no id has.
        raw = [name.encode("utf-8", "surrogatepass") if isinstance(name, str) else b"\0" for name in wanted]
        if len(raw) < BULK_LOOKUP:
            return [self._find_raw(one) for one in raw]
        found = np.full(len(raw), -1, dtype=np.int64)
        possible = [i for i, one in enumerate(raw) if self._is_possible(one)]
        keys = np.array([raw[i] for i in possible], dtype=self.ids.dtype)
        hashes, order = self._sorted_hashes
        candidates = order[np.minimum(np.searchsorted(hashes, _hash(keys)), len(order) - 1)].astype(np.int64)
        for k in np.flatnonzero(self.ids[candidates] != keys).tolist():  # absent, or another id of equal hash is first
            candidates[k] = self._find_raw(raw[possible[k]])
        found[possible] = candidates
        return found.tolist()

    def _is_possible(self, raw: bytes) -> bool:
        """A longer one, or one with a NUL, would equal another once it is cut or filled up to the array's width."""
        return len(raw) <= self.ids.dtype.itemsize and b"\0" not in raw and len(self.ids) > 0

    def find_one(self, name: str) -> int:
        """``find`` of one."""
        if (known := self._dictionary) is not None:
            return known.get(name, -1)
        return self._find_raw(name.encode("utf-8", "surrogatepass"))

    def _find_raw(self, raw: bytes) -> int:
        if not self._is_possible(raw):
            return -1
        order, values = self._sorted_hashes[1], self._hash_values
        sought = _hash_one(raw, self.ids.dtype.itemsize)
        # Hashes are spread evenly, so one lies about where its share of all values is: fewer and nearer places to look.
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

    def duplicate(self) -> str | None:
        """An id that is there more than once."""
        if self._dictionary is not None and len(self._dictionary) == len(self.ids):
            return None
        hashes, order = self._sorted_hashes
        for k in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
            end = int(np.searchsorted(hashes, hashes[k], side="right"))
            if (self.ids[order[k + 1 : end]] == self.ids[order[k]]).any():
                return self.name(int(order[k]))
        return None

    @cached_property
    def _dictionary(self) -> dict[str, int] | None:
        """Of few ids."""
        return {name: i for i, name in enumerate(self.names())} if len(self.ids) <= DICTIONARY_MAX else None

    @cached_property
    def _hash_values(self) -> memoryview:
        """The sorted hashes, as Python's numbers when they are looked at."""
        return self._sorted_hashes[0].data

    @cached_property
    def _search_radius(self) -> int:
        """How far a hash may lie from its share: four standard deviations at the middle, where they are largest."""
        return 2 * math.isqrt(len(self.ids)) + 1

    @cached_property
    def _sorted_hashes(self) -> tuple[NDArray[np.uint64], NDArray[Any]]:
        """Hashes in order, and whose they are."""
        hashes = _hash(self.ids)
        order: NDArray[Any] = np.argsort(hashes).astype(np.int32 if len(hashes) < 2**31 else np.int64)
        return hashes[order], order


def _hash(ids: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """(n,) a hash of each id; of arrays of one width alone they can be compared."""
    words = -(-ids.dtype.itemsize // 8)
    columns = ids.astype(f"S{8 * words}").view("<u8").reshape(len(ids), words)
    result = np.zeros(len(ids), dtype=np.uint64)
    for column in columns.T:
        result = (result ^ column) * np.uint64(MULTIPLIER)
        result ^= result >> np.uint64(32)
    return result


def _hash_one(raw: bytes, width: int) -> int:
    """``_hash`` of one id: an array of one would cost ten times as much."""
    result, words = 0, -(-width // 8)
    for word in struct.unpack(f"<{words}Q", raw.ljust(8 * words, b"\0")):
        result = (result ^ word) * MULTIPLIER & 0xFFFF_FFFF_FFFF_FFFF
        result ^= result >> 32
    return result
