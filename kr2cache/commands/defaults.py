"""The resource and the task, if neither the command line nor ``kr2cache.toml`` gives them.

They come from the registry, then from the caches. If there are several choices, an error lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kr2cache.errors import ConfigError
from kr2cache.models.registry import find_model, known_models
from kr2cache.store.stored import find_resource, tasks_and_resources
from kr2cache.tasks import find_task, task_names


def choose_resource(cache_dir: Path, task: str | None, reader: str, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The one resource that has caches (of ``task``, if it is known). Caches of the reader come from method kreader2;
    they count only if there are no others.

    Raises:
        UnknownNameError: If there is no such task.
        ConfigError: If there is no resource, or there are several.
    """
    if task is not None:
        find_task(task)
    held = sorted({resource for name, resource in tasks_and_resources(cache_dir) if task in (None, name)})
    if len(held) > 1:
        own = find_model(reader, overrides).name
        held = [name for name in held if name != own] or held
    if len(held) == 1:
        return held[0]
    if held:
        raise ConfigError(
            f"Which resource? {cache_dir} holds {', '.join(held)}.",
            "Give --resource, or resource under [defaults] in kr2cache.toml.",
        )
    raise ConfigError(
        f"Which resource? None is given, and {cache_dir} holds no cache{f' of {task}' if task else ''} yet.",
        "Give --resource, or resource under [defaults] in kr2cache.toml: "
        f"{', '.join(known_models(overrides))}, a hub id or a folder.",
    )


def choose_task(resource: str | None, cache_dir: Path, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The task of the resource's language, else the one task that has caches.

    Raises:
        ConfigError: If there is none, or there are several.
    """
    if resource is not None:
        spec = find_resource(resource, cache_dir, overrides)
        if spec.language is not None:
            return f"udpos-{spec.language}"
        own = sorted({task for task, name in tasks_and_resources(cache_dir) if name == spec.name})
        if len(own) == 1:
            return own[0]
        if own:
            raise ConfigError(
                f"Which task? {cache_dir} holds caches of {spec.name} for several.",
                f"Give --task, or task under [defaults] in kr2cache.toml: {', '.join(own)}",
            )
    held = sorted({name for name, _ in tasks_and_resources(cache_dir)})
    if len(held) == 1:
        return held[0]
    choices = ", ".join(held or task_names())
    why = f"{resource!r} has no single language" if resource else "no resource is given"
    raise ConfigError(
        f"Which task? {why}, and {cache_dir} holds {'several' if held else 'no cache'}.",
        f"Give --task, or task under [defaults] in kr2cache.toml: {choices}",
    )
