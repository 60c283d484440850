"""The metrics of declared tasks are those of scikit-learn, SciPy and seqeval."""

from __future__ import annotations

import itertools
import random
import warnings
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
from scipy import stats
from sklearn import metrics as sk

from kr2cache.tasks import find_task
from kr2cache.tasks.metrics import METRICS, metric_names

DRAW = random.Random(3)
CLASSIFICATION = {"kind": "classification", "text": "x", "label": "y"}
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def score(gold: Any, predicted: Any, **words: Any) -> dict[str, float]:
    return find_task("mine", {"mine": words}).score(gold, predicted)


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_classification(labels: int) -> None:
    gold, predicted = ([DRAW.randrange(labels) for _ in range(40)] for _ in range(2))
    expected = {
        "accuracy": sk.accuracy_score(gold, predicted),
        "macro_f1": sk.f1_score(gold, predicted, average="macro"),
        "matthews": sk.matthews_corrcoef(gold, predicted),
    }
    if labels == 2:
        expected["f1"] = sk.f1_score(gold, predicted)
    names = [f"l{number}" for number in range(labels)]
    assert score(gold, predicted, **CLASSIFICATION, labels=names) == pytest.approx(expected, abs=1e-12)


def test_multilabel() -> None:
    names = ["a", "b", "c", "d"]
    rows = [tuple(i for i in range(4) if DRAW.random() < 0.4) for _ in range(60)]
    gold, predicted = rows[:30], rows[30:]
    right, answered = (np.array([[i in row for i in range(4)] for row in one]) for one in (gold, predicted))
    assert score(gold, predicted, kind="multilabel", text="x", label="y", labels=names) == pytest.approx(
        {
            "micro_f1": sk.f1_score(right, answered, average="micro"),
            "macro_f1": sk.f1_score(right, answered, average="macro"),
            "accuracy": sk.accuracy_score(right, answered),
        },
        abs=1e-12,
    )


def test_regression() -> None:
    gold, predicted = ([round(DRAW.uniform(0, 5), 1) for _ in range(30)] for _ in range(2))
    words = {"kind": "regression", "text": "x", "label": "y"}
    assert score(gold, predicted, **words) == pytest.approx(
        {"pearson": stats.pearsonr(gold, predicted)[0], "spearman": stats.spearmanr(gold, predicted)[0]}, abs=1e-12
    )
    for constant in ([2.5] * 30, [2.5, *[2.5 + 1e-16] * 29]):
        assert score(gold, constant, **words) == {"pearson": 0, "spearman": 0}
    assert score(gold[:1], predicted[:1], **words) == {"pearson": 0, "spearman": 0}


def tagged(cut: float) -> tuple[list[tuple[int, ...]], list[list[int | None]]]:
    lengths = [DRAW.randint(1, 12) for _ in range(25)]
    gold = [tuple(DRAW.randrange(5) for _ in range(length)) for length in lengths]
    predicted = [
        [None if DRAW.random() < cut else tag if DRAW.random() < 0.7 else DRAW.randrange(5) for tag in tags]
        for tags in gold
    ]
    return gold, predicted


@pytest.mark.parametrize("cut", [0.0, 0.2, 1.0])
def test_entities(cut: float) -> None:
    gold, predicted = tagged(cut)
    right = [[NAMES[tag] for tag in tags] for tags in gold]
    answered = [["O" if tag is None else NAMES[tag] for tag in tags] for tags in predicted]
    flat = list(itertools.chain(*gold)), list(itertools.chain(*predicted))
    words = {"kind": "tagging", "words": "x", "label": "y", "scheme": "BIO", "labels": NAMES}
    with warnings.catch_warnings(action="ignore"):  # seqeval warns if no entity is predicted
        expected = {
            "f1": seqeval.metrics.f1_score(right, answered),
            "precision": seqeval.metrics.precision_score(right, answered),
            "recall": seqeval.metrics.recall_score(right, answered),
            "accuracy": sum(a == b for a, b in zip(*flat, strict=True)) / len(flat[0]),
            "cut_off_words": sum(tag is None for tag in flat[1]),
        }
    assert score(gold, predicted, **words) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cut", [0.0, 0.2])
def test_words(cut: float) -> None:
    gold, predicted = tagged(cut)
    flat = list(itertools.chain(*gold)), [9 if tag is None else tag for tag in itertools.chain(*predicted)]
    each = [
        2 * hits / total
        for label in range(5)
        if (total := flat[0].count(label) + flat[1].count(label))
        and (hits := sum(a == b == label for a, b in zip(*flat, strict=True))) is not None
    ]
    expected = {
        "accuracy": sk.accuracy_score(*flat),
        "macro_f1": sum(each) / len(each),
        "cut_off_words": flat[1].count(9),
    }
    if not cut:
        assert expected["macro_f1"] == pytest.approx(sk.f1_score(*flat, average="macro"))
    words = {"kind": "tagging", "words": "x", "label": "y", "labels": NAMES}
    assert score(gold, predicted, **words) == pytest.approx(expected, abs=1e-12)


def test_choice() -> None:
    words = {"kind": "choice", "choices": ["a", "b", "c"], "label": "y"}
    assert score([0, 1, 2, 2], [0, 2, 2, 2], **words) == {"accuracy": 0.75}


@pytest.mark.parametrize("gold", [[0, 0], [0, 1]])
def test_one_answer_for_all(gold: list[int]) -> None:
    """Metrics that are not defined are 0, and nothing warns."""
    result = score(gold, [0, 0], **CLASSIFICATION, labels=["a", "b"])
    assert result["matthews"] == result["f1"] == 0


def test_every_metric_that_may_decide_is_given() -> None:
    of_kind: dict[str, tuple[Any, Any]] = {
        "classification": ([0, 1], [0, 1]),
        "multilabel": ([(0,), (1,)], [(0,), ()]),
        "regression": ([1.0, 2.0], [2.0, 3.0]),
        "choice": ([0], [1]),
        "tagging": ([(0, 1)], [[0, None]]),
    }
    place = {"tagging": {"words": "x"}, "choice": {"choices": ["a", "b"]}}
    assert METRICS.keys() - {"text"} == of_kind.keys()
    for kind, (gold, predicted) in of_kind.items():
        for scheme in ("", "BIO") if kind == "tagging" else ("",):
            labels = {} if kind in ("regression", "choice") else {"labels": ["O", "B-X"]}
            scheme_word = {"scheme": scheme} if scheme else {}
            for metric in metric_names(kind, scheme, labels.get("labels", [])):  # type: ignore[arg-type]
                words = place.get(kind, {"text": "x"}) | labels | scheme_word
                task = find_task("mine", {"mine": {"kind": kind, "label": "y", "metric": metric, **words}})
                assert task.metric == metric
                assert metric in task.score(gold, predicted)
