"""Read shards that another tool rewrote (compressed, re-chunked) with the HDF5 library: slower, with the same results.

A damaged file can make HDF5 crash or loop for ever. So a separate process opens such a file first. This process opens
it only if the other process succeeded.
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
"""The longest time for HDF5 to examine one file. It normally takes less than a second."""
DEFLATE_RATIO = 1_100
"""A filter expands one byte to at most so many bytes. A data set that claims a larger size is damaged."""

EXAMINE_CODE = "import sys; from kr2cache.cache.hdf5 import main; sys.exit(main(sys.argv[1]))"


@contextlib.contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Turn errors of h5py, NumPy and this package about a damaged file into a ``CacheError`` that names the file."""
    try:
        yield
    except CacheError:
        raise
    # MemoryError: a damaged file claims an absurd size.
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
    """Open a file for reading, without HDF5's file locks.

    The locks fail on some network file systems. They are not needed: HDF5 never writes to a finished file.
    """
    with cache_errors(path), _open(path) as file:
        yield file


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        # This process has the file open with locks. HDF5 then requires locks here too.
        if "file locking" not in str(error):
            raise
        return h5py.File(path, "r")


def check_in_process(path: Path) -> None:
    """Let HDF5 read the attributes, index and chunk addresses of a file in a separate process.

    Raises:
        CacheError: If that process finds an error, crashes, or does not end in time.
    """
    # -P and this process's search path: Python imports nothing from the current folder.
    command = [sys.executable, "-P", "-c", EXAMINE_CODE, str(path.absolute())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(place).absolute()) for place in sys.path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired as error:
        raise CacheError(f"{path} is damaged: HDF5 does not finish reading it.", REMEDY) from error
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be examined: {error}.", REMEDY) from error
    if done.returncode == 0:
        return
    said = done.stdout.strip()
    raise CacheError(said or f"{path} is damaged: HDF5 crashes when it reads it (exit code {done.returncode}).", REMEDY)


def examine(path: Path) -> Layout:
    """Find the data sets and attributes of a shard with HDF5.

    Raises:
        CacheError: If HDF5 cannot read the file, or a data set is outside the file or claims an impossible size.
    """
    size = path.stat().st_size
    with open_hdf5(path) as file:
        datasets = {}
        for group, names in DATASETS.items():
            # Soft and external links are not followed: a data set behind such a link counts as missing.
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
        raise CacheError(f"{path}: {dataset.name} is stored in other files.", REMEDY)
    offset = dataset.id.get_offset() if dataset.chunks is None else plain_array_offset(dataset)
    found = StoredDataset(dtype=dataset.dtype, shape=dataset.shape or (), offset=offset)
    claimed = found.nbytes if dataset.shape else 0
    room = size * DEFLATE_RATIO if offset is None else size - offset
    if claimed > room:
        raise CacheError(f"{path}: {dataset.name} reaches past the end of the file ({size:,} bytes).", REMEDY)
    return found


def plain_array_offset(dataset: h5py.Dataset) -> int | None:
    """The offset of row 0 if the chunks form one plain array in the file, else None."""
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
    """Read rows ``start`` to ``stop`` (exclusive) of one data set with HDF5."""
    with open_hdf5(path) as file:
        rows: NDArray[Any] = np.asarray(file[name][start:stop])
    return rows


def main(argument: str) -> int:
    """Read everything that opening the shard will read. The exit code is 0 if HDF5 read it without an error."""
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
