"""How fast are claims on one directory?

python tests/benchmarks/claims.py --folder /shared/disk
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

from kr2cache.system.claims import try_claim

SECONDS = 2.0


def claim_and_release(place: Path, process: int, start: float) -> int:
    """For some seconds, claim and release units that no other process wants. Returns how many there were."""
    time.sleep(max(0.0, start - time.time()))
    count = 0
    while time.time() < start + SECONDS:
        claim = try_claim(place, f"unit-{process}-{count}")
        assert claim is not None
        claim.release()
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for processes in (1, 2, 4, 8):
            start = time.time() + 2.0
            tasks = [(Path(folder) / "place", process, start) for process in range(processes)]
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                rate = sum(pool.starmap(claim_and_release, tasks, chunksize=1)) / SECONDS
            print(f"{processes} processes: {rate:7,.0f} claims/s, {1000 * processes / rate:5.2f} ms each")


if __name__ == "__main__":
    main()
