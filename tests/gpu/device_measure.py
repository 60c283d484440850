"""Speed on a device: each part as a ratio to its limit, the work that no program can avoid."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from device_checks import matmul_precision
from device_scene import Scene
from numpy.typing import NDArray

from kr2cache.bench import BenchConfig, training
from kr2cache.bench.race import Race, race, run_through
from kr2cache.bench.reading import drop_pages
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import open_shard
from kr2cache.extraction.extract import extract, fill_shards
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.stack import open_encoder
from kr2cache.models.states import hidden_states
from kr2cache.store.sharing import SharedShards
from kr2cache.system.device import choose_device
from kr2cache.training.features import DeviceFeatures, Features, ResourceFeatures
from kr2cache.training.train import Job

TARGET = 1 / 0.8
"""Stage one: ratio to the slower of its two limits. Only used on a GPU: ratios of small sizes mean nothing."""
COMPUTED_IN = ("float32", "tf32", "bfloat16")
SAMPLE_EVERY_S = 0.005
LARGEST = 5
"""Number of profile items that are shown."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One race with its rates and notes."""

    race: Race
    rates: dict[str, float]
    """Unit (``tokens/s``) to rate."""
    notes: tuple[str, ...] = ()


def run_measurements(scene: Scene) -> Iterator[Measured]:
    """Run all measurements."""
    for name in COMPUTED_IN:
        yield _stage_one(scene, name)
    job = training.prepared(_bench_config(scene), scene.folder / "measured-training")
    yield from _reading(scene, job)
    for where, there in _placements(scene, job):
        raced = training.steps(_bench_config(scene), there)
        target = raced.target if scene.device.type == "cuda" else None
        titled = dataclasses.replace(raced, title=f"training, states {where}", target=target)
        yield Measured(titled, {"steps/s": training.STEPS / titled.medians[titled.ours]})


def _bench_config(scene: Scene) -> BenchConfig:
    # With trainable fusion weights, every batch reads all layers.
    trained = scene.training(batch_size=32, limit=None, data=str(scene.measured), fusion="fuse")
    return BenchConfig(extraction=scene.plan().config, training=trained, repeats=1)


# Stage one -----------------------------------------------------------------------------------------------------------


def _stage_one(scene: Scene, name: str) -> Measured:
    compute_dtype = "float32" if name == "tf32" else name
    plan = scene.plan(
        data=str(scene.measured),
        tokens_per_batch=None,
        compute_dtype=compute_dtype,
        cache_dir=scene.folder / f"first-{name}",
    )
    numbers = itertools.count()
    with matmul_precision("high" if name == "tf32" else "highest"):
        first = extract(plan).cache
        header = open_shard(next(first.glob("*.h5"))).header
        shutil.rmtree(first)
        encoder = open_encoder(plan.spec)[0].to(scene.device)  # type: ignore[arg-type]  # transformers' annotation
        positions = int(header.batch_plan["tokens_per_batch"])
        batches = length_sorted_batches(plan.index.n_tokens, positions, padded=bool(header.batch_plan["padded"]))

        def forwards() -> Iterator[None]:
            for batch in batches:
                hidden_states(encoder, plan.index, batch, pad_id=plan.pad_id, compute_dtype=compute_dtype)
                yield

        def ours() -> Path:
            path = scene.folder / f"ours-{name}-{next(numbers)}"
            shards = SharedShards(path, header, plan.index)
            shards.create(scene.folder)
            fill_shards(plan, encoder, shards)
            return path

        def disk() -> Path:
            path = scene.folder / f"disk-{next(numbers)}"
            _write(path, _block(plan), plan.state_bytes)
            return path

        raced = race(
            f"stage one in {name}",
            f"{len(plan.index):,} sequences, {plan.tokens:,} tokens, {plan.state_bytes / 1e9:.2f} GB, {positions:,} "
            "positions a batch",
            {
                "forward pass alone, nothing stored": lambda: run_through(forwards()),
                "the same number of bytes by pwrite, synced by a second thread": disk,
                "kr2cache extract": ours,
            },
            repeats=1,
            target=TARGET if scene.device.type == "cuda" else None,
            limits=2,
        )
        if scene.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(scene.device)
        with _sampled() as profile, _utilisation(scene.device) as busy:
            shutil.rmtree(ours())
    took = raced.medians[raced.ours]
    notes = [f"{thread}: {where}" for thread, where in profile()]
    notes += [f"GPU busy {statistics.mean(busy):.0f} % of the time"] if busy else []
    if scene.device.type == "cuda":
        notes.append(f"peak device memory {torch.cuda.max_memory_allocated(scene.device) / 1e9:.2f} GB")
    return Measured(raced, {"tokens/s": plan.tokens / took, "MB/s": plan.state_bytes / took / 1e6}, tuple(notes))


def _block(plan: ExtractPlan) -> bytes:
    """Random bytes, about as many as the states of one batch have."""
    return np.random.default_rng(0).bytes(min(plan.state_bytes, 2**26))


def _write(path: Path, block: bytes, size: int) -> None:
    """Write ``size`` bytes while a second thread syncs. The space is reserved first, as for a shard."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    written = threading.Event()

    def sync_on() -> None:
        while not written.wait(SAMPLE_EVERY_S):
            os.fsync(descriptor)

    syncer = threading.Thread(target=sync_on)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        syncer.start()
        for start in range(0, size, len(block)):
            os.pwrite(descriptor, block[: size - start], start)
    finally:
        written.set()
        syncer.join()
        os.fsync(descriptor)
        os.close(descriptor)


# Stage two -----------------------------------------------------------------------------------------------------------


class _Cold:
    """Features of a cache that is not in memory: its pages are dropped before every batch."""

    def __init__(self, features: ResourceFeatures) -> None:
        self.features = features
        self.n_tokens = features.n_tokens
        self.device = features.device
        self.sequences_read = 0

    def batch(self, sequences: Sequence[int]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        for shard in self.features.cache.folder.glob("*.h5"):
            drop_pages(shard)
        # For a cache larger than memory, every batch is requested from the disk again.
        self.features.cache.read_ahead(self.features._positions[list(sequences)], self.features._layers_read)
        return self.features.batch(sequences)


def _placements(scene: Scene, job: Job) -> Iterator[tuple[str, Job]]:
    """The same job, with its states on the device, in the mapped file and on the disk."""

    def with_features(features: Features) -> Job:
        split = dataclasses.replace(job.splits["train"], features=features)
        return dataclasses.replace(job, splits={**job.splits, "train": split})

    mapped = _mapped(job)
    if scene.device.type == "cuda":
        yield "on the device", with_features(DeviceFeatures(mapped, scene.device))
    yield (
        "from the map, through pinned memory" if scene.device.type == "cuda" else "from the map",
        with_features(mapped),
    )
    if hasattr(os, "posix_fadvise"):
        yield "from the disk, as for a cache larger than memory", with_features(_Cold(mapped))


def _mapped(job: Job) -> ResourceFeatures:
    (settings,) = job.inputs.values()
    train = job.splits["train"]
    folder = next((job.config.cache_dir / "udpos" / "train").glob("*/shard-*.h5")).parent
    ids = [name for example in train.examples for name in example.sequence_ids]
    pinned = choose_device(job.config.device).type == "cuda"
    return ResourceFeatures(FeatureCache.open(folder), ids, settings.fusion, keep_layers=True, pinned=pinned)


def _reading(scene: Scene, job: Job) -> Iterator[Measured]:
    """Move random batches of 32 sequences, with all layers of the fusion, to the device."""
    mapped = _mapped(job)
    draw = np.random.default_rng(0)
    number = len(mapped.n_tokens)
    picks = [draw.choice(number, min(32, number), replace=False).tolist() for _ in range(8)]
    on_gpu = scene.device.type == "cuda"
    ready = [torch.from_numpy(mapped.batch(pick)[0]) for pick in picks]
    ready = [one.pin_memory() for one in ready] if on_gpu else ready
    into = [torch.empty_like(one, device=scene.device) for one in ready]
    size = sum(one.nbytes for one in ready)

    def copies() -> None:
        for one, there in zip(ready, into, strict=True):
            there.copy_(one, non_blocking=True)

    def from_map() -> None:
        for pick in picks:
            torch.from_numpy(mapped.batch(pick)[0]).to(scene.device, non_blocking=True)

    contenders: dict[str, Callable[[], object]] = {
        "copying the same bytes" + (" from pinned memory" if on_gpu else ""): copies,
        "from the map": from_map,
    }
    if on_gpu:
        there = DeviceFeatures(mapped, scene.device)
        contenders["gathered on the device"] = lambda: [there.batch(pick) for pick in picks]
    unit = f"{len(picks)} random batches of {len(picks[0])}, {size / 1e6:.1f} MB"
    raced = race("reading", unit, contenders, repeats=1, target=None)
    yield Measured(raced, {"MB/s": size / raced.medians[raced.ours] / 1e6})


# Observing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _sampled() -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """Sample the code line of each thread every few milliseconds. The function that the block gets returns the most
    frequent lines of each thread, with their share."""
    seen: dict[str, Counter[str]] = {}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(SAMPLE_EVERY_S):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != looker.ident:
                    seen.setdefault(names.get(ident, "?"), Counter())[_place(frame)] += 1

    def largest() -> list[tuple[str, str]]:
        found = []
        for thread in ("MainThread", "cache-writer", "cache-syncer"):
            counts = seen.get(thread, Counter())
            total = sum(counts.values()) or 1
            found += [(thread, f"{place} {count / total:.0%}") for place, count in counts.most_common(LARGEST)]
        return found

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    try:
        yield largest
    finally:
        stop.set()
        looker.join()


def _place(frame: FrameType | None) -> str:
    """The innermost frame that is in the package."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "kr2cache" in path.parts[-3:-1]:
            return f"{path.name}:{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def _utilisation(device: torch.device) -> Iterator[list[float]]:
    """GPU utilisation in percent, five values per second from nvidia-smi; empty without nvidia-smi."""
    busy: list[float] = []
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield busy
        return
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    process = subprocess.Popen([*command, f"--id={device.index or 0}"], stdout=subprocess.PIPE, text=True)
    try:
        yield busy
    finally:
        process.terminate()
        output, _ = process.communicate()
        busy += [float(line) for line in output.split() if line.strip().isdigit()]


def hardware(device: torch.device) -> dict[str, Any]:
    """Properties of the card and its driver, or of the processor."""
    about: dict[str, Any] = {"device": str(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        about |= {"card": properties.name, "memory": f"{properties.total_memory / 2**30:.0f} GiB"}
        about["cuda"] = torch.version.cuda
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            about["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    else:
        about["capability"] = torch.backends.cpu.get_cpu_capability()
    return about
