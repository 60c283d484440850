"""States that are copied from one cache to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_cache

from kr2cache import FeatureCache
from kr2cache.errors import ValueRangeError
from kr2cache.store.copying import fill_from, states_as_stored
from kr2cache.store.sharing import SharedShards


def test_what_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    truth = tiny_cache.make((3, 4), dtype="float32", layers=(0, 2), model_layers=3)
    truth.raw[1][1, 2, 0] = 7e4
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    header = tiny_cache.make((3, 4), dtype="float16", layers=(0, 2), model_layers=3).header
    header = dataclasses.replace(header, batch_plan={"shard_bytes": 2**30})
    shards = SharedShards(tmp_path / "slice", header, truth.index)
    shards.create(tmp_path)
    with pytest.raises(ValueRangeError, match="state of 's1' at layer 2 is not a finite float16"):
        fill_from(shards, lambda i: states_as_stored(header, None, [(cache, i)]), "from cache")
    assert FeatureCache.open(tmp_path / "slice").complete.tolist() == [True, False]
