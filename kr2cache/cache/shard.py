"""Open one shard: check it against the format and the file's real size, and find where its data sets are.

``open_shard`` keeps no HDF5 handle. A ``Shard`` is plain data, so it can be forked and pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES, SCALE_BYTES
from kr2cache.cache.format import (
    FORMAT,
    HEADER_XXH3,
    READ_VERSIONS,
    TAIL_MARK,
    SequenceIndex,
    ShardHeader,
    offsets,
    read_tail,
    states_xxh3,
)
from kr2cache.cache.hdf5 import cache_errors, check_in_process, examine, read_rows
from kr2cache.cache.layout import REMEDY, Layout, NotPlainError, read_layout
from kr2cache.errors import CacheError, CacheVersionError

INDEX_DATASETS = {
    "examples/id": None,
    "examples/first_row": np.dtype("<i8"),
    "examples/n_tokens": np.dtype("<i4"),
    "examples/text_xxh3": np.dtype("<u8"),
    "examples/xxh3": np.dtype("<u8"),
    "examples/complete": np.dtype("|u1"),
    "tokens/input_id": np.dtype("<i4"),
    "tokens/word_index": np.dtype("<i4"),
}
"""The data sets of the index with their types; ids are strings of any fixed length."""
OF_POOLED = "examples/tokens_xxh3"
"""The data set of the index that only pooled caches have."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A checked shard. Shapes: n sequences, R rows, D width."""

    path: Path
    header: ShardHeader
    layout: Layout
    ids: NDArray[np.bytes_]
    """(n,)"""
    n_tokens: NDArray[np.int32]
    """(n,)"""
    text_xxh3: NDArray[np.uint64]
    """(n,)"""
    first_row: NDArray[np.int64]
    """(n+1,)"""
    complete: NDArray[np.bool_]
    """(n,) whether the sequence was complete when the shard was opened."""

    @property
    def rows(self) -> int:
        return int(self.first_row[-1])

    def offset(self, name: str) -> int | None:
        """Byte offset of a data set that is one plain array in the file; None if only HDF5 can read it."""
        return self.layout.datasets[name].offset

    def array_offset(self, name: str) -> int:
        """Byte offset of a data set that must be one plain array in the file.

        Raises:
            CacheError: If only HDF5 can read it.
        """
        offset = self.offset(name)
        if offset is None:
            raise CacheError(f"{self.path}: /{name} is not stored as one plain array.", REMEDY)
        return offset

    @property
    def mappable(self) -> bool:
        """Whether the states (and the scales, if rows have scales) are plain arrays in the file."""
        states = ["hidden", "hidden_scale"] if self.header.stored.has_scales else ["hidden"]
        return all(self.offset(name) is not None for name in states)

    @property
    def completable(self) -> bool:
        """Whether the writer can complete the file in place: states, checksums and marks are plain arrays in it."""
        return self.mappable and all(self.offset(name) is not None for name in ("examples/xxh3", "examples/complete"))

    def read(self, name: str) -> NDArray[Any]:
        """Read a whole data set from the file."""
        return _read(self.path, self.layout, name)

    def tokens(self) -> SequenceIndex:
        """The whole index. Token ids and word alignment are read from the file at each call; training needs neither."""
        with cache_errors(self.path):
            return SequenceIndex(
                ids=self.ids,
                n_tokens=self.n_tokens,
                text_xxh3=self.text_xxh3,
                input_id=self.read("tokens/input_id"),
                word_index=self.read("tokens/word_index"),
                tokens_xxh3=self.read(OF_POOLED) if OF_POOLED in self.layout.datasets else None,
            )


def open_shard(path: Path) -> Shard:
    """Open and check one shard.

    Raises:
        CacheError: If the file is not a shard of a known version, or its sizes, types or offsets contradict each other
            or the file's real size.
    """
    with cache_errors(path):
        try:
            layout = read_layout(path)
        except NotPlainError:
            check_in_process(path)
            layout = examine(path)
        header = _header(layout, path)
        for name, dtype in INDEX_DATASETS.items():
            _check_dataset(layout, name, dtype, 1, path)
        index = {
            name.rpartition("/")[2]: _read(path, layout, name)
            for name in INDEX_DATASETS
            if name.startswith("examples/") and name != "examples/xxh3"
        }
        _check_text(index["id"])
        ids, n_tokens, first_row = index["id"], index["n_tokens"], index["first_row"]
        n = len(ids)
        lengths = {name: len(array) - (name == "first_row") for name, array in index.items()}
        lengths["xxh3"] = layout.datasets["examples/xxh3"].shape[0]  # read when it is used
        if OF_POOLED in layout.datasets:
            _check_dataset(layout, OF_POOLED, np.dtype("<u8"), 1, path)
            lengths["tokens_xxh3"] = layout.datasets[OF_POOLED].shape[0]
        if n == 0 or set(lengths.values()) != {n}:
            raise CacheError(f"{path}: the index is empty or its arrays have different lengths ({lengths}).", REMEDY)
        expected = offsets(n_tokens) * len(header.layers)
        rows = layout.datasets["hidden"].shape[0]
        tokens = layout.datasets["tokens/input_id"].shape[0]
        if (
            (n_tokens < 1).any()
            or not np.array_equal(first_row, expected)
            or rows != expected[-1]
            or tokens != n_tokens.sum(dtype=np.int64)
            or layout.datasets["tokens/word_index"].shape[0] != tokens
        ):
            raise CacheError(f"{path}: the row and token counts of the index contradict each other.", REMEDY)
        if header.stored.has_scales:
            _check_dataset(layout, "hidden_scale", np.dtype("<f4"), 1, path)
            scales = layout.datasets["hidden_scale"].shape[0]
            if scales != rows:
                raise CacheError(f"{path}: {scales} scales for {rows} rows.", REMEDY)
        return Shard(
            path=path,
            header=header,
            layout=layout,
            ids=ids,
            n_tokens=n_tokens,
            text_xxh3=index["text_xxh3"],
            first_row=first_row,
            complete=index["complete"] == 1,
        )


def _read(path: Path, layout: Layout, name: str) -> NDArray[Any]:
    dataset = layout.datasets[name]
    if dataset.offset is None:
        return read_rows(path, name, 0, dataset.shape[0])
    with path.open("rb") as file:
        file.seek(dataset.offset)
        array = np.fromfile(file, dtype=dataset.dtype, count=dataset.shape[0])
    if len(array) != dataset.shape[0]:
        raise CacheError(f"{path}: /{name} reaches past the end of the file.", REMEDY)
    return array


class IntactStates(NamedTuple):
    """The states of one sequence as a file stores them. They match their checksum."""

    raw: NDArray[Any]
    """(rows, D)"""
    scale: NDArray[np.float32] | None
    """(rows,) if rows have scales, else None."""
    digest: bytes
    """The checksum as stored, 8 bytes."""


def read_intact(descriptor: int, shard: Shard, i: int) -> IntactStates | None:
    """Read a sequence, whether it is marked complete or not.

    Args:
        descriptor: An open file whose data sets have the same offsets as those of ``shard``.
        shard: A shard that the writer can complete.
        i: Position in the shard.

    Returns:
        None if the sequence was never written, or does not match its checksum.
    """
    digest = os.pread(descriptor, 8, shard.array_offset("examples/xxh3") + 8 * i)
    if digest == bytes(8):
        return None
    first, rows = int(shard.first_row[i]), int(shard.first_row[i + 1] - shard.first_row[i])
    size = shard.header.hidden_row_bytes
    values = os.pread(descriptor, rows * size, shard.array_offset("hidden") + first * size)
    if len(values) != rows * size:
        return None
    raw = np.frombuffer(values, dtype=shard.header.stored.on_disk).reshape(rows, shard.header.width)
    scale = None
    if shard.header.stored.has_scales:
        scales = os.pread(descriptor, rows * SCALE_BYTES, shard.array_offset("hidden_scale") + first * SCALE_BYTES)
        if len(scales) != rows * SCALE_BYTES:
            return None
        scale = np.frombuffer(scales, dtype="<f4")
    return IntactStates(raw, scale, digest) if states_xxh3(raw, scale).to_bytes(8, "little") == digest else None


def _check_text(ids: NDArray[np.bytes_]) -> None:
    """Raise ``UnicodeDecodeError`` for an id that is not UTF-8, so that no later use of an id can fail."""
    if ids.view(np.uint8).max(initial=0) >= 0x80:
        for raw in ids.tolist():
            raw.decode("utf-8")


def readable_headers(path: Path) -> list[ShardHeader]:
    """The headers that can be read from a file that may be damaged: its attributes, and their copy at the end of the
    file. A header that does not match its checksum is left out.
    """
    found = []
    with contextlib.suppress(CacheError, NotPlainError, OSError), cache_errors(path):
        layout = read_layout(path, skip_damaged=True)
        found.append(_header_of(layout.attributes, path, layout.datasets["hidden"].shape[1]))
    with contextlib.suppress(OSError):
        tail = read_tail(path)
        if tail is not None:
            found.append(tail[0])
    return found


def _header(layout: Layout, path: Path) -> ShardHeader:
    attributes = layout.attributes
    if not _is(attributes.get("format"), FORMAT):
        raise CacheError(f"{path} is an HDF5 file, but not a kr2cache shard.", "Give the folder of a cache.")
    version = int(attributes["format_version"])
    if version not in READ_VERSIONS:
        raise CacheVersionError(
            f"{path} has format version {version}; this kr2cache reads version "
            f"{' and '.join(map(str, READ_VERSIONS))}.",
            "Install the kr2cache that wrote it, or extract again.",
        )
    dtype = str(attributes["dtype"])
    if dtype not in DTYPES:
        raise CacheError(f"{path}: its dtype {dtype[:40]!r} is unknown.", REMEDY)
    _check_dataset(layout, "hidden", DTYPES[dtype].on_disk, 2, path)
    header = _header_of(attributes, path, layout.datasets["hidden"].shape[1])
    layers = header.layers
    if not layers or min(layers) < 0 or max(layers) >= header.model_layers or header.width < 1:
        raise CacheError(
            f"{path}: layers {layers} are impossible for a model with {header.model_layers} layers.",
            REMEDY,
        )
    return header


def _header_of(attributes: Mapping[str, Any], path: Path, width: int) -> ShardHeader:
    layers = tuple(int(layer) for layer in attributes["layers"])
    if "fusion" in attributes and len(layers) != 1:
        raise CacheError(f"{path}: a fused cache stores one layer, but this cache names {len(layers)}.", REMEDY)
    provenance = _json_object(attributes["provenance"])
    digest = provenance.pop(HEADER_XXH3, None)
    header = ShardHeader(
        dtype=str(attributes["dtype"]),
        layers=layers,
        model_layers=int(attributes["model_layers"]),
        width=width,
        fingerprint=str(attributes["fingerprint"]),
        provenance=provenance,
        batch_plan=_json_object(attributes["batch_plan"]),
        fusion=_json_object(attributes["fusion"]) if "fusion" in attributes else None,
        format_version=int(attributes["format_version"]),
    )
    if digest is not None and digest != f"{header.xxh3():016x}":
        raise CacheError(f"{path} is damaged: its attributes do not match their checksum.", REMEDY)
    return header


def _is(value: object, text: str) -> bool:
    return isinstance(value, str) and value == text


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return value


def _check_dataset(layout: Layout, name: str, dtype: np.dtype[Any] | None, rank: int, path: Path) -> None:
    """Raise ``CacheError`` unless the data set is in this file and has the type and rank of the format."""
    dataset = layout.datasets.get(name)
    if dataset is None:
        raise CacheError(f"{path}: /{name} is missing or stored outside the file.", REMEDY)
    fits = dataset.dtype == dtype if dtype is not None else dataset.dtype.kind == "S"
    if not fits or len(dataset.shape) != rank:
        raise CacheError(f"{path}: /{name} has the wrong type or shape: {dataset.dtype}, {dataset.shape}.", REMEDY)


FILLED_LATER = ("hidden", "hidden_scale", "examples/xxh3", "examples/complete")
"""The data sets that the writer fills after the shard was made."""


def fixed_xxh3(path: Path, layout: Layout) -> int:
    """XXH3-64 of all bytes that are fixed when the file is made. These are all bytes except the data sets
    ``FILLED_LATER`` and the last 16 bytes, which store this checksum and the tail mark.
    """
    filled = sorted(
        (dataset.offset, dataset.offset + dataset.nbytes)
        for name, dataset in layout.datasets.items()
        if name in FILLED_LATER and dataset.offset is not None
    )
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - 8 - len(TAIL_MARK)
        at = 0
        for start, stop in [*filled, (end, end)]:
            file.seek(at)
            while at < start:
                block = file.read(min(2**20, start - at))
                if not block:
                    break
                digest.update(block)
                at += len(block)
            at = max(at, stop)
    return digest.intdigest()


def is_structure_intact(shard: Shard) -> bool:
    """Whether all bytes that are fixed at creation are unchanged. This is unknown for a file that another tool rewrote;
    such a file counts as intact.
    """
    tail = read_tail(shard.path)
    if tail is None:
        ours = shard.layout.plain and HEADER_XXH3 in _json_object(shard.layout.attributes["provenance"])
        return not shard.layout.has_tail and not ours
    header, fixed = tail
    return header == shard.header and fixed == fixed_xxh3(shard.path, shard.layout)


def shard_files(folder: Path) -> list[Path]:
    """The shard files that a folder holds, in order. Some may be missing.

    Raises:
        CacheError: If the folder does not exist or holds no shard.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        raise CacheError(f"{folder} is not a folder.", "kr2cache extract makes caches; by default below .kr2cache.")
    paths = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".h5"))
    if not paths:
        raise CacheError(f"{folder} holds no shard (shard-00000-of-....h5).", "kr2cache extract makes caches.")
    return paths


def shard_paths(folder: Path) -> list[Path]:
    """The complete list of a cache's shard files, in order.

    Raises:
        CacheError: If the folder holds no shard, shards are missing, or their names give different numbers of shards.
    """
    paths = shard_files(folder)
    total = paths[0].stem.rpartition("-")[2]
    names = {path.name for path in paths}
    # Compare the count first: a hostile file name could make the set below as large as it likes.
    counted = total.isascii() and total.isdigit() and len(paths) == int(total)
    if not counted or names != {f"shard-{number:05d}-of-{total}.h5" for number in range(len(paths))}:
        raise CacheError(
            f"{folder} should hold {total} shards, but holds {len(paths)}: {', '.join(sorted(names)[:4])} ...",
            "Run the same kr2cache extract command again: it continues where it stopped.",
        )
    return paths
