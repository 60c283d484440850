"""Mend a damaged cache: take back the marks of what is damaged, and run the planned batches that hold it again.

A batch runs as it was planned when the cache was made, whole and with as many threads, so on the same device the mended
file is byte for byte the one it was. What is sound is not touched.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kr2cache.cache.check import CacheCheck, check_cache
from kr2cache.cache.format import SequenceIndex, ShardHeader
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import headers_left, open_shard
from kr2cache.cache.writer import unmark
from kr2cache.config import ExtractConfig
from kr2cache.errors import CacheError, CacheMismatchError, ConfigError, DeviceMemoryError, UnknownNameError
from kr2cache.extraction import trial
from kr2cache.extraction.extract import fill
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.digests import open_model
from kr2cache.models.encode import MissingWords, encode_examples
from kr2cache.models.registry import ModelSpec, find_model, name_of_stored
from kr2cache.models.tokenizers import load_tokenizer, pad_id
from kr2cache.store import derive, folders, provenance
from kr2cache.system.console import count_text, done, note, seconds_text
from kr2cache.system.locks import check_writable, only_writer
from kr2cache.system.process import process_unchanged
from kr2cache.tasks import Example, find_task


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """One repair."""

    folder: Path
    resource: str | None = None
    """Where the model is; None for the name that the cache has."""
    data: str | None = None
    """The corpus: needed where an index is damaged, or segments were told apart; None for the task's own."""
    device: str = "auto"
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RepairResult:
    """What was mended."""

    cache: Path
    damaged: list[str]
    """Ids of the sequences that were damaged or incomplete."""
    rebuilt: list[str]
    """Shards whose structure or index was damaged: made again around their sound sequences."""
    computed: int
    """Sequences that went through the model: whole batches."""
    taken_over: int
    """Sequences that came from another cache."""
    seconds: float

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "cache": str(self.cache)}


@process_unchanged()
def repair(config: RepairConfig) -> RepairResult:
    """Find what is damaged or incomplete, and make it again.

    Raises:
        CacheError: If no shard says what the cache was made from, or it was made from another cache that is gone.
        CacheMismatchError: If model or data are not what the cache was made from.
    """
    started = time.monotonic()
    check_writable(config.folder, "the cache")
    with only_writer(config.folder):
        found = check_cache(config.folder)
        damaged = found.damaged_ids + found.incomplete_ids
        rebuilt = [shard.path.name for shard in found.shards if shard.broken]
        astray = bool(found.faults) or (found.sound and _contradicts_itself(config.folder))
        computed = taken = 0
        if damaged or rebuilt or astray:
            whole_index = not astray and not any(s.unreadable or s.index_damaged for s in found.shards)
            computed, taken = _mend(config, found, _header(found), whole_index=whole_index)
        if found.damaged_ids:
            note(
                "Runs that read these states while they were damaged are still there; remove their folders to train "
                "them anew. train --check-states reads none that are damaged."
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
    """Whether shards that are sound each are not this cache together, as when two of them changed places."""
    return bool(provenance.contradictions(FeatureCache.open(folder)))


def _header(found: CacheCheck) -> ShardHeader:
    """What the cache was made from: what its shards say, readable ones first, with the fingerprint in the folder's
    name, or most of them where it has none.
    """
    headers: list[ShardHeader] = []
    for shard in sorted(found.shards, key=lambda shard: bool(shard.unreadable)):
        headers += headers_left(shard.path) if shard.unreadable else [open_shard(shard.path).header]
    named = [h for h in headers if h.fingerprint.startswith(folders.digest_of(found.folder))]
    if named:
        return named[0]
    prints = Counter(header.fingerprint for header in headers)
    if prints and (len(prints) == 1 or prints.most_common(2)[0][1] > prints.most_common(2)[1][1]):
        return next(header for header in headers if header.fingerprint == prints.most_common(1)[0][0])
    why = next((shard.unreadable for shard in found.shards if shard.unreadable), "they are of different caches.")
    raise CacheError(
        f"No shard of {found.folder} says what it was made from: {why}", "Run the kr2cache extract that made it again."
    )


def _mend(config: RepairConfig, found: CacheCheck, header: ShardHeader, *, whole_index: bool) -> tuple[int, int]:
    """(sequences computed, sequences taken over). Everything that can be refused is, before the first mark is taken
    back.
    """
    chosen = provenance.chosen_of(header.provenance, config.folder)
    made = provenance.found_of(header.provenance, config.folder)
    if header.fusion is not None or "converted_from" in header.provenance.get("recorded", {}):
        source = derive.source_of(config.folder, header)
        _take_back_marks(found)
        return 0, derive.refill(config.folder, header, source)
    plan = _plan(config, chosen, made, header, whole_index)
    model = open_model(plan.spec)
    for name in ("weights", "config"):
        then, now = getattr(made, name), getattr(model.digests, name)
        if then != now:
            raise CacheMismatchError(
                f"The {name} of {plan.spec.name} are not those that {config.folder} was made from (digest {then[:8]} "
                f"then, {now[:8]} now).",
                "Give --resource with the folder of the model it was made from.",
            )
    with contextlib.suppress(DeviceMemoryError):  # the damaged sequences may be shorter and fit
        trial.check_history(plan, model.encoder)
    _take_back_marks(found)
    return fill(plan, model.encoder, config.folder, header)


def _take_back_marks(found: CacheCheck) -> None:
    for shard in found.shards:
        if not shard.unreadable and shard.damaged:
            unmark(open_shard(shard.path), shard.damaged)


def _model_of(config: RepairConfig, stored: str) -> ModelSpec:
    try:
        return find_model(config.resource or name_of_stored(stored, config.models), config.models)
    except UnknownNameError as error:
        if config.resource is not None:
            raise
        raise ConfigError(
            f"{config.folder} was made by {stored!r}, which has no registered name.",
            "Give --resource with its folder, or name it under [models] in kr2cache.toml.",
        ) from error


def _plan(
    config: RepairConfig,
    chosen: provenance.Chosen,
    made: provenance.Found,
    header: ShardHeader,
    whole_index: bool,
) -> ExtractPlan:
    """The extraction that made the cache, over again."""
    spec = _model_of(config, chosen.resource)
    task = find_task(chosen.task)
    tokenizer = load_tokenizer(spec, words=task.words)
    if whole_index and not made.segments:
        index = FeatureCache.open(config.folder).tokens()
    else:  # segments are not stored, and a damaged index cannot be trusted: both follow from the data
        examples = _first(task.read(chosen.split, config.data), made.sequences)
        index = encode_examples(tokenizer, examples, task, chosen.max_length)
        _check_index(index, made, config)
    return ExtractPlan(
        config=ExtractConfig(
            resource=chosen.resource,
            split=chosen.split,
            task=chosen.task,
            max_length=chosen.max_length,
            dtype=chosen.dtype,
            compute_dtype=chosen.compute_dtype,  # type: ignore[arg-type]  # one of them: the fingerprint was compared
            device=config.device,
            cache_dir=folders.cache_dir_of(config.folder, chosen.task, chosen.split) or config.folder.absolute().parent,
            models=config.models,
        ),
        spec=spec,
        index=index,
        layers=header.layers,
        model_layers=header.model_layers,
        width=header.width,
        pad_id=pad_id(tokenizer),
        template=made.template,
        corpus=chosen.corpus,
        missing_words=MissingWords(0, 0),  # of what was there already; nobody is told
    )


def _first(examples: list[Example], sequences: int) -> list[Example]:
    """The first examples that make so many sequences: the cache may be of a ``--limit``."""
    taken, count = [], 0
    for example in examples:
        if count >= sequences:
            break
        taken.append(example)
        count += len(example.texts)
    return taken


def _check_index(index: SequenceIndex, made: provenance.Found, config: RepairConfig) -> None:
    for name, now in (("texts", provenance.texts_digest(index)), ("tokens", provenance.tokens_digest(index))):
        then = getattr(made, name)
        if then != now:
            raise CacheMismatchError(
                f"The {name} of the data are not those that {config.folder} was made from (digest {then[:8]} then, "
                f"{now[:8]} now).",
                "Give --data with the corpus as it was; or extract again, which takes over what is unchanged.",
            )


def describe_repair(result: RepairResult) -> None:
    """Say what was mended."""
    if not (result.damaged or result.rebuilt or result.computed or result.taken_over):
        done(f"Nothing to mend: {result.cache}")
        return
    parts = [f"{', '.join(result.rebuilt)} made again"] if result.rebuilt else []
    if result.damaged:
        parts.append(f"{count_text(len(result.damaged), 'sequence')} damaged or incomplete")
    if result.computed:
        parts.append(f"{count_text(result.computed, 'sequence')} computed (whole batches)")
    if result.taken_over:
        parts.append(f"{result.taken_over:,} taken over from another cache")
    done(f"{', '.join(parts)}, in {seconds_text(result.seconds)}: {result.cache}")
