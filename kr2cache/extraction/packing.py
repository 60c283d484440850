"""Pack the padded layers of a batch into rows of the stored dtype, without padding.

Shape letters: B sequences, T positions (padded), L stored layers, D width.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES, FLOAT32, quantise
from kr2cache.cache.format import SequenceIndex, offsets
from kr2cache.cache.pooling import Pooling
from kr2cache.cache.writer import PackedStates
from kr2cache.models.states import means, moved


class HostBuffers:
    """Host memory for packed batches. A buffer is reused when its batch is no longer referenced.

    New memory for each batch would cost a page fault for every 4 KB.
    """

    def __init__(self, *, pinned: bool) -> None:
        """
        Args:
            pinned: Use page-locked memory, to which a GPU can copy asynchronously.
        """
        self.pinned = pinned
        self._free: list[torch.Tensor] = []

    def empty(
        self, rows: int, width: int, dtype: torch.dtype, on_disk: np.dtype[Any]
    ) -> tuple[torch.Tensor, NDArray[Any]]:
        """Memory with undefined values, shape (rows, width).

        Args:
            dtype: Torch's dtype of the tensor.
            on_disk: NumPy's dtype of the array, with as many bytes per value.

        Returns:
            A tensor to fill, and a NumPy array of the same memory to keep. The memory is reused when the array and all
            its views are deleted, even if the tensor still exists.
        """
        size = rows * width * dtype.itemsize
        buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer) < size:
            # Batches differ a little in size. Round the size up, so that the next batch fits too.
            step = 2 ** max(0, size.bit_length() - 4)
            buffer = torch.empty(-(-size // step) * step, dtype=torch.uint8, pin_memory=self.pinned)
        tensor = buffer[:size].view(dtype).view(rows, width)
        memory = tensor.view(torch.uint8).numpy()  # as bytes, since NumPy lacks some dtypes of torch
        weakref.finalize(memory, self._free.append, buffer).atexit = False
        return tensor, memory.view(on_disk)


class Packer:
    """Packs the padded layers of a batch into rows of the stored dtype, ready for the disk.

    On a GPU, valid positions are gathered and converted on the device. A separate stream then copies them into pinned
    memory. While one batch is copied, the model computes the next batch. So ``__call__`` returns the previous batch.
    """

    def __init__(
        self,
        index: SequenceIndex,
        layers: Sequence[int],
        dtype: str,
        device: torch.device,
        pooling: Pooling | None = None,
    ) -> None:
        """
        Args:
            index: All sequences of the cache, with the tokens that the model reads.
            layers: Model layer numbers to store.
            dtype: The stored dtype, a key of ``DTYPES``.
            device: The device of the states.
            pooling: How the states are pooled; None if each token's state is stored.
        """
        self.index = index
        self.pooling = pooling
        self.layers = layers
        self.dtype = DTYPES[dtype]
        self.torch_dtype: torch.dtype = getattr(torch, self.dtype.name)
        self.device = device
        self._waiting: list[tuple[Any, PackedStates]] = []
        self._buffers = HostBuffers(pinned=device.type == "cuda")
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: NDArray[np.intp], layers_BTD: tuple[torch.Tensor, ...]) -> Iterator[PackedStates]:
        """Pack a batch; yield this batch on a CPU, and the previous batch, if any, on a GPU.

        Args:
            batch: (B,) positions of the sequences in the index.
            layers_BTD: All layers of the model, each (B, T, D).
        """
        lengths = self.index.n_tokens[batch]
        sequences = batch.tolist()
        states = None if self.pooling is None else self._pooled(self.pooling, batch, layers_BTD)
        if self.device.type == "cuda":
            raw, scale = self._encode(self._gather(layers_BTD, lengths) if states is None else states)
            self._waiting.append(self._start_copy(sequences, raw, scale))
            if len(self._waiting) > 1:
                yield self._finish_copy()
            return
        if states is None:
            packed, stored = self._copy_out(layers_BTD, lengths)
        else:
            packed, stored = self._memory(*states.shape)
            packed.copy_(states)
        scale = None
        if self.dtype.has_scales:
            packed, scale = self._encode(packed)
            stored = packed.numpy()
        yield PackedStates(sequences, stored, None if scale is None else scale.numpy())

    def flush(self) -> Iterator[PackedStates]:
        """Yield the batches that are still being copied."""
        while self._waiting:
            yield self._finish_copy()

    def _copy_out(
        self, layers_BTD: tuple[torch.Tensor, ...], lengths: NDArray[np.int32]
    ) -> tuple[torch.Tensor, NDArray[Any]]:
        """Copy the valid positions of each sequence, layer by layer, into memory of ``HostBuffers.empty``: (rows, D).

        The copy also converts to the stored dtype, or to float32 if rows have scales. This is one pass over the states;
        separate gathering and conversion take three.
        """
        L, D = len(self.layers), layers_BTD[0].shape[2]
        packed, stored = self._memory(int(lengths.sum()) * L, D)
        wanted = [layers_BTD[layer] for layer in self.layers]
        row = 0
        # Copy adjacent sequences of equal length together: torch uses several cores for a large copy.
        starts = np.flatnonzero(np.diff(lengths, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True):
            length, rows = int(lengths[start]), (stop - start) * L * int(lengths[start])
            run_BLTD = packed[row : row + rows].view(stop - start, L, length, D)
            for place, layer_BTD in enumerate(wanted):
                run_BLTD[:, place].copy_(layer_BTD[start:stop, :length])
            row += rows
        return packed, stored

    def _memory(self, rows: int, width: int) -> tuple[torch.Tensor, NDArray[Any]]:
        """Memory for stored values, or for float32 if rows have scales; as ``HostBuffers.empty``."""
        dtypes = (torch.float32, FLOAT32) if self.dtype.has_scales else (self.torch_dtype, self.dtype.on_disk)
        return self._buffers.empty(rows, width, *dtypes)

    def _pooled(self, pooling: Pooling, batch: NDArray[np.intp], layers_BTD: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The stored positions of each sequence, layer by layer, in float32: (rows, D)."""
        by_layer = torch.cat(means(pooling, batch, [layers_BTD[layer] for layer in self.layers]))
        counts, L = pooling.stored.n_tokens[batch], len(self.layers)
        grid = np.arange(len(by_layer)).reshape(L, -1)
        first = offsets(counts)
        rows = [grid[:, start:stop].ravel() for start, stop in pairwise(first.tolist())]
        return by_layer.index_select(0, moved(np.concatenate(rows), by_layer.device))

    def _gather(self, layers_BTD: tuple[torch.Tensor, ...], lengths: NDArray[np.int32]) -> torch.Tensor:
        """The valid positions of each sequence, layer by layer, on the device: (rows, D)."""
        T = layers_BTD[0].shape[1]
        wanted = [layers_BTD[layer] for layer in self.layers]
        if (lengths == T).all():
            return torch.stack(wanted, dim=1).flatten(0, 2)
        L = len(wanted)
        stacked = torch.stack(wanted, dim=1).flatten(0, 2)
        grid = np.arange(len(lengths) * L * T).reshape(len(lengths), L, T)
        rows = np.concatenate([grid[i, :, :length].ravel() for i, length in enumerate(lengths.tolist())])
        return stacked.index_select(0, moved(rows, stacked.device))

    def _encode(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored values, (rows, D), and the scale of each row, (rows,), if rows have scales."""
        if self.dtype.has_scales:
            values, scale = quantise(states.float(), torch)
            return values.to(self.torch_dtype), scale
        return states.to(self.torch_dtype), None

    # CUDA only ------------------------------------------------------------------------------------------------------

    def _start_copy(
        self, sequences: list[int], raw: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[Any, PackedStates]:
        """Start copying to the host. Returns an event, and the states, which are valid after the event."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Use a separate stream: on the model's stream, the next batch would wait for the copy.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            packed, stored = self._buffers.empty(raw.shape[0], raw.shape[1], raw.dtype, self.dtype.on_disk)
            packed.copy_(raw, non_blocking=True)
            stored_scale = None if scale is None else _to_pinned(scale)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        for tensor in (raw,) if scale is None else (raw, scale):
            tensor.record_stream(self._stream)  # torch must not reuse their memory before the copy ends
        return done, PackedStates(sequences, stored, None if stored_scale is None else stored_scale.numpy())

    def _finish_copy(self) -> PackedStates:
        done, states = self._waiting.pop(0)
        done.synchronize()
        return states


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Start copying a tensor into pinned memory on the current stream."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
