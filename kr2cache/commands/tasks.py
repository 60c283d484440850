"""``kr2cache tasks``: the tasks, and what the data of one of them holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache.commands.defaults import data_for
from kr2cache.commands.options import Data, Json, print_json, task_completions
from kr2cache.commands.settings import OPTIONS
from kr2cache.errors import ConfigError
from kr2cache.system.console import console, waiting
from kr2cache.tasks import FAMILIES, find_task, listed_name, task_names
from kr2cache.tasks.base import HEADS, Task
from kr2cache.tasks.survey import Survey, survey
from kr2cache.tasks.udpos import LANGUAGES
from kr2cache.toml import Toml, read_toml

LABELS_SHOWN = 40
"""The most labels in the table of one task."""


def tasks_cli(
    task: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A task: read its data, and show what it holds.",
            show_default="list the tasks",
            autocompletion=task_completions,
        ),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List the tasks, and where their data comes from.

    With NAME: read the data of one task, and show counts, labels, lengths and the first examples.

    Errors in the data are found here, before any model is needed.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    if task is not None:
        _one_task(find_task(task, toml.tasks), data_for(task, data, toml), as_json)
    elif data is not None:
        raise ConfigError(
            "--data is given, but no task.", f"Give the name of a task: kr2cache tasks NAME --data {data}"
        )
    else:
        _all_tasks(toml, as_json)


def _all_tasks(toml: Toml, as_json: bool) -> None:
    from kr2cache.system.terminal import Column, print_table

    tasks = [find_task(name, toml.tasks) for name in (*task_names(), *toml.tasks)]
    if as_json:
        print_json([_about(one) for one in tasks])
        return
    columns = (
        Column("name"),
        Column("what", breaks=" ", rank=1),
        Column("metric", breaks=" ", rank=3),
        Column("data", breaks="/", rank=2),
        Column("or --data with", rank=4),
    )
    rows: dict[str, list[str]] = {}
    for one in tasks:
        name = listed_name(one.name)
        f1 = one.name.startswith("udpos")
        rows.setdefault(
            name,
            [
                name,
                one.about,
                "XTREME's F1, word accuracy" if f1 else (one.metric or "-").replace("_", " "),
                one.default_data or "-",
                f"train{one.suffixes[0]}, ...",
            ],
        )
    print_table("Tasks", columns, list(rows.values()))
    for family, languages in FAMILIES.items():
        codes = [f"{code} ({LANGUAGES[code]})" if family == "udpos" else code for code in languages]
        console.print(f"LANG of {family}: {', '.join(codes)}")


def _about(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "kind": task.kind,
        "head": HEADS.get(task.kind),
        "metric": task.metric,
        "labels": task.labels,
        "data": task.default_data,
    }


def _one_task(task: Task, data: str | None, as_json: bool) -> None:
    with waiting(f"Reading {task.name}"):
        found = survey(task, data)
    if as_json:
        splits = {split: asdict(own) for split, own in found.splits.items()}
        print_json({**_about(found.task), "data": found.corpus, "splits": splits, "missing": found.missing})
        return
    _print_counts(found)
    _print_labels(found)
    _print_examples(found)


def _print_counts(found: Survey) -> None:
    from kr2cache.system.terminal import Column, print_table

    task = found.task
    decided = f", decided by {task.metric}" if task.metric else ""
    console.print(f"{task.name}: {task.about}. Kind {task.kind}{decided}.", markup=False)
    several = any(own.sequences != own.examples for own in found.splits.values())
    columns = [
        Column("split"),
        Column("examples", right=True),
        *([Column("sequences", right=True)] if several else []),
        Column("with a label", right=True),
        Column("words (median)", right=True),
        Column("words (longest)", right=True),
        Column("id of the longest", rank=1),
    ]
    rows = [
        [
            split,
            f"{own.examples:,}",
            *([f"{own.sequences:,}"] if several else []),
            f"{own.labelled:,}",
            f"{own.median_words:g}",
            f"{own.longest_words:,}",
            own.longest_id,
        ]
        for split, own in found.splits.items()
    ]
    print_table(f"Data: {found.corpus}", columns, rows)
    if found.missing:
        console.print(f"No split {' or '.join(found.missing)}.")


def _print_labels(found: Survey) -> None:
    from kr2cache.system.terminal import Column, print_table

    splits = {split: own for split, own in found.splits.items() if own.labels is not None}
    for split, own in found.splits.items():
        if own.values is not None:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in own.values.items())
            console.print(f"Labels of {split}: {numbers}")
    if not splits:
        return
    names = found.task.labels
    # Of words; for the other kinds, of examples, which may have several labels each.
    by_word = found.task.kind == "tagging"
    totals = {split: sum((own.labels or {}).values()) if by_word else own.labelled for split, own in splits.items()}
    rows = [
        [
            name,
            *(
                f"{(own.labels or {})[name]:,} ({(own.labels or {})[name] / totals[split]:.1%})"
                for split, own in splits.items()
            ),
        ]
        for name in names[:LABELS_SHOWN]
    ]
    print_table("Labels", [Column("label"), *(Column(split, right=True) for split in splits)], rows)
    if len(names) > LABELS_SHOWN:
        console.print(f"and {len(names) - LABELS_SHOWN} more labels")


def _print_examples(found: Survey) -> None:
    split, own = next(iter(found.splits.items()))
    console.print(f"First examples of {split}:")
    for one in own.first:
        if found.task.words:
            tags = one["label"] or ["_"] * len(one["texts"][0])
            text = " ".join(f"{word}/{tag}" for word, tag in zip(one["texts"][0], tags, strict=True))
        else:
            label = ", ".join(one["label"]) if isinstance(one["label"], list) else one["label"]
            texts = "\n    ".join(" | ".join(text) for text in one["texts"])
            text = f"{'no label' if label is None else label}\n    {texts}"
        console.print(f"  {one['id']}: {text}", markup=False, highlight=False, soft_wrap=True)
