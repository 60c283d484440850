"""Configurations and task models, loaded from a model's folder."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.errors import (
    ConfigError,
    DeviceMemoryError,
    KR2CacheError,
    ModelUnavailableError,
    UnsupportedModelError,
    error_text,
)
from kr2cache.models.configuration import count_in, cut, parts_of, text_config, without_padding
from kr2cache.models.contents import not_json_in
from kr2cache.models.files import check_files, model_folder
from kr2cache.models.registry import ModelSpec
from kr2cache.system.device import is_out_of_memory, memory_advice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load and save without transformers' reports. This module checks what matters in them and reports it itself.
    Afterwards transformers reports as before."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


CONFIGURATION, WEIGHTS = "configuration", "weights"
"""The part of a model that is loaded, as ``explained`` names it."""


@contextlib.contextmanager
def explained(spec: ModelSpec, what: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            yield
    except KR2CacheError:
        raise
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"The {what} of model {spec.name!r} is not usable: {said}", "Correct that field in its config.json."
        ) from error
    except Exception as error:  # for a damaged or unknown file these libraries raise almost anything
        if is_out_of_memory(error):
            import torch

            raise DeviceMemoryError(
                f"The {what} of model {spec.name!r} cannot be loaded: this computer has too little free memory.",
                memory_advice(torch.device("cpu")),
            ) from error
        said, remedy = error_text(error), "Check that the folder is complete (kr2cache models)."
        not_json = not_json_in(model_folder(spec)) if what != WEIGHTS else None
        if not_json is not None:
            name, reason = not_json
            said, remedy = f"{name} is not JSON in UTF-8: {reason}", f"Copy {name} again from the model."
        elif isinstance(error, ImportError):
            remedy = "Install what is missing, or choose another model."
        elif what == CONFIGURATION:
            remedy = (
                "Check model_type and the other fields of its config.json. An architecture that is new needs a newer "
                "transformers."
            )
        if spec.needs and not_json is None:
            remedy = f"It needs {spec.needs}."
        raise ModelUnavailableError(f"The {what} of model {spec.name!r} cannot be loaded: {said}", remedy) from error


BERT_FIELDS = frozenset(["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model's configuration. It gives layers and width without loading the weights.

    A config.json with BERT's fields and no ``model_type`` (Google's, OSCAR's) is from the time when BERT was the only
    architecture.
    """
    from transformers import AutoConfig

    folder = model_folder(spec)
    with explained(spec, CONFIGURATION):
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        model_type = spec.model_type
        if model_type is None and "model_type" not in fields and set(fields) >= BERT_FIELDS:
            model_type = "bert"
        if model_type is not None:
            fields.pop("model_type", None)
            config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    config.architectures = config.architectures or []  # transformers cannot choose between two classes without it
    # Each call asks for the outputs it needs. A tuple has no names for its outputs, and transformers does not
    # save a trained model whose configuration asks for attentions that its fast attention does not return.
    for part in (config, *parts_of(config)):
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    if spec.layers is not None:
        part = text_config(config)
        there = count_in(part, "num_hidden_layers")
        if spec.layers > there:
            raise ConfigError(
                f"Model {spec.name!r} should have the first {spec.layers} layers of a model that has {there}.",
                f"Correct layers under [models.{spec.name}] in kr2cache.toml.",
            )
        cut(part, there, spec.layers)
    if spec.dropout is not None:
        for name in config.to_dict():
            if "dropout" in name and isinstance(getattr(config, name), int | float):
                setattr(config, name, float(spec.dropout))
    return config


def load_pretrained(
    spec: ModelSpec, model_class: Any, config: PretrainedConfig, weights: Mapping[str, Tensor] | None = None
) -> tuple[PreTrainedModel, frozenset[str], frozenset[str]]:
    """The checkpoint of ``spec`` as a task model, in float32. Weights missing or of another shape are random.

    Args:
        model_class: An auto class, or the model's own with ``weights``.
        weights: The checkpoint's weights, if they are in memory already. The model uses them without a copy.

    Returns:
        The model, the names of missing weights, and the names of weights of the head that had another shape.

    Raises:
        UnsupportedModelError: If weights of the base model have other shapes than ``config`` says.
    """
    import torch

    with explained(spec, WEIGHTS):
        folder = None
        if weights is None:
            folder = model_folder(spec)
            check_files(spec, folder)
        model, report = from_pretrained(
            spec,
            model_class,
            folder,
            config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            weights_only=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=spec.trust_remote_code,
        )
    head = head_names(model)
    check_shapes(spec, [one for one in report["mismatched_keys"] if one[0] not in head])
    other = frozenset(name for name, *_ in report["mismatched_keys"])
    return model, frozenset(report["missing_keys"]), other


def from_pretrained(
    spec: ModelSpec, model_class: Any, folder: Path | None, config: PretrainedConfig, **options: Any
) -> Any:
    """``model_class.from_pretrained``. If the padding token has no embedding, the model gets no padding token.

    Raises:
        UnsupportedModelError: If no model can be built from the configuration, whatever the weights are.
    """
    try:
        return model_class.from_pretrained(folder, config=config, **options)
    except Exception as error:
        if isinstance(error, AssertionError) and (without := without_padding(config)) is not None:
            return model_class.from_pretrained(folder, config=without, **options)
        without_weights(spec, model_class, config)
        raise


def without_weights(spec: ModelSpec, model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The model that the configuration describes, on torch's device meta: it takes no memory and has no weights.

    Raises:
        UnsupportedModelError: If no model can be built from the configuration.
    """
    import torch

    automatic = hasattr(model_class, "from_config")
    try:
        with torch.device("meta"), quiet():
            if automatic:
                model: PreTrainedModel = model_class.from_config(
                    copy.deepcopy(config), trust_remote_code=spec.trust_remote_code
                )
            else:
                model = model_class(copy.deepcopy(config))
    except Exception as error:
        remedy = "Correct that in its config.json, or copy the file again from the model."
        if isinstance(error, ImportError):
            remedy = "Install what is missing, or correct its config.json."
        raise UnsupportedModelError(
            f"No model can be built from the configuration of {spec.name!r} ({config.model_type}): {error_text(error)}",
            remedy,
        ) from error
    return model


def head_names(model: PreTrainedModel) -> frozenset[str]:
    """The names of a task model's weights that are not part of its base model."""
    prefix = f"{model.base_model_prefix}."
    return frozenset(name for name in model.state_dict() if not name.startswith(prefix))


def check_shapes(spec: ModelSpec, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raise ``UnsupportedModelError`` if weights have other shapes than the configuration gives.

    Args:
        mismatched: Name, shape in the file, shape by the configuration.
    """
    wrong = sorted((name, tuple(there), tuple(wanted)) for name, there, wanted in mismatched)
    if wrong:
        name, there, wanted = wrong[0]
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise UnsupportedModelError(
            f"The weights of {spec.name!r} do not have the shapes of its config.json: {name} is {there} in the file, "
            f"{wanted} by the configuration{more}.",
            "config.json and the weights do not belong together: copy both from the same model.",
        )


def not_finite(model: PreTrainedModel) -> list[str]:
    """The names of the model's weights that hold nan or an infinite number."""
    import torch

    return [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all())
    ]


def accepts(function: Callable[..., Any] | None, argument: str) -> bool:
    return function is not None and argument in inspect.signature(function).parameters
