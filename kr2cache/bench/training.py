"""Stage two: how much of a KR2 training step is the reader on l1 + l2 positions, and what the cache saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from kr2cache import models
from kr2cache.bench import BenchConfig, Race, race
from kr2cache.encode import encode_examples
from kr2cache.kreader import KReader, load_task_model
from kr2cache.predict import OnlineFeatures, OnlineResource
from kr2cache.prepare import prepare
from kr2cache.train import Batcher, Job

TARGET = 1.05
STEPS = 6
"""In one turn."""


def run(config: BenchConfig, folder: Path) -> Race:
    """A step of training on cached states, beside the same step without reading them, and with the resource in it."""
    prepared = prepare(dataclasses.replace(config.training, cache_dir=folder / "caches", run_dir=folder / "runs"))
    job = prepared.job
    assert prepared.resource is not None, "the bench trains method kr2"
    reader, cached = _reader(job), _batcher(job)
    online = _online(job, prepared.resource.spec, reader)
    size = job.config.batch_size
    order = torch.randperm(len(job.splits["train"].examples), generator=torch.Generator().manual_seed(0)).tolist()
    picks = [order[start : start + size] for start in range(0, len(order) - size + 1, size)][:STEPS] or [order]
    ready = [cached(batch) for batch in picks]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-5)
    reader.train()

    def steps(batches: Iterable[dict[str, torch.Tensor]]) -> None:
        for batch in batches:
            reader(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return race(
        "training",
        f"{len(picks)} steps of {len(picks[0])} examples, {job.reader.name} with {prepared.resource.spec.name}, "
        f"{job.config.fusion}",
        {
            "the same reader on l1 + l2 positions, batches ready in memory": lambda: steps(ready),
            "kr2cache, states read from the cache": lambda: steps(map(cached, picks)),
            "the resource runs again in every step": lambda: steps(map(online, picks)),
        },
        repeats=config.repeats,
        target=TARGET,
    )


def _reader(job: Job) -> KReader:
    torch.manual_seed(1)
    return KReader(
        load_task_model(job.reader, job.task.head, job.task.labels),
        job.task.head,
        fusion=job.fusion,
        projection=job.projection,
        resource_width=job.resource_width,
    )


def _batcher(job: Job) -> Batcher:
    return Batcher(job.splits["train"], job.task, job.tokenizer)


def _online(job: Job, spec: models.ModelSpec, reader: KReader) -> Batcher:
    """Batches whose states come from a forward pass of the resource."""
    tokenizer = models.load_tokenizer(spec, words=job.task.words)
    resource = OnlineResource(
        name=spec.name,
        encoder=models.load_encoder(spec),
        tokenizer=tokenizer,
        max_length=job.config.resource_max_length or job.config.max_length,
        compute_dtype="float32",
        padded=True,
    )
    train = job.splits["train"]
    index = encode_examples(tokenizer, train.examples, job.task, resource.max_length)
    features = OnlineFeatures(resource, reader, index)
    return Batcher(dataclasses.replace(train, features=features), job.task, job.tokenizer)
