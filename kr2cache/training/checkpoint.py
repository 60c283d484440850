"""The checkpoint that readers are trained from: the Hugging Face task model with a new head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PretrainedConfig, PreTrainedModel

from kr2cache.errors import UnsupportedModelError
from kr2cache.models.digests import hash_encoder, model_key
from kr2cache.models.load import class_of, head_names, load_config, load_encoder, load_pretrained, not_finite, quiet
from kr2cache.models.registry import ModelSpec
from kr2cache.tasks.base import Head
from kr2cache.training.kreader import HEADS, task_class


class TaskCheckpoint:
    """The weights that readers start from. They are read once, for any number of trainings.

    Each training gets a new head. If the checkpoint has the head of an earlier training, it is not used: its labels may
    be the same in another order.
    """

    def __init__(self, spec: ModelSpec, head: Head, labels: tuple[str, ...]) -> None:
        self.spec = spec
        self.head = head
        self.labels = labels
        self.config = load_config(spec)
        """As in its file, without the labels of the task."""
        self.left_out: tuple[str, ...] = ()
        """Names of unused weights: the head of an earlier training. Empty until the weights are read."""
        self._loaded: tuple[type[PreTrainedModel], dict[str, Tensor]] | None = None
        """Class of the task model, and the weights that a new reader takes over."""

    def task_config(self) -> PretrainedConfig:
        """The configuration of a reader: that of the checkpoint, with the labels of the task."""
        config = copy.deepcopy(self.config)
        config.problem_type = None  # may be set by an earlier training
        if self.head != "choice":
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}
        elif task_class(self.head, config) is HEADS["sequence"]:
            config.num_labels = 1  # one score for each choice
        return config

    def task_model(self) -> PreTrainedModel:
        """A new model with these weights. Its new head is drawn from torch's current random state.

        The model is float32: transformers would keep float16 of a checkpoint, and AdamW then gives nan.

        Raises:
            UnsupportedModelError: If the checkpoint has weights that are not finite, or whose shapes do not fit its
                configuration.
        """
        if self._loaded is None:
            with torch.random.fork_rng(devices=[]):
                self._loaded = self._read()
        architecture, weights = self._loaded
        copies = {name: tensor.clone() for name, tensor in weights.items()}
        return load_pretrained(self.spec, architecture, self.task_config(), copies)[0]

    def _read(self) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
        config, key = self.task_config(), model_key(self.spec)
        model_class, weights = task_class(self.head, config), None
        if self.spec.random_seed is not None:  # no file has its weights
            with torch.device("meta"), quiet():
                model_class = type(model_class.from_config(config))
            weights = load_encoder(self.spec).state_dict()
        model, missing, misfit = load_pretrained(self.spec, model_class, config, weights)
        if damaged := not_finite(model):
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise UnsupportedModelError(
                f"The checkpoint of {self.spec.name!r} holds numbers that are not finite (nan or inf), in "
                f"{damaged[0]}{more}: no training can start from it.",
                "Download or copy its weights again.",
            )
        if (encoder := self._encoder(model, missing)) is not None:
            hash_encoder(self.spec, encoder, key)  # so that nobody loads the model a second time to hash it
        left_out = head_names(model) - missing
        if left_out:
            left_out -= _weights_of_pretraining(config) - misfit
        self.left_out = tuple(sorted(left_out))
        drawn = missing | left_out
        return type(model), {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}

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
            and not getattr(config, "is_encoder_decoder", False)
        ):
            return encoder
        return None


def _weights_of_pretraining(config: PretrainedConfig) -> frozenset[str]:
    """Names of weights outside the base model that come from pre-training. Some task models (ModernBERT) use them."""
    names: frozenset[str] = frozenset()
    for auto in (AutoModelForPreTraining, AutoModelForMaskedLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"), quiet():
                model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]
                names |= head_names(model)
    return names
