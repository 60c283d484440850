"""No state that is not finite is ever stored, whatever its bits; it is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_cache

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import ValueRangeError

BITS = {"float16": "<u2", "bfloat16": "<u2", "float32": "<u4"}


def bits_of(value: float, dtype: str) -> int:
    """As IEEE 754 has it; bfloat16 is the upper half of float32."""
    if dtype == "float16":
        return int(np.float16(value).view(np.uint16))
    whole = int(np.float32(value).view(np.uint32))
    return whole >> 16 if dtype == "bfloat16" else whole


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_of_all_values_of_16_bits_those_that_are_not_finite_are_seen(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    states = every.view(np.float16) if dtype == "float16" else (every.astype(np.uint32) << 16).view(np.float32)
    stored = every.view(np.float16) if dtype == "float16" else every
    finite = np.isfinite(states)
    assert DTYPES[dtype].all_finite(stored[finite][:, None], None)
    assert [DTYPES[dtype].all_finite(one, None) for one in stored.reshape(-1, 1)] == finite.tolist()


def test_of_values_of_32_bits_too() -> None:
    edges = [0, 0x0000_0001, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FC0_0000, 0x7FFF_FFFF]
    values = np.array(edges + [edge | 0x8000_0000 for edge in edges], dtype=np.uint32).view(np.float32)
    assert [DTYPES["float32"].all_finite(one, None) for one in values.reshape(-1, 1)] == np.isfinite(values).tolist()


@pytest.mark.parametrize("place", [0, 7, 31_000, 65_535, 99_998, 99_999])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_one_nan_among_many_values_is_seen_wherever_it_is(place: int, dtype: str) -> None:
    truth = tiny_cache.make((100,), dtype=dtype, layers=(0,), model_layers=1, width=1_000)
    raw, scale = truth.raw[0].reshape(100, 1_000), None
    if dtype == "int8":
        scale = np.ones(100_000, dtype=np.float32)
    assert DTYPES[dtype].all_finite(raw, scale)
    values = raw.reshape(-1).view(BITS[dtype]) if scale is None else scale.view("<u4")
    values[place] = bits_of(np.nan, "float32" if scale is not None else dtype)
    assert not DTYPES[dtype].all_finite(raw, scale)


def test_nothing_is_finite() -> None:
    assert DTYPES["float16"].all_finite(np.empty((0, 4), dtype=np.float16), None)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_it_is_named_and_what_came_before_is_kept(tmp_path: Path, dtype: str, value: float) -> None:
    truth = tiny_cache.make((3, 1, 5, 2), dtype=dtype, layers=(1, 4, 6), model_layers=7)
    if dtype == "int8":
        truth.scale[2][1, 4] = value
    else:
        truth.raw[2].view(BITS[dtype])[1, 4, 3] = bits_of(value, dtype)
    folder = tmp_path / "cache"
    with pytest.raises(ValueRangeError, match=rf"A state of 's2' at layer 4 is not a finite {dtype} value"):
        tiny_cache.store(folder, truth, at_once=4)
    assert tiny_cache.marked_sequences(folder, truth) == [0, 1]


def test_what_is_complete_already_is_not_looked_at_again(tmp_path: Path) -> None:
    truth = tiny_cache.make((3, 1))
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 2**30)
    tiny_cache.write(folder, truth)
    truth.raw[0][0, 0, 0] = np.nan
    tiny_cache.write(folder, truth, at_once=2)
    assert np.isfinite(FeatureCache.open(folder)["s0"]).all()
