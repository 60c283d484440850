"""Both stages together: find the caches a run needs or make them, then train its seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from kr2cache import models, provenance, runs
from kr2cache.cache.format import canonical_json
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import (
    METHODS,
    PROJECTIONS,
    TrainConfig,
)
from kr2cache.console import console, count_text, seconds_text
from kr2cache.device import choose_device
from kr2cache.encode import check_token_ids, encode_examples
from kr2cache.errors import (
    ConfigError,
    DataError,
    InterruptedWorkError,
    MissingSplitError,
    unknown_name,
)
from kr2cache.features import ResourceFeatures
from kr2cache.fusion import check_fusion_name, parse_fusion
from kr2cache.kreader import check_admitted, projection_kind
from kr2cache.locks import check_writable, only_writer
from kr2cache.resource import Resource
from kr2cache.tasks import Example, Task, find_task
from kr2cache.train import Job, SplitData, train_seed, training_arguments, write_trained


@dataclass(frozen=True, kw_only=True)
class Run:
    """One seed's result."""

    seed: int
    folder: Path
    metrics: runs.Metrics
    seconds: float | None
    """None where the run was there already."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What one call of stage two gave."""

    config: TrainConfig
    task: Task
    runs: list[Run]
    computed: int
    """Sequences that went through the resource now, to make caches."""
    read: int
    """Sequences whose states were read instead of computed."""
    notes: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        mean, std = runs.mean_and_std([run.metrics for run in self.runs])
        return {
            "runs": [{"seed": run.seed, "folder": str(run.folder), "metrics": run.metrics} for run in self.runs],
            "mean": mean,
            "std": std,
            "resource_sequences": {"computed": self.computed, "read": self.read},
        }


def train(config: TrainConfig) -> TrainResult:
    """Train one method on several seeds; everything that can be wrong is checked before anything long starts.

    Raises:
        KR2CacheError: One of its kinds, for everything foreseen.
    """
    if config.method == "kreader2":  # whatever resource was given or found: this one is the reader's own copy
        config = dataclasses.replace(config, resource=config.reader)
    task = find_task(config.task)
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    if config.projection not in PROJECTIONS:
        raise unknown_name("projection", config.projection, PROJECTIONS)
    check_fusion_name(config.fusion)
    with_resource = config.method in ("kr2", "kreader2")
    reader_spec, resource_spec = _models(config)
    training_arguments(config, config.run_dir, config.seeds[0])
    reader_config = models.load_config(reader_spec)
    if with_resource:
        check_admitted(reader_config, f"Reader {reader_spec.name!r}")
    longest = models.max_positions(reader_config)
    if longest is not None and config.max_length > longest:
        raise ConfigError(
            f"A maximal length of {config.max_length} is more than {reader_spec.name!r} has positions ({longest}).",
            f"Give --max-length {longest} or less.",
        )
    check_writable(config.run_dir, "--run-dir")
    examples, notes = _read_splits(task, config)
    tokenizer = models.load_tokenizer(reader_spec, words=task.words)
    splits = {}
    for split, part in examples.items():
        index = encode_examples(tokenizer, part, task, config.max_length)
        check_token_ids(index, int(reader_config.vocab_size), repr(reader_spec.name))
        splits[split] = SplitData(examples=part, index=index)
    resource = None
    if with_resource:
        assert resource_spec is not None, "kr2 and kreader2 have a resource"
        resource = Resource(config, resource_spec, task)
        job, caches = _with_features(config, task, reader_spec, tokenizer, splits, resource)
    else:
        job = Job(task=task, reader=reader_spec, tokenizer=tokenizer, splits=splits, config=config)
        caches = {}
    deciding = _deciding(job, resource, caches)
    folder = runs.runs_folder(config.run_dir, task.name, _folder_parts(config, reader_spec, resource_spec), deciding)
    done = _train_seeds(job, deciding, caches, folder)
    features = [data.features for data in job.splits.values() if data.features is not None]
    return TrainResult(
        config=config,
        task=task,
        runs=done,
        computed=resource.computed if resource else 0,
        read=sum(one.sequences_read for one in features),
        notes=notes + (resource.notes if resource else []),
    )


def _models(config: TrainConfig) -> tuple[models.ModelSpec, models.ModelSpec | None]:
    """(the model that is trained, the frozen one)."""
    if config.method in ("kr2", "kresource") and config.resource is None:
        raise ConfigError(
            f"Method {config.method} needs --resource.", f"Registered: {', '.join(models.known_models(config.models))}."
        )
    if config.method == "kresource":
        return models.find_model(config.resource or "", config.models), None
    reader = models.find_model(config.reader, config.models)
    if config.method == "kreader":
        return reader, None
    return reader, reader if config.method == "kreader2" else models.find_model(config.resource or "", config.models)


def _read_splits(task: Task, config: TrainConfig) -> tuple[dict[str, list[Example]], list[str]]:
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
            "A reader is trained on labelled examples only.",
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


def _folder_parts(config: TrainConfig, reader: models.ModelSpec, resource: models.ModelSpec | None) -> list[str]:
    if resource is None:
        return [config.method, reader.name]
    if config.method == "kreader2":
        return [config.method, reader.name, config.fusion]
    return [config.method, reader.name, resource.name, config.fusion]


def _deciding(job: Job, resource: Resource | None, caches: dict[str, FeatureCache]) -> dict[str, Any]:
    """Everything that can change the result of a run, the seed aside. Device, folders and versions are left out."""
    config = job.config
    content: dict[str, Any] = {
        "task": job.task.name,
        "method": config.method,
        "data": {split: _data_digest(data.examples) for split, data in job.splits.items()},
        "reader": {
            "name": job.reader.name,
            "weights": models.weights_digest(models.load_encoder(job.reader)),
            "config": models.config_digest(models.load_config(job.reader), training=True),
            "tokens": {split: provenance.tokens_digest(data.index) for split, data in job.splits.items()},
            "max_length": config.max_length,
        },
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "training": dict(config.training),
    }
    if resource is not None:
        assert job.fusion is not None, "a resource comes with a fusion"
        chosen = caches["train"].provenance["chosen"]
        content["resource"] = {
            "name": resource.spec.name,
            "weights": sorted({cache.provenance["found"]["weights"] for cache in caches.values()}),
            "config": sorted({cache.provenance["found"]["config"] for cache in caches.values()}),
            "tokens": {split: _resource_tokens(cache, job.splits[split].examples) for split, cache in caches.items()},
            "max_length": chosen["max_length"],
            "dtype": chosen["dtype"],
            "compute_dtype": chosen["compute_dtype"],
        }
        content["fusion"] = {"name": job.fusion.name, "layers": list(job.fusion.layers)}
        content["projection"] = job.projection
        content["fusion_learning_rate"] = config.fusion_learning_rate if job.fusion.trainable else None
    return content


def _resource_tokens(cache: FeatureCache, examples: Sequence[Example]) -> str:
    """Of the sequences that are used: that a cache holds more of them changes no result."""
    positions = cache.positions(name for example in examples for name in example.sequence_ids)
    return provenance.tokens_digest(cache.tokens().select(positions))


def _data_digest(examples: Sequence[Example]) -> str:
    digest = xxhash.xxh3_128()
    for example in examples:
        digest.update(canonical_json([example.id, example.texts, example.label]).encode())
    return digest.hexdigest()


def _train_seeds(job: Job, deciding: dict[str, Any], caches: dict[str, FeatureCache], folder: Path) -> list[Run]:
    done: list[Run] = []
    # Under torchrun every process trains, and the first one writes.
    writes = int(os.environ.get("RANK", "0")) == 0
    device = str(choose_device(job.config.device))
    for seed in job.config.seeds:
        target = runs.seed_folder(folder, seed)
        with only_writer(target) if writes else contextlib.nullcontext():
            if runs.is_finished(target):
                console.print(f"[green]✓[/] seed {seed} is there already: {target}", soft_wrap=True)
                done.append(Run(seed=seed, folder=target, metrics=runs.read_metrics(target), seconds=None))
                continue
            started = time.monotonic()
            partial = runs.start_run(target) if writes else runs.partial_folder(target)
            try:
                trained = train_seed(job, seed, partial, f"{folder.name.rpartition('-')[0]} seed {seed}")
            except BaseException as error:
                shutil.rmtree(partial, ignore_errors=True)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                kept = f"Caches and {count_text(len(done), 'finished run')} are kept"
                raise InterruptedWorkError(
                    f"Interrupted in seed {seed}. {kept}: {folder}",
                    "Run the same command again: it trains the seeds that are missing.",
                ) from None
            done.append(Run(seed=seed, folder=target, metrics=trained.metrics, seconds=time.monotonic() - started))
            if writes:
                write_trained(job, trained, partial)
                origin = {"reader": job.reader.hub_id or str(job.reader.path)}
                recorded = provenance.recorded(device, torch.get_num_threads(), origin)
                recorded["caches"] = {
                    split: {"folder": str(cache.folder), "fingerprint": cache.fingerprint}
                    for split, cache in caches.items()
                }
                runs.write_json(partial / "config.json", {"config": {**deciding, "seed": seed}, "recorded": recorded})
                runs.finish_run(partial, target)
            del trained
            gc.collect()
    return done


def describe_training(result: TrainResult) -> None:
    """The table of seeds, mean and standard deviation, the learned weights, and what the cache saved."""
    config = result.config
    split = "test" if "test" in result.runs[0].metrics else "dev"
    mean, std = runs.mean_and_std([run.metrics for run in result.runs])
    names = [name for name in mean[split] if name != "cut_off_words"]
    table = Table(title=f"{_title(config)} on {config.task}, {split} split", title_justify="left")
    table.add_column("seed", justify="right")
    for name in names:
        table.add_column(f"{name} %", justify="right")
    cut_off = "cut_off_words" in mean[split]
    if cut_off:
        table.add_column("words cut off", justify="right")
    table.add_column("time", justify="right")
    for run in result.runs:
        cells = [f"{100 * run.metrics[split][name]:.1f}" for name in names]
        cells += [f"{run.metrics[split]['cut_off_words']:.0f}"] if cut_off else []
        table.add_row(str(run.seed), *cells, "there" if run.seconds is None else seconds_text(run.seconds))
    table.add_section()
    table.add_row("mean", *(f"[bold]{100 * mean[split][name]:.1f}[/]" for name in names))
    table.add_row("std", *("-" if (one := std[split][name]) is None else f"{100 * one:.1f}" for name in names))
    console.print(table)
    for run in result.runs:
        fusion = runs.read_fusion(run.folder)
        if fusion and fusion["trainable"]:
            weights = "  ".join(
                f"{layer}: {w:.4f}" for layer, w in zip(fusion["layers"], fusion["weights"], strict=True)
            )
            console.print(f"learned w by layer, seed {run.seed}:  {weights}")
    for note in result.notes:
        console.print(f"[yellow]![/] {note}")
    if result.read:
        console.print(
            f"The resource ran on {count_text(result.computed, 'sequence')} now; its states were read "
            f"{result.read:,} times from the cache instead of computed."
        )
    console.print(f"Runs: {result.runs[0].folder.parent}")


def _title(config: TrainConfig) -> str:
    if config.method == "kr2":
        return f"kr2 ({config.reader} + {config.resource}, {config.fusion})"
    return {
        "kreader": f"kreader ({config.reader})",
        "kreader2": f"kreader2 ({config.reader} with itself, {config.fusion})",
        "kresource": f"kresource ({config.resource})",
    }[config.method]
