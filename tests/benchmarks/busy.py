"""How fast is a training alone, and beside programs that keep the cores busy? Compares ways in which threads wait.

python tests/benchmarks/busy.py --reader minilm-3 --task udpos-de --data data/everyday --epochs 3 --repeats 3

Each training runs in its own process. The settings take turns, so that noise of the machine affects all of them.
Compare the medians. "ours" is the setting of the command line; libgomp's default is 300,000 spins.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "ours": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "no spinning": {"GOMP_SPINCOUNT": "0"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:  # ends also if this script is killed
    sum(range(1_000_000))
"""
DECIDING = ("GOMP_", "OMP_", "KMP_", "MKL_")
"""Prefixes of variables that are removed from the environment before a setting is added."""


@contextlib.contextmanager
def spinning(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside the block, ``count`` programs keep cores busy."""
    busy = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield busy
    finally:
        for one in busy:
            one.kill()
            one.wait()


def training_seconds(setting: dict[str, str], options: list[str]) -> float:
    """Seconds of one training, without program start and model loading."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(DECIDING)} | setting
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as folder:
        own = ["--method", "kreader", "--seeds", "1", "--run-dir", folder, "--device", "cpu", "--json"]
        command = [sys.executable, "-m", "kr2cache.cli", "train", *own, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        (run,) = json.loads(done.stdout)["runs"]
        recorded = json.loads((Path(run["folder"]) / "config.json").read_text("utf-8"))["recorded"]
    return float(recorded["seconds"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--spinners", type=int, default=os.cpu_count(), help="number of busy programs (default: number of cores)"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    chosen = parser.parse_args(arguments)
    options = ["--reader", chosen.reader, "--task", chosen.task, "--data", str(chosen.data.absolute())]
    options += ["--epochs", chosen.epochs]
    conditions = sorted({0, chosen.spinners})
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(chosen.repeats):
        for spinners in conditions:
            for name in chosen.settings:
                with spinning(spinners):
                    seconds.setdefault((name, spinners), []).append(training_seconds(SETTINGS[name], options))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{os.cpu_count()} cores, load {load:.1f} at the end")
    print(f"{'number of busy programs':24}", *(f"{spinners:>8}" for spinners in conditions))
    for name in chosen.settings:
        medians = (statistics.median(seconds[name, spinners]) for spinners in conditions)
        print(f"{name:24}", *(f"{median:6.3g} s" for median in medians))


if __name__ == "__main__":
    main()
