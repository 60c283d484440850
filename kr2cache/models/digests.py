"""Digests that identify a model, whatever its name, its folder and the format of its files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kr2cache.config import DEFAULT_WEIGHTS_DTYPE
from kr2cache.models.configuration import with_all_layers
from kr2cache.models.contents import weight_files
from kr2cache.models.files import model_folder
from kr2cache.models.load import load_config, quiet
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import open_encoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


NOT_COMPUTED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "use_cache",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "attn_implementation",
        "_attn_implementation",
    ]
)
"""Fields of a configuration that do not decide what an encoder computes."""


def config_digest(config: PretrainedConfig, *, training: bool = False) -> str:
    """SHA-256 of the configuration's fields that decide what the model computes (heads, activation, epsilon, ...). Two
    models with equal weights may still differ in them.

    Caches and runs record this digest, so a file must keep its digest with any later transformers, even if a release
    adds a field with a default to the architecture. The hash covers the fields that the architecture had in
    transformers 5.23 (``config_fields.txt``), and of all other fields those that differ from their defaults. (Hashing
    only the fields in the file would not do: files of one model differ in the defaults that they spell out.)

    Of a model that is cut to its first layers, lists with a value for each layer count in full, as in its file.

    Args:
        training: Whether dropout counts, as it does for a model that is trained.
    """
    fields = {
        name: value
        for name, value in _lasting_fields(with_all_layers(config)).items()
        if name not in NOT_COMPUTED and (training or "drop" not in name)
    }
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _lasting_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields without those defaults that a later transformers added."""
    fields: dict[str, Any] = config.to_dict()
    of_library = type(config).__module__.startswith("transformers.")
    # A class that comes with a model does not change. Only the library's base class may get more fields.
    known = _known_fields().get(config.model_type, frozenset()) if of_library else fields.keys() - _base_defaults()
    defaults = _defaults(config, known)
    return {
        name: value
        for name, value in fields.items()
        if name in known or name == "model_type" or name not in defaults or defaults[name] != value
    }


def _defaults(config: PretrainedConfig, known: Collection[str]) -> dict[str, Any]:
    """Every field's value if only the known fields are given: a default may depend on them (width / heads)."""
    own = config.to_dict()
    try:
        with quiet():
            fields: dict[str, Any] = type(config)(**{name: own[name] for name in known if name in own}).to_dict()
    except Exception:  # a class that comes with a model may need other arguments, or refuse them
        return _base_defaults()
    return fields


@functools.cache
def _base_defaults() -> dict[str, Any]:
    from transformers import PretrainedConfig

    fields: dict[str, Any] = PretrainedConfig().to_dict()
    return fields


@functools.cache
def _known_fields() -> dict[str, frozenset[str]]:
    """Model type to the fields that its configuration had in transformers 5.23."""
    lines = files("kr2cache.models").joinpath("config_fields.txt").read_text("utf-8").splitlines()
    words = [line.split() for line in lines if not line.startswith("#")]
    return {model_type: frozenset(names) for model_type, *names in words}


@dataclass(frozen=True, kw_only=True)
class Digests:
    """The digests that identify a model, wherever its files are."""

    weights: str
    """``weights_digest``"""
    config: str
    """``config_digest``"""
    config_in_training: str
    """The same with dropout."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A frozen model, loaded and hashed. It can run without being loaded again."""

    encoder: PreTrainedModel
    dropped: tuple[str, ...]
    """As ``open_encoder``."""
    digests: Digests
    part: str = ""
    """As ``open_encoder``."""


def open_model(
    spec: ModelSpec, weights_dtype: str = DEFAULT_WEIGHTS_DTYPE, device_map: str | None = None
) -> OpenedModel:
    """Load and hash a model on this machine. ``known_digests`` knows its digests from then on. Arguments as for
    ``open_encoder``."""
    key = model_key(spec, weights_dtype)
    opened = open_encoder(spec, weights_dtype, device_map)
    return OpenedModel(
        encoder=opened.encoder,
        dropped=opened.dropped,
        digests=hash_encoder(spec, opened.encoder, key),
        part=opened.part,
    )


def hash_encoder(spec: ModelSpec, encoder: PreTrainedModel, key: tuple[Any, ...]) -> Digests:
    """Hash an encoder that is in memory. ``model_digests`` knows its digests from then on.

    Args:
        encoder: With the weights and the configuration that ``open_encoder`` gives.
        key: ``model_key`` from before the encoder was loaded: its files may have changed since.
    """
    _digests[key] = Digests(
        weights=weights_digest(encoder),
        config=config_digest(encoder.config),
        config_in_training=config_digest(load_config(spec), training=True),
    )
    return _digests[key]


def known_digests(spec: ModelSpec, weights_dtype: str = DEFAULT_WEIGHTS_DTYPE) -> Digests | None:
    """The digests of a model, if this process hashed it before and its files have not changed since; else None."""
    return _digests.get(model_key(spec, weights_dtype))


def model_digests(spec: ModelSpec) -> Digests:
    """The digests of a model on this machine; it is opened only if ``known_digests`` does not know them."""
    return known_digests(spec) or open_model(spec).digests


def model_key(spec: ModelSpec, weights_dtype: str = DEFAULT_WEIGHTS_DTYPE) -> tuple[Any, ...]:
    """A key that changes when the model may have changed: its settings, and the sizes and times of its files."""
    folder = model_folder(spec)
    files = sorted([*weight_files(folder), folder / "config.json"])
    stamp = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file())
    return (spec.name, spec.model_type, spec.layers, spec.dropout, spec.random_seed, weights_dtype, stamp)


_digests: dict[Any, Digests] = {}
AT_ONCE = 2**24
"""Weights of a smaller dtype that are float32 at the same time."""


def weights_digest(encoder: PreTrainedModel) -> str:
    """XXH3-128 of the encoder's weights: names, shapes and float32 bytes, by name; without the pooler.

    The loaded weights are hashed, so the hub id, the folder, the file format and the file's dtype make no difference.
    Weights that are loaded in a smaller dtype than the file's were rounded, and give another digest.
    """
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.startswith("pooler."):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            values = _in_memory(encoder, name, tensor).detach().flatten()
            for start in range(0, len(values), AT_ONCE):
                part = values[start : start + AT_ONCE]
                small = part.is_floating_point() and part.element_size() < torch.float32.itemsize
                digest.update((part.float() if small else part).cpu().numpy().data)
    return digest.hexdigest()


def _in_memory(encoder: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """The values of a weight. Accelerate keeps those that are not on their device now beside the module."""
    if tensor.device.type != "meta":
        return tensor
    module, _, own_name = name.rpartition(".")
    hook: Any = encoder.get_submodule(module)._hf_hook
    values: Tensor = hook.weights_map[own_name]
    return values
