"""Do a model's states depend on what ran before? Then every batch runs in a copy of the model as it was loaded.

A cache needs states that depend on nothing but the sequence: resuming and repairing run batches again, in another order
or alone. In BigBird, a text that is too short for its sparse attention switches the whole model to full attention, for
all texts that follow. Rotary embeddings of type "dynamic" keep the frequencies of the longest text so far.
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


def as_loaded(encoder: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in its present state. It shares the weights, but not what it remembers of texts."""
    shared: dict[int, Any] = {id(weight): weight for weight in encoder.parameters()}
    for module in encoder.modules():  # of accelerate: the weights of layers that are not on their device now
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            shared[id(hook)] = hook
    return copy.deepcopy(encoder, shared)


def depends_on_history(
    encoder: PreTrainedModel,
    n_tokens: NDArray[np.integer[Any]],
    run: Callable[[PreTrainedModel, int], tuple[Tensor, ...]],
    who: str,
) -> str | None:
    """Compare the states of a used model with those of a model as it was loaded, at the shortest and the two longest
    lengths. Only copies of the encoder run.

    Args:
        n_tokens: (n,) lengths of the sequences.
        run: Returns all layers of one sequence, alone in its batch, computed by the given model.
        who: The model's name, for the error.

    Returns:
        How far the states move, in words; None if they do not depend on what ran before.

    Raises:
        UnsupportedModelError: If a model as it was loaded gives other states each time.
    """
    _, first = np.unique(n_tokens, return_index=True)
    shortest, longest = int(first[0]), int(first[-1])
    used = as_loaded(encoder)
    expected = {shortest: run(used, shortest)}
    # The longest runs before the second longest: some models keep what the longest needed.
    for sequence in (longest, int(first[-2:][0]), shortest):
        if sequence not in expected:
            expected[sequence] = run(as_loaded(encoder), sequence)
        moved = _moved(expected[sequence], run(used, sequence))
        if moved is not None:
            _check_not_random(_moved(expected[sequence], run(as_loaded(encoder), sequence)), encoder, who)
            return moved
    return None


def _moved(expected: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> str | None:
    """The first layer whose states differ, in words; None if all are the same."""
    for layer, (before, after) in enumerate(zip(expected, now, strict=True)):
        largest, moved = float(before.abs().max()), float((before - after).abs().max())
        if moved > TOLERANCE * largest:  # nan passes here; the writer reports it
            return f"layer {layer} moves by {moved:.3g}, its largest state is {largest:.3g}"
    return None


def _check_not_random(moved: str | None, encoder: PreTrainedModel, who: str) -> None:
    if moved is not None:
        raise UnsupportedModelError(
            f"{who} ({encoder.config.model_type}) gives other states for the same text each time ({moved}): it draws "
            "random numbers.",
            "Choose another model, or set the seed in its config.json if it has one (hash_seed).",
        )
