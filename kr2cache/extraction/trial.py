"""Is the model usable as a resource? Run it on a few sequences before the extraction.

Shape letters: B sequences, T positions (padded), D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES, not_finite
from kr2cache.cache.format import SequenceIndex
from kr2cache.errors import (
    DeviceMemoryError,
    KR2CacheError,
    UnsupportedModelError,
    ValueRangeError,
    error_text,
)
from kr2cache.extraction import budget
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan, Trial
from kr2cache.models.digests import OpenedModel, open_model
from kr2cache.models.load import not_finite as weights_not_finite
from kr2cache.models.repeatable import as_loaded, depends_on_history
from kr2cache.models.states import device_of, hidden_states, model_output, padding_is_harmless
from kr2cache.system.console import bytes_text
from kr2cache.system.device import choose_device, drop_unused_memory, is_out_of_memory, memory_advice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def open_resource(plan: ExtractPlan) -> OpenedModel:
    """Load and hash the model as the plan says."""
    return open_model(plan.spec, plan.config.weights_dtype, plan.config.device_map)


def move_to_device(plan: ExtractPlan, encoder: PreTrainedModel) -> torch.device:
    """Move the model to the device of the plan. A model with a device map stays where it is.

    Raises:
        DeviceMemoryError: If it does not fit into the device's memory.
    """
    if hasattr(encoder, "hf_device_map"):
        return device_of(encoder)
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
    plan: ExtractPlan, encoder: PreTrainedModel, sequences: Sequence[int] | NDArray[np.intp], *, fresh: bool
) -> tuple[torch.Tensor, ...]:
    """All layers of a batch, each (B, T, D), computed as the plan says.

    Args:
        fresh: Whether the batch runs in the model as it was loaded, whatever ran before.
    """
    if fresh:
        encoder = as_loaded(encoder)
    return hidden_states(encoder, plan.index, sequences, pad_id=plan.pad_id, compute_dtype=plan.config.compute_dtype)


FRESH = "fresh"
"""The field of a batch plan that is true if every batch runs in the model as it was loaded."""


def check_history(plan: ExtractPlan, encoder: PreTrainedModel, batch_plan: Mapping[str, Any]) -> None:
    """Check that the model can continue a cache: that its states do not depend on what ran before, or each batch runs
    in the model as it was loaded.

    Args:
        batch_plan: Of the cache.

    Raises:
        UnsupportedModelError: If the cache may hold states that depend on what ran before.
        DeviceMemoryError: As ``_depends_on_history``.
    """
    moved = _depends_on_history(plan, encoder)
    if moved is not None and not batch_plan.get(FRESH):
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) computes other states for a text if other texts ran "
            f"before it ({moved}), and this cache was made without regard to that: it would mix both.",
            "Remove the cache and extract again: then each batch runs in the model as it was loaded.",
        )


def _depends_on_history(plan: ExtractPlan, encoder: PreTrainedModel) -> str | None:
    """Whether states depend on what ran before, in words (``depends_on_history``).

    Raises:
        UnsupportedModelError: If the model fails on a sequence, or its states are random.
        DeviceMemoryError: If the model or the longest sequence does not fit into the device's memory.
    """
    move_to_device(plan, encoder)

    def run(model: PreTrainedModel, sequence: int) -> tuple[torch.Tensor, ...]:
        return hidden_states(model, plan.index, [sequence], pad_id=plan.pad_id, compute_dtype="float32")

    with first_passes(plan, encoder, "give a smaller --max-length"):
        return depends_on_history(encoder, plan.index.n_tokens, run, repr(plan.spec.name))


@contextlib.contextmanager
def first_passes(plan: ExtractPlan, encoder: PreTrainedModel, *advice: str) -> Iterator[None]:
    """Explain the failure of a model that runs here for the first time: its code may raise anything.

    Args:
        advice: More to do if its longest sequence does not fit into the device's memory, as for ``memory_advice``.

    Raises:
        UnsupportedModelError: If it fails.
        DeviceMemoryError: If memory is too small.
        OSError: If a file cannot be read: it is not the model that fails.
    """
    try:
        yield
    except (KR2CacheError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise budget.too_long(plan, device_of(encoder), *advice) from None
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) fails on its first texts: {error_text(error)}",
            "Check its config.json, or choose another model.",
        ) from error


def check_states(plan: ExtractPlan, encoder: PreTrainedModel) -> Trial:
    """Check that the model gives L + 1 layers of T x D, as its configuration says, and that they can be stored.

    Raises:
        UnsupportedModelError: If layers or shapes differ from the configuration, or states are random.
        ValueRangeError: If the stored dtype cannot hold the states of these few sequences.
        DeviceMemoryError: If the model or the longest sequence does not fit into the device's memory.
    """
    fresh = _depends_on_history(plan, encoder) is not None
    with first_passes(plan, encoder, "give a smaller --max-length"):
        return _check_shapes(plan, encoder, fresh=fresh)


def _check_shapes(plan: ExtractPlan, encoder: PreTrainedModel, *, fresh: bool) -> Trial:
    shortest = int(np.argmin(plan.index.n_tokens))
    expected = (1, int(plan.index.n_tokens[shortest]), plan.width)
    alone = layers_of(plan, encoder, [shortest], fresh=fresh)
    shapes = {tuple(layer.shape) for layer in alone}
    if len(alone) != plan.model_layers or shapes != {expected}:
        lengths = list(dict.fromkeys(layer.shape[1] for layer in alone if layer.ndim == 3))
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) gives {len(alone)} layers of shapes {sorted(shapes)}; "
            f"{plan.model_layers} layers of {expected} were expected."
            + (f" Its layers shorten the text: {lengths} positions." if len(lengths) > 1 else ""),
            "A resource has one state of the same width per token in every layer. Choose another model.",
        )
    output = _last_is_output(plan, encoder, int(np.argmax(plan.index.n_tokens)))
    if fresh:  # what one text does to the model, it does to the texts beside it
        _check_stored(plan, encoder, [shortest], alone)
        return Trial(padded=False, fresh=True, last_is_output=output)
    longest, beside = _beside_the_longest(plan, encoder, shortest)
    harmless = beside[0].shape[1] >= int(plan.index.n_tokens[longest]) and padding_is_harmless(
        alone, beside, plan.config.compute_dtype, plan.config.weights_dtype
    )
    _check_stored(plan, encoder, *(([shortest, longest], beside) if harmless else ([shortest], alone)))
    return Trial(padded=harmless, fresh=False, last_is_output=output)


def _last_is_output(plan: ExtractPlan, encoder: PreTrainedModel, sequence: int) -> bool | None:
    """Compare the last hidden state with the model's output.

    Raises:
        UnsupportedModelError: If the model adds positions in front of the text.
    """

    def run(index: SequenceIndex) -> Any:
        return model_output(
            as_loaded(encoder), index, [sequence], pad_id=plan.pad_id, compute_dtype=plan.config.compute_dtype
        )

    output, end = run(plan.index), int(plan.index.first_token[sequence + 1])
    T = int(plan.index.n_tokens[sequence])
    if output.hidden_states[0].shape[1] > T:  # hidden_states() takes the first T: see that they are the text's
        changed = plan.index.input_id.copy()
        changed[end - 1] = next(iter(changed[changed != changed[end - 1]]), plan.pad_id)
        other = run(dataclasses.replace(plan.index, input_id=changed))
        moved = (output.hidden_states[0] != other.hidden_states[0]).any(dim=-1)[0].nonzero().flatten().tolist()
        if moved != [T - 1]:
            raise UnsupportedModelError(
                f"{plan.spec.name!r} ({encoder.config.model_type}) adds positions that are not behind the text: its "
                f"last token, {T - 1}, changes the states at {moved}.",
                "Choose another model.",
            )
    last, states = output.hidden_states[-1], getattr(output, "last_hidden_state", None)
    if states is None or states.shape != last.shape:
        return None
    return bool((states == last).all())


def _beside_the_longest(
    plan: ExtractPlan, encoder: PreTrainedModel, sequence: int
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """Run ``sequence`` in one batch with the longest sequence; if they do not fit into the device's memory, with a
    shorter one.

    Returns:
        The other sequence, and the layers of both.
    """
    order = np.argsort(plan.index.n_tokens, kind="stable")
    place = len(order) - 1
    while True:
        try:
            other = int(order[place])
            return other, layers_of(plan, encoder, [sequence, other], fresh=False)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if place == 0:
                raise
        drop_unused_memory()
        place //= 2


def _check_stored(
    plan: ExtractPlan, encoder: PreTrainedModel, sequences: list[int], layers_BTD: tuple[torch.Tensor, ...]
) -> None:
    """Check that the stored dtype can hold the states of a batch.

    Raises:
        ValueRangeError: If it cannot, or they are nan.
    """
    stored = DTYPES[plan.config.dtype]
    pack = Packer(plan.index, plan.layers, plan.config.dtype, device_of(encoder), plan.pooling)
    for packed in (*pack(np.array(sequences), layers_BTD), *pack.flush()):
        row = 0
        for sequence in packed.sequences:
            rows = slice(row, row := row + len(plan.layers) * int(plan.stored.n_tokens[sequence]))
            raw, scale = packed.raw[rows], None if packed.scale is None else packed.scale[rows]
            if not stored.all_finite(raw, scale):
                error = not_finite(plan.index.ids[sequence], stored, plan.layers, raw, scale)
                raise by_weights(error, encoder, plan.spec.name)


def by_weights(error: ValueRangeError, encoder: PreTrainedModel, name: str) -> ValueRangeError:
    """``error``, or one that names the cause if weights of the model are not finite either."""
    damaged = weights_not_finite(encoder)
    if not damaged:
        return error
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return ValueRangeError(
        f"{error.message} The checkpoint of {name!r} holds numbers that are not finite (nan or inf), in {damaged[0]}"
        f"{more}.",
        "Get an undamaged copy of its weights; no --dtype helps.",
    )
