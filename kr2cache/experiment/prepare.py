"""Prepare a training: check the settings, read and tokenise the splits, find or make the caches.

The result has everything that decides the scores of a run, so the folder of the run is known before training starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kr2cache.cache.reader import FeatureCache
from kr2cache.config import DEFAULT_POOL, DEFAULT_WEIGHTS_DTYPE, TrainConfig
from kr2cache.experiment.checks import named_in_errors
from kr2cache.experiment.ready import check_ready
from kr2cache.experiment.resource import Resource, look_for_resources
from kr2cache.experiment.shared import Corpus, Shared
from kr2cache.extraction.planning import new_bytes
from kr2cache.fusion import parse_fusion
from kr2cache.methods import METHODS
from kr2cache.models import registry
from kr2cache.models.configuration import encoder_shape, vocabulary
from kr2cache.models.digests import model_digests
from kr2cache.models.encode import check_token_ids, missing_words
from kr2cache.store import provenance
from kr2cache.system.console import bytes_text, count_text, waiting
from kr2cache.system.device import choose_device, device_name
from kr2cache.system.disk import check_room, on_one_disk
from kr2cache.training.arguments import deciding_training
from kr2cache.training.batches import Batcher, SplitData
from kr2cache.training.features import DeviceFeatures, Features, ResourceFeatures, joined, room_on
from kr2cache.training.resource_input import InputSettings, projection_kind
from kr2cache.training.runs import configuration_folder
from kr2cache.training.train import Job

PROCEDURE = 4
"""Number of the procedure of training and scoring. Raise it if the same settings give other results than before: then
runs made before are not used. 3: F1 takes the whole tag for a chunk's type, as XTREME's does (``records.WHOLE_TAGS``).
F1 chooses the epoch of a tagger, so its weights and its word accuracy can differ as well. 4: the resource's states
stand right behind each sequence's own tokens, before the padding, so logits differ by rounding."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One configuration, ready to train its seeds."""

    job: Job
    resources: Mapping[str, Resource] = field(default_factory=dict)
    """The frozen models by their names, in the order in which their states are appended."""
    caches: Mapping[str, Mapping[str, FeatureCache]] = field(default_factory=dict)
    """Of each resource by its name: split to cache."""
    deciding: dict[str, Any]
    """Everything that can change the result of a run, the seed aside. Device, folders and versions are left out."""
    notes: list[str]
    distillation: Mapping[str, Any] | None = None
    """Facts about the teacher's logits, recorded with a run; None without a teacher."""

    @property
    def folder(self) -> Path:
        """The folder of the runs. Each seed has a folder in it."""
        return self.folder_of(self.job.config.method)

    def folder_of(self, method: str) -> Path:
        """The folder that the same training has under the name of ``method``."""
        config = self.job.config
        parts = [method, self.job.reader.name]
        if self.resources:
            if METHODS[method].frozen == "resource":
                parts.append("+".join(self.resources))
            parts.append(config.fusion)
        if "teacher" in self.deciding:
            parts.append(self.deciding["teacher"]["name"])
        return configuration_folder(config.run_dir, self.job.task.name, parts, self.deciding)

    def config_of(self, seed: int) -> dict[str, Any]:
        """Everything that decides the scores of one run, as its config.json has it."""
        return {**self.deciding, "method": self.job.config.method, "seed": seed}

    @property
    def words_without_states(self) -> dict[str, int]:
        """By split. With several resources: how many words lack the states of at least one of them."""
        lacking: dict[str, set[tuple[int, int]]] = {}
        for resource in self.resources.values():
            for split, words in resource.words_without_states.items():
                lacking.setdefault(split, set()).update(words)
        return {split: len(words) for split, words in lacking.items()}

    def recorded(self) -> dict[str, Any]:
        """Facts that are recorded with a run and do not decide its folder."""
        job = self.job
        origin = {"reader": registry.origin(job.reader)}
        origins = [registry.origin(resource.spec) for resource in self.resources.values()]
        origin |= dict(zip(_PLACES, _first_and_more(origins), strict=False))
        recorded = provenance.recorded(str(choose_device(job.config.device)), torch.get_num_threads(), origin)
        task = job.task
        recorded["task"] = {"kind": task.kind, "labels": list(task.labels), "counts": dict(task.counts)}
        recorded["corpus"] = job.task.corpus(job.config.data)
        recorded["limit"], recorded["train_limit"] = job.config.limit, job.config.train_limit
        recorded["temporary_reader"] = job.config.temporary_readers
        recorded["examples"] = {split: len(data.examples) for split, data in job.splits.items()}
        caches = {
            split if number == 0 else f"{split}, {name}": cache
            for number, (name, own) in enumerate(self.caches.items())
            for split, cache in own.items()
        }
        recorded["caches"] = {
            name: {"folder": str(cache.folder), "fingerprint": cache.fingerprint, "sequences": len(cache)}
            for name, cache in caches.items()
        }
        if self.resources:
            recorded["words_without_states"] = self.words_without_states
        recorded["cache_bytes"] = {name: cache.stored_bytes for name, cache in caches.items()}
        if self.distillation is not None:
            recorded["distillation"] = self.distillation
        return recorded


def prepare(config: TrainConfig, shared: Shared) -> Prepared:
    """Check the settings, read and tokenise the splits, find the caches or make them.

    Args:
        shared: Keeps what is loaded, for later trainings.

    Raises:
        KR2CacheError: One of its kinds, for everything foreseen.
    """
    ready = check_ready(config, shared)
    config, task, checkpoint = ready.training.config, ready.training.task, ready.checkpoint
    reader_spec = ready.training.reader
    splits = {}
    with waiting(f"Tokenising {task.name}"):
        for split, part in ready.corpus.splits.items():
            index = part.index(reader_spec, ready.tokenizer, config.max_length)
            check_token_ids(index, vocabulary(checkpoint.config), repr(reader_spec.name))
            splits[split] = SplitData(examples=part.examples, index=index)
    job = Job(
        task=task,
        checkpoint=checkpoint,
        tokenizer=ready.tokenizer,
        tokenizer_files=ready.tokenizer_files,
        splits=splits,
        config=config,
    )
    first = Batcher(splits["train"], task, ready.tokenizer).inputs(range(min(2, len(splits["train"].examples))))
    with waiting(f"Trying {reader_spec.name} on two examples"):
        shared.check_reader(checkpoint, first, positions=ready.training.positions)
    notes = ready.corpus.notes + _unseen_words(job)
    if (said := checkpoint.head_note) is not None:
        notes.append(said)
    resources = look_for_resources(ready.training, shared)
    if resources:  # the caches found may hold longer texts than a new one
        longest = sum(resource.positions for resource in resources.values())
        shared.check_reader(checkpoint, None, positions=config.max_length + longest)
    job = dataclasses.replace(job, inputs=_inputs(job, resources))
    _check_room(job, resources)
    caches = {name: resource.caches(splits) for name, resource in resources.items()}
    job = _with_features(job, resources, caches)
    return Prepared(
        job=job,
        resources=resources,
        caches=caches,
        deciding=_deciding(job, ready.corpus) | _resources_decide(job, resources, caches),
        notes=[*notes, *(text for resource in resources.values() for text in resource.notes)],
    )


def _unseen_words(job: Job) -> list[str]:
    """One note for each split with words that the reader has no token for."""
    if not job.task.words:
        return []
    notes = []
    for split, data in job.splits.items():
        texts = [example.texts[0] for example in data.examples]
        missing = missing_words(data.index, texts, job.config.max_length, job.tokenizer)
        if missing.total:
            wrong = "" if split == "train" else "; they count as wrong"
            notes.append(
                f"The reader does not see {count_text(missing.total, 'word')} of the {split} split{wrong}: "
                f"{missing.reasons(job.config.max_length, '--max-length')}."
            )
    return notes


def _inputs(job: Job, resources: Mapping[str, Resource]) -> dict[str, InputSettings]:
    """What the reader does with the states of each resource.

    Raises:
        ConfigError: If fusion or projection do not fit a resource.
    """
    config = job.config
    _, reader_width = encoder_shape(job.checkpoint.config)
    inputs = {}
    for name, resource in resources.items():
        layers, width = resource.shape
        with named_in_errors(resource.spec, several=len(resources) > 1):
            inputs[name] = InputSettings(
                fusion=parse_fusion(config.fusion, layers),
                projection=projection_kind(config.projection, width, reader_width),
                resource_width=width,
            )
    return inputs


def _check_room(job: Job, resources: Mapping[str, Resource]) -> None:
    """If caches are to be made, check that the disk has room for a trained reader too.

    Raises:
        DiskSpaceError: If it has not.
    """
    plans = [plan for resource in resources.values() for plan in resource.plans]
    run_dir, cache_dir = job.config.run_dir, job.config.cache_dir
    if not plans or not job.config.keep_readers:
        return
    what, needed = "The trained reader", job.checkpoint.nbytes
    if on_one_disk(run_dir, cache_dir):
        what, needed = f"{what}, with the new caches in {cache_dir},", needed + new_bytes(plans)
    check_room(run_dir, needed, what, "Make room, or give another --run-dir.")


def _with_features(
    job: Job, resources: Mapping[str, Resource], caches: Mapping[str, Mapping[str, FeatureCache]]
) -> Job:
    """The job with the states of every resource, in every split."""
    if not resources:
        return job
    device = choose_device(job.config.device)
    room = room_on(device)
    features: dict[str, list[Features]] = {split: [] for split in job.splits}
    for name, resource in resources.items():
        settings = job.inputs[name]
        for split, cache in caches[name].items():
            states = ResourceFeatures(
                cache,
                resource.corpus.splits[split].ids,
                settings.fusion,
                keep_layers=settings.projection == "direct",
                pinned=device.type == "cuda",
            )
            if states.nbytes > room:
                features[split].append(states)
                continue
            room -= states.nbytes
            size = bytes_text(states.nbytes)
            of = f"{name}'s states" if len(resources) > 1 else "The states"
            resource.notes.append(f"{of} of {split} ({size}) live on {device_name(device)}.")
            features[split].append(DeviceFeatures(states, device))
    splits = {split: dataclasses.replace(data, features=joined(features[split])) for split, data in job.splits.items()}
    return dataclasses.replace(job, splits=splits)


def _deciding(job: Job, corpus: Corpus) -> dict[str, Any]:
    """What decides the scores of a run of any method."""
    config = job.config
    reader = model_digests(job.reader)
    return {
        "task": job.task.name,
        "metric": job.task.metric,
        # The plain methods differ in what their model is called, not in what is computed.
        "method": "plain" if METHODS[config.method].is_plain else config.method,
        "data": {split: part.digest for split, part in corpus.splits.items()},
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
        # Runs from before the option, and of tasks that are not declared, keep their folders.
        **({} if (declaration := job.task.declaration()) is None else {"declaration": declaration}),
        **({"keep_head": True} if config.keep_head else {}),
    }


_PLACES = ("resource", "more_resources")
"""Where a run keeps what concerns its first resource, and the list of the others."""


def _first_and_more(values: Sequence[Any]) -> list[Any]:
    """The first value, and the list of the others if there are any."""
    return [*values[:1], *([list(values[1:])] if len(values) > 1 else [])]


def _resources_decide(
    job: Job, resources: Mapping[str, Resource], caches: Mapping[str, Mapping[str, FeatureCache]]
) -> dict[str, Any]:
    """What also decides the scores of a run that has resources. The first one has the fields that it has alone."""
    if not resources:
        return {}
    decides = [_resource_decides(resource, caches[name]) for name, resource in resources.items()]
    fusions = [
        {
            "fusion": {"name": one.fusion.name, "layers": list(one.fusion.layers)},
            "projection": one.projection,
        }
        for one in job.inputs.values()
    ]
    more = [own | fusion for own, fusion in zip(decides[1:], fusions[1:], strict=True)]
    learns = any(one.learns_weights for one in job.inputs.values())
    return {
        "resource": decides[0],
        **({"more_resources": more} if more else {}),
        **fusions[0],
        "fusion_learning_rate": job.config.fusion_learning_rate if learns else None,
    }


def _resource_decides(resource: Resource, caches: Mapping[str, FeatureCache]) -> dict[str, Any]:
    """What of one resource decides the scores."""
    chosen = caches["train"].provenance["chosen"]
    found = [cache.provenance["found"] for cache in caches.values()]
    rounded = sorted(split for split, cache in caches.items() if provenance.rounded_again(cache))
    return {
        "name": resource.spec.name,
        "weights": sorted({one["weights"] for one in found}),
        "config": sorted({one["config"] for one in found}),
        "tokens": {
            split: _resource_tokens(cache, resource.corpus.splits[split].ids) for split, cache in caches.items()
        },
        "segments": any(one.get("segments", False) for one in found),
        "max_length": chosen["max_length"],
        "dtype": chosen["dtype"],
        "compute_dtype": chosen["compute_dtype"],
        # Runs of earlier versions had float32 weights, and did not say so.
        **({"weights_dtype": resource.weights_dtype} if resource.weights_dtype != DEFAULT_WEIGHTS_DTYPE else {}),
        **({"pool": pool} if (pool := provenance.pool_of(caches["train"].provenance)) != DEFAULT_POOL else {}),
        # These states were rounded twice, so they differ slightly from those of an extraction.
        **({"rounded_again": rounded} if rounded else {}),
    }


def _resource_tokens(cache: FeatureCache, ids: Sequence[str]) -> str:
    """Digest of the tokens that are used. More sequences in the cache change no result."""
    return provenance.tokens_digest(cache.tokens().select(cache.positions(ids)))
