"""Tables of the runs that no sweep shows: one table per task, one row per configuration, all metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kr2cache.methods import METHODS
from kr2cache.report.records import OLDER, Configuration, mapping, mean_and_std, number
from kr2cache.report.scores import METRICS, percent
from kr2cache.report.tables import Cell, Table
from kr2cache.system.console import time_text


def other_tables(configurations: Sequence[Configuration], outdated: Mapping[str, str]) -> list[Table]:
    """One table for each task, sorted by task name.

    Args:
        outdated: The result of ``stale``.
    """
    tasks = sorted({one.task for one in configurations})
    return [_table(task, sort([one for one in configurations if one.task == task]), outdated) for task in tasks]


def sort(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Sort by method in the paper's order, models, fusion (layer 9 before layer 11), settings and folder."""
    methods = list(METHODS)

    def key(one: Configuration) -> tuple[Any, ...]:
        place = methods.index(one.method) if one.method in methods else len(methods)
        fusion = re.fullmatch(r"([a-z]*)(\d*)", one.fusion)
        name, digits = fusion.groups() if fusion else (one.fusion, "")
        models = one.reader, one.helper
        settings = [(name, *_order(value)) for name, value in sorted(one.settings.items())]
        return place, one.method, *models, name != "layer", name, int(digits or 0), settings, one.folder

    return sorted(configurations, key=key)


def _order(value: str) -> tuple[bool, float, str]:
    """Sorts numbers by their size, before all other text."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def stale(configurations: Sequence[Configuration]) -> dict[str, str]:
    """Find configurations that are stale: a newer one has the same names and settings but other data or models.

    Returns:
        Folder to the reason.
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
    for part, then in older.models.items():
        now = newer.models.get(part, {})
        changes += [f"other {name} of the {part}" for name in ("weights", "config") if then.get(name) != now.get(name)]
        if not splits and then.get("tokens") != now.get("tokens"):
            changes.append(f"other tokens of the {part}")
    return changes


def differing_settings(configurations: Sequence[Configuration]) -> list[str]:
    """Names of the settings that differ between configurations. A setting that a method does not have is ignored."""
    values: dict[str, set[str]] = {}
    for one in configurations:
        for name, value in one.settings.items():
            if value != "None":
                values.setdefault(name, set()).add(value)
    return [name for name, different in values.items() if len(different) > 1]


def labels(configurations: Sequence[Configuration], rows: Mapping[str, str]) -> dict[str, str]:
    """Folder to a short, unique name: its row, or method and fusion, then other properties until all names differ.

    Args:
        rows: Folder to the row of a sweep.
    """
    names = {
        one.folder: rows.get(one.folder) or " ".join(filter(None, (one.method_name, one.fusion)))
        for one in configurations
    }
    more: list[dict[str, str]] = [
        {one.folder: one.method_name for one in configurations},
        {one.folder: one.fusion for one in configurations},
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
    described = _descriptions(configurations, outdated)
    names = tuple(described[0])
    metrics = list(dict.fromkeys(name for one in configurations for name in one.first.scores))
    counts = {name: title for one in configurations for name, title in one.counts.items()}
    best = {metric: _best(configurations, metric) for metric in metrics if metric not in counts}

    def cell(one: Configuration, metric: str) -> Cell:
        text, older = _shown(one, metric), one.older(metric)
        return Cell(text, bold=not older and text.split(" ")[0] == best.get(metric), remark=OLDER if older else "")

    splits = sorted({one.split for one in configurations})
    legend = (
        f"Mean ± sample standard deviation over seeds on {' or '.join(splits)}, in percent (counts: mean); bold: the "
        "best of its column; run: the last digits of the folder's name."
    )
    if "state" in names:
        legend += " stale: a newer run with the same settings was trained on other data or models."
    return Table(
        name=f"other-runs-{task}",
        title=f"Other runs on {task}",
        columns=(*names, *(_title(metric, counts) for metric in metrics), "seeds"),
        rows=tuple(
            (
                *map(Cell, description.values()),
                *(cell(one, metric) for metric in metrics),
                Cell(" ".join(map(str, one.runs))),
            )
            for one, description in zip(configurations, described, strict=True)
        ),
        legend=(legend,),
        records=tuple(
            description | _record(one, metrics, outdated)
            for one, description in zip(configurations, described, strict=True)
        ),
        labels=len(names),
        keys=(names.index("run"),),
    )


def _descriptions(configurations: Sequence[Configuration], outdated: Mapping[str, str]) -> list[dict[str, str]]:
    """The texts that distinguish the configurations: column to text, with the same columns for all configurations."""
    settings = differing_settings(configurations)
    has_helpers = any(one.helper for one in configurations)
    has_dates = any(one.folder in outdated for one in configurations)  # such rows can differ in their digits alone
    descriptions = []
    for one in configurations:
        description = {"method": one.method_name, "reader": one.reader}
        if has_helpers:
            description |= {"resource or teacher": one.helper, "fusion": one.fusion}
        description |= {name: one.settings.get(name, "").replace("None", "") for name in settings}
        if has_dates:
            state = "stale" if one.folder in outdated else ""
            description |= {"data": _corpus(one), "trained": time_text(one.trained), "state": state}
        descriptions.append(description | {"run": one.digits})
    return descriptions


def _record(one: Configuration, metrics: Sequence[str], outdated: Mapping[str, str]) -> dict[str, Any]:
    """One row of the table as data, without its description."""
    record: dict[str, Any] = {"split": one.split}
    for metric in metrics:
        values = one.values(metric)
        record[f"{metric}_mean"], record[f"{metric}_std"] = mean_and_std(values) if values else (None, None)
    return record | {
        "seeds": len(one.runs),
        "older": any(one.older(metric) for metric in metrics),
        "trained": time_text(one.trained),
        "stale": one.folder in outdated,
        "folder": one.folder,
    }


def _corpus(one: Configuration) -> str:
    """``corpus, train 270``"""
    examples = number(mapping(one.first.recorded.get("examples")).get("train"))
    parts = [str(one.first.recorded.get("corpus") or ""), "" if examples is None else f"train {examples:,}"]
    return ", ".join(filter(None, parts))


def _title(metric: str, counts: Mapping[str, str]) -> str:
    return METRICS.get(metric) or counts.get(metric) or metric.replace("_", " ")


def _shown(one: Configuration, metric: str) -> str:
    values = one.values(metric)
    if not values:
        return "–"
    if metric in one.counts:
        return f"{mean_and_std(values)[0]:,.0f}"
    return percent(*mean_and_std([100 * value for value in values]))


def _best(configurations: Sequence[Configuration], metric: str) -> str:
    compared = [one for one in configurations if not one.older(metric)]
    means = [100 * mean_and_std(values)[0] for one in compared if (values := one.values(metric))]
    return f"{max(means):.1f}" if len(means) > 1 else ""
