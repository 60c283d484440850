"""Reading batches: ahead of use, into memory that is there, in few steps."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cache
from numpy.typing import NDArray

from kr2cache import FeatureCache
from kr2cache.cache import rows
from kr2cache.cache.dtypes import DTYPES, StoredDtype
from kr2cache.errors import ConfigError, SequenceNotFoundError


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_reading_ahead_changes_no_result(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range has to lie in its file, the last one too."""
    truth = tiny_cache.make([3, 1, 7, 2, 5], dtype=dtype, layers=[0, 1, 2, 4], model_layers=5, width=2_000)
    folder = tiny_cache.store(tmp_path / "cache", truth, shard_bytes=150_000)
    as_ever = FeatureCache.open(folder)
    monkeypatch.setattr(rows, "MEMORY_SHARE", 0)
    ahead = FeatureCache.open(folder)
    assert (as_ever._rows.is_large, ahead._rows.is_large) == (False, True)
    names = [*ahead.ids[::-1], ahead.ids[2]]
    for layers in (None, (4,), (1, 2), (2, 1), (4, 0), (0, 2, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(rows, "READ_AHEAD", None)
            expected = as_ever.batch(names, layers).states
        np.testing.assert_array_equal(ahead.batch(names, layers).states, expected)
        np.testing.assert_array_equal(as_ever.batch(names, layers).states, expected)


class Watched:
    """What the states of a cache of one shard were asked for, and when they were touched, as ranges of bytes."""

    def __init__(self, cache: FeatureCache, shard: Path, row_bytes: int) -> None:
        self.size, self.row_bytes = shard.stat().st_size, row_bytes
        self.hidden = tiny_cache.byte_offset(shard, "hidden")
        self.events: list[tuple[str, int, int]] = []
        self._rows = cache._rows._hidden[0]
        cache._rows._maps, cache._rows._hidden = [self], [self]  # type: ignore[list-item]

    def madvise(self, advice: int, start: int, length: int) -> None:
        assert advice == rows.READ_AHEAD
        assert start % mmap.PAGESIZE == 0
        assert 0 < length <= 128 * 1024, "more than every disk takes"
        assert start + length <= self.size
        first = start if start > self.hidden else self.hidden  # the first page may begin before
        if self.events and self.events[-1][0] == "asked" and self.events[-1][2] == start:
            self.events[-1] = ("asked", self.events[-1][1], start + length)
        else:
            self.events.append(("asked", first, start + length))

    def __getitem__(self, rows: slice) -> NDArray[np.generic]:
        self.events.append(("touched", *self.bytes(rows.start, rows.stop)))
        assert self._rows is not None
        return self._rows[rows]

    def bytes(self, start: int, stop: int) -> tuple[int, int]:
        return self.hidden + start * self.row_bytes, self.hidden + stop * self.row_bytes

    def asked(self, start: int, stop: int) -> tuple[str, int, int]:
        """For these rows, from the page on that the first of them lies in."""
        first, last = self.bytes(start, stop)
        return "asked", max(first // mmap.PAGESIZE * mmap.PAGESIZE, self.hidden), last

    def touched(self, start: int, stop: int) -> tuple[str, int, int]:
        return "touched", *self.bytes(start, stop)

    def of(self, read: Callable[[], object]) -> list[tuple[str, int, int]]:
        self.events = []
        read()
        return self.events


@pytest.mark.parametrize("large", [False, True], ids=["stays in memory", "larger than memory"])
def test_states_are_asked_for_before_they_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """All of them, nothing else; of what stays in memory once."""
    width, layers = 20_000, 3
    truth = tiny_cache.make([3, 70, 1, 2], width=width)
    folder = tiny_cache.store(tmp_path / "cache", truth)
    if large:
        monkeypatch.setattr(rows, "MEMORY_SHARE", 0)
    cache = FeatureCache.open(folder)
    watched = Watched(cache, tiny_cache.shards(folder)[0], 2 * width)
    asked, touched = watched.asked, watched.touched
    long, last = (3 * layers, 73 * layers), (74 * layers, 76 * layers)
    both = [touched(*long), touched(*last)]
    assert watched.of(lambda: cache.batch(["s1", "s3"])) == [asked(*long), asked(*last), *both]
    again = [asked(*last), asked(*long)] if large else []
    assert watched.of(lambda: cache.batch(["s3", "s1"])) == [*again, *both[::-1]]
    assert watched.of(lambda: cache["s3"]) == [*([asked(*last)] if large else []), touched(*last)]
    assert watched.of(lambda: cache["s0"]) == [asked(0, 3 * layers), touched(0, 3 * layers)]
    # Layer by layer: s3 has two rows of each.
    at = 74 * layers
    for names in ((1, 2), (2,)):
        span = (at + 2 * names[0], at + 6)
        assert watched.of(lambda names=names: cache.batch(["s3"], names)) == [asked(*span), touched(*span)]
    apart = [asked(at, at + 2), asked(at + 4, at + 6), touched(at, at + 6)]
    assert watched.of(lambda: cache.batch(["s3"], (2, 0))) == apart, "layer 1 is not asked for"


def test_what_is_checked_is_asked_for_whole(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make([3, 4], width=20_000))
    cache = FeatureCache.open(folder)
    watched = Watched(cache, tiny_cache.shards(folder)[0], 40_000)
    cache.check_on_read = True
    assert watched.of(lambda: cache.batch(["s1"], (2,)))[:2] == [watched.asked(9, 21), watched.touched(9, 21)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_layers_between_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """They would be touched, and were not asked for."""
    truth = tiny_cache.make([3, 4], dtype=dtype)
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    decoded: list[tuple[int, ...]] = []

    stored = type(DTYPES[dtype])
    decode = stored.decode

    def watched(self: StoredDtype, raw: NDArray[np.generic], *rest: Any) -> NDArray[np.floating]:
        decoded.append(raw.shape)
        return decode(self, raw, *rest)

    monkeypatch.setattr(stored, "decode", watched)
    np.testing.assert_array_equal(cache.states(1, (2, 0)), truth.states(1)[[2, 0]])
    np.testing.assert_array_equal(cache.states(1, (1, 2)), truth.states(1)[[1, 2]])
    assert [shape[:2] for shape in decoded] == [(2, 4), (2, 4)]


def test_scales_are_asked_for_as_well(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make([300, 400], dtype="int8", width=5))
    (shard,) = tiny_cache.shards(folder)
    cache = FeatureCache.open(folder)
    watched = Watched(cache, shard, 5)
    scales = tiny_cache.byte_offset(shard, "hidden_scale")
    page = mmap.PAGESIZE
    *asked, _ = watched.of(lambda: cache["s1"])
    first = (scales + 4 * 900) // page * page
    assert asked == [watched.asked(900, 2100), ("asked", max(first, watched.hidden), scales + 4 * 2100)]


def test_advice_that_the_system_does_not_take_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = tiny_cache.make([3, 4])
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    monkeypatch.setattr(rows, "READ_AHEAD", 9999)
    np.testing.assert_array_equal(cache["s1"], truth.states(1))


def test_a_batch_lies_as_the_file_does(tmp_path: Path) -> None:
    """Copying takes up to half as long again where it does not."""
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", tiny_cache.make([3, 4, 5], width=32)))
    for names in (["s0"], ["s2", "s1"]):
        assert cache.batch(names).states.ctypes.data % 64 == cache["s0"].ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_a_batch_into_memory_that_is_used_again(tmp_path: Path, dtype: str) -> None:
    truth = tiny_cache.make([3, 1, 7, 2], dtype=dtype, layers=[0, 1, 3], model_layers=4)
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth, shard_bytes=60))
    assert len(tiny_cache.shards(cache.folder)) > 1
    for layers, places in ((None, [0, 1, 2]), ((1, 3), [1, 2]), ((3, 0), [2, 0]), ((0, 0), [0, 0])):
        out = cache.buffer(3, layers)
        assert out.ctypes.data % 64 == 0
        for names in (["s2", "s2", "s2"], ["s0", "s3"], ["s1"]):
            out[...] = 77
            batch = cache.batch(names, layers, out=out)
            assert np.shares_memory(batch.states, out)
            assert [len(batch), batch.states.shape[0]] == [len(names), batch.first_row[-1]]
            for i, name in enumerate(names):
                np.testing.assert_array_equal(batch[i], truth.states(int(name[1:]))[places], strict=True)
            assert (out[len(batch.states) :] == 77).all(), "no more than the batch"


def test_memory_of_another_kind_is_refused(tmp_path: Path) -> None:
    truth = tiny_cache.make([3, 1, 7], width=8)
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    fits = np.zeros((12, 8), dtype=np.float16)
    read_only = fits.copy()
    read_only.flags.writeable = False
    for out, said in (
        (np.zeros((11, 8), dtype=np.float16), r"float16 of shape \(11, 8\)\. .* 12 or more rows of 8"),
        (np.zeros((12, 9), dtype=np.float16), r"\(12, 9\)"),
        (np.zeros((12, 8), dtype=np.float32), "float32 of"),
        (np.zeros(96, dtype=np.float16), r"\(96,\)"),
        (np.zeros((12, 16), dtype=np.float16)[:, ::2], "not contiguous"),
        (np.zeros((24, 8), dtype=np.float16)[::2], "not contiguous"),
        (read_only, "read-only"),
        ([0.0], "out is a list"),
    ):
        before = np.array(out)
        with pytest.raises(ConfigError, match=said):
            cache.batch(["s0", "s1"], out=out)  # type: ignore[arg-type]
        np.testing.assert_array_equal(out, before)
    cache.batch(["s0", "s1"], out=fits)
    np.testing.assert_array_equal(fits, np.concatenate([truth.states(i).reshape(-1, 8) for i in (0, 1)]))
    with pytest.raises(SequenceNotFoundError):
        cache.batch(["s0", "x"], out=fits)


def steps_of(work: Callable[[], object]) -> int:
    """Functions called, Python's and C's: what the time of small work goes by, on a machine of any speed."""
    calls = [0]

    def count(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls[0]


def test_what_is_small_takes_few_steps(tmp_path: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", tiny_cache.make([3] * 64)))
    names = [f"s{i}" for i in range(32)]
    cache.batch(names)
    one = steps_of(lambda: cache["s1"])
    first, all_of_them = steps_of(lambda: cache.batch(names[:1])), steps_of(lambda: cache.batch(names))
    assert one <= 32
    assert first <= 42
    assert (all_of_them - first) / 31 <= 7
    with pytest.raises(ValueError, match="read-only"):
        cache["s1"][0, 0, 0] = 1
