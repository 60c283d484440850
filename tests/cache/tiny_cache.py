"""Tiny caches with known content, and that content computed a second way, without the package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.create import create_shard, is_shard_of, shard_parts
from kr2cache.cache.format import SequenceIndex, ShardHeader, encode_ids, text_xxh3
from kr2cache.cache.writer import PackedStates, ShardWriter

DTYPES = ("float16", "float32", "bfloat16", "int8")
STORED = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", "int8": "|i1"}
DATASETS = (
    "examples/complete",
    "examples/first_row",
    "examples/id",
    "examples/n_tokens",
    "examples/text_xxh3",
    "examples/xxh3",
    "hidden",
    "tokens/input_id",
    "tokens/word_index",
)


@dataclass
class Truth:
    """What a cache should hold. Shapes: L layers, T tokens of a sequence, D width."""

    header: ShardHeader
    ids: list[str]
    words: list[list[str]]
    raw: list[NDArray[Any]]
    """Stored values, (L, T, D) each."""
    scale: list[NDArray[np.float32]]
    """(L, T) each; empty unless int8."""
    input_id: list[NDArray[np.int32]]
    word_index: list[NDArray[np.int32]]

    @property
    def n_tokens(self) -> list[int]:
        return [raw.shape[1] for raw in self.raw]

    @property
    def index(self) -> SequenceIndex:
        return SequenceIndex(
            ids=encode_ids(self.ids),
            n_tokens=np.array(self.n_tokens, dtype=np.int32),
            text_xxh3=np.array([text_xxh3(words) for words in self.words], dtype=np.uint64),
            input_id=np.concatenate(self.input_id),
            word_index=np.concatenate(self.word_index),
        )

    def states(self, i: int) -> NDArray[np.floating]:
        """What reading sequence ``i`` has to give, (L, T, D)."""
        raw = self.raw[i]
        if self.header.dtype == "int8":
            return np.multiply(raw, self.scale[i][:, :, np.newaxis], dtype=np.float32)
        if self.header.dtype == "bfloat16":  # the upper half of a float32
            return np.stack([np.zeros_like(raw), raw], axis=-1).view("<f4")[..., 0]
        return raw

    def stored_bytes(self, i: int) -> bytes:
        """What ``examples/xxh3`` is taken of."""
        return self.raw[i].tobytes() + (self.scale[i].tobytes() if self.scale else b"")


def make(
    lengths: Sequence[int] = (3, 1, 5, 2),
    *,
    dtype: str = "float16",
    layers: Sequence[int] = (0, 1, 2),
    model_layers: int = 3,
    width: int = 4,
    ids: Sequence[str] | None = None,
    seed: int = 0,
    fingerprint: str = "0123456789abcdef",
    **header: Any,
) -> Truth:
    """Random content of these lengths."""
    draw = np.random.default_rng(seed)
    shapes = [(len(layers), tokens, width) for tokens in lengths]
    if dtype == "int8":
        raw = [draw.integers(-127, 128, shape).astype("|i1") for shape in shapes]
    else:
        raw = [draw.standard_normal(shape).astype("<f4") for shape in shapes]
        if dtype == "bfloat16":
            raw = [np.ascontiguousarray(array.view("<u2")[..., 1::2]) for array in raw]
        else:
            raw = [array.astype(STORED[dtype]) for array in raw]
    scale = [draw.uniform(0.01, 2, shape[:2]).astype("<f4") for shape in shapes] if dtype == "int8" else []
    return Truth(
        header=ShardHeader(
            dtype=dtype,
            layers=tuple(layers),
            model_layers=model_layers,
            width=width,
            fingerprint=fingerprint,
            provenance={"chosen": {"resource": "gottbert"}, "found": {"texts": "ß日"}},
            batch_plan={"tokens_per_batch": 1024},
            **header,
        ),
        ids=list(ids) if ids is not None else [f"s{i}" for i in range(len(lengths))],
        words=[[f"w{i}"] * tokens for i, tokens in enumerate(lengths)],
        raw=raw,
        scale=scale,
        input_id=[draw.integers(0, 30000, tokens, dtype=np.int32) for tokens in lengths],
        word_index=[np.arange(-1, tokens - 1, dtype=np.int32) for tokens in lengths],
    )


def create_shards(folder: Path, header: ShardHeader, index: SequenceIndex, shard_bytes: int) -> list[Path]:
    """Make the shards that do not exist, and those that are damaged. Returns those that were damaged."""
    damaged = []
    parts = shard_parts(folder, header, index, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        own = index.part(part.start, part.stop)
        if not part.path.exists():
            create_shard(part.path, header, own, folder)
        elif not is_shard_of(part.path, header, own):
            create_shard(part.path, header, own, folder, recover=True)
            damaged.append(part.path)
    return damaged


class FolderWriter:
    """A ``ShardWriter`` for every shard of a folder."""

    def __init__(self, folder: Path) -> None:
        self.shards = []
        first = 0
        for path in shards(folder):
            self.shards.append(ShardWriter(path, first))
            first += len(self.shards[-1].unfinished)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> FolderWriter:
        for shard in self.shards:
            self._open.enter_context(shard)
        return self

    def __exit__(self, *error: Any) -> bool:
        return bool(self._open.__exit__(*error))

    def of(self, i: int) -> ShardWriter:
        """The writer of the shard that holds this sequence."""
        return next(shard for shard in reversed(self.shards) if shard.first <= i)

    def write(self, states: PackedStates) -> None:
        self.of(states.sequences[0]).write(states)

    @property
    def bytes_written(self) -> int:
        return sum(shard.bytes_written for shard in self.shards)


def write(folder: Path, truth: Truth, positions: Iterable[int] | None = None, *, at_once: int = 1) -> None:
    """Write these sequences (None: all), in this order, neighbours in one shard ``at_once`` together."""
    order = list(range(len(truth.ids)) if positions is None else positions)
    with FolderWriter(folder) as writer:
        for batch in batches(truth, writer, order, at_once):
            writer.write(batch)


def batches(truth: Truth, writer: FolderWriter, order: Sequence[int], at_once: int = 1) -> Iterable[PackedStates]:
    """The sequences ``order`` as the writer wants them."""
    rest = list(order)
    while rest:
        shard = writer.of(rest[0])
        taken = 0
        while taken < min(at_once, len(rest)) and writer.of(rest[taken]) is shard:
            taken += 1
        batch, rest = rest[:taken], rest[taken:]
        yield PackedStates(
            sequences=batch,
            raw=np.concatenate([truth.raw[i].reshape(-1, truth.header.width) for i in batch]),
            scale=np.concatenate([truth.scale[i].reshape(-1) for i in batch]) if truth.scale else None,
        )


def store(
    folder: Path,
    truth: Truth,
    *,
    shard_bytes: int = 2**34,
    positions: Iterable[int] | None = None,
    at_once: int = 1,
) -> Path:
    """Create the shards and write the sequences ``positions`` (None: all of them)."""
    create_shards(folder, truth.header, truth.index, shard_bytes)
    write(folder, truth, positions, at_once=at_once)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.h5"))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def byte_offset(path: Path, name: str) -> int:
    """Where a data set begins in its file, from HDF5."""
    with h5py.File(path, "r") as file:
        dataset = file[name]
        return dataset.id.get_chunk_info(0).byte_offset if dataset.chunks else dataset.id.get_offset()


def marked_sequences(folder: Path, truth: Truth) -> list[int]:
    """Positions marked complete, read with plain h5py; asserts that their bytes and checksums are right."""
    marked, position = [], 0
    for path in shards(folder):
        with h5py.File(path, "r") as file:
            first_row, digests = file["examples/first_row"][...], file["examples/xxh3"][...]
            for i, complete in enumerate(file["examples/complete"][...].tolist()):
                if complete:
                    rows = slice(first_row[i], first_row[i + 1])
                    stored = file["hidden"][rows].tobytes()
                    if "hidden_scale" in file:
                        stored += file["hidden_scale"][rows].tobytes()
                    assert stored == truth.stored_bytes(position)
                    assert int(digests[i]) == xxhash.xxh3_64(stored).intdigest()
                    marked.append(position)
                position += 1
    assert position == len(truth.ids)
    return marked
