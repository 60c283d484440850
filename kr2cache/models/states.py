"""The hidden states of a model: all layers of a batch, and whether padding changes them.

Shape letters: B sequences, T positions (padded), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import SequenceIndex
from kr2cache.models.encode import pad, padding_mask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def hidden_states(
    encoder: PreTrainedModel,
    index: SequenceIndex,
    sequences: Sequence[int] | NDArray[np.intp],
    *,
    pad_id: int,
    compute_dtype: str,
) -> tuple[torch.Tensor, ...]:
    """All layers of these sequences, padded to the longest: L + 1 tensors of shape (B, T, D) on the encoder's device.

    Args:
        compute_dtype: ``float32``, or autocast's dtype.
    """
    import torch

    device = encoder.device

    def moved(array: NDArray[Any]) -> torch.Tensor:
        # From pinned memory, the copy to a GPU does not make this thread wait for the running batch.
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def tensor(tokens: NDArray[Any], fill: int) -> torch.Tensor:
        return moved(pad([tokens[first[i] : first[i + 1]] for i in sequences], fill))

    first = index.first_token
    inputs = {"input_ids": tensor(index.input_id, pad_id)}
    if index.segment_id is not None:
        inputs["token_type_ids"] = tensor(index.segment_id, 0)
    inputs["attention_mask"] = moved(padding_mask(index.n_tokens[np.asarray(sequences)]))
    autocast = compute_dtype != "float32"
    dtype = getattr(torch, compute_dtype) if autocast else torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=autocast):
        output = encoder(**inputs, output_hidden_states=True)
    states: tuple[torch.Tensor, ...] = output.hidden_states
    return states


PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Largest change by rounding when a sequence runs beside another sequence, relative to the largest state."""


def padding_is_harmless(alone: Sequence[torch.Tensor], beside: Sequence[torch.Tensor], compute_dtype: str) -> bool:
    """Whether a sequence has the same states alone and beside a longer sequence. In some architectures (FNet, ConvBERT,
    Nystromformer, YOSO) padding changes the states in spite of the mask. Such a model gets batches of equal lengths.

    Args:
        alone: Layers of one sequence, (1, T, D).
        beside: Layers of two sequences, the same sequence first, (2, at least T, D).
    """
    T = alone[0].shape[1]
    tolerance = PADDING_TOLERANCE[compute_dtype]
    for one, other in zip(alone, beside, strict=True):
        largest = float(one.float().abs().max())
        # nan passes here; the writer reports it.
        if float((one.float() - other[:1, :T].float()).abs().max()) > tolerance * largest:
            return False
    return True
