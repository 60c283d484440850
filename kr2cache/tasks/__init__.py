"""What a data set is: its examples, ids, labels, head and metric. One file per family, one line here to register it."""

from __future__ import annotations

from kr2cache.errors import unknown_name
from kr2cache.tasks.base import Example, Task, split_name
from kr2cache.tasks.files import SPLITS
from kr2cache.tasks.hellaswag import HellaSwag
from kr2cache.tasks.piqa import Piqa
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.snli import Snli
from kr2cache.tasks.swag import Swag
from kr2cache.tasks.udpos import LANGUAGES, UdPos

__all__ = ["SPLITS", "Example", "Task", "find_task", "split_name", "task_names"]

ROW_TASKS: tuple[type[RowTask], ...] = (Snli, Swag, Piqa, HellaSwag)
"""A task of one's own joins here."""


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        UnknownNameError: With the nearest name and the names that exist.
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
    """Every task, in the order they are listed."""
    return ["udpos", *(f"udpos-{language}" for language in sorted(LANGUAGES)), *(task.name for task in ROW_TASKS)]
