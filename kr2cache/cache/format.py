"""The cache format, version 1.

A cache is a folder of shards ``shard-00000-of-00001.h5``; each is one HDF5 file that stands alone::

    /hidden               (R, D)   float16 | float32 | int8 | uint16 (bfloat16 bits)     chunks (C, D), no filter
    /hidden_scale         (R,)     float32           only for int8: state = value * scale of its row
    /examples/id          (n,)     fixed-length UTF-8 sequence ids, unique within the cache
    /examples/first_row   (n+1,)   int64             rows of sequence i = first_row[i] .. first_row[i+1]
    /examples/n_tokens    (n,)     int32             T of sequence i, special tokens included
    /examples/text_xxh3   (n,)     uint64            XXH3-64 of the input text: words or segments, joined by U+001F
    /examples/xxh3        (n,)     uint64            XXH3-64 of the sequence's stored bytes, then of its scales if any
    /examples/complete    (n,)     uint8             1 once its bytes are on disk
    /tokens/input_id      (t,)     int32             the resource's token ids, all sequences in order
    /tokens/word_index    (t,)     int32             the input word of each token, -1 for special tokens
    attributes            format "kr2cache", format_version 1, dtype, layers (stored layer numbers), model_layers (L+1),
                          fingerprint, provenance (JSON), batch_plan (JSON), index_xxh3,
                          fusion (absent, or JSON {"layers", "weights"}: then one fused layer is stored)

    states of sequence i  =  hidden[first_row[i] : first_row[i+1]].reshape(L, T_i, D)

``hidden`` is chunked with fixed dimensions, allocated early, never filled and never filtered, in the file format of
HDF5 1.10: HDF5 then keeps no chunk index, the chunks lie in order in one block, and the block can be memory-mapped as a
plain array. With chunks of about 8 MiB, checking this takes few steps. Sequences lie in data-set order, unpadded,
layer by layer, so that all layers, the last four, or one layer of a sequence are each one contiguous range of the file.

``index_xxh3`` is the XXH3-64 of the bytes of id, first_row, n_tokens, text_xxh3, input_id and word_index, in that
order. The provenance's field ``header_xxh3``, which may be absent, is that of the other attributes
(``ShardHeader.xxh3``). No times are stored, so equal content is equal bytes. A reader refuses a ``format_version`` it
does not know. After HDF5's last byte the file has a copy of the attributes and a checksum of all that
is fixed at creation (``header_copy``), for repairing.
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
"""Of the files that are written."""
READ_VERSIONS = (1,)
"""Of the files that are read."""
CHUNK_BYTES = 8 * 2**20
SEPARATOR = "\x1f"
"""Joins the words or segments of a text before it is hashed."""

HEADER_XXH3 = "header_xxh3"


def chunk_rows(rows: int, width: int, dtype: str) -> int:
    """C: rows of a chunk, at least 1. As few chunks of at most 8 MiB as hold ``rows``, all about equally full: HDF5
    stores whole chunks, and of a last one that is nearly empty the disk would be.
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
    """JSON that is the same bytes for the same value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class SequenceIndex:
    """What is known of the sequences before the first forward pass. Shapes: n sequences, t tokens in all."""

    ids: NDArray[np.bytes_]
    """(n,) UTF-8, fixed length."""
    n_tokens: NDArray[np.int32]
    """(n,) T of each sequence, special tokens included."""
    text_xxh3: NDArray[np.uint64]
    """(n,)"""
    input_id: NDArray[np.int32]
    """(t,)"""
    word_index: NDArray[np.int32]
    """(t,) input word of each token, -1 for special tokens."""
    segment_id: NDArray[np.int8] | None = None
    """(t,) the segment that a pair's tokens belong to, where the model takes it; never stored: the template and the
    tokenizer decide it."""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def first_token(self) -> NDArray[np.int64]:
        """(n+1,) where each sequence's tokens begin."""
        return offsets(self.n_tokens)

    def part(self, start: int, stop: int) -> SequenceIndex:
        """Sequences ``start`` to ``stop`` (exclusive), as an index of their own."""
        first, last = self.first_token[start], self.first_token[stop]
        return SequenceIndex(
            ids=self.ids[start:stop],
            n_tokens=self.n_tokens[start:stop],
            text_xxh3=self.text_xxh3[start:stop],
            input_id=self.input_id[first:last],
            word_index=self.word_index[first:last],
            segment_id=None if self.segment_id is None else self.segment_id[first:last],
        )

    def select(self, positions: NDArray[np.int64]) -> SequenceIndex:
        """The sequences at ``positions``, in that order."""
        lengths = self.n_tokens[positions]
        tokens = range_indices(self.first_token[positions], lengths)
        return SequenceIndex(
            ids=self.ids[positions],
            n_tokens=lengths,
            text_xxh3=self.text_xxh3[positions],
            input_id=self.input_id[tokens],
            word_index=self.word_index[tokens],
            segment_id=None if self.segment_id is None else self.segment_id[tokens],
        )

    def xxh3(self, layers: int) -> int:
        """``index_xxh3`` of a shard that stores ``layers`` layers of these sequences."""
        digest = xxhash.xxh3_64()
        for array in (self.ids, self.first_row(layers), *self._rest()):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.intdigest()

    def first_row(self, layers: int) -> NDArray[np.int64]:
        """(n+1,) the sequence's first row in ``hidden``."""
        return offsets(self.n_tokens) * layers

    def _rest(self) -> tuple[NDArray[Any], ...]:
        return (self.n_tokens, self.text_xxh3, self.input_id, self.word_index)


def offsets(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """``[0, l0, l0+l1, ...]``, int64, one longer than ``lengths``."""
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def range_indices(starts: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The numbers of the ranges that begin at ``starts`` and have ``lengths``, one range after the other: (sum of
    ``lengths``,).
    """
    before = offsets(lengths)
    return np.arange(int(before[-1])) + np.repeat(starts - before[:-1], lengths)


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """``[[start, stop], ...]`` of the numbers, in ascending order; neighbours form one range. A batch plan stores this
    form.
    """
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
        CacheError: For an empty id, or one with a NUL, which fixed-length strings cannot keep.
    """
    try:
        encoded = [name.encode("utf-8") for name in ids]
    except UnicodeEncodeError as error:
        raise CacheError(f"{error.object!r} cannot be the id of a sequence: it is no Unicode text.") from error
    for name, raw in zip(ids, encoded, strict=True):
        if not raw or b"\0" in raw:
            raise CacheError(f"{name!r} cannot be the id of a sequence: it is empty or holds a NUL character.")
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1)}")


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """The attributes of one shard, checked."""

    dtype: str
    layers: tuple[int, ...]
    model_layers: int
    width: int
    fingerprint: str
    provenance: dict[str, Any]
    batch_plan: dict[str, Any]
    fusion: dict[str, Any] | None = None
    format_version: int = field(default=FORMAT_VERSION)
    """Of the file; part of its checksums, so what reads a file takes it from there."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"Unknown dtype {self.dtype!r}.", f"Known: {', '.join(DTYPES)}.")
        if self.fusion is not None and len(self.layers) != 1:
            raise CacheError(f"A fused cache stores one layer, this one says {len(self.layers)}.")

    @property
    def stored(self) -> StoredDtype:
        """The record of ``dtype``."""
        return DTYPES[self.dtype]

    @property
    def hidden_row_bytes(self) -> int:
        """Bytes of one row, without its scale."""
        return self.width * self.stored.on_disk.itemsize

    def attributes(self) -> dict[str, Any]:
        """As they are stored; ``index_xxh3`` is added by whoever knows the index."""
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
        """Of all attributes but ``index_xxh3``; HDF5 itself keeps strings where nothing guards them."""
        return xxhash.xxh3_64_intdigest(canonical_json(dataclasses.asdict(self)).encode())


TAIL_MARK = b"kr2cache"
TAIL_BYTES = 24 + len(TAIL_MARK)


def header_copy(header: ShardHeader) -> bytes:
    """What follows HDF5's last byte, which HDF5 ignores: the attributes as JSON, its length, its XXH3-64, 8 bytes for
    the XXH3-64 of everything that is fixed at creation, and ``kr2cache``; numbers of 8 bytes, little-endian. Should
    the attributes be damaged, repairing starts here.
    """
    text = canonical_json(dataclasses.asdict(header)).encode()
    return text + struct.pack("<3Q", len(text), xxhash.xxh3_64_intdigest(text), 0) + TAIL_MARK


def read_tail(path: Path) -> tuple[ShardHeader, int] | None:
    """The copy of the attributes at the end of a file, and the XXH3-64 of what is fixed; None if it is not there or
    damaged itself.
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
