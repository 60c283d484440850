"""Ids that occur twice, and examples that stand in two files."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kr2cache.errors import DataError


class UniqueIds:
    """Finds an id that occurs twice, with 8 bytes of memory for each id."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, name: str) -> None:
        self._hashes.append(hash(name))

    def check(self, again: Callable[[], Iterable[tuple[str, str]]]) -> None:
        """Raise ``DataError`` for the first id that was added twice, naming both places.

        Args:
            again: Reads all ids again, in the same order, with their places. Called only if two hashes are equal.
        """
        hashes = np.sort(np.frombuffer(self._hashes, dtype=np.int64))
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: dict[str, str] = {}
        for name, place in again() if suspects else ():
            if hash(name) not in suspects:
                continue
            if name in seen:
                raise DataError(
                    f"The id {name!r} occurs twice: {seen[name]} and {place}.",
                    "States are found by id: make the ids unique.",
                )
            seen[name] = place


def repeated(hashes: Sequence[array[int]]) -> tuple[int, int, int, int] | None:
    """How many examples occur in an earlier file too: a file may be a copy or a part of another. None if none does.

    Args:
        hashes: For each file, one hash for each example.

    Returns:
        The count; for the first of them its place in its file, the earlier file, and its file.
    """
    values = np.concatenate([np.frombuffer(one, dtype=np.int64) for one in hashes])
    files = np.repeat(np.arange(len(hashes)), [len(one) for one in hashes])
    _, first, same = np.unique(values, return_index=True, return_inverse=True)
    earlier = files[first[same]]
    repeated = np.flatnonzero(earlier != files)
    if not len(repeated):
        return None
    place, file = int(repeated[0]), int(files[repeated[0]])
    return len(repeated), place - sum(map(len, hashes[:file])), int(earlier[place]), file
