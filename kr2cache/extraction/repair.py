"""Mend a damaged cache: remove the marks of damaged sequences, and run their planned batches again.

A batch runs as it was planned when the cache was made: whole, and with as many threads. So on the same device the
mended file is byte for byte the original. Sound sequences are not touched.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kr2cache.cache.check import CacheCheck, check_cache
from kr2cache.cache.format import SequenceIndex, ShardHeader
from kr2cache.cache.pooling import pooled
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import open_shard, readable_headers
from kr2cache.cache.writer import unmark
from kr2cache.config import DEFAULT_POOL
from kr2cache.errors import CacheError, DeviceMemoryError
from kr2cache.extraction import canaries, trial
from kr2cache.extraction.extract import fill_shards
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.extraction.rerun import RerunConfig, from_data, model_of, needs_data, open_same, other_data, plan_again
from kr2cache.models.encode import encode_examples
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.store import derive, folders, provenance
from kr2cache.store.sharing import HeldCache, SharedShards, whole_cache
from kr2cache.system.console import count_text, done, note, seconds_text
from kr2cache.system.disk import check_writable
from kr2cache.system.process import process_unchanged
from kr2cache.tasks import Example, find_task


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What a repair did."""

    cache: Path
    damaged: list[str]
    """Ids of damaged or incomplete sequences."""
    rebuilt: list[str]
    """Shards with a damaged structure or index; they were made again with their sound sequences."""
    computed: int
    """Sequences that the model ran on, in whole batches."""
    taken_over: int
    """Sequences that were copied from another cache."""
    seconds: float

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": str(self.cache)}


@process_unchanged()
def repair(config: RerunConfig) -> RepairResult:
    """Find damaged and incomplete sequences and make them again.

    Raises:
        CacheError: If no shard records what the cache was made from, or it was made from a cache that no longer exists.
        CacheMismatchError: If the cache was made from another model or other data.
    """
    started = time.monotonic()
    check_writable(config.folder, "the cache")
    mend: Callable[[], tuple[int, int]] = lambda: (0, 0)  # noqa: E731
    with whole_cache(config.folder) as held:
        found = check_cache(config.folder)
        damaged = found.damaged_ids + found.incomplete_ids
        rebuilt = [shard.path.name for shard in found.shards if shard.needs_rebuild]
        astray = bool(found.faults) or (found.intact and _contradicts_itself(config.folder))
        if damaged or rebuilt or astray:
            whole_index = not astray and not any(s.unreadable or s.index_damaged for s in found.shards)
            mend = _mend(config, found, _header(found), held, whole_index=whole_index)
    computed, taken = mend()  # other processes may help now
    if found.damaged_ids:
        note(
            "Runs may have been trained on the damaged states; remove their folders to train them again. "
            "train --check-states never reads a damaged state."
        )
    return RepairResult(
        cache=config.folder,
        damaged=damaged,
        rebuilt=rebuilt,
        computed=computed,
        taken_over=taken,
        seconds=time.monotonic() - started,
    )


def _contradicts_itself(folder: Path) -> bool:
    """Whether sound shards do not form this cache together, for example if two shards were exchanged."""
    return bool(provenance.contradictions(FeatureCache.open(folder)))


def _header(found: CacheCheck) -> ShardHeader:
    """The header of the cache, from a shard with the fingerprint of the folder's name; readable shards come first.

    If the name has no fingerprint, the fingerprint that most shards have counts.
    """
    headers: list[ShardHeader] = []
    for shard in sorted(found.shards, key=lambda shard: bool(shard.unreadable)):
        headers += readable_headers(shard.path) if shard.unreadable else [open_shard(shard.path).header]
    named = [h for h in headers if h.fingerprint.startswith(folders.digest_of(found.folder))]
    if named:
        return named[0]
    prints = Counter(header.fingerprint for header in headers)
    if prints and (len(prints) == 1 or prints.most_common(2)[0][1] > prints.most_common(2)[1][1]):
        return next(header for header in headers if header.fingerprint == prints.most_common(1)[0][0])
    why = next((shard.unreadable for shard in found.shards if shard.unreadable), "they belong to different caches.")
    raise CacheError(
        f"No shard of {found.folder} records what it was made from: {why}", "Run the same kr2cache extract again."
    )


def _mend(
    config: RerunConfig, found: CacheCheck, header: ShardHeader, held: HeldCache, *, whole_index: bool
) -> Callable[[], tuple[int, int]]:
    """Remove the marks of damaged sequences, once every check has passed.

    Returns:
        A function that makes these sequences again: (sequences computed, sequences copied).
    """
    chosen = provenance.chosen_of(header.provenance, config.folder)
    made = provenance.found_of(header.provenance, config.folder)
    if header.fusion is not None or "converted_from" in header.provenance.get("recorded", {}):
        source = derive.source_of(config.folder, header)
        _remove_marks(found, held)
        return lambda: (0, derive.refill(config.folder, header, source))
    plan = _plan(config, chosen, made, header, whole_index)
    model = open_same(plan, made, config.folder)
    with contextlib.suppress(DeviceMemoryError):  # the damaged sequences may be shorter and fit
        trial.check_history(plan, model.encoder, header.batch_plan)
    if whole_index:
        cache = FeatureCache.open(config.folder)
        sound = cache.complete & ~np.isin(cache.all_ids, found.damaged_ids)
        canaries.check_before_more(cache, np.where(sound, np.arange(len(sound)), -1), plan, model.encoder)
    _remove_marks(found, held)
    shards = SharedShards(config.folder, header, plan.stored)
    shards.create(held.build_in)
    return lambda: fill_shards(plan, model.encoder, shards)


def _remove_marks(found: CacheCheck, held: HeldCache) -> None:
    for shard in found.shards:
        if not shard.unreadable and shard.damaged:
            unmark(open_shard(shard.path), shard.damaged, partial(held.check, shard.path.name))


def _plan(
    config: RerunConfig,
    chosen: provenance.Chosen,
    made: provenance.Found,
    header: ShardHeader,
    whole_index: bool,
) -> ExtractPlan:
    """The plan of the extraction that made the cache."""
    spec = model_of(config, chosen.resource)
    task = find_task(chosen.task, config.tasks)
    tokenizer = load_tokenizer(spec, words=task.words)
    stored = FeatureCache.open(config.folder).tokens() if whole_index else None
    if stored is not None and provenance.tokens_digest(stored) == made.tokens:  # index_xxh3 leaves out tokens_xxh3
        index = stored
        if needs_data(chosen, made):
            index = from_data(index, chosen, config, tokenizer)
    else:
        examples = _first(task.read(chosen.split, config.data), made.sequences)
        index = encode_examples(tokenizer, examples, task, chosen.max_length)
        _check_index(index if chosen.pool == DEFAULT_POOL else pooled(index, chosen.pool).stored, made, config)
    return plan_again(
        header,
        config.folder,
        index,
        spec,
        tokenizer,
        device=config.device,
        device_map=config.device_map,
        models=config.models,
    )


def _first(examples: list[Example], sequences: int) -> list[Example]:
    """The first examples, until they have this many sequences: the cache may have been made with ``--limit``."""
    taken, count = [], 0
    for example in examples:
        if count >= sequences:
            break
        taken.append(example)
        count += len(example.texts)
    return taken


def _check_index(index: SequenceIndex, made: provenance.Found, config: RerunConfig) -> None:
    for name, now in (("texts", provenance.texts_digest(index)), ("tokens", provenance.tokens_digest(index))):
        then = getattr(made, name)
        if then != now:
            raise other_data(config, name)


def describe_repair(result: RepairResult) -> None:
    """Show what was repaired."""
    if not (result.damaged or result.rebuilt or result.computed or result.taken_over):
        done(f"Nothing to repair: {result.cache}")
        return
    parts = [f"{', '.join(result.rebuilt)} made again"] if result.rebuilt else []
    if result.damaged:
        parts.append(f"{count_text(len(result.damaged), 'sequence')} damaged or incomplete")
    if result.computed:
        parts.append(f"{count_text(result.computed, 'sequence')} computed (whole batches)")
    if result.taken_over:
        parts.append(f"{result.taken_over:,} copied from another cache")
    done(f"{', '.join(parts)}, in {seconds_text(result.seconds)}: {result.cache}")
