"""The files of a model's folder: which hold weights, what is wrong with them, which to download. Loads none of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_BYTES = 1_024
"""A file larger than this is no pointer."""


def weight_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that hold weights."""
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has files of a tokenizer besides its configuration."""
    names = ("tokenizer.json", "vocab*", "*.model", "merges.txt", "tokenization_*.py")
    return any(path for name in names for path in folder.glob(name))


def fault(folder: Path, *, weights: bool = True) -> tuple[str, str] | None:
    """The fault of a model's folder and its remedy, in words; None if its files are complete.

    Args:
        folder: The folder.
        weights: Whether the model is loaded with weights from there.
    """
    others = set() if weights else set(weight_files(folder))
    files = [path for path in folder.iterdir() if path.is_file() and path not in others]
    pointers = sorted(path.name for path in files if _is_lfs_pointer(path))
    if pointers:
        more = f" (and {len(pointers) - 1} more)" if len(pointers) > 1 else ""
        return (
            f"{folder} was cloned without git-lfs: {pointers[0]} is only a pointer to the real content{more}.",
            "Run `git lfs pull` there, or copy the real files.",
        )
    if not weights:
        return None
    if not weight_files(folder):
        return (
            f"{folder} holds no weights (model.safetensors or pytorch_model.bin).",
            "Copy the weights there too, beside config.json.",
        )
    missing = sorted({name for path in folder.glob("*.index.json") for name in _shards(path)} - {f.name for f in files})
    if missing:
        return (
            f"{folder} lacks {len(missing)} of the files of its weights: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}.",
            "Copy them there too.",
        )
    return None


def not_json_in(folder: Path) -> tuple[str, str] | None:
    """The first file of ``folder`` that should be JSON but is not, and the reason."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            return path.name, str(error)
    return None


def _is_lfs_pointer(path: Path) -> bool:
    if path.stat().st_size >= LFS_POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _shards(index: Path) -> set[str]:
    """The weight files that an index names, if files of its format exist."""
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return set()
    return names if any((index.parent / name).is_file() for name in names) else set()


# Downloading ----------------------------------------------------------------------------------------------------------

FOREIGN = re.compile(
    r".*\.(safetensors|bin|h5|msgpack|ot|onnx|pt|pth|ckpt|pb|tflite|gguf|mlmodel|npz|png|jpe?g|gif|svg|pdf|md)|\.git.*"
)
"""Weights in any format (they are chosen separately), pictures, readmes."""


def files_to_download(
    names: Iterable[str], config: dict[str, Any], tokenizer_config: dict[str, Any], *, weights: bool = True
) -> list[str]:
    """The files of a repository on the hub that a model needs: configurations, code, vocabulary, one format of weights.

    Args:
        names: Every file of the repository.
        config: Its config.json.
        tokenizer_config: Its tokenizer_config.json; empty if there is none.
        weights: Whether the model is loaded with its weights.
    """
    here = [name for name in names if "/" not in name]
    safe = any(name.endswith(".safetensors") for name in here)
    chosen = re.compile(r".*\.safetensors" if safe else r"pytorch_model.*\.bin")
    asked = _vocabulary_files(config, tokenizer_config)
    return [
        name
        for name in here
        if (weights and chosen.fullmatch(name))
        or name.endswith((".json", ".txt", ".model", ".py"))
        or (name in asked if asked is not None else not FOREIGN.fullmatch(name))
    ]


def _vocabulary_files(config: dict[str, Any], tokenizer_config: dict[str, Any]) -> set[str] | None:
    """The files that the tokenizer's class reads; None if it is no class of transformers."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    name = tokenizer_config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(config.get("model_type", ""))
    found = tokenizer_class_from_name(name) if isinstance(name, str) else None
    files = getattr(found, "vocab_files_names", None)
    return set(files.values()) if isinstance(files, dict) else None
