"""Resource, reader and corpora for the checks and measurements. They are made in place; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.extraction.extract import ExtractResult, extract
from kr2cache.extraction.planning import ExtractPlan, plan_extraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of models, corpora and batches."""

    resource: Mapping[str, Any]
    """Settings of a BERT configuration."""
    reader_layers: int
    sentences: Mapping[str, int]
    """Split to its number of sentences."""
    longest: int
    """Number of words of the longest sentence."""
    tokens_per_batch: int
    """For checks that need several batches."""
    measured: int
    """Number of sentences of the corpus for measurements."""
    trained: int
    """Number of training sentences in checks of training."""


FULL = Scale(
    resource={
        "layers": 12,
        "width": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30_522,
        "positions": 512,
    },
    reader_layers=3,
    sentences={"train": 3_000, "dev": 300, "test": 100},
    longest=20,
    tokens_per_batch=2_048,
    measured=2_500,
    trained=64,
)
"""BERT-base's shape, for a GPU."""
SMALL = Scale(
    resource={"layers": 3, "width": 32, "num_attention_heads": 4, "intermediate_size": 64},
    reader_layers=2,
    sentences={"train": 2_000, "dev": 40, "test": 40},
    longest=20,
    tokens_per_batch=64,
    measured=300,
    trained=32,
)
"""For a CPU: the same code in small sizes."""
INITIALIZER_RANGE = 0.03
"""With BERT's own value, 0.02, the attention of random weights is nearly uniform and hides mistakes. With 0.05,
rounding errors are twice as large."""


class Scene:
    """A folder with models, corpora and caches, and the device under test."""

    def __init__(self, folder: Path, device: torch.device, scale: Scale) -> None:
        self.folder = folder
        self.device = device
        self.scale = scale

    @functools.cached_property
    def resource(self) -> Path:
        settings = {**self.scale.resource, "initializer_range": INITIALIZER_RANGE}
        return tiny.save_model(self.folder / "resource", "bert", seed=1, **settings)

    @functools.cached_property
    def second(self) -> Path:
        """Another resource, half as wide, so that its states need a projection."""
        width, heads = self.scale.resource["width"] // 2, self.scale.resource["num_attention_heads"]
        settings = {"layers": 2, "width": width, "num_attention_heads": heads, "initializer_range": INITIALIZER_RANGE}
        return tiny.save_model(self.folder / "second", "roberta", seed=3, **settings)

    @functools.cached_property
    def reader(self) -> Path:
        settings = {**self.scale.resource, "initializer_range": INITIALIZER_RANGE, "layers": self.scale.reader_layers}
        return tiny.save_model(self.folder / "reader", "bert", seed=2, **settings)

    @functools.cached_property
    def corpus(self) -> Path:
        return self._save_corpus("corpus", self.scale.sentences)

    @functools.cached_property
    def measured(self) -> Path:
        """The corpus for measurements."""
        return self._save_corpus("measured", {"train": self.scale.measured, "dev": 10})

    def _save_corpus(self, name: str, sentences: Mapping[str, int]) -> Path:
        folder = self.folder / name
        folder.mkdir()
        for seed, (split, count) in enumerate(sentences.items()):
            words = tiny.sentences(count, seed=seed, longest=self.scale.longest)
            (folder / f"{split}.conllu").write_text(tiny.conllu(words, prefix=f"{split}-s"), "utf-8")
        return folder

    def plan(self, **settings: Any) -> ExtractPlan:
        """Plan an extraction, by default of the train split. ``settings`` are fields of ExtractConfig."""
        own: dict[str, Any] = {
            "resource": str(self.resource),
            "split": "train",
            "task": "udpos",
            "data": str(self.corpus),
            "cache_dir": self.folder / "caches",
            "device": str(self.device),
            "tokens_per_batch": self.scale.tokens_per_batch,
        }
        return plan_extraction(ExtractConfig(**(own | settings)))

    def extract(self, **settings: Any) -> ExtractResult:
        return extract(self.plan(**settings))

    def training(self, **settings: Any) -> TrainConfig:
        """A short training. It has no dropout, because random numbers differ between devices."""
        own: dict[str, Any] = {
            "task": "udpos",
            "reader": "reader",
            "resource": str(self.resource),
            "data": str(self.corpus),
            "limit": self.scale.trained,
            "seeds": (1,),
            "epochs": 2.0,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "fusion": "last4" if self.scale.resource["layers"] > 3 else "all",
            "device": str(self.device),
            "cache_dir": self.folder / "caches",
            "run_dir": self.folder / "runs",
            "models": {"reader": {"path": str(self.reader), "dropout": 0.0}},
        }
        return TrainConfig(**(own | settings))
