"""Read random batches of a cache that is larger than the memory.

python tests/benchmarks/larger.py --folder /somewhere/with/10/GB     (Linux, as root)

Makes the same states twice: as a cache, and as HDF5 with one data set per sequence. Reads both in a control group whose
memory holds a quarter of the cache. So most states are no longer in memory when they are read again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
from scale import LAYERS, WIDTH, described

from kr2cache.bench.reading import drop_pages
from kr2cache.cache import rows
from kr2cache.cache.create import create_shard
from kr2cache.cache.format import shard_name
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.writer import PackedStates, ShardWriter
from kr2cache.system.memory import total_memory

BATCH = 32
TURN_S, TURNS = 3.0, 5
ROW_BYTES = 2 * WIDTH
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def make(cache: Path, apart: Path, sequences: int) -> None:
    """Write the same random states as a cache and as one data set per sequence."""
    draw = np.random.default_rng(0)
    header, index = described(0, sequences)
    names = names_of(sequences)
    cache.mkdir()
    shard = cache / shard_name(0, 1)
    create_shard(shard, header, index, cache)
    with ShardWriter(shard) as writer, h5py.File(apart, "w") as file:
        for i, (name, length) in enumerate(zip(names, index.n_tokens.tolist(), strict=True)):
            states = draw.standard_normal((LAYERS * length, WIDTH), dtype=np.float32).astype(np.float16)
            writer.write(PackedStates([i], states, None))
            file.create_dataset(name, data=states)


def names_of(sequences: int) -> list[str]:
    return [f"train-{i}" for i in range(sequences)]


@contextlib.contextmanager
def control_group() -> Iterator[Path]:
    """Make a control group (version 1 or 2) and give the file that sets its memory limit."""
    version_1 = (CONTROL_GROUPS / "memory" / "memory.limit_in_bytes").exists()
    folder = (CONTROL_GROUPS / "memory" if version_1 else CONTROL_GROUPS) / f"kr2cache-{os.getpid()}"
    limit_file = folder / ("memory.limit_in_bytes" if version_1 else "memory.max")
    folder.mkdir()
    try:
        if not limit_file.exists():
            sys.exit(f"{limit_file} does not exist: {CONTROL_GROUPS}/cgroup.subtree_control must contain 'memory'.")
        yield limit_file
    finally:
        folder.rmdir()


def read(cache: Path, apart: Path, sequences: int) -> None:
    """Time the ways of reading in turn and print their medians."""
    open_cache, draw, names = FeatureCache.open(cache), np.random.default_rng(1), names_of(sequences)
    file = h5py.File(apart, "r")
    if not open_cache._rows.is_large:
        sys.exit(
            f"{open_cache.stored_bytes:,} bytes do not count as larger than the memory of {total_memory():,} bytes."
        )
    ways: dict[str, Callable[[list[str]], object]] = {
        "kr2cache, FeatureCache.batch": open_cache.batch,
        "the same, without read-ahead": functools.partial(_by_page_faults, open_cache),
        "h5py, a data set per sequence": functools.partial(_apart, file),
    }
    seconds_per_byte: dict[str, list[float]] = {name: [] for name in ways}
    from_disk: dict[str, list[float]] = {name: [] for name in ways}

    def turn(way: Callable[[list[str]], object]) -> tuple[float, float]:
        """Seconds and bytes from the disk, each per requested byte."""
        asked, before, started = 0, _read_from_disk(), time.perf_counter()
        while time.perf_counter() - started < TURN_S:
            picks = draw.integers(0, sequences, BATCH)
            way([names[i] for i in picks.tolist()])
            asked += int(open_cache.n_tokens[picks].sum()) * LAYERS * ROW_BYTES
        return (time.perf_counter() - started) / asked, (_read_from_disk() - before) / asked

    for _ in range(TURNS):
        for name, way in ways.items():
            turn(way)  # replaces the pages that another way left in memory
            took, read_bytes = turn(way)
            seconds_per_byte[name].append(took)
            from_disk[name].append(read_bytes)
    best = statistics.median(seconds_per_byte["kr2cache, FeatureCache.batch"])
    print(f"memory {total_memory() / 2**20:,.0f} MiB, cache {open_cache.stored_bytes / 2**20:,.0f} MiB")
    print(f"{'':32}{'times as long':>15}{'MB per second':>15}{'bytes from disk per requested byte':>40}")
    for name, times in seconds_per_byte.items():
        median = statistics.median(times)
        print(f"{name:32}{median / best:15.2f}{1e-6 / median:15,.0f}{statistics.median(from_disk[name]):40.2f}")


def _by_page_faults(cache: FeatureCache, names: list[str]) -> None:
    ahead, rows.READ_AHEAD = rows.READ_AHEAD, None
    try:
        cache.batch(names)
    finally:
        rows.READ_AHEAD = ahead


def _apart(file: h5py.File, names: list[str]) -> None:
    for name in names:
        file[name][...]


def _read_from_disk() -> int:
    """Bytes that this process read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--sequences", type=int, default=4_000)
    parser.add_argument("--inside", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        read(arguments.inside / "cache", arguments.inside / "apart.h5", arguments.sequences)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, control_group() as limit_file:
        folder = Path(name)
        make(folder / "cache", folder / "apart.h5", arguments.sequences)
        for path in folder.rglob("*.h5"):  # otherwise these pages count for the group that wrote them
            drop_pages(path)
        command = [sys.executable, __file__, "--inside", str(folder), "--sequences", str(arguments.sequences)]
        limit_file.write_text(str(FeatureCache.open(folder / "cache").stored_bytes // 4))
        enter = functools.partial(limit_file.with_name("cgroup.procs").write_text, "0")
        sys.exit(subprocess.run(command, check=False, preexec_fn=enter).returncode)


if __name__ == "__main__":
    main()
