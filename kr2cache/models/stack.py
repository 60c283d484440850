"""The stack of layers whose states a resource gives, found in the model and loaded alone.

For most models it is the whole base model. Of an encoder-decoder it is the encoder. Of a model that also reads pictures
or sound it is the part that reads text. The other parts are not read from the files and take no memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kr2cache.config import DEFAULT_WEIGHTS_DTYPE
from kr2cache.errors import DeviceMemoryError, UnsupportedModelError
from kr2cache.models.configuration import (
    class_of,
    encoder_shape,
    max_positions,
    text_config,
    vocabulary,
    without_padding,
)
from kr2cache.models.files import check_files, model_folder
from kr2cache.models.load import (
    WEIGHTS,
    accepts,
    check_shapes,
    explained,
    from_pretrained,
    load_config,
    without_weights,
)
from kr2cache.models.registry import ModelSpec
from kr2cache.system.console import bytes_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


# Where it is ----------------------------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """The stack of layers in a model."""

    path: str
    """Its name in the model, such as ``encoder``; empty if it is the whole model."""
    config: PretrainedConfig
    """Its own configuration: layers, width, vocabulary and positions are those of the stack."""
    model_class: type[PreTrainedModel]
    """The class of the whole model."""
    numbers: int
    """How many numbers the weights of the stack are."""


WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number of the weights, by their dtype in memory."""


def check_room(spec: ModelSpec, stack: Stack, weights_dtype: str, free: int) -> None:
    """Check that ``free`` bytes of memory have room for the weights of a resource, before they are read.

    Raises:
        DeviceMemoryError: If not.
    """
    # A control is drawn in float32.
    dtype = weights_dtype if spec.random_seed is None else DEFAULT_WEIGHTS_DTYPE
    needed = stack.numbers * WEIGHT_BYTES[dtype]
    if needed <= free:
        return
    remedy = "Ask on a machine with more memory."
    if dtype == DEFAULT_WEIGHTS_DTYPE and spec.random_seed is None:
        smaller = bytes_text(stack.numbers * WEIGHT_BYTES["bfloat16"])
        remedy = f"Give --weights-dtype bfloat16 ({smaller}), or ask on a machine with more memory."
    raise DeviceMemoryError(
        f"{spec.name!r} needs {bytes_text(needed)} for its weights in {dtype}. {bytes_text(free)} of memory are free.",
        remedy,
    )


def find_stack(spec: ModelSpec, config: PretrainedConfig) -> Stack:
    """Find the stack in the model that ``config`` describes. No weights are loaded.

    Raises:
        UnsupportedModelError: If no model can be built from the configuration, or no part of it reads text alone.
    """
    try:
        whole = without_weights(spec, _auto_class(config), without_padding(config) or config)
    except UnsupportedModelError:
        text = text_config(config)
        if hasattr(text, "vocab_size"):  # it describes a model of text: perhaps a field makes no sense
            vocabulary(text), encoder_shape(text), max_positions(text)
        raise
    path = _path(whole, text_config(whole.config))
    if path is None:
        takes = _first_input(whole)
        raise UnsupportedModelError(
            f"{spec.name!r} ({config.model_type}) reads no text: its model takes {takes}, and has no part with layers "
            "that takes token ids alone.",
            "Choose a model of text: an encoder, a decoder or an encoder-decoder.",
        )
    part: Any = whole.get_submodule(path) if path else whole
    found: PretrainedConfig = config if type(part.config) is type(config) and not path else part.config
    return Stack(path, found, type(whole), sum(parameter.numel() for parameter in part.parameters()))


def _auto_class(config: PretrainedConfig) -> Any:
    """AutoModel, if it knows the architecture; an encoder-decoder of two models (BERT2BERT) has no class without a
    head.
    """
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    only_whole = type(config) not in AutoModel._model_mapping and type(config) in AutoModelForSeq2SeqLM._model_mapping
    return AutoModelForSeq2SeqLM if only_whole else AutoModel


def resource_config(spec: ModelSpec) -> PretrainedConfig:
    """The configuration of the stack of a model: what it needs of texts, and how many states it gives.

    Raises:
        UnsupportedModelError: As ``find_stack``.
    """
    return find_stack(spec, load_config(spec)).config


def _path(model: PreTrainedModel, text: PretrainedConfig) -> str | None:
    """The name of the stack in ``model``; empty if the model itself is one, None if it has none.

    Args:
        text: The part of the model's configuration that describes the reading of text.
    """
    from transformers import PreTrainedModel

    children = dict(model.named_children())
    if any("decoder" in name for name in children):
        for name in ("encoder", "text_encoder"):
            child = children.get(name)
            if isinstance(child, PreTrainedModel) and _takes_text(child):
                return _within(name, child)
    if type(text) is type(model.config):
        return "" if _takes_text(model) else None
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and type(module.config) is type(text) and _takes_text(module):
            return _within(name, module)
    return None


def _within(name: str, module: PreTrainedModel) -> str | None:
    """The stack in a part of a model, which may have a head or be an encoder-decoder itself."""
    base: Any = module.base_model
    if base is not module:
        name, module = f"{name}.{module.base_model_prefix}", base
    inner = _path(module, text_config(module.config))
    return f"{name}.{inner}" if inner else None if inner is None else name


def _takes_text(module: nn.Module) -> bool:
    return accepts(module.forward, "input_ids")


def _first_input(model: nn.Module) -> str:
    import inspect

    return next(iter(inspect.signature(model.forward).parameters), "nothing")


# Loading --------------------------------------------------------------------------------------------------------------


class OpenedEncoder(NamedTuple):
    """The stack of a resource, frozen: no gradients, no dropout."""

    encoder: PreTrainedModel
    dropped: tuple[str, ...]
    """Names of checkpoint tensors that no part of the model uses: heads, image parts of OSCAR."""
    part: str
    """What of the model it is (``Stack.path``)."""


def load_encoder(spec: ModelSpec, weights_dtype: str = DEFAULT_WEIGHTS_DTYPE) -> PreTrainedModel:
    """The model of ``open_encoder``."""
    return open_encoder(spec, weights_dtype).encoder


def open_encoder(
    spec: ModelSpec, weights_dtype: str = DEFAULT_WEIGHTS_DTYPE, device_map: str | None = None
) -> OpenedEncoder:
    """Load the stack of layers of a resource, without a head.

    Args:
        weights_dtype: The dtype in memory. Weights that a file has in the same dtype are not converted.
        device_map: ``auto`` to spread the layers over all GPUs, and what does not fit over the computer's memory.

    Raises:
        UnsupportedModelError: If the checkpoint lacks weights of the stack (they would be random), or the model has no
            stack that reads text.
    """
    import torch

    config = load_config(spec)
    with explained(spec, WEIGHTS):
        folder = model_folder(spec)
        check_files(spec, folder)
    stack = find_stack(spec, config)
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    # The states do not include the pooler, and many checkpoints lack it.
    if not stack.path and accepts(class_of(config), "add_pooling_layer"):
        options["add_pooling_layer"] = False
    dtype = getattr(torch, weights_dtype)
    with explained(spec, WEIGHTS):
        if spec.random_seed is None:
            whole, dropped = _loaded(spec, stack, config, folder, {**options, "dtype": dtype})
        else:
            whole, dropped = _drawn(spec, config, options).to(dtype), tuple[str, ...]()
    model: Any = whole.get_submodule(stack.path) if stack.path else whole
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # keys and values of texts that nobody continues
    model.requires_grad_(False)
    if device_map is not None and hasattr(whole, "hf_device_map") and model is not whole:
        _run_alone(model, whole)
    model.eval()
    return OpenedEncoder(model, dropped, stack.path)


def _loaded(
    spec: ModelSpec, stack: Stack, config: PretrainedConfig, folder: Path, options: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model with the weights of its files, without those outside the stack; and the names of tensors in the files
    that it does not use.
    """
    whole, report = from_pretrained(
        spec,
        _only(stack) if stack.path else _auto_class(config),
        folder,
        config,
        output_loading_info=True,
        weights_only=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=spec.trust_remote_code,
        **options,
    )
    check_shapes(spec, report["mismatched_keys"])
    inside = f"{stack.path}." if stack.path else ""
    _check_present(spec, [name for name in report["missing_keys"] if name.startswith(inside)])
    cut = spec.layers is not None  # then most unused tensors belong to the other layers
    return whole, () if cut or stack.path else tuple(sorted(report["unexpected_keys"]))


def _drawn(spec: ModelSpec, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a control: its weights are drawn by its seed."""
    import torch

    from kr2cache.models.control import drawn_by

    assert spec.random_seed is not None, "it is a control"
    headless = {name: value for name, value in options.items() if name != "device_map"}
    with drawn_by(spec.random_seed):
        model: PreTrainedModel = _auto_class(config).from_config(
            without_padding(config) or config,
            dtype=torch.float32,
            trust_remote_code=spec.trust_remote_code,
            **headless,
        )
    return model


def _run_alone(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Let a part of a model that is spread over devices take its input and give its states on one device, as the whole
    model does."""
    import torch
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from kr2cache.models.states import device_of

    spread: Any = whole.hf_device_map
    model.hf_device_map = spread
    if len(set(spread.values())) > 1:
        hook = AlignDevicesHook(execution_device=torch.device(device_of(model)), io_same_device=True)
        add_hook_to_module(model, hook, append=True)


def _check_present(spec: ModelSpec, absent: Sequence[str]) -> None:
    missing = sorted(name for name in absent if not name.startswith("pooler."))
    if missing:
        raise UnsupportedModelError(
            f"The checkpoint of {spec.name!r} lacks {len(missing)} weights of its encoder: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. They would have random values.",
            "Give a complete checkpoint of this architecture.",
        )


def _only(stack: Stack) -> type[PreTrainedModel]:
    """The class of the whole model, without the modules outside the stack. It loads checkpoints in every form that the
    whole model loads, and reads from the files what it has.
    """
    whole = stack.model_class

    def build(self: PreTrainedModel, config: PretrainedConfig, *arguments: Any, **named: Any) -> None:
        whole.__init__(self, config, *arguments, **named)
        _prune(self, stack.path)

    return type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})


def _prune(model: PreTrainedModel, path: str) -> None:
    """Remove every weight of the model that is neither in the part at ``path`` nor tied to a weight in it."""
    tied = model.all_tied_weights_keys
    used = {source for pair in tied.items() for source in pair[1:] if any(_is_in(name, path) for name in pair)}
    kept = {path, *used, *(target for target, source in tied.items() if source in used)}

    def prune(module: nn.Module, prefix: str) -> None:
        module._is_hf_initialized = True  # type: ignore[assignment]  # transformers would look for what was removed
        for name in list(module._parameters):
            if prefix + name not in kept:
                del module._parameters[name]
        for name, child in list(module.named_children()):
            if prefix + name == path:
                continue
            if any(_is_in(one, prefix + name) for one in kept):
                prune(child, f"{prefix}{name}.")
            else:
                del module._modules[name]

    prune(model, "")
    model.all_tied_weights_keys = {target: source for target, source in tied.items() if source in used}


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


# What the checkpoint has besides --------------------------------------------------------------------------------------

HEADS_OF_PRETRAINING = re.compile(r"(.*\.)?(pooler|cls|lm_head|mlm|classifier|vocab_\w+|\w+_predictions)\b.*")


def describe_dropped(spec: ModelSpec, dropped: Sequence[str]) -> str | None:
    """The unused tensors of a checkpoint, in one line, if they are more than the usual heads of pre-training."""
    if all(HEADS_OF_PRETRAINING.fullmatch(name) for name in dropped):
        return None
    parts = Counter(re.split(r"\.(?=\w+$)", name)[0] for name in dropped)
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in parts.items())
    return f"{spec.name}: left out {len(dropped)} tensors that are not part of the checkpoint's text encoder: {names}"
