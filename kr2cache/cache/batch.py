"""A batch of sequences read from a cache, and the memory that it is read into.

Shape letters: B sequences, L layers, T tokens of one sequence, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import offsets
from kr2cache.errors import ConfigError


@dataclass(frozen=True)
class PackedBatch:
    """Several sequences, one after the other and without padding; ``batch[i]`` is one of them, (L, T_i, D)."""

    states: NDArray[np.floating]
    """(rows, D), rows = L * sum of T_i"""
    n_tokens: NDArray[np.int32]
    """(B,)"""
    layers: tuple[int, ...]
    """The model's layer numbers, in the order of the L axis."""

    @cached_property
    def first_row(self) -> NDArray[np.int64]:
        """(B+1,)"""
        return offsets(self.n_tokens) * len(self.layers)

    def __len__(self) -> int:
        return len(self.n_tokens)

    def __getitem__(self, i: int) -> NDArray[np.floating]:
        rows = self.states[self.first_row[i] : self.first_row[i + 1]]
        return rows.reshape(len(self.layers), int(self.n_tokens[i]), -1)


def output_rows(out: NDArray[np.floating], rows: int, width: int, dtype: np.dtype[Any]) -> NDArray[np.floating]:
    """The first rows of ``out``, shape (rows, width).

    Raises:
        ConfigError: If ``out`` is not a writable, contiguous array of ``dtype`` with enough rows of ``width``.
    """
    is_array = isinstance(out, np.ndarray)
    if (
        is_array
        and out.ndim == 2
        and len(out) >= rows
        and out.shape[1] == width
        and out.dtype == dtype
        and out.flags.c_contiguous
        and out.flags.writeable
    ):
        return out[:rows]
    found = f"a {type(out).__name__}"
    if is_array:
        found = f"{out.dtype} of shape {out.shape}{'' if out.flags.writeable else ', read-only'}"
        found += "" if out.flags.c_contiguous else ", not contiguous"
    raise ConfigError(
        f"out is {found}. The batch needs a writable array of {dtype}, {rows:,} or more rows of {width}, contiguous.",
        "cache.buffer(sequences) makes one that any so many sequences have room in.",
    )
