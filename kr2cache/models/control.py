"""Controls: models whose weights are drawn by a seed instead of loaded, as their architecture draws them at first.

The drawn numbers are the same on every machine. torch's own are not: its normal numbers come from logarithms and
cosines, whose last bits depend on the processor. Here they are sums of random bits, which are exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

AT_ONCE = 2**18
"""Numbers that are drawn together: 6 MB of random bits."""


@contextlib.contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Inside, torch fills tensors with normal and uniform numbers that ``seed`` alone decides. Afterwards its random
    state is as before.
    """
    with torch.random.fork_rng(devices=[]), _ExactDraws(seed):
        torch.manual_seed(seed)  # for everything that draws in another way
        yield


class _ExactDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes the place of torch's ``normal_`` and ``uniform_``."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bits = np.random.PCG64(seed)  # NumPy promises the same bits from every version

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.normal_.default:
            tensor, mean, std = _bound(args, kwargs, mean=0.0, std=1.0)
            return self._fill(tensor, self._normal, mean, std)
        if func is torch.ops.aten.uniform_.default:
            tensor, low, high = _bound(args, kwargs, **{"from": 0.0, "to": 1.0})
            return self._fill(tensor, self._uniform, low, high - low)
        return func(*args, **kwargs)

    def _fill(self, tensor: Tensor, draw: Any, shift: float, scale: float) -> Tensor:
        """Set ``tensor`` to ``shift + scale * draw(n)``, in float32."""
        if tensor.is_meta:
            return tensor
        n = tensor.numel()
        parts = [draw(min(AT_ONCE, n - start)) for start in range(0, n, AT_ONCE)]
        values = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        values *= np.float32(scale)
        values += np.float32(shift)
        return tensor.copy_(torch.from_numpy(values).view(tensor.shape))

    def _normal(self, n: int) -> NDArray[np.float32]:
        """(n,) numbers of mean 0 and variance 1: each is a sum of twelve uniform ones, so none is beyond 6."""
        words = self._bits.random_raw(3 * n).astype("<u8", copy=False).view("<u2").reshape(12, n)
        centred = words.sum(axis=0, dtype=np.int32) - 6 * 65535
        return _float32(centred, -16)

    def _uniform(self, n: int) -> NDArray[np.float32]:
        """(n,) numbers from 0 to 1, without 1."""
        return _float32(self._bits.random_raw(n) >> np.uint64(40), -24)


def _float32(numbers: NDArray[np.integer[Any]], exponent: int) -> NDArray[np.float32]:
    """``numbers`` times 2^exponent, exact for less than 25 bits."""
    exact: NDArray[np.float32] = np.ldexp(numbers.astype(np.float32), exponent)
    return exact


def _bound(args: Any, kwargs: Any, **defaults: float) -> tuple[Any, ...]:
    """The tensor, and the numbers of the call in the order of ``defaults``."""
    tensor, *given = args
    rest = list(defaults.items())[len(given) :]
    return (tensor, *given, *(kwargs.get(name, default) for name, default in rest))
