"""Check on a few tokens that a loaded model can be trained as a reader, before anything long starts.

Equation 3 appends the resource's states to the reader's own. The checks run the model, because the name of its
architecture is not enough: its configuration can ask for a causal mask.

Shape letters: B sequences, T tokens (l1), R states of the resource (l2), H the reader's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kr2cache.errors import UnsupportedModelError, error_text
from kr2cache.fusion import parse_fusion
from kr2cache.models.encode import padding_mask
from kr2cache.models.load import vocabulary
from kr2cache.system.device import is_out_of_memory
from kr2cache.tasks.base import Head
from kr2cache.training.kreader import KReader

LENGTHS = ((5, 4), (3, 2))
"""(l1, l2) of the two sequences."""
ROUNDING = 1e-5
"""Largest difference by rounding, as a share of the largest logit."""


def check_plain(model: PreTrainedModel, head: Head, inputs: Mapping[str, Tensor], labels: int, who: str) -> None:
    """Raise ``UnsupportedModelError`` unless the model gives finite logits of the right shape for real examples.

    Args:
        model: The task model, in evaluation mode.
        inputs: A few examples, as ``KReader.forward`` takes them.
        labels: Number of labels; for a choice head, number of choices per example.
        who: Name of the model, for the error.
    """
    B, T = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
    expected = (B, T, labels) if head == "token" else (B, labels)
    try:
        with torch.inference_mode():
            logits = KReader(model, head)(**inputs)["logits"]
    except Exception as error:  # models of any architecture can raise anything
        if is_out_of_memory(error):
            raise
        reason = error_text(error)
        raise UnsupportedModelError(
            f"{who} ({model.config.model_type}) cannot be trained on this task; its first batch fails: {reason}",
            "Choose another reader.",
        ) from error
    if tuple(logits.shape) != expected:
        raise UnsupportedModelError(
            f"{who} ({model.config.model_type}) gives logits of shape {tuple(logits.shape)}; {expected} was expected.",
            "Choose another reader.",
        )
    if not bool(torch.isfinite(logits).all()):
        raise UnsupportedModelError(
            f"{who} ({model.config.model_type}) gives logits that are not finite numbers.",
            "Its weights are damaged or too large: choose another checkpoint.",
        )


def check_appended(model: PreTrainedModel, head: Head, who: str) -> None:
    """Raise ``UnsupportedModelError`` unless logits depend on appended states, and only on those that are not masked.

    Args:
        model: The task model, in evaluation mode. It keeps the hooks that append states, so do not use it as a plain
            model afterwards.
        who: Name of the model, for the error.
    """
    width = int(model.config.hidden_size)
    # One layer as wide as the reader: states reach the encoder unchanged.
    reader = KReader(model, head, fusion=parse_fusion("last1", 1), projection="none", resource_width=width)
    trial = _Trial.of(model, head)
    for check in CHECKS:
        failed = check(reader, trial)
        if failed is not None:
            causal = bool(getattr(model.config, "is_decoder", False))
            raise UnsupportedModelError(
                f"{who} ({model.config.model_type}) cannot be a KReader of method kr2: {failed}."
                + (' Its config.json has "is_decoder": true: no token sees the tokens after it.' if causal else ""),
                ('Set "is_decoder": false there, or choose' if causal else "Choose")
                + " another reader. To train it without a resource: --method kreader.",
            )


@dataclass(frozen=True)
class _Trial:
    """A small batch: two sequences, or one example of two choices."""

    head: Head
    input_ids: Tensor
    """(B, T)"""
    attention_mask: Tensor
    states: tuple[Tensor, Tensor]
    """Two different G^0 of shape (B, 1, R, H), about as large as embeddings after their layer norm."""
    resource_mask: Tensor
    """(B, R)"""

    @classmethod
    def of(cls, model: PreTrainedModel, head: Head) -> _Trial:
        draw = torch.Generator().manual_seed(0)  # does not change torch's own random state
        l1, l2 = torch.tensor(LENGTHS).T
        B, T, R = len(LENGTHS), int(l1.max()), int(l2.max())
        shape = (B, 1, R, int(model.config.hidden_size))
        return cls(
            head=head,
            input_ids=torch.randint(vocabulary(model.config), (B, T), generator=draw),
            attention_mask=torch.from_numpy(padding_mask(l1.numpy())),
            states=(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)),
            resource_mask=torch.from_numpy(padding_mask(l2.numpy())),
        )

    def logits(self, reader: KReader, appended: dict[str, Tensor]) -> Tensor:
        tokens = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.head == "choice":
            tokens = {name: values[None] for name, values in tokens.items()}
        with torch.inference_mode():
            logits: Tensor = reader(**tokens, **appended)["logits"]
        return logits

    def moved(self, reader: KReader, resource_mask: Tensor) -> tuple[Tensor, float]:
        """How much the logits change between the two sets of states, at each label position, and the largest logit."""
        first, second = (
            self.logits(reader, {"resource_states": states, "resource_mask": resource_mask}) for states in self.states
        )
        moved = (first - second).abs()
        if self.head == "token":
            moved = moved.amax(dim=-1)[self.attention_mask == 1]
        else:
            moved = moved.flatten() if self.head == "choice" else moved.amax(dim=-1)
        return moved, float(first.abs().max())


def _states_are_seen(reader: KReader, trial: _Trial) -> str | None:
    moved, _ = trial.moved(reader, trial.resource_mask)
    blind = int((moved == 0).sum())
    if not blind:
        return None
    return f"other states of the resource do not change the logits of {blind} of {len(moved)} {trial.head}s at all"


def _masked_states_are_not_seen(reader: KReader, trial: _Trial) -> str | None:
    moved, largest = trial.moved(reader, torch.zeros_like(trial.resource_mask))
    if float(moved.max()) <= ROUNDING * largest:
        return None
    return f"states that are masked change its logits by up to {float(moved.max()):.2g}"


CHECKS: tuple[Callable[[KReader, _Trial], str | None], ...] = (_states_are_seen, _masked_states_are_not_seen)
"""Each returns what is wrong, or None."""
