"""A model's tokenizer, and its padding id."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.errors import ModelUnavailableError
from kr2cache.models.configuration import class_of, vocabulary
from kr2cache.models.files import model_folder
from kr2cache.models.load import accepts, explained, load_config
from kr2cache.models.registry import ModelSpec
from kr2cache.models.words import load_for_words

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(spec: ModelSpec, *, words: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        words: Whether it will get texts as lists of words. Then each word has to get the tokens that it has in
            running text, with its space (``load_for_words``).

    Raises:
        ModelUnavailableError: If it cannot be loaded, or has no vocabulary: without its files, transformers makes a
            tokenizer of special tokens only.
        UnsupportedModelError: If words do not get these tokens in any way.
    """
    folder = model_folder(spec)
    arguments: dict[str, Any] = {**spec.tokenizer, "trust_remote_code": spec.trust_remote_code}
    config = load_config(spec)
    if "model_type" not in json.loads((folder / "config.json").read_text("utf-8")):
        arguments["config"] = config  # it decides the tokenizer's class
    with explained(spec, "tokenizer"):
        loader = _loader(spec, folder)
        try:
            tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder, **arguments)
        except Exception as error:  # transformers then takes the file for another kind, and names what that needs
            missing = _needed_for_sentencepiece(folder)
            if missing is not None:
                raise ImportError(missing) from error
            raise
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelUnavailableError(
            f"The tokenizer of {spec.name!r} knows no word: {folder} holds no vocabulary (tokenizer.json, vocab.txt or "
            "the like), and every word would be read as unknown.",
            "Copy the tokenizer's files there too, beside config.json and the weights.",
        )
    if words and tokenizer.is_fast:
        with explained(spec, "tokenizer"):
            tokenizer = load_for_words(
                tokenizer,
                lambda: loader.from_pretrained(folder, **arguments, add_prefix_space=True),
                f"The tokenizer of {spec.name!r}",
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


def _needed_for_sentencepiece(folder: Path) -> str | None:
    """What must be installed to read a vocabulary that is only a file of SentencePiece (DeBERTa-v3's spm.model)."""
    files = [path.name for path in folder.glob("*.model")]
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    missing = [package for package, module in packages.items() if not _is_installed(module)]
    if not (files and missing) or (folder / "tokenizer.json").is_file():
        return None
    return f"reading {files[0]} without a tokenizer.json needs {' and '.join(missing)}: pip install {' '.join(missing)}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; 0 if the tokenizer has none. Padding is masked, so its id does not matter."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def _has_segments(config: PretrainedConfig) -> bool:
    """Whether the model distinguishes the segments of a pair. Its tokenizer may give segment ids even if not."""
    architecture = class_of(config)
    forward = getattr(architecture, "forward", None)
    return int(getattr(config, "type_vocab_size", None) or 0) > 1 and accepts(forward, "token_type_ids")
