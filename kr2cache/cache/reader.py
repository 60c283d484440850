"""Read a cache: the states of each sequence are a view of a memory-mapped file.

>>> cache = FeatureCache.open(".kr2cache/udpos-de/train/gottbert-1f3a9c2e")     # doctest: +SKIP
>>> cache["train-s1"].shape                                                     # doctest: +SKIP
(13, 21, 768)

Several folders with parts of one corpus can be opened as one cache. Positions count through all folders.

Shape letters: L layers, T tokens of one sequence, D width. A cache holds no HDF5 handle, so it can be forked. It can
also be pickled to a spawned worker, which maps the files again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.batch import PackedBatch, output_rows
from kr2cache.cache.facts import CacheFacts, Layers
from kr2cache.cache.format import SequenceIndex, joined, states_xxh3
from kr2cache.cache.ids import IdIndex
from kr2cache.cache.means import sequence_mean, word_means
from kr2cache.cache.parts import Parts, id_twice, open_parts
from kr2cache.cache.rows import StoredRows
from kr2cache.cache.views import StateDataset, as_dataset
from kr2cache.errors import CacheError, SequenceNotFoundError
from kr2cache.system.memory import aligned_empty


class FeatureCache(CacheFacts):
    """The stored states of one resource on one split, or on several parts of a corpus, by sequence id.

    Only complete sequences are shown. A cache can be read while it is being written; it shows the sequences that were
    complete when it was opened.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        shards = parts.shards
        self._stored = self._header.stored
        self._rows = StoredRows(shards, parts.maps)
        self._every_layer = parts.every_place
        self._index = IdIndex([shard.ids for shard in shards])
        self._is_unique = False
        self.complete: NDArray[np.bool_] = joined([shard.complete for shard in shards])
        """(n,) whether the sequence's states are stored, by position."""
        self._is_complete = bool(self.complete.all())
        self.check_on_read = False
        """Compare each sequence with its checksum at the first read; each worker process compares again."""
        self._checked = np.zeros(len(self.complete), dtype=bool)

    @classmethod
    def open(cls, folder: str | Path | Sequence[str | Path]) -> FeatureCache:
        """Open a cache folder: check every shard's header, sizes and offsets, then map it.

        To compare each sequence with its checksum as well, set ``check_on_read``.

        Args:
            folder: One folder, or several with parts of one corpus, which are then read as one cache, in this order.
                Model, layers, dtype and settings are the same in all. Ids are unique over all.

        Raises:
            CacheError: If a shard is missing, damaged or cut off, or belongs to another version or another cache; or if
                a folder does not fit the first one.
            ConfigError: If no folder is given, or one is given twice.
        """
        return cls(open_parts(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.folders, self.fingerprint, self.check_on_read))

    @property
    def mapped(self) -> bool:
        """Whether every shard is memory-mapped. Other shards are read with HDF5: slower, with the same results."""
        return self._rows.mapped

    @property
    def stored_bytes(self) -> int:
        """Bytes of the states, with their scales."""
        return self._rows.stored_bytes

    @property
    def states_dtype(self) -> np.dtype[Any]:
        """NumPy's type of the states that reading returns: float16 if stored as float16, else float32."""
        return self._stored.read_as

    # Sequences ----------------------------------------------------------------------------------------------------

    @cached_property
    def n_tokens(self) -> NDArray[np.int32]:
        """(n,) T of each sequence, by position."""
        return joined([shard.n_tokens for shard in self._parts.shards])

    @cached_property
    def text_xxh3(self) -> NDArray[np.uint64]:
        """(n,) XXH3-64 of each input text, by position."""
        return joined([shard.text_xxh3 for shard in self._parts.shards])

    @cached_property
    def all_ids(self) -> list[str]:
        """Ids by position, incomplete sequences included; the strings are made at the first use."""
        return self._index.names()

    @property
    def ids(self) -> list[str]:
        """Ids of the complete sequences, in data-set order; the strings are made at the first use."""
        if self._is_complete:
            return self.all_ids
        return [name for name, done in zip(self.all_ids, self.complete.tolist(), strict=True) if done]

    def __len__(self) -> int:
        return int(self.complete.sum())

    def __contains__(self, sequence_id: object) -> bool:
        position = int(self.find([sequence_id])[0]) if isinstance(sequence_id, str) else -1
        return position >= 0 and bool(self.complete[position])

    def find(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """The positions of these sequences, complete or not; -1 for an id that is not in the cache.

        Raises:
            CacheError: If an id occurs twice in the cache.
        """
        self._check_unique()
        return np.array(self._index.find(ids), dtype=np.int64)

    def _check_unique(self) -> None:
        if self._is_unique:
            return
        if (twice := self._index.duplicate()) is not None:
            raise id_twice(self._index.name(twice[0]), *map(self._folder_of, twice))
        self._is_unique = True

    def _folder_of(self, position: int) -> Path:
        return self._parts.shards[self._rows.span(position, 0, 0)[0]].path.parent

    def id_at(self, position: int) -> str:
        """The id of the sequence at ``position``."""
        return self._index.name(position)

    def positions(self, ids: Iterable[str]) -> NDArray[np.int64]:
        """The positions of these sequences, which must be complete.

        Raises:
            SequenceNotFoundError: For the first id that is not in the cache, or whose sequence is not complete.
        """
        return np.array(self._positions(ids), dtype=np.int64)

    def _positions(self, ids: Iterable[str]) -> list[int]:
        self._check_unique()
        names = ids if isinstance(ids, Sequence) else list(ids)
        found = self._index.find(names)
        if -1 not in found and (self._is_complete or self.complete[found].all()):
            return found
        name, position = next((n, p) for n, p in zip(names, found, strict=True) if p < 0 or not self.complete[p])
        if position < 0:
            raise SequenceNotFoundError(
                f"No sequence {name!r} in {self._parts.name}.", f"It holds {self._index.name(0)!r} and so on."
            )
        raise SequenceNotFoundError(
            f"The states of {name!r} in {self._folder_of(position)} are not written yet.",
            "Run the same kr2cache extract command again: it continues where it stopped.",
        )

    def tokens(self) -> SequenceIndex:
        """Token ids and word alignment of all sequences, by position. Each call reads them from the files. In a pooled
        cache, they are those of the first token of each stored state."""
        parts = [shard.tokens() for shard in self._parts.shards]
        pooled = [part.tokens_xxh3 for part in parts if part.tokens_xxh3 is not None]
        return SequenceIndex(
            ids=joined(self._index.parts),
            n_tokens=self.n_tokens,
            text_xxh3=self.text_xxh3,
            input_id=joined([part.input_id for part in parts]),
            word_index=joined([part.word_index for part in parts]),
            tokens_xxh3=joined(pooled) if len(pooled) == len(parts) else None,
        )

    # States -------------------------------------------------------------------------------------------------------

    def __getitem__(self, sequence_id: str) -> NDArray[np.floating]:
        """All stored layers of one sequence, shape (L, T, D).

        The result is a read-only view of the file if the file is mapped and stores float16 or float32. Otherwise it
        is a float32 copy.

        Raises:
            SequenceNotFoundError: If the sequence is not in the cache or not complete.
        """
        self._check_unique()
        position = self._index.find_one(sequence_id) if isinstance(sequence_id, str) else -1
        if position < 0 or not self.complete.item(position):
            self._positions([sequence_id])  # raises the error that explains it
        if not self._rows.prefetched.item(position):
            self._rows.prefetch([position], self._every_layer)
        return self.states(position)

    def states(self, position: int, layers: Sequence[int] | None = None) -> NDArray[np.floating]:
        """The states of the sequence at ``position``, which must be complete. Calling ``read_ahead`` first is faster.

        Args:
            position: A value that ``positions`` returned.
            layers: Model layer numbers to return, in this order; None for all stored ones.

        Returns:
            Shape (L, T, D), L = len(layers). A view if the layers are next to each other in the file, else a copy.

        Raises:
            ConfigError: For a layer that is not stored.
            CacheError: With ``check_on_read``, if the stored bytes do not match their checksum.
        """
        self._check_once(position)
        return self._states(position, self._parts.places(layers))

    def _states(self, position: int, stored: list[int]) -> NDArray[np.floating]:
        lowest, highest = min(stored), max(stored)
        number, start, stop = self._rows.span(position, lowest, highest)
        raw, scale = self._rows.read(number, start, stop)
        raw = raw.reshape(highest - lowest + 1, self.n_tokens.item(position), -1)
        scale = None if scale is None else scale.reshape(raw.shape[:2])
        if len(stored) != len(raw) or stored != self._every_layer[lowest : highest + 1]:
            # Select first: decoding would load the layers between from the disk.
            wanted = [place - lowest for place in stored]
            raw, scale = raw[wanted], None if scale is None else scale[wanted]
        states = self._stored.decode(raw, scale)
        return states if self._rows.is_mapped(number) else states.astype(np.float32, copy=False)

    def read_ahead(self, positions: NDArray[np.int64], layers: Sequence[int] | None = None) -> None:
        """Ask the system to load these states now. It then reads them at once, not page by page when they are used.

        If the system has no such call, or the file is not mapped, nothing happens. ``StoredRows.prefetch`` says how
        often a cache asks for the same states.

        Args:
            positions: (B,) values that ``positions`` returned.
            layers: As for ``states``. If ``check_on_read`` must still check one of the sequences, all layers are
                loaded.

        Raises:
            ConfigError: For a layer that is not stored.
        """
        self._prefetch(positions.tolist(), self._parts.places(layers))

    def _prefetch(self, positions: list[int], stored: list[int]) -> None:
        if self.check_on_read and not all(map(self._checked.item, positions)):
            stored = self._every_layer  # a checksum covers all layers
        self._rows.prefetch(positions, stored)

    def stored(self, position: int) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """All layers of a sequence as stored: values, shape (L * T, D), and scales, shape (L * T,), or None."""
        return self._rows.read(*self._rows.span(position, 0, len(self._every_layer) - 1))

    def check(self, position: int) -> None:
        """Compare the bytes of a complete sequence with their checksum.

        Raises:
            CacheError: If they do not match; the error names the sequence.
        """
        raw, scale = self.stored(position)
        if states_xxh3(raw, scale) != int(self._xxh3[position]):
            folder = self._folder_of(position)
            raise CacheError(
                f"The states of {self._index.name(position)!r} in {folder} do not match their checksum: they were "
                "damaged after they were written.",
                f"kr2cache cache repair {folder}",
            )

    def _check_once(self, position: int) -> None:
        if self.check_on_read and not self._checked[position]:
            self.check(position)
            self._checked[position] = True

    @cached_property
    def _xxh3(self) -> NDArray[np.uint64]:
        return np.concatenate([shard.read("examples/xxh3") for shard in self._parts.shards])

    def buffer(self, sequences: int, layers: Sequence[int] | None = None) -> NDArray[np.floating]:
        """Uninitialised memory for ``batch(..., out=...)``, large enough for any batch of ``sequences`` sequences.

        Args:
            sequences: The largest number of sequences in a batch.
            layers: As for ``batch``.

        Returns:
            Shape (rows, D), with the alignment of the file. Only rows that batches fill take up memory.
        """
        rows = sequences * int(self.n_tokens.max()) * len(self._parts.places(layers))
        return aligned_empty((rows, self.width), self.states_dtype)

    def batch(
        self, ids: Iterable[str], layers: Sequence[int] | None = None, *, out: NDArray[np.floating] | None = None
    ) -> PackedBatch:
        """Read several sequences, in the order of ``ids``, without padding.

        Args:
            ids: An id may occur several times.
            layers: Model layer numbers to read, in this order; None for all stored ones.
            out: Memory to read into, for example from ``buffer``. Its first rows become the batch's states, so do not
                reuse it while the batch is needed. New memory, the default, takes up to twice as long: the system
                clears it page by page.

        Raises:
            SequenceNotFoundError: For an id that is not in the cache, or whose sequence is not complete.
            ConfigError: For a layer that is not stored, or if ``out`` is too small or not the right kind of array.
            CacheError: With ``check_on_read``, if the stored bytes do not match their checksum.
        """
        return self.batch_at(self._positions(ids), layers, out=out)

    def batch_at(
        self, positions: list[int], layers: Sequence[int] | None = None, *, out: NDArray[np.floating] | None = None
    ) -> PackedBatch:
        """``batch`` of the sequences at these positions, which must be complete."""
        stored = self._parts.places(layers)
        n_tokens = list(map(self.n_tokens.item, positions))
        rows = sum(n_tokens) * len(stored)
        if out is None:
            out = aligned_empty((rows, self.width), self.states_dtype)
        states = output_rows(out, rows, self.width, self.states_dtype)
        wanted = self.layers if layers is None else tuple(layers)
        packed = PackedBatch(states, np.array(n_tokens, dtype=np.int32), wanted)
        self._prefetch(positions, stored)
        if self.check_on_read:
            for position in positions:
                self._check_once(position)
        if self.mapped and self._stored.is_exact and stored == [*range(stored[0], stored[-1] + 1)]:
            self._rows.copy(positions, stored[0], stored[-1], states)  # one contiguous range per sequence
            return packed
        for i, position in enumerate(positions):
            packed[i][...] = self._states(position, stored)
        return packed

    # Pooled -------------------------------------------------------------------------------------------------------

    def word_index(self, position: int) -> NDArray[np.int32]:
        """(T,) the input word of each token of the sequence at ``position``; -1 for a special token."""
        return self._rows.word_index(position)

    def mean(self, sequence_id: str, layers: Layers = None) -> NDArray[np.float32]:
        """The mean over all tokens of a sequence but the special ones.

        Returns:
            Shape (L, D), float32.

        Raises:
            DataError: If it has special tokens alone.
            SequenceNotFoundError, ConfigError: As for ``batch``.
        """
        (position,) = self._positions([sequence_id])
        states = self.states(position, self.layer_numbers(layers))
        return sequence_mean(states, self.word_index(position), sequence_id)

    def words(self, sequence_id: str, layers: Layers = None) -> NDArray[np.float32]:
        """The mean over the tokens of each word.

        Returns:
            Shape (L, W, D), float32: row w is word w of the text, the first one 0. A word without a token (such as a
            zero-width space) is nan. Words after the last one that has a token, such as those cut off, are not there.
            Words are those of the data if it has words (``extract --task words``, tagging), else those that the model's
            tokenizer splits first. The words of the second segment of a pair follow those of the first one.

        Raises:
            SequenceNotFoundError, ConfigError: As for ``batch``.
        """
        self.check_has_words()
        (position,) = self._positions([sequence_id])
        states = self.states(position, self.layer_numbers(layers))
        return word_means(states, self.word_index(position), pooled=self.pool == "word")

    def dataset(
        self, ids: Iterable[str] | None = None, *, layers: Layers = None, pool: str | None = None
    ) -> StateDataset:
        """The sequences as a map-style data set for ``torch.utils.data.DataLoader``; arguments and errors as there."""
        return StateDataset(self, ids, layers, pool)

    def to_dataset(self, ids: Iterable[str] | None = None, *, layers: Layers = None, pool: str | None = None) -> Any:
        """The sequences as a ``datasets.Dataset`` in memory (``views.as_dataset``); arguments as for ``dataset``."""
        return as_dataset(StateDataset(self, ids, layers, pool))

    def __repr__(self) -> str:
        return (
            f"FeatureCache({self._parts.name!r}: {len(self):,} of {len(self.complete):,} sequences, layers "
            f"{', '.join(map(str, self.layers))}, width {self.width}, {self.dtype})"
        )


def _reopen(folders: tuple[Path, ...], fingerprint: str, check_on_read: bool) -> FeatureCache:
    cache = FeatureCache.open(folders)
    cache.check_on_read = check_on_read
    if cache.fingerprint != fingerprint:
        replaced = "was replaced by another cache" if len(folders) == 1 else "are not the same caches any more"
        raise CacheError(f"{cache._parts.name} {replaced} since it was opened.", "Start the run again.")
    return cache
