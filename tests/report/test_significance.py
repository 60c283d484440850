"""Both tests, against computations that share nothing with them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import make_run

from kr2cache.errors import CacheError
from kr2cache.report.collect import collect
from kr2cache.report.examples import read_answers
from kr2cache.report.significance import (
    Comparer,
    Comparison,
    holm,
    judge,
    p_over_examples,
    p_over_seeds,
)


@pytest.mark.parametrize(
    "differences", [[1, 1, 1, 1, 1, 0, 0], [2, -1, 3, 1, 0, 1, 1, -2], [1, -1], [3, 2, 1, 1, 1, 2]]
)
def test_p_over_examples_is_that_of_all_sign_patterns(differences: list[int]) -> None:
    observed = abs(sum(differences))
    totals = [
        abs(sum(sign * one for sign, one in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(total >= observed for total in totals) / len(totals)
    assert p_over_examples(np.array(differences, dtype=float)) == pytest.approx(expected)


def test_p_over_examples_of_many_is_near_the_normal_limit_and_repeatable() -> None:
    differences = np.array([1.0] * 60 + [-1.0] * 40 + [0.0] * 900)
    p = p_over_examples(differences)
    assert p == p_over_examples(differences)
    assert p == pytest.approx(math.erfc(19 / math.sqrt(2 * 100)), abs=0.015)  # 60 of 100 coins, continuity corrected


@pytest.mark.parametrize("differences", [[], [0.0, 0.0], [1.0], [0.0, -3.0]])
def test_p_over_examples_without_two_changes_is_one(differences: list[float]) -> None:
    assert p_over_examples(np.array(differences, dtype=float)) == 1.0


def test_p_over_seeds_is_the_paired_t_test() -> None:
    ours, theirs = [0.81, 0.83, 0.82], [0.80, 0.80, 0.81]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    expected = 1 - t / math.sqrt(2 + t * t)  # two degrees of freedom have this closed form
    assert p_over_seeds(ours, theirs) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "p"),
    [
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], 1.0),
        ([0.2, 0.3, 0.4], [0.1, 0.2, 0.3], None),
        ([0.5], [0.4], None),
    ],
)
def test_p_over_seeds_without_spread(ours: list[float], theirs: list[float], p: float | None) -> None:
    assert p_over_seeds(ours, theirs) == p


def one(
    p_examples: float, p_seeds: float | None, seeds: int = 3, *, difference: float = 0.01, changed: int = 100
) -> Comparison:
    return Comparison("KReader", difference, p_examples, p_seeds, tuple(range(seeds)), changed)


@given(st.lists(st.sampled_from([0.001, 0.004, 0.01, 0.012, 0.02, 0.04, 0.2, 0.9]), max_size=8), st.floats(0.001, 0.2))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float], level: float) -> None:
    """Step down: the smallest p against level / n, the next against level / (n - 1), ..., until one is not below."""
    left = sorted(range(len(p_values)), key=lambda place: p_values[place])
    rejected = set()
    while left and p_values[left[0]] <= level / len(left):
        rejected.add(left.pop(0))
    found = {place for place, p in enumerate(holm(p_values)) if p <= level}
    # Equal p-values are rejected together or not at all, since those that come later meet a milder level.
    assert found == rejected


def test_the_larger_p_is_corrected_for_the_number_of_comparisons() -> None:
    judged = judge({"a": one(0.001, 0.012), "b": one(0.02, 0.001), "c": one(0.001, 0.04), "d": one(0.001, 0.9)})
    corrected = {name: made.p for name, made in judged.items()}
    assert corrected == pytest.approx({"a": 0.048, "b": 0.06, "c": 0.08, "d": 0.9})
    assert judged["a"].noise is False
    assert judged["b"].noise is not False, "alone it would be found"
    assert judge({"b": one(0.02, 0.001)})["b"].noise is False


@pytest.mark.parametrize(("p_examples", "p_seeds"), [(0.01, 0.05), (0.05, 0.01), (0.5, 0.5)])
def test_both_tests_have_to_agree(p_examples: float, p_seeds: float) -> None:
    assert judge({"a": one(p_examples, p_seeds)})["a"].noise is True
    assert judge({"a": one(0.01, 0.04)})["a"].noise is False


def test_two_seeds_give_no_verdict_however_small_or_large_the_difference() -> None:
    """With two seeds the smallest of three differences was the only one that counted as more than noise."""
    small, large = one(0.001, 0.02, 2, difference=-0.005), one(0.001, 0.2, 2, difference=-0.013)
    for made in judge({"small": small, "large": large, "one seed": one(0.001, None, 1)}).values():
        assert (made.noise, made.p) == (None, None)
        assert made.reason == "both rows need 3 or more seeds in common"


def test_no_verdict_where_the_tests_could_hardly_have_found_anything() -> None:
    ten = judge({name: one(0.001, 0.2) for name in "abcdefghij"})["a"]
    assert (ten.noise, ten.p) == (None, 1.0)
    # By simulation: of 10 comparisons at 5 standard deviations the t-test at 0.05 / 10 finds few, at 16 nearly all.
    draw = np.random.default_rng(3)
    for spreads, low, high in ((4, 0.0, 0.25), (16, 0.9, 1.0)):
        drawn = draw.normal(spreads, 1.0, (4_000, 3))
        t = drawn.mean(axis=1) / (drawn.std(axis=1, ddof=1) / math.sqrt(3))
        power = float(np.mean(1 - t / np.sqrt(2 + t * t) < 0.005))  # the closed form of two degrees of freedom
        assert low <= power <= high
    assert "with 3 seeds and 10 comparisons the tests find only differences of 8 standard deviations" in ten.reason
    assert "6 seeds are enough" in ten.reason
    assert judge({name: one(0.001, 0.2, 6) for name in "abcdefghij"})["a"].noise is True
    few = judge({"a": one(0.25, 0.01, changed=3)})["a"]
    assert (few.noise, few.reason) == (None, "the two rows differ on too few examples")
    same = judge({"a": one(0.001, None)})["a"]
    assert same.noise is None
    assert "every seed has the same difference" in same.reason


def test_right_words_are_counted_and_cut_off_words_are_wrong(tmp_path: Path) -> None:
    path = make_run(tmp_path, "udpos-de/kreader-x-11111111", 1, 0.5)
    rows = [
        {"id": "b", "gold": ["NOUN", "VERB", "VERB"], "predicted": ["NOUN", "VERB", None]},
        {"id": "a", "gold": ["ADJ"], "predicted": ["NOUN"]},
    ]
    (path / "predictions-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert read_answers(collect(tmp_path).runs[0]).right.tolist() == [0.0, 2.0]


def _two(tmp_path: Path, right: list[bool], other: list[bool], seeds: tuple[int, ...] = (1, 2)) -> Comparison:
    for seed in seeds:
        make_run(tmp_path, "piqa/kreader-x-11111111", seed, sum(right) / len(right) + seed / 1000, right=right)
        make_run(tmp_path, "piqa/kr2-x-22222222", seed, sum(other) / len(other), method="kr2", right=other)
    kr2, kreader = collect(tmp_path).configurations
    return Comparer().compare([(kr2, kreader)], seeds, "KReader")


def test_a_pair_is_tested_on_the_sum_over_seeds(tmp_path: Path) -> None:
    comparison = _two(tmp_path, [False] * 6 + [True], [True] * 6 + [False])
    totals = [abs(sum(signs)) for signs in itertools.product((1, -1), repeat=7)]
    assert comparison.p_examples == pytest.approx(sum(total >= 5 for total in totals) / len(totals))
    assert comparison.difference == pytest.approx(5 / 7 - 0.0015)
    assert comparison.seeds == (1, 2)


def test_predictions_are_matched_by_id_not_by_line(tmp_path: Path) -> None:
    _two(tmp_path, [False, True, True], [False, True, True])
    path = tmp_path / "piqa/kr2-x-22222222/seed-1/predictions-test.jsonl"
    path.write_text("".join(reversed(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")
    kr2, kreader = collect(tmp_path).configurations
    assert Comparer().compare([(kr2, kreader)], (1, 2), "KReader").p_examples == 1.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"id": "test-0"', '"id": "other"', "example ids of piqa/kr2-x-22222222 and piqa/kreader-x-11111111 differ"),
        ('"gold": "NOUN"', '"gold": "X"', "the gold labels of"),
        ('"gold"', '"silver"', "seed-2/predictions-test.jsonl is malformed after line 0"),
        ('{"id"', '"id"', "seed-2/predictions-test.jsonl is malformed after line 0"),
        (None, None, "piqa/kr2-x-22222222/seed-2/predictions-test.jsonl is missing"),
    ],
)
def test_other_examples_are_not_compared(tmp_path: Path, old: str | None, new: str | None, message: str) -> None:
    _two(tmp_path, [False, True, True], [True, True, True])
    path = tmp_path / "piqa/kr2-x-22222222/seed-2/predictions-test.jsonl"
    if old is None or new is None:
        path.unlink()
    else:
        path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
    kr2, kreader = collect(tmp_path).configurations
    with pytest.raises(CacheError, match=message):
        Comparer().compare([(kr2, kreader)], (1, 2), "KReader")


def test_a_mean_is_tested_on_the_means_of_its_columns(tmp_path: Path) -> None:
    """Over examples: every column weighs the same, however many examples it has. Over seeds: each seed's own mean."""
    columns = {"piqa": ([False] * 5 + [True] * 5, [True] * 8 + [False] * 2), "swag": ([True, False], [False, False])}
    scores = {"piqa": ((0.5, 0.52, 0.53), (0.61, 0.6, 0.66)), "swag": ((0.7, 0.71, 0.74), (0.69, 0.73, 0.75))}
    for task, (theirs, ours) in columns.items():
        for seed in (1, 2, 3):
            make_run(tmp_path, f"{task}/kreader-x-11111111", seed, scores[task][0][seed - 1], right=theirs)
            make_run(tmp_path, f"{task}/kr2-x-22222222", seed, scores[task][1][seed - 1], method="kr2", right=ours)
    found = {made.folder: made for made in collect(tmp_path).configurations}
    pairs = [(found[f"{task}/kr2-x-22222222"], found[f"{task}/kreader-x-11111111"]) for task in columns]
    made = Comparer().compare(pairs, (1, 2, 3), "KReader")
    moved = []
    for theirs, ours in columns.values():
        moved += [(int(b) - int(a)) / len(theirs) for a, b in zip(theirs, ours, strict=True) if a != b]
    patterns = itertools.product((1, -1), repeat=len(moved))
    totals = [abs(sum(sign * one for sign, one in zip(signs, moved, strict=True))) for signs in patterns]
    assert made.p_examples == pytest.approx(sum(total >= abs(sum(moved)) - 1e-12 for total in totals) / len(totals))
    assert made.changed == len(moved)
    theirs, ours = (np.mean([scores[task][side] for task in columns], axis=0) for side in (0, 1))
    assert made.difference == pytest.approx(np.mean(ours - theirs))
    t = np.mean(ours - theirs) / (np.std(ours - theirs, ddof=1) / math.sqrt(3))
    assert made.p_seeds == pytest.approx(1 - t / math.sqrt(2 + t * t))
