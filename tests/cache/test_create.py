"""Shards are made whole or not at all, within their size, and those that are there are kept."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LIMITED, run_python, traced

from kr2cache.cache.create import create_shard, shard_boundaries
from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError, DiskSpaceError

HERE = Path(__file__).parent


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=40),
    token_bytes=st.integers(1, 100),
    shard_bytes=st.integers(1, 30_000),
)
@settings(deadline=None, max_examples=40)
def test_cuts_keep_every_shard_within_its_size(lengths: list[int], token_bytes: int, shard_bytes: int) -> None:
    cuts = shard_boundaries(np.array(lengths, dtype=np.int32), token_bytes, shard_bytes)
    parts = [lengths[start:stop] for start, stop in pairwise(cuts)]
    assert [length for part in parts for length in part] == lengths
    assert all(part for part in parts)
    assert all(sum(part) * token_bytes <= shard_bytes or len(part) == 1 for part in parts)
    for part, following in pairwise(parts):  # none was closed early
        assert (sum(part) + following[0]) * token_bytes > shard_bytes


def test_lengths_that_disagree_are_seen_before_anything_is_written(tmp_path: Path) -> None:
    truth = tiny_cache.make((3, 1, 5))
    index = truth.index
    for change in (
        {"input_id": index.input_id[:-1]},
        {"word_index": np.append(index.word_index, np.int32(0))},
        {"n_tokens": np.array([3, 1, 6], dtype=np.int32)},
        {"n_tokens": np.array([4, 0, 5], dtype=np.int32)},
    ):
        with pytest.raises(
            CacheError, match=r"cache is not made: the index has (9|10) tokens, (8|9) token ids and (9|10)"
        ):
            tiny_cache.create_shards(tmp_path / "cache", truth.header, dataclasses.replace(index, **change), 2**30)
        assert list(tmp_path.iterdir()) == []


def test_a_shard_gets_its_name_only_when_all_of_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = traced(monkeypatch, "posix_fallocate", "fsync", "rename", "open")
    truth = tiny_cache.make()
    path = tmp_path / "shard-00000-of-00001.h5"
    create_shard(path, truth.header, truth.index, path.parent)
    assert [name for name, *_ in calls[-6:]] == ["open", "posix_fallocate", "fsync", "rename", "open", "fsync"]
    assert [name for name, *_ in calls].count("rename") == 1
    synced, folder = calls[-6], calls[-2]
    assert str(synced[1]) == f"{path}.partial"
    assert calls[-4][1] == calls[-5][1], "what is reserved is what is synced"
    assert str(folder[1]) == str(tmp_path), "the folder is synced after the renaming"


def test_the_space_of_a_shard_is_reserved(tmp_path: Path) -> None:
    truth = tiny_cache.make((400,), width=1024)  # 2.4 MB, nothing of it written
    tiny_cache.create_shards(tmp_path / "cache", truth.header, truth.index, 2**30)
    (path,) = tiny_cache.shards(tmp_path / "cache")
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 1200 * 1024 * 2


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_killed_while_creating_a_shard_nothing_bears_its_name(tmp_path: Path, call: str) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "import tiny_cache\n"
        f"os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "tiny_cache.store(Path(sys.argv[2]), tiny_cache.make())\n"
    )
    folder = tmp_path / "cache"
    done = run_python(program, HERE, folder)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in folder.iterdir()] == ["shard-00000-of-00001.h5.partial"]
    with pytest.raises(CacheError, match="holds no shard"):
        FeatureCache.open(folder)

    whole = tiny_cache.store(tmp_path / "whole", tiny_cache.make())
    tiny_cache.store(folder, tiny_cache.make())
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(whole)


def test_what_a_killed_run_left_under_the_temporary_name_is_not_trusted(tmp_path: Path) -> None:
    whole = tiny_cache.store(tmp_path / "whole", tiny_cache.make())
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "shard-00000-of-00001.h5.partial").write_bytes(b"\xff" * 300_000)
    tiny_cache.store(folder, tiny_cache.make())
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(whole)


def test_creating_again_touches_no_shard_that_is_there(tmp_path: Path) -> None:
    truth = tiny_cache.make()
    folder = tiny_cache.store(tmp_path / "cache", truth, shard_bytes=60, positions=[1, 2])
    before = tiny_cache.folder_bytes(folder)
    assert tiny_cache.create_shards(folder, truth.header, truth.index, 60) == [], "nothing was made again"
    assert tiny_cache.folder_bytes(folder) == before


# A full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 100, 3000, 60_000])
def test_a_disk_too_small_for_the_file_leaves_nothing(tmp_path: Path, limit: int) -> None:
    done = run_python(LIMITED, HERE, tmp_path / "cache", limit, "new")
    assert done.stdout.startswith("DiskSpaceError No space left for "), done.stderr
    assert str(tmp_path / "cache" / "shard-00000-of-00001.h5") in done.stdout
    assert "Make room" in done.stdout
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_to_reserve_is_a_disk_space_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    truth = tiny_cache.make()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskSpaceError, match=r"No space left for .*shard-00000-of-00001\.h5"):
            tiny_cache.create_shards(tmp_path / "cache", truth.header, truth.index, 2**30)
    assert list((tmp_path / "cache").iterdir()) == []
    tiny_cache.store(tmp_path / "cache", truth)
    assert tiny_cache.marked_sequences(tmp_path / "cache", truth) == [0, 1, 2, 3]


def test_shards_that_fitted_before_the_disk_was_full_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.posix_fallocate
    truth = tiny_cache.make()
    folder = tmp_path / "cache"

    def fills_up(*arguments: int) -> None:
        if tiny_cache.shards(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fills_up)
        with pytest.raises(DiskSpaceError):
            tiny_cache.create_shards(folder, truth.header, truth.index, 60)
    (first,) = folder.iterdir()
    inode = first.stat().st_ino
    with pytest.raises(CacheError, match="should hold 00004 shards, but holds 1"):
        FeatureCache.open(folder)
    tiny_cache.store(folder, truth, shard_bytes=60)
    assert first.stat().st_ino == inode
    assert tiny_cache.marked_sequences(folder, truth) == [0, 1, 2, 3]
