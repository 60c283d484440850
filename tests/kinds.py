"""Tasks of the kinds that no task of the package has: values (regression) and sets of labels (multilabel)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
from scipy.stats import pearsonr
from sklearn.metrics import f1_score

from kr2cache.tasks.base import Example, Kind
from kr2cache.tasks.rows import Row, RowTask

MOODS = ("anger", "joy", "fear")


class Ratings(RowTask):
    """A pair of texts, and how alike they are."""

    name = "ratings"
    about = "how alike are two texts?"
    kind: Kind = "regression"
    labels = ()
    template = "one, two"
    columns = ("one", "two")
    suffixes = (".jsonl",)
    metric = "pearson"

    def example(self, row: Row) -> Example:
        return Example(row.id("id"), ((row.text("one"), row.text("two")),), row.values.get("value"))

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        return {"pearson": float(pearsonr(gold, predicted).statistic)}


class Moods(RowTask):
    """A text, and its moods: any number of them."""

    name = "moods"
    about = "the moods of a text"
    kind: Kind = "multilabel"
    labels = MOODS
    template = "text"
    columns = ("text",)
    suffixes = (".jsonl",)
    metric = "micro_f1"

    def example(self, row: Row) -> Example:
        moods = row.values.get("moods")
        label = None if moods is None else tuple(sorted(map(self.labels.index, moods)))
        return Example(row.id("id"), ((row.text("text"),),), label)

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        sets = [[[int(label in one) for label in range(len(MOODS))] for one in side] for side in (gold, predicted)]
        return {
            "micro_f1": float(f1_score(*sets, average="micro", zero_division=0)),
            "accuracy": sum(a == b for a, b in zip(*sets, strict=True)) / len(gold),
        }


def save_ratings(folder: Path, **counts: int) -> Path:
    """Splits of ``Ratings``: the more words two texts share, the larger the value."""

    def row(draw: random.Random) -> dict[str, Any]:
        one, two = (draw.choices(tiny.WORDS, k=draw.randint(1, 7)) for _ in range(2))
        shared = len({*one} & {*two})
        return {"one": " ".join(one), "two": " ".join(two), "value": shared - 1 + draw.choice((0.0, 0.25, 0.5))}

    return _save(folder, row, counts)


def save_moods(folder: Path, **counts: int) -> Path:
    """Splits of ``Moods``: each mood has its word."""

    def row(draw: random.Random) -> dict[str, Any]:
        words = draw.choices(tiny.WORDS[: len(MOODS) + 1], k=draw.randint(1, 5))
        moods = [mood for mood, word in zip(MOODS, tiny.WORDS, strict=False) if word in words]
        return {"text": " ".join(words), "moods": moods}

    return _save(folder, row, counts)


def _save(folder: Path, row: Any, counts: dict[str, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(({"train": 24, "dev": 8, "test": 10} | counts).items()):
        draw = random.Random(seed)
        lines = [json.dumps({"id": f"{split}-{number}"} | row(draw)) + "\n" for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    return folder
