"""The KReader: a Hugging Face task model that reads a resource's states beside its own embeddings.

KR2, eq. 1-3: ``H^_res = sum_i w_i H_res^i``, ``G^0 = f_{h2:h1}(H^_res)``, ``H^_reader^0 = Concat(H_reader^0, G^0)``.
``appending`` appends G^0 to ``hidden_states[0]``; logits are cut to the first l1 positions before the loss. Without a
fusion, the model is the unchanged Hugging Face model: the baseline.

Shape letters: B sequences, T tokens of the reader (l1), R positions of the resource (l2), L layers, D and H widths h2
and h1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from kr2cache.errors import CacheError, ConfigError
from kr2cache.models.load import quiet
from kr2cache.tasks.base import Head, Kind, Task
from kr2cache.training.appending import Appender, packed_order
from kr2cache.training.resource_input import InputSettings, ResourceInput

HEADS: dict[Head, Any] = {
    "token": AutoModelForTokenClassification,
    "sequence": AutoModelForSequenceClassification,
    "choice": AutoModelForMultipleChoice,
}

PROBLEM_TYPES: Mapping[Kind, str] = {"multilabel": "multi_label_classification", "regression": "regression"}
"""``problem_type`` of a reader's configuration, from which transformers chooses the same loss as ``KReader.loss``. The
other kinds have none: their loss is the cross entropy."""
IGNORED = -100
"""Label of positions that do not count, as in torch's cross entropy."""
EXTRAS = "kr2.safetensors"
EXTRAS_CONFIG = "kr2.json"


SCORED_APART = ("roformer",)
"""Architectures whose model for multiple choice takes the state of the last position, padding or not."""


def task_class(head: Head, config: PretrainedConfig) -> Any:
    """The auto class of the task model. If an architecture has no model for multiple choice, or none that serves, it is
    that of sequence classification, with one score for each choice.
    """
    chooses = HEADS["choice"]
    by_code = chooses.__name__ in (getattr(config, "auto_map", None) or {})
    has_own = type(config) in chooses._model_mapping and config.model_type not in SCORED_APART
    return HEADS["sequence"] if head == "choice" and not (has_own or by_code) else HEADS[head]


class KReader(nn.Module):
    """A task model, either plain or with the states of resources appended to its embeddings."""

    def __init__(self, model: PreTrainedModel, head: Head, inputs: Sequence[InputSettings] = ()) -> None:
        """
        Args:
            model: The Hugging Face task model of ``head``.
            inputs: Of each resource, in the order in which their states are appended. Empty for the plain model.
        """
        super().__init__()
        self.model = model
        self.head = head
        self.problem_type: str | None = model.config.problem_type if head == "sequence" else None
        """See ``PROBLEM_TYPES``."""
        self.scores_choices = head == "choice" and task_class(head, model.config) is HEADS["sequence"]
        """Whether the model scores each choice as a sequence of its own."""
        width = int(model.config.hidden_size) if inputs else 0
        self.inputs = nn.ModuleList(ResourceInput(one, width) for one in inputs)
        if inputs:
            self.appender = Appender(model, type(model).__name__)

    @property
    def resources(self) -> list[ResourceInput]:
        """What of each resource is appended; empty for the plain model."""
        return [one for one in self.inputs if isinstance(one, ResourceInput)]

    @property
    def config(self) -> PretrainedConfig:
        """The task model's configuration. transformers.Trainer reads it."""
        return self.model.config

    def get_input_embeddings(self) -> nn.Module:
        """transformers.Trainer needs them for noise on embeddings (NEFTune), a setting of [training]."""
        return self.model.get_input_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """transformers.Trainer calls it if [training] asks for it."""
        self.model.gradient_checkpointing_enable(**options)  # type: ignore[no-untyped-call]

    def fusion_parameters(self) -> list[nn.Parameter]:
        """The parameters that can have their own learning rate; empty if no weights of a fusion are learned."""
        return [parameter for one in self.resources for parameter in one.fusion_parameters()]

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        resource_states: Tensor | Sequence[Tensor] | None = None,
        resource_mask: Tensor | None = None,
        order: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            input_ids: (B, T), or (B, C, T) for C choices, like ``attention_mask`` and ``token_type_ids``.
            resource_states: (B * C, L, R, D); of several resources one such tensor each, in the order of ``resources``.
            resource_mask: (B * C, R), 1 for states, 0 for padding; R positions of all resources, one behind the other.
            order: (B * C, W), ``packed_order`` of both masks, on the device. Without it, it is computed here.
            labels: As for ``loss``.

        Returns:
            ``logits``: (B, T, labels), (B, labels) or (B, C); with labels also their ``loss``. Regression has (B, 1).
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if not self.resources:
            logits = self.plain_logits(inputs)
        elif resource_states is None or resource_mask is None:
            raise ConfigError("This KReader has a resource, but the batch has no states of it.")
        else:
            logits = self.logits_beside(inputs, self._appended(resource_states), resource_mask, order)
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss(logits, labels), "logits": logits}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, float32 scalar: cross entropy; for multilabel binary cross entropy with logits, over examples
        and labels; for regression the squared error.

        Args:
            logits: As ``forward`` returns them.
            labels: (B, T) for tagging, ``IGNORED`` at positions without a label; (B,) for classification and choice.
                Float for multilabel, (B, labels) of 0 and 1, and for regression, (B, 1).
        """
        logits = logits.float()
        if self.problem_type == PROBLEM_TYPES["regression"]:
            return functional.mse_loss(logits, labels)
        if self.problem_type == PROBLEM_TYPES["multilabel"]:
            return functional.binary_cross_entropy_with_logits(logits, labels)
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED)

    def _appended(self, resource_states: Tensor | Sequence[Tensor]) -> Tensor:
        """G^0 of every resource, (B * C, R, H): Concat(G_1^0, G_2^0, ...)."""
        states = [resource_states] if isinstance(resource_states, Tensor) else resource_states
        parts = [one(own) for one, own in zip(self.resources, states, strict=True)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def plain_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of the task model without a resource, from inputs as ``forward`` takes them."""
        return self._logits(_flat(inputs), inputs["input_ids"].shape[:-1])

    def logits_beside(
        self, inputs: Mapping[str, Tensor], appended: Tensor, resource_mask: Tensor, order: Tensor | None = None
    ) -> Tensor:
        """Logits of the task model with G^0 appended.

        Args:
            inputs: Inputs of the task model, as ``forward`` takes them.
            appended: G^0, (B * C, R, H).
            resource_mask: (B * C, R).
            order: See ``forward``.
        """
        shape, flat = inputs["input_ids"].shape, _flat(inputs)
        if order is None:
            order = packed_order(flat["attention_mask"], resource_mask)
        logits = self.appender.run(lambda wide: self._logits(wide, shape[:-1]), flat, appended, resource_mask, order)
        return logits[:, : shape[-1]] if self.head == "token" else logits

    def _logits(self, flat: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Logits for inputs (S, positions); ``shape`` is (B,) or (B, C), S together."""
        if self.head == "choice" and not self.scores_choices:
            flat = {name: tensor.view(*shape, -1) for name, tensor in flat.items()}
        logits: Tensor = self.model(**flat).logits
        return logits.view(shape) if self.head == "choice" else logits

    # Saving and loading ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the task model as transformers does, and the KReader's own weights and settings beside it."""
        with quiet():
            self.model.save_pretrained(folder)
        about: dict[str, Any] = {"head": self.head}
        if self.resources:
            tensors = {_stored(name): one.contiguous() for name, one in self.inputs.state_dict().items()}
            save_file(tensors, folder / EXTRAS)
            first, *more = (one.settings.json() for one in self.resources)
            about |= {**first, **({"more": more} if more else {})}
        (folder / EXTRAS_CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> KReader:
        """Read what ``save`` wrote (``reader/`` of a run folder). The KReader is in evaluation mode.

        Args:
            trust_remote_code: Run Python code that came with the original model.

        Raises:
            CacheError: If ``save`` did not write this folder, or weights are missing.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / EXTRAS_CONFIG).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CacheError(
                f"{folder} is not a trained KReader: {EXTRAS_CONFIG} cannot be read.", "Give reader/ of a run folder."
            ) from error
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model, report = task_class(about["head"], config).from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
        saved_as, now = (config.architectures or [""])[0], type(model).__name__
        if saved_as and saved_as != now:
            raise CacheError(
                f"The reader in {folder} is a {saved_as}; today's readers of this kind are a {now}.",
                "An earlier version trained it: train it again.",
            )
        if lost := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
            raise CacheError(
                f"The reader in {folder} lacks {len(lost)} of its weights, or has them in other shapes: "
                f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}.",
                "The reader is incomplete; train it again.",
            )
        if "fusion" not in about:
            return cls(model, about["head"]).eval()
        reader = cls(model, about["head"], [InputSettings.of_json(one) for one in (about, *about.get("more", ()))])
        tensors = load_file(folder / EXTRAS)
        wanted = {_stored(name): name for name in reader.inputs.state_dict()}
        if wrong := sorted(wanted.keys() ^ tensors.keys()):
            raise CacheError(
                f"{folder / EXTRAS} does not fit {EXTRAS_CONFIG}: {', '.join(wrong)}.",
                "The reader is incomplete; train it again.",
            )
        reader.inputs.load_state_dict({name: tensors[stored] for stored, name in wanted.items()})
        return reader.eval()

    def check_task(self, task: Task, folder: Path) -> None:
        """Raise ``CacheError`` unless this trained reader has the head and the labels of the task, in the same order,
        and learned with its loss.

        Args:
            folder: Where the reader was loaded from, for the error.
        """
        names = self.config.id2label or {}
        fits = self.head == task.head and self.problem_type == PROBLEM_TYPES.get(task.kind)
        named = task.kind in ("choice", "regression") or names == dict(enumerate(task.labels))
        if fits and named:
            return
        problem = f", {self.problem_type}" if self.problem_type else ""
        raise CacheError(
            f"The reader in {folder} (head {self.head}{problem}, labels {some(names.values())}) does not fit task "
            f"{task.name!r} of this version of kr2cache (head {task.head}, {task.kind}, labels {some(task.labels)}).",
            "Train the run again.",
        )


def _stored(name: str) -> str:
    """The name in the file of a weight of ``KReader.inputs``. The first resource's have no number in front."""
    return name.removeprefix("0.")


def _flat(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(S, positions) for inputs with or without choices."""
    return {name: tensor.flatten(0, -2) for name, tensor in inputs.items()}


def some(labels: Iterable[object]) -> str:
    """The first four, and how many there are."""
    names = list(map(str, labels))
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
