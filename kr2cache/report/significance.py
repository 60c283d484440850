"""Is a difference between two configurations more than noise? Two paired tests must both find it.

The test over examples is a permutation test: it swaps the two models on random examples, and ignores the spread
between seeds. If the score is a mean over examples, a swap flips the sign of a difference; else (a correlation, F1 of
labels) the score is computed again. The test over seeds is a paired t-test, which ignores the examples. The larger of
the two p-values is corrected for the number of comparisons in the table by Holm's method. There is no verdict if the
tests had almost no chance to find a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from kr2cache.errors import CacheError
from kr2cache.report.examples import Answers, SummedScore, read_answers, summed_score
from kr2cache.report.records import Configuration, Run
from kr2cache.system.console import count_text

Place = TypeVar("Place")

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

LEVEL = 0.05
FEWEST_SEEDS = 3
"""Fewer seeds give no verdict: a t-test over two seeds only finds differences of 9 standard deviations or more, and
these are often chance."""
MOST_SPREADS = 5.0
"""The t-test over seeds has no power if it only finds differences of more standard deviations than this."""
RESAMPLES = 9_999
RNG_SEED = 20_240_501
"""Fixed, so that the same runs give the same report."""

_VALUES_PER_BATCH = 2_000_000
_SAME = 1e-12
"""Scores are fractions: differences closer than this are equal up to rounding."""


@dataclass(frozen=True)
class Comparison:
    """One row of a table against its baseline, in one column or in the mean of all columns, on the common seeds."""

    baseline: str
    """Row of the baseline."""
    difference: float
    """Difference of the mean scores over the common seeds, as a fraction."""
    p_examples: float
    p_seeds: float | None
    """None if the t-test cannot be computed: one seed, or no spread between seeds."""
    seeds: tuple[int, ...]
    changed: int
    """Number of examples with different scores."""
    p: float | None = None
    """The larger p, corrected for the number of comparisons; None before ``judge``, and with fewer seeds than
    ``FEWEST_SEEDS``."""
    noise: bool | None = None
    """True: the difference could be noise. False: it is more than noise. None: no verdict."""
    reason: str = ""
    """Why there is no verdict."""


class Comparer:
    """Compares configurations. Each run is read once, and each pair is tested once."""

    def __init__(self) -> None:
        self._answers: dict[Path, Answers] = {}
        self._tested: dict[tuple[tuple[tuple[str, str], ...], tuple[int, ...]], tuple[float, int]] = {}

    def compare(
        self, pairs: Sequence[tuple[Configuration, Configuration]], seeds: Sequence[int], baseline_row: str
    ) -> Comparison:
        """Test the first of each pair against the second on ``seeds``, which all have finished.

        Args:
            pairs: (this, baseline) of one column, or of all columns for their mean.

        Raises:
            CacheError: If the two cannot be compared: examples or gold labels differ, or predictions cannot be read.
        """
        if not seeds:
            raise CacheError("they have no seed in common")
        for this, baseline in pairs:
            if (this.split, this.metric) != (baseline.split, baseline.metric):
                raise CacheError(
                    " and ".join(f"{one.folder} has {one.metric} on {one.split}" for one in (this, baseline))
                )
            if len({one.older(one.metric) for one in (this, baseline)}) > 1:
                raise CacheError("an older version computed the F1 of one of them differently")
        ours, theirs = (
            [fmean(of_seed) for of_seed in zip(*(one.values(one.metric, seeds) for one in side), strict=True)]
            for side in zip(*pairs, strict=True)
        )
        key = (tuple((this.folder, baseline.folder) for this, baseline in pairs), tuple(seeds))
        if key not in self._tested:
            self._tested[key] = self._test(pairs, seeds)
        p_examples, changed = self._tested[key]
        return Comparison(
            baseline=baseline_row,
            difference=fmean(ours) - fmean(theirs),
            p_examples=p_examples,
            p_seeds=p_over_seeds(ours, theirs),
            seeds=tuple(seeds),
            changed=changed,
        )

    def _test(self, pairs: Sequence[tuple[Configuration, Configuration]], seeds: Sequence[int]) -> tuple[float, int]:
        """The p-value of the test over examples, and the number of examples with different scores."""
        import numpy as np

        columns = [self._column(*pair, seeds) for pair in pairs]
        if all(column.score is None for column in columns):
            parts = [column.differences(share=len(columns) > 1) for column in columns]
            differences = np.concatenate(parts)
            return p_over_examples(differences), int(np.count_nonzero(differences))
        return p_over_swaps([column.swapped() for column in columns])

    def _column(self, this: Configuration, baseline: Configuration, seeds: Sequence[int]) -> Column:
        answers = [(self._read(this.runs[seed]), self._read(baseline.runs[seed])) for seed in seeds]
        reference = answers[0][1]
        for one in (one for pair in answers for one in pair):
            if one.ids_digest != reference.ids_digest:
                raise CacheError(f"the example ids of {this.folder} and {baseline.folder} differ")
            if one.gold_digest != reference.gold_digest:
                raise CacheError(f"the gold labels of {this.folder} and {baseline.folder} differ")
        return Column(answers, summed_score(this.kind, this.metric, reference.gold, this.labels))

    def _read(self, run: Run) -> Answers:
        if run.path not in self._answers:
            self._answers[run.path] = read_answers(run)
        return self._answers[run.path]


@dataclass(frozen=True)
class Column:
    """The answers of two configurations to the same examples."""

    answers: Sequence[tuple[Answers, Answers]]
    """Of each seed, (this, baseline)."""
    score: SummedScore | None
    """None if the test is over right answers."""

    def differences(self, *, share: bool) -> FloatArray:
        """Right answers of this minus those of the baseline, summed over seeds, (n,).

        A sum of whole numbers is exact. The test does not depend on constant factors, so the sum stands for the mean
        over seeds, and for tagging for the difference of word accuracies.

        Args:
            share: Divide by the number of answers, so that all columns have the same weight in their mean.
        """
        reference = self.answers[0][1]
        differences = sum((ours.right - theirs.right for ours, theirs in self.answers), start=0 * reference.right)
        return differences / reference.count if share else differences

    def swapped(self) -> Swapped:
        """What the score of each seed is computed from."""
        import numpy as np

        score, count = self.score, self.answers[0][1].count
        if score is None:
            return Swapped(
                ours=np.stack([ours.right[:, None] for ours, _ in self.answers]),
                theirs=np.stack([theirs.right[:, None] for _, theirs in self.answers]),
                of_sums=lambda sums: sums[..., 0] / count,
            )
        return Swapped(
            ours=np.stack([score.of_examples(ours.predicted) for ours, _ in self.answers]),
            theirs=np.stack([score.of_examples(theirs.predicted) for _, theirs in self.answers]),
            of_sums=score.of_sums,
        )


@dataclass(frozen=True)
class Swapped:
    """The sums of one column that change as examples are swapped. S seeds, n examples, k sums."""

    ours: FloatArray
    """(S, n, k)"""
    theirs: FloatArray
    of_sums: Callable[[FloatArray], FloatArray]
    """(..., k) sums over examples to (...) scores."""

    @cached_property
    def moved(self) -> FloatArray:
        """(S, m, k) what ours lose by a swap of each example that changes anything."""
        differences = self.ours - self.theirs
        moved: FloatArray = differences[:, (differences != 0).any(axis=(0, 2))]
        return moved

    def differences(self, swaps: FloatArray) -> FloatArray:
        """(R,) our scores minus theirs, summed over seeds, after each row of swaps: (R, m), 1 to swap, 0 to leave."""
        change = swaps @ self.moved  # (S, R, k)
        ours = self.of_sums(self.ours.sum(axis=1)[:, None] - change)
        theirs = self.of_sums(self.theirs.sum(axis=1)[:, None] + change)
        total: FloatArray = (ours - theirs).sum(axis=0)
        return total


def p_over_swaps(columns: Sequence[Swapped]) -> tuple[float, int]:
    """Two-sided p-value of the paired permutation test on the sum of all columns' differences (Noreen 1989, "Computer
    intensive methods for testing hypotheses"), and the number of examples that a swap changes.

    Exact if there are fewer patterns of swaps than ``RESAMPLES``; otherwise patterns are drawn with a fixed seed.
    """
    import numpy as np

    sizes = [column.moved.shape[1] for column in columns]
    changed = sum(sizes)
    if changed < 2:
        return 1.0, changed
    exact = 2**changed <= RESAMPLES
    draw = np.random.default_rng(RNG_SEED)
    patterns = 2**changed if exact else RESAMPLES
    at_once = max(1, _VALUES_PER_BATCH // changed)

    def statistics(swaps: FloatArray) -> FloatArray:
        parts = np.split(swaps, np.cumsum(sizes)[:-1], axis=1)
        total: FloatArray = sum(
            (column.differences(part) for column, part in zip(columns, parts, strict=True)), start=np.zeros(len(swaps))
        )
        return total

    observed = abs(float(statistics(np.zeros((1, changed)))[0])) * (1 - _SAME) - _SAME
    as_large = 0
    for start in range(0, patterns, at_once):
        numbers = np.arange(start, min(start + at_once, patterns))
        if exact:
            swaps = (numbers[:, None] >> np.arange(changed) & 1).astype(np.float64)
        else:
            swaps = draw.integers(0, 2, (len(numbers), changed)).astype(np.float64)
        as_large += int((np.abs(statistics(swaps)) >= observed).sum())
    return (as_large / patterns if exact else (as_large + 1) / (patterns + 1)), changed


def p_over_examples(differences: FloatArray) -> float:
    """Two-sided p-value of the paired sign-flip permutation test on the sum of ``differences``, shape ``(n,)``.

    Exact if there are fewer sign patterns than ``RESAMPLES``; otherwise patterns are drawn with a fixed seed.
    """
    import numpy as np
    from scipy import stats

    # Flipping the sign of zero changes nothing. Without zeros the test is the same, and usually ten times as fast.
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
    """Two-sided p-value of the paired t-test on the scores of common seeds; None for fewer than two.

    If all seeds have the same difference, the spread is unknown: the result is None, or 1 if the difference is zero.
    """
    import numpy as np
    from scipy import stats

    if len(ours) < 2:
        return None
    differences = np.subtract(ours, theirs)
    if np.ptp(differences) <= _SAME:
        return 1.0 if abs(differences[0]) <= _SAME else None
    return float(stats.ttest_rel(ours, theirs).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order. They keep the chance of at least one false positive below
    the level (Holm 1979, "A simple sequentially rejective multiple test procedure").
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def detectable(seeds: int, level: float) -> float:
    """The smallest difference that a paired t-test over ``seeds`` seeds finds at this level.

    Returns:
        In standard deviations of the seeds' differences.
    """
    from scipy import stats

    return float(stats.t.isf(level / 2, seeds - 1)) / math.sqrt(seeds)


def judge(comparisons: Mapping[Place, Comparison]) -> dict[Place, Comparison]:
    """The comparisons of one table, each with its corrected p and its verdict."""
    tested = {
        place: max(one.p_examples, one.p_seeds)
        for place, one in comparisons.items()
        if one.p_seeds is not None and len(one.seeds) >= FEWEST_SEEDS
    }
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    found = sum(p < LEVEL for p in corrected.values())
    # Holm's level for the first comparison that is not significant.
    level = LEVEL / max(1, len(tested) - found)
    return {place: _judged(one, corrected.get(place), level, len(tested)) for place, one in comparisons.items()}


def _judged(one: Comparison, p: float | None, level: float, comparisons: int) -> Comparison:
    reason = ""
    if len(one.seeds) < FEWEST_SEEDS:
        reason = f"both rows need {FEWEST_SEEDS} or more seeds in common"
    elif p is None:
        reason = "every seed has the same difference, so the spread between seeds is not known"
    elif p < LEVEL:
        return replace(one, p=p, noise=False)
    elif 2.0 ** (1 - one.changed) > level:
        reason = "the two rows differ on too few examples"
    elif (spreads := detectable(len(one.seeds), level)) > MOST_SPREADS:
        reason = (
            f"with {len(one.seeds)} seeds and {count_text(comparisons, 'comparison')} the tests find only differences "
            f"of {spreads:.0f} standard deviations of the seeds' differences; {_enough_seeds(level)} seeds are enough"
        )
    return replace(one, p=p, noise=None if reason else True, reason=reason)


def _enough_seeds(level: float) -> int:
    """The number of seeds that is enough to find a difference of two standard deviations."""
    seeds = FEWEST_SEEDS
    while detectable(seeds, level) > 2:
        seeds += 1
    return seeds
