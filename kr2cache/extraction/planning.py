"""Plan an extraction before the model is loaded: check the settings, read and tokenise the split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.format import SequenceIndex, canonical_json
from kr2cache.cache.pooling import Pooling, check_words, count_positions, pooled
from kr2cache.cache.shard import readable_headers
from kr2cache.config import POOLS, ExtractConfig
from kr2cache.errors import ConfigError, DiskSpaceError
from kr2cache.extraction.checks import check_extraction
from kr2cache.fusion import parse_layers
from kr2cache.models import tokenizers
from kr2cache.models.configuration import encoder_shape, max_positions, vocabulary
from kr2cache.models.encode import MissingWords, check_token_ids
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import resource_config
from kr2cache.models.tokenise import Tokenised, tokenise, tokenise_first
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.models.words import check_tells_words
from kr2cache.store import folders, plans, provenance
from kr2cache.system.console import bytes_text, console, count_text, note, ranges_text
from kr2cache.system.device import choose_device
from kr2cache.system.disk import free_bytes
from kr2cache.tasks import Example, Task, find_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Trial(NamedTuple):
    """What a model needs so that the states of a sequence depend on nothing else (``extraction.trial``)."""

    padded: bool
    """Whether batches may be padded: padding does not change the states."""
    fresh: bool
    """Whether each batch has to run in the model as it was loaded: states depend on what ran before."""
    last_is_output: bool | None
    """Whether the last layer is the model's output, after its final norm. None if the model has no such output."""


@dataclass(frozen=True, kw_only=True)
class ExtractPlan:
    """What an extraction will run and store, and how large it is."""

    config: ExtractConfig
    spec: ModelSpec
    index: SequenceIndex
    """All tokens that the model reads."""
    layers: tuple[int, ...]
    model_layers: int
    width: int
    pad_id: int
    template: str
    corpus: str
    missing_words: MissingWords
    """For a task on words: how many words get no states."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """What the cache records about this plan (``store.plans``)."""
    trial: Trial | None = None
    """What the model needs; None if it was not tried yet. The extraction tries it then."""

    @cached_property
    def pooling(self) -> Pooling | None:
        """How states are pooled; None if each token's state is stored."""
        return None if self.config.pool == "none" else pooled(self.index, self.config.pool)

    @property
    def stored(self) -> SequenceIndex:
        """The index of the cache: one value for each stored position."""
        return self.index if self.pooling is None else self.pooling.stored

    @property
    def tokens(self) -> int:
        return len(self.index.input_id)

    @property
    def positions(self) -> int:
        """How many states of a layer are stored: one a token, unless they are pooled."""
        return len(self.stored.input_id)

    @property
    def token_bytes(self) -> int:
        """Bytes of one stored position in all stored layers."""
        return DTYPES[self.config.dtype].row_bytes(self.width) * len(self.layers)

    @property
    def state_bytes(self) -> int:
        return self.positions * self.token_bytes

    @property
    def chosen(self) -> provenance.Chosen:
        return provenance.Chosen(
            resource=self.spec.name,
            task=self.config.task,
            corpus=self.corpus,
            split=self.config.split,
            max_length=self.config.max_length,
            layers=self.layers,
            fusion=None,
            dtype=self.config.dtype,
            compute_dtype=self.config.compute_dtype,
            weights_dtype=self.config.weights_dtype,
            pool=self.config.pool,
        )

    def bytes_by_choice(self) -> dict[str, dict[str, int]]:
        """Bytes on disk, for every dtype, with all layers, the last four layers, and one layer."""
        choices = {"all": self.model_layers, "last4": min(4, self.model_layers), "one layer": 1}
        return {
            name: {text: self.positions * layers * dtype.row_bytes(self.width) for text, layers in choices.items()}
            for name, dtype in DTYPES.items()
        }

    def bytes_by_pool(self) -> dict[str, int]:
        """Bytes on disk for every pooling, with the layers and the dtype of the plan."""
        return {pool: count_positions(self.index, pool) * self.token_bytes for pool in POOLS}


def plan_extraction(config: ExtractConfig, examples: Iterable[Example] | None = None) -> ExtractPlan:
    """Check the settings, read the split and tokenise it. No weights are loaded.

    Args:
        config: The settings.
        examples: The examples of the split, if the caller has them. If not, this function reads the split, and
            processes that use the same cache directory tokenise a large split only once (``store.plans``).
    """
    checked = check_extraction(config)
    spec, task = checked.spec, checked.task
    choose_device(config.device)
    model_config = resource_config(spec)
    model_layers, width = encoder_shape(model_config)
    layers = parse_layers(config.layers, model_layers)
    check_length(config.max_length, "--max-length", spec, model_config)
    tokenizer = load_tokenizer(spec, words=task.words)
    if config.pool == "word" and not task.words:
        check_tells_words(tokenizer, f"The tokenizer of {spec.name!r}")
    tokenised, recorded = _tokenised(config, spec, task, tokenizer, examples)
    check_token_ids(tokenised.index, vocabulary(model_config), repr(spec.name))
    plan = ExtractPlan(
        config=config,
        spec=spec,
        index=tokenised.index,
        layers=layers,
        model_layers=model_layers,
        width=width,
        pad_id=tokenizers.pad_id(tokenizer),
        template=task.template,
        corpus=task.corpus(config.data),
        missing_words=tokenised.missing_words,
        recorded=recorded if config.pool == "none" else {},  # the index of a pooled cache has not all tokens
    )
    check_words(plan.stored)
    return plan


def check_length(length: int, option: str, spec: ModelSpec, model_config: PretrainedConfig) -> None:
    """Check that the maximal length, the value of ``option``, is not more than the model has positions.

    Raises:
        ConfigError: If it is more.
    """
    longest = max_positions(model_config)
    if longest is not None and length > longest:
        raise ConfigError(
            f"The maximal length {length} is more than the {longest} positions of {spec.name!r}.",
            f"Give {option} {longest} or less.",
        )


def _tokenised(
    config: ExtractConfig,
    spec: ModelSpec,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example] | None,
) -> tuple[Tokenised, Mapping[str, Any]]:
    """The tokens of the split, and what the new cache records about them. If a cache was made from the same data, its
    tokens are used again.
    """
    if examples is not None:  # they were read earlier: the files may have changed since
        return tokenise(spec, tokenizer, examples, task, config.max_length), {}
    source = plans.source_of(
        task,
        config.split,
        config.data,
        limit=config.limit,
        max_length=config.max_length,
        tokenizer=tokenizer,
    )

    def read() -> Iterator[Example]:
        return task.examples(config.split, config.data, config.limit)

    if source is None:
        return tokenise(spec, tokenizer, read(), task, config.max_length), {}
    shared = plans.Plans(cache_dir=config.cache_dir, task=task.name, split=config.split, source=source)
    return shared.find_or_make(
        first=lambda: tokenise_first(tokenizer, read(), task, config.max_length),
        make=lambda: tokenise(spec, tokenizer, read(), task, config.max_length),
    )


def check_disk(*plans: ExtractPlan) -> None:
    """Check that the disk can hold the caches of all plans, which have one cache folder. Space that shards of these
    caches have reserved already counts as free.

    Raises:
        DiskSpaceError: If it cannot. The error gives the needed and the free bytes, and settings that need fewer.
    """
    if not plans:
        return
    needed = new_bytes(plans)
    cache_dir = plans[0].config.cache_dir
    free = free_bytes(cache_dir)
    if needed > free:
        raise DiskSpaceError(
            f"The states take {bytes_text(needed)}, but {cache_dir} has {bytes_text(free)} free.",
            f"Free some space, or give another --cache-dir.{_fewer_bytes(plans)}",
        )


def new_bytes(plans: Iterable[ExtractPlan]) -> int:
    """Bytes that the caches of all plans need beside the space that their shards have reserved already."""
    return sum(plan.state_bytes - _reserved(plan) for plan in plans)


def _fewer_bytes(plans: Sequence[ExtractPlan]) -> str:
    """Which settings need fewer bytes, as a sentence; empty if none does."""
    options = {
        "--layers last4": sum(plan.bytes_by_choice()[plan.config.dtype]["last4"] for plan in plans),
        "--dtype int8": sum(plan.positions * len(plan.layers) * DTYPES["int8"].row_bytes(plan.width) for plan in plans),
    }
    total = sum(plan.state_bytes for plan in plans)
    fewer = [f"{option} takes {bytes_text(size)}" for option, size in options.items() if size < total]
    return f" {', '.join(fewer)}." if fewer else ""


def _reserved(plan: ExtractPlan) -> int:
    """Bytes on disk of the shards that an earlier extraction made for this cache."""
    wanted = canonical_json(plan.chosen.stored())
    config = plan.config
    most = 0
    for folder in folders.matching(config.cache_dir, task=config.task, split=config.split, name=plan.spec.name):
        shards = sorted(folder.glob("*.h5"))
        headers = readable_headers(shards[0]) if shards else []
        if any(canonical_json(header.provenance.get("chosen")) == wanted for header in headers):
            most = max(most, sum(path.stat().st_blocks * 512 for path in shards))
    return most


def _pool_text(plan: ExtractPlan) -> str:
    """What is stored if the states are pooled: ``, pooled to 25,147 words``; else empty."""
    if plan.config.pool == "none":
        return ""
    stored = f" to {count_text(plan.positions, 'word')}" if plan.config.pool == "word" else " to one for each sequence"
    return f", pooled{stored}"


def describe(plan: ExtractPlan, length_option: str = "--max-length") -> None:
    """Show what the extraction will run and store.

    Args:
        plan: The extraction.
        length_option: The name of the option for the maximal length, in the command that the user called.
    """
    free = free_bytes(plan.config.cache_dir)
    summary = Text.assemble(
        (plan.spec.name, "bold"),
        f" on {plan.config.task}/{plan.config.split} ({plan.corpus}): "
        f"{count_text(len(plan.index), 'sequence')}, {count_text(plan.tokens, 'token')}, layers "
        f"{ranges_text(plan.layers)} of width {plan.width} as {plan.config.dtype}{_pool_text(plan)}: ",
        (bytes_text(plan.state_bytes), "bold"),
        f" ({bytes_text(free)} free in {os.fspath(plan.config.cache_dir)})",
    )
    console.print(summary, soft_wrap=True)
    longest = f"{plan.config.max_length} tokens ({length_option})"
    filled = int((plan.index.n_tokens == plan.config.max_length).sum())
    if missing := plan.missing_words.total:
        reasons = plan.missing_words.reasons(plan.config.max_length, length_option)
        note(f"No states for {count_text(missing, 'word')}: {reasons}.")
    elif filled and not find_task(plan.config.task, plan.config.tasks).words:
        note(f"{count_text(filled, 'sequence')} of {longest}: longer texts are cut.")
