"""What this machine does: each part of the data path beside its limit and its rivals, measured in one run.

A figure says something only beside another one from the same machine and hour, so everything here comes as a race:
contenders take turns, and medians of their times are compared. First in a race comes its limit: the part of the work
that a plain script cannot leave out, or what the hardware gives; where there are two, the slower one binds.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.console import bytes_text, console
from kr2cache.device import choose_device, device_name, wait_for_gpu
from kr2cache.memory import peak_of


@dataclass(frozen=True, kw_only=True)
class Race:
    """One part of the data path."""

    title: str
    unit: str
    """What a time is for, in words."""
    seconds: dict[str, list[float]]
    """By contender: what limits, then ours, then rivals."""
    target: float | None
    """Ours should take at most so many times the limit."""
    limits: int = 1
    """How many of the contenders are limits."""
    peaks: dict[str, int | None] = field(default_factory=dict)
    """By contender: bytes of memory that it took beyond what the process had."""

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.seconds.items()}

    @property
    def limit(self) -> float:
        """Seconds: the median of the slowest limit."""
        return max(list(self.medians.values())[: self.limits])

    @property
    def ratio(self) -> float:
        """Median of ours over the limit."""
        return list(self.medians.values())[self.limits] / self.limit

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
            "target": self.target,
            "met": self.target is None or self.ratio <= self.target,
        }


def race(
    title: str,
    unit: str,
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    target: float | None,
    limits: int = 1,
) -> Race:
    """Let contenders take turns ``repeats`` times, after one turn that is measured for memory alone.

    Args:
        contenders: What a turn wrote is removed after it where the contender returns its path, a file or a folder.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = {name: peak_of(functools.partial(_once, work)) for name, work in contenders.items()}
    for _ in range(repeats):
        for name, work in contenders.items():
            wait_for_gpu()
            if hasattr(os, "sync"):
                os.sync()  # what another contender left to be written is not this one's to wait for
            started = time.perf_counter()
            left = work()
            wait_for_gpu()
            seconds[name].append(time.perf_counter() - started)
            _remove(left)
    return Race(title=title, unit=unit, seconds=seconds, peaks=peaks, target=target, limits=limits)


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
            "versions": {name: version(name) for name in ("kr2cache", "torch", "transformers", "h5py", "numpy")},
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
    table = Table(title=f"Medians of {result['repeats']}, contenders taking turns", title_justify="left")
    table.add_column("what")
    for column in ("median", "from", "to", "memory", "times the limit", "target"):
        table.add_column(column, justify="right")
    for one in result["races"]:
        table.add_section()
        table.add_row(Text(f"{one['title']} ({one['unit']})", style="bold"))
        for place, (name, times) in enumerate(one["seconds"].items()):
            median = one["medians"][name]
            target = Text("")
            if place == one["limits"] and one["target"] is not None:
                target = Text(f"≤ {one['target']:.2f}", style="green" if one["met"] else "red")
            peak = one["peak_bytes"].get(name)
            memory = "-" if peak is None else bytes_text(peak)
            ratio = "1" if median == one["limit"] else f"{median / one['limit']:.2f}"
            cells = (_time(median), _time(min(times)), _time(max(times)), memory, ratio)
            table.add_row(Text(f"  {name}"), *cells, target)
    console.print(table)
    console.print("Memory: of the computer's, beyond what the process had, mapped files included.")
    console.print(result["break_even"]["text"])
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    computer = f"{machine['platform']}, {machine['cores']} cores, {machine['threads']} threads of torch"
    console.print(f"{computer}, on {machine['device']}; {versions}")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def size_text(sequences: int, size: float) -> str:
    """``32 sequences, 21.9 MB``"""
    return f"{sequences:,} sequences, {bytes_text(size)}"
