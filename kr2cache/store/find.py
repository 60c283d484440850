"""Find the stored cache that fits what a run needs.

A cache **fits** if every chosen value that decides the states is the requested one, and every found value is equal.
More layers or more examples do no harm. The names of resource and corpus only decide what a difference means: a cache
with the same names and other contents is **stale**; a cache with other names is unrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import SequenceIndex
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import readable_headers
from kr2cache.config import (
    DEFAULT_COMPUTE_DTYPE,
    DEFAULT_DTYPE,
    DEFAULT_MAX_LENGTH,
    DEFAULT_POOL,
    DEFAULT_WEIGHTS_DTYPE,
    Pool,
)
from kr2cache.errors import CacheError, ConfigError
from kr2cache.fusion import parse_fusion
from kr2cache.store import folders, provenance
from kr2cache.store.inventory import open_caches


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run needs of a cache. None in a setting means that the run does not ask for it: any value fits."""

    resource: str
    task: str
    corpus: str
    split: str
    max_length: int | None
    dtype: str | None
    compute_dtype: str | None
    weights_dtype: str = DEFAULT_WEIGHTS_DTYPE
    pool: Pool | None = None
    fusion: str
    """The fusion's name. Which layers it needs depends on how many the cache's model has."""
    layers_apart: bool = False
    """Whether the run needs each layer by itself (direct projection), so that a stored fusion does not fit."""
    weights: str | None
    """``digests.weights_digest``; None if the weights are not on this machine, so nothing can be compared."""
    config: str | None
    """``digests.config_digest``, or None like ``weights``."""
    template: str
    ids: tuple[str, ...]
    text_xxh3: NDArray[np.uint64]
    """(n,)"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field that keeps a cache from fitting."""

    field: str
    text: str
    """Both values, in words."""


@dataclass(frozen=True, kw_only=True)
class StoredCaches:
    """The caches of one task and split, sorted by whether they fit."""

    wanted: Wanted
    opened: list[FeatureCache]
    """All of them that can be read."""
    fitting: list[FeatureCache] = field(default_factory=list)
    stale: list[tuple[FeatureCache, list[Difference]]] = field(default_factory=list)
    """Caches of the same names that were made from other contents."""
    reasons: list[str] = field(default_factory=list)
    """Why each other cache of the resource does not fit."""

    def common_length(self) -> int | None:
        """The maximal length of the caches that the resource has for these sequences; None if there are none or they
        differ.
        """
        lengths = set()
        for cache in self.opened:
            chosen = cache.provenance["chosen"]
            same_names = (chosen["resource"], chosen["corpus"]) == (self.wanted.resource, self.wanted.corpus)
            if same_names and (cache.find(self.wanted.ids) >= 0).all():
                lengths.add(int(chosen["max_length"]))
        return lengths.pop() if len(lengths) == 1 else None


Tokenise = Callable[[int, Pool], SequenceIndex]
"""Maximal length and pooling to the index that a cache of some sequences has."""


def find_caches(cache_dir: Path, wanted: Wanted, tokenise: Tokenise | None) -> StoredCaches:
    """Open every cache of the wanted task and split once, and compare it with what is wanted.

    Args:
        cache_dir: Where to look.
        wanted: What the run needs.
        tokenise: Of the wanted sequences. None if the model is not on this machine: tokens are not compared then, and
            caches of other resource names never fit.
    """
    opened, unreadable = open_caches(cache_dir, wanted.task, wanted.split)
    found = StoredCaches(wanted=wanted, opened=opened)
    for cache in opened:
        chosen = cache.provenance["chosen"]
        same_resource = chosen["resource"] == wanted.resource
        differences = chosen_differences(cache, wanted)
        if differences or not (same_resource or tokenise is not None):
            if same_resource:
                found.reasons.append(f"{cache.folder}: {', '.join(difference.text for difference in differences)}")
            continue
        pool = provenance.pool_of(cache.provenance)
        index = None if tokenise is None else tokenise(int(chosen["max_length"]), pool)
        differences = found_differences(cache, wanted, index)
        if not differences:
            if cache.complete[cache.find(wanted.ids)].all():
                found.fitting.append(cache)
            elif same_resource:
                found.reasons.append(f"{cache.folder}: it is not complete")
        elif same_resource and chosen["corpus"] == wanted.corpus:
            # A cache that lacks examples is not stale: it was made from fewer.
            if {difference.field for difference in differences} == {"examples"}:
                found.reasons.append(f"{cache.folder}: {differences[0].text}")
            else:
                found.stale.append((cache, differences))
    found.reasons.extend(
        error.message for folder, error in unreadable.items() if folders.name_of(folder) == wanted.resource
    )
    return found


def common_weights_dtype(cache_dir: Path, task: str, resource: str, corpus: str) -> tuple[str | None, bool]:
    """The dtype of the weights in all caches of a task that the resource has: of this corpus, or if there are none, of
    others.

    Returns:
        The dtype, or None if there are no caches or they differ; and whether they are of this corpus.
    """
    dtypes: dict[bool, set[str]] = {True: set(), False: set()}
    for folder in folders.matching(cache_dir, task=task, name=resource):
        headers = readable_headers(shard) if (shard := next(folder.glob("*.h5"), None)) is not None else []
        for one in headers:
            if "chosen" in one.provenance:
                own = one.provenance["chosen"].get("corpus") == corpus
                dtypes[own].add(provenance.weights_dtype_of(one.provenance))
    found = dtypes[True] or dtypes[False]
    return next(iter(found)) if len(found) == 1 else None, bool(dtypes[True])


def choose(fitting: list[FeatureCache], resource: str, length_option: str) -> FeatureCache:
    """The fitting cache with the default settings, or the only one if all have the same settings.

    Args:
        fitting: At least one cache.
        resource: Its name, for errors.
        length_option: The option for the resource's maximal length, for errors.

    Raises:
        CacheError: If the caches have different weights, or different settings and none the default ones.
    """
    if len({cache.provenance["found"]["weights"] for cache in fitting}) > 1:
        listed = ", ".join(f"{c.folder} (digest {c.provenance['found']['weights'][:8]})" for c in fitting)
        raise CacheError(
            f"Caches of {resource} were made with different weights: {listed}.",
            "Give --resource with the folder of the right model, or move the other caches away.",
        )
    by_settings: dict[tuple[Any, ...], FeatureCache] = {}
    # The smallest first: fewer layers, or one fusion, are read faster. But layers are more exact than a fusion that was
    # rounded again.
    for cache in sorted(fitting, key=lambda cache: (provenance.rounded_again(cache), cache.stored_bytes)):
        chosen = cache.provenance["chosen"]
        pool = provenance.pool_of(cache.provenance)
        by_settings.setdefault((chosen["max_length"], chosen["dtype"], chosen["compute_dtype"], pool), cache)
    default = (DEFAULT_MAX_LENGTH, DEFAULT_DTYPE, DEFAULT_COMPUTE_DTYPE, DEFAULT_POOL)
    if len(by_settings) == 1:
        return next(iter(by_settings.values()))
    if default in by_settings:
        return by_settings[default]
    kinds = "; ".join(
        f"max length {length}, {dtype}, computed in {compute}, pool {pool}"
        for length, dtype, compute, pool in by_settings
    )
    options = (
        length_option,
        "dtype under [defaults] in kr2cache.toml",
        "compute-dtype under [defaults] there",
        "--pool",
    )
    differing = [option for option, *values in zip(options, *by_settings, strict=True) if len(set(values)) > 1]
    raise CacheError(f"Several caches of {resource} fit and differ: {kinds}.", f"Choose: {', '.join(differing)}.")


# Differences ----------------------------------------------------------------------------------------------------------


def chosen_differences(cache: FeatureCache, wanted: Wanted) -> list[Difference]:
    """The settings of a cache that are not the wanted ones. Names are not compared."""
    chosen = cache.provenance["chosen"]
    result = []
    for name in ("max_length", "dtype", "compute_dtype"):
        asked = getattr(wanted, name)
        if asked is not None and chosen[name] != asked:
            result.append(Difference(field=name, text=f"{name} is {chosen[name]} there, {asked} was asked for"))
    if wanted.pool not in (None, pool := provenance.pool_of(cache.provenance)):
        result.append(Difference(field="pool", text=f"pool is {pool} there, {wanted.pool} was asked for (--pool)"))
    if (there := provenance.weights_dtype_of(cache.provenance)) != wanted.weights_dtype:
        text = f"its weights were {there}, {wanted.weights_dtype} was asked for (--weights-dtype)"
        result.append(Difference(field="weights_dtype", text=text))
    try:
        fusion = parse_fusion(wanted.fusion, cache.model_layers)
    except ConfigError as error:  # the cache is of a model with fewer layers; the run's own resource was checked before
        return [*result, Difference(field="layers", text=error.message)]
    if cache.fusion is not None:
        if wanted.layers_apart or not fusion.is_stored_as(cache.fusion):
            layers = _numbers(cache.fusion["layers"])
            result.append(Difference(field="fusion", text=f"it holds only the average of layers {layers}"))
        return result
    missing = sorted(set(fusion.layers) - set(cache.layers))
    if missing:
        result.append(Difference(field="layers", text=f"layers {_numbers(missing)} are not stored there"))
    return result


def found_differences(cache: FeatureCache, wanted: Wanted, index: SequenceIndex | None) -> list[Difference]:
    """What the cache was made from and is different now.

    Args:
        cache: The cache.
        wanted: What the run needs.
        index: The wanted sequences, tokenised now with the cache's maximal length; None if there is no tokenizer.
    """
    unknown = sorted({"weights", "config", "template"} - set(cache.provenance["found"]))
    if unknown:
        what = ", ".join(unknown)
        return [Difference(field="version", text=f"another version of kr2cache made it, without recording {what}")]
    positions = cache.find(wanted.ids)
    stored = positions >= 0
    changed = np.zeros(len(positions), dtype=bool)
    changed[stored] = cache.text_xxh3[positions[stored]] != wanted.text_xxh3[stored]
    result = [*_model_differences(cache, wanted), *_text_differences(cache, wanted, positions, changed)]
    if index is not None:
        result.extend(_token_differences(cache, wanted, index, positions, stored & ~changed))
    return result


def _model_differences(cache: FeatureCache, wanted: Wanted) -> Iterator[Difference]:
    made = cache.provenance["found"]
    if wanted.weights is not None and made["weights"] != wanted.weights:
        text = (
            f"the weights of {wanted.resource} changed (digest {made['weights'][:8]}{_revision(cache)} then, "
            f"{wanted.weights[:8]} now)"
        )
        yield Difference(field="weights", text=text)
    if wanted.config is not None and made["config"] != wanted.config:
        text = (
            f"the configuration (config.json) of {wanted.resource} changed (digest {made['config'][:8]} then, "
            f"{wanted.config[:8]} now)"
        )
        yield Difference(field="config", text=text)
    if made["template"] != wanted.template:
        text = f"the template was {made['template']!r}, it is {wanted.template!r} now"
        yield Difference(field="template", text=text)


def _text_differences(
    cache: FeatureCache, wanted: Wanted, positions: NDArray[np.int64], changed: NDArray[np.bool_]
) -> Iterator[Difference]:
    """
    Args:
        positions: (n,) of the wanted sequences in the cache; -1 for a sequence that is missing.
        changed: (n,) whether the text of the sequence changed.
    """
    missing = [name for name, position in zip(wanted.ids, positions.tolist(), strict=True) if position < 0]
    if missing:
        text = f"{len(missing)} of {len(wanted.ids)} examples are not in it ({_names(missing)})"
        yield Difference(field="examples", text=text)
    if changed.any():
        names = [name for name, is_changed in zip(wanted.ids, changed.tolist(), strict=True) if is_changed]
        first = int(np.flatnonzero(changed)[0])
        then, now = int(cache.text_xxh3[positions[first]]), int(wanted.text_xxh3[first])
        text = (
            f"the text of {len(names)} of {len(changed)} examples changed ({_names(names)}; digest of the first "
            f"{then:016x} then, {now:016x} now)"
        )
        yield Difference(field="texts", text=text)


def _token_differences(
    cache: FeatureCache, wanted: Wanted, index: SequenceIndex, positions: NDArray[np.int64], same: NDArray[np.bool_]
) -> Iterator[Difference]:
    """
    Args:
        index: As for ``found_differences``.
        positions: As for ``_text_differences``.
        same: (n,) whether the cache holds the sequence and its text did not change.
    """
    if cache.provenance["found"].get("segments", False) != (index.segment_id is not None):
        before, after = ("without", "with") if index.segment_id is not None else ("with", "without")
        yield Difference(field="segments", text=f"it was made {before} segment ids, now the model runs {after} them")
    if not same.any():
        return
    stored = cache.tokens()
    changed = _changed_tokens(stored, index, positions, same)
    if changed:
        names = [index.ids[i].decode("utf-8") for i in changed]
        then, now = (
            part.input_id[part.first_token[i] : part.first_token[i + 1]][:8].tolist()
            for part, i in ((stored, int(positions[changed[0]])), (index, changed[0]))
        )
        text = (
            f"the tokenizer of {wanted.resource} gives other tokens for {len(names)} examples ({_names(names)}; the "
            f"first begins {then} then, {now} now)"
        )
        yield Difference(field="tokens", text=text)


def _changed_tokens(
    then: SequenceIndex, now: SequenceIndex, positions: NDArray[np.int64], same: NDArray[np.bool_]
) -> list[int]:
    """The sequences of ``now`` whose token ids or word alignment changed."""
    first_then, first_now = then.first_token, now.first_token
    changed = []
    for i in np.flatnonzero(same).tolist():
        a = slice(first_then[positions[i]], first_then[positions[i] + 1])
        b = slice(first_now[i], first_now[i + 1])
        same_tokens = _digest_of(then, int(positions[i])) == _digest_of(now, i)
        if (
            not same_tokens
            or not np.array_equal(then.input_id[a], now.input_id[b])
            or not np.array_equal(then.word_index[a], now.word_index[b])
        ):
            changed.append(i)
    return changed


def _digest_of(index: SequenceIndex, i: int) -> int | None:
    """The digest of all tokens of a sequence of a pooled cache, which stores only some of them; else None."""
    return None if index.tokens_xxh3 is None else int(index.tokens_xxh3[i])


def _revision(cache: FeatureCache) -> str:
    """`` of revision v1`` if the user asked for a revision."""
    model = cache.provenance.get("recorded", {}).get("model", {})
    return f" of revision {model['revision']}" if model.get("revision") else ""


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
