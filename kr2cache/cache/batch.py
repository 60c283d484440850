"""A batch of sequences read from a cache, and the memory for it.

Shape letters: B sequences, L layers, T_i tokens of sequence i, D width.
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
    """Several sequences, one after the other, without padding. ``batch[i]`` is sequence i, shape (L, T_i, D)."""

    states: NDArray[np.floating]
    """(rows, D), rows = L * sum of T_i"""
    n_tokens: NDArray[np.int32]
    """(B,) T_i of each sequence."""
    layers: tuple[int, ...]
    """The model's layer numbers, in the order of the L axis."""

    @cached_property
    def first_row(self) -> NDArray[np.int64]:
        """(B+1,) the first row of each sequence in ``states``, then the number of rows."""
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
        f"out is {found}. It must be a writable, contiguous array of {dtype} with {rows:,} or more rows of {width}.",
        "cache.buffer(sequences) makes an array that is large enough for so many sequences.",
    )
