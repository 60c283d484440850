"""What this machine does: each part of the data path beside its limit and its rivals, measured in one run.

A figure says something only beside another one from the same machine and hour, so everything here comes as a race:
contenders take turns. First in a race comes its limit: the part of the work that a plain script cannot leave out, or
what the hardware gives; where there are two, the slower one binds. Rivals are compared by medians of their times. Ours
and the limit are close, and a machine's speed drifts by more than lies between them: they take turns more often, each
time the other way round, or run bit by bit in alternation, and the median of ratios of neighbours counts.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text
from scipy.stats import binom

from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.store.provenance import library_versions
from kr2cache.system.console import bytes_text, console
from kr2cache.system.device import choose_device, device_name, wait_for_gpu
from kr2cache.system.memory import peak_of
from kr2cache.system.threads import waiting

if TYPE_CHECKING:
    from torch import nn

PAIRS = (2, 10)
"""Turns of limit and ours for each turn of a rival, at least and at most."""
PAIRS_S = 6.0
"""Seconds: after so many, and the least of ``PAIRS``, it is a rival's turn."""
PAUSE_S = 0.02
"""Seconds that count for nobody: what a thread of ours has in hand when ours stands still must not slow the limit."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Race:
    """One part of the data path."""

    title: str
    unit: str
    """What a time is for, in words."""
    seconds: dict[str, list[float]]
    """By contender: what limits, then ours, then rivals; times at one place of limits and ours are neighbours."""
    target: float | None
    """Ours should take at most so many times the limit."""
    limits: int = 1
    """How many of the contenders are limits."""
    things: int = 1
    """How many things a turn handles, such as sequences."""
    allowed: float | None = None
    """Seconds that ours may take more than the limit for each thing, where ``target`` says little: the limit is next to
    nothing."""
    peaks: dict[str, int | None] = field(default_factory=dict)
    """By contender: bytes of memory that it took beyond what the process had."""

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.seconds.items()}

    @property
    def binding(self) -> str:
        """The limit whose median is the slowest."""
        medians = self.medians
        return max(list(medians)[: self.limits], key=medians.__getitem__)

    @property
    def limit(self) -> float:
        """Seconds: the median of the slowest limit."""
        return self.medians[self.binding]

    @property
    def ours(self) -> str:
        return list(self.seconds)[self.limits]

    @property
    def ratios(self) -> list[float]:
        """Ours over the slowest limit, turn by turn."""
        return [one / limit for one, limit in zip(self.seconds[self.ours], self.seconds[self.binding], strict=True)]

    @property
    def ratio(self) -> float:
        """Median of ours over the limit."""
        return statistics.median(self.ratios)

    @property
    def extras(self) -> list[float]:
        """Seconds that ours took more than the slowest limit for each thing, turn by turn."""
        pairs = zip(self.seconds[self.ours], self.seconds[self.binding], strict=True)
        return [(one - limit) / self.things for one, limit in pairs]

    @property
    def met(self) -> bool:
        """Whether the targets are, as far as there are any."""
        near = self.target is None or self.ratio <= self.target
        return near and (self.allowed is None or statistics.median(self.extras) <= self.allowed)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Where the true median of ours over the limit lies, with ``CONFIDENCE`` where there are turns enough."""
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
    """The interval of the sign test for a median: a value is above it as often as a coin shows heads.

    Of fewer than six values no two make up ``CONFIDENCE``; then it is the smallest and the largest.
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
    """Let contenders take turns, rivals ``repeats`` times, limits and ours more often; one turn before is measured for
    memory alone.

    Args:
        contenders: What a turn wrote is removed after it where the contender returns its path, a file or a folder.
        close: A turn of the first limit and ours at once, as ``alternately`` has it; gives the seconds of each. Not
            used where another limit is slower, such as the disk: that one goes on while ours stands still.
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
    """Run both bit by bit in alternation, so that they meet the same machine, whatever its speed does meanwhile.

    Args:
        model: What ours calls, and the limit does not: before such a call ours stands still until the limit took as
            long.
        limit: Yields after each bit.
        segment_s: Seconds that ours runs between two stops.

    Returns:
        Seconds that the limit took, and ours.
    """
    bits, end = limit(), object()
    spent = {"limit": 0.0, "ours": 0.0}
    since = time.perf_counter()

    def catch_up(enough: float) -> None:
        started = time.perf_counter()
        while spent["limit"] + time.perf_counter() - started < enough and next(bits, end) is not end:
            wait_for_gpu()  # what was only issued took no time yet
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


def run_through(bits: Iterator[object]) -> None:
    """All of it, without a stop."""
    collections.deque(bits, maxlen=0)


def _settle() -> None:
    wait_for_gpu()
    if hasattr(os, "sync"):
        os.sync()  # what another contender left to be written is not this one's to wait for


def _turn(work: Callable[[], object]) -> float:
    """Seconds that it took."""
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
    """The disk need not hold every turn's output at once."""
    if isinstance(left, Path):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One call of ``kr2cache bench``."""

    extraction: ExtractConfig
    training: TrainConfig
    repeats: int = 5
    folder: Path | None = None
    """Where files are written, on the disk in question; None for a temporary folder."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run every race; returns what ``--json`` prints."""
    from kr2cache.bench import ablation, break_even, reading, stage_one, training

    with tempfile.TemporaryDirectory(dir=config.folder, prefix="kr2cache-bench-") as folder:
        job = training.prepared(config, Path(folder))  # first: what is wrong with models or data shows here
        trained, evaluated = training.steps(config, job), training.evaluation(config, job)
        extracted, plan = stage_one.run(config, Path(folder))
        races = [extracted, *reading.run(config, Path(folder)), trained, evaluated, ablation.run(config, Path(folder))]
    return {
        "machine": {
            "platform": platform.platform(),
            "device": device_name(choose_device(config.extraction.device)),
            "cores": os.cpu_count(),
            "threads": _threads(),
            "threads_wait": waiting(),
            "versions": library_versions(),
        },
        "repeats": config.repeats,
        "races": [one.json() for one in races],
        "break_even": break_even.of(extracted, plan, trained, config),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def describe_bench(result: dict[str, Any]) -> None:
    """Print one table of all races."""
    table = Table(title=f"Medians of {result['repeats']} turns; limits and ours mostly take more", title_justify="left")
    table.add_column("what")
    for column in ("median", "from", "to", "memory", "times the limit", "target"):
        table.add_column(column, justify="right")
    for one in result["races"]:
        table.add_section()
        table.add_row(Text(f"{one['title']} ({one['unit']})", style="bold"))
        for place, (name, times) in enumerate(one["seconds"].items()):
            median = one["medians"][name]
            target = Text("")
            if place == one["limits"] and (one["target"] or one["allowed"]) is not None:
                most = f"{one['target']:.2f}" if one["target"] else f"+{1e6 * one['allowed']:.0f} µs each"
                target = Text(f"≤ {most}", style="green" if one["met"] else "red")
            peak = one["peak_bytes"].get(name)
            memory = "-" if peak is None else bytes_text(peak)
            ratio = "1" if median == one["limit"] else f"{median / one['limit']:.2f}"
            if place == one["limits"]:
                low, high = one["ratio_range"]
                ratio = f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})"
                if one["allowed"] is not None:
                    low, high = (1e6 * end for end in one["extra_range"])
                    ratio = f"+{1e6 * one['extra']:.1f} µs ({low:.1f} to {high:.1f})"
            cells = (_time(median), _time(min(times)), _time(max(times)), memory, ratio)
            table.add_row(Text(f"  {name}"), *cells, target)
    console.print(table)
    console.print(
        f"Ours in times the limit: the median of neighbouring turns' ratios, and where it lies with {CONFIDENCE:.0%} "
        "confidence (of fewer than six turns, all of them). Memory: of the computer's, beyond what the process had, "
        "mapped files included."
    )
    console.print(result["break_even"]["text"])
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    waits = f"waiting: {machine['threads_wait']}"
    computer = f"{machine['platform']}, {machine['cores']} cores, {machine['threads']} threads of torch ({waits})"
    console.print(f"{computer}, on {machine['device']}; {versions}")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def size_text(sequences: int, size: float) -> str:
    """``32 sequences, 21.9 MB``"""
    return f"{sequences:,} sequences, {bytes_text(size)}"
