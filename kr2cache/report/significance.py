"""Is a difference between two configurations more than noise? Two paired tests, and both have to say so.

Over examples: what if the two models had been swapped on any example (a sign-flip permutation test)? It knows nothing
of the spread between seeds. Over seeds: what if the difference of a pair of seeds were as likely to be negative (a
paired t-test)? It knows nothing of the examples, and with three seeds it sees large differences only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.errors import CacheError
from kr2cache.report.records import Configuration, Run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

LEVEL = 0.05
RESAMPLES = 9_999
RNG_SEED = 20_240_501
"""Fixed, so that the same runs give the same report."""

_VALUES_PER_BATCH = 2_000_000
_SAME = 1e-12
"""Scores are fractions: differences closer than this are equal up to rounding."""


@dataclass(frozen=True)
class Comparison:
    """One configuration against its baseline, on the seeds that both have."""

    baseline: str
    """The baseline's row."""
    difference: float
    """Of the mean scores over the common seeds, as a fraction."""
    p_examples: float
    p_seeds: float | None
    """None with a single common seed."""
    seeds: tuple[int, ...]

    @property
    def noise(self) -> bool:
        """The difference could be noise: not both tests are below ``LEVEL``."""
        return self.p_seeds is None or max(self.p_examples, self.p_seeds) >= LEVEL


@dataclass(frozen=True)
class ExampleScores:
    """What one run got right, example by example, sorted by id."""

    right: FloatArray
    """Shape ``(n,)``: right words of a sentence, or 0 and 1 for an example with one label."""
    ids_digest: str
    gold_digest: str


class Comparer:
    """Compares configurations; reads the predictions of a run once, and tests a pair once."""

    def __init__(self) -> None:
        self._examples: dict[Path, ExampleScores] = {}
        self._p_examples: dict[tuple[str, str, tuple[int, ...]], float] = {}

    def compare(
        self, this: Configuration, baseline: Configuration, seeds: Sequence[int], baseline_row: str
    ) -> Comparison:
        """Test ``this`` against ``baseline`` on ``seeds``, which both have finished.

        Raises:
            CacheError: If the two cannot be compared: other examples, other gold labels, unreadable predictions.
        """
        if not seeds:
            raise CacheError("they have no seed in common")
        scored = [f"{one.folder} has {one.metric} on {one.split}" for one in (this, baseline)]
        if (this.split, this.metric) != (baseline.split, baseline.metric):
            raise CacheError(" and ".join(scored))
        if len({one.older(one.metric) for one in (this, baseline)}) > 1:
            raise CacheError("the F1 of one is older than that of the other")
        ours, theirs = (one.values(one.metric, seeds) for one in (this, baseline))
        key = (this.folder, baseline.folder, tuple(seeds))
        if key not in self._p_examples:
            self._p_examples[key] = p_over_examples(self._differences(this, baseline, seeds))
        return Comparison(
            baseline=baseline_row,
            difference=sum(ours) / len(ours) - sum(theirs) / len(theirs),
            p_examples=self._p_examples[key],
            p_seeds=p_over_seeds(ours, theirs),
            seeds=tuple(seeds),
        )

    def _differences(self, this: Configuration, baseline: Configuration, seeds: Sequence[int]) -> FloatArray:
        """Sum over the seeds of right answers of ``this`` minus those of ``baseline``, shape ``(n,)``.

        A sum of whole numbers has no rounding, and the test cares for no constant factor: this is the mean over seeds,
        and for tagging the difference of word accuracies.
        """
        pairs = [(self._scores(this.runs[seed]), self._scores(baseline.runs[seed])) for seed in seeds]
        reference = pairs[0][1]
        for pair in pairs:
            for scores in pair:
                if scores.ids_digest != reference.ids_digest:
                    raise CacheError(f"the example ids of {this.folder} and {baseline.folder} differ")
                if scores.gold_digest != reference.gold_digest:
                    raise CacheError(f"the gold labels of {this.folder} and {baseline.folder} differ")
        differences: FloatArray = sum((ours.right - theirs.right for ours, theirs in pairs), start=0 * reference.right)
        return differences

    def _scores(self, run: Run) -> ExampleScores:
        key = run.path
        if key not in self._examples:
            self._examples[key] = read_examples(run)
        return self._examples[key]


def p_over_examples(differences: FloatArray) -> float:
    """Two-sided p-value of the paired sign-flip permutation test on the sum of ``differences``, shape ``(n,)``.

    Exact where there are fewer sign patterns than ``RESAMPLES``, drawn with a fixed seed otherwise.
    """
    import numpy as np
    from scipy import stats

    # Flipping the sign of zero changes nothing: the test is the same without them, and mostly ten times as quick.
    moved = differences[differences != 0]
    if len(moved) < 2:
        return 1.0
    result = stats.permutation_test(
        (moved,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _VALUES_PER_BATCH // len(moved)),
        rng=np.random.default_rng(RNG_SEED),
    )
    return float(result.pvalue)


def p_over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test on the scores of common seeds, None for fewer than two.

    Where every seed has the same difference, t is infinite: p is 0, or 1 if that difference is zero.
    """
    import numpy as np
    from scipy import stats

    if len(ours) < 2:
        return None
    differences = np.subtract(ours, theirs)
    if np.ptp(differences) <= _SAME:
        return 1.0 if abs(differences[0]) <= _SAME else 0.0
    return float(stats.ttest_rel(ours, theirs).pvalue)


def read_examples(run: Run) -> ExampleScores:
    """The predictions of a run's scored split; a word without a prediction (null) is wrong.

    Raises:
        CacheError: If the file is missing or malformed.
    """
    import numpy as np

    path = run.path / f"predictions-{run.split}.jsonl"
    shown = "/".join(path.parts[-4:])
    rows: list[tuple[str, Any, float]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                rows.append((str(row["id"]), row["gold"], _right(row["gold"], row["predicted"])))
    except FileNotFoundError:
        raise CacheError(f"{shown} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{shown} is malformed after line {len(rows)} ({error!r})") from error
    rows.sort(key=lambda row: row[0])
    return ExampleScores(
        right=np.array([right for _, _, right in rows], dtype=np.float64),
        ids_digest=_digest([name for name, _, _ in rows]),
        gold_digest=_digest([gold for _, gold, _ in rows]),
    )


def _right(gold: Any, predicted: Any) -> float:
    if not isinstance(gold, list):
        return float(predicted is not None and gold == predicted)
    return float(sum(tag is not None and word == tag for word, tag in zip(gold, predicted, strict=True)))


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
