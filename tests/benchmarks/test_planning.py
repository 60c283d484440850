"""The benchmark runs, and its memory is the index, not the examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
from planning import make, measure

from kr2cache import demo
from kr2cache.store import plans


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
def test_planning_takes_the_memory_of_its_index(tmp_path: Path) -> None:
    make(tmp_path, "udpos", str(demo.corpus()), "train", 80_000)
    assert next(tmp_path.iterdir()).stat().st_size > plans.LARGE  # below it, every plan is made again
    settings = {"resource": str(tiny.minilm()), "split": "train", "task": "udpos", "data": str(tmp_path)}
    result = measure({**settings, "device": "cpu"}, 1)
    assert result["sequences"] == 80_000
    # Lists of examples took 2.4 kB for each of them.
    assert result["peak_bytes"] < 2 * result["index_bytes"] + 80e6, result
    # 0.03 of the time where it was seen: the files are read for their digest, and nothing is tokenised again.
    assert result["again_s"] < 0.5 * result["plan_s"], result
