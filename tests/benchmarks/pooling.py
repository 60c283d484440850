"""What does it cost to store one state a word or a sequence, and what does it save?

    python tests/benchmarks/pooling.py --task udpos-en --data DATA --limit 600

Each pooling gets its caches. KReaders are then trained on them (method kr2, fusion last4) with the same seeds, and the
reader without a resource beside them. All are scored on the test split. A training's time is that of its process, the
least of all seeds: so neither other programs nor the first seed, which makes the caches, count. Each finished training
is a line on standard error.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kr2cache import FeatureCache
from kr2cache.config import POOLS, TrainConfig
from kr2cache.experiment.pipeline import Run, train
from kr2cache.system.console import console
from kr2cache.training.runs import mean_and_std


def measure(shared: dict[str, Any], seeds: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """One row for the reader alone, and one for each pooling."""
    runs: dict[str, list[Run]] = {name: [] for name in ("alone", *POOLS)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for seed in seeds:
        for name in runs:
            settings: dict[str, Any] = {"method": "kreader"} if name == "alone" else {"pool": name}
            config = TrainConfig(
                **shared,
                **settings,
                seeds=(seed,),
                learning_rate=1e-4,
                cache_dir=folder / "caches",
                run_dir=folder / "runs",
                keep_readers=False,
            )
            started = time.process_time()
            runs[name] += train(config).runs
            seconds[name].append(time.process_time() - started)
            line = {"row": name, "seed": seed, "test": runs[name][-1].metrics["test"], "seconds": seconds[name][-1]}
            print(json.dumps(line), file=sys.stderr, flush=True)
    stored = dict.fromkeys(POOLS, 0)
    for path in {path.parent for path in (folder / "caches").rglob("*.h5")}:
        cache = FeatureCache.open(path)
        stored[cache.provenance["chosen"].get("pool", "none")] += cache.stored_bytes
    rows = []
    for name, own in runs.items():
        mean, std = mean_and_std([run.metrics for run in own])
        rows.append(
            {
                "row": name,
                "bytes": stored.get(name, 0),
                "accuracy": mean["test"]["accuracy"],
                "std": std["test"]["accuracy"],
                "seeds": [run.metrics["test"]["accuracy"] for run in own],
                "seconds": min(seconds[name]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with train, dev and test")
    parser.add_argument("--task", default="udpos-en")
    parser.add_argument("--resource", default="minilm")
    parser.add_argument("--reader", default="minilm-3")
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    console.quiet = True
    names = ("task", "data", "resource", "reader", "limit", "epochs")
    shared = {name: getattr(arguments, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(shared, tuple(map(int, arguments.seeds.split(","))), Path(folder))
    print(json.dumps({"machine": platform.platform(), "settings": vars(arguments), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
