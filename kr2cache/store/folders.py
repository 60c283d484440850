"""Where caches are: ``CACHE_DIR/TASK/SPLIT/NAME-DIGEST``, for example ``.kr2cache/udpos-de/train/gottbert-1f3a9c2e``.

Only this module builds these paths and takes them apart. NAME is the resource; DIGEST is the beginning of the cache's
fingerprint. No file is opened here.
"""

from __future__ import annotations

import contextlib
import glob
import re
from pathlib import Path

DIGEST_LENGTH = 8
_NAME = re.compile(rf"(.+)-([0-9a-f]{{{DIGEST_LENGTH}}})")


def split_folder(cache_dir: Path, task: str, split: str) -> Path:
    """The folder of all caches of a task's split."""
    return cache_dir / task / split


def cache_folder(cache_dir: Path, task: str, split: str, name: str, fingerprint: str) -> Path:
    """The folder of one cache."""
    return split_folder(cache_dir, task, split) / f"{name}-{fingerprint[:DIGEST_LENGTH]}"


def cache_dir_of(folder: Path, task: str, split: str) -> Path | None:
    """The reverse of ``cache_folder``: the cache directory that contains ``folder``. None if ``folder`` is elsewhere,
    as a copy of a cache can be. ``folder`` may be relative, ``.``, or a link.
    """
    for place in (folder.absolute(), folder.resolve()):  # a link in a cache directory may lead to another disk
        if (place.parent.parent.name, place.parent.name) == (task, split):
            return place.parent.parent.parent
    return None


def matching(
    cache_dir: Path, *, task: str | None = None, split: str | None = None, name: str | None = None
) -> list[Path]:
    """The folders in the places of caches, sorted. They need not hold shards.

    Args:
        cache_dir: Where to look.
        task: Only this task; None for all tasks.
        split: Only this split; None for all splits.
        name: Only caches of this name, whatever their digest.
    """
    parts = ["*" if part is None else glob.escape(part) for part in (task, split)]
    pattern = "*" if name is None else f"{glob.escape(name)}-*"
    found = cache_dir.glob("/".join([*parts, pattern]))
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))  # claims are hidden


def task_of(folder: Path) -> str:
    """TASK"""
    return folder.parent.parent.name


def name_of(folder: Path) -> str:
    """NAME, also of a folder that was renamed so that no digest follows the last hyphen."""
    return folder.name.rpartition("-")[0]


def digest_of(folder: Path) -> str:
    """DIGEST, or what follows the last hyphen of a folder that was renamed."""
    return folder.absolute().name.rpartition("-")[2]


def name_in(text: str) -> str | None:
    """NAME if ``text`` ends like the path of a cache, else None."""
    match = _NAME.fullmatch(Path(text).name)
    return None if match is None else match[1]


def remove_empty_parents(folder: Path) -> None:
    """Remove SPLIT, and then TASK, if they are empty."""
    with contextlib.suppress(OSError):  # other caches are there
        folder.parent.rmdir()
        folder.parent.parent.rmdir()
