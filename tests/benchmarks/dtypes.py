"""How exact are states stored as float16, bfloat16 or int8, and how do they change a tagging score?

    python tests/benchmarks/dtypes.py --data DATA --resource minilm --reader minilm-3 --limit 600

Each dtype gets a cache, which is read back. The error of a state is the norm of its difference from the float32 state,
divided by the norm of the float32 state. The error of a value is relative to the largest magnitude in its state.
KReaders are then trained on each cache (method kr2, fusion last4) with the same seeds, and scored on the test split.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import numpy as np

from kr2cache import FeatureCache
from kr2cache.cache.dtypes import DTYPES
from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.experiment.pipeline import train
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import plan_extraction
from kr2cache.system.console import console
from kr2cache.training.runs import mean_and_std


def errors(exact: FeatureCache, rounded: FeatureCache) -> dict[str, float]:
    """Mean and largest relative error of a state, and largest relative error of a value."""
    relative, worst = [], 0.0
    for name in exact.ids:
        states, others = exact[name].astype(np.float64), rounded[name].astype(np.float64)
        difference = others - states
        relative.append((np.linalg.norm(difference, axis=2) / np.linalg.norm(states, axis=2)).ravel())
        peak = np.abs(states).max(axis=2, keepdims=True)
        worst = max(worst, float((np.abs(difference) / peak).max()))
    joined = np.concatenate(relative)
    return {"mean": float(joined.mean()), "largest": float(joined.max()), "value": worst}


def measure(
    data: str, task: str, resource: str, reader: str, limit: int, seeds: tuple[int, ...]
) -> list[dict[str, object]]:
    """One row for each dtype."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        exact: FeatureCache | None = None
        for dtype in ("float32", *(name for name in DTYPES if name != "float32")):
            cache_dir = Path(folder) / dtype
            config = ExtractConfig(
                resource=resource, split="test", task=task, data=data, dtype=dtype, limit=limit, cache_dir=cache_dir
            )
            cache = FeatureCache.open(extract(plan_extraction(config)).cache)
            exact = exact or cache
            row: dict[str, object] = {"dtype": dtype, "bytes": cache.stored_bytes, **errors(exact, cache)}
            if seeds:
                result = train(
                    TrainConfig(
                        task=task,
                        reader=reader,
                        resource=resource,
                        data=data,
                        limit=limit,
                        seeds=seeds,
                        epochs=3,
                        learning_rate=1e-4,
                        dtype=dtype,
                        cache_dir=cache_dir,
                        run_dir=cache_dir / "runs",
                        keep_readers=False,
                    )
                )
                mean, std = mean_and_std([run.metrics for run in result.runs])
                row |= {"accuracy": mean["test"]["accuracy"], "std": std["test"]["accuracy"]}
                row["seeds"] = [run.metrics["test"]["accuracy"] for run in result.runs]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="udpos-en")
    parser.add_argument("--resource", default="minilm")
    parser.add_argument("--reader", default="minilm-3")
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--seeds", default="1,2,3", help="empty: only errors, no training")
    arguments = parser.parse_args()
    console.quiet = True
    seeds = tuple(int(seed) for seed in arguments.seeds.split(",") if seed)
    rows = measure(arguments.data, arguments.task, arguments.resource, arguments.reader, arguments.limit, seeds)
    print(json.dumps({"machine": platform.platform(), "settings": vars(arguments), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
