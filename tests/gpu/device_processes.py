"""Extractions in processes of their own: start one, kill one, compare the caches they write."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from device_scene import Scene

from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError

PATIENCE_S = 120.0
"""After this many seconds, a process that should end by itself counts as hanging."""


def start_extract(scene: Scene, split: str, cache_dir: Path) -> subprocess.Popen[bytes]:
    options = {
        "--resource": scene.resource,
        "--split": split,
        "--task": "udpos",
        "--data": scene.corpus,
        "--cache-dir": cache_dir,
        "--device": scene.device,
        "--tokens-per-batch": scene.scale.tokens_per_batch,
    }
    command = [sys.executable, "-m", "kr2cache.cli", "extract"]
    command += [str(word) for option in options.items() for word in option]
    return subprocess.Popen(command, cwd=scene.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_in_the_middle(job: subprocess.Popen[bytes], cache_dir: Path) -> float:
    """Kill a running extraction; returns the share of sequences that were complete."""
    deadline = time.monotonic() + PATIENCE_S
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        with contextlib.suppress(CacheError, StopIteration):
            if FeatureCache.open(only_cache(cache_dir, "train")).complete.any():
                break
    job.send_signal(signal.SIGKILL)
    output = job.communicate(timeout=PATIENCE_S)[1].decode("utf-8", "replace")
    assert job.returncode == -signal.SIGKILL, f"it ended by itself, with exit code {job.returncode}: {output}"
    return float(FeatureCache.open(only_cache(cache_dir, "train")).complete.mean())


def only_cache(cache_dir: Path, split: str) -> Path:
    return next(path.parent for path in (cache_dir / "udpos" / split).glob("*/shard-*.h5"))


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.h5"))
    return names == sorted(path.name for path in other.glob("*.h5")) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )
