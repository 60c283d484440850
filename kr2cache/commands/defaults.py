"""The settings of a call: what is given, then ``[defaults]`` of ``kr2cache.toml``, then the registry and the caches.

The command line and Python (``kr2cache.calls``) settle them here. If there are several choices, an error lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kr2cache.config import ExtractConfig, TrainConfig, default_cache_dir, parse_seeds
from kr2cache.errors import ConfigError
from kr2cache.methods import METHODS
from kr2cache.models.registry import find_model, known_models
from kr2cache.store.stored import find_resource, tasks_and_resources
from kr2cache.tasks import Task, find_task, names_text, split_name, task_names
from kr2cache.tasks.files import is_folder, split_of
from kr2cache.toml import Toml


def merge(toml: Toml, **given: Any) -> dict[str, Any]:
    """The options that the call or ``[defaults]`` gives. The call wins; None means not given."""
    values = {name: toml.defaults[name] for name in given if name in toml.defaults}
    return values | {name: value for name, value in given.items() if value is not None}


def extract_config(toml: Toml, **given: Any) -> ExtractConfig:
    """The settings of stage one.

    Args:
        toml: ``kr2cache.toml``.
        given: Each option of ``extract``; None for one that is not given.
    """
    settings = merge(toml, **given)
    if "resource" not in settings:
        raise ConfigError(
            "Which resource?",
            "Give --resource, or resource under [defaults] in kr2cache.toml: "
            f"{', '.join(known_models(toml.models))}, a hub id or a folder.",
        )
    if not isinstance(settings["resource"], str):
        raise ConfigError(
            f"resource under [defaults] in kr2cache.toml names several: {', '.join(settings['resource'])}.",
            "extract runs one: give it as --resource.",
        )
    if "task" not in settings:
        where = settings.get("cache_dir", default_cache_dir())
        settings["task"] = choose_task(settings["resource"], where, toml.models)
    settings["data"] = data_for(settings["task"], given["data"], toml)
    if "split" in settings:
        settings["split"] = split_name(settings["split"])
    else:
        path = find_task(settings["task"], toml.tasks).path_of(settings.get("data"))
        settings["split"] = "train" if path is None or is_folder(path) else split_of(path)
    return ExtractConfig(**settings, models=toml.models, tasks=toml.tasks)


def train_config(toml: Toml, *, extract: bool, **given: Any) -> TrainConfig:
    """The settings of stage two.

    Args:
        toml: ``kr2cache.toml``.
        extract: Whether missing caches are made.
        given: Each option of ``train``; None for one that is not given.
    """
    settings = merge(toml, **given, dtype=None, compute_dtype=None)
    if "max_length" in toml.defaults:  # it is meant for both stages
        settings.setdefault("resource_max_length", toml.defaults["max_length"])
    if "seeds" in settings:
        settings["seeds"] = parse_seeds(settings["seeds"])
    where = settings.get("cache_dir", default_cache_dir())
    if "resource" not in settings:
        try:
            reader = settings.get("reader", TrainConfig.reader)
            settings["resource"] = choose_resource(where, settings.get("task"), reader, toml)
        except ConfigError:
            method = METHODS.get(settings.get("method", TrainConfig.method))
            if method is not None and method.needs_resource:
                raise
    if "task" not in settings:
        resource = settings.get("resource")
        first = resource[0] if isinstance(resource, tuple) else resource
        settings["task"] = choose_task(first, where, toml.models)
    settings["data"] = data_for(settings["task"], given["data"], toml)
    return TrainConfig(**settings, extract=extract, models=toml.models, tasks=toml.tasks, training=toml.training)


def choose_resource(cache_dir: Path, task: str | None, reader: str, toml: Toml) -> str:
    """The one resource that has caches (of ``task``, if it is known). Caches of the reader come from method kreader2;
    they count only if there are no others.

    Raises:
        UnknownNameError: If there is no such task.
        ConfigError: If there is no resource, or there are several.
    """
    if task is not None:
        find_task(task, toml.tasks)
    held = sorted({resource for name, resource in tasks_and_resources(cache_dir) if task in (None, name)})
    if len(held) > 1:
        own = find_model(reader, toml.models).name
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
        f"{', '.join(known_models(toml.models))}, a hub id or a folder.",
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
    choices = ", ".join(held) or names_text(task_names())
    why = f"{resource!r} has no single language" if resource else "no resource is given"
    raise ConfigError(
        f"Which task? {why}, and {cache_dir} holds {'several' if held else 'no cache'}.",
        f"Give --task, or task under [defaults] in kr2cache.toml: {choices}",
    )


def data_for(task: str, given: str | None, toml: Toml) -> str | None:
    """The data of a call; None for the task's own. The data of a declared task is nearer to it than ``data`` under
    ``[defaults]``.

    Args:
        task: Its name.
        given: The data that the call gives.
        toml: ``kr2cache.toml``.
    """
    declared = toml.tasks.get(task, {})
    own = declared.default_data if isinstance(declared, Task) else declared.get("data")
    if given is not None or own is not None:
        return given
    data: str | None = toml.defaults.get("data")
    return data
