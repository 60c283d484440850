"""Does a model give the same states whatever ran before? A cache needs that: resuming and repairing run some batches
again, after others or alone.

BigBird does not: a text that is too short for its sparse attention switches the whole model to full attention, for all
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
"""Of the largest state. The same batch on the same device gives the same bits, or nearly so on some GPUs."""


def check_repeatable(
    encoder: PreTrainedModel,
    n_tokens: NDArray[np.integer[Any]],
    run: Callable[[PreTrainedModel, int], tuple[Tensor, ...]],
    who: str,
) -> None:
    """Compare what a used model gives with what a fresh one gives, at the shortest length and the two longest ones.

    Copies of the encoder run, which share its weights, so the encoder itself stays as it is.

    Args:
        n_tokens: (n,) lengths of the sequences.
        run: Gives all layers of one sequence, alone in its batch, by the model it gets.
        who: The model, for the error.

    Raises:
        UnsupportedModelError: If states depend on what ran before, or on chance.
    """
    _, first = np.unique(n_tokens, return_index=True)
    shortest, longest = int(first[0]), int(first[-1])
    used = _sharing_weights(encoder)
    expected = {shortest: run(used, shortest)}
    # The longest goes before the next longest: some models keep what the longest one needed.
    for sequence in (longest, int(first[-2:][0]), shortest):
        if sequence not in expected:
            expected[sequence] = run(_sharing_weights(encoder), sequence)
        for layer, (fresh, now) in enumerate(zip(expected[sequence], run(used, sequence), strict=True)):
            largest, moved = float(fresh.abs().max()), float((fresh - now).abs().max())
            if moved > TOLERANCE * largest:  # written so that nan, which the writer will name, passes
                raise _depends(encoder, who, f"layer {layer} moves by {moved:.3g}, its largest state is {largest:.3g}")


def _sharing_weights(encoder: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(encoder, {id(weight): weight for weight in encoder.parameters()})


def _depends(encoder: PreTrainedModel, who: str, moved: str) -> UnsupportedModelError:
    remedy = "Choose another model."
    if getattr(encoder.config, "attention_type", None) == "block_sparse":
        remedy = 'Set "attention_type": "original_full" in its config.json, or choose another model.'
    return UnsupportedModelError(
        f"{who} ({encoder.config.model_type}) gives other states for a text when other texts ran before it ({moved}): "
        "an interrupted or repaired cache would mix both.",
        remedy,
    )
