"""What trainings have in common and load once: a corpus and its tokens, tokenizers, the readers' checkpoints.

The cells of a sweep share one ``Shared``; so do the seeds of a call and the teacher of a distillation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex, canonical_json, text_xxh3
from kr2cache.config import TrainConfig
from kr2cache.errors import DataError, MissingSplitError
from kr2cache.models.encode import encode_examples
from kr2cache.models.registry import ModelSpec
from kr2cache.models.tokenizer_files import proven_files
from kr2cache.models.tokenizers import load_tokenizer, pad_id
from kr2cache.system.console import note
from kr2cache.tasks import Example, Task
from kr2cache.training import admission
from kr2cache.training.checkpoint import TaskCheckpoint

CHECKPOINTS = 3
"""Kept at most: a table's rows train the reader, the resource and a distilled one in turn."""
SAMPLE = 64
"""Examples on which a tokenizer that was loaded again has to give the same tokens."""


class CorpusSplit:
    """One labelled split, read once; tokenised once for each tokenizer and maximal length."""

    def __init__(self, task: Task, examples: list[Example]) -> None:
        self.task = task
        self.examples = examples
        self._indices: dict[tuple[str, int], SequenceIndex] = {}

    def index(self, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> SequenceIndex:
        """Its sequences by the tokenizer of ``spec``."""
        key = (repr(spec), max_length)
        if key not in self._indices:
            self._indices[key] = encode_examples(tokenizer, self.examples, self.task, max_length)
        return self._indices[key]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Of its sequences."""
        return tuple(name for example in self.examples for name in example.sequence_ids)

    @cached_property
    def text_xxh3(self) -> NDArray[np.uint64]:
        """(sequences,)"""
        return np.array([text_xxh3(text) for example in self.examples for text in example.texts], dtype=np.uint64)

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of ids, texts and labels."""
        digest = xxhash.xxh3_128()
        for example in self.examples:
            digest.update(canonical_json([example.id, example.texts, example.label]).encode())
        return digest.hexdigest()


class Corpus:
    """The labelled splits of one data set."""

    def __init__(self, task: Task, data: str | None, limit: int | None) -> None:
        """
        Raises:
            DataError: For training examples without a label, or a split that is labelled in part.
            MissingSplitError: If there is no labelled split to score on.
        """
        found, self.notes = read_splits(task, data, limit)
        self.splits = {split: CorpusSplit(task, examples) for split, examples in found.items()}
        """``train``, and ``dev`` and ``test`` where they have gold labels."""


class Shared:
    """Loaded once, given to every training that asks for the same. Of corpora the last one is kept."""

    def __init__(self) -> None:
        self._corpus: tuple[tuple[Any, ...], Corpus | DataError] | None = None
        self._tokenizers: dict[tuple[str, bool], PreTrainedTokenizerBase] = {}
        self._tokenizer_files: dict[tuple[str, bool], dict[str, bytes]] = {}
        self._checkpoints: OrderedDict[tuple[Any, ...], TaskCheckpoint] = OrderedDict()
        self._admitted: set[tuple[Any, ...]] = set()
        self._noted: set[str] = set()

    def note_once(self, text: str) -> None:
        """``console.note``, unless a training that shares this said the same."""
        if text not in self._noted:
            self._noted.add(text)
            note(text)

    def corpus(self, task: Task, data: str | None, limit: int | None) -> Corpus:
        """The labelled splits."""
        key = (task.name, data, limit)
        if self._corpus is None or self._corpus[0] != key:
            self._corpus = None  # two large ones need not be there at once
            try:
                self._corpus = (key, Corpus(task, data, limit))
            except DataError as error:  # the next cell of a sweep's column need not read all of it again
                self._corpus = (key, error)
        found = self._corpus[1]
        if isinstance(found, DataError):
            raise found
        return found

    def tokenizer(self, spec: ModelSpec, *, words: bool) -> PreTrainedTokenizerBase:
        """``load_tokenizer``"""
        key = (repr(spec), words)
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(spec, words=words)
        return self._tokenizers[key]

    def tokenizer_files(self, checkpoint: TaskCheckpoint, task: Task, config: TrainConfig) -> dict[str, bytes]:
        """``proven_files`` of a reader's tokenizer, proven on the first examples of the training split.

        Raises:
            UnsupportedModelError: If it cannot be saved so that it can be loaded again.
        """
        spec = checkpoint.spec
        key = (repr(spec), task.words)
        if key not in self._tokenizer_files:
            tokenizer = self.tokenizer(spec, words=task.words)
            sample = self.corpus(task, config.data, config.limit).splits["train"].examples[:SAMPLE]

            def tokens(of: PreTrainedTokenizerBase) -> tuple[Any, ...]:
                index = encode_examples(of, sample, task, config.max_length)
                segments = None if index.segment_id is None else index.segment_id.tolist()
                return index.input_id.tolist(), index.word_index.tolist(), segments, pad_id(of)

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

    def checkpoint(self, spec: ModelSpec, task: Task) -> TaskCheckpoint:
        """The checkpoint that a reader of ``task`` starts from."""
        key = (repr(spec), task.head, task.labels)
        found = self._checkpoints.pop(key, None) or TaskCheckpoint(spec, task.head, task.labels)
        self._checkpoints[key] = found  # last in order: the one used most recently
        while len(self._checkpoints) > CHECKPOINTS:
            self._checkpoints.popitem(last=False)
        return found

    def check_reader(self, checkpoint: TaskCheckpoint, inputs: Mapping[str, Tensor], *, appends: bool) -> None:
        """See that a reader can be trained from this checkpoint; the same one is tried once.

        Args:
            inputs: Of ``KReader.forward``, a few examples of the task.
            appends: Whether a resource's states will be appended.

        Raises:
            KR2CacheError: If it cannot be loaded, or does not pass the checks of ``admission``.
        """
        spec, head = checkpoint.spec, checkpoint.head
        key = (repr(spec), head, checkpoint.labels, appends)
        if key in self._admitted:
            return
        with torch.random.fork_rng(devices=[]):  # a training's own draws stay what they are
            model = checkpoint.task_model()
        model.eval()  # type: ignore[no-untyped-call]
        admission.check_plain(model, head, inputs, len(checkpoint.labels), f"Reader {spec.name!r}")
        if appends:
            admission.check_appended(model, head, f"Reader {spec.name!r}")
        self._admitted.add(key)


def read_splits(task: Task, data: str | None, limit: int | None) -> tuple[dict[str, list[Example]], list[str]]:
    """train, and dev and test where they exist with gold labels; and what is to be said about the others."""
    notes = []
    splits = {"train": task.read("train", data, limit)}
    for split in ("dev", "test"):
        try:
            splits[split] = task.read(split, data, limit)
        except MissingSplitError:
            notes.append(f"There is no {split} split.")
    unlabelled = {split: [e.id for e in part if e.label is None] for split, part in splits.items()}
    if unlabelled["train"]:
        raise DataError(
            f"{len(unlabelled['train'])} of {len(splits['train'])} training examples have no gold label (first: "
            f"{unlabelled['train'][0]!r}).",
            f"A reader is trained on labelled examples only; {task.name} has the label in {task.labelled_by}.",
        )
    labelled = {}
    for split, part in splits.items():
        if not unlabelled[split]:
            labelled[split] = part
        elif len(unlabelled[split]) == len(part):
            notes.append(f"The {split} split has no gold labels; it is not scored.")
        else:
            raise DataError(
                f"{len(unlabelled[split])} of {len(part)} examples of the {split} split have no gold label (first: "
                f"{unlabelled[split][0]!r}).",
                "Label them or take them out: a score over part of a split is not the split's.",
            )
    if notes and len(labelled) == 2:
        notes.append(f"The last epoch is scored, on {next(split for split in labelled if split != 'train')}.")
    if len(labelled) == 1:
        raise MissingSplitError(
            f"{task.corpus(data)} has neither a dev nor a test split with labels: there is nothing to score on.",
            f"Add dev{task.suffixes[0]} or test{task.suffixes[0]}.",
        )
    return labelled, notes
