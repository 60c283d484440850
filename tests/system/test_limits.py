"""Caches of many shards open under a low limit of open files, or the error says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_cache

from kr2cache.system.limits import allow_open_files

pytest.importorskip("resource", reason="the system has no such limit")

SHARDS = 100
CHILD = """
import resource, sys
soft, hard = int(sys.argv[2]), int(sys.argv[3])
import numpy
from kr2cache import FeatureCache
from kr2cache.errors import CacheError
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    kept = [FeatureCache.open(sys.argv[1]) for _ in range(4)]
    print("read", sum(float(cache[name].shape[1]) for cache in kept for name in cache.ids))
except CacheError as error:
    print(error.message, error.remedy)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_cache.store(tmp_path_factory.mktemp("cache"), tiny_cache.make([2] * SHARDS), shard_bytes=1)
    assert len(tiny_cache.shards(folder)) == SHARDS
    return folder


def opened(folder: Path, soft: int, hard: int) -> str:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(soft), str(hard)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_more_shards_than_the_limit_of_open_files(folder: Path) -> None:
    """Four caches, so that the files of the earlier ones count too."""
    assert opened(folder, soft=64, hard=1000) == f"read {4 * SHARDS * 2}.0"


def test_a_limit_that_cannot_be_raised_is_explained(folder: Path) -> None:
    said = opened(folder, soft=64, hard=64)
    assert f"{SHARDS} more open files are needed, one for each shard, but this process may open 64 in all" in said
    assert "ulimit -n" in said


def test_a_limit_that_is_high_enough_stays() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
