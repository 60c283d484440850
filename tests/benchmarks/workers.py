"""How much faster do several workers extract?  ``kr2cache extract --workers N`` for each N, in turns, into new caches.

python tests/benchmarks/workers.py --resource minilm --data FOLDER --task udpos-en --limit 2000 --limit 12544

All of them use the same shards and as many threads each, and the files are compared, byte for byte. A second limit
shows the speed without the start: the further sentences, divided by the further time.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Measured:
    """One extraction."""

    cache: Path
    sequences: int
    seconds: float
    """Of the whole command."""
    cpu_seconds: float
    """Of the driver and its workers together."""


def extract(arguments: Sequence[str], cache_dir: Path, workers: int, threads: int) -> Measured:
    """Run the command in processes of their own.

    Args:
        arguments: More options of ``kr2cache extract``.
        workers: Given as ``--workers``; with 1, the command itself does the work.
        threads: Of each process that computes.
    """
    command = [sys.executable, "-m", "kr2cache.cli", "extract", *arguments, "--cache-dir", str(cache_dir), "--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, "--workers", str(workers), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr)
    made = json.loads(done.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(Path(made["cache"]), made["sequences"], seconds, cpu)


def same_files(one: Path, other: Path) -> bool:
    """Whether two caches have the same files with the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def measure(
    arguments: Sequence[str], folder: Path, counts: Sequence[int], threads: int, rounds: int
) -> dict[int, list[Measured]]:
    """For each number of workers, so many extractions, in turns.

    Raises:
        RuntimeError: If the files differ from those of the first.
    """
    results: dict[int, list[Measured]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        first: Measured | None = None
        for _ in range(rounds):
            for count in counts:
                with tempfile.TemporaryDirectory(dir=folder) as cache_dir:
                    place = Path(kept) if first is None else Path(cache_dir)
                    made = extract(arguments, place, count, threads)
                    first = first or made
                    if made is not first and not same_files(first.cache, made.cache):
                        raise RuntimeError(f"{count} workers made other files than {counts[0]}.")
                results[count].append(made)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resource", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument(
        "--limit", type=int, action="append", required=True, help="number of sentences; may be given several times"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-gb", default="0.03125")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default the temporary folder")
    options = parser.parse_args()
    seconds: dict[tuple[int, int], float] = {}
    for limit in options.limit:
        arguments = ["--resource", options.resource, "--data", str(options.data.absolute()), "--task", options.task]
        arguments += ["--split", "train", "--limit", str(limit), "--shard-gb", options.shard_gb]
        results = measure(arguments, options.folder, options.workers, options.threads, options.rounds)
        print(f"{limit:,} sentences, {options.threads} threads in each worker, the same bytes each time")
        for count, made in results.items():
            seconds[limit, count] = took = median(one.seconds for one in made)
            cpu = median(one.cpu_seconds for one in made)
            spread = f"{min(one.seconds for one in made):.1f} to {max(one.seconds for one in made):.1f}"
            speed = f"{made[0].sequences / took:7,.0f} sequences/s"
            print(f"  {count} workers {took:7.1f} s ({spread})  {speed}  {cpu:7.1f} s of CPU")
    if len(options.limit) > 1:
        few, many = min(options.limit), max(options.limit)
        print(f"without the start ({few:,} to {many:,} sentences)")
        for count in options.workers:
            speed = (many - few) / (seconds[many, count] - seconds[few, count])
            print(f"  {count} workers {speed:7,.0f} sequences/s")


if __name__ == "__main__":
    main()
