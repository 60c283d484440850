"""Does stage one's memory grow with the data? Peak resident memory of extractions, each in its own process.

python tests/benchmarks/memory.py --resource MODEL --data FOLDER --task udpos-en --limit 2000 --limit 12544
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import resource, sys
from kr2cache.system.allocator import keep_free_memory
from kr2cache.cli import run
keep_free_memory()  # as the command line does
code = run(["extract", "--split", "train", "--device", "cpu", *sys.argv[1:]])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in one unit of ``ru_maxrss``."""


def peak_mb(resource: Path, data: Path, task: str, limit: int) -> float:
    """Peak resident memory, in MB, of extracting the first ``limit`` training sentences into a fresh cache."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--resource", str(resource), "--data", str(data.absolute()), "--task", task, "--limit", str(limit)]
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments, "--cache-dir", folder],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    code, peak = child.stdout.split()[-2:]
    if code != "0":
        raise RuntimeError(child.stderr)
    return int(peak) * UNIT / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resource", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument(
        "--limit", type=int, action="append", required=True, help="number of sentences; may be given several times"
    )
    arguments = parser.parse_args()
    first = 0.0
    for limit in arguments.limit:
        peak = peak_mb(arguments.resource.absolute(), arguments.data, arguments.task, limit)
        first = first or peak
        print(f"{limit:>9,} sentences  peak {peak:7.1f} MB  {peak / first:5.2f} of the first")


if __name__ == "__main__":
    main()
