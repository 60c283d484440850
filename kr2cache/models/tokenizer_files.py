"""The files that a trained reader's tokenizer is loaded from, proven before the training starts.

A tokenizer that is code (KoBERT's) may not be able to save itself, or may save something that cannot be loaded again.
It is better to know that before a training of hours than after it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.errors import KR2CacheError, UnsupportedModelError
from kr2cache.models.files import model_folder
from kr2cache.models.load import load_config, quiet
from kr2cache.models.registry import ModelSpec, trained_spec
from kr2cache.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".index.json")
"""Ends of the names of files that hold weights, or say where they are: never a tokenizer's."""
CONFIG = "config.json"


def proven_files(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    spec: ModelSpec,
    overrides: Mapping[str, Mapping[str, Any]],
    *,
    words: bool,
    same: Callable[[PreTrainedTokenizerBase], bool],
) -> dict[str, bytes]:
    """The tokenizer as files. They were written to a folder and loaded again as ``predict`` will do it.

    transformers writes the files. Where its files cannot be loaded again, or its class cannot write them, the files are
    those of the model that the tokenizer came from.

    Args:
        tokenizer: Of the reader.
        config: Of the reader; it is saved and loaded again as well.
        spec: The model that the reader is trained from.
        overrides: ``[models]`` of ``kr2cache.toml``.
        words: Whether the tokenizer is given lists of words.
        same: Whether another tokenizer gives the same tokens.

    Returns:
        Name to content; the names are relative to the folder.

    Raises:
        UnsupportedModelError: If neither way gives files that can be loaded again.
    """
    reasons = []
    for who, write in (("transformers", _saved), ("the model's own files", _copied)):
        with tempfile.TemporaryDirectory(prefix="kr2cache-") as name:
            # transformers copies code to a folder of its own that is called by this one: always the same name.
            folder = Path(name) / "model"
            try:
                with quiet():
                    config.save_pretrained(folder)
                    write(tokenizer, spec, folder)
                files = {str(path.relative_to(folder)): path.read_bytes() for path in _files_in(folder)}
                loaded = _loaded_again(trained_spec(spec.name, folder, overrides), config, words=words)
                if same(loaded):
                    return files
                reasons.append(f"{who}: other tokens than before")
            except KR2CacheError as error:
                reasons.append(f"{who}: {error.message}")
            except Exception as error:  # code that comes with a model can raise anything
                reasons.append(f"{who}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    raise UnsupportedModelError(
        f"The trained reader could not be used again, because the tokenizer of {spec.name!r} cannot be saved and "
        f"loaded. Tried {'; '.join(reasons)}.",
        "Choose another reader. For the scores alone, train it with kr2cache sweep without --keep-readers.",
    )


def _saved(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def _copied(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, folder: Path) -> None:
    for path in sorted(model_folder(spec).iterdir()):
        if path.is_file() and path.name != CONFIG and not path.name.endswith(WEIGHTS):
            (folder / path.name).write_bytes(path.read_bytes())


def _files_in(folder: Path) -> list[Path]:
    """Without the configuration, which is saved with the reader's weights."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CONFIG)


def _loaded_again(spec: ModelSpec, config: PretrainedConfig, *, words: bool) -> PreTrainedTokenizerBase:
    again = load_config(spec)
    if (again.model_type, again.id2label) != (config.model_type, config.id2label):
        raise ValueError(f"{CONFIG} is not what was saved: {again.model_type}, labels {again.id2label}")
    return load_tokenizer(spec, words=words)
