"""The bench's code runs as it is meant to, on small sizes; its figures are for people with a quiet machine."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from world import World

from kr2cache import bench
from kr2cache.bench import Race, reading
from kr2cache.cache.check import check_cache
from kr2cache.cli import run


def test_contenders_take_turns_and_the_first_one_does_not_count() -> None:
    turns: list[str] = []
    one = bench.race(
        "t", "u", {"limit": lambda: turns.append("a"), "ours": lambda: turns.append("b")}, repeats=3, target=1.0
    )
    assert turns == ["a", "b"] * 4
    assert [len(times) for times in one.seconds.values()] == [3, 3]


def test_the_ratio_is_ours_over_the_limit() -> None:
    one = Race(title="t", unit="u", seconds={"limit": [1, 9, 2], "ours": [3, 2.5, 4], "rival": [9, 9, 9]}, target=1.4)
    assert (one.ratio, one.json()["met"]) == (1.5, False)
    assert one.medians == {"limit": 2, "ours": 3, "rival": 9}


def test_the_bench_measures_every_part_and_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, small in (("SEQUENCES", 12), ("WIDTH", 16), ("BATCH", 4), ("BATCHES", 2), ("TOKENS", 6)):
        monkeypatch.setattr(reading, name, small)
    (tmp_path / "disk").mkdir()
    models = f"--resource {world.resource} --reader {world.folder / 'models' / 'reader'}"
    data = f"--data {world.data} --training-data {world.data}"
    line = f"bench {models} {data} --repeats 2 --folder {tmp_path / 'disk'} --json"
    assert run(line.split()) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    titles = [one["title"] for one in result["races"]]
    assert titles == ["stage one", "reading, from the page cache", "reading, page cache dropped", "training"]
    for one in result["races"]:
        limit, ours, *rivals = one["medians"].values()
        assert rivals
        assert min(limit, ours, *rivals) > 0
        assert one["ratio"] == ours / limit
        assert [statistics.median(times) for times in one["seconds"].values()] == list(one["medians"].values())
        assert one["title"] in captured.err
    assert result["machine"]["versions"]["torch"]
    assert list((tmp_path / "disk").iterdir()) == []


def test_all_contenders_read_the_same_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is stored four times is equal four times: else the race compares nothing."""
    import h5py
    import numpy as np
    from safetensors.numpy import load_file

    from kr2cache import FeatureCache

    lengths = np.array([3, 1, 5], dtype=np.int32)
    monkeypatch.setattr(reading, "WIDTH", 8)
    states = np.random.default_rng(0).standard_normal((int(lengths.sum()) * reading.LAYERS, 8)).astype(np.float16)
    stored = reading.Stored(tmp_path, ["a", "b", "c"], lengths, states)
    reading._store(stored)
    assert check_cache(stored.cache).sound
    cache, tensors = FeatureCache.open(stored.cache), load_file(stored.tensors)
    with h5py.File(stored.apart, "r") as apart:
        for i, name in enumerate(stored.names):
            expected = states[stored.first[i] : stored.first[i + 1]].reshape(reading.LAYERS, lengths[i], 8)
            np.testing.assert_array_equal(cache[name], expected)
            np.testing.assert_array_equal(apart[name][...], expected)
            np.testing.assert_array_equal(tensors[name].reshape(expected.shape), expected)
