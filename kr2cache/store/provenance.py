"""What a cache was made from: recorded in it, hashed into its fingerprint, compared before it is used.

*Chosen* fields select a cache (resource, task, corpus, split, lengths, layers, dtypes). *Found* fields are compared:
digests of the weights, of the token ids and word alignment, of the template, of each text. *Recorded* fields (device,
versions, ...) are there to be read and never invalidate anything.

A cache **fits** when every chosen value that decides the states is the one asked for and everything found is equal;
that it holds more layers or more examples does no harm. The names of resource and corpus decide only what a difference
means: the same names with other contents is a cache gone **stale**, other names simply are another cache.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.format import SequenceIndex, canonical_json
from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError, ConfigError
from kr2cache.fusion import parse_fusion
from kr2cache.version import __version__


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the user asked for."""

    resource: str
    task: str
    corpus: str
    split: str
    max_length: int
    layers: tuple[int, ...]
    fusion: dict[str, Any] | None
    dtype: str
    compute_dtype: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found when the cache was made."""

    weights: str
    """``digests.weights_digest``"""
    config: str
    """``digests.config_digest``"""
    tokens: str
    """``tokens_digest``"""
    template: str
    texts: str
    """``texts_digest``"""
    sequences: int
    segments: bool
    """Whether the model was told the segments of pairs apart."""


def found(index: SequenceIndex, weights: str, config: str, template: str) -> Found:
    """The found fields of a cache of these sequences."""
    return Found(
        weights=weights,
        config=config,
        tokens=tokens_digest(index),
        template=template,
        texts=texts_digest(index),
        sequences=len(index),
        segments=index.segment_id is not None,
    )


def texts_digest(index: SequenceIndex) -> str:
    """XXH3-128 of all ids and text hashes, in order."""
    digest = xxhash.xxh3_128()
    for name, text in zip(index.ids.tolist(), index.text_xxh3.tolist(), strict=True):
        digest.update(name + b"\0" + text.to_bytes(8, "little"))
    return digest.hexdigest()


def tokens_digest(index: SequenceIndex) -> str:
    """XXH3-128 of the lengths, token ids and word alignment of all sequences."""
    digest = xxhash.xxh3_128()
    for array in (index.n_tokens, index.input_id, index.word_index):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def fingerprint(chosen: Chosen, what: Found) -> str:
    """SHA-256 of everything that decides the states and their order; the names of resource and corpus are left out, the
    digests stand for them.
    """
    deciding = {key: value for key, value in asdict(chosen).items() if key not in ("resource", "corpus")}
    return hashlib.sha256(canonical_json({"chosen": deciding, "found": asdict(what)}).encode()).hexdigest()


def recorded(device: str, threads: int, model: dict[str, Any]) -> dict[str, Any]:
    """Worth knowing later, and never compared: machine, versions, where the model came from. No times."""
    return {
        "device": device,
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": library_versions(),
        "model": model,
    }


@functools.cache  # each is looked for on the disk, and a sweep asks in every run
def library_versions() -> dict[str, str]:
    """The package's own number is its own word: it also runs from a folder, without being installed."""
    return {
        "kr2cache": __version__,
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "h5py", "numpy")},
    }


def cache_folder(cache_dir: Path, chosen: Chosen, digest: str) -> Path:
    """``.kr2cache/udpos-de/train/gottbert-1f3a9c2e``"""
    return cache_dir / chosen.task / chosen.split / f"{chosen.resource}-{digest[:8]}"


def cache_dir_of(folder: Path, chosen: Chosen) -> Path | None:
    """The cache folder that a cache lies in, the reverse of ``cache_folder``: however ``folder`` is written (relative,
    ``.``, through links), and None where it lies in none, as a copy elsewhere may.
    """
    for place in (folder.absolute(), folder.resolve()):  # a link in a cache folder may lead to another disk
        if (place.parent.parent.name, place.parent.name) == (chosen.task, chosen.split):
            return place.parent.parent.parent
    return None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run needs of a cache. None: not asked for, so whatever the cache has will do."""

    resource: str
    task: str
    corpus: str
    split: str
    max_length: int | None
    dtype: str | None
    compute_dtype: str | None
    fusion: str
    """Its name; which layers it needs follows from how many the cache's model has."""
    layers_apart: bool = False
    """Whether the layers are needed side by side (the direct projection), so that a fused cache does not serve."""
    weights: str | None
    """None where the resource's weights are not on this machine: they cannot be compared then."""
    config: str | None
    """Like ``weights``."""
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


def caches_of(cache_dir: Path, task: str, split: str) -> list[FeatureCache]:
    """Every readable cache of a task's split."""
    return [cache for cache in _opened(cache_dir, task, split).values() if isinstance(cache, FeatureCache)]


def unreadable_of(cache_dir: Path, task: str, split: str) -> dict[Path, CacheError]:
    """The folders of a task's split that should be caches, and why they cannot be read."""
    return {f: error for f, error in _opened(cache_dir, task, split).items() if isinstance(error, CacheError)}


def _opened(cache_dir: Path, task: str, split: str) -> dict[Path, FeatureCache | CacheError]:
    root = cache_dir / task / split
    found: dict[Path, FeatureCache | CacheError] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        try:
            cache = FeatureCache.open(folder)
            chosen_of(cache.provenance, folder)
            found[folder] = cache
        except CacheError as error:
            found[folder] = error
    return found


def chosen_of(recorded: Mapping[str, Any], folder: Path) -> Chosen:
    """What was asked for when a cache was made.

    Args:
        recorded: Its provenance.
        folder: Where it is, for errors.

    Raises:
        CacheError: If its provenance does not say so, as that of another program's file would not.
    """
    stored, made = recorded.get("chosen"), recorded.get("found")
    if isinstance(stored, dict) and isinstance(made, dict) and set(stored) == {f.name for f in fields(Chosen)}:
        names = ("resource", "task", "corpus", "split", "dtype", "compute_dtype")
        strings = all(isinstance(stored[name], str) for name in names)
        numbers = isinstance(stored["max_length"], int) and isinstance(stored["layers"], list)
        if strings and numbers:
            return Chosen(**{**stored, "layers": tuple(stored["layers"])})
    raise CacheError(
        f"{folder} does not say what it was made from (chosen and found fields of its provenance).",
        "Another version of kr2cache or another program made it: extract again.",
    )


def found_of(recorded: Mapping[str, Any], folder: Path) -> Found:
    """What was found when a cache was made; arguments as for ``chosen_of``.

    Raises:
        CacheError: If its provenance does not say so as this version does.
    """
    made = recorded.get("found")
    if isinstance(made, dict) and set(made) == {f.name for f in fields(Found)}:
        return Found(**made)
    raise CacheError(
        f"{folder} was made by another version of kr2cache, which recorded other things.", "Extract again."
    )


def rounded_again(cache: FeatureCache) -> bool:
    """Whether its states were rounded a second time on their way from a larger cache, so that they are not quite those
    that an extraction with its settings gives.
    """
    recorded = cache.provenance.get("recorded", {})
    converted = isinstance(recorded, dict) and "converted_from" in recorded
    return converted or (cache.fusion is not None and cache.dtype not in EXACT_DTYPES)


EXACT_DTYPES = ("float16", "float32")
"""Read as they are stored: averaging layers before or after storing them as these gives the same bits."""


def contradictions(cache: FeatureCache) -> list[str]:
    """Where the provenance contradicts the cache's own content; empty for a sound one."""
    chosen, made = chosen_of(cache.provenance, cache.folder), found_of(cache.provenance, cache.folder)
    index = cache.tokens()
    result = []
    if fingerprint(chosen, made) != cache.fingerprint:
        result.append("its fingerprint is not that of its provenance")
    if (chosen.dtype, chosen.layers, chosen.fusion) != (cache.dtype, cache.layers, cache.fusion):
        result.append("its dtype, layers or fusion are not those of its provenance")
    for name, value in (
        ("texts", texts_digest(index)),
        ("tokens", tokens_digest(index)),
        ("sequences", len(index)),
    ):
        if getattr(made, name) != value:
            result.append(f"its {name} are not those of its provenance")
    return result


def chosen_differences(cache: FeatureCache, wanted: Wanted) -> list[Difference]:
    """Where the cache was made with other settings; names aside."""
    chosen = cache.provenance["chosen"]
    result = []
    for name in ("max_length", "dtype", "compute_dtype"):
        asked = getattr(wanted, name)
        if asked is not None and chosen[name] != asked:
            result.append(Difference(field=name, text=f"{name} is {chosen[name]} there, {asked} was asked for"))
    try:
        fusion = parse_fusion(wanted.fusion, cache.model_layers)
    except ConfigError as error:  # a cache of a shallower model; the run's own resource was checked before
        return [*result, Difference(field="layers", text=error.message)]
    if cache.fusion is not None:
        if wanted.layers_apart or not fusion.is_stored_as(cache.fusion):
            layers = _numbers(cache.fusion["layers"])
            result.append(Difference(field="fusion", text=f"it holds the average of layers {layers} alone"))
        return result
    missing = sorted(set(fusion.layers) - set(cache.layers))
    if missing:
        result.append(Difference(field="layers", text=f"layers {_numbers(missing)} are not stored there"))
    return result


def found_differences(cache: FeatureCache, wanted: Wanted, index: SequenceIndex | None) -> list[Difference]:
    """Where what the cache was made from is not what is there now.

    Args:
        index: The wanted sequences, tokenised anew for the cache's maximal length; None where the tokenizer is not
        there.
    """
    result = []
    made = cache.provenance["found"]
    unknown = sorted({"weights", "config", "template"} - set(made))
    if unknown:
        what = ", ".join(unknown)
        return [Difference(field="version", text=f"another version of kr2cache made it, without recording {what}")]
    if wanted.weights is not None and made["weights"] != wanted.weights:
        result.append(
            Difference(
                field="weights",
                text=f"the weights of {wanted.resource} changed (digest {made['weights'][:8]}{_revision(cache)} then, "
                f"{wanted.weights[:8]} now)",
            )
        )
    if wanted.config is not None and made["config"] != wanted.config:
        result.append(
            Difference(
                field="config",
                text=f"the configuration (config.json) of {wanted.resource} changed (digest {made['config'][:8]} then, "
                f"{wanted.config[:8]} now)",
            )
        )
    if made["template"] != wanted.template:
        result.append(
            Difference(field="template", text=f"the template was {made['template']!r}, it is {wanted.template!r} now")
        )
    positions = cache.find(wanted.ids)
    absent = [name for name, position in zip(wanted.ids, positions.tolist(), strict=True) if position < 0]
    if absent:
        result.append(
            Difference(
                field="examples",
                text=f"{len(absent)} of {len(wanted.ids)} examples are not in it ({_names(absent)})",
            )
        )
    there = positions >= 0
    changed = np.zeros(len(positions), dtype=bool)
    changed[there] = cache.text_xxh3[positions[there]] != wanted.text_xxh3[there]
    if changed.any():
        names = [name for name, other in zip(wanted.ids, changed.tolist(), strict=True) if other]
        first = int(np.flatnonzero(changed)[0])
        then, now = int(cache.text_xxh3[positions[first]]), int(wanted.text_xxh3[first])
        result.append(
            Difference(
                field="texts",
                text=f"the text of {len(names)} of {len(changed)} examples changed ({_names(names)}; digest of the "
                f"first {then:016x} then, {now:016x} now)",
            )
        )
    same = there & ~changed
    if index is not None and made.get("segments", False) != (index.segment_id is not None):
        before, after = ("without", "with") if index.segment_id is not None else ("with", "without")
        result.append(Difference(field="segments", text=f"it was made {before} segment ids, they go {after} now"))
    if index is not None and same.any():
        then_index = cache.tokens()
        other = _other_tokens(then_index, index, positions, same)
        if other:
            names = [index.ids[i].decode("utf-8") for i in other]
            then, now = (
                part.input_id[part.first_token[i] : part.first_token[i + 1]][:8].tolist()
                for part, i in ((then_index, int(positions[other[0]])), (index, other[0]))
            )
            result.append(
                Difference(
                    field="tokens",
                    text=f"the tokenizer of {wanted.resource} gives other tokens for {len(names)} examples "
                    f"({_names(names)}; the first begins {then} then, {now} now)",
                )
            )
    return result


def _other_tokens(
    then: SequenceIndex, now: SequenceIndex, positions: NDArray[np.int64], same: NDArray[np.bool_]
) -> list[int]:
    """The sequences whose token ids or word alignment differ."""
    first_then, first_now = then.first_token, now.first_token
    other = []
    for i in np.flatnonzero(same).tolist():
        a = slice(first_then[positions[i]], first_then[positions[i] + 1])
        b = slice(first_now[i], first_now[i + 1])
        if not np.array_equal(then.input_id[a], now.input_id[b]) or not np.array_equal(
            then.word_index[a], now.word_index[b]
        ):
            other.append(i)
    return other


def _revision(cache: FeatureCache) -> str:
    """`` of revision v1``, where one was asked for."""
    model = cache.provenance.get("recorded", {}).get("model", {})
    return f" of revision {model['revision']}" if model.get("revision") else ""


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
