"""The run folder: one training with one seed, written by train, read by whoever reports on it.

    runs/udpos-de/kr2-xlm-r-gottbert-last4-6b1d0f42/seed-1/    config.json  metrics.json  history.json
                                                                predictions-dev.jsonl  predictions-test.jsonl
                                                                fusion.json (the weights w)  reader/ (the trained model)

The eight digits are of a hash over everything that can change the result, so a folder that is there holds the run that
was asked for. A folder gets its name only when it is complete; until then it is called ``seed-1.partial``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kr2cache.cache.format import canonical_json
from kr2cache.errors import CacheError

READER = "reader"
"""Folder of the trained model inside a run's."""

Metrics = dict[str, dict[str, float]]
"""Split to metric to fraction."""


def runs_folder(run_dir: Path, task: str, parts: Sequence[str], deciding: Mapping[str, Any]) -> Path:
    """The folder that holds the seeds of one configuration.

    Args:
        parts: What the folder is called by: method, reader, resource, fusion.
        deciding: Everything that can change the result, the seed aside.
    """
    digest = hashlib.sha256(canonical_json(deciding).encode()).hexdigest()
    return run_dir / task / f"{'-'.join(parts)}-{digest[:8]}"


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def partial_folder(folder: Path) -> Path:
    """What a run's folder is called until it is complete."""
    return folder.with_name(folder.name + ".partial")


def start_run(folder: Path) -> Path:
    """A fresh, empty folder to build the run in; ``finish_run`` gives it its name."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_run(partial: Path, folder: Path) -> None:
    """Give the complete run its name."""
    partial.rename(folder)


def drop_reader(folder: Path) -> None:
    """Remove the trained reader of a finished run; its predictions and metrics stay."""
    shutil.rmtree(folder / READER, ignore_errors=True)


def drop_temporary_reader(folder: Path) -> None:
    """The same, unless someone trained the run to keep it, or it is not finished."""
    if is_finished(folder) and read_config(folder)["recorded"].get("temporary_reader"):
        drop_reader(folder)


def why_no_reader(folder: Path) -> str:
    """Why a finished run has no trained reader, as a sentence."""
    recorded = read_config(folder)["recorded"]
    if reason := recorded.get("reader_lost"):
        return f"It could not be saved when the run was trained: {reason}."
    if recorded.get("temporary_reader"):
        return "A sweep drops the readers of its runs to save disk; kr2cache sweep --keep-readers keeps them."
    return "It was removed, or not copied: copy the run's folder whole."


def is_finished(folder: Path) -> bool:
    return (folder / "metrics.json").is_file()


def read_metrics(folder: Path) -> Metrics:
    """``metrics.json`` of a finished run.

    Raises:
        CacheError: If it is not there or not JSON.
    """
    try:
        metrics: Metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        if not metrics or not all(float(value) >= 0 for scores in metrics.values() for value in scores.values()):
            raise ValueError("no scores in it")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CacheError(f"{folder} holds no readable metrics.json: {error}", "Remove it and train again.") from error
    return metrics


def check_run(folder: Path, deciding: Mapping[str, Any]) -> None:
    """Raise ``CacheError`` unless the finished run in ``folder`` is the one that ``deciding`` decides."""
    there = read_config(folder)["config"]
    other = [
        name
        for name in {**deciding, **there}
        if canonical_json([there.get(name)]) != canonical_json([deciding.get(name)])
    ]
    if other:
        raise CacheError(
            f"{folder} is the run of another configuration: {', '.join(sorted(other))} differ.",
            "Move it away, or remove it to train it anew.",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a finished run: ``config`` decides the result, ``recorded`` is worth knowing.

    Raises:
        CacheError: If it is not there, not JSON, or of another version.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder} holds no readable config.json: {error}", _which_run(folder)) from error
    config = content.get("config") if isinstance(content, dict) else None
    missing = {"task", "method", "reader", "seed"} - set(config if isinstance(config, dict) else ())
    if missing or not isinstance(content.get("recorded"), dict):
        what = ", ".join(sorted(missing)) or "recorded"
        raise CacheError(
            f"{folder}/config.json was not written by this version of kr2cache: it lacks {what}.", "Train the run anew."
        )
    return content


def _which_run(folder: Path) -> str:
    seeds = sorted(path for path in folder.glob("seed-*") if is_finished(path))
    return f"Give the folder of a run, such as {seeds[0]}." if seeds else "Give the folder of a run."


def read_fusion(folder: Path) -> dict[str, Any] | None:
    """``fusion.json`` of a run, None for methods without a fusion."""
    path = folder / "fusion.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def write_json(path: Path, value: object) -> None:
    """Readable JSON with a final newline. If it cannot be written, the file is what it was before."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + os.linesep, "utf-8")
    new.replace(path)


def write_predictions(path: Path, rows: Iterable[tuple[str, Any, Any]]) -> None:
    """One line an example: ``{"id": ..., "gold": ..., "predicted": ...}``, label names."""
    with path.open("w", encoding="utf-8") as file:
        for name, gold, predicted in rows:
            file.write(json.dumps({"id": name, "gold": gold, "predicted": predicted}, ensure_ascii=False) + "\n")


def mean_and_std(runs: Sequence[Metrics]) -> tuple[Metrics, dict[str, dict[str, float | None]]]:
    """Over seeds, by split and metric: mean, and sample standard deviation (None for a single run)."""
    mean: Metrics = {}
    std: dict[str, dict[str, float | None]] = {}
    for split, metrics in runs[0].items():
        for name in metrics:
            values = [run[split][name] for run in runs]
            mean.setdefault(split, {})[name] = statistics.fmean(values)
            std.setdefault(split, {})[name] = statistics.stdev(values) if len(values) > 1 else None
    return mean, std
