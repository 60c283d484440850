"""Caches made from caches, without the model: slices, stored fusions, and what a new cache takes over from older ones.

Everything read from a cache here is compared with its checksum first: damage does not spread.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.create import create_shards
from kr2cache.cache.format import DTYPES, ON_DISK, SequenceIndex, ShardHeader, encode, offsets, row_bytes
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.writer import CacheWriter, PackedStates
from kr2cache.errors import CacheError, ConfigError, DiskSpaceError, InterruptedWorkError, unknown_name
from kr2cache.fusion import Fusion, parse_fusion, parse_layers
from kr2cache.store import provenance
from kr2cache.system.console import bytes_text, work_progress
from kr2cache.system.disk import free_bytes
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.system.locks import check_writable, only_writer

Stored = tuple[NDArray[Any], NDArray[np.float32] | None]
"""Values (rows, D) and, for int8, scales (rows,), as on disk."""


# Slices and fusions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DerivePlan:
    """A cache to be made of another one, and what it will take."""

    source: FeatureCache
    positions: NDArray[np.int64]
    """Of the source's sequences, in order."""
    fusion: Fusion | None
    index: SequenceIndex
    header: ShardHeader
    folder: Path
    cache_dir: Path

    @property
    def state_bytes(self) -> int:
        return len(self.index.input_id) * len(self.header.layers) * row_bytes(self.header.width, self.header.dtype)


@dataclass(frozen=True, kw_only=True)
class DeriveResult:
    """What was made."""

    cache: Path
    sequences: int
    bytes: int
    source_bytes: int
    seconds: float
    made: bool
    """False where it was there already."""

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
    """A smaller cache of fewer layers, fewer sequences, or a smaller dtype.

    Args:
        layers: As ``--layers``; None for those of the source.
        dtype: None for the source's.
        limit: Only the first so many sequences.
        ids: Only these: ids of sequences, or of examples (``ID`` stands for ``ID#0``, ``ID#1``, ...).
        cache_dir: Where it goes; None for the cache folder that the source lies in.

    Raises:
        CacheError: If the source is not complete, or does not say what it was made from.
        ConfigError: For layers or ids that the source does not hold, a dtype that cannot come from the source's, or no
            ``cache_dir`` for a source that lies in none.
    """
    wanted = source.layers if layers is None else parse_layers(layers, source.model_layers)
    if source.fusion is not None and layers is not None:
        raise ConfigError(f"{source.folder} holds one fusion, no layers to choose from.", "Leave --layers out.")
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
            f"That is {source.folder} as it is.", "Give --layers, --dtype, --limit or --ids to leave something out."
        )
    return _plan(source, positions, wanted, target, None, cache_dir)


def plan_fusion(
    source: FeatureCache, fusion_name: str, *, dtype: str | None = None, cache_dir: Path | None = None
) -> DerivePlan:
    """A cache that holds one fixed fusion alone: 1 / (L+1) of the bytes.

    Raises:
        ConfigError: For a fusion that has trainable weights or one layer, layers that the source does not hold, or no
            ``cache_dir`` for a source that lies in none.
        CacheError: If the source is not complete.
    """
    if source.fusion is not None:
        raise ConfigError(f"{source.folder} holds a fusion already.", "Give the cache it was made from.")
    fusion = parse_fusion(fusion_name, source.model_layers)
    if fusion.trainable:
        raise ConfigError(
            f"Fusion {fusion_name!r} is trainable: its weights are not known before training.", "Give all or lastN."
        )
    if len(fusion.layers) == 1:
        raise ConfigError(
            f"Fusion {fusion_name!r} is one layer: nothing is averaged.",
            f"kr2cache cache slice {source.folder} --layers {fusion.layers[0]}  stores it alone.",
        )
    missing = sorted(set(fusion.layers) - set(source.layers))
    if missing:
        raise ConfigError(
            f"{source.folder} does not hold layer {', '.join(map(str, missing))}, which {fusion_name!r} averages.",
            "Extract again with --layers all.",
        )
    positions = _positions(source, None, None)
    # The one stored layer bears the number of the last that takes part; ``fusion`` says what it is.
    return _plan(source, positions, fusion.layers[-1:], _dtype(source, dtype), fusion, cache_dir)


def _dtype(source: FeatureCache, dtype: str | None) -> str:
    if dtype is None or dtype == source.dtype:
        return source.dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if source.dtype == "int8" or ON_DISK[dtype].itemsize > ON_DISK[source.dtype].itemsize:
        raise ConfigError(
            f"{source.folder} is {source.dtype}: what it rounded away does not come back as {dtype}.",
            f"Extract again with --dtype {dtype}.",
        )
    return dtype


def _positions(source: FeatureCache, limit: int | None, ids: Iterable[str] | None) -> NDArray[np.int64]:
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves nothing.", "Give 1 or more.")
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
                + (f", nor {len(unknown) - 1} more." if unknown[1:] else "."),
                f"Its ids are like {source.all_ids[0]!r}.",
            )
        positions = np.unique([position for name in ids for position in by_example[name]])
    positions = positions[:limit].astype(np.int64)
    if not len(positions):
        raise ConfigError("No id was given.", "Give the file of --ids one id a line.")
    unfinished = int((~source.complete[positions]).sum())
    if unfinished:
        raise CacheError(
            f"{unfinished:,} of the {len(positions):,} sequences in {source.folder} are not complete.",
            "Run the kr2cache extract that made it again: it goes on where it stopped.",
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
    where = cache_dir or provenance.cache_dir_of(source.folder, before)
    if where is None:
        raise ConfigError(
            f"Where to? {source.folder} does not lie in a cache folder, as {before.task}/{before.split}/NAME.",
            "Give --cache-dir: the folder that the new cache goes into.",
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
            provenance={"chosen": asdict(chosen), "found": asdict(found), "recorded": recorded},
            # Nothing of it was planned for the model.
            batch_plan={**source.batch_plan, "computed": []},
            fusion=stored_fusion,
        ),
        folder=provenance.cache_folder(where, chosen, digest),
        cache_dir=where,
    )


def derive(plan: DerivePlan) -> DeriveResult:
    """Make the planned cache, find it finished, or go on with it.

    Raises:
        DiskSpaceError: If the disk cannot hold it; before anything is written.
        ValueRangeError: For a state that the new dtype cannot hold, or that is not finite in the source.
        CacheError: If a sequence of the source is damaged.
    """
    started = time.monotonic()
    check_writable(plan.folder.parent, "--cache-dir")
    with only_writer(plan.folder):
        there = any(plan.folder.glob("*.h5"))
        if not there and plan.state_bytes > free_bytes(plan.cache_dir):
            raise DiskSpaceError(
                f"The states take {bytes_text(plan.state_bytes)}, but {plan.cache_dir} has "
                f"{bytes_text(free_bytes(plan.cache_dir))} free.",
                "Make room, or give another --cache-dir.",
            )
        create_shards(plan.folder, plan.header, plan.index, int(plan.header.batch_plan["shard_bytes"]))
        todo = np.flatnonzero(~FeatureCache.open(plan.folder).complete).tolist()
        stored = ((i, _stored_as(plan.header, plan.fusion, [(plan.source, int(plan.positions[i]))])) for i in todo)
        _write(plan.folder, stored, len(todo), f"from {plan.source.folder.name}")
    return DeriveResult(
        cache=plan.folder,
        sequences=len(plan.index),
        bytes=sum(path.stat().st_size for path in plan.folder.glob("*.h5")),
        source_bytes=plan.source.stored_bytes,
        seconds=time.monotonic() - started,
        made=bool(len(todo)),
    )


def source_of(folder: Path, header: ShardHeader) -> FeatureCache:
    """The cache that a derived one was made from.

    Raises:
        CacheError: If it is not there any more.
    """
    chosen = provenance.chosen_of(header.provenance, folder)
    origin = header.provenance.get("recorded", {}).get("derived_from")
    where = provenance.cache_dir_of(folder, chosen)
    caches = provenance.caches_of(where, chosen.task, chosen.split) if where is not None else []
    source = next((cache for cache in caches if cache.fingerprint == origin), None)
    if source is None:
        raise CacheError(
            f"{folder} was made from another cache (fingerprint {str(origin)[:8]}), which is not there any more.",
            "Make that one again with kr2cache extract, or remove this one.",
        )
    return source


def refill(folder: Path, header: ShardHeader, source: FeatureCache) -> int:
    """Make damaged shards and incomplete sequences of a derived cache again from its source; returns how many.

    The caller holds its lock.

    Raises:
        CacheError: If the source is damaged itself, or which of its sequences were taken is not known any more.
        ValueRangeError: For a state that is not finite.
    """
    create_shards(folder, header, _derived_index(folder, header, source), int(header.batch_plan["shard_bytes"]))
    cache = FeatureCache.open(folder)
    todo = np.flatnonzero(~cache.complete)
    places = source.positions(cache.all_ids[i] for i in todo.tolist())
    fusion = None
    if header.fusion is not None and source.fusion is None:
        fusion = Fusion(name="stored", layers=tuple(header.fusion["layers"]), trainable=False)
    stored = (
        (i, _stored_as(header, fusion, [(source, place)]))
        for i, place in zip(todo.tolist(), places.tolist(), strict=True)
    )
    return _write(folder, stored, len(todo), f"from {source.folder.name}")


def _derived_index(folder: Path, header: ShardHeader, source: FeatureCache) -> SequenceIndex:
    """The index of a derived cache: its own if it is sound, else the first sequences of its source if it was them."""
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
        f"The index of {folder} is damaged, and which sequences of {source.folder.name} it held is not known any more.",
        f"Make it again: kr2cache cache remove {folder}, then slice or fuse.",
    )


# Taking over ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Donors:
    """Older caches that hold states which a new cache needs: same weights, same tokens, same dtypes."""

    caches: list[FeatureCache]
    positions: list[NDArray[np.int64]]
    """For each cache, (n,): where it holds each sequence of the new one, -1 where it does not."""
    covered: NDArray[np.bool_]
    """(n,) whether all its layers are somewhere."""

    def fill(self, folder: Path, header: ShardHeader, wanted: NDArray[np.bool_]) -> int:
        """Copy what is wanted and not complete yet; returns how many sequences.

        Damaged sequences are left out: the model runs for them.
        """
        todo = np.flatnonzero(wanted & self.covered & ~FeatureCache.open(folder).complete).tolist()

        def stored() -> Iterator[tuple[int, Stored]]:
            for i in todo:
                held = [(c, int(p[i])) for c, p in zip(self.caches, self.positions, strict=True) if p[i] >= 0]
                with contextlib.suppress(CacheError):
                    yield i, _stored_as(header, None, held)

        return _write(folder, stored(), len(todo), "taken over")


def find_donors(cache_dir: Path, folder: Path, header: ShardHeader, index: SequenceIndex) -> Donors:
    """The caches of the same task and split that hold sequences of ``index`` computed alike.

    A sequence's states depend on weights, configuration, token ids and segments (which follow from text and template)
    and on the dtypes: where these are equal, its id, the maximal length and the rest of the corpus may differ.

    Args:
        folder: The new cache's own, which is left out.
    """
    chosen, made = header.provenance["chosen"], header.provenance["found"]
    layers = np.array(header.layers)
    covered = np.zeros((len(index), len(layers)), dtype=bool)
    donors = Donors([], [], np.zeros(len(index), dtype=bool))
    keys: list[bytes] | None = None
    candidates = [
        cache
        for cache in provenance.caches_of(cache_dir, chosen["task"], chosen["split"])
        if cache.folder.resolve() != folder.resolve() and cache.fusion is None and not provenance.rounded_again(cache)
    ]
    for cache in sorted(candidates, key=lambda cache: -len(cache.layers)):
        theirs, was = cache.provenance["found"], cache.provenance["chosen"]
        same = all(made[name] == theirs.get(name) for name in ("weights", "config", "template", "segments"))
        if not same or any(chosen[name] != was[name] for name in ("dtype", "compute_dtype")):
            continue
        if cache.width != header.width or cache.model_layers != header.model_layers:
            continue
        holds = np.isin(layers, cache.layers)
        if not holds.any() or covered[:, holds].all():
            continue
        keys = keys or _keys(index, bool(made["segments"]))
        where = {
            key: position
            for position, key in enumerate(_keys(cache.tokens(), bool(made["segments"])))
            if cache.complete[position]
        }
        positions = np.array([where.get(key, -1) for key in keys], dtype=np.int64)
        covered[np.ix_(positions >= 0, holds)] = True
        donors.caches.append(cache)
        donors.positions.append(positions)
    return Donors(donors.caches, donors.positions, np.asarray(covered.all(axis=1)))


def _keys(index: SequenceIndex, segments: bool) -> list[bytes]:
    """What decides the states of each sequence, beside the model."""
    first = index.first_token.tolist()
    tokens = np.ascontiguousarray(index.input_id)
    texts = index.text_xxh3.tolist()
    keys = []
    for i, (start, stop) in enumerate(itertools.pairwise(first)):
        key = xxhash.xxh3_128_digest(tokens[start:stop].data)
        keys.append(key + texts[i].to_bytes(8, "little") if segments else key)
    return keys


# Both -----------------------------------------------------------------------------------------------------------------


def _write(folder: Path, sequences: Iterable[tuple[int, Stored]], count: int, what: str) -> int:
    """Write ``sequences`` (position, states as they are stored), about ``count``; returns how many they were."""
    if not count:
        return 0
    written = 0
    with work_progress("sequences") as progress:
        bar = progress.add_task(f"{folder.name} {what}", total=count, note="")
        try:
            with interrupt_between_batches() as check_interrupt, CacheWriter(folder) as writer:
                firsts = offsets(np.array([len(shard.ids) for shard in writer.shards]))
                for i, (raw, scale) in sequences:
                    number = int(np.searchsorted(firsts, i, side="right")) - 1
                    writer.write(PackedStates(number, [i - int(firsts[number])], raw, scale))
                    check_interrupt()
                    written += 1
                    progress.update(bar, advance=1, note=f"{bytes_text(writer.bytes_written)} written")
            progress.update(bar, note=f"{bytes_text(writer.bytes_written)} written")
        except KeyboardInterrupt:
            raise InterruptedWorkError(
                f"Interrupted. What is complete is kept in {folder}.",
                "Run the same command again: it goes on where it stopped.",
            ) from None
    return written


def _stored_as(header: ShardHeader, fusion: Fusion | None, held: list[tuple[FeatureCache, int]]) -> Stored:
    """One sequence as a cache of ``header`` stores it, each layer from the first cache that holds it.

    Raises:
        CacheError: If it is damaged there.
    """
    for cache, position in held:
        cache.check(position)
    cache, position = held[0]
    if fusion is not None:
        return encode(fusion.apply(cache.states(position, fusion.layers)), header.dtype)
    if header.dtype != cache.dtype:
        layers = None if cache.fusion is not None else header.layers
        return encode(cache.states(position, layers).reshape(-1, header.width), header.dtype)
    if cache.layers == header.layers:
        return cache.stored(position)
    parts = []
    for layer in header.layers:
        owner, place = next((c, p) for c, p in held if layer in c.layers)
        raw, scale = owner.stored(place)
        T, at = int(owner.n_tokens[place]), owner.layers.index(layer)
        rows = slice(at * T, (at + 1) * T)
        parts.append((raw[rows], None if scale is None else scale[rows]))
    scales = [scale for _, scale in parts if scale is not None]
    return np.concatenate([raw for raw, _ in parts]), np.concatenate(scales) if scales else None


def ranges(mask: NDArray[np.bool_]) -> list[list[int]]:
    """``[[start, stop], ...]`` of the True in ``mask``: as a batch plan stores it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [[int(start), int(stop)] for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def in_ranges(stored: Sequence[Sequence[int]] | None, count: int) -> NDArray[np.bool_]:
    """The reverse; everything where a batch plan says nothing."""
    if stored is None:
        return np.ones(count, dtype=bool)
    mask = np.zeros(count, dtype=bool)
    for start, stop in stored:
        mask[start:stop] = True
    return mask
