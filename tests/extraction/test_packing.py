"""Padded layers become the rows of the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.format import SequenceIndex
from kr2cache.extraction.packing import HostBuffers, Packer

CPU = torch.device("cpu")


def index(lengths: list[int]) -> SequenceIndex:
    tokens = sum(lengths)
    return SequenceIndex(
        ids=np.array([f"s{i}".encode() for i in range(len(lengths))]),
        n_tokens=np.array(lengths, dtype=np.int32),
        text_xxh3=np.zeros(len(lengths), dtype=np.uint64),
        input_id=np.zeros(tokens, dtype=np.int32),
        word_index=np.zeros(tokens, dtype=np.int32),
    )


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [7, 7, 3, 3, 3, 1], [4, 9, 4]])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_rows_are_the_valid_positions_layer_by_layer(lengths: list[int], dtype: str) -> None:
    draw = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(len(lengths), max(lengths), 6, generator=draw) for _ in range(4))
    (packed,) = Packer(index(lengths), [0, 2, 3], dtype, CPU)(np.arange(len(lengths)), layers)
    rows = [layers[layer][i, :length] for i, length in enumerate(lengths) for layer in (0, 2, 3)]
    expected = torch.cat(rows).to(getattr(torch, dtype))
    given = torch.from_numpy(packed.raw)
    assert torch.equal(given.view(torch.bfloat16) if dtype == "bfloat16" else given, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_what_is_held_stays_while_other_batches_are_packed(dtype: str) -> None:
    pack = Packer(index([3, 3]), [0, 1], dtype, CPU)
    draw = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(2, 3, 4, generator=draw) for _ in range(2)) for _ in range(6)]
    held = [next(pack(np.arange(2), layers)).raw[:5] for layers in batches]  # of each a part, as a writer has it
    alone = [next(Packer(index([3, 3]), [0, 1], dtype, CPU)(np.arange(2), layers)).raw[:5] for layers in batches]
    for given, expected in zip(held, alone, strict=True):
        np.testing.assert_array_equal(given, expected)


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    buffers = HostBuffers(pinned=False)
    half, bits = (torch.float16, np.dtype("<f2")), (torch.bfloat16, np.dtype("<u2"))
    place = buffers.empty(100, 8, *half)[1].ctypes.data
    held = buffers.empty(99, 8, *half)[1]  # a little less, of the same place
    assert held.ctypes.data == place
    part = held[3:]
    del held
    other = buffers.empty(100, 8, *half)[1]
    assert other.ctypes.data != place, "a part of it is still held"
    del part
    again, stored = buffers.empty(100, 8, *bits)
    assert (again.data_ptr(), stored.ctypes.data) == (place, place)
    assert stored.dtype == np.uint16


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan, 1e5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_what_the_dtype_cannot_hold_is_seen_in_what_is_packed(value: float, dtype: str) -> None:
    layers = tuple(torch.full((2, 3, 4), -1.0) for _ in range(3))
    layers[2][1, 1, 3] = value
    (packed,) = Packer(index([3, 2]), [0, 1, 2], dtype, CPU)(np.arange(2), layers)
    holds = value == 1e5 and dtype != "float16"
    assert DTYPES[dtype].all_finite(packed.raw, packed.scale) == holds
    first = None if packed.scale is None else packed.scale[:9]
    assert DTYPES[dtype].all_finite(packed.raw[:9], first), "the sequence before it"
