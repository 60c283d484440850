"""Which tasks and resources have caches, from the names of their folders alone: no cache is opened.

So a cache can name a resource whose model is not on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kr2cache.errors import UnknownNameError
from kr2cache.models.registry import ModelSpec, find_model, name_of_stored
from kr2cache.store import folders


def tasks_and_resources(cache_dir: Path) -> list[tuple[str, str]]:
    """(task, resource) of every cache."""
    return sorted({(folders.task_of(f), folders.name_of(f)) for f in folders.matching(cache_dir) if _has_shards(f)})


def find_resource(name: str, cache_dir: Path, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model ``name``, as ``find_model`` gives it, or the resource of a cache.

    Args:
        name: A model, a resource as caches record it, or a cache as ``kr2cache cache list`` shows it.
        cache_dir: Where the caches are.
        overrides: As for ``find_model``.

    Raises:
        UnknownNameError: If ``name`` is none of these.
        ModelUnavailableError: If ``name`` is a model folder that does not exist.
    """
    if (resource := _resource_of(name, cache_dir)) is not None:
        return _stored(resource, overrides)
    try:
        return find_model(name, overrides)
    except UnknownNameError:
        if name in {resource for _, resource in tasks_and_resources(cache_dir)}:
            return _stored(name, overrides)
        raise


def _resource_of(name: str, cache_dir: Path) -> str | None:
    """The resource of the cache ``name``: a folder, a path below ``cache_dir``, or a folder name there."""
    resource = folders.name_in(name)
    if resource is None:
        return None
    places = [Path(name).expanduser(), cache_dir / name]
    if Path(name).name == name:
        places += [folder for folder in folders.matching(cache_dir, name=resource) if folder.name == name]
    return resource if any(map(_has_shards, places)) else None


def has_caches(cache_dir: Path, task: str, resource: str) -> bool:
    """Whether any split of a task has a cache of the resource."""
    return any(map(_has_shards, folders.matching(cache_dir, task=task, name=resource)))


def _has_shards(folder: Path) -> bool:
    return next(folder.glob("shard-*.h5"), None) is not None


def _stored(resource: str, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model with the name that a cache records. If the model was a folder, only its name is known."""
    try:
        return find_model(name_of_stored(resource, overrides), overrides)
    except UnknownNameError:
        return ModelSpec(name=resource)
