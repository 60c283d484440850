"""Open one cache folder, or several folders as one cache, and check that they belong together.

Each of several folders is a cache of its own and holds a part of one corpus. All were extracted with the same model and
the same settings; only the texts differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kr2cache.cache.format import ShardHeader
from kr2cache.cache.rows import map_shard
from kr2cache.cache.shard import Shard, open_shard, shard_paths
from kr2cache.errors import CacheError, ConfigError
from kr2cache.system.limits import allow_open_files

STORED = ("layers", "model_layers", "width", "dtype", "fusion")
"""Attributes that say what is stored for one token. They are equal in all parts."""
OF_TEXTS = ("corpus", "split", "texts", "tokens", "sequences")
"""Chosen and found fields that say which texts are stored. They may differ between parts; all others are equal."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The opened shards of one or several cache folders, in the order of the folders."""

    folders: tuple[Path, ...]
    headers: tuple[ShardHeader, ...]
    """One for each folder."""
    shards: tuple[Shard, ...]
    maps: tuple[mmap.mmap | None, ...]
    """One for each shard; None if it cannot be mapped."""

    @property
    def header(self) -> ShardHeader:
        """The header of the first folder. Its attributes ``STORED`` are the same in all folders."""
        return self.headers[0]

    @property
    def name(self) -> str:
        """The folders, as text for messages."""
        more = len(self.folders) - 1
        return str(self.folders[0]) + (f" (and {more:,} more folder{'s' if more > 1 else ''})" if more else "")

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the only folder, or the SHA-256 of the fingerprints of several folders."""
        if len(self.headers) == 1:
            return self.header.fingerprint
        return hashlib.sha256("\n".join(header.fingerprint for header in self.headers).encode()).hexdigest()

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The provenance of the only folder, or the fields that are equal in several folders."""
        result = self.header.provenance
        for header in self.headers[1:]:
            result = _in_both(result, header.provenance)
        return result

    @cached_property
    def every_place(self) -> list[int]:
        """The places of all stored layers: 0, 1, and so on."""
        return list(range(len(self.header.layers)))

    def places(self, layers: Sequence[int] | None) -> list[int]:
        """The place in the file of each of these layers of the model. ``layers=None`` means all stored layers.

        Raises:
            ConfigError: For a layer that is not stored.
        """
        if layers is None:
            return self.every_place
        stored, fusion = self.header.layers, self.header.fusion
        if fusion is not None:
            raise ConfigError(
                f"{self.name} holds one fusion of layers {', '.join(map(str, fusion['layers']))}, no layers.",
                "Read it without layer numbers, or use the cache that it was made from.",
            )
        missing = sorted(set(layers) - set(stored))
        if missing or not layers:
            raise ConfigError(
                f"{self.name} does not hold layer {', '.join(map(str, missing)) or '(none asked for)'}; "
                f"it holds {', '.join(map(str, stored))}.",
                "Extract again with --layers all.",
            )
        return [stored.index(layer) for layer in layers]

    def only(self, what: str) -> int:
        """The number of the only folder, which is 0.

        Args:
            what: What each folder has of its own; the error names it.

        Raises:
            ConfigError: If there are several folders.
        """
        if len(self.folders) > 1:
            raise ConfigError(
                f"{self.name} were opened as one, but each has its own {what}.", "Open one of them for this."
            )
        return 0


def open_parts(folders: str | Path | Sequence[str | Path]) -> Parts:
    """Open all shards, and check that they belong together.

    Raises:
        CacheError: If a shard is missing or damaged; if a shard belongs to another cache than the first shard of its
            folder; or if a folder does not fit the first folder.
        ConfigError: If no folder is given, or if a folder is given twice.
    """
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    if not paths:
        raise ConfigError("There is no cache folder to open.", "Give one folder or more.")
    seen: dict[str, Path] = {}
    shards: list[Shard] = []
    maps: list[mmap.mmap | None] = []
    headers: list[ShardHeader] = []
    for path in paths:
        if len(paths) > 1:
            _check_not_seen(path, seen)
        for number, file in enumerate(files := shard_paths(path)):
            shard = open_shard(file)
            if number == 0:
                allow_open_files(len(files))  # each map keeps its file open
                headers.append(shard.header)
                _check_fits(paths[0], headers[0], path, shard.header)
            else:
                shard = _of_same_cache(shard, files[0], headers[-1])
            shard, mapped = map_shard(shard)
            shards.append(shard)
            maps.append(mapped)
    return Parts(folders=tuple(paths), headers=tuple(headers), shards=tuple(shards), maps=tuple(maps))


def one_shard(file: Path) -> Parts:
    """One shard of a folder alone: the others may be damaged.

    Raises:
        CacheError: If the shard is damaged.
    """
    shard, mapped = map_shard(open_shard(file))
    return Parts(folders=(file.parent,), headers=(shard.header,), shards=(shard,), maps=(mapped,))


def _of_same_cache(shard: Shard, first: Path, header: ShardHeader) -> Shard:
    """The shard, with ``header`` in place of its own equal one: all shards of a folder share one object.

    Raises:
        CacheError: If the shard's own header differs.
    """
    if shard.header != header:
        raise CacheError(
            f"{shard.path} belongs to another cache than {first.name} (fingerprint "
            f"{shard.header.fingerprint[:8]}, not {header.fingerprint[:8]}).",
            "Keep the shards of one cache in a folder of their own.",
        )
    return dataclasses.replace(shard, header=header)


def _check_not_seen(folder: Path, seen: dict[str, Path]) -> None:
    real = str(folder.resolve())
    if real in seen:
        same = "" if seen[real] == folder else f", which is also {seen[real]},"
        raise ConfigError(f"{folder}{same} is given twice.", "Give each folder once.")
    seen[real] = folder


def id_twice(name: str, one: Path, other: Path) -> CacheError:
    """The error for an id that occurs in two folders, or twice in one folder."""
    if one == other:
        return CacheError(f"{one} holds the id {name!r} twice.", "Extract again: ids must be unique within a cache.")
    return CacheError(
        f"The id {name!r} is in {one} and in {other}.",
        "Ids must be unique over all folders that are opened as one. Leave one of these folders out.",
    )


def _check_fits(first_folder: Path, first: ShardHeader, folder: Path, header: ShardHeader) -> None:
    """Raise ``CacheError`` unless the two folders can be parts of one cache."""
    expected, found = _equal_in_all(first), _equal_in_all(header)
    for name in [*expected, *(name for name in found if name not in expected)]:
        here, there = found.get(name, "unknown"), expected.get(name, "unknown")
        if here != there:
            raise CacheError(
                f"{folder} cannot be read as one cache with {first_folder}: {name} is {_text(here)}, not "
                f"{_text(there)}.",
                "Use caches of the same model with the same settings. Only the texts may differ.",
            )


def _equal_in_all(header: ShardHeader) -> dict[str, Any]:
    """What must be equal in all parts, by name."""
    recorded = (header.provenance.get(kind) for kind in ("chosen", "found"))
    fields = {name: value for kind in recorded if isinstance(kind, dict) for name, value in kind.items()}
    ignored = {*OF_TEXTS, *STORED}
    if "weights" in fields:
        ignored.add("resource")  # the digest of the weights is compared, not the model's name
    return {
        **{name: getattr(header, name) for name in STORED},
        **{name: value for name, value in fields.items() if name not in ignored},
    }


def _text(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _in_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are equal in both. Dictionaries inside them are compared field by field."""
    result = {}
    for name in one:
        if name not in other:
            continue
        if isinstance(one[name], dict) and isinstance(other[name], dict):
            result[name] = _in_both(one[name], other[name])
        elif one[name] == other[name]:
            result[name] = one[name]
    return result
