"""Digests of a model: what it is, apart from its name, its folder and the format of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kr2cache.model_files import weight_files
from kr2cache.models import ModelSpec, load_config, load_encoder, model_folder

if TYPE_CHECKING:
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
    """SHA-256 of the configuration's fields that decide what the model computes (heads, activation, epsilon, ...): two
    models of equal weights may still differ in them.

    Args:
        training: Whether dropout counts, as it does for a model that is trained.
    """
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in NOT_COMPUTED and (training or "drop" not in name)
    }
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Digests:
    """What a model is, apart from where it lies."""

    weights: str
    """``weights_digest``"""
    config: str
    """``config_digest``"""
    config_in_training: str
    """The same with dropout."""


def model_digests(spec: ModelSpec) -> Digests:
    """The digests of a model on this machine; a model whose files did not change is read once a process."""
    folder = model_folder(spec)
    files = sorted([*weight_files(folder), folder / "config.json"])
    stamp = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file())
    key = (spec.name, spec.model_type, spec.layers, spec.dropout, stamp)
    if key not in _digests:
        encoder = load_encoder(spec)
        _digests[key] = Digests(
            weights=weights_digest(encoder),
            config=config_digest(encoder.config),
            config_in_training=config_digest(load_config(spec), training=True),
        )
    return _digests[key]


_digests: dict[Any, Digests] = {}


def weights_digest(encoder: PreTrainedModel) -> str:
    """XXH3-128 of the encoder's weights: names, shapes and float32 bytes, by name; the pooler is left out.

    What is hashed is what computes, so hub id, folder, file format and the file's dtype make no difference.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.startswith("pooler."):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
