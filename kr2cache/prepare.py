"""What a training needs before its first seed: everything checked, splits read and tokenised, caches found or made.

The result knows what decides the outcome of a run, so the run's folder is known before anything is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kr2cache import models, provenance, runs
from kr2cache.cache.format import canonical_json
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import METHODS, PLAIN_METHODS, PROJECTIONS, TrainConfig, deciding_training
from kr2cache.digests import model_digests
from kr2cache.encode import check_token_ids, encode_examples
from kr2cache.errors import ConfigError, DataError, MissingSplitError, unknown_name
from kr2cache.features import ResourceFeatures
from kr2cache.fusion import check_fusion_name, parse_fusion
from kr2cache.kreader import check_admitted, projection_kind
from kr2cache.locks import check_writable
from kr2cache.resource import Resource
from kr2cache.tasks import Example, Task, find_task
from kr2cache.train import Job, SplitData, training_arguments

PROCEDURE = 1
"""Of training; raised when the same settings begin to mean something else, so that old runs are not taken for new."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One configuration, ready to train its seeds."""

    job: Job
    reader: models.ModelSpec
    """The model that is trained."""
    resource: Resource | None = None
    """The frozen one, and its caches by split."""
    caches: Mapping[str, FeatureCache] = field(default_factory=dict)
    deciding: dict[str, Any]
    """Everything that can change the result of a run, the seed aside. Device, folders and versions are left out."""
    notes: list[str]

    @property
    def folder(self) -> Path:
        """Of the runs, one folder a seed in it."""
        config = self.job.config
        parts = [config.method, self.reader.name]
        if config.method == "kr2":
            assert self.resource is not None, "kr2 has a resource"
            parts.append(self.resource.spec.name)
        if self.resource is not None:
            parts.append(config.fusion)
        if "teacher" in self.deciding:
            parts.append(self.deciding["teacher"]["name"])
        return runs.runs_folder(config.run_dir, self.job.task.name, parts, self.deciding)


def prepare(config: TrainConfig, examples: Mapping[str, list[Example]] | None = None) -> Prepared:
    """Check the settings, read and tokenise the splits, find the caches or make them.

    Args:
        examples: The labelled splits, where the caller has read them already.

    Raises:
        KR2CacheError: One of its kinds, for everything foreseen.
    """
    config, task = _checked(config)
    reader_spec, resource_spec = _models(config)
    training_arguments(config, config.run_dir, config.seeds[0])
    reader_config = models.load_config(reader_spec)
    if resource_spec is not None:
        check_admitted(reader_config, f"Reader {reader_spec.name!r}")
    _check_length(config, reader_spec, reader_config)
    check_writable(config.run_dir, "--run-dir")
    notes: list[str] = []
    if examples is None:
        examples, notes = read_splits(task, config)
    tokenizer = models.load_tokenizer(reader_spec, words=task.words)
    splits = {}
    for split, part in examples.items():
        index = encode_examples(tokenizer, part, task, config.max_length)
        check_token_ids(index, int(reader_config.vocab_size), repr(reader_spec.name))
        splits[split] = SplitData(examples=part, index=index)
    if resource_spec is not None:
        resource = Resource(config, resource_spec, task)
        job, caches = _with_features(config, task, reader_spec, tokenizer, splits, resource)
        deciding = _deciding(job) | _resource_decides(job, resource, caches)
        return Prepared(
            job=job,
            reader=reader_spec,
            resource=resource,
            caches=caches,
            deciding=deciding,
            notes=notes + resource.notes,
        )
    job = Job(task=task, reader=reader_spec, tokenizer=tokenizer, splits=splits, config=config)
    return Prepared(job=job, reader=reader_spec, deciding=_deciding(job), notes=notes)


def _checked(config: TrainConfig) -> tuple[TrainConfig, Task]:
    """The settings with what a method implies, and the task."""
    task = find_task(config.task)
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    if config.method == "kreader2":  # whatever resource was given or found: this one is the reader's own copy
        config = dataclasses.replace(config, resource=config.reader)
    if config.projection not in PROJECTIONS:
        raise unknown_name("projection", config.projection, PROJECTIONS)
    check_fusion_name(config.fusion)
    if config.method == "kd" and config.teacher is None:
        raise ConfigError(
            "Method kd needs --teacher.",
            f"A model that is fine-tuned first ({', '.join(models.known_models(config.models))}, a hub id, a folder), "
            "or the folder of a run (runs/…/seed-1).",
        )
    return config, task


def _models(config: TrainConfig) -> tuple[models.ModelSpec, models.ModelSpec | None]:
    """(the model that is trained, the frozen one)."""
    if config.method in ("kr2", "kresource") and config.resource is None:
        raise ConfigError(
            f"Method {config.method} needs --resource.", f"Registered: {', '.join(models.known_models(config.models))}."
        )
    if config.method == "kresource":
        return models.find_model(config.resource or "", config.models), None
    reader = models.find_model(config.reader, config.models)
    if config.method in ("kreader", "kd"):
        return reader, None
    return reader, reader if config.method == "kreader2" else models.find_model(config.resource or "", config.models)


def _check_length(config: TrainConfig, spec: models.ModelSpec, model_config: PretrainedConfig) -> None:
    longest = models.max_positions(model_config)
    if longest is not None and config.max_length > longest:
        raise ConfigError(
            f"A maximal length of {config.max_length} is more than {spec.name!r} has positions ({longest}).",
            f"Give --max-length {longest} or less.",
        )


def read_splits(task: Task, config: TrainConfig) -> tuple[dict[str, list[Example]], list[str]]:
    """train, and dev and test where they exist with gold labels; and what is to be said about the others."""
    notes = []
    splits = {"train": task.read("train", config.data, config.limit)}
    for split in ("dev", "test"):
        try:
            splits[split] = task.read(split, config.data, config.limit)
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
            f"{task.corpus(config.data)} has neither a dev nor a test split with labels: there is nothing to score on.",
            f"Add dev{task.suffixes[0]} or test{task.suffixes[0]}.",
        )
    return labelled, notes


def _with_features(
    config: TrainConfig,
    task: Task,
    reader_spec: models.ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, SplitData],
    resource: Resource,
) -> tuple[Job, dict[str, FeatureCache]]:
    """The job with the resource's states of every split."""
    reader_width = models.encoder_shape(models.load_config(reader_spec))[1]
    if resource.on_this_machine:
        # Nothing of this is needed yet; what is wrong shows before anything is extracted.
        model_layers, width = models.encoder_shape(models.load_config(resource.spec))
        parse_fusion(config.fusion, model_layers)
        projection_kind(config.projection, width, reader_width)
    caches = {split: resource.cache(split, data.examples) for split, data in splits.items()}
    fusion = parse_fusion(config.fusion, caches["train"].model_layers)
    width = caches["train"].width
    projection = projection_kind(config.projection, width, reader_width)
    with_states = {
        split: SplitData(
            examples=data.examples,
            index=data.index,
            features=ResourceFeatures(
                caches[split],
                [name for example in data.examples for name in example.sequence_ids],
                fusion,
                keep_layers=projection == "direct",
            ),
        )
        for split, data in splits.items()
    }
    job = Job(
        task=task,
        reader=reader_spec,
        tokenizer=tokenizer,
        splits=with_states,
        config=config,
        fusion=fusion,
        projection=projection,
        resource_width=width,
    )
    return job, caches


def _deciding(job: Job) -> dict[str, Any]:
    """What decides the result of every method."""
    config = job.config
    reader = model_digests(job.reader)
    return {
        "task": job.task.name,
        "metric": job.task.metric,
        # The plain methods differ in what their model is called, not in what is computed.
        "method": "plain" if config.method in PLAIN_METHODS else config.method,
        "data": {split: data_digest(data.examples) for split, data in job.splits.items()},
        "reader": {
            "name": job.reader.name,
            "weights": reader.weights,
            "config": reader.config_in_training,
            "tokens": {split: provenance.tokens_digest(data.index) for split, data in job.splits.items()},
            "segments": any(data.index.segment_id is not None for data in job.splits.values()),
            "max_length": config.max_length,
        },
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "training": deciding_training(config.training),
        "procedure": PROCEDURE,
    }


def _resource_decides(job: Job, resource: Resource, caches: Mapping[str, FeatureCache]) -> dict[str, Any]:
    """What decides beside that where there is a resource."""
    assert job.fusion is not None, "a resource comes with a fusion"
    chosen = caches["train"].provenance["chosen"]
    has_trainable_weights = job.fusion.trainable and job.projection != "direct"
    found = [cache.provenance["found"] for cache in caches.values()]
    rounded = sorted(split for split, cache in caches.items() if provenance.rounded_again(cache))
    return {
        "resource": {
            "name": resource.spec.name,
            "weights": sorted({one["weights"] for one in found}),
            "config": sorted({one["config"] for one in found}),
            "tokens": {split: _resource_tokens(cache, job.splits[split].examples) for split, cache in caches.items()},
            "segments": any(one.get("segments", False) for one in found),
            "max_length": chosen["max_length"],
            "dtype": chosen["dtype"],
            "compute_dtype": chosen["compute_dtype"],
            # Not quite the states that an extraction with these settings gives.
            **({"rounded_again": rounded} if rounded else {}),
        },
        "fusion": {"name": job.fusion.name, "layers": list(job.fusion.layers)},
        "projection": job.projection,
        "fusion_learning_rate": job.config.fusion_learning_rate if has_trainable_weights else None,
    }


def _resource_tokens(cache: FeatureCache, examples: Sequence[Example]) -> str:
    """Of the sequences that are used: that a cache holds more of them changes no result."""
    positions = cache.positions(name for example in examples for name in example.sequence_ids)
    return provenance.tokens_digest(cache.tokens().select(positions))


def data_digest(examples: Sequence[Example]) -> str:
    """XXH3-128 of ids, texts and labels."""
    digest = xxhash.xxh3_128()
    for example in examples:
        digest.update(canonical_json([example.id, example.texts, example.label]).encode())
    return digest.hexdigest()
