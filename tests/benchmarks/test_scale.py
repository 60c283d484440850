"""The simulation runs, and FeatureCache opens its cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_simulated_cache_opens_and_is_sampled(tmp_path: Path) -> None:
    script = Path(__file__).with_name("scale.py")
    child = subprocess.run(
        [sys.executable, str(script), "--sequences", "3000", "--parts", "3", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "3,000 sequences, 3 folders, 3 shards" in child.stdout
    values = dict(line.split() for line in child.stdout.splitlines()[1:])
    assert values["sequences"] == "3,000"
    assert float(values["batches_per_s"].replace(",", "")) > 0
