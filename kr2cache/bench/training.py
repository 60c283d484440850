"""Stage two: a KR2 training step and an evaluation, beside the same reader on l1 + l2 positions with batches ready; and
the time that the cache saves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kr2cache.bench import BenchConfig
from kr2cache.bench.race import Race, alternately, race, run_through
from kr2cache.cache.format import SequenceIndex
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import Shared
from kr2cache.models.encode import encode_examples
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.registry import find_model
from kr2cache.models.stack import load_encoder
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.prediction.online import OnlineFeatures, OnlineResource
from kr2cache.system.device import choose_device
from kr2cache.training.batches import WHOLE, Batcher, SplitData, StepBatcher, part_overhead
from kr2cache.training.evaluate import batches_of, predict
from kr2cache.training.kreader import KReader
from kr2cache.training.train import Job

TARGET = 1.05
EVALUATION_TARGET = 1 / 0.97
"""Stage one has the same target."""
STEPS = 6
"""Training steps in one turn."""
SEGMENT_S = 0.2
"""Seconds between two pauses of ours, in which the limit catches up."""
CACHED, ONLINE = "kr2cache, states read from the cache", "the resource runs again in every step"


def prepared(config: BenchConfig, folder: Path) -> Job:
    """The training to measure. Its caches are made here."""
    return prepare(
        dataclasses.replace(config.training, cache_dir=folder / "caches", run_dir=folder / "runs"), Shared()
    ).job


def steps(config: BenchConfig, job: Job) -> Race:
    """A training step on cached states, beside the same step with batches ready, and with the resource in the step."""
    device = choose_device(job.config.device)
    whole_is_ours = part_overhead(device) == WHOLE
    torch.manual_seed(1)
    reader = job.new_reader().to(device)
    size = job.config.batch_size
    order = torch.randperm(len(job.splits["train"].examples), generator=torch.Generator().manual_seed(0)).tolist()
    picks = [order[start : start + size] for start in range(0, len(order) - size + 1, size)][:STEPS] or [order]
    resource = load_online(job)
    cached = job.splits["train"]
    online = online_split(job, "train", resource, online_index(job, "train", resource))
    limit = copy.deepcopy(reader)

    def batches(data: SplitData, overhead: int = part_overhead(device)) -> Iterable[dict[str, Any]]:
        """Batches on the device, moved as the Trainer's loader moves them."""
        for batch in map(StepBatcher(Batcher(data, job.task, job.tokenizer), overhead), picks):
            yield {"parts": [{name: _moved(value, device) for name, value in part.items()} for part in batch["parts"]]}

    def training(model: KReader) -> Callable[[Iterable[dict[str, Any]]], Iterator[None]]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        model.train()

        def steps(batches: Iterable[dict[str, Any]]) -> Iterator[None]:
            for batch in batches:
                for part in batch["parts"]:
                    inputs = {name: value for name, value in part.items() if name != "labels_share"}
                    (model(**inputs)["loss"] * part["labels_share"]).backward()
                optimizer.step()
                optimizer.zero_grad()
                yield

        return steps

    train_reader, train_limit = training(reader), training(limit)

    def train(batches: Iterable[dict[str, Any]]) -> None:
        run_through(train_reader(batches))

    ready = list(batches(cached))
    contenders: dict[str, Callable[[], object]] = {
        "the same reader on l1 + l2 positions, batches ready in memory": lambda: run_through(train_limit(ready)),
        CACHED: lambda: train(batches(cached)),
    }
    if not whole_is_ours:
        contenders["the same, batches padded and computed whole"] = lambda: train(batches(cached, WHOLE))
    contenders[ONLINE] = lambda: train(batches(online))
    return race(
        "training",
        f"{len(picks)} steps of {len(picks[0])} examples, {job.reader.name} with {job.config.resource}, "
        f"{job.config.fusion}",
        contenders,
        repeats=config.repeats,
        target=TARGET,
        close=lambda: alternately(
            reader, lambda: train_limit(ready), lambda: train(batches(cached)), segment_s=SEGMENT_S
        ),
    )


def evaluation(config: BenchConfig, job: Job) -> Race:
    """An evaluation of a split, beside its forward passes alone: batches ready, logits dropped."""
    device = choose_device(job.config.device)
    torch.manual_seed(1)
    reader = job.new_reader().to(device).eval()
    data = job.splits["train"]
    positions = int(data.positions().sum())
    batcher = Batcher(data, job.task, job.tokenizer)
    ready = [
        {name: _moved(tensor, device) for name, tensor in batcher.inputs(numbers.tolist()).items()}
        for numbers in batches_of(data, device)
    ]

    limit = copy.deepcopy(reader)

    def forwards() -> Iterator[None]:
        with cheaper_forward(limit, positions):
            for batch in ready:
                with torch.inference_mode():
                    limit(**batch)
                yield

    def ours() -> object:
        return predict(reader, data, job.task, job.tokenizer)

    return race(
        "evaluation",
        f"{len(data.examples)} examples, {positions:,} positions of {job.reader.name}",
        {
            "the same reader's forward passes alone, batches ready in memory": lambda: run_through(forwards()),
            "kr2cache, states read and labels predicted": ours,
        },
        repeats=config.repeats,
        target=EVALUATION_TARGET,
        close=lambda: alternately(reader, forwards, ours, segment_s=SEGMENT_S),
    )


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)


def load_online(job: Job) -> OnlineResource:
    """The resource of a job, to run in every step: as transformers loads it, without a cheaper forward pass."""
    spec = find_model(job.config.resource or "", job.config.models)
    return OnlineResource(
        name=spec.name,
        encoder=load_encoder(spec).to(choose_device(job.config.device)),  # type: ignore[arg-type]  # as in stage_one.py
        tokenizer=load_tokenizer(spec, words=job.task.words),
        max_length=job.config.resource_max_length or job.config.max_length,
        compute_dtype="float32",
        weights_dtype="float32",
        padded=True,
    )


def online_split(job: Job, split: str, resource: OnlineResource, index: SequenceIndex) -> SplitData:
    """A split of the job with states from a forward pass of the resource for every batch."""
    (settings,) = job.inputs.values()  # the bench trains method kr2
    # Trainable weights change, so the reader gets the layers.
    weights = None if settings.fusion.trainable else torch.from_numpy(settings.fusion.weights)
    features = OnlineFeatures(resource, index, settings.fusion.layers, weights)
    return dataclasses.replace(job.splits[split], features=features)


def online_index(job: Job, split: str, resource: OnlineResource) -> SequenceIndex:
    """The split's sequences, encoded with the resource's tokenizer."""
    return encode_examples(resource.tokenizer, job.splits[split].examples, job.task, resource.max_length)
