"""Make a cache from another cache, without the model: a slice, or a stored fusion."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.format import SequenceIndex, ShardHeader
from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError, ConfigError, DiskSpaceError, unknown_name
from kr2cache.fusion import Fusion, parse_fusion, parse_layers
from kr2cache.store import folders, provenance
from kr2cache.store.copying import fill_from, states_as_stored
from kr2cache.store.inventory import open_caches
from kr2cache.store.sharing import CACHE, SharedShards, existing_header
from kr2cache.system.claims import claimed
from kr2cache.system.console import bytes_text
from kr2cache.system.disk import check_writable, free_bytes


@dataclass(frozen=True, kw_only=True)
class DerivePlan:
    """A cache to make from another cache."""

    source: FeatureCache
    positions: NDArray[np.int64]
    """(n,) which sequences of the source it holds, in order."""
    fusion: Fusion | None
    index: SequenceIndex
    header: ShardHeader
    folder: Path
    cache_dir: Path

    @property
    def state_bytes(self) -> int:
        return len(self.index.input_id) * len(self.header.layers) * self.header.stored.row_bytes(self.header.width)


@dataclass(frozen=True, kw_only=True)
class DeriveResult:
    """The cache that was made."""

    cache: Path
    sequences: int
    bytes: int
    source_bytes: int
    seconds: float
    made: bool
    """False if the cache was complete before."""

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": str(self.cache)}


def plan_slice(
    source: FeatureCache,
    *,
    layers: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    ids: Iterable[str] | None = None,
    cache_dir: Path | None = None,
) -> DerivePlan:
    """Plan a smaller cache: fewer layers, fewer sequences, or a smaller dtype.

    Args:
        source: The cache to copy from.
        layers: As ``--layers``; None keeps the layers of the source.
        dtype: None keeps the dtype of the source.
        limit: Keep only the first sequences, this many.
        ids: Keep only these sequences or examples (``ID`` stands for ``ID#0``, ``ID#1``, ...).
        cache_dir: Where the new cache goes; None for the cache directory of the source.

    Raises:
        CacheError: If the source is not complete, or does not record what it was made from.
        ConfigError: If the source does not hold these layers or ids, its dtype cannot become ``dtype``, or
            ``cache_dir`` is None and the source is in no cache directory.
    """
    wanted = source.layers if layers is None else parse_layers(layers, source.model_layers)
    if source.fusion is not None and layers is not None:
        raise ConfigError(f"{source.folder} holds one fusion, no layers to choose from.", "Omit --layers.")
    missing = sorted(set(wanted) - set(source.layers))
    if missing:
        raise ConfigError(
            f"{source.folder} does not hold layer {', '.join(map(str, missing))}; it holds "
            f"{', '.join(map(str, source.layers))}.",
            "Extract again with --layers all.",
        )
    target = _dtype(source, dtype)
    positions = _positions(source, limit, ids)
    if wanted == source.layers and target == source.dtype and len(positions) == len(source.n_tokens):
        raise ConfigError(
            f"This slice would be {source.folder} as it is.",
            "Give --layers, --dtype, --limit or --ids to make it smaller.",
        )
    return _plan(source, positions, wanted, target, None, cache_dir)


def plan_fusion(
    source: FeatureCache, fusion_name: str, *, dtype: str | None = None, cache_dir: Path | None = None
) -> DerivePlan:
    """Plan a cache that holds only one fixed fusion: with all L+1 layers, 1 / (L+1) of the bytes.

    Args:
        source: The cache that holds the layers.
        fusion_name: ``all`` or ``lastN``.
        dtype: None keeps the dtype of the source.
        cache_dir: Where the new cache goes; None for the cache directory of the source.

    Raises:
        ConfigError: If the fusion has trainable weights or only one layer, the source does not hold its layers, or
            ``cache_dir`` is None and the source is in no cache directory.
        CacheError: If the source is not complete.
    """
    if source.fusion is not None:
        raise ConfigError(f"{source.folder} holds a fusion already.", "Give the cache that it was made from.")
    fusion = parse_fusion(fusion_name, source.model_layers)
    if fusion.trainable:
        raise ConfigError(
            f"Fusion {fusion_name!r} is trainable: its weights are not known before training.", "Give all or lastN."
        )
    if len(fusion.layers) == 1:
        raise ConfigError(
            f"Fusion {fusion_name!r} is one layer: there is nothing to average.",
            f"kr2cache cache slice {source.folder} --layers {fusion.layers[0]}  stores only this layer.",
        )
    missing = sorted(set(fusion.layers) - set(source.layers))
    if missing:
        raise ConfigError(
            f"{source.folder} does not hold layer {', '.join(map(str, missing))}, which {fusion_name!r} averages.",
            "Extract again with --layers all.",
        )
    positions = _positions(source, None, None)
    # The stored layer has the number of the last averaged layer; ``fusion`` in its header says what it is.
    return _plan(source, positions, fusion.layers[-1:], _dtype(source, dtype), fusion, cache_dir)


def _dtype(source: FeatureCache, dtype: str | None) -> str:
    if dtype is None or dtype == source.dtype:
        return source.dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    stored = DTYPES[source.dtype]
    if stored.has_scales or DTYPES[dtype].on_disk.itemsize > stored.on_disk.itemsize:
        raise ConfigError(
            f"{source.folder} is {source.dtype}: {dtype} cannot restore what it rounded away.",
            f"Extract again with --dtype {dtype}.",
        )
    return dtype


def _positions(source: FeatureCache, limit: int | None, ids: Iterable[str] | None) -> NDArray[np.int64]:
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} keeps no sequence.", "Give 1 or more.")
    if ids is None:
        positions = np.arange(len(source.n_tokens))
    else:
        by_example: dict[str, list[int]] = {}
        for position, name in enumerate(source.all_ids):
            by_example.setdefault(name, []).append(position)
            example, mark, choice = name.rpartition("#")
            if mark and choice.isdigit():
                by_example.setdefault(example, []).append(position)
        unknown = [name for name in ids if name not in by_example]
        if unknown:
            raise ConfigError(
                f"{source.folder} holds no {unknown[0]!r}"
                + (f", and {len(unknown) - 1} more ids are missing." if unknown[1:] else "."),
                f"Its ids look like {source.all_ids[0]!r}.",
            )
        positions = np.unique([position for name in ids for position in by_example[name]])
    positions = positions[:limit].astype(np.int64)
    if not len(positions):
        raise ConfigError("The list of ids is empty.", "Write one id per line into the file of --ids.")
    unfinished = int((~source.complete[positions]).sum())
    if unfinished:
        raise CacheError(
            f"{unfinished:,} of the {len(positions):,} sequences in {source.folder} are not complete.",
            "Run the same kr2cache extract again: it continues where it stopped.",
        )
    return positions


def _plan(
    source: FeatureCache,
    positions: NDArray[np.int64],
    layers: tuple[int, ...],
    dtype: str,
    fusion: Fusion | None,
    cache_dir: Path | None,
) -> DerivePlan:
    before = provenance.chosen_of(source.provenance, source.folder)
    made = provenance.found_of(source.provenance, source.folder)
    index = source.tokens().select(positions)
    stored_fusion = fusion.stored if fusion is not None else source.fusion
    chosen = replace(before, layers=layers, dtype=dtype, fusion=stored_fusion)
    found = replace(
        made, texts=provenance.texts_digest(index), tokens=provenance.tokens_digest(index), sequences=len(index)
    )
    digest = provenance.fingerprint(chosen, found)
    recorded = dict(source.provenance.get("recorded", {}))
    recorded["derived_from"] = source.fingerprint
    if dtype != source.dtype:
        recorded["converted_from"] = source.dtype
    where = cache_dir or folders.cache_dir_of(source.folder, before.task, before.split)
    if where is None:
        raise ConfigError(
            f"{source.folder} is not in a cache directory (CACHE_DIR/{before.task}/{before.split}/NAME), so there is "
            "no place for the new cache.",
            "Give --cache-dir: the new cache goes there.",
        )
    return DerivePlan(
        source=source,
        positions=positions,
        fusion=fusion,
        index=index,
        header=ShardHeader(
            dtype=dtype,
            layers=layers,
            model_layers=source.model_layers,
            width=source.width,
            fingerprint=digest,
            provenance={"chosen": chosen.stored(), "found": asdict(found), "recorded": recorded},
            # The model runs for no sequence of it.
            batch_plan={**source.batch_plan, "computed": []},
            fusion=stored_fusion,
        ),
        folder=folders.cache_folder(where, chosen.task, chosen.split, chosen.resource, digest),
        cache_dir=where,
    )


def derive(plan: DerivePlan) -> DeriveResult:
    """Make the planned cache, or complete it if it was begun before.

    Raises:
        DiskSpaceError: Before writing, if the disk cannot hold the cache.
        ValueRangeError: If the new dtype cannot hold a state, or a state of the source is not finite.
        CacheError: If a sequence of the source is damaged.
    """
    started = time.monotonic()
    check_writable(plan.folder.parent, "--cache-dir")
    # A slice that exists keeps its header: an earlier format version stays as it is.
    header = existing_header(plan.folder, plan.header.fingerprint) or plan.header
    shards = SharedShards(plan.folder, header, plan.index)
    if not any(plan.folder.glob("*.h5")) and plan.state_bytes > free_bytes(plan.cache_dir):
        raise DiskSpaceError(
            f"The states take {bytes_text(plan.state_bytes)}, but {plan.cache_dir} has "
            f"{bytes_text(free_bytes(plan.cache_dir))} free.",
            "Free some space, or give another --cache-dir.",
        )
    written = 0
    if shards.complete_count() < len(plan.index):
        written = _fill(shards, plan.fusion, plan.source, lambda i: int(plan.positions[i]))
    return DeriveResult(
        cache=plan.folder,
        sequences=len(plan.index),
        bytes=sum(path.stat().st_size for path in plan.folder.glob("*.h5")),
        source_bytes=plan.source.stored_bytes,
        seconds=time.monotonic() - started,
        made=written > 0,
    )


def source_of(folder: Path, header: ShardHeader) -> FeatureCache:
    """The cache that a derived cache was made from.

    Args:
        folder: The derived cache.
        header: Its header.

    Raises:
        CacheError: If the source no longer exists.
    """
    chosen = provenance.chosen_of(header.provenance, folder)
    origin = header.provenance.get("recorded", {}).get("derived_from")
    where = folders.cache_dir_of(folder, chosen.task, chosen.split)
    caches = open_caches(where, chosen.task, chosen.split)[0] if where is not None else []
    source = next((cache for cache in caches if cache.fingerprint == origin), None)
    if source is None:
        raise CacheError(
            f"{folder} was made from another cache (fingerprint {str(origin)[:8]}), which no longer exists.",
            f"Make the other cache again with kr2cache extract, or remove {folder.name}.",
        )
    return source


def refill(folder: Path, header: ShardHeader, source: FeatureCache) -> int:
    """Make damaged shards and incomplete sequences of a derived cache again from its source.

    Returns:
        How many sequences were copied.

    Raises:
        CacheError: If the source is damaged too, or nothing records which of its sequences the cache held.
        ValueRangeError: If a state is not finite.
    """
    index = _derived_index(folder, header, source)
    fusion = None
    if header.fusion is not None and source.fusion is None:
        fusion = Fusion(name="stored", layers=tuple(header.fusion["layers"]), trainable=False)

    def position(i: int) -> int:
        return int(source.positions([index.ids[i].decode("utf-8")])[0])

    return _fill(SharedShards(folder, header, index), fusion, source, position)


def _fill(shards: SharedShards, fusion: Fusion | None, source: FeatureCache, position: Callable[[int], int]) -> int:
    """Fill a derived cache from its source.

    Args:
        position: The position in the source of a sequence of the derived cache.

    Returns:
        How many sequences were copied.
    """
    with claimed(shards.folder, CACHE) as claim:
        shards.create(claim.folder)
    header = shards.header
    return fill_from(
        shards,
        lambda i: states_as_stored(header, fusion, [(source, position(i))]),
        f"from {source.folder.name}",
    )


def _derived_index(folder: Path, header: ShardHeader, source: FeatureCache) -> SequenceIndex:
    """The index of a derived cache: its own if it is sound, else the first sequences of the source if they match."""
    made = provenance.found_of(header.provenance, folder)
    candidates = []
    with contextlib.suppress(CacheError):
        candidates.append(FeatureCache.open(folder).tokens())
    if made.sequences <= len(source.n_tokens):
        candidates.append(source.tokens().part(0, made.sequences))
    for index in candidates:
        if (provenance.texts_digest(index), provenance.tokens_digest(index)) == (made.texts, made.tokens):
            return index
    raise CacheError(
        f"The index of {folder} is damaged, and nothing records which sequences of {source.folder.name} it held.",
        f"Make it again: kr2cache cache remove {folder}, then slice or fuse.",
    )
