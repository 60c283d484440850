"""Tiny random models of transformers' ``AutoModel``: can one be a resource? ``table.py`` asks of all of them."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from kr2cache.cache.reader import FeatureCache
from kr2cache.config import ExtractConfig
from kr2cache.errors import KR2CacheError, UnsupportedModelError
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import plan_extraction
from kr2cache.models.load import load_config
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import find_stack

NAMES = tuple(sorted(MODEL_MAPPING_NAMES))
"""``model_type`` of every architecture."""
TEXTS = ("das haus", "ich", "und the dog ran 7", "über schön zwölf nebenan there das ich", "the dog")
TOLERANCE = 1e-4
"""Between a state of the cache and transformers' own, relative to the largest state of the layer."""
MOST_WEIGHTS = 80_000_000
"""A model with more is not tiny."""


# Tiny configurations --------------------------------------------------------------------------------------------------

LAYERS, WIDTH, HEADS, WORDS, UNUSED = 2, 32, 2, len(tiny.VOCABULARY), 4
"""UNUSED is a token that no text has: it stands for pictures."""
LAYER_COUNT = r"(num|n)_?(hidden|encoder|decoder)?_?layers?|(encoder|decoder)_layers|depth|num_blocks"
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*num_embeddings", WORDS),
    (r"pad_token_id", tiny.PAD_ID),
    (r".*_token_(id|index)|.*_(start|end)_id", UNUSED),
    (r"max_position_embeddings|n_positions|max_seq_len.*|.*_positions|seq_len(gth)?", 128),
    (r".*(num|n)_.*experts_per_tok.*|(moe|router)?_?top_?k.*|topk_group|n_group", 1),
    (r".*(num|n)_.*experts", 2),
    (r".*head_dim|.*_head_size|d_kv|d_head|.*channels_per_head", WIDTH // HEADS),
    (r".*heads.*|n_head", HEADS),
    (LAYER_COUNT, LAYERS),
    (r"hidden_sizes?|d_model|n_embd|.*dim|.*width|embedding_size|.*hidden_size", WIDTH),
    (r".*(intermediate|ffn|inner|mlp|feed_forward|d_ff).*", 2 * WIDTH),
    (r"image_size|.*resolution.*", 16),
    (r"patch_size", 8),
)
"""Fields by what their names say, and a tiny value."""
KEPT = re.compile(r".*(eps|range|theta|factor|scale|id2label|label2id|dropout|version|std).*")


MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "esm": {"vocab_size": WORDS, "position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": UNUSED},
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_d_head": 32},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "channel_shrink_ratio": 2},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "mobilebert": {"true_hidden_size": WIDTH, "intra_bottleneck_size": WIDTH},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},
    "vits": {"speaking_rate": 100.0},  # or it speaks for minutes
    "xmod": {"default_language": "en_XX"},
}
"""Fields of one architecture that its other fields have to fit."""


def tiny_config(name: str) -> PretrainedConfig:
    """The architecture's own configuration with tiny numbers."""
    fields = AutoConfig.for_model(name).to_dict()
    try:
        config = AutoConfig.for_model(name, **(_shrunk(fields) | MORE.get(name, {})))
    except Exception:  # parts that read pictures have to fit each other: only the part that reads text is made small
        parts = {key: _shrunk(fields[key]) for key in ("text_config", "language_config") if key in fields}
        config = AutoConfig.for_model(name, **parts)
    config.architectures = config.architectures or []  # AutoModel cannot choose between two classes without it
    return config


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    layers = next((fields[one] for one in fields if re.fullmatch(LAYER_COUNT, one) and fields[one]), None)
    result: dict[str, Any] = {}
    for key, value in fields.items():
        name = str(key)
        if name in ("model_type", "transformers_version", "architectures", "per_layer_config"):
            continue
        if name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            result[key] = value | {"mrope_section": [4, 2, 2]}  # it sums to half of a head
        elif isinstance(value, dict) and not KEPT.fullmatch(name):
            result[key] = _shrunk(value) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif isinstance(value, list) and len(value) == layers:  # one value for each layer
            result[key] = [_tiny(name, one) for one in _of_each_kind(value)]
        else:
            result[key] = _tiny(name, value)
    return result


def _of_each_kind(values: list[Any]) -> list[Any]:
    """As many of the values as there are layers, of different kinds if there are."""
    kinds = [one for number, one in enumerate(values) if one not in values[:number]]
    return (kinds + values)[:LAYERS]


def _tiny(name: str, value: Any) -> Any:
    if KEPT.fullmatch(name) or isinstance(value, bool | float | str) or value is None:
        return value
    if isinstance(value, list):
        return [_tiny(name, one) for one in value]
    if not isinstance(value, int):
        return value
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, small) if value >= 0 and "token" not in name and "vocab" not in name else small
    return value


# Trying ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture as a resource."""

    name: str
    kind: str
    """``equal`` to transformers, ``differs``, ``refused`` with an explanation, ``failed`` without one, or ``untried``,
    because no tiny model could be made."""
    text: str = ""
    """The explanation, or the difference."""


def try_resource(name: str, folder: Path) -> Outcome:
    """Make a tiny model, extract a few texts beside each other, and compare with each text alone in transformers.

    Args:
        folder: An empty folder.
    """
    try:
        config, untiny = tiny_config(name), ""
    except Exception as error:
        config, untiny = AutoConfig.for_model(name), f"no tiny configuration: {_said(error)}"
    model = folder / "model"
    try:
        config.save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
        (model / "model.safetensors").touch()
        plan = plan_extraction(settings(model, folder))
        (model / "model.safetensors").unlink()
        if too_large := untiny or _save_weights(config, model):
            return Outcome(name, "untried", too_large)
        worst = difference(extract(plan).cache, model)
    except UnsupportedModelError as error:
        return Outcome(name, "refused", error.message)
    except KR2CacheError as error:
        return Outcome(name, "refused", f"{type(error).__name__}: {error.message}")
    except Exception as error:
        return Outcome(name, "failed", _said(error))
    return Outcome(name, "equal" if worst <= TOLERANCE else "differs", f"{worst:.1e}")


def settings(model: Path, folder: Path, **more: Any) -> ExtractConfig:
    """Settings that extract ``TEXTS``; corpus and caches go into ``folder``."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    words = [[(word, "NOUN") for word in text.split()] for text in TEXTS]
    (corpus / "train.conllu").write_text(tiny.conllu(words), "utf-8")
    fields: dict[str, Any] = {
        "resource": str(model),
        "split": "train",
        "task": "udpos",
        "data": str(corpus),
        "max_length": 64,
        "dtype": "float32",
        "device": "cpu",
        "cache_dir": folder / "cache",
    }
    return ExtractConfig(**(fields | more))


def _save_weights(config: PretrainedConfig, folder: Path) -> str:
    """Save a random model; returns why not, if it is too large or cannot be made."""
    with torch.device("meta"):
        weights = sum(one.numel() for one in AutoModel.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        return f"{weights:,} weights"
    torch.manual_seed(0)
    try:
        AutoModel.from_config(config).save_pretrained(folder)
    except Exception as error:
        return f"no tiny model: {_said(error)}"
    return ""


def difference(cache_folder: Path, model: Path, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference between the cache and transformers' own states of each text alone, relative to the largest
    state of the layer. Each text runs in a copy of the whole model that has run nothing else.
    """
    cache = FeatureCache.open(cache_folder)
    tokens = cache.tokens()
    loaded = AutoModel.from_pretrained(model, dtype=dtype).eval()
    worst = 0.0
    for number in range(len(TEXTS)):
        whole = copy.deepcopy(loaded)
        for module in whole.modules():  # some cannot make the keys and values of so few layers
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        first, stop = tokens.first_token[number : number + 2]
        ids = torch.from_numpy(tokens.input_id[first:stop].astype(np.int64))[None]
        writes = "decoder_input_ids" in inspect.signature(whole.forward).parameters
        inputs = {"input_ids": ids, "output_hidden_states": True, "return_dict": True}
        with torch.no_grad():
            try:
                more = {"decoder_input_ids": ids} if writes else {}
                output = whole(**inputs, **more)
                states = output.encoder_hidden_states if writes else output.hidden_states
            except (
                AttributeError,
                RuntimeError,
                TypeError,
                ValueError,
            ):  # it wants more than a text
                part = find_stack(ModelSpec(name="m", path=model), load_config(ModelSpec(name="m", path=model))).path
                states = whole.get_submodule(part)(**inputs).hidden_states
        ours = cache[cache.ids[number]]
        assert len(ours) == len(states)
        for layer, expected in zip(ours, states, strict=True):
            assert layer.shape == expected.shape[1:]
            largest = float(expected.abs().max()) or 1.0
            worst = max(worst, float(np.abs(layer - expected[0].float().numpy()).max()) / largest)
    return worst


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
