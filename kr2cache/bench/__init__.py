"""Measure each part of the data path on this machine, beside its limit and its rivals, in one run.

Compare only times that were measured together on one machine. So each part is a race (``race.py``):
contenders take turns. The first contender is the limit: the work that every script must do, or what the hardware can
do. With two limits, the slower limit counts.
"""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kr2cache.bench.race import CONFIDENCE
from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.store.provenance import library_versions
from kr2cache.system.console import bytes_text, console
from kr2cache.system.device import choose_device, device_name
from kr2cache.system.threads import waiting


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One call of ``kr2cache bench``."""

    extraction: ExtractConfig
    training: TrainConfig
    repeats: int = 5
    folder: Path | None = None
    """Folder for the files, on the disk to be measured; None for a temporary folder."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run every race; return the content of ``--json``."""
    from kr2cache.bench import ablation, break_even, reading, stage_one, training

    with tempfile.TemporaryDirectory(dir=config.folder, prefix="kr2cache-bench-") as folder:
        job = training.prepared(config, Path(folder))  # first, since it finds errors in models or data
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
        "races": [race.json() for race in races],
        "break_even": break_even.of(extracted, plan, trained, config),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def describe_bench(result: dict[str, Any]) -> None:
    """Print one table of all races."""
    table = Table(
        title=f"Medians of {result['repeats']} turns; limits and ours usually take more turns", title_justify="left"
    )
    table.add_column("what")
    for column in ("median", "from", "to", "memory", "times the limit", "target"):
        table.add_column(column, justify="right")
    for race in result["races"]:
        table.add_section()
        table.add_row(Text(f"{race['title']} ({race['unit']})", style="bold"))
        for place, (name, times) in enumerate(race["seconds"].items()):
            median = race["medians"][name]
            target = Text("")
            if place == race["limits"] and (race["target"] or race["allowed"]) is not None:
                most = f"{race['target']:.2f}" if race["target"] else f"+{1e6 * race['allowed']:.0f} µs each"
                target = Text(f"≤ {most}", style="green" if race["met"] else "red")
            peak = race["peak_bytes"].get(name)
            memory = "-" if peak is None else bytes_text(peak)
            ratio = "1" if median == race["limit"] else f"{median / race['limit']:.2f}"
            if place == race["limits"]:
                low, high = race["ratio_range"]
                ratio = f"{race['ratio']:.2f} ({low:.2f} to {high:.2f})"
                if race["allowed"] is not None:
                    low, high = (1e6 * end for end in race["extra_range"])
                    ratio = f"+{1e6 * race['extra']:.1f} µs ({low:.1f} to {high:.1f})"
            cells = (_time(median), _time(min(times)), _time(max(times)), memory, ratio)
            table.add_row(Text(f"  {name}"), *cells, target)
    console.print(table)
    console.print(
        f"Times the limit, for ours: the median ratio of neighbouring turns, with its {CONFIDENCE:.0%} confidence "
        "interval (of fewer than six turns, the smallest and largest). Memory: the peak beyond what the process used "
        "before, on the computer, mapped files included."
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
