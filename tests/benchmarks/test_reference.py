"""A whole training gives the same result as KR2's equations in plain PyTorch with the same seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from reference import TAGS, train_tagger
from safetensors.torch import load_file
from world import World

from kr2cache.tasks.udpos import UPOS


@pytest.mark.parametrize("method", ["kreader", "kr2"])
def test_a_training_is_the_one_of_the_plain_loop(world: World, method: str) -> None:
    """Weights and score are the same. There is no dropout, whose random numbers depend on positions, and no dev split,
    so that the last epoch is scored."""
    assert tuple(TAGS) == UPOS
    reader = tiny.save_model(world.folder / "models" / "same-width", "bert", seed=7, initializer_range=0.2)
    (world.data / "dev.conllu").unlink()
    for split in ("train", "test"):
        world.extract(split, dtype="float32")
    settings: dict[str, Any] = {"models": {"r": {"path": str(reader), "dropout": 0.0}}, "reader": "r", "epochs": 3.0}
    run = world.train(method=method, fusion="last4", seeds=(4,), **settings).runs[0]
    model, accuracy = train_tagger(
        world.data,
        reader,
        world.resource if method == "kr2" else None,
        seed=4,
        epochs=3,
        batch_size=4,
        learning_rate=1e-3,
        dropout=0.0,
    )
    ours, plain = load_file(run.folder / "reader" / "model.safetensors"), model.state_dict()
    assert set(ours) <= set(plain)
    moved = load_file(reader / "model.safetensors")
    for name, tensor in ours.items():
        # The bias of keys does not change attention. Its gradient is only rounding, which Adam turns into steps.
        if not name.endswith("key.bias"):
            assert float((tensor - plain[name]).abs().mean()) < 1e-5, name
    name = "encoder.layer.1.output.dense.weight"
    assert float((ours[f"bert.{name}"] - moved[name]).abs().mean()) > 1e-3, "it learned something"
    assert json.loads((Path(run.folder) / "metrics.json").read_text())["test"]["accuracy"] == pytest.approx(accuracy)
