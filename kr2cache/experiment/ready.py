"""What is checked of a training before anything long starts: settings, models' files, data. No weights are loaded.

A training checks itself; a sweep checks all of its trainings before the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError
from kr2cache.experiment.checks import Training, check_training
from kr2cache.experiment.rehearsal import rehearse
from kr2cache.experiment.shared import Corpus, Shared
from kr2cache.fusion import parse_fusion
from kr2cache.models.files import check_complete, local_folder
from kr2cache.models.load import encoder_shape, load_config, max_positions
from kr2cache.models.registry import ModelSpec
from kr2cache.store.stored import has_caches
from kr2cache.system.console import waiting
from kr2cache.system.locks import check_writable
from kr2cache.training.arguments import training_arguments
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.kreader import check_admitted, projection_kind


@dataclass(frozen=True, kw_only=True)
class Ready:
    """One training whose settings make sense, and whose models and data are there and fit each other."""

    training: Training
    checkpoint: TaskCheckpoint
    """Of the reader."""
    tokenizer: PreTrainedTokenizerBase
    """Of the reader."""
    tokenizer_files: Mapping[str, bytes]
    """Its files as a run keeps them; empty where no reader is kept."""
    corpus: Corpus


def check_ready(config: TrainConfig, shared: Shared) -> Ready:
    """Check the settings, open the models' configurations and tokenizers, read the data.

    Args:
        shared: Gives what was loaded before, and keeps what is loaded now.

    Raises:
        KR2CacheError: One of its kinds, for everything foreseen.
    """
    training = check_training(config)
    config, task = training.config, training.task
    training_arguments(config, config.run_dir, config.seeds[0])
    check_writable(config.run_dir, "--run-dir")
    checkpoint, tokenizer = open_models(training, shared)
    corpus = read_corpus(training, shared)
    rehearse(config, len(corpus.splits["train"].examples))
    return Ready(
        training=training,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        tokenizer_files=shared.tokenizer_files(checkpoint, task, config) if config.keep_readers else {},
        corpus=corpus,
    )


def read_corpus(training: Training, shared: Shared) -> Corpus:
    """The data of a training.

    Raises:
        DataError: If it is not there, or malformed.
    """
    with waiting(f"Reading {training.task.name}"):
        return shared.corpus(training.task, training.config.data, training.config.limit)


def open_models(training: Training, shared: Shared) -> tuple[TaskCheckpoint, PreTrainedTokenizerBase]:
    """The reader's checkpoint and tokenizer, after it was seen that both models are there and fit the settings.

    Raises:
        KR2CacheError: For a model that cannot be had, or does not fit.
    """
    config, reader, resource = training.config, training.reader, training.resource
    with waiting(f"Loading {reader.name}"):
        checkpoint = shared.checkpoint(reader, training.task)
    check_complete(reader)
    if resource is not None:
        check_admitted(checkpoint.config, f"Reader {reader.name!r}")
    _check_length(config.max_length, "--max-length", reader, checkpoint.config)
    tokenizer = shared.tokenizer(reader, words=training.task.words)
    if resource is not None:
        _check_resource(training, resource, checkpoint.config, shared)
    return checkpoint, tokenizer


def _check_length(length: int, option: str, spec: ModelSpec, model_config: PretrainedConfig) -> None:
    longest = max_positions(model_config)
    if longest is not None and length > longest:
        raise ConfigError(
            f"A maximal length of {length} is more than {spec.name!r} has positions ({longest}).",
            f"Give {option} {longest} or less.",
        )


def _check_resource(training: Training, spec: ModelSpec, reader_config: PretrainedConfig, shared: Shared) -> None:
    config = training.config
    if local_folder(spec) is None and (has_caches(config.cache_dir, config.task, spec.name) or not config.extract):
        return
    model_config = load_config(spec)
    check_complete(spec)
    layers, width = encoder_shape(model_config)
    parse_fusion(config.fusion, layers)
    projection_kind(config.projection, width, encoder_shape(reader_config)[1])
    if config.resource_max_length is not None:
        _check_length(config.resource_max_length, "--resource-max-length", spec, model_config)
    shared.tokenizer(spec, words=training.task.words)
