"""What the names of caches say: which tasks and resources there are. Opens no cache.

A cache is called by its resource and a hash, ``.kr2cache/udpos-de/train/gottbert-1f3a9c2e``, so it can name a resource
whose model is not on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kr2cache.errors import UnknownNameError
from kr2cache.models.registry import ModelSpec, find_model, name_of_stored

CACHE_NAME = re.compile(r"(.+)-[0-9a-f]{8}")


def tasks_and_resources(cache_dir: Path) -> list[tuple[str, str]]:
    """(task, resource) of every cache."""
    folders = {path.parent for path in cache_dir.glob("*/*/*/shard-*.h5")}
    return sorted({(folder.parent.parent.name, folder.name.rpartition("-")[0]) for folder in folders})


def find_resource(name: str, cache_dir: Path, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model called ``name``, as ``find_model`` has it, or the resource of a cache.

    Args:
        name: Also a resource as caches record it, or a cache as ``kr2cache cache list`` shows it.

    Raises:
        UnknownNameError: If it is none of these.
        ModelUnavailableError: For a model folder that does not exist.
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
    """The resource of the cache called ``name``: its folder, a path below ``cache_dir``, or the folder's own name."""
    named = CACHE_NAME.fullmatch(Path(name).name)
    if named is None:
        return None
    places = [Path(name).expanduser(), cache_dir / name]
    if Path(name).name == name:
        places += cache_dir.glob(f"*/*/{name}")
    return named[1] if any(next(place.glob("shard-*.h5"), None) for place in places) else None


def _stored(resource: str, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model of that name; one that nothing is known of but its caches, where it was given as a folder."""
    try:
        return find_model(name_of_stored(resource, overrides), overrides)
    except UnknownNameError:
        return ModelSpec(name=resource)
