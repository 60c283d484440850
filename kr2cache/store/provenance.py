"""What a cache was made from. The cache records it, and its fingerprint is a hash of it.

*Chosen* fields select a cache (resource, task, corpus, split, lengths, layers, dtypes). *Found* fields are compared
before a cache is used (``find``): digests of the weights, the token ids and word alignment, the template, each text.
*Recorded* fields (device, versions, ...) inform a reader and never make a cache invalid.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.format import SequenceIndex, canonical_json
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import DEFAULT_POOL, DEFAULT_WEIGHTS_DTYPE, POOLS, Pool
from kr2cache.errors import CacheError
from kr2cache.version import __version__

AT_ONCE = 2**16
"""Sequences whose ids are Python objects at the same time."""


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
    weights_dtype: str = DEFAULT_WEIGHTS_DTYPE
    pool: Pool = DEFAULT_POOL

    def stored(self) -> dict[str, Any]:
        """The fields as a cache records them. Those of ``ADDED_LATER`` are recorded if they differ from what they were
        before.
        """
        return {name: value for name, value in asdict(self).items() if (name, value) not in ADDED_LATER.items()}


ADDED_LATER = {"weights_dtype": DEFAULT_WEIGHTS_DTYPE, "pool": DEFAULT_POOL}
"""Chosen fields that older versions did not have, and the values with which those made caches."""


def weights_dtype_of(recorded: Mapping[str, Any]) -> str:
    """The dtype of the model's weights when a cache was made.

    Args:
        recorded: The cache's provenance.
    """
    return str(recorded["chosen"].get("weights_dtype", DEFAULT_WEIGHTS_DTYPE))


def pool_of(recorded: Mapping[str, Any]) -> Pool:
    """How the states of a cache are pooled.

    Args:
        recorded: The cache's provenance.
    """
    pool: Pool = recorded["chosen"].get("pool", DEFAULT_POOL)
    return pool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the cache was made from."""

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
    """Whether the model ran with segment ids."""


def found(index: SequenceIndex, weights: str, config: str, template: str) -> Found:
    """The found fields of a cache of these sequences.

    Args:
        index: The sequences.
        weights: ``digests.weights_digest`` of the model.
        config: ``digests.config_digest`` of the model.
        template: The task's.
    """
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
    for start in range(0, len(index), AT_ONCE):  # Python's objects for all of them would take far more than the index
        ids, texts = (array[start : start + AT_ONCE].tolist() for array in (index.ids, index.text_xxh3))
        digest.update(
            b"".join(name + b"\0" + text.to_bytes(8, "little") for name, text in zip(ids, texts, strict=True))
        )
    return digest.hexdigest()


def tokens_digest(index: SequenceIndex) -> str:
    """XXH3-128 of the lengths, token ids and word alignment of all sequences. Of pooled ones, also of the digests of
    all their tokens.
    """
    digest = xxhash.xxh3_128()
    for array in (index.n_tokens, index.input_id, index.word_index, index.tokens_xxh3):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def fingerprint(chosen: Chosen, found: Found) -> str:
    """SHA-256 of everything that decides the states and their order. Digests take the place of the names of resource
    and corpus.
    """
    deciding = {key: value for key, value in chosen.stored().items() if key not in ("resource", "corpus")}
    return hashlib.sha256(canonical_json({"chosen": deciding, "found": asdict(found)}).encode()).hexdigest()


def recorded(device: str, threads: int, model: dict[str, Any]) -> dict[str, Any]:
    """The recorded fields: machine, versions, origin of the model. No times, so that equal caches are equal bytes."""
    return {
        "device": device,
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": library_versions(),
        "model": model,
    }


@functools.cache  # finding a version reads the disk, and every run of a sweep asks
def library_versions() -> dict[str, str]:
    """Versions by package name. kr2cache gives its own version, since it may run without being installed."""
    return {
        "kr2cache": __version__,
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "h5py", "numpy")},
    }


def chosen_of(recorded: Mapping[str, Any], folder: Path) -> Chosen:
    """The chosen fields of a cache.

    Args:
        recorded: Its provenance.
        folder: Where it is, for errors.

    Raises:
        CacheError: If its provenance has no such fields, as in a file of another program.
    """
    stored, made = recorded.get("chosen"), recorded.get("found")
    if (
        isinstance(stored, dict)
        and isinstance(made, dict)
        and (set(stored) | set(ADDED_LATER) == {f.name for f in fields(Chosen)})
    ):
        stored = {**ADDED_LATER, **stored}
        names = ("resource", "task", "corpus", "split", "dtype", "compute_dtype", *ADDED_LATER)
        strings = all(isinstance(stored[name], str) for name in names)
        numbers = isinstance(stored["max_length"], int) and isinstance(stored["layers"], list)
        if strings and numbers and stored["pool"] in POOLS:
            return Chosen(**{**stored, "layers": tuple(stored["layers"])})
    raise CacheError(
        f"{folder} does not record what it was made from (chosen and found fields of its provenance).",
        "Another version of kr2cache or another program made it: extract again.",
    )


def found_of(recorded: Mapping[str, Any], folder: Path) -> Found:
    """The found fields of a cache; arguments as for ``chosen_of``.

    Raises:
        CacheError: If its provenance does not have the fields of this version.
    """
    made = recorded.get("found")
    if isinstance(made, dict) and set(made) == {f.name for f in fields(Found)}:
        return Found(**made)
    raise CacheError(
        f"{folder} was made by another version of kr2cache, which recorded other fields.", "Extract again."
    )


def rounded_again(cache: FeatureCache) -> bool:
    """Whether the states were rounded twice: first into a larger cache, then into this one. Then they differ a little
    from an extraction with the same settings.
    """
    recorded = cache.provenance.get("recorded", {})
    converted = isinstance(recorded, dict) and "converted_from" in recorded
    return converted or (cache.fusion is not None and not DTYPES[cache.dtype].is_exact)


def contradictions(cache: FeatureCache) -> list[str]:
    """Where the provenance contradicts the content of the cache; empty for a sound cache."""
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
