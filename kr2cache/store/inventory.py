"""List caches, open them, describe one, remove one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.reader import FeatureCache
from kr2cache.config import DEFAULT_POOL, local
from kr2cache.errors import BusyError, CacheError, ConfigError
from kr2cache.store import folders, provenance
from kr2cache.store.sharing import whole_cache
from kr2cache.system.console import bytes_text, count_text, time_text
from kr2cache.system.owners import reader_of

_FOUND = {
    "weights": "other weights",
    "config": "another configuration of the model",
    "template": "another template",
    "segments": "other segment ids",
}
"""Found fields of the provenance that concern a whole cache, with the words for a difference."""
SAMPLE = 200
"""At most this many sequences, evenly spaced, are read for the norms."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One folder of shards."""

    folder: Path
    bytes: int
    """On disk."""
    problem: str | None
    """Why the cache cannot be read; then the fields below are empty."""
    resource: str = ""
    task: str = ""
    corpus: str = ""
    split: str = ""
    sequences: int = 0
    complete: int = 0
    tokens: int = 0
    layers: tuple[int, ...] = ()
    fusion: dict[str, Any] | None = None
    dtype: str = ""
    pool: str = DEFAULT_POOL
    fingerprint: str = ""
    written: float = 0.0
    """When the newest shard was last written, in seconds since 1970. Copying a cache can change it."""
    stale: str = ""
    """What changed since: a newer cache of the same names was made from other contents. Empty if there is none."""

    @property
    def written_text(self) -> str:
        """``2026-11-27 23:50`` in this machine's time zone; empty if unknown."""
        return time_text(self.written) if self.written else ""

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "written": self.written_text or None}


def cache_folders(cache_dir: Path) -> list[Path]:
    """Every folder with shards below ``cache_dir``, also if its extraction stopped before the first shard was ready."""
    return [
        folder
        for folder in folders.matching(cache_dir)
        if any(next(folder.glob(pattern), None) for pattern in ("*.h5", "*.h5.partial"))
    ]


def open_caches(cache_dir: Path, task: str, split: str) -> tuple[list[FeatureCache], dict[Path, CacheError]]:
    """Open every cache of a task's split.

    Returns:
        The caches; and the folders that cannot be read as caches, with the reason.
    """
    root = folders.split_folder(cache_dir, task, split)
    caches, unreadable = [], {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        try:
            cache = FeatureCache.open(folder)
            provenance.chosen_of(cache.provenance, folder)
            caches.append(cache)
        except CacheError as error:
            unreadable[folder] = error
    return caches, unreadable


def entry(folder: Path) -> Entry:
    """Describe what one folder holds."""
    size = sum(path.stat().st_size for path in _files(folder))
    try:
        cache = FeatureCache.open(folder)
        chosen = provenance.chosen_of(cache.provenance, folder)
    except CacheError as error:
        return Entry(folder=folder, bytes=size, problem=error.message)
    return Entry(
        folder=folder,
        bytes=size,
        problem=None,
        resource=chosen.resource,
        task=chosen.task,
        corpus=chosen.corpus,
        split=chosen.split,
        sequences=len(cache.n_tokens),
        complete=len(cache),
        tokens=int(cache.n_tokens.sum(dtype=np.int64)),
        layers=cache.layers,
        fusion=cache.fusion,
        dtype=cache.dtype,
        pool=chosen.pool,
        fingerprint=cache.fingerprint,
        written=max(path.stat().st_mtime for path in _files(folder)),
    )


def entries(cache_dir: Path) -> list[Entry]:
    """Describe every folder with shards below ``cache_dir``, and find stale caches."""
    found = [entry(folder) for folder in cache_folders(cache_dir)]
    of_names: dict[tuple[str, ...], list[Entry]] = {}
    for one in found:
        if one.problem is None:
            of_names.setdefault((one.resource, one.task, one.corpus, one.split), []).append(one)
    for alike in of_names.values():
        *older, newest = sorted(alike, key=lambda one: one.written)
        for one in older:
            if changes := _changes(one.folder, newest.folder):
                place = found.index(one)
                found[place] = replace(one, stale=f"{newest.folder.name} is newer: {', '.join(changes)}")
    return found


def _changes(older: Path, newer: Path) -> list[str]:
    """What changed between two caches of the same names, in words. Fewer layers or examples, or another dtype, are no
    change: training can still use both caches.
    """
    then, now = FeatureCache.open(older), FeatureCache.open(newer)
    made, remade = then.provenance["found"], now.provenance["found"]
    rounded = provenance.weights_dtype_of(then.provenance) != provenance.weights_dtype_of(now.provenance)
    compared = {name: text for name, text in _FOUND.items() if not (rounded and name == "weights")}
    changes = [text for name, text in compared.items() if made.get(name) != remade.get(name)]
    positions = now.find(then.ids)
    in_both = positions >= 0
    changed = int(np.count_nonzero(then.text_xxh3[in_both] != now.text_xxh3[positions[in_both]]))
    if changed:
        changes.append(f"{changed:,} of {count_text(len(in_both), 'text')} changed")
    same_texts = made.get("texts") == remade.get("texts")
    same_length = then.provenance["chosen"]["max_length"] == now.provenance["chosen"]["max_length"]
    same_pool = provenance.pool_of(then.provenance) == provenance.pool_of(now.provenance)
    if same_texts and same_length and same_pool and made.get("tokens") != remade.get("tokens"):
        changes.append("other tokens")
    return changes


def find_cache(name: str, cache_dir: Path) -> Path:
    """The folder of the cache ``name``.

    Args:
        name: A folder, a path below ``cache_dir`` (as ``cache list`` shows it), or (the beginning of) a folder name
            there.
        cache_dir: Where the caches are.

    Returns:
        The folder as ``name`` writes it; the full path for ``.`` and ``..``.

    Raises:
        ConfigError: If no cache or several caches match (the message lists them), or ``name`` is a URL.
    """
    local(Path(name), "The cache")
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: ~ of an unknown user
        for folder in (Path(name).expanduser(), cache_dir / name):
            if name and folder.is_dir():
                return folder.resolve() if folder.name in ("", "..") else folder
    name = name.rstrip("/")
    stored = cache_folders(cache_dir)
    for matches in ([f for f in stored if f.name == name], [f for f in stored if name and f.name.startswith(name)]):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(
                f"{name!r} may be {' or '.join(map(str, matches[:6]))}.", "Give the whole folder, or more of its name."
            )
    names = ", ".join(folder.name for folder in stored[:8]) or "none"
    raise ConfigError(f"There is no cache {name!r} in {cache_dir}.", f"There are: {names} (kr2cache cache list).")


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """Statistics of a cache."""

    lengths: tuple[list[int], list[int]]
    """Histogram of tokens per sequence: edges (k+1), counts (k)."""
    norms: list[float]
    """For each stored layer, the mean Euclidean norm of a state."""
    largest: list[float]
    """For each stored layer, the largest magnitude of a value."""
    sampled: int
    """How many sequences were read for norms and magnitudes."""


def portrait(cache: FeatureCache) -> Portrait:
    """Lengths of all sequences; norms and magnitudes of at most ``SAMPLE`` complete sequences, evenly spaced."""
    complete = np.flatnonzero(cache.complete)
    step = max(1, len(complete) // SAMPLE)
    sample = complete[::step][:SAMPLE]
    sums = np.zeros(len(cache.layers))
    largest = np.zeros(len(cache.layers))
    tokens = 0
    for position in sample.tolist():
        cache.read_ahead(np.array([position]))
        states_LTD = cache.states(position).astype(np.float32)
        sums += np.linalg.norm(states_LTD, axis=2).sum(axis=1)
        largest = np.maximum(largest, np.abs(states_LTD).max(axis=(1, 2)))
        tokens += states_LTD.shape[1]
    edges = _edges(cache.n_tokens)
    counts = np.histogram(cache.n_tokens, edges)[0]
    return Portrait(
        lengths=(edges.tolist(), counts.tolist()),
        norms=(sums / max(1, tokens)).tolist(),
        largest=largest.tolist(),
        sampled=len(sample),
    )


def _edges(n_tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    """The edges of about ten bins of whole numbers, from the shortest to the longest sequence."""
    shortest, longest = int(n_tokens.min()), int(n_tokens.max())
    step = max(1, -(-(longest - shortest + 1) // 10))
    return np.arange(shortest, longest + step + 1, step)


def _files(folder: Path) -> Iterator[Path]:
    for pattern in ("*.h5", "*.partial"):
        yield from (path for path in folder.glob(pattern) if path.is_file())


@dataclass(frozen=True)
class Removable:
    """A cache as it is when the user is asked whether to remove it."""

    folder: Path
    bytes: int
    """On disk; removing it frees them."""
    files: dict[str, tuple[int, int, int]]
    """By name: inode, size in bytes, time of the last change in ns."""


def removable(folder: Path) -> Removable:
    """Look at a cache that may be removed.

    Raises:
        CacheError: If the folder holds no shard.
    """
    found = {path.name: path.stat() for path in _files(folder)}
    if not any(name.startswith("shard-") for name in found):
        raise CacheError(f"{folder} is no cache: it holds no shard.", "kr2cache cache list shows the caches.")
    return Removable(
        folder=folder,
        bytes=sum(stat.st_blocks * 512 for stat in found.values()),
        files={name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()},
    )


def remove(seen: Removable) -> str:
    """Delete the shards of a cache, and its folder if nothing else is in it; also the folder's name if it is a link.

    Returns:
        What was done, in words.

    Raises:
        BusyError: If a process writes the cache, or one of this machine reads it, or if it changed since it was seen.
        CacheError: If the folder holds no shard any more.
    """
    folder = seen.folder
    with whole_cache(folder, wait=False):
        if removable(folder).files != seen.files:
            raise BusyError(
                f"{folder} changed after you were asked: another process wrote to it. It was not removed.",
                "Give the same command again if it is to be removed.",
            )
        if (reader := reader_of(folder)) is not None:
            raise BusyError(
                f"{folder} is being read by {reader}. It was not removed.", "Wait until that is done, or stop it."
            )
        for path in list(_files(folder)):
            path.unlink()
        rest = [path.name for path in folder.iterdir()]
        if not rest:
            folder.resolve().rmdir()
            if folder.is_symlink():
                folder.unlink()
    if not rest:
        folders.remove_empty_parents(folder)
    kept = f"; {', '.join(sorted(rest)[:3])} in it is not of the cache and was kept" if rest else ""
    return f"Removed {folder}, {bytes_text(seen.bytes)} freed{kept}."
