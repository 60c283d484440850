"""One shard on disk: open it, check it against the format and against the file's real size, say where its bytes are.

No HDF5 handle survives ``open_shard``: what it returns is plain data, so it may be forked and pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import FORMAT, FORMAT_VERSION, ON_DISK, SequenceIndex, ShardHeader, offsets
from kr2cache.errors import CacheError

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


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A checked shard. Shapes: n sequences, R rows, D width."""

    path: Path
    header: ShardHeader
    ids: NDArray[np.bytes_]
    """(n,)"""
    n_tokens: NDArray[np.int32]
    """(n,)"""
    text_xxh3: NDArray[np.uint64]
    """(n,)"""
    first_row: NDArray[np.int64]
    """(n+1,)"""
    complete: NDArray[np.bool_]
    """(n,) as it was when the shard was opened."""
    hidden_offset: int | None
    """Byte offset of row 0 where the chunks form one plain array; None where only HDF5 can find them."""
    scale_offset: int | None
    """Byte offset of ``hidden_scale``, for int8 on regular chunks."""
    xxh3_offset: int | None
    complete_offset: int | None

    @property
    def rows(self) -> int:
        return int(self.first_row[-1])

    def tokens(self) -> SequenceIndex:
        """The whole index, token ids and word alignment included (read anew: training does not need it)."""
        with open_hdf5(self.path) as file:
            return SequenceIndex(
                ids=self.ids,
                n_tokens=self.n_tokens,
                text_xxh3=self.text_xxh3,
                input_id=file["tokens/input_id"][...],
                word_index=file["tokens/word_index"][...],
            )


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, for reading. What HDF5 objects to becomes a ``CacheError`` that names the file.

    HDF5's own file locks are left out: after its creation no writer goes through HDF5, and they fail on some networks.
    """
    try:
        with _open(path) as file:
            yield file
    except CacheError:
        raise
    # What h5py and we stumble over in a damaged file; MemoryError is an absurd size that the file claims.
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        reason = str(error).strip("'\"") or type(error).__name__
        raise CacheError(
            f"{path} cannot be read as a kr2cache shard: {reason}.",
            "If it was cut off or damaged, remove its folder and run kr2cache extract again.",
        ) from error


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # This process has it open already, with locks; HDF5 wants both opened alike.
        if "file locking" not in str(error):
            raise
        return h5py.File(path, "r")


def open_shard(path: Path) -> Shard:
    """Open, check and describe one shard.

    Raises:
        CacheError: If the file is not a shard of a known version, or its sizes, types or offsets contradict each other
            or the file's real size.
    """
    with open_hdf5(path) as file:
        size = path.stat().st_size
        header = _header(file, path)
        for name, dtype in INDEX_DATASETS.items():
            _check_dataset(file, name, dtype, 1, path, size)
        hidden = _check_dataset(file, "hidden", ON_DISK[header.dtype], 2, path, size)
        index = {name.rpartition("/")[2]: file[name][...] for name in INDEX_DATASETS if name.startswith("examples/")}
        b"".join(index["id"].tolist()).decode("utf-8")  # once, so that no later use of an id can fail
        ids, n_tokens, first_row = index["id"], index["n_tokens"], index["first_row"]
        n = len(ids)
        lengths = {name: len(array) - (name == "first_row") for name, array in index.items()}
        if n == 0 or set(lengths.values()) != {n}:
            raise CacheError(f"{path}: the index is empty or its lengths differ ({lengths}).", _REMAKE)
        expected = offsets(n_tokens) * len(header.layers)
        tokens = len(file["tokens/input_id"])
        if (
            (n_tokens < 1).any()
            or not np.array_equal(first_row, expected)
            or hidden.shape[0] != expected[-1]
            or tokens != n_tokens.sum(dtype=np.int64)
            or len(file["tokens/word_index"]) != tokens
        ):
            raise CacheError(f"{path}: rows and token counts of the index do not fit together.", _REMAKE)
        scale = _check_dataset(file, "hidden_scale", np.dtype("<f4"), 1, path, size) if header.dtype == "int8" else None
        if scale is not None and len(scale) != hidden.shape[0]:
            raise CacheError(f"{path}: {len(scale)} scales for {hidden.shape[0]} rows.", _REMAKE)
        hidden_offset = plain_array_offset(hidden, size)
        scale_offset = scale.id.get_offset() if scale is not None else None
        return Shard(
            path=path,
            header=header,
            ids=ids,
            n_tokens=n_tokens,
            text_xxh3=index["text_xxh3"],
            first_row=first_row,
            complete=index["complete"] == 1,
            # int8 is mapped only where both of its arrays can be.
            hidden_offset=None if scale is not None and scale_offset is None else hidden_offset,
            scale_offset=scale_offset,
            xxh3_offset=file["examples/xxh3"].id.get_offset(),
            complete_offset=file["examples/complete"].id.get_offset(),
        )


_REMAKE = "The file is damaged or not from kr2cache; remove its folder and run kr2cache extract again."


def _header(file: h5py.File, path: Path) -> ShardHeader:
    attributes: dict[str, Any] = dict(file.attrs)
    if attributes.get("format") != FORMAT:
        raise CacheError(f"{path} is an HDF5 file, but not a kr2cache shard.", "Give the folder of a cache.")
    version = int(attributes["format_version"])
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{path} has format version {version}; this kr2cache reads version {FORMAT_VERSION}.",
            "Install the kr2cache that wrote it, or extract again.",
        )
    layers = tuple(int(layer) for layer in attributes["layers"])
    if "fusion" in attributes and len(layers) != 1:
        raise CacheError(f"{path}: a fused cache stores one layer, this one says {len(layers)}.", _REMAKE)
    header = ShardHeader(
        dtype=str(attributes["dtype"]),
        layers=layers,
        model_layers=int(attributes["model_layers"]),
        width=int(file["hidden"].shape[1]),
        fingerprint=str(attributes["fingerprint"]),
        provenance=_json_object(attributes["provenance"]),
        batch_plan=_json_object(attributes["batch_plan"]),
        fusion=_json_object(attributes["fusion"]) if "fusion" in attributes else None,
    )
    if not layers or min(layers) < 0 or max(layers) >= header.model_layers or header.width < 1:
        raise CacheError(
            f"{path}: layers {layers} of a model with {header.model_layers} make no sense.",
            _REMAKE,
        )
    return header


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return value


def _check_dataset(
    file: h5py.File, name: str, dtype: np.dtype[Any] | None, rank: int, path: Path, size: int
) -> h5py.Dataset:
    """The data set, if it lies in this file, has the type and rank of the format, and fits into the file."""
    group, _, leaf = name.rpartition("/")
    inside = not group or isinstance(file.get(group, getlink=True), h5py.HardLink)
    parent = file[group] if group and inside else file
    if not inside or not isinstance(parent, h5py.Group):
        raise CacheError(f"{path}: /{group} is missing or lies outside the file.", _REMAKE)
    link = parent.get(leaf, getlink=True)
    dataset = parent.get(leaf) if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset):
        raise CacheError(f"{path}: /{name} is missing or lies outside the file.", _REMAKE)
    fits = dataset.dtype == dtype if dtype is not None else dataset.dtype.kind == "S"
    if not fits or len(dataset.shape) != rank or dataset.is_virtual or dataset.external:
        raise CacheError(f"{path}: /{name} has type {dataset.dtype} and shape {dataset.shape}.", _REMAKE)
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        if dataset.size and (offset is None or offset + dataset.nbytes > size):
            raise CacheError(f"{path}: /{name} reaches past the end of the file ({size:,} bytes).", _REMAKE)
    return dataset


def plain_array_offset(dataset: h5py.Dataset, size: int) -> int | None:
    """Where row 0 lies if the chunks form one plain array inside the file of ``size`` bytes, else None.

    A file that another tool rewrote (compressed, re-chunked, moved) is then read through HDF5 instead.
    """
    chunks = dataset.chunks
    if chunks is None or chunks[1] != dataset.shape[1] or dataset.id.get_create_plist().get_nfilters():
        return None
    chunk_bytes = chunks[0] * chunks[1] * dataset.dtype.itemsize
    count = -(-dataset.shape[0] // chunks[0])
    found: list[tuple[int, int, int, int]] = []
    dataset.id.chunk_iter(
        lambda info: found.append((info.chunk_offset[0], info.byte_offset, info.size, info.filter_mask))
    )
    if len(found) != count:
        return None
    found.sort()
    start = found[0][1]
    for number, (row, byte_offset, stored, filter_mask) in enumerate(found):
        regular = row == number * chunks[0] and byte_offset == start + number * chunk_bytes
        if not regular or stored != chunk_bytes or filter_mask:
            return None
    if start < 0 or start + dataset.shape[0] * dataset.shape[1] * dataset.dtype.itemsize > size:
        raise CacheError(
            f"{dataset.file.filename} is cut off: {size:,} bytes, but its states end at byte "
            f"{start + count * chunk_bytes:,}.",
            "Remove its folder and run kr2cache extract again.",
        )
    return int(start)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a cache folder in order, all of them.

    Raises:
        CacheError: If the folder holds none, some are missing, or shards of different cuts are mixed.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
        raise CacheError(f"{folder} is not a folder.", "kr2cache extract makes caches; by default below .kr2cache.")
    paths = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".h5"))
    if not paths:
        raise CacheError(f"{folder} holds no shard (shard-00000-of-....h5).", "kr2cache extract makes caches.")
    total = paths[0].stem.rpartition("-")[2]
    names = {path.name for path in paths}
    # The count is compared first: a hostile name could ask for a set of any size.
    counted = total.isascii() and total.isdigit() and len(paths) == int(total)
    if not counted or names != {f"shard-{number:05d}-of-{total}.h5" for number in range(len(paths))}:
        raise CacheError(
            f"{folder} should hold {total} shards, but holds {len(paths)}: {', '.join(sorted(names)[:4])} ...",
            "Run the kr2cache extract that made it again: it goes on where it stopped.",
        )
    return paths
