"""All ways of reading run, and they give the same states."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import larger
import numpy as np
import pytest

from kr2cache.cache import rows
from kr2cache.cache.reader import FeatureCache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_every_way_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, apart = tmp_path / "cache", tmp_path / "apart.h5"
    larger.make(cache, apart, 40)
    with h5py.File(apart) as file:
        for name, states in zip(larger.names_of(40), FeatureCache.open(cache).batch(larger.names_of(40)), strict=True):
            np.testing.assert_array_equal(file[name][...].reshape(states.shape), states)
    monkeypatch.setattr(rows, "MEMORY_SHARE", 0)
    monkeypatch.setattr(larger, "TURN_S", 0.02)
    monkeypatch.setattr(larger, "TURNS", 2)
    larger.read(cache, apart, 40)
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line[:30].strip() for line in lines] == [
        "kr2cache, FeatureCache.batch",
        "the same, without read-ahead",
        "h5py, a data set per sequence",
    ]
    for line in lines:
        ratio, speed, _ = (float(word.replace(",", "")) for word in line[32:].split())
        assert ratio > 0
        assert speed > 0
