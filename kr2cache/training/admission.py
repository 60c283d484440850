"""Check on a few tokens that a loaded model can be trained as a reader, before anything long starts.

Equation 3 appends the resource's states to the reader's own. Any architecture that handles them right is admitted. The
checks run the loaded model, because no list of names could say this: a configuration can ask for a causal mask.

Shape letters: B sequences, T tokens (l1), R states of the resource (l2), H the reader's width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kr2cache.errors import CacheError, KR2CacheError, UnsupportedModelError, error_text
from kr2cache.fusion import parse_fusion
from kr2cache.models.configuration import vocabulary
from kr2cache.models.encode import padding_mask
from kr2cache.models.load import head_names
from kr2cache.system.device import is_out_of_memory
from kr2cache.tasks import Task
from kr2cache.tasks.base import Head
from kr2cache.training.appending import TRIAL_TOKENS, packed_order, place_of
from kr2cache.training.kreader import KReader
from kr2cache.training.resource_input import InputSettings

LENGTHS = ((5, 4), (3, 2))
"""(l1, l2) of the two sequences."""
ROUNDING = 1e-4
"""Largest difference by rounding, as a share of the largest logit. Tiny models with new weights differ by at most 6e-6
if they pass, and by at least 4e-4 if they fail."""
CAUSAL = "its attention is causal: no token sees what stands behind it, and states are appended behind"


def check_plain(model: PreTrainedModel, head: Head, inputs: Mapping[str, Tensor], outputs: int, who: str) -> None:
    """Raise ``UnsupportedModelError`` unless the model gives finite logits of the right shape for real examples.

    Args:
        model: The task model, in evaluation mode.
        inputs: A few examples, as ``KReader.forward`` takes them.
        outputs: Number of labels; for a choice head, number of choices per example; for regression 1.
        who: Name of the model, for the error.
    """
    B, T = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
    expected = (B, T, outputs) if head == "token" else (B, outputs)
    try:
        with torch.inference_mode():
            logits = KReader(model, head)(**inputs)["logits"]
    except Exception as error:  # models of any architecture can raise anything
        if is_out_of_memory(error):
            raise
        reason, remedy = error_text(error), "Choose another reader."
        if getattr(model.config, "pad_token_id", None) is None and "pad" in reason.lower():
            remedy = "Give its tokenizer a padding token (pad_token in tokenizer_config.json), or choose another."
        raise UnsupportedModelError(
            f"{who} ({model.config.model_type}) cannot be trained on this task; its first batch fails: {reason}", remedy
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


def check_appended(model: PreTrainedModel, head: Head, positions: int, who: str) -> None:
    """Raise ``UnsupportedModelError`` unless this task model can be a reader with a resource: see ``check_reader``.

    Args:
        model: In evaluation mode. It keeps the hooks that append states; they do nothing for the plain model.
        positions: Largest number of positions of a sequence's tokens and its states.
        who: Name of the model, for the error.
    """
    try:
        place_of(model, who)
    except UnsupportedModelError as error:
        if not _is_causal_itself(model):
            raise
        raise _refused(model.config, who, CAUSAL, "Choose another reader.") from error
    # One layer as wide as the reader. The checks draw G^0, so nothing is fused or projected.
    width = int(model.config.hidden_size)
    reader = KReader(model, head, [InputSettings(fusion=parse_fusion("last1", 1), resource_width=width)])
    check_reader(reader, who)
    _check_room(reader, positions, who)


def _check_room(reader: KReader, positions: int, who: str) -> None:
    """Raise ``UnsupportedModelError`` if the encoder has not so many positions. Most encoders have no limit: positions
    are added to the embeddings of tokens alone. RoFormer keeps a table of angles, though, BigBird one of segments.
    """
    config = reader.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or positions <= limit:
        return
    shape = (1, 1, 1) if reader.head == "choice" else (1, 1)
    tokens = {name: torch.ones(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    appended = torch.zeros(1, positions - 1, int(config.hidden_size))
    try:
        with torch.inference_mode():
            reader.logits_beside(tokens, appended, torch.ones(1, positions - 1, dtype=torch.long))
    except Exception as error:  # models of any architecture can raise anything
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{who} ({config.model_type}) has {limit} positions (max_position_embeddings) for its tokens and the "
            f"resource's states together; there may be {positions}.",
            "Give a smaller --max-length or --resource-max-length.",
        ) from error


def check_reader(reader: KReader, who: str) -> None:
    """Raise ``UnsupportedModelError`` unless the reader's model handles appended states as equation 3 means them.

    Five checks on a batch of two short sequences: the logits are finite; other states change them; with all states
    masked, they are the plain reader's; a masked state changes nothing; a sequence has the same logits alone and beside
    a longer one. The outcome is kept for models of the same class and configuration, until the process ends.

    Args:
        reader: In evaluation mode, with a fusion.
        who: Name of the model, for the error.
    """
    config = reader.config
    key = (type(reader.model), reader.head, config.to_json_string(), config._attn_implementation)
    if key not in _outcomes:
        _outcomes[key] = _failed_check(reader)
    if (failed := _outcomes[key]) is not None:
        raise _refused(config, who, *failed)


def _refused(config: PretrainedConfig, who: str, reason: str, remedy: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{who} ({config.model_type}) cannot be a KReader of method kr2: {reason.rstrip('.')}.",
        f"{remedy} To train it without a resource: --method kreader.",
    )


_outcomes: dict[tuple[Any, ...], tuple[str, str] | None] = {}
"""What failed and what to do; None if all checks passed."""


def _failed_check(reader: KReader) -> tuple[str, str] | None:
    another = "Choose another reader."
    try:
        trial = _Trial.of(reader)
        for check in CHECKS:
            failed = check(trial)
            if failed is not None and check in COMPARING:
                with _another_head(reader):
                    failed = check(trial)
            if failed is None:
                continue
            if check is not _states_are_seen or not _is_causal(reader.model, trial.tokens["input_ids"]):
                return failed, another
            failed += f". {CAUSAL[0].upper()}{CAUSAL[1:]}"
            if not getattr(reader.config, "is_decoder", False):
                return failed, another
            failed += ' (its config.json has "is_decoder": true)'
            return failed, 'Set "is_decoder": false there, or choose another reader.'
    except Exception as error:  # models of any architecture can raise anything
        if is_out_of_memory(error):
            raise
        return f"its trial with appended states fails: {error_text(error)}", another
    return None


@dataclass(frozen=True)
class _Trial:
    """A small batch: two sequences, or one example of two choices. G^0 is about as large as embeddings after their
    layer norm."""

    reader: KReader
    tokens: dict[str, Tensor]
    """``input_ids`` and ``attention_mask``, (B, T) or (1, B, T)."""
    resource_mask: Tensor
    """(B, R)"""
    order: Tensor
    """(B, T + R at most), as for states that are all seen."""
    appended: Tensor
    """(B, R, H)"""
    others: Tensor
    """Other states."""

    @classmethod
    def of(cls, reader: KReader) -> _Trial:
        draw = torch.Generator().manual_seed(0)  # does not change torch's own random state
        l1, l2 = torch.tensor(LENGTHS).T
        attention_mask, resource_mask = (torch.from_numpy(padding_mask(lengths.numpy())) for lengths in (l1, l2))
        B, T = attention_mask.shape
        input_ids = torch.randint(vocabulary(reader.config), (B, T), generator=draw)
        padding = int(getattr(reader.config, "pad_token_id", None) or 0) % vocabulary(reader.config)
        input_ids = torch.where(attention_mask == 1, input_ids, padding)
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask}
        states = torch.randn((2, *resource_mask.shape, int(reader.config.hidden_size)), generator=draw)
        device = reader.model.device
        return cls(
            reader=reader,
            tokens={name: _shaped(reader, tensor).to(device) for name, tensor in tokens.items()},
            resource_mask=resource_mask.to(device),
            order=packed_order(attention_mask, resource_mask).to(device),
            appended=states[0].to(device),
            others=states[1].to(device),
        )

    def logits(self, *appended: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """For each G^0 given, the logits of the batch: (label positions, labels).

        Args:
            mask: (B, R), by default that of the batch.
        """
        n = len(appended)
        mask = self.resource_mask if mask is None else mask
        with torch.inference_mode():
            together = self.reader.logits_beside(
                {name: tensor.repeat(n, *[1] * (tensor.dim() - 1)) for name, tensor in self.tokens.items()},
                torch.cat(appended),
                mask.repeat(n, 1),
                self.order.repeat(n, 1),
            )
        return [self.labelled(one) for one in together.chunk(n)]

    def plain(self) -> Tensor:
        """Logits without G^0, as ``logits`` gives them."""
        with torch.inference_mode():
            return self.labelled(self.reader.plain_logits(self.tokens))

    def labelled(self, logits: Tensor) -> Tensor:
        """The logits that count, (label positions, labels): for tagging those of tokens."""
        if self.reader.head == "token":
            return logits[self.tokens["attention_mask"] == 1]
        return logits.flatten()[:, None] if self.reader.head == "choice" else logits

    def short_alone(self) -> Tensor:
        """(label positions, labels) of the second, shorter sequence without the first."""
        l1, l2 = LENGTHS[1]
        alone = {
            name: _shaped(self.reader, tensor[..., 1:2, :l1].reshape(1, l1)) for name, tensor in self.tokens.items()
        }
        with torch.inference_mode():
            logits = self.reader.logits_beside(alone, self.appended[1:2, :l2], self.resource_mask[1:2, :l2])
        return logits[0] if self.reader.head == "token" else logits.reshape(1, -1)


def _shaped(reader: KReader, sequences: Tensor) -> Tensor:
    """(B, T), or one example of B choices."""
    return sequences[None] if reader.head == "choice" else sequences


def _differ(first: Tensor, second: Tensor) -> float | None:
    """The largest difference, if it is more than rounding."""
    largest = float((first - second).abs().max())
    return None if largest <= ROUNDING * float(second.abs().max()) else largest  # nan differs


def _logits_are_finite(trial: _Trial) -> str | None:
    (logits,) = trial.logits(trial.appended)
    if bool(torch.isfinite(logits).all()):
        return None
    return "with states of the resource appended, its logits are not finite numbers"


def _states_are_seen(trial: _Trial) -> str | None:
    first, second = trial.logits(trial.appended, trial.others)
    blind = int((first == second).all(dim=1).sum())
    if not blind:
        return None
    return (
        f"other states of the resource do not change the logits of {blind} of {len(first)} {trial.reader.head}s at all"
    )


def _is_causal(model: PreTrainedModel, input_ids: Tensor) -> bool:
    """Whether tokens depend on those before them, but not on those behind them.

    Args:
        input_ids: (..., T), of which the first sequence is taken.
    """
    ids = input_ids.flatten(0, -2)[:1]

    def states(changed: int | None) -> Tensor:
        """(T, H) with another token at this place."""
        other = ids.clone()
        if changed is not None:
            other[:, changed] = (other[:, changed] + 1) % vocabulary(model.config)
        with torch.inference_mode():
            result: Tensor = model.base_model(input_ids=other, attention_mask=torch.ones_like(ids))[0][0]
        return result

    before = states(None)
    if len(before) != ids.shape[1]:  # Funnel has fewer states than tokens
        return False
    # Not bit by bit: with experts, another token changes in which batches tokens are multiplied.
    return _differ(states(-1)[:-1], before[:-1]) is None and _differ(states(0)[-1], before[-1]) is not None


def _is_causal_itself(model: PreTrainedModel) -> bool:
    """The same for a model that cannot be tried with states appended; False if it does not run on its own either."""
    try:
        return _is_causal(model, torch.arange(TRIAL_TOKENS, device=model.device)[None] % vocabulary(model.config))
    except Exception as error:  # models of any architecture can raise anything
        if is_out_of_memory(error):
            raise
        return False


@contextlib.contextmanager
def _another_head(reader: KReader) -> Iterator[None]:
    """Inside the block, the matrices of the head are drawn anew. A new head can happen to give logits near zero, beside
    which rounding looks large. Two heads in a row do not.
    """
    draw = torch.Generator().manual_seed(1)
    names = head_names(reader.model)
    matrices = [one for name, one in reader.model.named_parameters() if name in names and one.dim() > 1]
    before = [one.detach().clone() for one in matrices]
    try:
        with torch.no_grad():
            for one, kept in zip(matrices, before, strict=True):
                one.copy_(kept.std() * torch.randn(one.shape, generator=draw).to(one.device))
        yield
    finally:
        with torch.no_grad():
            for one, kept in zip(matrices, before, strict=True):
                one.copy_(kept)


def _masked_states_are_no_states(trial: _Trial) -> str | None:
    (masked,) = trial.logits(trial.appended, mask=torch.zeros_like(trial.resource_mask))
    if (by := _differ(masked, trial.plain())) is None:
        return None
    return f"with all states of the resource masked, its logits differ from the plain reader's by up to {by:.2g}"


def _masked_states_are_not_seen(trial: _Trial) -> str | None:
    seen = trial.resource_mask[..., None] == 1
    first, second = trial.logits(trial.appended, torch.where(seen, trial.appended, trial.others))
    if (by := _differ(second, first)) is None:
        return None
    return f"states that are masked change its logits by up to {by:.2g}"


def _batch_mates_are_not_seen(trial: _Trial) -> str | None:
    (together,) = trial.logits(trial.appended)
    alone = trial.short_alone()
    if (by := _differ(together[-len(alone) :], alone)) is None:
        return None
    return f"a sequence alone has other logits than beside a longer one: they differ by up to {by:.2g}"


CHECKS: tuple[Callable[[_Trial], str | None], ...] = (
    _logits_are_finite,
    _states_are_seen,
    _masked_states_are_no_states,
    _masked_states_are_not_seen,
    _batch_mates_are_not_seen,
)
"""Each returns what is wrong, or None."""
COMPARING = CHECKS[2:]
"""These compare logits within rounding."""


def load_reader(folder: Path, task: Task, *, trust_remote_code: bool) -> KReader:
    """The trained reader of a run, after all checks.

    Args:
        folder: ``reader/`` of the run.
        task: The task that it was trained on.

    Raises:
        CacheError: If it is incomplete or damaged, or does not give the labels of the task in their order.
        UnsupportedModelError: If it has resources and fails a check of admission.
    """
    try:
        reader = KReader.load(folder, trust_remote_code=trust_remote_code)
    except KR2CacheError:
        raise
    except Exception as error:  # a damaged file makes transformers, safetensors and torch raise almost anything
        reason = error_text(error)
        raise CacheError(
            f"The reader in {folder} cannot be loaded: {reason}",
            f"It is incomplete or damaged. Remove {folder.parent} and train it again.",
        ) from error
    reader.check_task(task, folder)
    if reader.resources:
        check_reader(reader, f"The reader in {folder}")  # another transformers may have trained it
    return reader
