"""Check the settings, the models' files and the data of a training before long work starts. No weights are loaded.

A training runs these checks first; a sweep runs them for all its trainings before the first one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kr2cache.config import TrainConfig
from kr2cache.experiment.checks import Training, check_training, named_in_errors
from kr2cache.experiment.rehearsal import rehearse
from kr2cache.experiment.shared import Corpus, Shared
from kr2cache.extraction.planning import check_length
from kr2cache.fusion import parse_fusion
from kr2cache.models.configuration import encoder_shape
from kr2cache.models.files import check_complete, local_folder
from kr2cache.models.registry import ModelSpec
from kr2cache.models.words import check_tells_words
from kr2cache.store.stored import has_caches
from kr2cache.system.console import waiting
from kr2cache.system.disk import check_writable
from kr2cache.training.arguments import training_arguments
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.resource_input import projection_kind


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A training that passed all checks: its settings make sense, and its models and data exist and fit each other."""

    training: Training
    checkpoint: TaskCheckpoint
    """The reader's checkpoint."""
    tokenizer: PreTrainedTokenizerBase
    """The reader's tokenizer."""
    tokenizer_files: Mapping[str, bytes]
    """The tokenizer's files, by name, as a run stores them; empty if no reader is kept."""
    corpus: Corpus


def check_ready(config: TrainConfig, shared: Shared) -> Ready:
    """Check the settings, open the models' configurations and tokenizers, read the data.

    Args:
        shared: Has what earlier trainings loaded, and keeps what is loaded now.

    Raises:
        KR2CacheError: If a check fails.
    """
    training = check_training(config)
    config = training.config
    training_arguments(config, config.run_dir, config.seeds[0])
    check_writable(config.run_dir, "--run-dir")
    training = labelled(training, shared)
    checkpoint, tokenizer = open_models(training, shared)
    corpus = read_corpus(training, shared)
    rehearse(config, len(corpus.splits["train"].examples))
    return Ready(
        training=training,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        tokenizer_files=shared.tokenizer_files(checkpoint, training.task, config) if config.keep_readers else {},
        corpus=corpus,
    )


def labelled(training: Training, shared: Shared) -> Training:
    """The training with the labels of its task known. They may come from the train split.

    Raises:
        DataError: If they have to be read, and the train split is missing or malformed.
    """
    with waiting(f"Reading the labels of {training.task.name}"):
        task = shared.labelled(training.task, training.config.data)
    return dataclasses.replace(training, task=task)


def read_corpus(training: Training, shared: Shared) -> Corpus:
    """Read the data of a training.

    Raises:
        DataError: If the data is missing or malformed.
    """
    with waiting(f"Reading {training.task.name}"):
        return shared.corpus(training.task, training.config)


def open_models(training: Training, shared: Shared) -> tuple[TaskCheckpoint, PreTrainedTokenizerBase]:
    """Check that the models exist and fit the settings, and return the reader's checkpoint and tokenizer.

    Raises:
        KR2CacheError: For a model that is not available or does not fit.
    """
    config, reader = training.config, training.reader
    with waiting(f"Loading {reader.name}"):
        checkpoint = shared.checkpoint(reader, training.task, keep_head=config.keep_head)
    check_complete(reader)
    check_length(config.max_length, "--max-length", reader, checkpoint.config)
    tokenizer = shared.tokenizer(reader, words=training.task.words)
    for resource in training.resources.values():
        _check_resource(training, resource, checkpoint.config, shared)
    return checkpoint, tokenizer


def _check_resource(training: Training, spec: ModelSpec, reader_config: PretrainedConfig, shared: Shared) -> None:
    """Check the resource's files and sizes, unless only its caches are used."""
    config = training.config
    if local_folder(spec) is None and (has_caches(config.cache_dir, config.task, spec.name) or not config.extract):
        return
    model_config = shared.resource_config(spec)
    check_complete(spec)
    layers, width = encoder_shape(model_config)
    with named_in_errors(spec, several=len(training.resources) > 1):
        parse_fusion(config.fusion, layers)
        projection_kind(config.projection, width, encoder_shape(reader_config)[1])
    if config.resource_max_length is not None:
        check_length(config.resource_max_length, "--resource-max-length", spec, model_config)
    tokenizer = shared.tokenizer(spec, words=training.task.words)
    if config.pool == "word" and not training.task.words:
        check_tells_words(tokenizer, f"The tokenizer of {spec.name!r}")
