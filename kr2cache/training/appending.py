"""Equation 3, ``H^_reader^0 = Concat(H_reader^0, G^0)``, inside a model of transformers.

G^0 stands behind each sequence's own last token, and padding stands behind both: ``[l1 | l2 | padding]``. So whatever a
model measures along a sequence (distances between tokens, rotary angles, local windows) does not depend on padding,
that is, on the other sequences of a batch.

The model gets inputs of l1 + l2 positions, so that all it derives from them (masks, positions) has that length. Two of
its modules are hooked. The first turns token ids into embeddings. It computes the reader's l1 positions only, because
position embeddings may end there. The second is the *place*, the module whose output is ``hidden_states[0]``: there G^0
goes in. In most architectures both are one module, ``embeddings``. Where embeddings are narrower than the layers, the
place is the projection between the two.

Shape letters: S sequences, T tokens of the reader (l1, padded), R states of the resource (l2, padded), W positions of
the encoder, H the reader's width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from kr2cache.errors import UnsupportedModelError, error_text
from kr2cache.models.configuration import vocabulary
from kr2cache.system.device import is_out_of_memory

TRIAL_TOKENS = 5
"""Tokens of the sequence that shows where the place is."""


def packed_order(attention_mask: Tensor, resource_mask: Tensor) -> Tensor:
    """Which position of the reader and the resource stands at each position of the encoder.

    Args:
        attention_mask: (S, T), 1 for the reader's tokens.
        resource_mask: (S, R), 1 for the resource's states.

    Returns:
        int64 (S, W): numbers below T are the reader's positions, T + r is position r of the resource. Padding comes
        last. W is the length of the longest sequence, reader and resource together.
    """
    mask = torch.cat([attention_mask, resource_mask], dim=1)
    longest = int(mask.sum(dim=1).max())
    return torch.argsort(mask, dim=1, descending=True, stable=True)[:, :longest]


# Where states are appended --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The names of two modules in the base model; often the same."""

    embeddings: str
    """Takes token ids and gives embeddings, perhaps narrower than the layers."""
    states: str
    """Its output is ``hidden_states[0]``."""


class _Call(NamedTuple):
    name: str
    takes_ids: bool
    output: Tensor


_places: dict[tuple[type, str], Place] = {}
"""By class and configuration. Finding a place runs the model once."""


def place_of(model: PreTrainedModel, who: str) -> Place:
    """Find where the states of a resource are appended, by a forward pass of a few tokens.

    Args:
        who: Name of the model, for the error.

    Raises:
        UnsupportedModelError: If no module gives ``hidden_states[0]``, or the model does not run.
    """
    key = (type(model), model.config.to_json_string())
    if key not in _places:
        try:
            calls, first = _trial(model)
        except Exception as error:  # models of any architecture can raise anything
            reason = f"its forward pass fails: {error_text(error)}"
            if getattr(model.config, "is_encoder_decoder", False):
                reason = "it is an encoder-decoder, and a reader is one stack of layers"
            raise _no_place(model, who, reason) from error
        states = _outermost(call.name for call in calls if torch.equal(call.output, first))
        embeddings = _outermost(call.name for call in calls if call.takes_ids)
        if states is None or embeddings is None:
            missing = "gives hidden_states[0]" if states is None else "turns token ids into embeddings"
            raise _no_place(model, who, f"no module of it {missing}, so there is no place where states are appended")
        _places[key] = Place(embeddings, states)
    return _places[key]


def _no_place(model: PreTrainedModel, who: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{who} ({model.config.model_type}) cannot be a KReader of method kr2: {reason.rstrip('.')}.",
        "Choose another reader. To train it without a resource: --method kreader.",
    )


def _trial(model: PreTrainedModel) -> tuple[list[_Call], Tensor]:
    """All calls of modules that give one vector per token, in the order in which they end, and ``hidden_states[0]``."""
    base = model.base_model
    ids = (torch.arange(TRIAL_TOKENS, device=model.device) + 1)[None] % vocabulary(model.config)
    calls: list[_Call] = []

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 3 and output.shape[:2] == ids.shape:
                takes_ids = any(
                    isinstance(value, Tensor) and value.shape == ids.shape and bool((value == ids).all())
                    for value in (*args, *named.values())
                )
                calls.append(_Call(name, takes_ids, output))

        return note

    hooks = [
        module.register_forward_hook(noting(name), with_kwargs=True) for name, module in base.named_modules() if name
    ]
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            output = base(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls, output.hidden_states[0]


def _outermost(names: Iterable[str]) -> str | None:
    """The first name, or the outermost module of these that contains it."""
    given = list(names)
    around = [name for name in given if given[0].startswith(f"{name}.")]
    return min([*around, *given[:1]], key=len, default=None)


# How they are appended ------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """What the hooks need in one forward pass."""

    appended: Tensor
    """G^0, (S, R, H)"""
    rows: Tensor
    """(S * W,) rows of the reader's positions and G^0 side by side, (S * (T + R), H)."""
    attention_mask: Tensor
    """(S, T), the reader's own."""
    positions: int
    """W"""
    placed: bool = False
    """Whether G^0 went in."""
    seen: int = 0
    """How many positions the encoder's output has."""


class Appender(nn.Module):
    """Hooks on a model that append G^0, for the time of ``run``. At other times the model is the plain one.

    It has no weights. It is a module so that a replica in DataParallel has an appender of its own: the replica's hooks
    still belong to the first one, so G^0 does not go in, and ``run`` finds that.
    """

    def __init__(self, model: PreTrainedModel, who: str) -> None:
        """
        Args:
            who: Name of the model, for errors.

        Raises:
            UnsupportedModelError: See ``place_of``.
        """
        super().__init__()
        # A short batch switches BigBird from sparse to full attention for good, and sparse attention pads inside the
        # model, to whole blocks. With full attention from the start, the order of batches does not matter.
        if (set_attention := getattr(model.base_model, "set_attention_type", None)) is not None:
            with torch.random.fork_rng(devices=[]):  # its new modules draw weights, then get the old ones
                set_attention("original_full")
        place = place_of(model, who)
        embeddings = model.base_model.get_submodule(place.embeddings)
        self._pad = int(getattr(model.config, "pad_token_id", None) or 0)
        self._arguments = tuple(inspect.signature(embeddings.forward).parameters)
        self._batch: _Batch | None = None
        embeddings.register_forward_pre_hook(self._narrow, with_kwargs=True)
        if place.embeddings != place.states:
            embeddings.register_forward_hook(self._widen)
        model.base_model.get_submodule(place.states).register_forward_hook(self._append)
        model.base_model.register_forward_hook(self._count)

    def run(
        self,
        forward: Callable[[dict[str, Tensor]], Tensor],
        inputs: Mapping[str, Tensor],
        appended: Tensor,
        resource_mask: Tensor,
        order: Tensor,
    ) -> Tensor:
        """Logits of the model with G^0 appended.

        Args:
            forward: Runs the model on inputs of W positions.
            inputs: Inputs of the plain model, (S, T): ``input_ids``, ``attention_mask``, perhaps ``token_type_ids``.
            appended: G^0, (S, R, H).
            resource_mask: (S, R), 1 for states.
            order: (S, W), see ``packed_order``.

        Raises:
            UnsupportedModelError: If the encoder did not see G^0 at W positions.
        """
        T, W = inputs["input_ids"].shape[1], order.shape[1]
        wide = {name: functional.pad(tensor, (0, W - T)) for name, tensor in inputs.items()}
        wide["input_ids"] = functional.pad(inputs["input_ids"], (0, W - T), value=self._pad)
        mask = torch.cat([inputs["attention_mask"], resource_mask.to(inputs["attention_mask"].dtype)], dim=1)
        wide["attention_mask"] = mask.gather(1, order)
        first_row = torch.arange(len(order), device=order.device)[:, None] * mask.shape[1]
        batch = _Batch(appended, (first_row + order).flatten(), inputs["attention_mask"], W)
        self._batch = batch
        try:
            logits = forward(wide)
        except (RuntimeError, IndexError) as error:
            if batch.placed or is_out_of_memory(error):
                raise
            raise self._lost(f"the model fails before they are appended: {error_text(error).rstrip('.')}") from error
        finally:
            self._batch = None
        # A model may silently accept a longer mask over fewer positions, so count the positions of its output.
        if not batch.placed or batch.seen != W:
            seen = batch.seen if batch.placed else T
            raise self._lost(f"it saw {seen} positions instead of {W} (reader and resource)")
        return logits

    def _lost(self, reason: str) -> UnsupportedModelError:
        remedy = "Choose another reader."
        if getattr(self, "_is_replica", False):  # torch marks the copies that DataParallel makes
            remedy = "Use torchrun for several GPUs: torch.nn.DataParallel loses the hook that appends the states."
        return UnsupportedModelError(f"The resource's states did not reach the encoder: {reason}.", remedy)

    def _narrow(
        self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The inputs of the embeddings, cut to the reader's positions."""
        if (batch := self._batch) is None:
            return None
        T = batch.attention_mask.shape[1]

        def own(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != batch.positions:
                return value
            # Where a short sequence's tokens end, its states follow; they are no tokens.
            return batch.attention_mask.to(value.dtype) if "mask" in name and value.dim() == 2 else value[:, :T]

        names = (*self._arguments, *[""] * len(args))
        return (
            tuple(own(name, value) for name, value in zip(names, args, strict=False)),
            {name: own(name, value) for name, value in named.items()},
        )

    def _widen(self, module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        """Narrow embeddings (S, T, width), with zeros where G^0 and padding will be: (S, W, width)."""
        if (batch := self._batch) is None:
            return embeddings
        return functional.pad(embeddings, (0, 0, 0, batch.positions - embeddings.shape[1]))

    def _append(self, module: nn.Module, inputs: Any, states: Tensor) -> Tensor:
        """Eq. 3: the reader's (S, T or W, H) and G^0 to (S, W, H)."""
        if (batch := self._batch) is None:
            return states
        own: Tensor = states[:, : batch.attention_mask.shape[1]]
        both = torch.cat([own, batch.appended.to(states.dtype)], dim=1)
        batch.placed = True
        return both.flatten(0, 1).index_select(0, batch.rows).view(len(both), batch.positions, -1)

    def _count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._batch is not None:
            self._batch.seen = output[0].shape[1]
