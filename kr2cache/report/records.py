"""Plain records that a report is made from: runs, configurations, and sweeps, which arrange them in tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kr2cache.methods import METHODS
from kr2cache.models.registry import label
from kr2cache.tasks import COUNTS

WHOLE_TAGS = 3
"""The first ``procedure`` (in ``config.json``) whose F1 is that of XTREME. Before, CCONJ and SCONJ counted as one tag,
and an X at the end of a sentence was ignored."""

_NOT_SETTINGS = ("task", "method", "data", "metric", "seed", "fusion", "more_resources")
_NOT_SETTINGS_OF_A_PART = ("name", "fusion", "weights", "config", "tokens")
_ADDED_LATER = {"keep_head": "False"}
"""Settings that runs from before them do not have, and what they were then."""
_ADDED_LATER_TO_RESOURCES = {"weights_dtype": "float32", "pool": "none"}
OLDER = "older"
"""Marks a score that an older version computed differently."""


@dataclass(frozen=True)
class Fused:
    """What a run fused of one resource."""

    layers: tuple[int, ...]
    weights: tuple[float, ...] | None
    """The learned weights as they act (after a softmax), in the order of ``layers``; None if they were not trained."""
    gamma: float | None
    """The learned factor of the fusion ``mix``; None for other fusions."""


@dataclass(frozen=True)
class Run:
    """One finished training with one seed."""

    seed: int
    path: Path
    split: str
    """The scored split: test, or dev if there is no test."""
    scores: Mapping[str, float]
    """Metric of the scored split to its value: fractions, and counts such as ``cut_off_words``
    (words without a label)."""
    recorded: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    fusions: Mapping[str, Fused]
    """By the resource's name, which is empty if there is only one. Empty for methods without a fusion."""
    trained: float = 0.0
    """When the scores were written, in seconds since 1970. Copying a run can change it."""

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The learned weights of the first resource."""
        return next((one.weights for one in self.fusions.values()), None)

    @property
    def seconds(self) -> float | None:
        return number(self.recorded.get("seconds"))

    @property
    def cache_bytes(self) -> float | None:
        """Bytes of the caches of all splits; None for a method without a resource."""
        sizes = [number(size) for size in mapping(self.recorded.get("cache_bytes")).values()]
        known = [size for size in sizes if size is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Configuration:
    """The runs of one configuration. They differ only in the seed."""

    folder: str
    """``TASK/CONFIG-HASH8``, relative to RUN_DIR."""
    config: Mapping[str, Any]
    runs: Mapping[int, Run]
    """Seed to run, never empty, ascending."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are fused, of the first resource."""
        return next((one.layers for run in self.runs.values() for one in run.fusions.values()), ())

    @property
    def task(self) -> str:
        return str(self.config["task"])

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def method_name(self) -> str:
        return METHODS[self.method].paper_name if self.method in METHODS else self.method

    @property
    def reader(self) -> str:
        return self._model("reader")

    @property
    def helper(self) -> str:
        """The resources, or the teacher of a distillation."""
        if not self.config.get("resource"):
            return name_of(self.config.get("teacher"))
        recorded = mapping(self.first.recorded.get("model"))
        more = sequence(self.config.get("more_resources"))
        origins = [*sequence(recorded.get("more_resources")), *({} for _ in more)]
        others = [label(name_of(one), mapping(origin)) for one, origin in zip(more, origins, strict=False)]
        return " + ".join([self._model("resource"), *others])

    def _model(self, part: str) -> str:
        """The name of the reader or the first resource. It says what a control is."""
        recorded = mapping(mapping(self.first.recorded.get("model")).get(part))
        return label(name_of(self.config.get(part)), recorded)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """Reader and resources as config.json has them, by what they are called in messages."""
        more = sequence(self.config.get("more_resources"))
        parts = {part: mapping(self.config.get(part)) for part in ("reader", "resource")}
        return parts | {f"resource {name_of(one)}": mapping(one) for one in more}

    @property
    def fusion(self) -> str:
        return name_of(self.config.get("fusion"))

    @property
    def digits(self) -> str:
        """The hash at the end of the folder's name."""
        return self.folder.rpartition("-")[2]

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def trained(self) -> float:
        """When its last seed was trained."""
        return max(run.trained for run in self.runs.values())

    @property
    def split(self) -> str:
        return self.first.split

    @property
    def kind(self) -> str:
        """The kind of the task; empty if the run did not record it."""
        return str(mapping(self.first.recorded.get("task")).get("kind", ""))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the task; empty if it has none, or if the run did not record them."""
        return tuple(map(str, sequence(mapping(self.first.recorded.get("task")).get("labels"))))

    @property
    def counts(self) -> Mapping[str, str]:
        """The scores that are counts: name to the title of its column. Older runs did not record them."""
        recorded = mapping(self.first.recorded.get("task")).get("counts")
        return COUNTS if recorded is None else {name: str(title) for name, title in mapping(recorded).items()}

    @property
    def metric(self) -> str:
        """The main metric: the one that config.json names, else F1, else accuracy."""
        scores = self.first.scores
        wanted = (self.config.get("metric"), "f1", "accuracy", *sorted(scores))
        return next(str(name) for name in wanted if name in scores)

    def older(self, metric: str) -> bool:
        """Whether an older version computed its values of ``metric`` differently."""
        return metric == "f1" and (number(self.config.get("procedure")) or 0) < WHOLE_TAGS

    @property
    def settings(self) -> dict[str, str]:
        """All settings by dotted name, without models, fusion and digests."""
        settings = dict(_ADDED_LATER)
        for name, value in self.config.items():
            if name in _NOT_SETTINGS:
                continue
            if isinstance(value, Mapping):
                settings |= _settings_of(name, value)
            else:
                settings[name] = _setting_text(value)
        for one in sequence(self.config.get("more_resources")):
            settings |= _settings_of(f"resource {name_of(one)}", mapping(one))
        return settings

    def values(self, metric: str, seeds: Iterable[int] | None = None) -> list[float]:
        """The metric of each finished seed, in ascending order of seeds.

        Args:
            seeds: Only these; None for all.
        """
        wanted = set(self.runs if seeds is None else seeds)
        return [run.scores[metric] for seed, run in self.runs.items() if seed in wanted and metric in run.scores]


@dataclass(frozen=True)
class SweepCell:
    """One cell of a sweep's table, as planned in its manifest."""

    row: str
    column: str
    seeds: tuple[int, ...]
    folder: str | None = None
    error: str | None = None
    configuration: Configuration | None = None

    @property
    def done(self) -> tuple[int, ...]:
        """The planned seeds that are finished."""
        return tuple(s for s in self.seeds if self.configuration is not None and s in self.configuration.runs)


@dataclass(frozen=True)
class Sweep:
    """A sweep manifest: the plan of one table."""

    name: str
    title: str
    paper: str | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    baseline: str | None
    baselines: Mapping[str, str]
    """Row to its own baseline, for rows that are not compared with ``baseline``."""
    cells: Mapping[tuple[str, str], SweepCell]

    def column(self, column: str) -> list[SweepCell]:
        """The cells of a column in the order of the rows."""
        return [self.cells[row, column] for row in self.rows if (row, column) in self.cells]


@dataclass
class Collected:
    """All runs and sweeps in RUN_DIR."""

    configurations: list[Configuration] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for one in self.configurations for run in one.runs.values()]

    @property
    def uncovered(self) -> list[Configuration]:
        """Configurations that no sweep shows."""
        covered = {cell.folder for sweep in self.sweeps for cell in sweep.cells.values()}
        return [one for one in self.configurations if one.folder not in covered]


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the deviation of a single value is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def number(value: object) -> float | None:
    """A finite number, or None. Counts stay integers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def name_of(value: object) -> str:
    return str(mapping(value).get("name", "")) if isinstance(value, Mapping) else str(value or "")


def _settings_of(part: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a model, or of another part of a configuration, by dotted name."""
    added = _ADDED_LATER_TO_RESOURCES if part.startswith("resource") else {}
    own = {name: _setting_text(value) for name, value in values.items() if name not in _NOT_SETTINGS_OF_A_PART}
    return {f"{part}.{name}": value for name, value in (added | own).items()}


def _setting_text(value: object) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
