"""The data path of stage two: from a cache to batches of resource states.

A fixed fusion of several layers is computed once, before training, and kept for all epochs and seeds: in memory, or
else in a temporary file. If neither has room, each batch computes it again. A single layer, or a fusion that is stored
in the cache, is read from the memory map. Only trainable weights and the direct projection need
several layers in each batch. If all states fit on a GPU, they are copied there once, and batches are gathered there.

Shape letters: B sequences, T positions (padded), L layers that reach the model, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from kr2cache.cache.format import offsets
from kr2cache.cache.reader import FeatureCache
from kr2cache.fusion import Fusion
from kr2cache.models.encode import padding_mask
from kr2cache.system.console import bytes_text, note
from kr2cache.system.disk import temporary_file
from kr2cache.system.memory import aligned_empty, free_memory

MEMORY_SHARE = 0.25
"""Share of free memory that states may take, on the computer or on the GPU."""
SEQUENCES_AT_ONCE = 256


States = NDArray[np.floating] | Tensor


class Features(Protocol):
    """Gives the resource's states for the batches of a reader."""

    n_tokens: NDArray[np.int32]
    """(sequences,)"""
    device: torch.device
    """Where the states of a batch are."""
    sequences_read: int
    """How many sequences ``batch`` has returned."""

    def batch(self, sequences: Sequence[int]) -> tuple[States | list[States], NDArray[np.int64]]:
        """States (B, L, T, D), zero at padding, L = 1 if the layers are already fused; mask (B, T). Of several
        resources: a list of states, and their masks side by side."""


class ResourceFeatures:
    """The resource's states for the examples of one split, as one fusion needs them."""

    def __init__(
        self,
        cache: FeatureCache,
        sequence_ids: Sequence[str],
        fusion: Fusion,
        *,
        keep_layers: bool,
        pinned: bool = False,
    ) -> None:
        """
        Args:
            cache: Has at least ``sequence_ids``, and the layers of the fusion or the fused states.
            sequence_ids: In the order of the split's sequences. ``batch`` takes positions in this list.
            fusion: Which layers, and their weights.
            keep_layers: Do not fuse even if the fusion is fixed: the direct projection needs all layers.
            pinned: Make batches in pinned memory, from which a GPU copies without waiting for the CPU.
        """
        self.cache = cache
        self.fusion = fusion
        self.pinned = pinned
        self.device = torch.device("cpu")
        self.sequences_read = 0
        """How many sequences ``batch`` has returned: each saved one forward pass of the resource."""
        self._positions = cache.positions(sequence_ids)
        self.n_tokens = cache.n_tokens[self._positions]
        self._fused: NDArray[np.floating] | None = None
        self._layers_read = fusion.layers if cache.fusion is None else None
        self._averages = not fusion.trainable and not keep_layers and len(fusion.layers) > 1 and cache.fusion is None
        """Whether batches have one layer: the average of the layers that are read."""
        if self._averages:
            self._first_token = offsets(self.n_tokens)
            self._fused = self._fuse(list(sequence_ids))

    @property
    def width(self) -> int:
        return self.cache.width

    @property
    def layers(self) -> int:
        """L of a batch."""
        return 1 if self._averages or self._layers_read is None else len(self._layers_read)

    @property
    def nbytes(self) -> int:
        """Size of all states as they appear in batches."""
        tokens = int(self.n_tokens.sum(dtype=np.int64))
        return tokens * self.layers * self.width * self.cache.states_dtype.itemsize

    def batch(self, sequences: Sequence[int]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        """States and mask of some sequences.

        Returns:
            States (B, L, T, D), zero at padding, L = 1 if the layers are already fused; mask (B, T), 1 for states.
        """
        self.sequences_read += len(sequences)
        self.read_ahead(sequences)
        lengths = self.n_tokens[list(sequences)]
        shape = (len(sequences), self.layers, int(lengths.max()), self.width)
        states_BLTD = self._empty(shape)
        for row, sequence, length in zip(states_BLTD, sequences, lengths.tolist(), strict=True):
            row[:, :length] = self.states(sequence)
            row[:, length:] = 0
        return states_BLTD, padding_mask(lengths)

    def _empty(self, shape: tuple[int, ...]) -> NDArray[np.floating]:
        dtype = self.cache.states_dtype
        # A worker process of a DataLoader must not touch the GPU. The DataLoader itself pins batches of workers.
        if not self.pinned or get_worker_info() is not None:
            return aligned_empty(shape, dtype)
        # torch reuses this memory once a GPU has read it. New memory with a later copy to pinned memory took four times
        # as long.
        return torch.empty(shape, dtype=torch_dtype(dtype), pin_memory=True).numpy()

    def read_ahead(self, sequences: Sequence[int]) -> None:
        """See ``FeatureCache.read_ahead``. Fused states need none: they are in memory or in a file just written."""
        if self._fused is None:
            self.cache.read_ahead(self._positions[list(sequences)], self._layers_read)

    def states(self, sequence: int) -> NDArray[np.floating]:
        """(L, T, D) of one sequence; ``sequences_read`` does not count it."""
        if self._fused is not None:
            return self._fused[None, self._first_token[sequence] : self._first_token[sequence + 1]]
        states_LTD = self.cache.states(int(self._positions[sequence]), self._layers_read)
        return self.fusion.apply(states_LTD)[None].astype(states_LTD.dtype) if self._averages else states_LTD

    def _fuse(self, sequence_ids: list[str]) -> NDArray[np.floating] | None:
        """Eq. 1 for every sequence, (tokens, D), in the dtype of states that are read. None if neither memory nor a
        disk has room.
        """
        fused = self._allocate()
        if fused is None:
            return None
        for start in range(0, len(sequence_ids), SEQUENCES_AT_ONCE):
            packed = self.cache.batch(sequence_ids[start : start + SEQUENCES_AT_ONCE], self.fusion.layers)
            for i in range(len(packed)):
                first, last = self._first_token[start + i], self._first_token[start + i + 1]
                fused[first:last] = self.fusion.apply(packed[i])
        return fused

    def _allocate(self) -> NDArray[np.floating] | None:
        """An array for the fused states: in memory, or in a mapped temporary file if memory is too small."""
        shape, dtype = (int(self._first_token[-1]), self.width), self.cache.states_dtype
        size = self.nbytes
        if fits_in_memory(size):
            return np.empty(shape, dtype=dtype)
        what = f"The average of {self.fusion.name}, {bytes_text(size)}, is too large for memory"
        if (there := temporary_file(size, self.cache.folder.parent)) is None:
            note(
                f"{what}, and neither {self.cache.folder.parent} nor the folder for temporary files (TMPDIR) takes it: "
                "it is computed anew for each batch, from all of its layers. A TMPDIR with room is faster."
            )
            return None
        file, folder = there
        note(f"{what}: it is kept in a temporary file in {folder} until the training ends.")
        with file:
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)


class DeviceFeatures:
    """All states of ``ResourceFeatures`` on a GPU. Each state is copied there once; batches are gathered there."""

    def __init__(self, features: ResourceFeatures, device: torch.device) -> None:
        self.n_tokens = features.n_tokens
        self.device = device
        self.layers = features.layers
        self.sequences_read = 0
        """How many sequences ``batch`` has returned."""
        self._first_row = offsets(self.n_tokens) * features.layers
        dtype = torch_dtype(features.cache.states_dtype)
        # The last row is zero: padding is gathered from it.
        self._rows = torch.zeros(int(self._first_row[-1]) + 1, features.width, dtype=dtype, device=device)
        for start in range(0, len(self.n_tokens), SEQUENCES_AT_ONCE):
            part = range(start, min(start + SEQUENCES_AT_ONCE, len(self.n_tokens)))
            features.read_ahead(part)
            packed = np.concatenate([features.states(i).reshape(-1, features.width) for i in part])
            first = int(self._first_row[start])
            self._rows[first : first + len(packed)] = torch.from_numpy(packed).to(device)

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """See ``ResourceFeatures.batch``. States are on the device."""
        self.sequences_read += len(sequences)
        lengths = self.n_tokens[list(sequences)]
        place_T, length_B = np.arange(lengths.max()), lengths[:, None, None]
        first_B, layer_L = self._first_row[list(sequences)][:, None, None], np.arange(self.layers)[:, None]
        rows_BLT = np.where(place_T < length_B, first_B + layer_L * length_B + place_T, len(self._rows) - 1)
        # Row numbers are computed on the CPU: on the GPU each of these operations would start its own kernel.
        rows = torch.from_numpy(rows_BLT)
        rows = (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device, non_blocking=True)
        return self._rows[rows], padding_mask(lengths)


class JoinedFeatures:
    """The states of several resources for the same sequences, appended one behind the other."""

    def __init__(self, parts: Sequence[Features]) -> None:
        self.parts = parts
        self.n_tokens: NDArray[np.int32] = np.sum([part.n_tokens for part in parts], axis=0, dtype=np.int32)
        self.device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))

    @property
    def sequences_read(self) -> int:
        return sum(part.sequences_read for part in self.parts)

    @sequences_read.setter
    def sequences_read(self, total: int) -> None:
        for part in self.parts:  # each resource has read as many
            part.sequences_read = total // len(self.parts)

    def batch(self, sequences: Sequence[int]) -> tuple[list[States], NDArray[np.int64]]:
        """See ``Features.batch``. If one resource's states are on a GPU, those of the others are copied there."""
        batches = [part.batch(sequences) for part in self.parts]
        states: list[States] = [own for own, _ in batches if not isinstance(own, list)]
        if self.device.type != "cpu":
            # The Trainer would wait for each copy: it does not expect states in pinned memory beside those on the GPU.
            states = [
                one if isinstance(one, Tensor) else torch.from_numpy(one).to(self.device, non_blocking=True)
                for one in states
            ]
        return states, np.concatenate([mask for _, mask in batches], axis=1)


def joined(parts: Sequence[Features]) -> Features:
    """The states of all these resources, for the same sequences."""
    return parts[0] if len(parts) == 1 else JoinedFeatures(parts)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The same dtype in torch."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype


def room_on(device: torch.device) -> int:
    """How many bytes of states may be kept on the device. A GPU keeps most of its free memory for training; else 0."""
    if device.type != "cuda":
        return 0
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(MEMORY_SHARE * (torch.cuda.mem_get_info(device)[0] + kept_by_torch))


def fits_in_memory(size: int) -> bool:
    """Whether ``size`` bytes of fused states may be kept in memory."""
    return size <= MEMORY_SHARE * free_memory()
