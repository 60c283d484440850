"""Time of checking: ``verify`` and reading the same file; reading batches with and without ``check_on_read``.

    python tests/benchmarks/checks.py CACHE

All files are in the page cache. Values are medians of five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kr2cache import FeatureCache
from kr2cache.cache.check import check_cache
from kr2cache.cache.format import states_xxh3

REPEATS = 5
BATCH = 32


def median_s(work: Callable[[], object]) -> float:
    """Median seconds of ``REPEATS`` calls of ``work``, after one call to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def read_files(folder: Path) -> None:
    """Read the files in one thread, in blocks of the same size as ``verify``."""
    buffer = bytearray(32 * 2**20)
    for path in sorted(folder.glob("*.h5")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def hash_sequences(cache: FeatureCache) -> None:
    for position in range(len(cache)):
        states_xxh3(*cache.stored(position))


def read_batches(folder: Path, *, check: bool) -> None:
    """Copy every sequence once out of the mapped file, in random batches."""
    cache = FeatureCache.open(folder)
    cache.check_on_read = check
    order = np.random.default_rng(0).permutation(cache.ids).tolist()
    for start in range(0, len(order), BATCH):
        cache.batch(order[start : start + BATCH])


def measure(folder: Path) -> dict[str, float]:
    """Name to seconds or ratio."""
    cache = FeatureCache.open(folder)
    plain = median_s(lambda: read_files(folder))
    verify = median_s(lambda: check_cache(folder))
    hashing = median_s(lambda: hash_sequences(cache))
    unchecked = median_s(lambda: read_batches(folder, check=False))
    checked = median_s(lambda: read_batches(folder, check=True))
    return {
        "gigabytes": cache.stored_bytes / 1e9,
        "read_s": plain,
        "verify_s": verify,
        "verify_over_read": verify / plain,
        "hash_s": hashing,
        "batches_s": unchecked,
        "checked_batches_s": checked,
        "checked_over_unchecked": checked / unchecked,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    print(json.dumps(measure(parser.parse_args().cache), indent=2))
