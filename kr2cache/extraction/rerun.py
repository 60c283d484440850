"""Run the model of an existing cache again: to repair the cache, or to compare it with its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kr2cache.cache.format import SequenceIndex, ShardHeader
from kr2cache.cache.pooling import pooled
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import DEFAULT_POOL, ExtractConfig
from kr2cache.errors import CacheMismatchError, ConfigError, UnknownNameError
from kr2cache.extraction import trial
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.digests import OpenedModel
from kr2cache.models.encode import MissingWords, encode_examples
from kr2cache.models.registry import ModelSpec, find_model, name_of_stored
from kr2cache.models.tokenizers import pad_id
from kr2cache.store import folders, provenance
from kr2cache.tasks import find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RerunConfig:
    """A cache, and where its model and its data are."""

    folder: Path
    resource: str | None = None
    """The model; None for the name that the cache records."""
    data: str | None = None
    """The corpus; None for the task's own. It is read if an index is damaged or does not have all input of the model
    (``needs_data``)."""
    device: str = "auto"
    device_map: str | None = None
    """As in ``ExtractConfig``."""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """As in ``ExtractConfig``."""


def model_of(config: RerunConfig, stored: str) -> ModelSpec:
    """The model that made a cache.

    Args:
        stored: The name that the cache records.

    Raises:
        ConfigError: If this machine does not know the name.
    """
    try:
        return find_model(config.resource or name_of_stored(stored, config.models), config.models)
    except UnknownNameError as error:
        if config.resource is not None:
            raise
        raise ConfigError(
            f"{config.folder} was made with the model {stored!r}, which is not registered.",
            "Give --resource with its folder, or register it under [models] in kr2cache.toml.",
        ) from error


def needs_data(chosen: provenance.Chosen, made: provenance.Found) -> bool:
    """Whether a cache does not store all input of the model: segment ids, or all tokens if it is pooled."""
    return made.segments or chosen.pool != DEFAULT_POOL


def from_data(
    index: SequenceIndex, chosen: provenance.Chosen, config: RerunConfig, tokenizer: PreTrainedTokenizerBase
) -> SequenceIndex:
    """The same sequences with all input of the model, from the data (``needs_data``).

    Args:
        index: Sequences of the cache, as it stores them.

    Raises:
        CacheMismatchError: If the data does not give the same texts and tokens.
    """
    task, names = find_task(chosen.task, config.tasks), index.ids.tolist()
    wanted = {name.decode("utf-8") for name in names}
    examples = [one for one in task.examples(chosen.split, config.data, None) if wanted.intersection(one.sequence_ids)]
    differ = "texts"
    if examples:
        read = encode_examples(tokenizer, examples, task, chosen.max_length)
        there = {name: place for place, name in enumerate(read.ids.tolist())}
        if all(name in there for name in names):
            read = read.select(np.array([there[name] for name in names]))
            if np.array_equal(read.text_xxh3, index.text_xxh3):
                now = read if chosen.pool == DEFAULT_POOL else pooled(read, chosen.pool).stored
                if provenance.tokens_digest(now) == provenance.tokens_digest(index):
                    return read
                differ = "tokens"
    raise other_data(config, differ)


def other_data(config: RerunConfig, what: str) -> CacheMismatchError:
    """The error if the data does not give what a cache was made from.

    Args:
        what: ``texts`` or ``tokens``.
    """
    return CacheMismatchError(
        f"{config.folder} was made from data with other {what}.",
        "Give --data with the original corpus; or extract again, which copies the unchanged sequences.",
    )


def plan_again(
    cache: ShardHeader | FeatureCache,
    folder: Path,
    index: SequenceIndex,
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    device: str,
    device_map: str | None,
    models: Mapping[str, Mapping[str, Any]],
) -> ExtractPlan:
    """The plan of the extraction that made a cache, for these of its sequences.

    Args:
        folder: Of the cache.
        index: All tokens of the sequences.
    """
    chosen = provenance.chosen_of(cache.provenance, folder)
    return ExtractPlan(
        config=ExtractConfig(
            resource=chosen.resource,
            split=chosen.split,
            task=chosen.task,
            max_length=chosen.max_length,
            dtype=chosen.dtype,
            compute_dtype=chosen.compute_dtype,  # type: ignore[arg-type]  # the fingerprint was compared
            weights_dtype=chosen.weights_dtype,  # type: ignore[arg-type]  # as above
            pool=chosen.pool,
            device=device,
            device_map=device_map,
            cache_dir=folders.cache_dir_of(folder, chosen.task, chosen.split) or folder.absolute().parent,
            models=models,
        ),
        spec=spec,
        index=index,
        layers=cache.layers,
        model_layers=cache.model_layers,
        width=cache.width,
        pad_id=pad_id(tokenizer),
        template=provenance.found_of(cache.provenance, folder).template,
        corpus=chosen.corpus,
        missing_words=MissingWords(0, 0),  # the extraction has shown them
    )


def open_same(plan: ExtractPlan, made: provenance.Found, folder: Path) -> OpenedModel:
    """Open the model of a plan.

    Args:
        made: What the cache was made from.
        folder: Of the cache.

    Raises:
        CacheMismatchError: If the cache was made with other weights or another configuration.
    """
    model = trial.open_resource(plan)
    for name in ("weights", "config"):
        then, now = getattr(made, name), getattr(model.digests, name)
        if then != now:
            raise CacheMismatchError(
                f"{folder} was made with other {name} of {plan.spec.name} (digest {then[:8]} then, {now[:8]} now).",
                "Give --resource with the folder of the model that made it.",
            )
    return model
