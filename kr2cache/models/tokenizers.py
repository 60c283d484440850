"""A model's tokenizer, and its padding id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.errors import ModelUnavailableError, UnsupportedModelError
from kr2cache.models.files import model_folder
from kr2cache.models.load import accepts, class_of, explained, load_config, vocabulary
from kr2cache.models.registry import ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(spec: ModelSpec, *, words: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        words: Whether it will get texts as lists of words. A byte-level BPE (RoBERTa's) is then set to put a space
            before each word. Without this, every word would silently lose its space prefix.

    Raises:
        ModelUnavailableError: If it cannot be loaded, or has no vocabulary: without its files, transformers makes a
            tokenizer of special tokens only.
        UnsupportedModelError: If a byte-level BPE has no such setting.
    """
    folder = model_folder(spec)
    arguments: dict[str, Any] = {**spec.tokenizer, "trust_remote_code": spec.trust_remote_code}
    config = load_config(spec)
    if "model_type" not in json.loads((folder / "config.json").read_text("utf-8")):
        arguments["config"] = config  # it decides the tokenizer's class
    with explained(spec, "tokenizer"):
        loader = _loader(spec, folder)
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder, **arguments)
        if words and _drops_the_space(tokenizer):
            tokenizer = loader.from_pretrained(folder, **arguments, add_prefix_space=True)
            if _drops_the_space(tokenizer):
                raise UnsupportedModelError(
                    f"The tokenizer of {spec.name!r} cannot read texts that are lists of words: it is a byte-level BPE "
                    f"saved as the generic class {type(tokenizer).__name__}, which puts no space before a word: every "
                    "word would be read as the middle of a longer one.",
                    f'Set "add_prefix_space": true in the pre_tokenizer of {folder / "tokenizer.json"} (a text then '
                    "begins with a space too), or choose another model. It serves for tasks with plain text.",
                )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelUnavailableError(
            f"The tokenizer of {spec.name!r} knows no word: {folder} holds no vocabulary (tokenizer.json, vocab.txt or "
            "the like), and every word would be read as unknown.",
            "Copy the tokenizer's files there too, beside config.json and the weights.",
        )
    if not 0 <= pad_id(tokenizer) < vocabulary(config):
        tokenizer.pad_token = None  # the model has no embedding for it
    # The tokenizer's class does not tell this: models without segments use BertTokenizer, and models with segments use
    # a generic class.
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = [*names, "token_type_ids"] if _has_segments(config) else names
    return tokenizer


def _loader(spec: ModelSpec, folder: Path) -> Any:
    """The class that loads the tokenizer: ``AutoTokenizer``, or the model's own class if the folder names it as one
    string. transformers' ``save_pretrained`` writes it so, but ``AutoTokenizer`` cannot read it.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    named = settings.get("auto_map")
    reference = named.get("AutoTokenizer") if isinstance(named, dict) else None
    if not (isinstance(reference, str) and spec.trust_remote_code):
        return AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, folder)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; 0 if the tokenizer has none. Padding is masked, so its id does not matter."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def _has_segments(config: PretrainedConfig) -> bool:
    """Whether the model distinguishes the segments of a pair. Its tokenizer may give segment ids even if not."""
    architecture = class_of(config)
    forward = getattr(architecture, "forward", None)
    return int(getattr(config, "type_vocab_size", None) or 0) > 1 and accepts(forward, "token_type_ids")


def _drops_the_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is a byte-level BPE that encodes a given word without a space before it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    steps = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    return any(
        step.get("type") == "ByteLevel" and not step.get("add_prefix_space")
        for step in (steps, *steps.get("pretokenizers", ()))
    )
