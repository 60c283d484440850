"""An ablation of nine fusions, one seed per turn: with a cache, and with the resource in every step.

A sweep has work that does not grow with the number of training steps, so its share depends on the sizes. The sizes
here are those of a small but natural training: it evaluates one example for six that it trains, as ten epochs on
a treebank do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time
from pathlib import Path

from kr2cache.bench import BenchConfig
from kr2cache.bench.race import Race
from kr2cache.bench.training import load_online, online_index, online_split
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import CorpusSplit, Shared
from kr2cache.models.configuration import encoder_shape
from kr2cache.models.registry import find_model
from kr2cache.models.stack import resource_config
from kr2cache.system.allocator import objects_set_aside
from kr2cache.system.device import choose_device
from kr2cache.system.memory import peak_of
from kr2cache.tasks import find_task
from kr2cache.training.train import train_seed

FUSIONS = ("fuse", "all", "last4", "last2", "last1", "layer0", "layer2", "layer4", "layer6")
"""For a resource of six layers."""
EXAMPLES = {"train": 256, "dev": 21, "test": 21}
"""The most examples of each split."""
TARGET = 1.1


@objects_set_aside()  # as in a sweep
def run(config: BenchConfig, folder: Path) -> Race:
    """Trainings from existing caches, beside the time of their training steps alone; and trainings without a cache."""
    shared = Shared()
    training = config.training
    corpus = shared.corpus(find_task(training.task, training.tasks), training)
    corpus.splits = {
        split: CorpusSplit(part.task, part.examples[: EXAMPLES[split]]) for split, part in corpus.splits.items()
    }
    seeds = itertools.count(1)
    base = dataclasses.replace(training, cache_dir=folder / "caches", epochs=1.0, keep_readers=False)
    layers, _ = encoder_shape(resource_config(find_model(base.resource or "", base.models)))
    fusions = [name for name in FUSIONS if int(re.sub(r"\D", "", name) or 0) < layers]
    in_steps: list[float] = []

    def cached(seed: int) -> None:
        jobs = [dataclasses.replace(base, fusion=name, seeds=(seed,), run_dir=folder / "ablation") for name in fusions]
        in_steps.append(sum(run.step_seconds or 0.0 for job in jobs for run in train(job, shared).runs))

    def online(seed: int) -> None:
        jobs = [
            prepare(dataclasses.replace(base, fusion=name, run_dir=folder / "online"), shared).job for name in fusions
        ]
        resource = load_online(jobs[0])
        indices = {split: online_index(jobs[0], split, resource) for split in jobs[0].splits}
        for name, job in zip(fusions, jobs, strict=True):
            splits = {split: online_split(job, split, resource, index) for split, index in indices.items()}
            train_seed(dataclasses.replace(job, splits=splits), seed, folder / "online", f"online {name}")

    contenders = {"kr2cache, from the cache": cached, "the resource runs again in every step and evaluation": online}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int | None] = {}
    for seed in itertools.islice(seeds, config.repeats):
        for name, work in contenders.items():
            started = time.perf_counter()
            peak = peak_of(functools.partial(work, seed))
            seconds[name].append(time.perf_counter() - started)
            peaks.setdefault(name, peak)
    steps = "its training steps alone"
    return Race(
        title="an ablation",
        unit=f"{len(fusions)} fusions, one seed per turn, {len(corpus.splits['train'].examples)} training examples",
        seconds={steps: in_steps, **seconds},
        peaks={steps: None, **peaks},
        # On a GPU only the issuing of a step is timed.
        target=TARGET if choose_device(training.device).type == "cpu" else None,
    )
