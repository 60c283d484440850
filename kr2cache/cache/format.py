"""The cache format, version 1.

A cache is a folder of shards ``shard-00000-of-00001.h5``. Each shard is one HDF5 file that needs no other file. Shape
letters: n sequences, t tokens of all sequences, L stored layers, R = L * t rows, D width, C rows of a chunk::

    /hidden               (R, D)   float16 | float32 | int8 | uint16 (bfloat16 bits)     chunks (C, D), no filter
    /hidden_scale         (R,)     float32           only for int8: state = value * scale of its row
    /examples/id          (n,)     fixed-length UTF-8 sequence ids, unique within the cache
    /examples/first_row   (n+1,)   int64             rows of sequence i = first_row[i] .. first_row[i+1]
    /examples/n_tokens    (n,)     int32             T of sequence i, special tokens included
    /examples/text_xxh3   (n,)     uint64            XXH3-64 of the input text: words or segments, joined by U+001F
    /examples/tokens_xxh3 (n,)     uint64            only in a pooled cache: XXH3-64 of the ids and the word numbers of
                                                     all tokens of the sequence
    /examples/xxh3        (n,)     uint64            XXH3-64 of the sequence's stored bytes, then of its scales if any
    /examples/complete    (n,)     uint8             1 if the sequence's bytes are on disk, else 0
    /tokens/input_id      (t,)     int32             the resource's token ids, all sequences in order
    /tokens/word_index    (t,)     int32             the input word of each token, -1 for special tokens
    attributes            format "kr2cache", format_version 1, dtype, layers (stored layer numbers, 0 = embeddings),
                          model_layers (the model's number of layers with the embeddings), fingerprint,
                          provenance (JSON), batch_plan (JSON), index_xxh3,
                          fusion (absent, or JSON {"layers", "weights"}: then one fused layer is stored)

    states of sequence i  =  hidden[first_row[i] : first_row[i+1]].reshape(L, T_i, D)

``hidden`` has chunks of fixed dimensions in the file format of HDF5 1.10. Its space is allocated early, never filled
with a default value and never filtered. HDF5 then keeps no chunk index and stores the chunks in order in one block, so
that the block can be memory-mapped as a plain array. With chunks of about 8 MiB there are few chunks to check.
Sequences are stored in data-set order, without padding, layer by layer. So all layers, the last four, or one layer of a
sequence are each one contiguous range of the file.

A pooled cache stores the mean of several tokens as one state: one for each word, or one for each sequence. T is then
the number of stored positions, and input_id and word_index are those of the first token of each position.

``index_xxh3`` is the XXH3-64 of the bytes of id, first_row, n_tokens, text_xxh3, input_id and word_index, in this
order. The field ``header_xxh3`` of the provenance, which may be absent, is the checksum of the other attributes
(``ShardHeader.xxh3``). No times are stored, so equal content gives equal bytes. A reader refuses a ``format_version``
that it does not know. After HDF5's last byte, the file has a copy of the attributes and a checksum of all bytes that
are fixed at creation (``header_copy``). ``repair`` uses them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES, StoredDtype
from kr2cache.errors import CacheError, ConfigError

FORMAT = "kr2cache"
FORMAT_VERSION = 1
"""The version of new files."""
READ_VERSIONS = (1,)
"""The versions that can be read."""
CHUNK_BYTES = 8 * 2**20
"""The largest size of a chunk of ``hidden``, unless one row is larger."""
SPECIAL = -1
"""``word_index`` of a special token."""
SEPARATOR = "\x1f"
"""The character between the words or segments of a text when it is hashed."""

HEADER_XXH3 = "header_xxh3"
"""The provenance's field with the checksum of the attributes."""


def chunk_rows(rows: int, width: int, dtype: str) -> int:
    """C, the number of rows in a chunk: the fewest chunks of at most 8 MiB that hold ``rows``, all about equally full.

    HDF5 stores whole chunks, so a last chunk that is nearly empty would waste disk space.
    """
    most = max(1, CHUNK_BYTES // (width * DTYPES[dtype].on_disk.itemsize))
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


def shard_name(number: int, shards: int) -> str:
    """``shard-00000-of-00001.h5``"""
    return f"shard-{number:05d}-of-{shards:05d}.h5"


def text_xxh3(parts: Sequence[str]) -> int:
    """XXH3-64 of one input text: its words or segments in UTF-8, joined by U+001F."""
    return xxhash.xxh3_64_intdigest(SEPARATOR.join(parts).encode("utf-8"))


def states_xxh3(raw: NDArray[Any], scale: NDArray[Any] | None) -> int:
    """XXH3-64 of one sequence's stored bytes, then of its scales if any."""
    digest = xxhash.xxh3_64(raw.data)
    if scale is not None:
        digest.update(scale.data)
    return digest.intdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class SequenceIndex:
    """The data of all sequences that are known before the first forward pass.

    Shape letters: n sequences, t tokens of all sequences.
    """

    ids: NDArray[np.bytes_]
    """(n,) UTF-8, fixed length."""
    n_tokens: NDArray[np.int32]
    """(n,) T of each sequence, special tokens included."""
    text_xxh3: NDArray[np.uint64]
    """(n,) XXH3-64 of each input text."""
    input_id: NDArray[np.int32]
    """(t,) the resource's token ids."""
    word_index: NDArray[np.int32]
    """(t,) input word of each token, -1 for special tokens."""
    segment_id: NDArray[np.int8] | None = None
    """(t,) the segment of each token in a text pair, if the model takes segment ids. It is never stored, because the
    template and the tokenizer determine it."""
    tokens_xxh3: NDArray[np.uint64] | None = None
    """(n,) XXH3-64 of all tokens of each sequence, if the cache is pooled: then the arrays above have one value for
    each stored position, not for each token (``pooling.py``)."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def first_token(self) -> NDArray[np.int64]:
        """(n+1,) the first token of each sequence, then t."""
        return offsets(self.n_tokens)

    def part(self, start: int, stop: int) -> SequenceIndex:
        """The index of sequences ``start`` to ``stop`` (exclusive)."""
        first, last = self.first_token[start], self.first_token[stop]
        return SequenceIndex(
            ids=self.ids[start:stop],
            n_tokens=self.n_tokens[start:stop],
            text_xxh3=self.text_xxh3[start:stop],
            input_id=self.input_id[first:last],
            word_index=self.word_index[first:last],
            segment_id=None if self.segment_id is None else self.segment_id[first:last],
            tokens_xxh3=None if self.tokens_xxh3 is None else self.tokens_xxh3[start:stop],
        )

    def select(self, positions: NDArray[np.int64]) -> SequenceIndex:
        """The index of the sequences at ``positions``, in this order."""
        lengths = self.n_tokens[positions]
        tokens = range_indices(self.first_token[positions], lengths)
        return SequenceIndex(
            ids=self.ids[positions],
            n_tokens=lengths,
            text_xxh3=self.text_xxh3[positions],
            input_id=self.input_id[tokens],
            word_index=self.word_index[tokens],
            segment_id=None if self.segment_id is None else self.segment_id[tokens],
            tokens_xxh3=None if self.tokens_xxh3 is None else self.tokens_xxh3[positions],
        )

    def xxh3(self, layers: int) -> int:
        """``index_xxh3`` of a shard that stores ``layers`` layers of these sequences."""
        digest = xxhash.xxh3_64()
        for array in (self.ids, self.first_row(layers), *self._rest()):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.intdigest()

    def first_row(self, layers: int) -> NDArray[np.int64]:
        """(n+1,) the first row of each sequence in ``hidden``, then R."""
        return offsets(self.n_tokens) * layers

    def _rest(self) -> tuple[NDArray[Any], ...]:
        return (self.n_tokens, self.text_xxh3, self.input_id, self.word_index)


class GrowingIndex:
    """A ``SequenceIndex`` that grows part by part, in little more memory than the result takes."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.bytes_]] = []
        self._n_tokens = _GrowingArray(np.int32)
        self._text_xxh3 = _GrowingArray(np.uint64)
        self._input_id = _GrowingArray(np.int32)
        self._word_index = _GrowingArray(np.int32)
        self._segment_id = _GrowingArray(np.int8)

    def add(self, part: SequenceIndex) -> None:
        """Append sequences. Tokens without segment ids count as segment 0."""
        self._ids.append(part.ids)
        self._n_tokens.add(part.n_tokens)
        self._text_xxh3.add(part.text_xxh3)
        if part.segment_id is not None:
            self._segment_id.fill_to(self._input_id.size)
            self._segment_id.add(part.segment_id)
        self._input_id.add(part.input_id)
        self._word_index.add(part.word_index)

    def finish(self) -> SequenceIndex:
        """The whole index. Nothing can be added afterwards."""
        if self._segment_id.size:
            self._segment_id.fill_to(self._input_id.size)
        width = max((part.dtype.itemsize for part in self._ids), default=1)
        return SequenceIndex(
            ids=np.concatenate([np.empty(0, dtype=f"S{width}"), *self._ids]),
            n_tokens=self._n_tokens.finish(),
            text_xxh3=self._text_xxh3.finish(),
            input_id=self._input_id.finish(),
            word_index=self._word_index.finish(),
            segment_id=self._segment_id.finish() if self._segment_id.size else None,
        )


class _GrowingArray:
    """A NumPy array with room for more. The system moves its pages when it grows; it does not copy them."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._values = np.empty(0, dtype=dtype)
        self.size = 0

    def _room(self, size: int) -> None:
        if size > len(self._values):
            self._values.resize(max(size, len(self._values) + len(self._values) // 8, 1024), refcheck=False)

    def add(self, more: NDArray[Any]) -> None:
        self._room(self.size + len(more))
        self._values[self.size : self.size + len(more)] = more
        self.size += len(more)

    def fill_to(self, size: int) -> None:
        """Append zeros up to ``size``."""
        self._room(size)
        self._values[self.size : size] = 0
        self.size = size

    def finish(self) -> NDArray[Any]:
        self._values.resize(self.size, refcheck=False)
        return self._values


def offsets(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The sums ``[0, l0, l0+l1, ...]`` of ``lengths``, shape (len(lengths) + 1,)."""
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """The arrays, concatenated. A single array is not copied, because copying millions of values takes time."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def range_indices(starts: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """All integers of several ranges, one range after the other; shape (sum of lengths,).

    Args:
        starts: The first integer of each range.
        lengths: The number of integers in each range.
    """
    before = offsets(lengths)
    return np.arange(int(before[-1])) + np.repeat(starts - before[:-1], lengths)


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """The numbers as ascending ranges ``[[start, stop], ...]``, ``stop`` exclusive. Batch plans store this form."""
    result: list[list[int]] = []
    for number in sorted(set(numbers)):
        if result and result[-1][1] == number:
            result[-1][1] = number + 1
        else:
            result.append([number, number + 1])
    return result


def encode_ids(ids: Sequence[str]) -> NDArray[np.bytes_]:
    """Ids as a fixed-length UTF-8 array.

    Raises:
        CacheError: For an empty id, or an id with a NUL character, which fixed-length strings cannot store.
    """
    try:
        encoded = [name.encode("utf-8") for name in ids]
    except UnicodeEncodeError as error:
        raise CacheError(f"{error.object!r} cannot be the id of a sequence: it is not valid Unicode.") from error
    for name, raw in zip(ids, encoded, strict=True):
        if not raw or b"\0" in raw:
            raise CacheError(f"{name!r} cannot be the id of a sequence: it is empty or contains a NUL character.")
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1)}")


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """The checked attributes of one shard except ``index_xxh3``, and the width."""

    dtype: str
    layers: tuple[int, ...]
    model_layers: int
    width: int
    fingerprint: str
    provenance: dict[str, Any]
    batch_plan: dict[str, Any]
    fusion: dict[str, Any] | None = None
    format_version: int = field(default=FORMAT_VERSION)
    """The version of the file. Its checksums include the version, so a reader must keep the file's own value."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"Unknown dtype {self.dtype!r}.", f"Known: {', '.join(DTYPES)}.")
        if self.fusion is not None and len(self.layers) != 1:
            raise CacheError(f"A fused cache stores one layer, but this header names {len(self.layers)}.")
        for name in ("provenance", "batch_plan"):  # tuples become lists, so that a new header equals the stored one
            object.__setattr__(self, name, json.loads(canonical_json(getattr(self, name))))

    @property
    def stored(self) -> StoredDtype:
        """How states of ``dtype`` are stored."""
        return DTYPES[self.dtype]

    @property
    def hidden_row_bytes(self) -> int:
        """Bytes of one row of ``hidden``: the values without the scale."""
        return self.width * self.stored.on_disk.itemsize

    def attributes(self) -> dict[str, Any]:
        """The attributes as stored, except ``index_xxh3``, which needs the index."""
        stored: dict[str, Any] = {
            "format": FORMAT,
            "format_version": np.int64(self.format_version),
            "dtype": self.dtype,
            "layers": np.array(self.layers, dtype=np.int64),
            "model_layers": np.int64(self.model_layers),
            "fingerprint": self.fingerprint,
            "provenance": canonical_json({**self.provenance, HEADER_XXH3: f"{self.xxh3():016x}"}),
            "batch_plan": canonical_json(self.batch_plan),
        }
        if self.fusion is not None:
            stored["fusion"] = canonical_json(self.fusion)
        return stored

    def xxh3(self) -> int:
        """XXH3-64 of all attributes except ``index_xxh3``. HDF5 stores strings without a checksum of its own."""
        return xxhash.xxh3_64_intdigest(canonical_json(dataclasses.asdict(self)).encode())


TAIL_MARK = b"kr2cache"
"""The last bytes of each shard."""
TAIL_BYTES = 24 + len(TAIL_MARK)
"""Bytes of the tail after the copy of the attributes."""


def header_copy(header: ShardHeader) -> bytes:
    """The bytes after HDF5's last byte, which HDF5 ignores. If the attributes are damaged, ``repair`` starts from them.

    They are the attributes as JSON, the JSON's length and XXH3-64, the XXH3-64 of all bytes that are fixed at creation
    (0 here, ``create.py`` fills it in), and ``kr2cache``. Each number has 8 bytes, little-endian.
    """
    text = canonical_json(dataclasses.asdict(header)).encode()
    return text + struct.pack("<3Q", len(text), xxhash.xxh3_64_intdigest(text), 0) + TAIL_MARK


def read_tail(path: Path) -> tuple[ShardHeader, int] | None:
    """Read the copy of the attributes and the XXH3-64 of the fixed bytes from the end of a file; None if they are
    missing or damaged.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
        if len(tail) < TAIL_BYTES or not tail.endswith(TAIL_MARK):
            return None
        length, digest, fixed = struct.unpack_from("<3Q", tail)
        if length > size - TAIL_BYTES:
            return None
        file.seek(size - TAIL_BYTES - length)
        text = file.read(length)
    if xxhash.xxh3_64_intdigest(text) != digest:
        return None
    try:
        stored = json.loads(text)
        return ShardHeader(**{**stored, "layers": tuple(stored["layers"])}), fixed
    except (ValueError, TypeError, LookupError, RecursionError, ConfigError, CacheError):
        return None
