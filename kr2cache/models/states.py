"""The hidden states of a model: all layers of a batch, their means, and whether padding changes them.

Shape letters: B sequences, T positions (padded), P stored positions of a pooled batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import SequenceIndex, offsets
from kr2cache.cache.pooling import Pooling
from kr2cache.errors import UnsupportedModelError
from kr2cache.models.encode import pad, padding_mask

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def device_of(encoder: PreTrainedModel) -> torch.device:
    """The device of a model's input and of its states: with a device map, its first GPU."""
    import torch

    spread = getattr(encoder, "hf_device_map", None)
    if spread is None:
        return encoder.device
    return torch.device(next((place for place in spread.values() if place not in ("cpu", "disk")), "cpu"))


def hidden_states(
    encoder: PreTrainedModel,
    index: SequenceIndex,
    sequences: Sequence[int] | NDArray[np.intp],
    *,
    pad_id: int,
    compute_dtype: str,
) -> tuple[torch.Tensor, ...]:
    """All layers of these sequences, padded to the longest: L + 1 tensors of shape (B, T, D) on the encoder's device.
    What a model adds behind a text, as BigBird does to fill its last block, is left out.

    Args:
        compute_dtype: ``float32``, or autocast's dtype.

    Raises:
        UnsupportedModelError: If the model gives none.
    """
    output = model_output(encoder, index, sequences, pad_id=pad_id, compute_dtype=compute_dtype)
    states = getattr(output, "hidden_states", None)
    if not states or not all(hasattr(layer, "ndim") for layer in states):
        raise UnsupportedModelError(
            f"A {encoder.config.model_type} model gives no tuple of hidden states when it is asked for them "
            "(output_hidden_states).",
            "Choose another model.",
        )
    T = int(index.n_tokens[np.asarray(sequences)].max())
    return tuple(layer[:, :T] if layer.ndim == 3 else layer for layer in states)


def model_output(
    encoder: PreTrainedModel,
    index: SequenceIndex,
    sequences: Sequence[int] | NDArray[np.intp],
    *,
    pad_id: int,
    compute_dtype: str,
) -> Any:
    """What the model returns for these sequences, hidden states included; arguments as for ``hidden_states``."""
    import torch

    device = device_of(encoder)

    def tensor(tokens: NDArray[Any], fill: int) -> torch.Tensor:
        return moved(pad([tokens[first[i] : first[i + 1]] for i in sequences], fill), device)

    first = index.first_token
    inputs = {"input_ids": tensor(index.input_id, pad_id)}
    if index.segment_id is not None:
        inputs["token_type_ids"] = tensor(index.segment_id, 0)
    inputs["attention_mask"] = moved(padding_mask(index.n_tokens[np.asarray(sequences)]), device)
    autocast = compute_dtype != "float32"
    dtype = getattr(torch, compute_dtype) if autocast else torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=autocast):
        return encoder(**inputs, output_hidden_states=True)


def moved(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device. From pinned memory, the copy to a GPU does not make this thread wait for the
    batch that runs there.
    """
    import torch

    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def means(pooling: Pooling, batch: NDArray[np.intp], layers_BTD: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The stored positions of a batch: each is the mean of its tokens, added up in float32 in their order.

    Args:
        pooling: Of all sequences.
        batch: (B,) positions of the sequences in the index.
        layers_BTD: Layers of the model, each (B, T, D).

    Returns:
        For each layer (P, D) in float32, sequence by sequence, on the device of the layers.
    """
    from torch.nn.functional import embedding_bag

    device = layers_BTD[0].device
    rows, places, counts = pooling.of(batch)
    tokens = moved(rows * layers_BTD[0].shape[1] + places, device)
    begins = moved(offsets(counts)[:-1], device)
    numbers = moved(counts.astype(np.float32)[:, None], device)
    # The states of a layer are the table of an embedding, and each position is a bag. This is 9 times as fast as
    # torch.segment_reduce. Its own mean is not exact: it multiplies by a rounded 1 / count.
    return [
        embedding_bag(tokens, layer_BTD.flatten(0, 1).float(), begins, mode="sum") / numbers for layer_BTD in layers_BTD
    ]


PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
"""Largest change by rounding when a sequence runs beside another sequence, relative to the largest state."""


def padding_is_harmless(alone: Sequence[torch.Tensor], beside: Sequence[torch.Tensor], *dtypes: str) -> bool:
    """Whether a sequence has the same states alone and beside a longer sequence. In some architectures (FNet, ConvBERT,
    Nystromformer, YOSO) padding changes the states in spite of the mask. Such a model gets batches of equal lengths.

    Args:
        alone: Layers of one sequence, (1, T, D).
        beside: Layers of two sequences, the same sequence first, (2, at least T, D).
        dtypes: Of the forward pass and of the weights.
    """
    T = alone[0].shape[1]
    tolerance = max(PADDING_TOLERANCE[dtype] for dtype in dtypes)
    for one, other in zip(alone, beside, strict=True):
        largest = float(one.float().abs().max())
        # nan passes here; the writer reports it.
        if float((one.float() - other[:1, :T].float()).abs().max()) > tolerance * largest:
            return False
    return True
