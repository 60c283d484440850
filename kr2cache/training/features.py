"""Stage two's data path: from a cache to batches of resource states.

A fixed fusion of several layers is computed once, when training is set up, and kept for every epoch and seed: in
memory, else in a temporary file; where neither has room it is computed anew for each batch. One layer, or a fusion that
the cache holds ready, is read straight from the map; only trainable weights and the direct projection need several
layers in every batch. States that fit on a GPU live there, and batches are gathered there.

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
"""Of the free memory, the process's or the GPU's, may go to states."""
SEQUENCES_AT_ONCE = 256


class Features(Protocol):
    """Where a reader's batches get the resource's states from."""

    n_tokens: NDArray[np.int32]
    """(sequences,)"""
    device: torch.device
    """Where the states of a batch are."""
    sequences_read: int
    """How many sequences ``batch`` has given out."""

    def batch(self, sequences: Sequence[int]) -> tuple[NDArray[np.floating] | Tensor, NDArray[np.int64]]:
        """States (B, L, T, D), zeros where padded, L = 1 where the layers are fused already; mask (B, T)."""


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
            cache: Holds at least ``sequence_ids``, and the fusion's layers or the fusion itself.
            sequence_ids: In the order of the split's sequences; ``batch`` counts in it.
            fusion: Which layers.
            keep_layers: Do not fuse, though the fusion is fixed: the direct projection wants the layers side by side.
            pinned: Make batches in memory that a GPU copies from by itself.
        """
        self.cache = cache
        self.fusion = fusion
        self.pinned = pinned
        self.device = torch.device("cpu")
        self.sequences_read = 0
        """How many sequences ``batch`` has given out: so many forward passes of the resource were not needed."""
        self._positions = cache.positions(sequence_ids)
        self.n_tokens = cache.n_tokens[self._positions]
        self._fused: NDArray[np.floating] | None = None
        self._layers_read = fusion.layers if cache.fusion is None else None
        self._averages = not fusion.trainable and not keep_layers and len(fusion.layers) > 1 and cache.fusion is None
        """Whether batches are of one layer, the average of those that are read."""
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
        """Of all states that batches are made of."""
        tokens = int(self.n_tokens.sum(dtype=np.int64))
        return tokens * self.layers * self.width * self.cache.states_dtype.itemsize

    def batch(self, sequences: Sequence[int]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        """States and mask of some sequences.

        Returns:
            States (B, L, T, D), zeros where padded, L = 1 where the layers are fused already; mask (B, T), 1 for
            states.
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
        # A worker process of a DataLoader must not touch the GPU; there the DataLoader itself pins what comes.
        if not self.pinned or get_worker_info() is not None:
            return aligned_empty(shape, dtype)
        # torch keeps it for later batches once a GPU has read it. Fresh memory, to be copied to pinned memory after,
        # took four times as long.
        return torch.empty(shape, dtype=torch_dtype(dtype), pin_memory=True).numpy()

    def read_ahead(self, sequences: Sequence[int]) -> None:
        """As ``FeatureCache.read_ahead``; what is fused is in memory, or in a file that was just written."""
        if self._fused is None:
            self.cache.read_ahead(self._positions[list(sequences)], self._layers_read)

    def states(self, sequence: int) -> NDArray[np.floating]:
        """(L, T, D) of one sequence; not counted as read."""
        if self._fused is not None:
            return self._fused[None, self._first_token[sequence] : self._first_token[sequence + 1]]
        states_LTD = self.cache.states(int(self._positions[sequence]), self._layers_read)
        return self.fusion.apply(states_LTD)[None].astype(states_LTD.dtype) if self._averages else states_LTD

    def _fuse(self, sequence_ids: list[str]) -> NDArray[np.floating] | None:
        """Eq. 1 for every sequence, (tokens, D), in the precision that the states are read in. None where neither
        memory nor a disk has room for it.
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
        """Room for what is fused: an array in memory, or where memory is short in a mapped temporary file."""
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
    """All states of ``ResourceFeatures`` on a GPU, where batches are gathered: each state crosses the bus once."""

    def __init__(self, features: ResourceFeatures, device: torch.device) -> None:
        self.n_tokens = features.n_tokens
        self.device = device
        self.layers = features.layers
        self.sequences_read = 0
        """How many sequences ``batch`` has given out."""
        self._first_row = offsets(self.n_tokens) * features.layers
        dtype = torch_dtype(features.cache.states_dtype)
        # One row more than there are, of zeros: what padding is gathered from.
        self._rows = torch.zeros(int(self._first_row[-1]) + 1, features.width, dtype=dtype, device=device)
        for start in range(0, len(self.n_tokens), SEQUENCES_AT_ONCE):
            part = range(start, min(start + SEQUENCES_AT_ONCE, len(self.n_tokens)))
            features.read_ahead(part)
            packed = np.concatenate([features.states(i).reshape(-1, features.width) for i in part])
            first = int(self._first_row[start])
            self._rows[first : first + len(packed)] = torch.from_numpy(packed).to(device)

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """As ``ResourceFeatures.batch``, the states on the device."""
        self.sequences_read += len(sequences)
        lengths = self.n_tokens[list(sequences)]
        place_T, length_B = np.arange(lengths.max()), lengths[:, None, None]
        first_B, layer_L = self._first_row[list(sequences)][:, None, None], np.arange(self.layers)[:, None]
        rows_BLT = np.where(place_T < length_B, first_B + layer_L * length_B + place_T, len(self._rows) - 1)
        # Computed here and copied: there each of these operations would start a kernel of its own.
        rows = torch.from_numpy(rows_BLT)
        rows = (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device, non_blocking=True)
        return self._rows[rows], (place_T < lengths[:, None]).astype(np.int64)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """What torch calls it."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype


def room_on(device: torch.device) -> int:
    """How many bytes of states may live there: none but on a GPU, which keeps most of its free memory for training."""
    if device.type != "cuda":
        return 0
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(MEMORY_SHARE * (torch.cuda.mem_get_info(device)[0] + kept_by_torch))


def fits_in_memory(size: int) -> bool:
    """Whether ``size`` bytes of fused states may be kept in memory."""
    return size <= MEMORY_SHARE * free_memory()
