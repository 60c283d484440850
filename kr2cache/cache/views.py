"""The sequences of a cache as a data set: for torch's ``DataLoader``, and as a ``datasets.Dataset``.

Shape letters: L layers, T tokens and W words of one sequence, D width.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.facts import Layers
from kr2cache.cache.format import offsets
from kr2cache.cache.means import sequence_mean, word_means
from kr2cache.errors import unknown_name

if TYPE_CHECKING:
    from kr2cache.cache.reader import FeatureCache

PIECE = 2**26
"""About so many values become one piece of an Arrow table, whose lists count with 32 bits."""

POOLS: dict[str, Callable[[NDArray[np.floating], NDArray[np.int32], str], NDArray[np.floating]]] = {
    "sequence": sequence_mean,
    "word": lambda states, word_index, _: word_means(states, word_index),
    "first": lambda states, *_: states[:, 0].astype(np.float32),
    "last": lambda states, *_: states[:, -1].astype(np.float32),
}
"""From states (L, T, D), the word of each token and the id to what is left of a sequence: (L, D), or (L, W, D)."""


def _pooled_words(states: NDArray[np.floating], word_index: NDArray[np.int32], _: str) -> NDArray[np.float32]:
    """``POOLS["word"]`` of a cache that has one state for each word."""
    return word_means(states, word_index, pooled=True)


class StateDataset:
    """A map-style data set for ``torch.utils.data.DataLoader``: item i is the array of sequence i.

    It holds no open file: workers may be forked or spawned. It needs no torch.
    """

    def __init__(self, cache: FeatureCache, ids: Iterable[str] | None, layers: Layers, pool: str | None) -> None:
        """
        Args:
            cache: Where the states are.
            ids: The sequences, in this order; None for all complete ones, in the order of the cache.
            layers: Which layers.
            pool: A name in ``POOLS``; None for the states of all tokens.

        Raises:
            UnknownNameError: If there is no such pooling.
            ConfigError: For a layer that is not stored, or the words of a cache that has one state for each sequence.
            SequenceNotFoundError: For an id that is not in the cache, or whose sequence is not complete.
        """
        if pool is not None and pool not in POOLS:
            raise unknown_name("pooling", pool, POOLS)
        if pool == "word":
            cache.check_has_words()
        self.cache = cache
        self.layers = cache.layer_numbers(layers)
        self.pool = pool
        self.positions: NDArray[np.int64] = np.flatnonzero(cache.complete) if ids is None else cache.positions(ids)

    @property
    def ids(self) -> list[str]:
        """The ids of its sequences."""
        return [self.cache.id_at(position) for position in self.positions.tolist()]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> NDArray[np.floating]:
        """One sequence: shape (L, D), or (L, W, D) for ``word``, in float32; without pooling (L, T, D) as stored."""
        return self.__getitems__([range(len(self))[operator.index(number)]])[0]

    def __getitems__(self, numbers: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.floating]]:
        """Several sequences, read together. ``DataLoader`` calls it with the numbers of a batch."""
        positions = self.positions[np.asarray(numbers, dtype=np.int64)]
        cache = self.cache
        if self.pool is None:
            batch = cache.batch_at(positions.tolist(), self.layers)
            return [batch[i] for i in range(len(batch))]
        pool = _pooled_words if self.pool == cache.pool == "word" else POOLS[self.pool]
        cache.read_ahead(positions, self.layers)
        return [
            pool(cache.states(position, self.layers), cache.word_index(position), cache.id_at(position))
            for position in positions.tolist()
        ]


def as_dataset(states: StateDataset) -> Any:
    """A ``datasets.Dataset`` in memory, one row for each sequence.

    Returns:
        Columns ``id`` and ``states``: float32 of shape (L, D), or (W, L, D) for ``word`` and (T, L, D) without pooling,
        because datasets lets only the first dimension differ between rows. Without pooling also ``word_index``, shape
        (T,): the word of each token, -1 for a special token.
    """
    import datasets
    import pyarrow as pa

    cache = states.cache
    shape = (len(cache.layers if states.layers is None else states.layers), cache.width)
    per_token = states.pool in (None, "word")
    features = {"id": datasets.Value("string")}
    if states.pool is None:
        features["word_index"] = datasets.List(datasets.Value("int32"))
    features["states"] = (
        datasets.Array3D((None, *shape), "float32") if per_token else datasets.Array2D(shape, "float32")
    )
    schema = datasets.Features(features).arrow_schema
    parts = []
    sizes = np.cumsum(cache.n_tokens[states.positions], dtype=np.int64) * shape[0] * shape[1]
    for numbers in np.split(np.arange(len(states)), np.flatnonzero(np.diff(sizes // PIECE)) + 1):
        items = states.__getitems__(numbers)
        positions = states.positions[numbers].tolist()
        columns: dict[str, Any] = {"id": [cache.id_at(position) for position in positions]}
        if states.pool is None:
            columns["word_index"] = [cache.word_index(position) for position in positions]
        rows = [one.swapaxes(0, 1) if per_token else one[np.newaxis] for one in items]  # (T, L, D); (1, L, D)
        flat = [np.empty(0, np.float32), *(one.reshape(-1) for one in rows)]
        values = pa.array(np.concatenate(flat, dtype=np.float32, casting="same_kind"))
        lengths = [len(one) for one in rows] if per_token else None
        storage = _nested(values, shape, lengths)
        columns["states"] = pa.ExtensionArray.from_storage(schema.field("states").type, storage)
        parts.append(pa.table(columns, schema=schema))
    decides = repr((cache.fingerprint, states.layers, states.pool)).encode() + states.positions.tobytes()
    # Without a fingerprint, datasets would make one from all values, which takes longer than the rest.
    return datasets.Dataset(pa.concat_tables(parts), fingerprint=hashlib.sha256(decides).hexdigest()[:16])


def _nested(values: Any, shape: tuple[int, int], lengths: Sequence[int] | None) -> Any:
    """Arrow's lists of lists: (L, D) in each row; or with ``lengths``, the number of (L, D) in each row."""
    import pyarrow as pa

    count = len(values)
    inner = pa.ListArray.from_arrays(pa.array(np.arange(0, count + 1, shape[1], dtype=np.int32)), values)
    middle = pa.ListArray.from_arrays(pa.array(np.arange(0, len(inner) + 1, shape[0], dtype=np.int32)), inner)
    if lengths is None:
        return middle
    return pa.ListArray.from_arrays(pa.array(offsets(np.array(lengths)).astype(np.int32)), middle)
