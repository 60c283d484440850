"""Find states in older caches. A new cache copies them, and the model does not run for them again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES, FLOAT32
from kr2cache.cache.format import SequenceIndex, ShardHeader
from kr2cache.cache.pooling import Pooling, pooled
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.writer import ShardWriter
from kr2cache.errors import CacheError
from kr2cache.store import provenance
from kr2cache.store.copying import Stored, copy_states, joined, one_layer, states_as_stored
from kr2cache.store.inventory import open_caches
from kr2cache.store.sharing import SharedShards
from kr2cache.system.console import WorkProgress


@dataclass(frozen=True)
class Donors:
    """Older caches with states that a new cache needs: same weights, same tokens, same dtypes."""

    caches: list[FeatureCache]
    positions: list[NDArray[np.int64]]
    """For each older cache, (n,): where it holds each of the n sequences of the new cache; -1 if it does not."""
    poolings: list[Pooling | None]
    """For each older cache, how its states are pooled now; None if they are copied as they are."""
    covered: NDArray[np.bool_]
    """(n,) whether the donors together hold all layers of a sequence."""

    def states(self, header: ShardHeader, sequences: Iterable[int]) -> Iterator[tuple[int, Stored]]:
        """The states of these sequences as the new cache stores them. A sequence that is not covered, or that is
        damaged in a donor, is left out: the model runs for it.

        Args:
            header: The header of the new cache.
            sequences: Positions in the new cache.
        """
        for i in sequences:
            if not self.covered[i]:
                continue
            places = [int(positions[i]) for positions in self.positions]
            holders = [number for number, place in enumerate(places) if place >= 0]
            with contextlib.suppress(CacheError):
                if any(self.poolings[number] is not None for number in holders):
                    yield i, self._means(header, holders, places)
                else:
                    yield i, states_as_stored(header, None, [(self.caches[n], places[n]) for n in holders])

    def _means(self, header: ShardHeader, holders: Sequence[int], places: Sequence[int]) -> Stored:
        """One sequence as a pooled cache stores it. Some of its holders have the state of each token.

        Args:
            header: The header of the new cache.
            holders: The numbers of the older caches that hold the sequence.
            places: For each older cache, where it holds the sequence.

        Raises:
            CacheError: If the sequence is damaged in one of them.
        """
        for number in holders:
            self.caches[number].check(places[number])

        def stored(layer: int) -> Stored:
            number = next(number for number in holders if layer in self.caches[number].layers)
            cache, place, pooling = self.caches[number], places[number], self.poolings[number]
            if pooling is None:
                return one_layer(cache, place, layer)
            return header.stored.encode(pooling.mean(place, cache.states(place, [layer]))[0])

        return joined(map(stored, header.layers))


Usable = Callable[[FeatureCache, NDArray[np.int64]], bool]
"""Whether states may be copied from an older cache. It gets the cache, and (n,) where it holds each sequence of the new
cache; -1 if it does not."""


class OlderCaches:
    """Copies from older caches the sequences that are not in the batch plan of a new cache."""

    def __init__(
        self,
        cache_dir: Path,
        shards: SharedShards,
        wanted: NDArray[np.bool_],
        donors: Donors | None,
        usable: Usable,
    ) -> None:
        """
        Args:
            cache_dir: The folder of all caches.
            shards: The shards of the new cache.
            wanted: (n,) True for the sequences that are not in the batch plan.
            donors: The older caches; None if they were not searched for yet.
            usable: As for ``find_donors``.
        """
        self._cache_dir = cache_dir
        self._shards = shards
        self._wanted = wanted
        self._donors = donors
        self._usable = usable

    def copy_into(self, writer: ShardWriter, progress: WorkProgress, check: Callable[[], None]) -> int:
        """Copy the wanted sequences that the shard of ``writer`` lacks. The arguments are those of ``copy_states``.

        Returns:
            How many sequences were copied.
        """
        shards = self._shards
        missing = writer.first + np.flatnonzero(writer.unfinished)
        missing = missing[self._wanted[missing]]
        if not len(missing):
            return 0
        self._donors = self._donors or find_donors(
            self._cache_dir, shards.folder, shards.header, shards.index, self._usable
        )
        return copy_states(writer, self._donors.states(shards.header, missing.tolist()), progress, check)


def find_donors(cache_dir: Path, folder: Path, header: ShardHeader, index: SequenceIndex, usable: Usable) -> Donors:
    """The caches of the same task and split that hold states of the sequences in ``index``.

    The states of a sequence depend on weights, configuration, token ids, segments (which follow from text and template)
    and dtypes. If these are equal, so are the states. The sequence's id, the maximal length and the rest of the corpus
    do not matter. A pooled cache also takes the means of states that are stored as float32 for each token: these are
    the states that the model gives.

    Args:
        cache_dir: The folder of all caches.
        folder: The folder of the new cache. It is not searched.
        header: The header of the new cache.
        index: The sequences of the new cache.
        usable: Called once for each cache that holds some of them.
    """
    segments = bool(header.provenance["found"]["segments"])
    layers = np.array(header.layers)
    covered = np.zeros((len(index), len(layers)), dtype=bool)
    caches: list[FeatureCache] = []
    positions: list[NDArray[np.int64]] = []
    poolings: list[Pooling | None] = []
    pool = provenance.pool_of(header.provenance)
    keys: list[bytes] | None = None
    for cache in _candidates(cache_dir, folder, header):
        holds = np.isin(layers, cache.layers)
        if not holds.any() or covered[:, holds].all():
            continue
        keys = keys or _keys(index, segments)
        there, pooling = cache.tokens(), None
        if pool != provenance.pool_of(cache.provenance):
            pooling = pooled(there, pool)
            there = pooling.stored
        stored = {key: position for position, key in enumerate(_keys(there, segments)) if cache.complete[position]}
        found = np.array([stored.get(key, -1) for key in keys], dtype=np.int64)
        if not (found >= 0).any() or not usable(cache, found):
            continue
        covered[np.ix_(found >= 0, holds)] = True
        caches.append(cache)
        positions.append(found)
        poolings.append(pooling)
    return Donors(caches, positions, poolings, np.asarray(covered.all(axis=1)))


def _candidates(cache_dir: Path, folder: Path, header: ShardHeader) -> list[FeatureCache]:
    """Other caches of the same task and split that the same model computed in the same way. Those with most layers come
    first.
    """
    chosen, found = header.provenance["chosen"], header.provenance["found"]
    pool = provenance.pool_of(header.provenance)

    def is_usable(cache: FeatureCache) -> bool:
        if cache.folder.resolve() == folder.resolve() or cache.fusion is not None or provenance.rounded_again(cache):
            return False
        chosen_there, found_there = cache.provenance["chosen"], cache.provenance["found"]
        return (
            all(found[name] == found_there.get(name) for name in ("weights", "config", "template", "segments"))
            and chosen["compute_dtype"] == chosen_there["compute_dtype"]
            and _gives(provenance.pool_of(cache.provenance), cache.dtype, pool, header.dtype)
            and provenance.weights_dtype_of(header.provenance) == provenance.weights_dtype_of(cache.provenance)
            and (cache.width, cache.model_layers) == (header.width, header.model_layers)
        )

    caches, _ = open_caches(cache_dir, chosen["task"], chosen["split"])
    return sorted(filter(is_usable, caches), key=lambda cache: -len(cache.layers))


def _gives(pool_there: str, dtype_there: str, pool: str, dtype: str) -> bool:
    """Whether states that are stored in one way are also what the other way stores."""
    if pool_there == pool:
        return dtype_there == dtype
    return pool_there == "none" and DTYPES[dtype_there].on_disk == FLOAT32


def _keys(index: SequenceIndex, segments: bool) -> list[bytes]:
    """For each sequence, a digest of its input to the model."""
    if index.tokens_xxh3 is not None:  # the text makes the digest long enough
        both = np.stack([index.tokens_xxh3, index.text_xxh3], axis=1)
        return [pair.tobytes() for pair in both]
    first = index.first_token.tolist()
    tokens = np.ascontiguousarray(index.input_id)
    texts = index.text_xxh3.tolist()
    keys = []
    for i, (start, stop) in enumerate(itertools.pairwise(first)):
        key = xxhash.xxh3_128_digest(tokens[start:stop].data)
        keys.append(key + texts[i].to_bytes(8, "little") if segments else key)
    return keys


def as_mask(ranges: Sequence[Sequence[int]] | None, count: int) -> NDArray[np.bool_]:
    """(count,) True inside the ranges: the reverse of ``ranges``. None means that the batch plan has no ranges, because
    it covers everything; then all is True.
    """
    if ranges is None:
        return np.ones(count, dtype=bool)
    mask = np.zeros(count, dtype=bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask
