"""What a run answered on each example, and scores of the whole split as functions of sums over its examples.

Sums are quick to compute again when two runs swap their answers on some examples.

Letters: n examples, k sums, K labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kr2cache.errors import CacheError
from kr2cache.report.records import Run
from kr2cache.training.runs import RunFolder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """Gold labels and predictions of one run, sorted by id."""

    gold: Sequence[Any]
    predicted: Sequence[Any]
    ids_digest: str
    gold_digest: str

    @cached_property
    def right(self) -> FloatArray:
        """(n,) right answers: right words of a sentence; else 1 if the label is right, or 0.

        Raises:
            CacheError: If a sentence has more or fewer predictions than words.
        """
        import numpy as np

        return np.array([_right(*pair) for pair in zip(self.gold, self.predicted, strict=True)], dtype=np.float64)

    @property
    def count(self) -> int:
        """Words of all sentences, or examples."""
        return sum(len(gold) if isinstance(gold, list) else 1 for gold in self.gold)


def read_answers(run: Run) -> Answers:
    """Read the predictions of a run.

    Raises:
        CacheError: If the file is missing or malformed.
    """
    folder = RunFolder(run.path)
    shown = "/".join(folder.predictions_file(run.split).parts[-4:])
    rows: list[tuple[str, Any, Any]] = []
    try:
        for row in folder.read_predictions(run.split):
            rows.append((str(row["id"]), row["gold"], row["predicted"]))
    except FileNotFoundError:
        raise CacheError(f"{shown} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{shown} is malformed after line {len(rows)} ({error!r})") from error
    rows.sort(key=lambda row: row[0])
    return Answers(
        gold=[gold for _, gold, _ in rows],
        predicted=[predicted for *_, predicted in rows],
        ids_digest=_digest([name for name, *_ in rows]),
        gold_digest=_digest([gold for _, gold, _ in rows]),
    )


def _right(gold: Any, predicted: Any) -> float:
    if not isinstance(gold, list):
        return float(predicted is not None and gold == predicted)
    if len(gold) != len(predicted):
        raise CacheError(f"a sentence of {len(gold)} words has {len(predicted)} predictions")
    return float(sum(tag is not None and word == tag for word, tag in zip(gold, predicted, strict=True)))


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@dataclass(frozen=True)
class SummedScore:
    """A score that depends on its examples through sums alone."""

    of_examples: Callable[[Sequence[Any]], FloatArray]
    """Predictions of the n examples to what is summed, (n, k)."""
    of_sums: Callable[[FloatArray], FloatArray]
    """(..., k) sums over the examples to (...) scores."""


def summed_score(kind: str, metric: str, gold: Sequence[Any], names: Sequence[str]) -> SummedScore | None:
    """The metric, for given gold labels; None if right answers stand for it.

    Args:
        kind: Of the task; empty if the run did not record it.
        names: All labels, in the task's order; empty if the run did not record them.

    Raises:
        CacheError: If it is not known how the metric depends on single examples.
    """
    if kind in ("multilabel", "classification") and not names:
        raise CacheError("an older version trained them and did not record the labels")
    if kind == "regression":
        if metric not in ("pearson", "spearman"):
            raise CacheError(f"no test over examples is known for {metric}")
        return _correlation(gold, by_rank=metric == "spearman")
    if kind == "multilabel":
        if metric not in ("micro_f1", "macro_f1", "accuracy"):
            raise CacheError(f"no test over examples is known for {metric}")
        return _all_right(gold) if metric == "accuracy" else _f1(gold, names, micro=metric == "micro_f1")
    if kind == "classification" and metric == "macro_f1":
        return _f1(gold, names, skip_absent=True)
    if kind == "classification" and metric == "f1" and len(names) == 2:
        return _f1(gold, names[1:])
    if kind == "classification" and metric == "matthews":
        return _matthews(gold, names)
    return None


def _all_right(gold: Sequence[Any]) -> SummedScore:
    """The share of examples whose labels are all right."""
    import numpy as np

    return SummedScore(
        of_examples=lambda predicted: np.array(
            [[set(a) == set(b)] for a, b in zip(gold, predicted, strict=True)], dtype=np.float64
        ),
        of_sums=lambda sums: sums[..., 0] / len(gold),
    )


def _correlation(gold: Sequence[float], *, by_rank: bool) -> SummedScore:
    """Pearson's r, or Spearman's: the same of ranks. Each run's predictions are ranked once, before answers swap."""
    import numpy as np
    from scipy import stats

    values = np.asarray(stats.rankdata(gold) if by_rank else gold, dtype=np.float64)
    middle = values.mean()
    centred = values - middle

    def of_examples(predicted: Sequence[float]) -> FloatArray:
        own = np.asarray(stats.rankdata(predicted) if by_rank else predicted, dtype=np.float64) - middle
        summed: FloatArray = np.stack([own, own**2, own * centred], axis=1)
        return summed

    def of_sums(sums: FloatArray) -> FloatArray:
        spread = (sums[..., 1] - sums[..., 0] ** 2 / len(gold)).clip(min=0) * (centred**2).sum()
        return _ratio(sums[..., 2], np.sqrt(spread))

    return SummedScore(of_examples, of_sums)


def _f1(gold: Sequence[Any], names: Sequence[str], *, micro: bool = False, skip_absent: bool = False) -> SummedScore:
    """F1 of these labels: of all together (micro), or the mean over labels.

    Args:
        skip_absent: Leave a label that is neither gold nor predicted out of the mean. Otherwise its F1 is 0.
    """
    import numpy as np

    present = _indicators(gold, names)
    gold_K = present.sum(axis=0)
    K = len(names)

    def of_examples(predicted: Sequence[Any]) -> FloatArray:
        given = _indicators(predicted, names)
        return np.concatenate([given * present, given], axis=1)

    def of_sums(sums: FloatArray) -> FloatArray:
        hits, both = 2 * sums[..., :K], sums[..., K:] + gold_K
        if micro:
            return _ratio(hits.sum(axis=-1), both.sum(axis=-1))
        counted = np.maximum(1, (both > 0).sum(axis=-1)) if skip_absent else K
        mean: FloatArray = _ratio(hits, both).sum(axis=-1) / counted
        return mean

    return SummedScore(of_examples, of_sums)


def _matthews(gold: Sequence[str], names: Sequence[str]) -> SummedScore:
    """Matthews' correlation of K labels (Gorodkin 2004, "Comparing two K-category assignments by a K-category
    correlation coefficient")."""
    import numpy as np

    present, n = _indicators(gold, names), len(gold)
    gold_K = present.sum(axis=0)

    def of_examples(predicted: Sequence[str]) -> FloatArray:
        given = _indicators(predicted, names)
        return np.concatenate([(given * present).sum(axis=1, keepdims=True), given], axis=1)

    def of_sums(sums: FloatArray) -> FloatArray:
        right, given_K = sums[..., 0], sums[..., 1:]
        spread = (n**2 - (given_K**2).sum(axis=-1)) * (n**2 - (gold_K**2).sum())
        return _ratio(right * n - given_K @ gold_K, np.sqrt(spread))

    return SummedScore(of_examples, of_sums)


def _indicators(labels: Sequence[Any], names: Sequence[str]) -> FloatArray:
    """(n, K) of 0 and 1: the labels that each example has."""
    import numpy as np

    places = {name: place for place, name in enumerate(names)}
    indicators = np.zeros((len(labels), len(names)))
    for row, own in zip(indicators, labels, strict=True):
        row[[places[one] for one in (own if isinstance(own, list) else [own]) if one in places]] = 1.0
    return indicators


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    """0 where ``below`` is 0."""
    import numpy as np

    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 1e-9)
