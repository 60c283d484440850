"""The resource of a run: find its caches, or make them.

A run uses a cache that fits (``store.find``). If there is none, it is extracted. But if a cache of the same names was
made from other contents, an error says what changed.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.cache.pooling import pooled
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import (
    DEFAULT_COMPUTE_DTYPE,
    DEFAULT_DTYPE,
    DEFAULT_MAX_LENGTH,
    DEFAULT_POOL,
    DEFAULT_WEIGHTS_DTYPE,
    ExtractConfig,
    Pool,
    TrainConfig,
    default_cache_dir,
)
from kr2cache.errors import CacheError, CacheMismatchError, ConfigError
from kr2cache.experiment.checks import Training
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.stored_fusion import with_fusion_stored
from kr2cache.extraction import canaries
from kr2cache.extraction.extract import describe_result, extract, tried
from kr2cache.extraction.planning import ExtractPlan, check_disk, describe, plan_extraction
from kr2cache.extraction.rerun import plan_again
from kr2cache.models.digests import OpenedModel, known_digests, open_model
from kr2cache.models.encode import absent_words, missing_words
from kr2cache.models.files import local_folder
from kr2cache.models.registry import ModelSpec
from kr2cache.store.find import StoredCaches, Tokenise, Wanted, choose, common_weights_dtype, find_caches
from kr2cache.store.provenance import pool_of
from kr2cache.system.console import count_text, note, waiting
from kr2cache.tasks import Task

LENGTH_OPTION = "--resource-max-length"
"""The option of a training for the maximal length of the resource's sequences."""


def look_for_resources(training: Training, shared: Shared) -> dict[str, Resource]:
    """The resources of a training by their names, in the order in which their states are appended: each has found its
    caches or planned its extractions, and nothing is made. Of several, no model stays in memory.

    Args:
        training: With the labels of its task known.
        shared: What the trainings share.

    Raises:
        KR2CacheError: As for ``Resource.look``.
    """
    resources: dict[str, Resource] = {}
    for given, spec in training.resources.items():
        config = dataclasses.replace(training.config, resource=given, more_resources=())
        resources[spec.name] = resource = Resource(config, spec, training.task, shared)
        resource.look(resource.corpus.splits)
        if len(training.resources) > 1:
            resource.release_model()
    check_disk(*(plan for resource in resources.values() for plan in resource.plans))
    return resources


class Resource:
    """The resource of a run: its caches by split, found or made."""

    def __init__(self, config: TrainConfig, spec: ModelSpec, task: Task, shared: Shared) -> None:
        self.corpus = shared.corpus(task, config)
        self.config = config
        self.spec = spec
        self.task = task
        self.computed = 0
        self.notes: list[str] = []
        self.words_without_states: dict[str, set[tuple[int, int]]] = {}
        """By split, for a task on words: the words that have no states in the cache, as numbers of example and word."""
        self.on_this_machine = local_folder(spec) is not None
        self.weights: str | None = None
        self.config_digest: str | None = None
        # Settings of the caches. If the run does not give one, the cache of the train split decides it for all splits.
        self.max_length = config.resource_max_length
        self.dtype = config.dtype
        self.compute_dtype = config.compute_dtype
        self.pool = config.pool
        # The weights are hashed as they run, so this is settled before caches are compared.
        self._shared, self._note_once = shared, shared.note_once
        self.weights_dtype = config.weights_dtype or self._weights_dtype_of_caches()
        self._looked: dict[str, FeatureCache | ExtractPlan] = {}
        """What ``look`` found, by split."""
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model: OpenedModel | None = None
        if self.on_this_machine:
            self._know_model()
        else:
            where = "are not on this machine" if self._has_source else "are in no known folder"
            self.notes.append(f"The weights of {spec.name} {where}: its caches are used without comparing them.")

    def _know_model(self) -> None:
        """Take digests and tokenizer from the model. CacheMismatchError if a cache accepted before is of another."""
        with waiting(f"Reading the weights of {self.spec.name}"):
            digests = known_digests(self.spec, self.weights_dtype) or self._opened_model().digests
            self._tokenizer = self._shared.tokenizer(self.spec, words=self.task.words)
        before = self.weights, self.config_digest
        self.on_this_machine, self.weights, self.config_digest = True, digests.weights, digests.config
        if None not in before and before != (self.weights, self.config_digest):
            raise CacheMismatchError(
                f"{self.spec.name} was downloaded now. The model that its caches were made from is another one.",
                "Run the same command again: it says which caches differ.",
            )

    @property
    def _has_source(self) -> bool:
        """Whether it is known where to get the model. It is not if only caches name it."""
        return (self.spec.path or self.spec.package or self.spec.hub_id) is not None

    def _weights_dtype_of_caches(self) -> str:
        name, task = self.spec.name, self.task.name
        common, own = common_weights_dtype(self.config.cache_dir, task, name, self.task.corpus(self.config.data))
        if common not in (None, DEFAULT_WEIGHTS_DTYPE) and not own:
            self._note_once(f"{name} runs with --weights-dtype {common}, as in its caches of other data of {task}.")
        return common or DEFAULT_WEIGHTS_DTYPE

    def look(self, splits: Iterable[str]) -> None:
        """Find the cache of each split, or plan its extraction and try the model on it: all checks, before anything is
        made.

        Raises:
            CacheMismatchError: If a cache of the same names was made from other contents.
            CacheError: If no cache fits and ``--no-extract`` was given, or several fit and differ.
            KR2CacheError: If a split cannot be extracted, the model cannot serve, or the disk has no room for all its
                new caches.
        """
        for split in splits:
            self._looked[split] = self._cache_or_plan(split)
        check_disk(*self.plans)
        for split, found in self._looked.items():
            if isinstance(found, ExtractPlan):
                with waiting(f"Trying {self.spec.name}"):
                    self._looked[split] = tried(found, self._opened_model())

    def caches(self, splits: Iterable[str]) -> dict[str, FeatureCache]:
        """For each split, the cache that fits, or a new one; errors as for ``look``."""
        try:
            if not self._looked:
                self.look(splits)
            return {split: self._cache(split) for split in splits}
        finally:
            self.release_model()

    @property
    def plans(self) -> list[ExtractPlan]:
        """The extractions that ``look`` planned."""
        return [one for one in self._looked.values() if isinstance(one, ExtractPlan)]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, width) of the model; known once ``look`` has found its caches."""
        first = next(iter(self._looked.values()))
        return first.model_layers, first.width

    @property
    def positions(self) -> int:
        """The largest number of states of a sequence; known once ``look`` has settled it."""
        return 1 if self.pool == "sequence" else self.max_length or DEFAULT_MAX_LENGTH

    def release_model(self) -> None:
        """Free the memory of the model: a training needs it, or the next resource."""
        self._model = None

    def _opened_model(self) -> OpenedModel:
        """The model, loaded and hashed once for the extractions of all splits."""
        if self._model is None:
            self._model = open_model(self.spec, self.weights_dtype, self.config.device_map)
        return self._model

    def _cache_or_plan(self, split: str) -> FeatureCache | ExtractPlan:
        part = self.corpus.splits[split]
        wanted = Wanted(
            resource=self.spec.name,
            task=self.task.name,
            corpus=self.task.corpus(self.config.data),
            split=split,
            max_length=self.max_length,
            dtype=self.dtype,
            compute_dtype=self.compute_dtype,
            weights_dtype=self.weights_dtype,
            pool=self.pool,
            fusion=self.config.fusion,
            layers_apart=self.config.projection == "direct",
            weights=self.weights,
            config=self.config_digest,
            template=self.task.template,
            ids=part.ids,
            text_xxh3=part.text_xxh3,
        )
        found = self._find(wanted)
        if found is None:
            plan = self._plan(split)
            if not self.on_this_machine:  # planning downloaded it
                self._know_model()
            self.max_length, self.dtype = plan.config.max_length, plan.config.dtype
            self.compute_dtype, self.pool = plan.config.compute_dtype, plan.config.pool
            return plan
        self._compare_with_model(found, split)
        chosen, made_from = found.provenance["chosen"], found.provenance["found"]
        self.max_length, self.dtype = chosen["max_length"], chosen["dtype"]
        self.compute_dtype, self.pool = chosen["compute_dtype"], pool_of(found.provenance)
        if not self.on_this_machine:  # the caches of the other splits have to be of the same model
            self.weights, self.config_digest = made_from["weights"], made_from["config"]
        return found

    def _cache(self, split: str) -> FeatureCache:
        looked = self._looked[split]
        planned = isinstance(looked, ExtractPlan)
        cache = self._extract(looked) if isinstance(looked, ExtractPlan) else looked
        cache = with_fusion_stored(cache, self.corpus.splits[split].ids, self.config)
        if self.task.words:
            self._count_missing_words(cache, split, noted=planned)
        cache.check_on_read = self.config.check_states
        return cache

    def _compare_with_model(self, cache: FeatureCache, split: str) -> None:
        """Run a few sequences of a cache again if other versions of torch or transformers made it.

        Raises:
            CacheMismatchError: If the model gives other states now.
        """
        if not canaries.made_with_others(cache.provenance):
            return
        if (tokenizer := self._tokenizer) is None:
            self._note_once(
                f"{cache.folder.name} was made with {canaries.made_with(cache.provenance)}. Without the weights of "
                f"{self.spec.name} it is not known whether {canaries.running()} give the same states."
            )
            return
        part = self.corpus.splits[split]
        index = part.index(self.spec, tokenizer, int(cache.provenance["chosen"]["max_length"]))

        def load(index: SequenceIndex) -> tuple[ExtractPlan, PreTrainedModel]:
            config = self.config
            plan = plan_again(
                cache,
                cache.folder,
                index,
                self.spec,
                tokenizer,
                device=config.device,
                device_map=config.device_map,
                models=config.models,
            )
            return plan, self._opened_model().encoder

        canaries.check_once(cache, index, cache.positions(part.ids), load)

    def _count_missing_words(self, cache: FeatureCache, split: str, *, noted: bool) -> None:
        """Count the words that have no states in the cache, and show a note unless the extraction ``noted`` it."""
        part = self.corpus.splits[split]
        max_length = int(cache.provenance["chosen"]["max_length"])
        if pool_of(cache.provenance) == DEFAULT_POOL:
            index = cache.tokens().select(cache.positions(part.ids))
        elif self._tokenizer is not None:  # a pooled cache does not have all tokens
            index = part.index(self.spec, self._tokenizer, max_length)
        else:
            return
        texts = [example.texts[0] for example in part.examples]
        missing = missing_words(index, texts, max_length, self._tokenizer)
        self.words_without_states[split] = {(i, word) for i, words, _ in absent_words(index, texts) for word in words}
        if missing.total and not noted:
            self._note_once(
                f"{self.spec.name}'s cache of {self.task.name}/{split} has no states for "
                f"{count_text(missing.total, 'word')}: {missing.reasons(max_length, LENGTH_OPTION)}."
            )

    def _find(self, wanted: Wanted) -> FeatureCache | None:
        """The cache that fits, or None if the caller may make one."""
        split = wanted.split
        found = find_caches(self.config.cache_dir, wanted, self._tokenise(split))
        if found.fitting:
            return choose(found.fitting, self.spec.name, LENGTH_OPTION)
        if found.stale:
            cache, differences = found.stale[0]
            raise CacheMismatchError(
                f"The cache of {wanted.resource} on {wanted.task}/{split} ({cache.folder}) was made from something "
                f"else: {'; '.join(difference.text for difference in differences)}.",
                self._remedy(split),
            )
        self._settle_length(found)
        none_fits = f"No cache of {wanted.resource} on {wanted.task}/{split} fits"
        reasons = f" {'; '.join(found.reasons)}." if found.reasons else ""
        if not self.config.extract:
            raise CacheError(f"{none_fits}, and --no-extract was given.{reasons}", self._remedy(split))
        if not self._has_source:
            raise CacheError(f"{none_fits}, and the folder of its model is not known.{reasons}", self._remedy(split))
        if reasons:
            note(f"{none_fits}, so a new one is made.{reasons}")
        return None

    def _tokenise(self, split: str) -> Tokenise | None:
        """The sequences of a split, as a cache has them; None if the model is not on this machine."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return None

        def tokenise(max_length: int, pool: Pool) -> SequenceIndex:
            index = self.corpus.splits[split].index(self.spec, tokenizer, max_length)
            return index if pool == DEFAULT_POOL else pooled(index, pool).stored

        return tokenise

    def _settle_length(self, found: StoredCaches) -> None:
        """If no maximal length was given, take the one of the resource's other caches of the same sequences. Otherwise
        two fusions of one ablation could read texts of different lengths, because one needs another layer.
        """
        length = found.common_length() if self.max_length is None else None
        if length not in (None, DEFAULT_MAX_LENGTH):
            self.max_length = length
            note(
                f"{found.wanted.resource} runs with --resource-max-length {length}, the length of its caches of "
                f"{found.wanted.task}/{found.wanted.split}."
            )

    def _extract(self, plan: ExtractPlan) -> FeatureCache:
        describe(plan, LENGTH_OPTION)
        with waiting(f"Loading {self.spec.name}"):
            model = self._opened_model()
        result = extract(plan, model)
        describe_result(result)
        self.computed += result.computed
        cache = FeatureCache.open(result.cache)
        made = cache.provenance["found"]
        if self.weights is not None and (made["weights"], made["config"]) != (self.weights, self.config_digest):
            raise CacheError(
                f"{result.cache} was extracted from another model than {self.spec.name} was before.",
                "The model changed during this command. Run the same command again.",
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
            weights_dtype=self.weights_dtype,  # type: ignore[arg-type]  # checked, or from a cache
            pool=self.pool or DEFAULT_POOL,
            device=self.config.device,
            device_map=self.config.device_map,
            limit=self.config.limit_of(split),
            cache_dir=self.config.cache_dir,
            models=self.config.models,
            tasks=self.config.tasks,
        )
        try:
            return plan_extraction(config, self.corpus.splits[split].examples)
        except ConfigError as error:  # in a training, --max-length is the reader's
            error.remedy = error.remedy.replace("--max-length", LENGTH_OPTION)
            raise

    def _remedy(self, split: str) -> str:
        if self._has_source:
            return f"Make one that fits:  {self._command(split)}"
        return f"Copy a cache that fits into {self.config.cache_dir}, or give the model to make one: --resource FOLDER."

    def _command(self, split: str) -> str:
        words = ["kr2cache", "extract", "--resource", self.config.resource or self.spec.name, "--split", split]
        for option, value in (
            ("--task", self.task.name),
            ("--data", self.config.data),
            ("--max-length", self.max_length),
            ("--dtype", self.dtype),
            ("--compute-dtype", self.compute_dtype),
            ("--weights-dtype", None if self.weights_dtype == DEFAULT_WEIGHTS_DTYPE else self.weights_dtype),
            ("--pool", None if self.pool == DEFAULT_POOL else self.pool),
            ("--device-map", self.config.device_map),
            ("--cache-dir", None if self.config.cache_dir == default_cache_dir() else self.config.cache_dir),
            ("--limit", self.config.limit_of(split)),
        ):
            if value is not None:
                words += [option, str(value)]
        return shlex.join(words)
