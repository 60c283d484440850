"""A whole ablation, nine fusions and three seeds, small: with a cache, and with the resource in every step."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from pathlib import Path

from kr2cache import models
from kr2cache.bench import BenchConfig, Race
from kr2cache.bench.training import load_online, online_index, online_split
from kr2cache.memory import peak_of
from kr2cache.pipeline import train
from kr2cache.prepare import prepare
from kr2cache.shared import Shared
from kr2cache.train import train_seed

FUSIONS = ("fuse", "all", "last4", "last2", "last1", "layer0", "layer2", "layer4", "layer6")
"""Of a resource of six layers."""
SEEDS = (1, 2, 3)
EXAMPLES = 32
"""Of each split."""
TARGET = 1.1


def run(config: BenchConfig, folder: Path) -> Race:
    """All trainings with their caches there, beside the time that their steps take; and without a cache."""
    shared, numbers = Shared(), itertools.count()
    base = dataclasses.replace(
        config.training,
        cache_dir=folder / "caches",
        seeds=SEEDS,
        epochs=1.0,
        batch_size=16,
        limit=EXAMPLES,
        keep_readers=False,
    )
    layers, _ = models.encoder_shape(models.load_config(models.find_model(base.resource or "", base.models)))
    fusions = [name for name in FUSIONS if int(re.sub(r"\D", "", name) or 0) < layers]
    in_steps: list[float] = []

    def cached() -> None:
        run_dir = folder / f"ablation-{next(numbers)}"
        results = [train(dataclasses.replace(base, fusion=name, run_dir=run_dir), shared) for name in fusions]
        in_steps.append(sum(run.step_seconds or 0.0 for result in results for run in result.runs))

    def online() -> None:
        jobs = [
            prepare(dataclasses.replace(base, fusion=name, run_dir=folder / "online"), shared).job for name in fusions
        ]
        resource = load_online(jobs[0])
        indices = {split: online_index(jobs[0], split, resource) for split in jobs[0].splits}
        for name, job in zip(fusions, jobs, strict=True):
            splits = {split: online_split(job, split, resource, index) for split, index in indices.items()}
            for seed in SEEDS:
                train_seed(dataclasses.replace(job, splits=splits), seed, folder / "online", f"online {name}")

    contenders = {"kr2cache, from the cache": cached, "the resource runs again in every step and evaluation": online}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = {name: peak_of(work) for name, work in contenders.items()}  # the turn that counts for nothing
    in_steps.clear()
    for _ in range(config.repeats):
        for name, work in contenders.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    steps = "its training steps alone"
    return Race(
        title="an ablation",
        unit=f"{len(fusions)} fusions, {len(SEEDS)} seeds, {EXAMPLES} examples a split, one epoch",
        seconds={steps: in_steps, **seconds},
        peaks={steps: None, **peaks},
        target=TARGET,
    )
