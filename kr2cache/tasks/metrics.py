"""The metrics of each kind of task, by scikit-learn, SciPy and seqeval.

Where a metric is not defined, its value is 0: a correlation of predictions that are all equal, for example.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from kr2cache.tasks.base import Kind, Prediction

SCHEMES = ("BIO",)
"""How labels mark the words of an entity. BIO: ``B-PER`` begins a person, ``I-PER`` continues it, ``O`` is outside."""
OUTSIDE = "O"
NONE = -1
"""Stands for the label of a word without a prediction."""
METRICS: dict[Kind, tuple[str, ...]] = {
    "tagging": ("accuracy", "macro_f1"),
    "classification": ("accuracy", "macro_f1", "matthews"),
    "multilabel": ("micro_f1", "macro_f1", "accuracy"),
    "regression": ("pearson", "spearman"),
    "choice": ("accuracy",),
    "text": (),
}
"""The metrics of each kind; the first decides unless the task says otherwise."""
ENTITIES = ("f1", "precision", "recall", "accuracy")
"""The metrics of tagging with a scheme."""


def metric_names(kind: Kind, scheme: str, labels: Sequence[str]) -> tuple[str, ...]:
    """The metrics of a task.

    Args:
        kind: The task's.
        scheme: One of ``SCHEMES``; empty for none.
        labels: The task's; empty if they are not known yet.
    """
    if kind == "tagging" and scheme:
        return ENTITIES
    if kind == "classification" and len(labels) in (0, 2):
        return (*METRICS[kind], "f1")
    return METRICS[kind]


def score(
    kind: Kind, scheme: str, labels: Sequence[str], gold: Sequence[Any], predicted: Sequence[Prediction]
) -> dict[str, float]:
    """The metrics of a task of this kind, as fractions; for tagging also ``cut_off_words``.

    Args:
        gold: One label for each example.
        predicted: One prediction for each example.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries warn where a metric is not defined
        if kind == "tagging":
            return _of_words(scheme, labels, gold, predicted)
        if kind == "multilabel":
            return _of_sets(len(labels), gold, predicted)
        if kind == "regression":
            return _of_values(gold, predicted)
        result = {"accuracy": float(np.mean(np.asarray(gold) == np.asarray(predicted)))}
        return result if kind == "choice" else result | _of_classes(len(labels), gold, predicted)


def _of_classes(labels: int, gold: Sequence[int], predicted: Sequence[Any]) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    result = {
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(gold, predicted)),
    }
    if labels == 2:  # of the second label, as GLUE has it for pairs of sentences
        result["f1"] = float(f1_score(gold, predicted, average="binary", pos_label=1, zero_division=0))
    return result


def _of_sets(labels: int, gold: Sequence[tuple[int, ...]], predicted: Sequence[Any]) -> dict[str, float]:
    from sklearn.metrics import f1_score

    right, answered = np.zeros((2, len(gold), labels), dtype=np.int8)
    for matrix, rows in ((right, gold), (answered, predicted)):
        for row, numbers in zip(matrix, rows, strict=True):
            row[list(numbers)] = 1
    return {
        "micro_f1": float(f1_score(right, answered, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(right, answered, average="macro", zero_division=0)),
        "accuracy": float((right == answered).all(axis=1).mean()),
    }


def _of_values(gold: Sequence[float], predicted: Sequence[Any]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return dict.fromkeys(METRICS["regression"], 0.0)
    values = {"pearson": pearsonr(gold, predicted), "spearman": spearmanr(gold, predicted)}
    return {name: float(np.nan_to_num(value.statistic)) for name, value in values.items()}


def _of_words(
    scheme: str, labels: Sequence[str], gold: Sequence[Sequence[int]], predicted: Sequence[Any]
) -> dict[str, float]:
    from sklearn.metrics import f1_score

    flat = np.array(list(itertools.chain.from_iterable(gold)))
    tags = [NONE if tag is None else tag for tag in itertools.chain.from_iterable(predicted)]
    answers = np.array(tags)
    accuracy = float(np.mean(flat == answers))
    cut_off = int(np.sum(answers == NONE))
    if scheme:
        return {**_of_entities(labels, gold, predicted), "accuracy": accuracy, "cut_off_words": cut_off}
    known = sorted({*flat.tolist(), *tags} - {NONE})
    macro = float(f1_score(flat, answers, labels=known, average="macro", zero_division=0))
    return {"accuracy": accuracy, "macro_f1": macro, "cut_off_words": cut_off}


def _of_entities(labels: Sequence[str], gold: Sequence[Sequence[int]], predicted: Sequence[Any]) -> dict[str, float]:
    """As conlleval counts: an entity is right if its type, its first word and its last word are right."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    right = [[labels[tag] for tag in tags] for tags in gold]
    answered = [[OUTSIDE if tag is None else labels[tag] for tag in tags] for tags in predicted]
    precision, recall, f1, _ = precision_recall_fscore_support(right, answered, average="micro", zero_division=0)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
