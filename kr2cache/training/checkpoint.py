"""The checkpoint that readers are trained from: the Hugging Face task model, with a new head unless it is kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PretrainedConfig, PreTrainedModel

from kr2cache.errors import ConfigError, UnsupportedModelError
from kr2cache.models.configuration import class_of, without_padding
from kr2cache.models.digests import hash_encoder, model_key
from kr2cache.models.files import model_folder
from kr2cache.models.load import head_names, load_config, load_pretrained, not_finite, quiet, without_weights
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import find_stack, load_encoder
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.tasks.base import Head
from kr2cache.training.kreader import EXTRAS, HEADS, PROBLEM_TYPES, some, task_class


class TaskCheckpoint:
    """The weights that readers start from. They are read once, for any number of trainings.

    Each training gets a new head. If the checkpoint has the head of an earlier training, it is not used: it may have
    learned another task, or the same labels in another order. ``keep_head`` keeps it, with its labels put in order.
    """

    def __init__(
        self,
        spec: ModelSpec,
        head: Head,
        labels: tuple[str, ...],
        *,
        problem_type: str | None = None,
        keep_head: bool = False,
        encoder: PreTrainedModel | None = None,
    ) -> None:
        """
        Args:
            labels: The task's. A regression needs none.
            problem_type: Of the readers, see ``PROBLEM_TYPES``.
            keep_head: Keep the head of the checkpoint.
            encoder: The model without a head, in float32 (``load_encoder``), if it is in memory: then no file is read,
                and its weights are used without a copy.

        Raises:
            ConfigError: If the head has to be kept, but its label names are not the task's, or it gives several
                numbers for a regression.
        """
        self.spec = spec
        self.head = head
        self.labels = labels
        self.problem_type = problem_type
        self.keep_head = keep_head
        self._encoder_in_memory = encoder
        self.config = load_config(spec)
        """As in its file, without the labels of the task."""
        self.earlier_head: tuple[str, ...] = ()
        """Names of the weights of the head of an earlier training. Empty until the weights are read."""
        if keep_head and self._named:
            self._label_order()
        if keep_head and self._is_regression and (several := len(self._label_names())) != 1:
            raise self._not_kept(f"it gives {several} numbers, a regression has one")
        self._loaded: tuple[type[PreTrainedModel], dict[str, Tensor]] | None = None
        """Class of the task model, and the weights that a new reader takes over."""

    @property
    def outputs(self) -> int:
        """How many logits an example (tagging: a token) has."""
        return 1 if self._is_regression else len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a new reader takes over."""
        return sum(tensor.nbytes for tensor in self._weights()[1].values())

    @property
    def _is_regression(self) -> bool:
        return self.problem_type == PROBLEM_TYPES["regression"]

    @property
    def _named(self) -> bool:
        """Whether each logit of the head belongs to a label."""
        return self.head != "choice" and not self._is_regression

    @property
    def head_note(self) -> str | None:
        """What became of the head of an earlier training, as a sentence; None if the checkpoint has none."""
        if not self.earlier_head:
            return None
        parts = sorted({name.partition(".")[0] for name in self.earlier_head})
        names = self._label_names()
        labels = f", labels {', '.join(names)}" if any(not name.startswith("LABEL_") for name in names) else ""
        has = f"{self.spec.name} has the head of an earlier training ({', '.join(parts)}{labels})."
        kept = (
            "It is kept, as --keep-head asks." if self.keep_head else "It is not used: a new training draws a new head."
        )
        if (model_folder(self.spec) / EXTRAS).is_file():
            kept += f" Its fusion and projection ({EXTRAS}) are not used."
        return f"{has} {kept}"

    def _label_names(self) -> list[str]:
        """The labels of the checkpoint's own configuration, in the order of its head."""
        names: Mapping[int, str] = self.config.id2label or {}  # type: ignore[assignment]  # transformers says text
        return [names[number] for number in sorted(names)]

    def _label_order(self) -> list[int]:
        """For each label of the task, its number in the head of the checkpoint. Upper and lower case are alike.

        Raises:
            ConfigError: If the label names are not the same.
        """
        theirs = [name.casefold() for name in self._label_names()]
        ours = [label.casefold() for label in self.labels]
        if sorted(theirs) != sorted(ours):
            raise self._not_kept(f"its labels are {some(self._label_names())}, those of the task {some(self.labels)}")
        return [theirs.index(name) for name in ours]

    def _not_kept(self, why: str) -> ConfigError:
        return ConfigError(
            f"--keep-head cannot keep the head of {self.spec.name!r}: {why}.",
            "Leave out --keep-head: then a new head is trained.",
        )

    def task_config(self) -> PretrainedConfig:
        """The configuration of a reader: that of the checkpoint, with the labels of the task."""
        config = copy.deepcopy(self.config)
        # Another may be set by an earlier training.
        config.problem_type = self.problem_type  # type: ignore[assignment]  # transformers lists the three values
        if self._named:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}
        elif task_class(self.head, config) is HEADS["sequence"]:
            config.num_labels = 1  # the value, or one score for each choice
        if getattr(config, "pad_token_id", 0) is None and task_class(self.head, config) is HEADS["sequence"]:
            config.pad_token_id = self._padding  # a decoder scores the last token that is no padding
        return config

    @cached_property
    def _padding(self) -> int | None:
        """The padding token of the tokenizer; None if it has none. Qwen3's config.json lacks it."""
        found: int | None = load_tokenizer(self.spec, words=False).pad_token_id
        return found

    def task_model(self) -> PreTrainedModel:
        """A new model with these weights. Its new head is drawn from torch's current random state.

        The model is float32: transformers would keep float16 of a checkpoint, and AdamW then gives nan.

        Raises:
            UnsupportedModelError: If the checkpoint has weights that are not finite, or whose shapes do not fit its
                configuration.
        """
        architecture, weights = self._weights()
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        return load_pretrained(self.spec, architecture, self.task_config(), copies)[0]

    def _weights(self) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
        if self._loaded is None:
            with torch.random.fork_rng(devices=[]):
                self._loaded = self._read()
        return self._loaded

    def _read(self) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
        config, key = self.task_config(), model_key(self.spec)
        if part := find_stack(self.spec, config).path:
            raise UnsupportedModelError(
                f"{self.spec.name!r} ({config.model_type}) cannot be trained: kr2cache reads texts with its {part} "
                "alone.",
                "It can be a frozen resource. Choose a model with one stack of layers (BERT, RoBERTa, ...).",
            )
        model_class, weights = task_class(self.head, config), None
        whole = self._encoder_in_memory
        if whole is None and self.spec.random_seed is not None:  # no file has its weights
            whole = load_encoder(self.spec)
        if whole is not None:
            model_class = type(without_weights(self.spec, model_class, without_padding(config) or config))
            weights = whole.state_dict()
        model, missing, misfit = load_pretrained(self.spec, model_class, config, weights)
        if damaged := not_finite(model):
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise UnsupportedModelError(
                f"The checkpoint of {self.spec.name!r} holds numbers that are not finite (nan or inf), in "
                f"{damaged[0]}{more}: no training can start from it.",
                "Download or copy its weights again.",
            )
        if (encoder := self._encoder(model, missing)) is not None:
            given = encoder.config.pad_token_id
            if self.config.pad_token_id is None:
                encoder.config.pad_token_id = None  # the digest is of the file
            hash_encoder(self.spec, encoder, key)  # so that nobody loads the model a second time to hash it
            encoder.config.pad_token_id = given
        earlier = head_names(model) - missing
        if earlier:
            earlier -= _weights_of_pretraining(config) - misfit
        self.earlier_head = tuple(sorted(earlier))
        drawn = missing if self.keep_head else missing | earlier
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}
        if self.keep_head:
            self._check_head(model, missing | misfit)
            if self._named:
                order = torch.tensor(self._label_order())
                weights |= {name: weights[name].index_select(axis, order) for name, axis in _label_axes(model).items()}
        return type(model), weights

    def _check_head(self, model: PreTrainedModel, drawn: frozenset[str]) -> None:
        """Raise ``ConfigError`` unless the checkpoint has a whole head of this kind.

        Args:
            drawn: Names of the weights that the checkpoint does not have in this shape.
        """
        kinds = self.config.architectures or [type(model).__name__]
        lacking = sorted(head_names(model) & drawn)
        if type(model).__name__ in kinds and not lacking:
            return
        what = (
            f"it lacks {some(lacking)}"
            if lacking
            else f"it is of a {kinds[0]}, the task needs a {type(model).__name__}"
        )
        raise self._not_kept(what)

    def _encoder(self, model: PreTrainedModel, missing: frozenset[str]) -> PreTrainedModel | None:
        """The base model, if it surely equals what ``open_encoder`` loads: it has the same class and all weights.
        (Funnel's tagger has another base model than its classifier. Code that comes with a model may do anything.)
        """
        encoder, config = model.base_model, model.config
        drawn = {name.removeprefix(f"{model.base_model_prefix}.") for name in missing - head_names(model)}
        if (
            isinstance(encoder, PreTrainedModel)
            and type(encoder) is class_of(config)
            and all(name.startswith("pooler.") for name in drawn)
            and not self.spec.trust_remote_code
        ):
            return encoder
        return None


def _label_axes(model: PreTrainedModel) -> dict[str, int]:
    """The weights of a head that have an axis of labels, and which axis: it grows with the number of labels."""
    config = copy.deepcopy(model.config)
    config.num_labels = len(config.id2label or ()) + 1
    with torch.device("meta"), quiet():
        wider = type(model)(config).state_dict()
    return {
        name: axis
        for name, tensor in model.state_dict().items()
        for axis, size in enumerate(tensor.shape)
        if size != wider[name].shape[axis]
    }


def _weights_of_pretraining(config: PretrainedConfig) -> frozenset[str]:
    """Names of weights outside the base model that come from pre-training. Some task models (ModernBERT) use them."""
    names: frozenset[str] = frozenset()
    for auto in (AutoModelForPreTraining, AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"), quiet():
                model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]
                names |= head_names(model)
    return names
