"""The resource of a run: its caches, found or made.

A cache is taken when it fits (``provenance``); where none was made by these names it is extracted; where one was, from
something else, that is an error that says what changed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import (
    DEFAULT_COMPUTE_DTYPE,
    DEFAULT_DTYPE,
    DEFAULT_MAX_LENGTH,
    ExtractConfig,
    TrainConfig,
    default_cache_dir,
)
from kr2cache.errors import CacheError, CacheMismatchError, ConfigError, DiskSpaceError
from kr2cache.experiment.shared import Shared
from kr2cache.extraction.extract import describe_result, extract
from kr2cache.extraction.planning import ExtractPlan, describe, plan_extraction
from kr2cache.fusion import parse_fusion
from kr2cache.models.digests import model_digests
from kr2cache.models.encode import missing_words
from kr2cache.models.files import local_folder
from kr2cache.models.registry import ModelSpec
from kr2cache.store import provenance
from kr2cache.store.derive import derive, plan_fusion
from kr2cache.system.console import bytes_text, count_text, note, seconds_text, waiting
from kr2cache.tasks import Task
from kr2cache.training.features import fits_in_memory

LENGTH_OPTION = "--resource-max-length"
"""What a training calls the maximal length of the resource's sequences."""


class Resource:
    """The resource of a run: its caches by split, found or made."""

    def __init__(self, config: TrainConfig, spec: ModelSpec, task: Task, shared: Shared) -> None:
        self.corpus = shared.corpus(task, config.data, config.limit)
        self.config = config
        self.spec = spec
        self.task = task
        self.computed = 0
        self.notes: list[str] = []
        self.words_without_states: dict[str, int] = {}
        """By split, of a task of words: how many are not in the cache that is read."""
        self.on_this_machine = local_folder(spec) is not None
        self.weights: str | None = None
        self.config_digest: str | None = None
        # Of the caches; what is not asked for, the train split's cache decides for all splits.
        self.max_length = config.resource_max_length
        self.dtype = config.dtype
        self.compute_dtype = config.compute_dtype
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._note_once = shared.note_once
        if self.on_this_machine:
            with waiting(f"Reading the weights of {spec.name}"):
                digests = model_digests(spec)
                self._tokenizer = shared.tokenizer(spec, words=task.words)
            self.weights, self.config_digest = digests.weights, digests.config
        else:
            where = "are not on this machine" if self._has_source else "are in no folder that is known here"
            self.notes.append(f"The weights of {spec.name} {where}: its caches are trusted, not compared with them.")

    @property
    def _has_source(self) -> bool:
        """Whether there is a place to take the model from; not where its caches alone name it."""
        return (self.spec.path or self.spec.package or self.spec.hub_id) is not None

    def cache(self, split: str) -> FeatureCache:
        """The cache that fits, or a new one.

        Raises:
            CacheMismatchError: If one was made by these names, but from something else.
            CacheError: If there is none and ``--no-extract`` was given, or several fit and differ.
        """
        part = self.corpus.splits[split]
        wanted = provenance.Wanted(
            resource=self.spec.name,
            task=self.task.name,
            corpus=self.task.corpus(self.config.data),
            split=split,
            max_length=self.max_length,
            dtype=self.dtype,
            compute_dtype=self.compute_dtype,
            fusion=self.config.fusion,
            layers_apart=self.config.projection == "direct",
            weights=self.weights,
            config=self.config_digest,
            template=self.task.template,
            ids=part.ids,
            text_xxh3=part.text_xxh3,
        )
        found = self._find(wanted)
        cache = self._with_fusion_stored(found or self._extract(split), part.ids)
        if self.task.words:
            self._count_missing_words(cache, split, said=found is None)
        cache.check_on_read = self.config.check_states
        chosen = cache.provenance["chosen"]
        self.max_length, self.dtype, self.compute_dtype = (
            chosen["max_length"],
            chosen["dtype"],
            chosen["compute_dtype"],
        )
        if not self.on_this_machine:  # then this cache says what the model is, for all splits
            found = cache.provenance["found"]
            self.weights, self.config_digest = found["weights"], found["config"]
        return cache

    def _count_missing_words(self, cache: FeatureCache, split: str, *, said: bool) -> None:
        """Count the words that the cache has no states for, and say so unless that was ``said`` when it was made."""
        part = self.corpus.splits[split]
        index = cache.tokens().select(cache.positions(part.ids))
        max_length = int(cache.provenance["chosen"]["max_length"])
        texts = [example.texts[0] for example in part.examples]
        missing = missing_words(index, texts, max_length, self._tokenizer)
        self.words_without_states[split] = missing.total
        if missing.total and not said:
            self._note_once(
                f"{self.spec.name}'s cache of {self.task.name}/{split} has no states for "
                f"{count_text(missing.total, 'word')}: {missing.reasons(max_length, LENGTH_OPTION)}."
            )

    def _with_fusion_stored(self, cache: FeatureCache, ids: Sequence[str]) -> FeatureCache:
        """``cache``, or where a fixed fusion of it is too large for memory that fusion as a cache of its own, made now:
        averaging the layers anew in every call would read all of them each time.

        Args:
            ids: The sequences that are used.
        """
        fusion = parse_fusion(self.config.fusion, cache.model_layers)
        tokens = int(cache.n_tokens[cache.positions(ids)].sum(dtype=np.int64))
        if (
            not self.config.extract
            or fusion.trainable
            or len(fusion.layers) == 1
            or self.config.projection == "direct"
            or cache.fusion is not None
            or cache.dtype not in provenance.EXACT_DTYPES
            or not cache.complete.all()
            or 2 * len(ids) < len(cache)  # most of what was stored would be for nobody
            or fits_in_memory(tokens * cache.width * cache.states_dtype.itemsize)
        ):
            return cache
        plan = plan_fusion(cache, self.config.fusion, cache_dir=self.config.cache_dir)
        try:
            result = derive(plan)
        except (DiskSpaceError, ConfigError) as error:  # no room, or a folder that cannot be written
            note(f"{self.config.fusion} is not stored beside its layers: {error.message}")
            return cache
        if result.made:
            note(
                f"Stored {self.config.fusion} of {cache.folder.name}, which is too large for memory: "
                f"{bytes_text(result.bytes)} in {seconds_text(result.seconds)}, read from now on instead of "
                f"{bytes_text(cache.stored_bytes)}."
            )
        return FeatureCache.open(result.cache)

    def _find(self, wanted: provenance.Wanted) -> FeatureCache | None:
        """The cache that fits; None where one has to be made and may be."""
        split = wanted.split
        fits, stale, other = self._sort(wanted)
        if fits:
            return self._choose(fits)
        if stale:
            cache, differences = stale[0]
            raise CacheMismatchError(
                f"The cache of {wanted.resource} on {wanted.task}/{split} ({cache.folder}) was made from something "
                f"else: {'; '.join(difference.text for difference in differences)}.",
                self._remedy(split),
            )
        self._settle_length(wanted)
        unreadable = provenance.unreadable_of(self.config.cache_dir, self.task.name, split)
        other += [error.message for f, error in unreadable.items() if f.name.startswith(f"{wanted.resource}-")]
        none_fits = f"No cache of {wanted.resource} on {wanted.task}/{split} fits"
        detail = f" {'; '.join(other)}." if other else ""
        if not self.config.extract:
            raise CacheError(f"{none_fits}, and --no-extract was given.{detail}", self._remedy(split))
        if not self._has_source:
            raise CacheError(f"{none_fits}, and the folder of its model is not known.{detail}", self._remedy(split))
        if other:
            note(f"{none_fits}, so a new one is made.{detail}")
        return None

    def _settle_length(self, wanted: provenance.Wanted) -> None:
        """Where no length was asked for, that of the resource's other caches of the same sequences: the fusions of one
        ablation would not compare if one that needs another layer read longer texts.
        """
        if self.max_length is not None:
            return
        lengths = set()
        for cache in provenance.caches_of(self.config.cache_dir, self.task.name, wanted.split):
            chosen = cache.provenance["chosen"]
            same = (chosen["resource"], chosen["corpus"]) == (wanted.resource, wanted.corpus)
            if same and (cache.find(wanted.ids) >= 0).all():
                lengths.add(int(chosen["max_length"]))
        if len(lengths) == 1 and lengths != {DEFAULT_MAX_LENGTH}:
            (self.max_length,) = lengths
            note(
                f"{wanted.resource} is run with --resource-max-length {self.max_length}, the length of its caches of "
                f"{wanted.task}/{wanted.split}."
            )

    def _sort(
        self, wanted: provenance.Wanted
    ) -> tuple[list[FeatureCache], list[tuple[FeatureCache, list[provenance.Difference]]], list[str]]:
        """Caches that fit, those of the same names that went stale, and why others do not serve."""
        fits, stale, other = [], [], []
        for cache in provenance.caches_of(self.config.cache_dir, self.task.name, wanted.split):
            chosen = cache.provenance["chosen"]
            same_resource = chosen["resource"] == wanted.resource
            settings = provenance.chosen_differences(cache, wanted)
            if settings or not (same_resource or self.on_this_machine):
                if same_resource:
                    other.append(f"{cache.folder}: {', '.join(difference.text for difference in settings)}")
                continue
            index = self._index(wanted.split, int(chosen["max_length"]))
            differences = provenance.found_differences(cache, wanted, index)
            if not differences:
                if cache.complete[cache.find(wanted.ids)].all():
                    fits.append(cache)
                elif same_resource:
                    other.append(f"{cache.folder}: it is not complete")
            elif same_resource and chosen["corpus"] == wanted.corpus:
                # Examples that a cache lacks are no contradiction: it was made of fewer.
                if {difference.field for difference in differences} == {"examples"}:
                    other.append(f"{cache.folder}: {differences[0].text}")
                else:
                    stale.append((cache, differences))
        return fits, stale, other

    def _index(self, split: str, max_length: int) -> SequenceIndex | None:
        if self._tokenizer is None:
            return None
        return self.corpus.splits[split].index(self.spec, self._tokenizer, max_length)

    def _choose(self, fits: list[FeatureCache]) -> FeatureCache:
        """The fitting cache by the default settings, or the only kind there is."""
        if len({cache.provenance["found"]["weights"] for cache in fits}) > 1:
            listed = ", ".join(f"{c.folder} (digest {c.provenance['found']['weights'][:8]})" for c in fits)
            raise CacheError(
                f"Caches of {self.spec.name} were made with different weights: {listed}.",
                "Give --resource with the folder of the model that is meant, or move the other caches away.",
            )
        by_settings: dict[tuple[Any, ...], FeatureCache] = {}
        # The smallest first: fewer layers or one fusion read faster. Where storing a fusion rounds, layers are exacter.
        for cache in sorted(fits, key=lambda cache: (provenance.rounded_again(cache), cache.stored_bytes)):
            chosen = cache.provenance["chosen"]
            by_settings.setdefault((chosen["max_length"], chosen["dtype"], chosen["compute_dtype"]), cache)
        default = (DEFAULT_MAX_LENGTH, DEFAULT_DTYPE, DEFAULT_COMPUTE_DTYPE)
        if len(by_settings) == 1:
            return next(iter(by_settings.values()))
        if default in by_settings:
            return by_settings[default]
        kinds = "; ".join(
            f"max length {length}, {dtype}, computed in {compute}" for length, dtype, compute in by_settings
        )
        places = (LENGTH_OPTION, "dtype under [defaults] in kr2cache.toml", "compute-dtype under [defaults] there")
        differing = [place for place, *values in zip(places, *by_settings, strict=True) if len(set(values)) > 1]
        raise CacheError(
            f"Several caches of {self.spec.name} fit and differ: {kinds}.", f"Say which: {', '.join(differing)}."
        )

    def _extract(self, split: str) -> FeatureCache:
        plan = self._plan(split)
        describe(plan, LENGTH_OPTION)
        result = extract(plan)
        describe_result(result)
        self.computed += result.computed
        cache = FeatureCache.open(result.cache)
        if self.weights is not None and cache.provenance["found"]["weights"] != self.weights:
            raise CacheError(
                f"{result.cache} was extracted from other weights than those of {self.spec.name}.",
                "The model changed while it was read; run the same command again.",
            )
        return cache

    def _plan(self, split: str) -> ExtractPlan:
        config = ExtractConfig(
            resource=self.config.resource or self.spec.name,
            split=split,
            task=self.task.name,
            data=self.config.data,
            max_length=self.max_length or DEFAULT_MAX_LENGTH,
            dtype=self.dtype or DEFAULT_DTYPE,
            compute_dtype=self.compute_dtype or DEFAULT_COMPUTE_DTYPE,
            device=self.config.device,
            limit=self.config.limit,
            cache_dir=self.config.cache_dir,
            models=self.config.models,
        )
        try:
            return plan_extraction(config, self.corpus.splits[split].examples)
        except ConfigError as error:  # stage one calls the resource's length by the name that is the reader's here
            error.remedy = error.remedy.replace("--max-length", LENGTH_OPTION)
            raise

    def _remedy(self, split: str) -> str:
        if self._has_source:
            return f"Make one that fits:  {self._command(split)}"
        return f"Copy a cache that fits into {self.config.cache_dir}, or make one: give the model, --resource FOLDER."

    def _command(self, split: str) -> str:
        words = ["kr2cache", "extract", "--resource", self.config.resource or self.spec.name, "--split", split]
        words += ["--task", self.task.name]
        if self.config.data is not None:
            words += ["--data", self.config.data]
        for option, value in (
            ("--max-length", self.max_length),
            ("--dtype", self.dtype),
            ("--compute-dtype", self.compute_dtype),
        ):
            if value is not None:
                words += [option, str(value)]
        if self.config.cache_dir != default_cache_dir():
            words += ["--cache-dir", str(self.config.cache_dir)]
        if self.config.limit is not None:
            words += ["--limit", str(self.config.limit)]
        return shlex.join(words)
