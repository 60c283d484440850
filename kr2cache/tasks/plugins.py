"""Tasks of other packages, by the entry point group ``kr2cache.tasks``.

An entry point's name is the task's. It names a ``Task`` object, or a class or function that makes one.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from kr2cache.errors import ConfigError, error_text
from kr2cache.tasks.base import Task

GROUP = "kr2cache.tasks"


def plugin_names() -> list[str]:
    """The names of all tasks of other packages, sorted. Nothing of these packages is imported."""
    return sorted(entry_points(group=GROUP).names)


def plugin_task(name: str) -> Task | None:
    """The task of another package; None if no package has one of this name.

    Raises:
        ConfigError: If two packages have one, or it cannot be imported, or is no task. The message names the package.
    """
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        return None
    packages = sorted({_package(one) for one in found})
    if len(packages) > 1:
        raise ConfigError(
            f"Several packages have a task {name!r}: {', '.join(packages)}.", "Uninstall all of them but one."
        )
    who = f"The task {name!r} of the package {packages[0]}"
    try:
        loaded = found[0].load()
        task = loaded if isinstance(loaded, Task) else loaded()
    except Exception as error:  # code of another package may raise anything
        raise ConfigError(
            f"{who} cannot be loaded: {error_text(error)}",
            f"Check the package's installation. Its entry point is {found[0].value!r}.",
        ) from error
    if not isinstance(task, Task):
        raise ConfigError(
            f"{who} is a {type(task).__name__}, not a Task of kr2cache.",
            f"Its entry point {found[0].value!r} has to name a Task, or what makes one.",
        )
    if task.name != name:
        raise ConfigError(
            f"{who} calls itself {task.name!r}.", "Its package has to give entry point and task one name."
        )
    return task


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "(unknown)"
