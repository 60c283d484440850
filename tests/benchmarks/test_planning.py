"""The benchmark runs, and its memory is the index, not the examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
from planning import make, measure

from kr2cache import demo


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.long
def test_planning_takes_the_memory_of_its_index(tmp_path: Path) -> None:
    make(tmp_path, "udpos", str(demo.corpus()), "train", 60_000)
    settings = {"resource": str(tiny.minilm()), "split": "train", "task": "udpos", "data": str(tmp_path)}
    result = measure({**settings, "device": "cpu"}, 1)
    assert result["sequences"] == 60_000
    # Lists of examples took 2.4 kB for each of them.
    assert result["peak_bytes"] < 2 * result["index_bytes"] + 80e6, result
    assert result["again_s"] < result["plan_s"]
