"""Check that readers can learn the labels of a task and be scored on them, before anything long starts.

The files of a task were read and checked before. A task from another package, or from Python, can give any label, and
the loss or the score would fail only after caches were made or a reader was trained.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from kr2cache.errors import ConfigError, DataError, error_text
from kr2cache.system.console import count_text
from kr2cache.tasks import Example, Task
from kr2cache.tasks.base import Kind, Prediction

BY_NAME: tuple[Kind, ...] = ("tagging", "classification", "choice")
"""Kinds whose answer is one of the labels."""
TRIED = 64
"""Examples on which the task's score is tried."""


def check_labels(task: Task, splits: Mapping[str, Sequence[Example]], *, whole: bool) -> list[str]:
    """Check the labels of ``train`` and of the splits that are scored.

    Args:
        splits: Their examples, all with gold labels.
        whole: Whether these are all training examples, not the first ones of a larger split.

    Returns:
        Notes about labels that can be used but look wrong.

    Raises:
        DataError: For a label that does not fit the task's kind, and for a whole train split with one label.
        ConfigError: For a task with one label, or a task that cannot be scored.
    """
    if task.kind in BY_NAME and len(task.labels) < 2:
        raise ConfigError(
            f"Task {task.name!r} has {count_text(len(task.labels), 'label')} ({', '.join(task.labels) or 'none'}): "
            "there is nothing to learn.",
            "A task needs two labels or more. Check the column of its labels.",
        )
    if task.metric in task.counts:
        raise ConfigError(
            f"The metric of task {task.name!r} that decides is {task.metric!r}, one of its counts.",
            "Let a score decide that is a fraction (the attribute metric of the task).",
        )
    for split, examples in splits.items():
        for example in examples:
            if (fault := _fault(task, example)) is not None:
                raise DataError(
                    f"Example {example.id!r} of the {split} split cannot be used: {fault}.",
                    f"Task {task.name!r} is of kind {task.kind}: check its labels ({task.labelled_by}).",
                )
        if split != "train":
            _check_score(task, examples)
    notes = []
    for split, examples in splits.items():
        only = _only_label(task, examples)
        if only is not None and split == "train":
            said = f"All {len(examples)} training examples have the label {only}: there is nothing to learn."
            if whole:
                raise DataError(said, "Check the data.")
            notes.append(f"{said} --limit and --train-limit take the first examples of the file.")
        elif only is not None and task.kind == "regression":
            notes.append(f"All values of the {split} split are {only}: no correlation with them is defined (scored 0).")
    return notes + _unseen(task, splits)


def _fault(task: Task, example: Example) -> str | None:
    """Why this label does not fit the kind of the task, as the rest of a sentence."""
    label, labels = example.label, len(task.labels)
    texts = labels if task.kind == "choice" else 1
    if len(example.texts) != texts:
        return f"it has {count_text(len(example.texts), 'text')}, not {texts}"
    if task.kind == "regression":
        if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
            return f"its value is {label!r}, not a finite number"
        return None
    several = task.kind in ("tagging", "multilabel")
    if isinstance(label, tuple) != several:
        return f"its label is {label!r}, not {'a tuple of label numbers' if several else 'a label number'}"
    for one in label if isinstance(label, tuple) else (label,):
        if type(one) is not int or not 0 <= one < labels:
            return f"its label is {one!r}, not a number from 0 to {labels - 1}"
    if not isinstance(label, tuple):
        return None
    if task.kind == "tagging" and len(label) != len(example.texts[0]):
        return f"it has {count_text(len(example.texts[0]), 'word')} and {count_text(len(label), 'label')}"
    if task.kind == "multilabel" and any(one >= other for one, other in pairwise(label)):
        return f"its label numbers {label!r} do not rise"
    return None


def _check_score(task: Task, examples: Sequence[Example]) -> None:
    """Score gold labels as if they were predictions, and the predictions of a reader that learned nothing: the score
    must have the metric that decides, and no others than numbers.
    """
    gold: list[Any] = [example.label for example in examples[:TRIED]]
    right = [list(one) if task.kind == "tagging" else one for one in gold]
    for what, predicted in (("its own gold labels", right), ("predictions that are all alike", _alike(task, gold))):
        try:
            with warnings.catch_warnings(action="ignore"):  # a few examples may lack labels
                found = task.score(gold, predicted)
            if task.metric not in found:
                raise ValueError(f"it has no {task.metric!r}, only {', '.join(found) or 'nothing'}")
            for name, value in found.items():
                if not isinstance(value, (int, float)):
                    raise TypeError(f"{name} is {value!r}, not a number")
        except Exception as error:  # a task of the user's own can raise anything
            raise ConfigError(
                f"The score of task {task.name!r} fails on {what}: {error_text(error)}",
                "Correct the method score of the task.",
            ) from error


def _alike(task: Task, gold: Sequence[Any]) -> list[Prediction]:
    """What a reader that learned nothing may predict: one answer for all examples. A word may have no prediction."""
    if task.kind == "tagging":
        return [[None, *[0] * (len(one) - 1)] for one in gold]
    answer: Prediction = () if task.kind == "multilabel" else 0.0 if task.kind == "regression" else 0
    return [answer] * len(gold)


def _only_label(task: Task, examples: Sequence[Example]) -> str | None:
    """The label that all examples have; None if there are two or more, or if the kind does not ask for it."""
    if task.kind not in ("classification", "regression") or len({example.label for example in examples}) > 1:
        return None
    return str(task.named(examples[0].label))


def _unseen(task: Task, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """One note for each split that has labels which no training example has. A reader can hardly give them."""
    if task.kind not in ("classification", "multilabel"):
        return []
    seen = _used(splits["train"])
    notes = []
    for split, examples in splits.items():
        if unseen := sorted(_used(examples) - seen):
            names = ", ".join(task.labels[number] for number in unseen)
            notes.append(f"No training example has these labels of the {split} split: {names}.")
    return notes


def _used(examples: Iterable[Example]) -> set[int]:
    """The numbers of all labels of classification or multilabel that these examples have."""
    used: set[int] = set()
    for example in examples:
        used.update(example.label if isinstance(example.label, tuple) else {example.label})  # type: ignore[arg-type]
    return used
