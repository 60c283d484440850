"""Runs that no sweep shows: one table for each task, one row for each configuration, every metric."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kr2cache.report.records import METHOD_NAMES, OLDER, Configuration, mapping, mean_and_std, number
from kr2cache.report.scores import METRICS, percent
from kr2cache.report.tables import Cell, Record, Table
from kr2cache.system.console import time_text

_COUNTS = ("cut_off_words",)
DATED = ("data", "trained", "state")
"""What tells rows apart that differ in their id alone."""


def other_tables(configurations: Sequence[Configuration], outdated: Mapping[str, str]) -> list[Table]:
    """A table for each task of ``configurations``, tasks by name.

    Args:
        outdated: As ``stale`` gives them.
    """
    tasks = sorted({one.task for one in configurations})
    return [_table(task, sort([one for one in configurations if one.task == task]), outdated) for task in tasks]


def sort(configurations: Sequence[Configuration]) -> list[Configuration]:
    """By method as in the paper, models, fusion (layer 9 before layer 11), folder."""
    methods = list(METHOD_NAMES)

    def key(one: Configuration) -> tuple[Any, ...]:
        place = methods.index(one.method) if one.method in methods else len(methods)
        fusion = re.fullmatch(r"([a-z]*)(\d*)", one.fusion)
        name, digits = fusion.groups() if fusion else (one.fusion, "")
        return place, one.method, one.reader, one.helper, name != "layer", name, int(digits or 0), one.folder

    return sorted(configurations, key=key)


def stale(configurations: Sequence[Configuration]) -> dict[str, str]:
    """Folder to the reason why a configuration went stale: a newer one has the same names and settings, and was trained
    on other data or models.
    """
    alike: dict[str, list[Configuration]] = {}
    for one in configurations:
        settings = {name: value for name, value in one.settings.items() if name != "teacher.fingerprint"}
        corpus = one.first.recorded.get("corpus")
        key = json.dumps([one.task, one.method, one.reader, one.helper, one.fusion, corpus, settings], sort_keys=True)
        alike.setdefault(key, []).append(one)
    reasons = {}
    for group in alike.values():
        *older, newest = sorted(group, key=lambda one: one.trained)
        for one in older:
            if changes := _changes(one, newest):
                reasons[one.folder] = f"{newest.folder} is newer and was trained on {', '.join(changes)}"
    return reasons


def _changes(older: Configuration, newer: Configuration) -> list[str]:
    then, now = (mapping(one.config.get("data")) for one in (older, newer))
    splits = [split for split in {**then, **now} if then.get(split) != now.get(split)]
    changes = [f"other data ({', '.join(splits)})"] if splits else []
    for part in ("reader", "resource"):
        then, now = (mapping(one.config.get(part)) for one in (older, newer))
        changes += [f"other {name} of the {part}" for name in ("weights", "config") if then.get(name) != now.get(name)]
        if not splits and then.get("tokens") != now.get("tokens"):
            changes.append(f"other tokens of the {part}")
    return changes


def differing_settings(configurations: Sequence[Configuration]) -> list[str]:
    """Names of the settings that are not the same in all of them; one that a method has not is no difference."""
    values: dict[str, set[str]] = {}
    for one in configurations:
        for name, value in one.settings.items():
            if value != "None":
                values.setdefault(name, set()).add(value)
    return [name for name, different in values.items() if len(different) > 1]


def labels(configurations: Sequence[Configuration]) -> dict[str, str]:
    """Folder to a short name that is unique among them: method and fusion, and what else tells them apart."""
    names = {one.folder: " ".join(filter(None, (one.method_name, one.fusion))) for one in configurations}
    more: list[dict[str, str]] = [
        {one.folder: one.reader for one in configurations},
        {one.folder: one.helper for one in configurations},
        *(
            {one.folder: f"{name} {one.settings.get(name, '–')}" for one in configurations}
            for name in differing_settings(configurations)
        ),
        {one.folder: one.digits for one in configurations},
        {one.folder: one.folder for one in configurations},
    ]
    for texts in more:
        alike: dict[str, list[str]] = {}
        for folder, name in names.items():
            alike.setdefault(name, []).append(folder)
        for name, folders in alike.items():
            if len({texts[folder] for folder in folders}) > 1:
                names |= {folder: f"{name}, {texts[folder]}" for folder in folders}
    return names


def _table(task: str, configurations: list[Configuration], outdated: Mapping[str, str]) -> Table:
    settings = differing_settings(configurations)
    dated = any(one.folder in outdated for one in configurations)
    metrics = list(dict.fromkeys(name for one in configurations for name in one.first.scores))
    best = {metric: _best(configurations, metric) for metric in metrics if metric not in _COUNTS}
    helpers = any(one.helper for one in configurations)
    names = (
        "method",
        "reader",
        *(["resource or teacher", "fusion"] if helpers else []),
        *settings,
        *(DATED if dated else ()),
        "run",
    )

    def described(one: Configuration) -> list[str]:
        models = [one.method_name, one.reader, *([one.helper, one.fusion] if helpers else [])]
        values = (one.settings.get(name, "").replace("None", "") for name in settings)
        dates = [_corpus(one), time_text(one.trained), "stale" if one.folder in outdated else ""] if dated else []
        return [*models, *values, *dates, one.digits]

    def cell(one: Configuration, metric: str) -> Cell:
        text, older = _shown(one, metric), one.older(metric)
        return Cell(text, bold=not older and text.split(" ")[0] == best.get(metric), remark=OLDER if older else "")

    def record(one: Configuration) -> Record:
        numbers: dict[str, float | None] = {}
        for metric in metrics:
            values = one.values(metric)
            mean, std = mean_and_std(values) if values else (None, None)
            numbers |= {f"{metric}_mean": mean, f"{metric}_std": std}
        described_by = dict(zip(names, described(one), strict=True))
        older = any(one.older(metric) for metric in metrics)
        return {
            **described_by,
            "split": one.split,
            **numbers,
            "seeds": len(one.runs),
            "older": older,
            "trained": time_text(one.trained),
            "stale": one.folder in outdated,
            "folder": one.folder,
        }

    splits = sorted({one.split for one in configurations})
    return Table(
        name=f"other-runs-{task}",
        title=f"Other runs on {task}",
        columns=(*names, *(METRICS.get(metric, metric.replace("_", " ")) for metric in metrics), "seeds"),
        rows=tuple(
            (
                *map(Cell, described(one)),
                *(cell(one, metric) for metric in metrics),
                Cell(" ".join(map(str, one.runs))),
            )
            for one in configurations
        ),
        legend=(
            f"Mean ± sample standard deviation over seeds on {' or '.join(splits)}, in percent (counts: mean); "
            "bold: the best of its column; run: the last digits of its folder."
            + (" stale: a newer run with the same settings was trained on other data or models." if dated else ""),
        ),
        records=tuple(map(record, configurations)),
        labels=len(names),
        keys=(names.index("run"),),
    )


def _corpus(one: Configuration) -> str:
    """``corpus, train 270``"""
    examples = number(mapping(one.first.recorded.get("examples")).get("train"))
    parts = [str(one.first.recorded.get("corpus") or ""), "" if examples is None else f"train {examples:,}"]
    return ", ".join(filter(None, parts))


def _shown(one: Configuration, metric: str) -> str:
    values = one.values(metric)
    if not values:
        return "–"
    if metric in _COUNTS:
        return f"{mean_and_std(values)[0]:,.0f}"
    return percent(*mean_and_std([100 * value for value in values]))


def _best(configurations: Sequence[Configuration], metric: str) -> str:
    compared = [one for one in configurations if not one.older(metric)]
    means = [100 * mean_and_std(values)[0] for one in compared if (values := one.values(metric))]
    return f"{max(means):.1f}" if len(means) > 1 else ""
