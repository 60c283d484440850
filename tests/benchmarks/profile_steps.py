"""Where does the time of a sweep go? Profiles training steps, evaluation and the work between them.

python tests/benchmarks/profile_steps.py --data FOLDER --task udpos-en --limit 600
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

from kr2cache.bench.ablation import FUSIONS
from kr2cache.config import TrainConfig
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.shared import Shared

PARTS = {
    "backward passes": "method 'run_backward'",
    "forward passes": "kreader.py:forward",
    "updates (AdamW)": "_fused_adamw_",
    "gradient clipping": "accelerator.py:clip_grad_norm_",
    "evaluation": "evaluate.py:predict",
    "batches from the cache": "batches.py:__call__",
    "loading the reader": "checkpoint.py:task_model",
    "writing the run": "train.py:write_trained",
    "finding caches, reading and tokenising": "prepare.py:prepare",
    "collecting garbage": "gc.collect",
}
"""Item to its function: FILE:NAME, or part of the name of a built-in. Forward passes of an evaluation
count in both items."""


def cumulative(stats: pstats.Stats, function: str) -> float:
    """Seconds in all functions with this name, including the functions that they call."""
    total = 0.0
    for (path, _, name), (_, _, _, seconds, _) in stats.stats.items():  # type: ignore[attr-defined]
        inside = f"{Path(path).name}:{name}" == function if ".py:" in function else function in name
        total += seconds if inside else 0.0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--reader", default="minilm-3")
    parser.add_argument("--resource", default="minilm")
    parser.add_argument("--epochs", type=float, default=1.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = TrainConfig(
            task=arguments.task,
            reader=arguments.reader,
            resource=arguments.resource,
            data=arguments.data,
            limit=arguments.limit,
            seeds=(1, 2, 3),
            epochs=arguments.epochs,
            device="cpu",
            cache_dir=Path(folder) / "caches",
            run_dir=Path(folder) / "runs",
            keep_readers=False,
        )
        train(TrainConfig(**{**vars(base), "seeds": (9,), "epochs": 0.01}))  # makes the caches and does lazy imports
        shared, profile = Shared(), cProfile.Profile()
        started = time.perf_counter()
        profile.enable()
        results = [train(TrainConfig(**{**vars(base), "fusion": name}), shared) for name in FUSIONS]
        profile.disable()
        whole = time.perf_counter() - started
    steps = sum(run.step_seconds or 0.0 for result in results for run in result.runs)
    stats = pstats.Stats(profile)
    evaluation = cumulative(stats, PARTS["evaluation"])
    print(
        f"{len(FUSIONS)} fusions x 3 seeds: {whole:.1f} s, training steps {steps:.1f} s (ratio {whole / steps:.3f}), "
    )
    print(f"{evaluation:.1f} s evaluation; without evaluation {(whole - evaluation) / steps:.3f} of the steps")
    items = sorted(((cumulative(stats, function), name) for name, function in PARTS.items()), reverse=True)
    for seconds, name in items:
        print(f"  {name:40} {seconds:7.2f} s  {100 * seconds / whole:5.1f} %")


if __name__ == "__main__":
    main()
