"""The files from which a trained reader's tokenizer can be loaded. They are tested before the training starts.

A tokenizer that comes as code (KoBERT's) may fail to save itself, or save files that cannot be loaded again. It is
better to know this before hours of training than after.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.errors import KR2CacheError, UnsupportedModelError, error_text
from kr2cache.models.files import model_folder
from kr2cache.models.load import load_config, quiet
from kr2cache.models.registry import ModelSpec, trained_spec
from kr2cache.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".index.json")
"""Suffixes of files with weights or their index. They never belong to a tokenizer."""
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
    """The tokenizer as files, tested: written to a folder and loaded again as ``predict`` will load them.

    transformers writes the files. If its class cannot write them, or they cannot be loaded again, the files of the
    model that the tokenizer came from are used.

    Args:
        tokenizer: The reader's tokenizer.
        config: The reader's configuration; it is saved and loaded with the tokenizer.
        spec: The model that the reader is trained from.
        overrides: ``[models]`` of ``kr2cache.toml``.
        words: Whether the tokenizer gets lists of words.
        same: Whether another tokenizer gives the same tokens.

    Returns:
        Content by name, relative to the folder.

    Raises:
        UnsupportedModelError: If neither way gives files that can be loaded again.
    """
    reasons = []
    for who, write in (("transformers", _saved), ("the model's own files", _copied)):
        with tempfile.TemporaryDirectory(prefix="kr2cache-") as name:
            # transformers copies code to a folder named after this one, so the name must always be the same.
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
            except Exception as error:  # code that comes with a model may raise anything
                reasons.append(f"{who}: {error_text(error)}")
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
    """The files without the configuration, which is saved with the reader's weights."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CONFIG)


def _loaded_again(spec: ModelSpec, config: PretrainedConfig, *, words: bool) -> PreTrainedTokenizerBase:
    again = load_config(spec)
    if (again.model_type, again.id2label) != (config.model_type, config.id2label):
        raise ValueError(f"{CONFIG} is not what was saved: {again.model_type}, labels {again.id2label}")
    return load_tokenizer(spec, words=words)
