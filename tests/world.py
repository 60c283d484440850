"""A folder to train in: a resource, a reader, a corpus, caches and runs of its own."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.models.bert.modeling_bert import BertEncoder

from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.experiment.pipeline import TrainResult, train
from kr2cache.experiment.shared import Shared
from kr2cache.extraction.extract import ExtractResult, extract
from kr2cache.extraction.planning import plan_extraction

SPLITS = {"train": 12, "dev": 5, "test": 6}
"""Sentences of its corpus."""


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a resource, a reader, a corpus, caches and runs of its own."""

    folder: Path

    @property
    def resource(self) -> Path:
        return self.folder / "models" / "res"

    @property
    def data(self) -> Path:
        return self.folder / "corpus"

    @property
    def caches(self) -> Path:
        return self.folder / "cache"

    def config(self, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "task": "udpos",
            "reader": str(self.folder / "models" / "reader"),
            "resource": str(self.resource),
            "data": str(self.data),
            "fusion": "last4",
            "seeds": (1,),
            "epochs": 2.0,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "run_dir": self.folder / "runs",
            "cache_dir": self.caches,
            "device": "cpu",
        }
        return TrainConfig(**(settings | changes))

    def train(self, **changes: Any) -> TrainResult:
        return train(self.config(**changes))

    def extract(self, split: str = "train", **changes: Any) -> ExtractResult:
        settings: dict[str, Any] = {
            "resource": str(self.resource),
            "split": split,
            "task": "udpos",
            "data": str(self.data),
            "cache_dir": self.caches,
            "device": "cpu",
        }
        return extract(plan_extraction(ExtractConfig(**(settings | changes))))

    def cache_folders(self) -> list[Path]:
        return sorted({path.parent for path in self.caches.rglob("*.h5")})


def world_of_pairs(folder: Path) -> World:
    """A resource that takes segment ids, and 20 pairs of sentences with a label, in ``folder``."""
    model = tiny.save_model(folder / "models" / "res", layers=2, initializer_range=0.4)
    path = model / "tokenizer_config.json"
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_input_names": inputs}), "utf-8")
    draw = random.Random(4)
    rows = [
        {
            "pairID": f"p{i}",
            "sentence1": " ".join(draw.choices(tiny.WORDS, k=draw.randint(1, 9))),
            "sentence2": " ".join(draw.choices(tiny.WORDS, k=draw.randint(1, 9))),
            "gold_label": draw.choice(["entailment", "neutral", "contradiction"]),
        }
        for i in range(20)
    ]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return World(folder)


@contextmanager
def count_resource_batches() -> Iterator[list[int]]:
    """Batch sizes of every forward pass of the resource (the only BERT here; readers are XLM-R)."""
    sizes: list[int] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, BertEncoder):
            sizes.append(inputs[0].shape[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


@contextmanager
def scarce_memory(
    positions: int, *, after: int = 0, encoder: type[torch.nn.Module] = BertEncoder
) -> Iterator[list[int]]:
    """A device with room for so many positions in one forward pass of ``encoder``, which else says what torch does.

    Args:
        after: The first so many passes fit all the same, as before another program takes the memory.

    Yields:
        Positions of the passes that fit.
    """
    fitted: list[int] = []
    on_device, try_reader = True, Shared.check_reader

    def on_the_cpu(*arguments: Any, **named: Any) -> None:
        nonlocal on_device
        on_device = False
        try:
            try_reader(*arguments, **named)
        finally:
            on_device = True

    def check(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, encoder) and on_device:
            size = inputs[0].shape[0] * inputs[0].shape[1]
            if size > positions and len(fitted) >= after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            fitted.append(size)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(check)
    try:
        with pytest.MonkeyPatch.context() as patch:  # a reader is tried on the CPU, wherever it will be trained
            patch.setattr(Shared, "check_reader", on_the_cpu)
            yield fitted
    finally:
        handle.remove()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder as on a disk that is mounted read-only: for Python, whoever the user is (rights mean nothing to root,
    and mounting takes rights of its own). Reading works; what HDF5 does in C is not seen.
    """
    root = str(folder.resolve())

    def refuse(path: Any) -> None:
        if not isinstance(path, int) and os.path.commonpath([root, os.path.realpath(os.fspath(path))]) == root:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return by_number(path, flags, *more, **named)

    def opened_as(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(path)
        return by_name(path, mode, *more, **named)

    def changed(path: Any, *more: Any, **named: Any) -> Any:
        refuse(path)

    by_number, by_name = os.open, io.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(io, "open", opened_as)
        patch.setattr("builtins.open", opened_as)
        for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir"):
            patch.setattr(os, name, _first(changed, getattr(os, name)))
        with pytest.raises(OSError, match="Read-only"):
            (folder / "new").touch()
        with pytest.raises(OSError, match="Read-only"):
            (folder / "new").mkdir()
        yield


def _first(check: Callable[..., Any], do: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        check(*arguments, **named)
        return do(*arguments, **named)

    return both


OLD_WORLD = Path(__file__).parent / "old_cache" / "world.tar.xz"


def unpack_old_world(folder: Path) -> Path:
    """A working folder as commit 0485b90 left it (``old_cache/README.md``): models, corpus, finished caches, a run."""
    with tarfile.open(OLD_WORLD) as archive:
        archive.extractall(folder, filter="data")
    return folder


def predictions(run: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"predictions-{split}.jsonl").read_text("utf-8").splitlines()]


def change_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_the_tokenizer(model: Path) -> None:
    """Uppercase and lowercase as before, but "haus" is no longer h ##a ##u ##s: two pieces swap their numbers."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    numbers = content["model"]["vocab"]
    numbers["h"], numbers["r"] = numbers["r"], numbers["h"]
    path.write_text(json.dumps(content), "utf-8")
