"""The KReader: a Hugging Face task model that reads a resource's states beside its own embeddings.

KR2, eq. 1-3: ``H^_res = sum_i w_i H_res^i``, ``G^0 = f_{h2:h1}(H^_res)``, ``H^_reader^0 = Concat(H_reader^0, G^0)``.
G^0 is appended where ``hidden_states[0]`` forms, by a forward hook on the base model's ``embeddings``; the attention
mask is extended to l1 + l2; logits are cut to the first l1 positions before the loss. Without a fusion the model is the
plain Hugging Face one, which makes it the baseline that its users know.

Shape letters: B sequences, T tokens of the reader (l1), R positions of the resource (l2), L layers, D and H widths h2
and h1.
"""

from __future__ import annotations

import copy
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
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from kr2cache.config import Projection
from kr2cache.errors import CacheError, ConfigError, UnsupportedModelError
from kr2cache.fusion import Fusion
from kr2cache.models.load import head_names, load_config, load_pretrained, not_finite, quiet
from kr2cache.models.registry import ModelSpec
from kr2cache.tasks.base import Head, Task

HEADS: dict[Head, Any] = {
    "token": AutoModelForTokenClassification,
    "sequence": AutoModelForSequenceClassification,
    "choice": AutoModelForMultipleChoice,
}

ADMITTED = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "ernie", "megatron-bert", "electra")
"""Architectures that pass the admission tests (tests/test_admission.py): with all of G masked the output is the plain
reader's, a masked position of G changes nothing, and a sequence alone equals itself beside a longer batch mate."""

IGNORED = -100
"""Label of positions that do not count, as in torch's cross entropy."""
EXTRAS = "kr2.safetensors"
EXTRAS_CONFIG = "kr2.json"


def check_admitted(config: PretrainedConfig, who: str) -> None:
    """Raise ``UnsupportedModelError`` for an architecture that cannot take appended states."""
    if config.model_type not in ADMITTED:
        raise UnsupportedModelError(
            f"{who} is a {config.model_type} model, which cannot be a KReader of method kr2: it does not pass the "
            "tests that appended states are masked, padded and batched correctly.",
            f"Architectures that do: {', '.join(ADMITTED)}. As plain baseline: --method kreader.",
        )
    width = getattr(config, "embedding_size", config.hidden_size)
    if width != config.hidden_size:
        raise UnsupportedModelError(
            f"{who} has embeddings of width {width}, its encoder {config.hidden_size}: there is no place to append to.",
            "Choose a reader whose embeddings have its encoder's width.",
        )


def projection_kind(projection: Projection, resource_width: int, reader_width: int) -> Projection:
    """What ``auto`` means for these widths: none when h2 = h1, else an MLP.

    Raises:
        ConfigError: For ``none`` between different widths.
    """
    if projection == "auto":
        return "none" if resource_width == reader_width else "mlp"
    if projection == "none" and resource_width != reader_width:
        raise ConfigError(
            f"--projection none needs equal widths; the resource has {resource_width}, the reader {reader_width}.",
            "Use --projection auto (an MLP here).",
        )
    return projection


def make_projection(kind: Projection, layers: int, resource_width: int, reader_width: int) -> nn.Module:
    """f_{h2:h1} of eq. 2: nothing, an MLP of two layers, or the direct projection of all layers side by side."""
    if kind == "none":
        return nn.Identity()
    if kind == "direct":
        return nn.Linear(layers * resource_width, reader_width)
    return nn.Sequential(nn.Linear(resource_width, reader_width), nn.GELU(), nn.Linear(reader_width, reader_width))


class KReader(nn.Module):
    """A task model, alone or with a resource's states appended to its embeddings."""

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
            projection: ``none``, ``mlp`` or ``direct``; ``auto`` is decided by the caller.
            resource_width: h2.
        """
        super().__init__()
        self.model = model
        self.head = head
        self.fusion = fusion
        self.projection_kind = projection
        self.resource_width = resource_width
        self._appended: Tensor | None = None
        self._positions = 0
        """Of the encoder's output in the last forward pass; 0 before the states were appended."""
        if fusion is not None:
            check_admitted(model.config, type(model).__name__)
            weights = torch.from_numpy(fusion.weights)
            if fusion.trainable and projection != "direct":
                self.fusion_weights = nn.Parameter(weights)
            else:
                self.register_buffer("fusion_weights", weights)
            self.projection = make_projection(
                projection, len(fusion.layers), resource_width, int(model.config.hidden_size)
            )
            model.base_model.get_submodule("embeddings").register_forward_hook(self._append)
            model.base_model.register_forward_hook(self._count_positions)

    @property
    def config(self) -> PretrainedConfig:
        """The task model's; transformers.Trainer asks for it."""
        return self.model.config

    def get_input_embeddings(self) -> nn.Module:
        """For transformers.Trainer, where [training] asks for noise on them (NEFTune)."""
        return self.model.get_input_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """For transformers.Trainer, where [training] asks for it."""
        self.model.gradient_checkpointing_enable(**options)  # type: ignore[no-untyped-call]

    def resource_embeddings(self, states: Tensor) -> Tensor:
        """G^0, eq. 1 and 2.

        Args:
            states: (B, L, R, D) of any floating dtype: the fusion's layers, or L = 1 where they are fused already.

        Returns:
            float32 (B, R, H).
        """
        states = states.float()
        if self.projection_kind == "direct":
            return self._project(states.transpose(1, 2).flatten(2))
        if states.shape[1] == 1:
            return self._project(states[:, 0])
        return self._project(torch.einsum("l,blrd->brd", self.fusion_weights, states))

    def _project(self, fused: Tensor) -> Tensor:
        projected: Tensor = self.projection(fused)
        return projected

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
            labels: (B, T) for tagging, ``IGNORED`` where there is none; else (B,).

        Returns:
            ``logits``: (B, T, labels), (B, labels) or (B, C); ``loss`` (float32, mean cross entropy) with labels.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        T = expected = input_ids.shape[-1]
        if self.fusion is not None:
            if resource_states is None or resource_mask is None:
                raise ConfigError("This KReader was made with a resource, but got no states of it.")
            self._appended = self.resource_embeddings(resource_states)
            mask = resource_mask.to(attention_mask.dtype).view(*attention_mask.shape[:-1], -1)
            inputs["attention_mask"] = torch.cat([attention_mask, mask], dim=-1)
            expected = T + resource_mask.shape[1]
            self._positions = 0
        try:
            logits = self.model(**inputs).logits
        except RuntimeError as error:
            if self.fusion is not None and not self._positions:
                raise _states_lost(T, T, expected) from error
            raise
        finally:
            self._appended = None
        # A model may accept a longer mask over fewer positions without a word, so look at what it computed.
        if self.fusion is not None and self._positions != expected:
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

    # Keeping it -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the task model as transformers does, and beside it what makes it a KReader."""
        with quiet():
            self.model.save_pretrained(folder)
        about: dict[str, Any] = {"head": self.head}
        if self.fusion is not None:
            extras = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}
            save_file({name: tensor.contiguous() for name, tensor in extras.items()}, folder / EXTRAS)
            about |= {
                "fusion": asdict(self.fusion),
                "projection": self.projection_kind,
                "resource_width": self.resource_width,
            }
        (folder / EXTRAS_CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> KReader:
        """The KReader that ``save`` wrote (``reader/`` of a run folder), ready to predict.

        Args:
            trust_remote_code: Run Python code that came with the model that it was trained from.

        Raises:
            CacheError: If the folder was not written by ``save``, or is not complete.
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
        extras = load_file(folder / EXTRAS)
        result = reader.load_state_dict(extras, strict=False)
        missing = [name for name in result.missing_keys if not name.startswith("model.")]
        if missing or result.unexpected_keys:
            raise CacheError(
                f"{folder / EXTRAS} does not fit {EXTRAS_CONFIG}: {', '.join(missing + result.unexpected_keys)}.",
                "The reader is incomplete; train it again.",
            )
        return reader.eval()

    def check_task(self, task: Task, folder: Path) -> None:
        """Raise ``CacheError`` unless this trained reader, loaded from ``folder``, gives the task's labels in order."""
        names = self.config.id2label or {}
        if self.head == task.head and (task.head == "choice" or names == dict(enumerate(task.labels))):
            return
        raise CacheError(
            f"The reader in {folder} (head {self.head}, labels {_some(names.values())}) is not one of task "
            f"{task.name!r} (head {task.head}, labels {_some(task.labels)}) as this version of kr2cache has it.",
            "Train the run anew.",
        )


def _some(labels: Iterable[object]) -> str:
    names = list(map(str, labels))
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _states_lost(seen: int, reader: int, expected: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The encoder saw {seen} positions instead of {expected} (reader {reader} + resource {expected - reader}): the "
        "resource's states did not reach it.",
        "Several GPUs go through torchrun; torch.nn.DataParallel loses the hook that appends them.",
    )


class TaskCheckpoint:
    """The checkpoint of a task model, read once however many readers are trained from it.

    A new training gets a new head. What an earlier training left in the checkpoint is not used: its labels may be the
    same in another order.
    """

    def __init__(self, spec: ModelSpec, head: Head, labels: tuple[str, ...]) -> None:
        self.spec = spec
        self.head = head
        self.labels = labels
        self.config = load_config(spec)
        """As its file has it, without the task's labels."""
        self.left_out: tuple[str, ...] = ()
        """Once it is read: the weights of an earlier training's head."""
        self._loaded: tuple[type[PreTrainedModel], dict[str, Tensor]] | None = None
        """Its class, and the weights that a new reader starts from."""

    def task_config(self) -> PretrainedConfig:
        """The configuration of a reader: the checkpoint's with the task's labels."""
        config = copy.deepcopy(self.config)
        config.problem_type = None  # an earlier training's
        if self.head != "choice":
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}
        return config

    def task_model(self) -> PreTrainedModel:
        """A new model over these weights, in float32; its head is new, drawn from torch's current random state.

        Always float32: transformers keeps a checkpoint's float16, and AdamW then gives nan.

        Raises:
            UnsupportedModelError: If the checkpoint holds weights that are not finite numbers, or of other shapes than
                its configuration says.
        """
        if self._loaded is None:
            with torch.random.fork_rng(devices=[]):
                self._loaded = self._read()
        architecture, weights = self._loaded
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        return load_pretrained(self.spec, architecture, self.task_config(), copies)[0]

    def _read(self) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
        config = self.task_config()
        model, missing, misfit = load_pretrained(self.spec, HEADS[self.head], config)
        if damaged := not_finite(model):
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise UnsupportedModelError(
                f"The checkpoint of {self.spec.name!r} holds numbers that are not finite (nan or inf), in "
                f"{damaged[0]}{more}: no training can start from it.",
                "Get an undamaged copy of its weights.",
            )
        left_out = head_names(model) - missing
        if left_out:
            left_out -= _weights_of_pretraining(config) - misfit
        self.left_out = tuple(sorted(left_out))
        drawn = missing | left_out
        return type(model), {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}


def _weights_of_pretraining(config: PretrainedConfig) -> frozenset[str]:
    """Names of the weights outside the base model that pre-training makes: some task models (ModernBERT's) go on with
    one of its layers.
    """
    names: frozenset[str] = frozenset()
    for auto in (AutoModelForPreTraining, AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"), quiet():
                model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]
                names |= head_names(model)
    return names
