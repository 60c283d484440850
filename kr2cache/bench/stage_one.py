"""Stage one: how much of an extraction is the forward pass that nobody can leave out?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from kr2cache import models
from kr2cache.bench import BenchConfig, Race, race, size_text
from kr2cache.cache.shard import open_shard
from kr2cache.encode import length_sorted_batches
from kr2cache.extract import extract, fill, hidden_states
from kr2cache.planning import ExtractPlan, plan_extraction
from kr2cache.prepacked import prepacked_weights

TARGET = 1 / 0.97
ROWS_AT_ONCE = 32
"""Batch size of the plain loop, as most scripts have it."""


def run(config: BenchConfig, folder: Path) -> tuple[Race, ExtractPlan]:
    """The forward pass alone; ours, all of it on disk; and what scripts do today. And the plan of the extraction."""
    plan = plan_extraction(replace(config.extraction, cache_dir=folder / "first"))
    header = open_shard(next(extract(plan).cache.glob("*.h5"))).header
    encoder, _ = models.open_encoder(plan.spec)
    batches = length_sorted_batches(
        plan.index.n_tokens, int(header.batch_plan["tokens_per_batch"]), padded=bool(header.batch_plan["padded"])
    )
    names = [raw.decode("utf-8") for raw in plan.index.ids.tolist()]
    numbers = itertools.count()

    def states(sequences: NDArray[np.intp]) -> list[NDArray[np.float32]]:
        """Layers of (B, T, D)."""
        output = hidden_states(
            encoder, plan.index, sequences, pad_id=plan.pad_id, compute_dtype=plan.config.compute_dtype
        )
        return [output[layer].float().cpu().numpy() for layer in plan.layers]

    def forward_alone() -> None:
        for batch in batches:
            states(batch)

    def prepacked() -> None:
        with prepacked_weights(encoder, plan.tokens):
            forward_alone()

    def ours() -> None:
        fill(plan, encoder, folder / f"ours-{next(numbers)}", header)

    def loop(rows: int) -> None:
        """In the data's order, padded, one HDF5 data set a sequence."""
        with h5py.File(folder / f"loop-{next(numbers)}.h5", "w") as file:
            for start in range(0, len(names), rows):
                sequences = np.arange(start, min(start + rows, len(names)))
                layers = np.stack(states(sequences))
                for row, i in enumerate(sequences.tolist()):
                    part = layers[:, row, : int(plan.index.n_tokens[i])]
                    file.create_dataset(names[i].replace("/", "|"), data=part.astype(np.float16))

    stage_one = race(
        "stage one",
        f"{size_text(len(names), plan.state_bytes)} of states, {plan.tokens:,} tokens",
        {
            "length-sorted forward pass alone, nothing stored": forward_alone,
            "kr2cache extract": ours,
            "its own forward pass alone (weights prepacked for oneDNN)": prepacked,
            f"plain loop in data order, batches of {ROWS_AT_ONCE}, a data set each": lambda: loop(ROWS_AT_ONCE),
            "one sequence at a time, a data set each": lambda: loop(1),
        },
        repeats=config.repeats,
        target=TARGET,
    )
    return stage_one, plan
