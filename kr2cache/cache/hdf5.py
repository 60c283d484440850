"""A shard that another tool rewrote (compressed, re-chunked, moved), read through HDF5: slower, with the same results.

A damaged file can make HDF5 crash or loop for ever. So a separate process opens such a file first; only if that process
succeeds is the file opened here.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.layout import DATASETS, REMEDY, Layout, StoredDataset
from kr2cache.errors import CacheError

TIMEOUT_S = 30
"""HDF5 may take to look at one file; a second is much."""
DEFLATE_RATIO = 1_100
"""No filter makes more bytes than this of one: what claims to be larger was never written."""


EXAMINE_CODE = "import sys; from kr2cache.cache.hdf5 import main; sys.exit(main(sys.argv[1]))"


@contextlib.contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """What h5py, NumPy and we stumble over in a damaged file becomes a ``CacheError`` that names the file."""
    try:
        yield
    except CacheError:
        raise
    # MemoryError is an absurd size that the file claims.
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
        raise CacheError(f"{path} cannot be read as a kr2cache shard: {reason}.", REMEDY) from error


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, for reading.

    HDF5's own file locks are left out: after its creation no writer goes through HDF5, and they fail on some networks.
    """
    with cache_errors(path), _open(path) as file:
        yield file


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # This process has it open already, with locks; HDF5 wants both opened alike.
        if "file locking" not in str(error):
            raise
        return h5py.File(path, "r")


def check_in_process(path: Path) -> None:
    """Let HDF5 read attributes, index and chunk addresses of a file in a process of its own.

    Raises:
        CacheError: If that process objects, crashes, or does not come back.
    """
    # -P and our own search path: nothing is imported from the folder that we happen to be in.
    command = [sys.executable, "-P", "-c", EXAMINE_CODE, str(path.absolute())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(place).absolute()) for place in sys.path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        raise CacheError(f"{path} is damaged: HDF5 does not come to an end with it.", REMEDY) from error
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be examined: {error}.", REMEDY) from error
    if done.returncode == 0:
        return
    said = done.stdout.strip()
    raise CacheError(said or f"{path} is damaged: HDF5 crashes with it (exit code {done.returncode}).", REMEDY)


def examine(path: Path) -> Layout:
    """Where everything is in a shard that HDF5 can read.

    Raises:
        CacheError: If HDF5 cannot read it, something lies outside the file, or claims a size that cannot be.
    """
    size = path.stat().st_size
    with open_hdf5(path) as file:
        datasets = {}
        for group, names in DATASETS.items():
            # Soft and external links are not followed: what they name counts as missing.
            parent = _member(file, group) if group else file
            for name in names if isinstance(parent, h5py.Group) else ():
                item = _member(parent, name)
                if isinstance(item, h5py.Dataset):
                    datasets[f"{group}/{name}" if group else name] = _describe(item, path, size)
        return Layout(datasets=datasets, attributes=dict(file.attrs), plain=False)


def _member(parent: h5py.Group, name: str) -> Any:
    if name not in parent or parent.get(name, getclass=True, getlink=True) is not h5py.HardLink:
        return None
    return parent[name]


def _describe(dataset: h5py.Dataset, path: Path, size: int) -> StoredDataset:
    if dataset.is_virtual or dataset.external:
        raise CacheError(f"{path}: {dataset.name} lies in other files.", REMEDY)
    offset = dataset.id.get_offset() if dataset.chunks is None else plain_array_offset(dataset)
    found = StoredDataset(dtype=dataset.dtype, shape=dataset.shape or (), offset=offset)
    claimed = found.nbytes if dataset.shape else 0
    room = size * DEFLATE_RATIO if offset is None else size - offset
    if claimed > room:
        raise CacheError(f"{path}: {dataset.name} reaches past the end of the file ({size:,} bytes).", REMEDY)
    return found


def plain_array_offset(dataset: h5py.Dataset) -> int | None:
    """Where row 0 lies if the chunks form one plain array, else None: they are read through HDF5 instead."""
    chunks = dataset.chunks
    if len(chunks) != 2 or chunks[1] != dataset.shape[1] or dataset.id.get_create_plist().get_nfilters():
        return None
    chunk_bytes = chunks[0] * chunks[1] * dataset.dtype.itemsize
    count = -(-dataset.shape[0] // chunks[0])
    found: list[tuple[int, int, int, int]] = []
    dataset.id.chunk_iter(
        lambda info: found.append((info.chunk_offset[0], info.byte_offset, info.size, info.filter_mask))
    )
    if len(found) != count or not found:
        return None
    found.sort()
    start = found[0][1]
    for number, (row, byte_offset, stored, filter_mask) in enumerate(found):
        regular = row == number * chunks[0] and byte_offset == start + number * chunk_bytes
        if not regular or stored != chunk_bytes or filter_mask:
            return None
    return int(start) if start >= 0 else None


def read_rows(path: Path, name: str, start: int, stop: int) -> NDArray[Any]:
    """Rows of one data set."""
    with open_hdf5(path) as file:
        rows: NDArray[Any] = np.asarray(file[name][start:stop])
    return rows


def main(argument: str) -> int:
    """Look at everything that opening will look at; 0 if HDF5 came through with it."""
    path = Path(argument)
    try:
        layout = examine(path)
        for name, dataset in layout.datasets.items():
            if dataset.offset is None and name not in ("hidden", "hidden_scale"):
                with open_hdf5(path) as file:
                    file[name][...]
    except CacheError as error:
        sys.stdout.write(error.message)
        return 1
    return 0
