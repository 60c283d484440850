"""The dtypes of stored states: the type on disk, and the conversion of states to stored values and back.

``DTYPES`` has one record for each dtype; no other module depends on the name of a dtype. Shape letters: D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.errors import ValueRangeError

SCALE_BYTES = 4
"""Bytes of one scale, a float32."""
FLOAT16, FLOAT32 = np.dtype("<f2"), np.dtype("<f4")
FLOAT32_INFINITY = 0x7F80_0000


@dataclass(frozen=True, kw_only=True)
class StoredDtype:
    """A dtype whose stored values are the states themselves. Other dtypes replace ``decode`` and ``encode``."""

    name: str
    """The name in ``--dtype``, in a shard's attributes, and of torch's type of the stored values."""
    on_disk: np.dtype[Any]
    """NumPy's type of the stored values."""
    read_as: np.dtype[Any]
    """NumPy's type of the states that reading returns."""
    infinity: int
    """The bits of infinity: in a stored value, or in a scale if rows have scales."""
    has_scales: bool = False
    """Whether each row has a float32 scale."""
    overflow_remedy: str = ""
    """The advice to users if a state is too large for this dtype; empty if no other dtype helps."""

    @property
    def is_exact(self) -> bool:
        """Whether reading returns the stored values unchanged."""
        return self.on_disk == self.read_as and not self.has_scales

    def row_bytes(self, width: int) -> int:
        """Bytes of one row, which is one layer of one token, with its scale."""
        return width * self.on_disk.itemsize + (SCALE_BYTES if self.has_scales else 0)

    def encode(self, states: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Convert floating-point states to stored values.

        Args:
            states: Shape (rows, D).

        Returns:
            Stored values, (rows, D), not finite where the dtype cannot hold a state; the scales, (rows,), or None if
            rows have no scales.
        """
        with np.errstate(over="ignore"):
            return states.astype(self.on_disk), None

    def decode(self, raw: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.floating]:
        """Convert stored values to states of ``read_as``: the same array if ``is_exact``, else a copy.

        Args:
            raw: Stored values, shape (..., D).
            scale: The scales, shape (...,), if rows have scales.
        """
        return raw

    def all_finite(self, raw: NDArray[Any], scale: NDArray[np.float32] | None) -> bool:
        """Whether no stored value is inf or nan, from the bits.

        Read as integers, inf and nan are the largest values of either sign. Two maxima take a tenth of the time of
        ``isfinite`` and no memory for its result.
        """
        values = raw if scale is None else scale
        bits, width = values.reshape(-1), values.itemsize
        if not bits.size:
            return True
        sign = 1 << (8 * width - 1)
        return bool(
            bits.view(f"i{width}").max() < self.infinity and bits.view(f"u{width}").max() < sign | self.infinity
        )


class BFloat16(StoredDtype):
    """The upper 16 bits of a float32, stored as uint16."""

    def encode(self, states: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        bits = np.ascontiguousarray(states, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)  # to even
        return np.where(np.isnan(states), np.uint16(0x7FC0), rounded), None

    def decode(self, raw: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.floating]:
        return (raw.astype(np.uint32) << 16).view(np.float32)


class ScaledInt8(StoredDtype):
    """Integers from -127 to 127; state = value * scale of its row."""

    def encode(self, states: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        with np.errstate(invalid="ignore"):
            values, scale = quantise(states.astype(np.float32, copy=False), np)
            return values.astype(np.int8), scale

    def decode(self, raw: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.floating]:
        assert scale is not None, "int8 rows have scales"
        return raw.astype(np.float32) * scale[..., None]


def not_finite(
    name: bytes, stored: StoredDtype, layers: Sequence[int], raw: NDArray[Any], scale: NDArray[np.float32] | None
) -> ValueRangeError:
    """The error for a sequence with a stored value that is inf or nan.

    Args:
        name: The id of the sequence.
        stored: The dtype.
        layers: The stored layers, by their numbers in the model.
        raw: Its stored values, layer by layer: (rows, D).
        scale: (rows,) the scales, if rows have scales.
    """
    values = stored.decode(raw, None) if scale is None else scale[:, None]
    row = int(np.argmin(np.isfinite(values).all(axis=1)))
    layer = layers[row // (len(raw) // len(layers))]
    is_nan = bool(np.isnan(values[row]).any())
    remedy = stored.overflow_remedy
    if is_nan or not remedy:
        remedy = (
            "The model computed this value, so no other --dtype helps. Choose another checkpoint. If --compute-dtype "
            "is not float32, try float32."
        )
    return ValueRangeError(
        f"A state of {name.decode('utf-8')!r} at layer {layer} is not a finite {stored.name} value"
        f"{': it is nan' if is_nan else ''}.",
        remedy,
    )


def quantise(rows: Any, xp: Any) -> tuple[Any, Any]:
    """Scale each row to -127 ... 127 and round to the nearest integer, halves to even.

    Args:
        rows: Float32 states, shape (rows, D), of NumPy or torch.
        xp: The module that ``rows`` belongs to: ``numpy`` or ``torch``.

    Returns:
        The integers as float32, (rows, D), and each row's scale (largest magnitude / 127), (rows,).
    """
    largest = xp.amax(xp.abs(rows), axis=1)
    # The divisor is an array: a GPU divides by a Python number as a product with 1 / 127, which rounds differently.
    scale = largest / xp.full_like(largest, 127.0)
    safe = xp.where(scale > 0, scale, xp.ones_like(scale))
    return xp.round(rows / safe[:, None]), scale


DTYPES: dict[str, StoredDtype] = {
    dtype.name: dtype
    for dtype in (
        StoredDtype(
            name="float16",
            on_disk=FLOAT16,
            read_as=FLOAT16,
            infinity=0x7C00,
            overflow_remedy="float16 ends at 65,504: --dtype bfloat16 or float32 holds larger values.",
        ),
        StoredDtype(name="float32", on_disk=FLOAT32, read_as=FLOAT32, infinity=FLOAT32_INFINITY),
        BFloat16(name="bfloat16", on_disk=np.dtype("<u2"), read_as=FLOAT32, infinity=0x7F80),
        ScaledInt8(name="int8", on_disk=np.dtype("|i1"), read_as=FLOAT32, infinity=FLOAT32_INFINITY, has_scales=True),
    )
}
"""The dtypes by name."""
