"""Data and models that several trainings use and that are loaded once: corpus, tokens, tokenizers, checkpoints.

The cells of a sweep use one ``Shared``. So do a distillation and its teacher.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex, canonical_json, text_xxh3
from kr2cache.config import TrainConfig
from kr2cache.errors import DataError, MissingSplitError
from kr2cache.experiment.labels import check_labels
from kr2cache.models.encode import encode_examples
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import resource_config
from kr2cache.models.tokenizer_files import proven_files
from kr2cache.models.tokenizers import load_tokenizer, pad_id
from kr2cache.system.console import is_silent, note
from kr2cache.tasks import Example, Task
from kr2cache.training import admission
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.kreader import PROBLEM_TYPES

MAX_CHECKPOINTS = 3
"""Checkpoints in memory at the same time: the rows of a table train the reader, the resource and a student in turn."""
SAMPLE_EXAMPLES = 64
"""Training examples on which a saved tokenizer has to give the same tokens as before."""


class CorpusSplit:
    """One labelled split. It is tokenised once for each tokenizer and maximal length."""

    def __init__(self, task: Task, examples: list[Example]) -> None:
        self.task = task
        self.examples = examples
        self._indices: dict[tuple[str, int], SequenceIndex] = {}

    def index(self, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> SequenceIndex:
        """The tokens of its sequences, from the tokenizer of the model ``spec``."""
        key = (repr(spec), max_length)
        if key not in self._indices:
            self._indices[key] = encode_examples(tokenizer, self.examples, self.task, max_length)
        return self._indices[key]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids of its sequences."""
        return tuple(name for example in self.examples for name in example.sequence_ids)

    @cached_property
    def text_xxh3(self) -> NDArray[np.uint64]:
        """XXH3-64 of the texts of its sequences: (sequences,)"""
        return np.array([text_xxh3(text) for example in self.examples for text in example.texts], dtype=np.uint64)

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of the ids, texts and labels, as hex digits."""
        digest = xxhash.xxh3_128()
        for example in self.examples:
            digest.update(canonical_json([example.id, example.texts, example.label]).encode())
        return digest.hexdigest()


class Corpus:
    """The labelled splits of one data set."""

    def __init__(self, task: Task, config: TrainConfig) -> None:
        """
        Raises:
            DataError: For training examples without a label, or a split where only some examples have one, or a label
                that no reader can learn (``labels``).
            ConfigError: For a task that cannot be trained or scored (``labels``).
            MissingSplitError: If there is neither a labelled dev split nor a labelled test split.
        """
        labelled, self.notes = read_splits(task, config)
        self.notes += check_labels(task, labelled, whole=config.limit_of("train") is None)
        self.splits = {split: CorpusSplit(task, examples) for split, examples in labelled.items()}
        """``train``, and those of ``dev`` and ``test`` that have gold labels."""


class Shared:
    """Keeps what trainings load, for later trainings. Of corpora, only the last one is kept."""

    def __init__(self) -> None:
        self._corpus: tuple[tuple[Any, ...], Corpus | DataError] | None = None
        self._labelled: tuple[tuple[Any, ...], Task] | None = None
        self._tokenizers: dict[tuple[str, bool], PreTrainedTokenizerBase] = {}
        self._tokenizer_files: dict[tuple[str, bool], dict[str, bytes]] = {}
        self._resource_configs: dict[str, PretrainedConfig] = {}
        self._checkpoints: OrderedDict[tuple[Any, ...], TaskCheckpoint] = OrderedDict()
        self._earlier_heads: dict[tuple[Any, ...], tuple[str, ...]] = {}
        """``earlier_head`` of checkpoints that are no longer in memory."""
        self._admitted: set[tuple[Any, ...]] = set()
        self._noted: set[str] = set()

    def note_once(self, text: str) -> None:
        """Show a note, unless it was shown before."""
        if text not in self._noted and not is_silent():
            self._noted.add(text)
            note(text)

    def corpus(self, task: Task, config: TrainConfig) -> Corpus:
        """The labelled splits of the data of a training.

        Raises:
            DataError: As for ``Corpus``. A corpus that failed is not read again.
        """
        key = (task.name, config.data, config.limit, config.train_limit)
        if self._corpus is None or self._corpus[0] != key:
            self._corpus = None  # frees the memory of the last one first
            try:
                self._corpus = (key, Corpus(task, config))
            except DataError as error:
                self._corpus = (key, error)
        found = self._corpus[1]
        if isinstance(found, DataError):
            raise found
        return found

    def labelled(self, task: Task, data: str | None) -> Task:
        """The task with its labels known; errors as for ``Task.with_labels_of``."""
        key = (task.name, data)
        if self._labelled is None or self._labelled[0] != key:
            self._labelled = (key, task.with_labels_of(data))
        return self._labelled[1]

    def tokenizer(self, spec: ModelSpec, *, words: bool) -> PreTrainedTokenizerBase:
        """The model's tokenizer, from ``load_tokenizer``."""
        key = (repr(spec), words)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(spec, words=words)
        return self._tokenizers[key]

    def resource_config(self, spec: ModelSpec) -> PretrainedConfig:
        """The configuration of a resource. To find it, ``models.stack`` builds the model without its weights."""
        key = repr(spec)
        if key not in self._resource_configs:
            self._resource_configs[key] = resource_config(spec)
        return self._resource_configs[key]

    def tokenizer_files(self, checkpoint: TaskCheckpoint, task: Task, config: TrainConfig) -> dict[str, bytes]:
        """The files of a reader's tokenizer, by name, from ``proven_files``.

        Loaded from these files, the tokenizer gave the same tokens for the first training examples.

        Raises:
            UnsupportedModelError: If the saved tokenizer cannot be loaded again, or gives other tokens.
        """
        spec = checkpoint.spec
        key = (repr(spec), task.words)
        if key not in self._tokenizer_files:
            tokenizer = self.tokenizer(spec, words=task.words)
            sample = self.corpus(task, config).splits["train"].examples[:SAMPLE_EXAMPLES]

            def tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
                index = encode_examples(tokenizer, sample, task, config.max_length)
                segments = None if index.segment_id is None else index.segment_id.tolist()
                return index.input_id.tolist(), index.word_index.tolist(), segments, pad_id(tokenizer)

            before = tokens(tokenizer)
            self._tokenizer_files[key] = proven_files(
                tokenizer,
                checkpoint.task_config(),
                spec,
                config.models,
                words=task.words,
                same=lambda again: tokens(again) == before,
            )
        return self._tokenizer_files[key]

    def checkpoint(self, spec: ModelSpec, task: Task, *, keep_head: bool = False) -> TaskCheckpoint:
        """The checkpoint that a reader of ``task`` starts from; arguments as for ``TaskCheckpoint``."""
        problem_type = PROBLEM_TYPES.get(task.kind)
        key = (repr(spec), task.head, task.labels, problem_type, keep_head)
        found = self._checkpoints.pop(key, None)
        if found is None:
            found = TaskCheckpoint(spec, task.head, task.labels, problem_type=problem_type, keep_head=keep_head)
            found.earlier_head = self._earlier_heads.get(key, ())
        self._checkpoints[key] = found  # at the end of the order: used most recently
        if len(self._checkpoints) > MAX_CHECKPOINTS:
            gone, checkpoint = self._checkpoints.popitem(last=False)
            self._earlier_heads[gone] = checkpoint.earlier_head
        return found

    def check_reader(
        self, checkpoint: TaskCheckpoint, inputs: Mapping[str, Tensor] | None, *, positions: int | None
    ) -> None:
        """Check that a reader can be trained from this checkpoint. Each checkpoint is tried once.

        Args:
            inputs: A few examples of the task, as the inputs of ``KReader.forward``; None to try without examples.
            positions: Of the longest sequence's tokens and states; None if the training appends no states.

        Raises:
            KR2CacheError: If the checkpoint cannot be loaded, or fails a check of ``admission``.
        """
        spec, head = checkpoint.spec, checkpoint.head
        who = f"Reader {spec.name!r}"
        checks: dict[str | int, Callable[[PreTrainedModel], None]] = {}
        if inputs is not None:
            checks["plain"] = lambda model: admission.check_plain(model, head, inputs, checkpoint.outputs, who)
        if positions is not None:
            checks[positions] = lambda model: admission.check_appended(model, head, positions, who)
        keys = {
            name: (repr(spec), head, checkpoint.labels, checkpoint.problem_type, checkpoint.keep_head, name)
            for name in checks
        }
        if self._admitted.issuperset(keys.values()):
            return
        with torch.random.fork_rng(devices=[]):  # the random numbers of a training stay the same
            model = checkpoint.task_model()
        model.eval()  # type: ignore[no-untyped-call]
        for name, check in checks.items():
            check(model)
            self._admitted.add(keys[name])


def read_splits(task: Task, config: TrainConfig) -> tuple[dict[str, list[Example]], list[str]]:
    """The labelled splits, and notes about splits that are missing or have no labels."""
    notes = []
    labelled: dict[str, list[Example]] = {}
    for split in ("train", "dev", "test"):
        try:
            examples = task.read(split, config.data, config.limit_of(split))
        except MissingSplitError:
            if split == "train":
                raise
            notes.append(f"There is no {split} split.")
            continue
        unlabelled = [example.id for example in examples if example.label is None]
        if not unlabelled:
            labelled[split] = examples
        elif split != "train" and len(unlabelled) == len(examples):
            notes.append(f"The {split} split has no gold labels; it is not scored.")
        else:
            raise DataError(
                f"{len(unlabelled)} of {len(examples)} examples of the {split} split have no gold label (first: "
                f"{unlabelled[0]!r}).",
                f"Label them or remove them. {task.name} has the label in {task.labelled_by}.",
            )
    if notes and len(labelled) == 2:
        notes.append(f"The last epoch is scored on the {next(split for split in labelled if split != 'train')} split.")
    if len(labelled) == 1:
        raise MissingSplitError(
            f"{task.corpus(config.data)} has neither a dev nor a test split with labels: there is nothing to score on.",
            f"Add dev{task.suffixes[0]} or test{task.suffixes[0]}.",
        )
    return labelled, notes
