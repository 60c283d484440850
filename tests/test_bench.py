"""The bench's code runs as it is meant to, on small sizes; its figures are for people with a quiet machine."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from world import World

from kr2cache.bench import BenchConfig, ablation, break_even, race, reading
from kr2cache.bench.race import Race
from kr2cache.bench.training import CACHED, ONLINE
from kr2cache.cache.check import check_cache
from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.extraction.planning import plan_extraction
from kr2cache.system.memory import peak_of


def test_contenders_take_turns_and_the_first_one_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit and ours more often than rivals, and each time the other way round."""
    monkeypatch.setattr(race, "PAIRS", (2, 3))
    monkeypatch.setattr(race, "PAIRS_S", math.inf)
    turns: list[str] = []
    contenders = {name: functools.partial(turns.append, name) for name in ("limit", "ours", "rival")}
    one = race.race("t", "u", contenders, repeats=2, target=1.0)
    there, back = ["limit", "ours"], ["ours", "limit"]
    first, second = [*there, *back, *there], [*back, *there, *back]
    assert turns == ["limit", "ours", "rival", *first, "rival", *second, "rival"]
    assert [len(times) for times in one.seconds.values()] == [6, 6, 2]


def test_slow_contenders_take_as_few_turns_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "PAIRS_S", 0.0)
    one = race.race("t", "u", {"limit": lambda: None, "ours": lambda: None}, repeats=2, target=1.0)
    assert [len(times) for times in one.seconds.values()] == [2 * race.PAIRS[0]] * 2


def test_ours_stands_still_while_the_limit_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, in milliseconds."""
    order: list[str] = []
    model = torch.nn.Identity()
    clock = [0.0]
    pauses: list[float] = []

    def sleep(pause: float) -> None:
        pauses.append(pause)
        clock[0] += 7

    monkeypatch.setattr(race, "time", types.SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))

    def limit() -> Iterator[None]:
        for _ in range(6):
            clock[0] += 30
            order.append("limit")
            yield

    def ours() -> None:
        for _ in range(6):
            model(torch.zeros(1))
            clock[0] += 20
            order.append("ours")

    assert race.alternately(model, limit, ours, segment_s=10) == (180, 120)
    # Ours at 20, 40, 60, 80, 100, 120; the limit only where it took less than that: at 30, 60, 90, 120; the rest last.
    caught_up = ["ours", "limit", "ours", "limit", "ours", "ours", "limit", "ours", "limit", "ours"]
    assert order == [*caught_up, "limit", "limit"]
    assert len(pauses) == 5, "which counted for nobody"
    assert not model._forward_pre_hooks


def test_a_turn_of_both_at_once_counts_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "PAIRS_S", math.inf)  # however long a busy disk takes to sync
    turns: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(race, "time", types.SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: clock[0]))

    def turn(name: str, takes: float) -> None:
        turns.append(name)
        clock[0] += takes

    takes = {"limit": 5.0, "other limit": 4.0, "ours": 6.0, "rival": 9.0}
    contenders = {name: functools.partial(turn, name, seconds) for name, seconds in takes.items()}
    one = race.race("t", "u", contenders, repeats=1, target=1.0, limits=2, close=lambda: (5.0, 7.5))
    number = race.PAIRS[1]
    assert turns == [*contenders, *(["other limit"] * number), "rival"]
    assert (one.seconds["limit"], one.seconds["ours"]) == ([5.0] * number, [7.5] * number)
    assert one.ratio == 1.5

    # A disk that is slower goes on while ours stands still: then each takes its own turn.
    contenders["other limit"] = functools.partial(turn, "other limit", 5.5)
    one = race.race("t", "u", contenders, repeats=1, target=1.0, limits=2, close=lambda: (5.0, 7.5))
    assert one.seconds == {
        "limit": [5.0] * number,
        "other limit": [5.5] * number,
        "ours": [6.0] * number,
        "rival": [9.0],
    }


def test_the_slower_of_two_limits_binds() -> None:
    times: dict[str, list[float]] = {"model": [1, 9, 2], "disk": [4, 4, 5], "ours": [6, 4, 10], "rival": [9, 9, 9]}
    one = Race(title="t", unit="u", seconds=times, target=1.4, limits=2)
    assert (one.limit, one.binding, one.ratios, one.ratio) == (4, "disk", [1.5, 1, 2], 1.5)
    assert not one.json()["met"]


def test_what_is_allowed_is_seconds_more_for_each_thing() -> None:
    times = {"limit": [1.0, 2.0, 3.0], "ours": [3.0, 5.0, 5.0]}
    one = Race(title="t", unit="u", seconds=times, target=None, things=4, allowed=0.5)
    assert (one.extras, one.met) == ([0.5, 0.75, 0.5], True)
    assert not dataclasses.replace(one, allowed=0.49).met
    assert not dataclasses.replace(one, target=1.5).met
    assert (one.json()["extra"], one.json()["extra_range"]) == (0.5, (0.5, 0.75))


def test_the_ratio_is_of_neighbours_whatever_the_machine_does_meanwhile() -> None:
    slower_and_slower = [1.0, 2.0, 3.0, 4.0, 5.0]
    times = {"limit": slower_and_slower, "ours": [1.1 * one for one in reversed(slower_and_slower)], "rival": [9.0]}
    one = Race(title="t", unit="u", seconds=times, target=1.4)
    assert one.medians == {"limit": 3, "ours": pytest.approx(3.3), "rival": 9}
    assert one.ratio == pytest.approx(1.1)
    together = dataclasses.replace(one, seconds={**times, "ours": [1.1 * one for one in slower_and_slower]})
    assert together.ratio_range == pytest.approx((1.1, 1.1)), "drift does not widen what is known"
    assert one.ratio_range == pytest.approx((0.22, 5.5))


@pytest.mark.parametrize("number", [1, 5, 6, 10, 15, 50])
def test_the_range_of_a_median_is_the_sign_tests(number: int) -> None:
    """Of all places that leave 2.5 % or less on each side, the inmost; by SciPy's own interval of a quantile."""
    from scipy.stats import quantile_test

    values = [float(value) for value in np.random.default_rng(number).permutation(number)]
    low, high = race.median_range(values)
    expected = quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    assert low == (min(values) if np.isnan(expected.low) else expected.low)
    assert high == (max(values) if np.isnan(expected.high) else expected.high)


@pytest.mark.long
def test_the_bench_measures_every_part_and_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, small in (("SEQUENCES", 12), ("WIDTH", 16), ("BATCH", 4), ("BATCHES", 2), ("TOKENS", 6)):
        monkeypatch.setattr(reading, name, small)
    monkeypatch.setattr(ablation, "FUSIONS", ("fuse", "last4", "layer9"))
    (tmp_path / "disk").mkdir()
    models = f"--resource {world.resource} --reader {world.folder / 'models' / 'reader'}"
    data = f"--data {world.data} --training-data {world.data}"
    where = f"--folder {tmp_path / 'disk'} --plot {tmp_path / 'bench.svg'}"
    line = f"bench {models} {data} --device cpu --repeats 2 {where} --json"
    assert run(line.split()) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    titles = [one["title"] for one in result["races"]]
    workers = [f"reading, {number} worker{'s' if number > 1 else ''}" for number in reading.WORKERS]
    assert titles == [
        "stage one",
        "reading one sequence, by its id",
        "reading into memory used again",
        "reading, from the page cache",
        *workers,
        "reading, page cache dropped",
        "training",
        "evaluation",
        "an ablation",
    ]
    # A long title goes over several lines where large times take the room.
    rows = [line.split("│") for line in captured.err.splitlines() if line.startswith("│")]
    first_column = " ".join(row[1].strip() for row in rows)
    for one in result["races"]:
        times = list(one["medians"].values())
        limits, (_, *rivals) = times[: one["limits"]], times[one["limits"] :]
        assert rivals or "worker" in one["title"] or one["title"] in ("evaluation", "reading one sequence, by its id")
        assert min(times) > 0
        assert one["limit"] == max(limits)
        names = list(one["seconds"])
        slowest = names[limits.index(max(limits))]
        pairs = zip(one["seconds"][names[one["limits"]]], one["seconds"][slowest], strict=True)
        ratios = [ours / limit for ours, limit in pairs]
        assert one["ratio"] == statistics.median(ratios)
        assert min(ratios) <= one["ratio_range"][0] <= one["ratio"] <= one["ratio_range"][1] <= max(ratios)
        assert [statistics.median(times) for times in one["seconds"].values()] == list(one["medians"].values())
        pairs = zip(one["seconds"][names[one["limits"]]], one["seconds"][slowest], strict=True)
        assert one["extra"] == statistics.median([(ours - limit) / one["things"] for ours, limit in pairs])
        assert one["title"] in first_column
        assert set(one["peak_bytes"]) == set(one["seconds"])
    assert result["races"][1]["things"] == 12 * reading.ROUNDS
    assert "≤ +10 µs each" in " ".join(captured.err.split())
    assert "2 fusions, one seed per turn" in result["races"][-1]["unit"], "a layer that the resource lacks is left out"
    assert "Break-even" in captured.err
    assert result["break_even"]["disk_bytes"] == result["break_even"]["tokens"] * 5 * 16 * 2
    assert (tmp_path / "bench.svg").read_text().count("<text") > 40
    assert result["machine"]["versions"]["torch"]
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(("name", "message"), [("bench.txt", "is none of .svg"), ("no/where/bench.svg", "--plot")])
def test_a_plot_that_cannot_be_written_is_refused_first(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no").write_text("a file")
    assert run(["bench", "--plot", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err


def test_memory_that_work_takes_is_seen() -> None:
    if (peak := peak_of(lambda: np.ones(30_000_000))) is None:
        pytest.skip("the system does not say")
    assert 200e6 < peak < 400e6
    assert (peak_of(lambda: None) or 0) < 50e6


def test_the_break_even_by_hand(world: World) -> None:
    def made(**seconds: float) -> Race:
        return Race(title="t", unit="u", seconds={name: [one] for name, one in seconds.items()}, target=None)

    training = world.config(batch_size=4)
    plan = plan_extraction(
        ExtractConfig(resource=str(world.resource), split="train", task="udpos", data=str(world.data), device="cpu")
    )
    config = BenchConfig(extraction=plan.config, training=training)
    extracted = made(limit=1.0, **{"kr2cache extract": 6.0})  # of the same split
    trained = made(limit=1.0, **{CACHED: 2.0, ONLINE: 5.0})  # three steps of four: every example once
    found = break_even.of(extracted, plan, trained, config)
    assert found["stage_one_seconds"] == pytest.approx(6.0)
    assert found["saved_seconds_per_epoch"] == pytest.approx(3.0)
    assert found["epochs_times_runs"] == pytest.approx(2.0)
    assert "paid for after 2.0 epochs x runs" in found["text"]
    slower = break_even.of(extracted, plan, made(limit=1.0, **{CACHED: 5.0, ONLINE: 5.0}), config)
    assert slower["epochs_times_runs"] is None


def test_all_contenders_read_the_same_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is stored four times is equal four times: else the race compares nothing."""
    import h5py
    from safetensors.numpy import load_file

    from kr2cache import FeatureCache

    lengths = np.array([3, 1, 5], dtype=np.int32)
    monkeypatch.setattr(reading, "WIDTH", 8)
    states = np.random.default_rng(0).standard_normal((int(lengths.sum()) * reading.LAYERS, 8)).astype(np.float16)
    stored = reading.Stored(tmp_path, ["a", "b", "c"], lengths, states)
    reading._store(stored)
    assert check_cache(stored.cache).intact
    cache, tensors = FeatureCache.open(stored.cache), load_file(stored.tensors)
    with h5py.File(stored.apart, "r") as apart:
        for i, name in enumerate(stored.names):
            expected = states[stored.first[i] : stored.first[i + 1]].reshape(reading.LAYERS, lengths[i], 8)
            np.testing.assert_array_equal(cache[name], expected)
            np.testing.assert_array_equal(apart[name][...], expected)
            np.testing.assert_array_equal(tensors[name].reshape(expected.shape), expected)
