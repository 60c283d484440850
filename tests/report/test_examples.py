"""Scores as functions of sums over examples, and the permutation test that swaps answers: against scikit-learn and
SciPy."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import make_run
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from kr2cache.errors import CacheError
from kr2cache.report.collect import collect
from kr2cache.report.examples import summed_score
from kr2cache.report.significance import Comparer, Comparison

NAMES = ("anger", "fear", "joy")


def _sets(answers: Sequence[Sequence[str]]) -> list[list[int]]:
    return [[int(name in one) for name in NAMES] for one in answers]


SCORES: dict[tuple[str, str], Callable[[Any, Any], float]] = {
    ("regression", "pearson"): lambda gold, own: stats.pearsonr(gold, own).statistic,
    ("regression", "spearman"): lambda gold, own: stats.spearmanr(gold, own).statistic,
    ("multilabel", "micro_f1"): lambda gold, own: f1_score(_sets(gold), _sets(own), average="micro", zero_division=0),
    ("multilabel", "macro_f1"): lambda gold, own: f1_score(_sets(gold), _sets(own), average="macro", zero_division=0),
    ("multilabel", "accuracy"): lambda gold, own: np.mean([set(a) == set(b) for a, b in zip(gold, own, strict=True)]),
    ("classification", "macro_f1"): lambda gold, own: f1_score(gold, own, average="macro", zero_division=0),
    ("classification", "matthews"): matthews_corrcoef,
    ("classification", "f1"): lambda gold, own: f1_score(gold, own, pos_label="fear", zero_division=0),
}


def drawn(kind: str, metric: str, seed: int, n: int) -> tuple[tuple[str, ...], list[Any]]:
    """The labels of a task, and n answers."""
    draw = random.Random(seed)
    if kind == "regression":
        return (), [round(draw.gauss(0, 2), 1) for _ in range(n)]
    names = NAMES[:2] if metric == "f1" else NAMES
    if kind == "multilabel":
        return names, [sorted(draw.sample(names, draw.randrange(4))) for _ in range(n)]
    return names, [draw.choice(names) for _ in range(n)]


@pytest.mark.parametrize(("kind", "metric"), SCORES)
@pytest.mark.parametrize("n", [3, 40])
def test_the_score_of_the_sums_is_the_score(kind: str, metric: str, n: int) -> None:
    for seed in range(5):
        (names, gold), (_, own) = (drawn(kind, metric, seed + start, n) for start in (0, 50))
        score = summed_score(kind, metric, gold, names)
        assert score is not None
        found = float(score.of_sums(score.of_examples(own).sum(axis=0)))
        assert found == pytest.approx(SCORES[kind, metric](gold, own), abs=1e-9)


def test_the_correlation_of_equal_predictions_is_zero() -> None:
    score = summed_score("regression", "pearson", [1.0, 2.0, 4.0], ())
    assert score is not None
    assert float(score.of_sums(score.of_examples([3.3, 3.3, 3.3]).sum(axis=0))) == 0.0


def compared(
    folder: Path, kind: str, metric: str, n: int, seeds: tuple[int, ...] = (1, 2, 3)
) -> tuple[Any, Comparison]:
    """Two configurations on one task: their answers (gold, ours, theirs of each seed), and how they compare."""
    names, gold = drawn(kind, metric, 0, n)
    answers: list[list[list[Any]]] = [[], []]
    for side, name in enumerate(("kr2-x-22222222", "kreader-x-11111111")):
        for seed in seeds:
            own = drawn(kind, metric, 10 * seed + side, n)[1]
            if side == 0 and n > 20:  # ours are better
                own = [
                    right if number % 3 else other for number, (right, other) in enumerate(zip(gold, own, strict=True))
                ]
            answers[side].append(own)
            recorded = {"task": {"kind": kind, "labels": list(names)}}
            score = SCORES[kind, metric](gold, own)
            path = make_run(folder, f"task/{name}", seed, 0.5, settings={"metric": metric}, recorded=recorded)
            (path / "metrics.json").write_text(json.dumps({"test": {metric: float(score)}}), "utf-8")
            rows = [{"id": f"e{i}", "gold": a, "predicted": b} for i, (a, b) in enumerate(zip(gold, own, strict=True))]
            (path / "predictions-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    kr2, kreader = collect(folder).configurations
    return (gold, *answers), Comparer().compare([(kr2, kreader)], seeds, "KReader")


@pytest.mark.parametrize(("kind", "metric"), [one for one in SCORES if one[1] != "spearman"])
def test_p_is_that_of_all_swaps(tmp_path: Path, kind: str, metric: str) -> None:
    """All 32 swaps of five examples, each score computed anew. Seeds swap together."""
    (gold, ours, theirs), found = compared(tmp_path, kind, metric, 5)
    score = SCORES[kind, metric]

    def difference(swaps: Sequence[bool]) -> float:
        total = 0.0
        for a, b in zip(ours, theirs, strict=True):
            sides = [
                [y if swap else x for x, y, swap in zip(one, other, swaps, strict=True)]
                for one, other in ((a, b), (b, a))
            ]
            total += score(gold, sides[0]) - score(gold, sides[1])
        return total

    all_swaps = [difference(swaps) for swaps in itertools.product((False, True), repeat=5)]
    assert found.p_examples == pytest.approx(np.mean(np.abs(all_swaps) >= abs(all_swaps[0]) - 1e-9))
    assert found.difference == pytest.approx(all_swaps[0] / 3)


@pytest.mark.filterwarnings("ignore")
def test_p_of_many_examples_is_near_scipys(tmp_path: Path) -> None:
    (gold, ours, theirs), found = compared(tmp_path, "regression", "pearson", 30, (1,))

    def statistic(a: Any, b: Any) -> float:
        return float(stats.pearsonr(gold, a).statistic - stats.pearsonr(gold, b).statistic)

    expected = stats.permutation_test(
        (ours[0], theirs[0]), statistic, permutation_type="samples", n_resamples=1_500, rng=np.random.default_rng(1)
    )
    assert 0.001 < expected.pvalue < 0.2, "or it would show little"
    assert found.p_examples == pytest.approx(expected.pvalue, abs=0.02)


@pytest.mark.parametrize(("kind", "metric"), [("regression", "rmse"), ("multilabel", "hamming")])
def test_a_metric_that_is_no_known_sum_is_not_tested(kind: str, metric: str) -> None:
    with pytest.raises(CacheError, match=f"no test over examples is known for {metric}"):
        summed_score(kind, metric, [], NAMES)
