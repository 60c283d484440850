"""While one process writes, eight processes read only correct states; and the comparison itself finds wrong states."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import readers
import tiny_cache

from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import open_shard
from kr2cache.cache.writer import PackedStates, ShardWriter, unmark


@pytest.mark.long
def test_readers_see_only_correct_states(tmp_path: Path) -> None:
    for seconds in (6.0, 20.0, 60.0):  # on a busy machine, more time for as much work
        folder = tmp_path / f"{seconds}"
        folder.mkdir()
        outcome = readers.run(seconds, folder)
        assert outcome.right, outcome.seen.errors
        if outcome.caches >= 2 and outcome.seen.examples > 1_000 and outcome.seen.growing > 20:
            break
    assert outcome.readers == 8
    assert outcome.caches >= 2, "the writer finished one cache and began another"
    assert outcome.seen.examples > 1_000
    assert outcome.seen.from_loader > 0
    assert outcome.seen.growing > 20, "caches were read while they were written"


# The comparison finds wrong states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(tiny_cache.DTYPES)), ids=tiny_cache.DTYPES)
def test_one_changed_byte_is_one_wrong_sequence(tmp_path: Path, number: int) -> None:
    truth = readers.truth_of(number)
    folder = tiny_cache.store(tmp_path / "cache", truth, shard_bytes=readers.SHARD_BYTES)
    shard = tiny_cache.shards(folder)[0]
    at = tiny_cache.byte_offset(shard, "hidden")  # the first value of s0
    with shard.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    cache, seen = FeatureCache.open(folder), readers.Seen()
    for i, name in enumerate(cache.ids):
        seen.compare(cache[name], truth, i)
    assert (seen.examples, seen.wrong) == (readers.SEQUENCES, 1)


def test_states_of_another_shape_are_wrong() -> None:
    truth, seen = readers.truth_of(0), readers.Seen()
    seen.compare(truth.states(0)[:1], truth, 0)
    seen.compare(np.zeros(0), truth, 0)
    assert (seen.examples, seen.wrong) == (2, 2)


def test_a_writer_that_marks_before_it_writes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = readers.truth_of(0)
    folder = tiny_cache.store(tmp_path / "cache", truth, shard_bytes=readers.SHARD_BYTES, positions=range(100))
    seen, draw = readers.Seen(), random.Random(0)
    seen.read_some(FeatureCache.open(folder), truth, draw)
    assert (seen.examples, seen.wrong) == (16, 0)

    def marks_alone(self: ShardWriter, states: PackedStates) -> None:
        for position in states.sequences:
            self._written.put((position - self.first, 0))

    monkeypatch.setattr(ShardWriter, "_write", marks_alone)
    tiny_cache.write(folder, truth, range(100, readers.SEQUENCES))
    seen.read_some(FeatureCache.open(folder), truth, draw, count=200)
    assert seen.wrong > 100


def read_for_a_while(root: Path) -> readers.Seen:
    return readers.read_caches(root, time.time() + 0.6, 0, through_loader=False)


def test_a_damaged_shard_is_an_error_and_does_not_count_as_missing(tmp_path: Path) -> None:
    folder = tiny_cache.store(readers.folder_of(tmp_path, 0), readers.truth_of(0), shard_bytes=readers.SHARD_BYTES)
    shard = tiny_cache.shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    seen = read_for_a_while(tmp_path)
    assert seen.errors
    assert seen.too_early == 0
    assert all(error.startswith("CacheError") for error in seen.errors)


def test_a_mark_that_is_removed_and_a_shard_that_is_removed_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_cache.store(readers.folder_of(tmp_path, 0), readers.truth_of(0), shard_bytes=readers.SHARD_BYTES)
    first, second, *_ = tiny_cache.shards(folder)

    reads, read_some = itertools.count(1), readers.Seen.read_some

    def remove_and_read(*arguments: Any) -> None:
        number = next(reads)
        if number == 5:
            unmark(open_shard(first), [0])
        if number == 10:
            second.unlink()
        read_some(*arguments)

    monkeypatch.setattr(readers.Seen, "read_some", remove_and_read)
    seen = read_for_a_while(tmp_path)
    assert seen.examples > 0
    assert seen.wrong == 0
    assert "['s0'] of cache 0 are not complete any more" in seen.errors
    assert any("should hold" in error for error in seen.errors)
