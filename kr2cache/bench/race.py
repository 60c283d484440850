"""A race: one part of the data path beside its limit and its rivals, which take turns.

Rivals are compared by the medians of their times. The difference between our time and the limit is too small for
that: a machine's speed drifts by more. So they take turns more often, in changing order, or alternate in short slices.
The median of the ratios of neighbouring turns counts.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import binom

from kr2cache.system.device import wait_for_gpu
from kr2cache.system.memory import peak_of

if TYPE_CHECKING:
    from torch import nn

PAIRS = (2, 10)
"""Fewest and most turns of the limit and ours for each turn of a rival."""
PAIRS_S = 6.0
"""After this many seconds, and the fewest turns of ``PAIRS``, it is a rival's turn."""
PAUSE_S = 0.02
"""Seconds of pause that nobody is charged for: our background threads finish their work, so that they do not slow the
limit."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Race:
    """One part of the data path."""

    title: str
    unit: str
    """What is measured, in words."""
    seconds: dict[str, list[float]]
    """Times by contender: limits first, then ours, then rivals. Times at the same position of limits and ours are from
    neighbouring turns."""
    target: float | None
    """Ours should take at most this many times the limit."""
    limits: int = 1
    """How many contenders are limits."""
    things: int = 1
    """How many things a turn handles, such as sequences."""
    allowed: float | None = None
    """Extra seconds that ours may take for each thing. Used instead of ``target`` if the limit is close to zero."""
    peaks: dict[str, int | None] = field(default_factory=dict)
    """Peak memory by contender, in bytes beyond what the process already used."""

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.seconds.items()}

    @property
    def binding(self) -> str:
        """The name of the limit with the slowest median."""
        medians = self.medians
        return max(list(medians)[: self.limits], key=medians.__getitem__)

    @property
    def limit(self) -> float:
        """The median of the slowest limit, in seconds."""
        return self.medians[self.binding]

    @property
    def ours(self) -> str:
        return list(self.seconds)[self.limits]

    @property
    def ratios(self) -> list[float]:
        """Ours over the slowest limit, turn by turn."""
        return [ours / limit for ours, limit in zip(self.seconds[self.ours], self.seconds[self.binding], strict=True)]

    @property
    def ratio(self) -> float:
        """Median of ours over the limit."""
        return statistics.median(self.ratios)

    @property
    def extras(self) -> list[float]:
        """Extra seconds of ours beyond the slowest limit, per thing, turn by turn."""
        pairs = zip(self.seconds[self.ours], self.seconds[self.binding], strict=True)
        return [(ours - limit) / self.things for ours, limit in pairs]

    @property
    def met(self) -> bool:
        """Whether ours meets ``target`` and ``allowed``, if they are set."""
        near = self.target is None or self.ratio <= self.target
        return near and (self.allowed is None or statistics.median(self.extras) <= self.allowed)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Confidence interval of the median of ours over the limit (``median_range``)."""
        return median_range(self.ratios)

    def json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "seconds": self.seconds,
            "medians": self.medians,
            "peak_bytes": self.peaks,
            "limits": self.limits,
            "limit": self.limit,
            "ratio": self.ratio,
            "ratio_range": self.ratio_range,
            "target": self.target,
            "things": self.things,
            "extra": statistics.median(self.extras),
            "extra_range": median_range(self.extras),
            "allowed": self.allowed,
            "met": self.met,
        }


def median_range(values: Sequence[float]) -> tuple[float, float]:
    """Confidence interval of a median by the sign test: each value is above the true median with probability 1/2.

    Fewer than six values cannot reach ``CONFIDENCE``; the interval is then the smallest and the largest value.
    """
    ordered = sorted(values)
    outside = max(0, int(binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5)) - 1)
    return ordered[outside], ordered[-1 - outside]


def race(
    title: str,
    unit: str,
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    target: float | None,
    limits: int = 1,
    things: int = 1,
    allowed: float | None = None,
    close: Callable[[], tuple[float, float]] | None = None,
) -> Race:
    """Let contenders take turns: rivals ``repeats`` times, limits and ours more often. One turn before them measures
    memory only.

    Args:
        contenders: A contender that writes to disk returns the path of its file or folder, which is then removed.
        close: Runs the first limit and ours in alternation (``alternately``) and returns the seconds of each. Not used
            if another limit is slower, such as the disk: the disk would go on while ours stands still.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks, warm_up = {}, {}
    for name, work in contenders.items():
        started = time.perf_counter()
        peaks[name] = peak_of(functools.partial(_once, work))
        warm_up[name] = time.perf_counter() - started
    often, rivals = list(contenders)[: limits + 1], list(contenders)[limits + 1 :]
    if max(often[:-1], key=warm_up.__getitem__) != often[0]:
        close = None
    at_once = (often[0], often[-1]) if close else ()
    least, most = PAIRS
    for _ in range(repeats):
        started = time.monotonic()
        for pair in range(most):
            if pair >= least and time.monotonic() - started > PAIRS_S:
                break
            took = dict(zip(at_once, close(), strict=True)) if close else {}
            for name in often:
                seconds[name].append(took[name] if name in took else _turn(contenders[name]))
            often.reverse()
        for name in rivals:
            seconds[name].append(_turn(contenders[name]))
    return Race(
        title=title,
        unit=unit,
        seconds=seconds,
        peaks=peaks,
        target=target,
        limits=limits,
        things=things,
        allowed=allowed,
    )


def alternately(
    model: nn.Module, limit: Callable[[], Iterator[object]], ours: Callable[[], object], *, segment_s: float
) -> tuple[float, float]:
    """Run both in short slices in alternation, so that a change of the machine's speed meets both.

    Args:
        model: A module that ours calls and the limit does not. Before a call, ours pauses until the limit has used as
            much time.
        limit: Yields after each slice.
        segment_s: Seconds that ours runs between two pauses.

    Returns:
        Seconds of the limit, and of ours.
    """
    slices, end = limit(), object()
    spent = {"limit": 0.0, "ours": 0.0}
    since = time.perf_counter()

    def catch_up(enough: float) -> None:
        started = time.perf_counter()
        while spent["limit"] + time.perf_counter() - started < enough and next(slices, end) is not end:
            wait_for_gpu()  # issuing work to a GPU takes almost no time
        spent["limit"] += time.perf_counter() - started

    def stop(*_: object) -> None:
        nonlocal since
        if time.perf_counter() - since < segment_s:
            return
        wait_for_gpu()
        spent["ours"] += time.perf_counter() - since
        time.sleep(PAUSE_S)
        catch_up(spent["ours"])
        since = time.perf_counter()

    _settle()
    hook = model.register_forward_pre_hook(stop)
    try:
        since = time.perf_counter()
        left = ours()
        wait_for_gpu()
        spent["ours"] += time.perf_counter() - since
    finally:
        hook.remove()
    catch_up(math.inf)
    _remove(left)
    return spent["limit"], spent["ours"]


def run_through(slices: Iterator[object]) -> None:
    """Run all slices without a pause."""
    collections.deque(slices, maxlen=0)


def _settle() -> None:
    wait_for_gpu()
    if hasattr(os, "sync"):
        os.sync()  # no contender waits for the unwritten pages of another


def _turn(work: Callable[[], object]) -> float:
    """Seconds of one turn."""
    _settle()
    started = time.perf_counter()
    left = work()
    wait_for_gpu()
    took = time.perf_counter() - started
    _remove(left)
    return took


def _once(work: Callable[[], object]) -> None:
    _remove(work())


def _remove(left: object) -> None:
    """Remove a turn's output, so that the disk does not have to hold all of them."""
    if isinstance(left, Path):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
