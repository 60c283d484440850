"""Is the model usable as a resource? Run it on a few sequences before the extraction.

Shape letters: B sequences, T positions (padded), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kr2cache.errors import DeviceMemoryError, UnsupportedModelError, error_text
from kr2cache.extraction import budget
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.repeatable import check_repeatable
from kr2cache.models.states import hidden_states, padding_is_harmless
from kr2cache.system.console import bytes_text
from kr2cache.system.device import choose_device, drop_unused_memory, is_out_of_memory, memory_advice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def move_to_device(plan: ExtractPlan, encoder: PreTrainedModel) -> torch.device:
    """Move the model to the device of the plan.

    Raises:
        DeviceMemoryError: If it does not fit into the device's memory.
    """
    device = choose_device(plan.config.device)
    try:
        encoder.to(device)  # type: ignore[arg-type]  # transformers annotates only its own calls
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = sum(parameter.nbytes for parameter in encoder.parameters())
        raise DeviceMemoryError(
            f"{plan.spec.name} takes {bytes_text(size)}; the memory of {device} has no room for it.",
            memory_advice(device),
        ) from None
    return device


def layers_of(
    plan: ExtractPlan, encoder: PreTrainedModel, sequences: Sequence[int] | NDArray[np.intp]
) -> tuple[torch.Tensor, ...]:
    """All layers of a batch, each (B, T, D), computed as the plan says."""
    return hidden_states(encoder, plan.index, sequences, pad_id=plan.pad_id, compute_dtype=plan.config.compute_dtype)


def check_history(plan: ExtractPlan, encoder: PreTrainedModel) -> None:
    """Check that the model accepts these sequences, and that their states do not depend on what ran before.

    Raises:
        UnsupportedModelError: If the model fails on a sequence, or its states depend on what ran before.
        DeviceMemoryError: If the model or the longest sequence does not fit into the device's memory.
    """
    device = move_to_device(plan, encoder)

    def run(model: PreTrainedModel, sequence: int) -> tuple[torch.Tensor, ...]:
        return hidden_states(model, plan.index, [sequence], pad_id=plan.pad_id, compute_dtype="float32")

    try:
        check_repeatable(encoder, plan.index.n_tokens, run, repr(plan.spec.name))
    except UnsupportedModelError:
        raise
    except Exception as error:  # this is the model's first pass, and its code may raise anything
        if is_out_of_memory(error):
            raise budget.too_long(plan, device) from None
        reason = error_text(error)
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) fails on its first text: {reason}",
            "Check its config.json, or choose another model.",
        ) from error


def check_states(plan: ExtractPlan, encoder: PreTrainedModel) -> bool:
    """Check that the model gives L + 1 layers of T x D, as its configuration says.

    Returns:
        Whether batches may be padded: padding does not change the states.

    Raises:
        UnsupportedModelError: If layers or shapes differ from the configuration, or states depend on what ran before.
        DeviceMemoryError: As for ``check_history``.
    """
    check_history(plan, encoder)
    shortest = int(np.argmin(plan.index.n_tokens))
    expected = (1, int(plan.index.n_tokens[shortest]), plan.width)
    alone = layers_of(plan, encoder, [shortest])
    shapes = {tuple(layer.shape) for layer in alone}
    if len(alone) != plan.model_layers or shapes != {expected}:
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) gives {len(alone)} layers of shapes {sorted(shapes)}; "
            f"{plan.model_layers} layers of {expected} were expected.",
            "A resource has one state of the same width per token in every layer.",
        )
    longest, beside = _beside_the_longest(plan, encoder, shortest)
    if beside[0].shape[1] < longest:
        return False
    return padding_is_harmless(alone, beside, plan.config.compute_dtype)


def _beside_the_longest(
    plan: ExtractPlan, encoder: PreTrainedModel, sequence: int
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Run ``sequence`` in one batch with the longest sequence; if they do not fit into the device's memory, with a
    shorter one.

    Returns:
        The length of the other sequence, and the layers of both.

    Raises:
        DeviceMemoryError: If not even the shortest sequence fits.
    """
    order = np.argsort(plan.index.n_tokens, kind="stable")
    place = len(order) - 1
    while True:
        try:
            other = int(order[place])
            return int(plan.index.n_tokens[other]), layers_of(plan, encoder, [sequence, other])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if place == 0:
                raise budget.too_long(plan, encoder.device) from None
        drop_unused_memory()
        place //= 2
