"""Data sets: examples, ids, labels, head and metric. Each family has a file, and one line here registers it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kr2cache.errors import ConfigError, UnknownNameError, nearest
from kr2cache.tasks.base import Example, Task, split_name
from kr2cache.tasks.declared import DeclaredTask
from kr2cache.tasks.files import SPLITS
from kr2cache.tasks.hellaswag import HellaSwag
from kr2cache.tasks.piqa import Piqa
from kr2cache.tasks.plugins import plugin_names, plugin_task
from kr2cache.tasks.ready import LANGUAGES as READY_LANGUAGES
from kr2cache.tasks.ready import READY, ReadyTask
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.snli import Snli
from kr2cache.tasks.swag import Swag
from kr2cache.tasks.text import Text, Words
from kr2cache.tasks.udpos import LANGUAGES, UdPos

__all__ = ["COUNTS", "SPLITS", "Example", "Task", "find_task", "split_name", "task_names"]

ROW_TASKS: tuple[type[RowTask], ...] = (Snli, Swag, Piqa, HellaSwag, Text, Words)
"""Add your own task here."""

FAMILIES: Mapping[str, Sequence[str]] = {"udpos": sorted(LANGUAGES), **READY_LANGUAGES}
"""The languages of tasks that exist in several, by the first part of their names."""

COUNTS = {**UdPos.counts, **{name: title for task in ROW_TASKS for name, title in task.counts.items()}}
"""The counts of all tasks: name to the title of its column."""


def find_task(name: str, declared: Mapping[str, Any] = {}) -> Task:
    """The task called ``name``.

    Args:
        declared: Tasks by their names: ``[tasks]`` of ``kr2cache.toml``, or ``Task`` objects.

    Raises:
        UnknownNameError: If there is no such task. The message gives the nearest name and all names.
        ConfigError: If it is declared in a wrong way, or under the name of a task that exists.
    """
    given = declared.get(name)
    if (task := _built_in(name)) is not None:
        if given is not None and type(given) is not type(task):  # a run would be predicted with the built-in task
            what = f"The task of class {type(given).__name__}" if isinstance(given, Task) else f"[tasks.{name}]"
            raise ConfigError(f"{what}: there is a built-in task {name}.", "Give yours another name.")
        return given or task
    if isinstance(given, Task):
        return given
    if given is not None:
        return DeclaredTask.of_table(name, given)
    if (task := plugin_task(name)) is not None:
        return task
    known = [*task_names(), *declared]
    raise UnknownNameError(
        f"Unknown task {name!r}.{nearest(name, known)}",
        f"Known: {names_text(known)}. A task of your own: [tasks.NAME] in kr2cache.toml declares it.",
    )


def _built_in(name: str) -> Task | None:
    for kind in ROW_TASKS:
        if kind.name == name:
            return kind()
    if name == "udpos":
        return UdPos(None)
    if name.startswith("udpos-") and name.removeprefix("udpos-") in LANGUAGES:
        return UdPos(name.removeprefix("udpos-"))
    return ReadyTask.of_table(name, READY[name]) if name in READY else None


def task_names() -> list[str]:
    """The names of all tasks, in the order of the list. Those of other packages come last."""
    own = ["udpos", *(f"udpos-{language}" for language in sorted(LANGUAGES)), *(task.name for task in ROW_TASKS)]
    own += READY
    return own + [name for name in plugin_names() if name not in own]


def listed_name(name: str) -> str:
    """The name under which lists have a task: ``xnli-LANG`` for all of ``xnli-ar``, ``xnli-bg``, ..."""
    family, _, language = name.partition("-")
    return f"{family}-LANG" if language in FAMILIES.get(family, ()) else name


def names_text(names: Iterable[str]) -> str:
    """Names of tasks, for errors."""
    return ", ".join(sorted(dict.fromkeys(map(listed_name, names))))
