"""The KReader: a Hugging Face task model that reads a resource's states beside its own embeddings.

KR2, eq. 1-3: ``H^_res = sum_i w_i H_res^i``, ``G^0 = f_{h2:h1}(H^_res)``, ``H^_reader^0 = Concat(H_reader^0, G^0)``.
A forward hook on the base model's ``embeddings`` appends G^0 to ``hidden_states[0]``. The attention mask is extended to
l1 + l2, and logits are cut to the first l1 positions before the loss. Without a fusion, the model is the unchanged
Hugging Face model: the baseline.

Shape letters: B sequences, T tokens of the reader (l1), R positions of the resource (l2), L layers, D and H widths h2
and h1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from kr2cache.config import Projection
from kr2cache.errors import CacheError, ConfigError, UnsupportedModelError
from kr2cache.fusion import Fusion
from kr2cache.models.load import quiet
from kr2cache.tasks.base import Head, Task
from kr2cache.training.resource_input import ResourceInput

HEADS: dict[Head, Any] = {
    "token": AutoModelForTokenClassification,
    "sequence": AutoModelForSequenceClassification,
    "choice": AutoModelForMultipleChoice,
}

ADMITTED = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "ernie", "megatron-bert", "electra")
"""Architectures that pass tests/training/test_admission.py: if all of G is masked, the output is that of the plain
reader; a masked position of G changes nothing; padding to a longer sequence in the batch changes nothing."""

IGNORED = -100
"""Label of positions that do not count, as in torch's cross entropy."""
EXTRAS = "kr2.safetensors"
EXTRAS_CONFIG = "kr2.json"


def check_admitted(config: PretrainedConfig, who: str) -> None:
    """Raise ``UnsupportedModelError`` for an architecture that cannot take appended states."""
    if config.model_type not in ADMITTED:
        raise UnsupportedModelError(
            f"{who} is a {config.model_type} model, which cannot be a KReader of method kr2: kr2cache has not "
            "shown that this architecture handles appended states correctly (masks, padding, batches).",
            f"These architectures pass: {', '.join(ADMITTED)}. To train it without a resource: --method kreader.",
        )
    width = getattr(config, "embedding_size", config.hidden_size)
    if width != config.hidden_size:
        raise UnsupportedModelError(
            f"{who} has embeddings of width {width} and an encoder of width {config.hidden_size}: states cannot be "
            "appended.",
            "Choose a reader whose embeddings are as wide as its encoder.",
        )


class KReader(nn.Module):
    """A task model, either plain or with a resource's states appended to its embeddings."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        *,
        fusion: Fusion | None = None,
        projection: Projection = "none",
        resource_width: int = 0,
    ) -> None:
        """
        Args:
            model: The Hugging Face task model of ``head``.
            fusion: None for the plain model.
            projection: ``none``, ``mlp`` or ``direct``; ``projection_kind`` replaces ``auto``.
            resource_width: h2.
        """
        super().__init__()
        self.model = model
        self.head = head
        self.resource: ResourceInput | None = None
        self._appended: Tensor | None = None
        self._positions = 0
        """How many positions the encoder's output has in this forward pass; 0 until states are appended."""
        if fusion is not None:
            check_admitted(model.config, type(model).__name__)
            self.resource = ResourceInput(fusion, projection, resource_width, int(model.config.hidden_size))
            model.base_model.get_submodule("embeddings").register_forward_hook(self._append)
            model.base_model.register_forward_hook(self._count_positions)

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
        return [] if self.resource is None else self.resource.fusion_parameters()

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        resource_states: Tensor | None = None,
        resource_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            input_ids: (B, T), or (B, C, T) for C choices, like ``attention_mask`` and ``token_type_ids``.
            resource_states: (B * C, L, R, D).
            resource_mask: (B * C, R), 1 for states, 0 for padding.
            labels: (B, T) for tagging, ``IGNORED`` at positions without a label; else (B,).

        Returns:
            ``logits``: (B, T, labels), (B, labels) or (B, C); ``loss`` (float32, mean cross entropy) with labels.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        T = expected = input_ids.shape[-1]
        if self.resource is not None:
            if resource_states is None or resource_mask is None:
                raise ConfigError("This KReader has a resource, but the batch has no states of it.")
            self._appended = self.resource(resource_states)
            mask = resource_mask.to(attention_mask.dtype).view(*attention_mask.shape[:-1], -1)
            inputs["attention_mask"] = torch.cat([attention_mask, mask], dim=-1)
            expected = T + resource_mask.shape[1]
            self._positions = 0
        try:
            logits = self.model(**inputs).logits
        except RuntimeError as error:
            if self.resource is not None and not self._positions:
                raise _states_lost(T, T, expected) from error
            raise
        finally:
            self._appended = None
        # A model may silently accept a longer mask over fewer positions, so count the positions of its output.
        if self.resource is not None and self._positions != expected:
            raise _states_lost(self._positions or T, T, expected)
        if self.head == "token":
            logits = logits[:, :T]
        if labels is None:
            return {"logits": logits}
        loss = functional.cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED
        )
        return {"loss": loss, "logits": logits}

    def _append(self, module: nn.Module, inputs: Any, embeddings: Tensor) -> Tensor:
        """Eq. 3 along the sequence: (B, T, H) to (B, T + R, H)."""
        if self._appended is None:
            return embeddings
        whole = torch.cat([embeddings, self._appended.to(embeddings.dtype)], dim=1)
        self._positions = whole.shape[1]
        return whole

    def _count_positions(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._positions = output[0].shape[1]

    # Saving and loading ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the task model as transformers does, and the KReader's own weights and settings beside it."""
        with quiet():
            self.model.save_pretrained(folder)
        about: dict[str, Any] = {"head": self.head}
        if self.resource is not None:
            save_file({name: one.contiguous() for name, one in self.resource.state_dict().items()}, folder / EXTRAS)
            about |= {
                "fusion": asdict(self.resource.fusion),
                "projection": self.resource.projection_kind,
                "resource_width": self.resource.resource_width,
            }
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
            model, report = HEADS[about["head"]].from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code,
            )
        if lost := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
            raise CacheError(
                f"The reader in {folder} lacks {len(lost)} of its weights, or has them in other shapes: "
                f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}.",
                "The reader is incomplete; train it again.",
            )
        if "fusion" not in about:
            return cls(model, about["head"]).eval()
        fusion = Fusion(**{**about["fusion"], "layers": tuple(about["fusion"]["layers"])})
        reader = cls(
            model,
            about["head"],
            fusion=fusion,
            projection=about["projection"],
            resource_width=about["resource_width"],
        )
        assert reader.resource is not None, "it has a fusion"
        result = reader.resource.load_state_dict(load_file(folder / EXTRAS), strict=False)
        if wrong := [*result.missing_keys, *result.unexpected_keys]:
            raise CacheError(
                f"{folder / EXTRAS} does not fit {EXTRAS_CONFIG}: {', '.join(wrong)}.",
                "The reader is incomplete; train it again.",
            )
        return reader.eval()

    def check_task(self, task: Task, folder: Path) -> None:
        """Raise ``CacheError`` unless this trained reader has the head and the labels of the task, in the same order.

        Args:
            folder: Where the reader was loaded from, for the error.
        """
        names = self.config.id2label or {}
        if self.head == task.head and (task.head == "choice" or names == dict(enumerate(task.labels))):
            return
        raise CacheError(
            f"The reader in {folder} (head {self.head}, labels {_some(names.values())}) does not fit task "
            f"{task.name!r} of this version of kr2cache (head {task.head}, labels {_some(task.labels)}).",
            "Train the run again.",
        )


def _some(labels: Iterable[object]) -> str:
    names = list(map(str, labels))
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _states_lost(seen: int, reader: int, expected: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The encoder saw {seen} positions instead of {expected} (reader {reader} + resource {expected - reader}): the "
        "resource's states did not reach it.",
        "Use torchrun for several GPUs: torch.nn.DataParallel loses the hook that appends the states.",
    )
