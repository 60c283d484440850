"""Copy states from one cache into another: for a slice, a stored fusion, or a new cache that needs the same states.

Each sequence is compared with its checksum before it is copied, so damage does not spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import ShardHeader
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.writer import PackedStates, ShardWriter
from kr2cache.errors import InterruptedWorkError
from kr2cache.fusion import Fusion
from kr2cache.store.sharing import SharedShards
from kr2cache.system.console import WorkProgress, bytes_text
from kr2cache.system.interrupt import cause, interrupt_between_batches

Stored = tuple[NDArray[Any], NDArray[np.float32] | None]
"""Values (rows, D) as on disk, and the scales (rows,) if rows have scales."""


def states_as_stored(header: ShardHeader, fusion: Fusion | None, sources: list[tuple[FeatureCache, int]]) -> Stored:
    """One sequence as a cache with ``header`` stores it.

    Args:
        header: The header of the cache that is written.
        fusion: How layers are averaged before they are stored. None: they are stored as they are.
        sources: Caches that hold the sequence, and its position in each. Each layer comes from the first cache that
            holds this layer.

    Raises:
        CacheError: If the sequence is damaged in one of the caches.
    """
    for cache, position in sources:
        cache.check(position)
    cache, position = sources[0]
    if fusion is not None:
        return header.stored.encode(fusion.apply(cache.states(position, fusion.layers)))
    if header.dtype != cache.dtype:
        layers = None if cache.fusion is not None else header.layers
        return header.stored.encode(cache.states(position, layers).reshape(-1, header.width))
    if cache.layers == header.layers:
        return cache.stored(position)
    return joined(one_layer(*next((c, p) for c, p in sources if layer in c.layers), layer) for layer in header.layers)


def one_layer(cache: FeatureCache, position: int, layer: int) -> Stored:
    """One layer of a sequence, as the cache stores it."""
    raw, scale = cache.stored(position)
    T, number = int(cache.n_tokens[position]), cache.layers.index(layer)
    rows = slice(number * T, (number + 1) * T)
    return raw[rows], None if scale is None else scale[rows]


def joined(parts: Iterable[Stored]) -> Stored:
    """Layers of one sequence, one behind the other."""
    raw, scales = zip(*parts, strict=True)
    return np.concatenate(raw), None if scales[0] is None else np.concatenate(scales)


def copy_states(
    writer: ShardWriter, sequences: Iterable[tuple[int, Stored]], progress: WorkProgress, check: Callable[[], None]
) -> int:
    """Write sequences into the shard of ``writer``.

    Args:
        writer: The writer of the shard.
        sequences: For each sequence its position in the cache of the shard, and its states as stored.
        progress: It advances by one after every sequence.
        check: Called after every sequence; it may raise an error.

    Returns:
        How many sequences were written.
    """
    written = 0
    for i, (raw, scale) in sequences:
        writer.write(PackedStates([i], raw, scale))
        check()
        written += 1
        progress.advance(1, f"{bytes_text(writer.bytes_written)} written")
    return written


def fill_from(shards: SharedShards, stored: Callable[[int], Stored], origin: str) -> int:
    """Fill the shards of a cache with states from other caches.

    Args:
        shards: The shards of the cache; their files exist.
        stored: Gives the states of a sequence, by its position in the cache.
        origin: Where the states come from, as text for the progress bar.

    Returns:
        How many sequences this process wrote.

    Raises:
        InterruptedWorkError: On Ctrl-C; complete sequences are kept.
    """
    written, folder = 0, shards.folder
    with WorkProgress(f"{folder.name} {origin}", "sequences") as progress:
        try:
            with interrupt_between_batches() as check_interrupt:
                for held in shards.unfinished(check_interrupt, progress):
                    with held, held.writer() as writer:
                        progress.advance(writer.kept)
                        missing = (held.part.start + np.flatnonzero(writer.unfinished)).tolist()
                        written += copy_states(writer, ((i, stored(i)) for i in missing), progress, held.check)
        except KeyboardInterrupt:
            raise InterruptedWorkError(
                f"{cause()}. Complete sequences are kept in {folder}.",
                "Run the same command again to continue.",
            ) from None
    return written
