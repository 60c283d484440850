"""What a data set is, before any model sees it: counts, labels, lengths in words, first examples."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kr2cache.errors import DataError, MissingSplitError
from kr2cache.tasks.base import Example, Task
from kr2cache.tasks.files import SPLITS, is_folder, split_of

FIRST = 3
"""Examples that are shown."""


@dataclass(frozen=True, kw_only=True)
class SplitSurvey:
    """One split."""

    examples: int
    sequences: int
    labelled: int
    labels: dict[str, int] | None
    """How often each label of the task occurs; None for a regression, and if the labels are not known."""
    values: dict[str, float] | None
    """Of a regression: ``min``, ``mean`` and ``max``."""
    median_words: float
    """Of the sequences. Words are the task's own, or what spaces separate."""
    longest_words: int
    longest_id: str
    first: list[dict[str, Any]]
    """``id``, ``texts`` and ``label`` of the first examples."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All splits of a data set."""

    task: Task
    """With its labels, if the data has a train split."""
    corpus: str
    splits: dict[str, SplitSurvey]
    missing: list[str]
    """Splits that the data does not have."""


def survey(task: Task, data: str | None) -> Survey:
    """Read all splits.

    Raises:
        DataError: If a split is malformed, or there is none.
        ConfigError: If the task has no data of its own and none is given.
    """
    path = task.path_of(data)
    splits = SPLITS if path is None or is_folder(path) else (split_of(path),)
    missing: list[str] = []
    found: dict[str, SplitSurvey] = {}
    try:
        task = task.with_labels_of(data)
    except MissingSplitError:  # without a train split, the labels stay unknown
        if "train" in splits and len(splits) == 1:
            raise
    reason: MissingSplitError | None = None
    for split in splits:
        try:
            found[split] = _of_split(task, split, data)
        except MissingSplitError as error:
            reason = reason or error
            missing.append(split)
    if reason is not None and not found:
        raise DataError(reason.message, reason.remedy)
    return Survey(task=task, corpus=task.corpus(data), splits=found, missing=missing)


def _of_split(task: Task, split: str, data: str | None) -> SplitSurvey:
    lengths: list[int] = []
    counts = Counter(dict.fromkeys(range(len(task.labels)), 0))
    values: list[float] = []
    first: list[dict[str, Any]] = []
    labelled = examples = longest = 0
    longest_id = ""
    for example in task.examples(split, data):
        examples += 1
        own = [len(text) if task.words else sum(len(one.split()) for one in text) for text in example.texts]
        lengths += own
        if max(own) > longest:
            longest, longest_id = max(own), example.id
        if len(first) < FIRST:
            first.append(
                {"id": example.id, "texts": [list(text) for text in example.texts], "label": shown(task, example)}
            )
        if example.label is None:
            continue
        labelled += 1
        if task.kind == "regression":
            values.append(float(example.label))  # type: ignore[arg-type]
        else:
            counts.update([example.label] if isinstance(example.label, int) else example.label)  # type: ignore[arg-type]
    known = bool(task.labels) and labelled > 0
    return SplitSurvey(
        examples=examples,
        sequences=len(lengths),
        labelled=labelled,
        labels={name: counts[number] for number, name in enumerate(task.labels)} if known else None,
        values={"min": min(values), "mean": statistics.fmean(values), "max": max(values)} if values else None,
        median_words=statistics.median(lengths),
        longest_words=longest,
        longest_id=longest_id,
        first=first,
    )


def shown(task: Task, example: Example) -> Any:
    """The label of an example by name: one name, a list of names, or a value. None if it has none."""
    label = example.label
    if label is None or task.kind == "regression":
        return label
    return task.labels[label] if isinstance(label, int) else [task.labels[number] for number in label]  # type: ignore[union-attr]
