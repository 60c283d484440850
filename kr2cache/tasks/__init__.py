"""Data sets: examples, ids, labels, head and metric. Each family has a file, and one line here registers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kr2cache.errors import ConfigError, unknown_name
from kr2cache.tasks.base import Example, Task, split_name
from kr2cache.tasks.declared import DeclaredTask
from kr2cache.tasks.files import SPLITS
from kr2cache.tasks.hellaswag import HellaSwag
from kr2cache.tasks.piqa import Piqa
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.snli import Snli
from kr2cache.tasks.swag import Swag
from kr2cache.tasks.text import Text, Words
from kr2cache.tasks.udpos import LANGUAGES, UdPos

__all__ = ["COUNTS", "SPLITS", "Example", "Task", "find_task", "split_name", "task_names"]

ROW_TASKS: tuple[type[RowTask], ...] = (Snli, Swag, Piqa, HellaSwag, Text, Words)
"""Add your own task here."""

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
    if name not in declared:
        return _built_in(name, declared)
    if name in task_names():
        raise ConfigError(f"[tasks.{name}]: there is a built-in task {name}.", "Give yours another name.")
    task = declared[name]
    return task if isinstance(task, Task) else DeclaredTask.of_table(name, task)


def _built_in(name: str, declared: Mapping[str, Any]) -> Task:
    for task in ROW_TASKS:
        if task.name == name:
            return task()
    if name == "udpos":
        return UdPos(None)
    if name.startswith("udpos-") and name.removeprefix("udpos-") in LANGUAGES:
        return UdPos(name.removeprefix("udpos-"))
    raise unknown_name(
        "task", name, [*task_names(), *declared], "A task of your own: [tasks.NAME] in kr2cache.toml declares it."
    )


def task_names() -> list[str]:
    """The names of all tasks, in the order of the list."""
    return ["udpos", *(f"udpos-{language}" for language in sorted(LANGUAGES)), *(task.name for task in ROW_TASKS)]
