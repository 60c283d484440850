"""Data sets: examples, ids, labels, head and metric. Each family has a file, and one line here registers it."""

from __future__ import annotations

from kr2cache.errors import unknown_name
from kr2cache.tasks.base import Example, Task, split_name
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


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        UnknownNameError: If there is no such task. The message gives the nearest name and all names.
    """
    for task in ROW_TASKS:
        if task.name == name:
            return task()
    if name == "udpos":
        return UdPos(None)
    if name.startswith("udpos-") and name.removeprefix("udpos-") in LANGUAGES:
        return UdPos(name.removeprefix("udpos-"))
    raise unknown_name("task", name, task_names())


def task_names() -> list[str]:
    """The names of all tasks, in the order of the list."""
    return ["udpos", *(f"udpos-{language}" for language in sorted(LANGUAGES)), *(task.name for task in ROW_TASKS)]
