"""Check that a model's states do not depend on what ran before. A cache needs this: resuming and repairing run batches
again, in another order or alone.

BigBird fails: a text that is too short for its sparse attention switches the whole model to full attention, for all
texts that follow. Rotary embeddings of type "dynamic" keep the frequencies of the longest text so far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""Relative to the largest state. The same batch on the same device gives the same bits, on some GPUs almost."""


def check_repeatable(
    encoder: PreTrainedModel,
    n_tokens: NDArray[np.integer[Any]],
    run: Callable[[PreTrainedModel, int], tuple[Tensor, ...]],
    who: str,
) -> None:
    """Compare the states of a used model with those of a fresh copy, at the shortest and the two longest lengths.

    Only copies of the encoder run. They share its weights; the encoder itself does not change.

    Args:
        n_tokens: (n,) lengths of the sequences.
        run: Returns all layers of one sequence, alone in its batch, computed by the given model.
        who: The model's name, for the error.

    Raises:
        UnsupportedModelError: If states depend on what ran before, or are random.
    """
    _, first = np.unique(n_tokens, return_index=True)
    shortest, longest = int(first[0]), int(first[-1])
    used = _sharing_weights(encoder)
    expected = {shortest: run(used, shortest)}
    # The longest runs before the second longest: some models keep what the longest needed.
    for sequence in (longest, int(first[-2:][0]), shortest):
        if sequence not in expected:
            expected[sequence] = run(_sharing_weights(encoder), sequence)
        for layer, (fresh, now) in enumerate(zip(expected[sequence], run(used, sequence), strict=True)):
            largest, moved = float(fresh.abs().max()), float((fresh - now).abs().max())
            if moved > TOLERANCE * largest:  # nan passes here; the writer reports it
                raise _depends(encoder, who, f"layer {layer} moves by {moved:.3g}, its largest state is {largest:.3g}")


def _sharing_weights(encoder: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(encoder, {id(weight): weight for weight in encoder.parameters()})


def _depends(encoder: PreTrainedModel, who: str, moved: str) -> UnsupportedModelError:
    remedy = "Choose another model."
    if getattr(encoder.config, "attention_type", None) == "block_sparse":
        remedy = 'Set "attention_type": "original_full" in its config.json, or choose another model.'
    return UnsupportedModelError(
        f"{who} ({encoder.config.model_type}) computes other states for a text if other texts ran before it ({moved}): "
        "an interrupted or repaired cache would mix both.",
        remedy,
    )
