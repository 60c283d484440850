"""Run folders: one training with one seed.

    runs/udpos-de/kr2-xlm-r-gottbert-last4-6b1d0f42/seed-1/    config.json  metrics.json  history.json
                                                                predictions-dev.jsonl  predictions-test.jsonl
                                                                fusion.json (the weights w)  reader/ (the trained model)

The eight digits come from a hash over everything that can change the result, so an existing folder holds exactly the
run that is asked for. A run is built in the folder of the claim on it (``system.claims``) and renamed when it is
complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.cache.format import canonical_json
from kr2cache.errors import CacheError

LONGEST_NAME = 255
"""Bytes that the name of a folder may have on the usual file systems."""
Metrics = dict[str, dict[str, float]]
"""Split to metric to fraction."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. A run is finished if it has metrics; its reader may have been dropped."""

    path: Path

    @classmethod
    def of_seed(cls, configuration: Path, seed: int) -> RunFolder:
        """The run of one seed.

        Args:
            configuration: As ``configuration_folder`` names it.
        """
        return cls(configuration / f"seed-{seed}")

    @property
    def config_file(self) -> Path:
        """``config`` decides the result; ``recorded`` is for information."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """``Metrics``"""
        return self.path / "metrics.json"

    @property
    def history_file(self) -> Path:
        """``best_epoch``; ``epochs``, a list of what was logged and how dev scored."""
        return self.path / "history.json"

    @property
    def fusion_file(self) -> Path:
        """Layers and weights. Missing for methods without a fusion."""
        return self.path / "fusion.json"

    @property
    def reader(self) -> Path:
        """The folder of the trained model."""
        return self.path / "reader"

    def predictions_file(self, split: str) -> Path:
        """One line per example: ``{"id": ..., "gold": ..., "predicted": ...}`` with label names: one, a list for
        tagging and multilabel; a number for regression."""
        return self.path / f"predictions-{split}.jsonl"

    # Stages of a run -------------------------------------------------------------------------------------------------

    @property
    def is_finished(self) -> bool:
        return self.metrics_file.is_file()

    def publish(self, target: RunFolder) -> None:
        """The run is complete: give it its place."""
        self.path.rename(target.path)

    # Reading ---------------------------------------------------------------------------------------------------------

    def read_metrics(self) -> Metrics:
        """Scores of a finished run.

        Raises:
            CacheError: If metrics.json is missing, not JSON, or without scores.
        """
        try:
            metrics: Metrics = json.loads(self.metrics_file.read_text("utf-8"))
            if not metrics or not all(math.isfinite(value) for scores in metrics.values() for value in scores.values()):
                raise ValueError("no scores in it")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{self.path} holds no readable metrics.json: {error}", "Remove it and train again."
            ) from error
        return metrics

    def read_config(self) -> dict[str, Any]:
        """``config`` and ``recorded`` of a finished run.

        Raises:
            CacheError: If config.json is missing, not JSON, or of another version.
        """
        try:
            content: dict[str, Any] = json.loads(self.config_file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            inside = finished_seeds(self.path)
            raise CacheError(
                f"{self.path} holds no readable config.json: {error}",
                f"Give the folder of a run, such as {inside[0].path}." if inside else "Give the folder of a run.",
            ) from error
        config = content.get("config") if isinstance(content, dict) else None
        missing = {"task", "method", "reader", "seed"} - set(config if isinstance(config, dict) else ())
        if missing or not isinstance(content.get("recorded"), dict):
            names = ", ".join(sorted(missing)) or "recorded"
            raise CacheError(
                f"{self.config_file} was not written by this version of kr2cache: it lacks {names}.",
                "Train the run again.",
            )
        return content

    def check(self, deciding: Mapping[str, Any]) -> None:
        """Raise ``CacheError`` unless ``deciding`` is the ``config`` of this finished run."""
        found = self.read_config()["config"]
        differing = [
            name
            for name in {**deciding, **found}
            if canonical_json([found.get(name)]) != canonical_json([deciding.get(name)])
        ]
        if differing:
            raise CacheError(
                f"{self.path} is the run of another configuration: {', '.join(sorted(differing))} differ.",
                "Move it away, or remove it and train again.",
            )

    def read_fusions(self) -> dict[str, dict[str, Any]]:
        """Layers and weights of each resource by its name; empty for methods without a fusion. With one resource, its
        name is empty.
        """
        if not self.fusion_file.is_file():
            return {}
        content: dict[str, Any] = json.loads(self.fusion_file.read_text("utf-8"))
        return fusions_of(content)

    def read_predictions(self, split: str) -> Iterator[Mapping[str, Any]]:
        """``id``, ``gold`` and ``predicted`` of each example.

        Raises:
            OSError: If the file cannot be read.
            ValueError: For a line that is not JSON.
        """
        with self.predictions_file(split).open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    # Writing ---------------------------------------------------------------------------------------------------------

    def write_predictions(self, split: str, rows: Iterable[tuple[str, Any, Any]]) -> None:
        """
        Args:
            rows: id, gold and prediction of each example, as ``Task.named`` gives them.
        """
        with self.predictions_file(split).open("w", encoding="utf-8") as file:
            for name, gold, predicted in rows:
                row = {"id": name, "gold": gold, "predicted": predicted}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write_fusions(self, fusions: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            fusions: Layers and weights by the name of the resource. Of a single one, the file has its fields alone.
        """
        if len(fusions) == 1:
            write_json(self.fusion_file, next(iter(fusions.values())))
        else:
            write_json(self.fusion_file, {"resources": [{"resource": name, **one} for name, one in fusions.items()]})

    # The trained reader ----------------------------------------------------------------------------------------------

    def drop_reader(self) -> None:
        """Remove the trained reader; predictions and metrics stay. Another process sees all files of it, or none."""
        gone = self.path / "reader.dropped"
        with contextlib.suppress(OSError):
            self.reader.rename(gone)
        for folder in (gone, self.reader):
            shutil.rmtree(folder, ignore_errors=True)

    def drop_temporary_reader(self) -> None:
        """Remove the reader of a finished run, unless the run was trained to keep it."""
        if self.reader.is_dir() and self.is_finished and self.read_config()["recorded"].get("temporary_reader"):
            self.drop_reader()

    def why_no_reader(self) -> str:
        """Why a finished run has no trained reader, as a sentence."""
        recorded = self.read_config()["recorded"]
        if reason := recorded.get("reader_lost"):
            return f"It could not be saved when the run was trained: {reason}."
        if recorded.get("temporary_reader"):
            return "A sweep drops the readers of its runs to save disk; kr2cache sweep --keep-readers keeps them."
        return "It was removed, or not copied: copy the run's folder whole."


def fusions_of(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The content of fusion.json as ``RunFolder.read_fusions`` gives it."""
    several = content.get("resources")
    if isinstance(several, list):
        return {str(one.get("resource")): one for one in several if isinstance(one, dict)}
    return {"": dict(content)}


def configuration_folder(run_dir: Path, task: str, parts: Sequence[str], deciding: Mapping[str, Any]) -> Path:
    """The folder that holds the runs of one configuration, one per seed.

    Args:
        parts: The readable part of its name: method, reader, resource, fusion.
        deciding: Everything that can change the result, except the seed.
    """
    digest = hashlib.sha256(canonical_json(deciding).encode()).hexdigest()
    end = f"-{digest[:8]}"
    # The digits alone tell configurations apart, so a name that is too long is cut.
    readable = "-".join(parts).encode()[: LONGEST_NAME - len(end)].decode(errors="ignore")
    return run_dir / task / f"{readable}{end}"


def finished_seeds(configuration: Path) -> list[RunFolder]:
    """The finished runs in the folder of a configuration; empty for other folders."""
    return [run for path in sorted(configuration.glob("seed-*")) if (run := RunFolder(path)).is_finished]


def write_json(path: Path, value: object) -> None:
    """Write readable JSON with a final newline. If writing fails, the old file stays."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + os.linesep, "utf-8")
    new.replace(path)


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
