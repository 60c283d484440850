"""What a model's configuration says: its parts, shape, vocabulary and number of positions. Nothing is loaded here."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kr2cache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


PER_LAYER = re.compile(r".*layer.*|.*_types|intermediate_size|activation_sparsity_pattern")
"""Fields that may have one value for each layer, such as ``layer_types``."""


class FirstLayers(list[Any]):
    """The first values of a list with one value for each layer. ``of_all`` are those of all layers: the digest of a
    configuration covers them (``with_all_layers``)."""

    of_all: Sequence[Any] = ()


def cut(config: PretrainedConfig, there: int, layers: int) -> None:
    """Leave the first ``layers`` layers of ``there``. transformers saves no configuration whose lists are longer."""
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == there and PER_LAYER.fullmatch(name):
            first = FirstLayers(value[:layers])
            first.of_all = value
            setattr(config, name, first)
    config.num_hidden_layers = layers


def with_all_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration whose lists have their values for all layers of the checkpoint, also if only its first layers
    are used. ``num_hidden_layers`` stays."""
    config = copy.deepcopy(config)
    for part in (config, *parts_of(config)):
        for name, value in vars(part).items():
            if isinstance(value, FirstLayers):
                setattr(part, name, value.of_all)
    return config


def parts_of(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configurations inside a configuration, such as those of text and of pictures."""
    from transformers import PretrainedConfig

    for name in getattr(config, "sub_configs", ()):
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield part
            yield from parts_of(part)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the reading of text; the whole of it for a model of text. Of an
    encoder-decoder whose parts have configurations of their own, it is in that of the encoder."""
    from transformers import PretrainedConfig

    encoder = getattr(config, "encoder", None)
    if config.is_encoder_decoder and isinstance(encoder, PretrainedConfig):
        return text_config(encoder)
    try:
        found: PretrainedConfig = config.get_text_config()
    except ValueError:  # it has one for texts that are read, and one for texts that are written
        found = config.get_text_config(encoder=True)
    return found


def encoder_shape(config: PretrainedConfig) -> tuple[int, int]:
    """(L + 1, D): layers with the embedding output, and width.

    Raises:
        UnsupportedModelError: If the configuration does not give it.
    """
    return count_in(config, "num_hidden_layers") + 1, count_in(config, "hidden_size")


def vocabulary(config: PretrainedConfig) -> int:
    """How many tokens the model has embeddings for.

    Raises:
        UnsupportedModelError: If the configuration does not give it.
    """
    return count_in(config if hasattr(config, "vocab_size") else text_config(config), "vocab_size")


def count_in(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if type(value) is int and value > 0:
        return value
    raise _field_error(config, name, "it must be a whole number, at least 1")


def _field_error(config: PretrainedConfig, name: str, needed: str) -> UnsupportedModelError:
    there = hasattr(config, name)
    said = repr(getattr(config, name)) if there else "absent"
    name = config.attribute_map.get(name, name)  # as its file has it: BART says encoder_layers
    # CANINE has no vocabulary: nothing in its file could be corrected.
    remedy = f"Correct {name} in its config.json, or choose another model." if there else "Choose another model."
    return UnsupportedModelError(
        f"The configuration of {config.name_or_path or 'the model'} ({config.model_type}) has {name} {said}; {needed}.",
        remedy,
    )


ROBERTA_POSITIONS = (
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Architectures that count positions from the padding id + 1. No token uses the embeddings before it."""


def max_positions(config: PretrainedConfig) -> int | None:
    """The largest number of tokens that the position embeddings allow, special tokens included; None if unlimited.

    Raises:
        UnsupportedModelError: If the configuration leaves no position, or lacks a number that is needed here.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    if int(positions) < 1:
        if _has_positions_by_default(config):
            raise _field_error(config, "max_position_embeddings", "this architecture has a limit")
        return None  # in XLNet and others this means no limit
    if config.model_type not in ROBERTA_POSITIONS:
        return int(positions)
    if config.pad_token_id is None:
        raise _field_error(config, "pad_token_id", "this architecture counts positions from it")
    if int(positions) <= int(config.pad_token_id) + 1:
        raise _field_error(
            config, "pad_token_id", f"positions are counted from it + 1, and max_position_embeddings is {positions}"
        )
    return int(positions) - int(config.pad_token_id) - 1


def _has_positions_by_default(config: PretrainedConfig) -> bool:
    try:
        default = getattr(type(config)(), "max_position_embeddings", None)
    except Exception:  # a class that comes with a model may need arguments
        return False
    return isinstance(default, int) and default > 0


def without_padding(config: PretrainedConfig) -> PretrainedConfig | None:
    """A copy that has no padding token, if the one of ``config`` has no embedding: torch.nn.Embedding refuses it."""
    wrong = []
    for number, part in enumerate((config, *parts_of(config))):
        pad, known = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(known, int) and not -known <= pad < known:
            wrong.append(number)
    if not wrong:
        return None
    config = copy.deepcopy(config)
    parts = [config, *parts_of(config)]
    for number in wrong:
        parts[number].pad_token_id = None
    return config


def class_of(config: PretrainedConfig) -> type | None:
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None
