"""Stage one: an extraction beside its limits, the forward pass alone and writing alone."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from kr2cache.bench import BenchConfig, size_text
from kr2cache.bench.race import Race, alternately, race, run_through
from kr2cache.cache.shard import open_shard
from kr2cache.extraction.extract import extract, fill_shards
from kr2cache.extraction.planning import ExtractPlan, plan_extraction
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.stack import open_encoder
from kr2cache.models.states import hidden_states
from kr2cache.store.sharing import SharedShards
from kr2cache.system.device import choose_device

TARGET = {"cpu": 1 / 0.97, "cuda": 1 / 0.8}
"""By device type. On a GPU the disk may be slower than the model."""
OURS = "kr2cache extract"
ROWS_AT_ONCE = 32
"""Batch size of the plain loop; most scripts use it."""
SEGMENT_S = 1.0
"""Seconds between two pauses of an extraction. Its thread writes on in a pause; the slice is long beside that."""


def run(config: BenchConfig, folder: Path) -> tuple[Race, ExtractPlan]:
    """The race of the forward pass alone, writing alone, ours with all states on disk, and today's scripts; and the
    extraction's plan."""
    plan = plan_extraction(replace(config.extraction, cache_dir=folder / "first"))
    header = open_shard(next(extract(plan).cache.glob("*.h5"))).header
    device = choose_device(plan.config.device)
    encoder = open_encoder(plan.spec)[0].to(device)  # type: ignore[arg-type]  # transformers annotates it for itself alone
    batches = length_sorted_batches(
        plan.index.n_tokens, int(header.batch_plan["tokens_per_batch"]), padded=bool(header.batch_plan["padded"])
    )
    numbers = itertools.count()

    plain = copy.deepcopy(encoder)

    def forward(sequences: NDArray[np.intp]) -> tuple[torch.Tensor, ...]:
        return hidden_states(plain, plan.index, sequences, pad_id=plan.pad_id, compute_dtype=plan.config.compute_dtype)

    def forwards() -> Iterator[None]:
        for batch in batches:
            forward(batch)
            yield

    def writing_alone() -> Path:
        return _write(folder / f"written-{next(numbers)}", plan.state_bytes)

    def cheaper() -> None:
        with cheaper_forward(plain, plan.tokens):
            run_through(forwards())

    def ours() -> Path:
        path = folder / f"ours-{next(numbers)}"
        shards = SharedShards(path, header, plan.index)
        shards.create(folder)
        fill_shards(plan, encoder, shards)
        return path

    def loop(rows: int) -> Path:
        return _plain_loop(plan, forward, folder / f"loop-{next(numbers)}.h5", rows)

    contenders: dict[str, Callable[[], object]] = {
        "length-sorted forward pass alone, nothing stored": lambda: run_through(forwards()),
        "writing as many bytes, synced": writing_alone,
        OURS: ours,
    }
    if device.type == "cpu":
        contenders["its own cheaper forward pass alone"] = cheaper
    contenders[f"plain loop in data order, batches of {ROWS_AT_ONCE}, one data set per sequence"] = lambda: loop(
        ROWS_AT_ONCE
    )
    contenders["one sequence at a time, one data set per sequence"] = lambda: loop(1)
    stage_one = race(
        "stage one",
        f"{size_text(len(plan.index.ids), plan.state_bytes)} of states, {plan.tokens:,} tokens",
        contenders,
        repeats=config.repeats,
        target=TARGET.get(device.type, TARGET["cpu"]),
        limits=2,
        close=lambda: alternately(encoder, forwards, ours, segment_s=SEGMENT_S),
    )
    return stage_one, plan


def _plain_loop(
    plan: ExtractPlan, forward: Callable[[NDArray[np.intp]], tuple[torch.Tensor, ...]], path: Path, rows: int
) -> Path:
    """Extract as most scripts do: in the data's order, padded, with one HDF5 data set per sequence."""
    names = [raw.decode("utf-8") for raw in plan.index.ids.tolist()]
    with h5py.File(path, "w") as file:
        for start in range(0, len(names), rows):
            sequences = np.arange(start, min(start + rows, len(names)))
            output = forward(sequences)
            layers = np.stack([output[layer].float().cpu().numpy() for layer in plan.layers])
            for row, i in enumerate(sequences.tolist()):
                part = layers[:, row, : int(plan.index.n_tokens[i])]
                file.create_dataset(names[i].replace("/", "|"), data=part.astype(np.float16))
    return path


def _write(path: Path, size: int) -> Path:
    """Write and sync ``size`` bytes: the least that storing the states takes."""
    block = np.random.default_rng(0).bytes(2**23)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    return path
