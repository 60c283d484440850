"""A folder to train in: a resource, a reader, a corpus, caches and runs of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.extract import ExtractResult, extract
from kr2cache.pipeline import TrainResult, train
from kr2cache.planning import plan_extraction


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
