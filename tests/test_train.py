"""The Trainer's arguments; what a training does is in test_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from world import World

from kr2cache import train
from kr2cache.train import training_arguments


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_neither_loss_nor_copy_of_a_batch_is_waited_for(
    world: World, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "choose_device", lambda _: torch.device(device))
    arguments = training_arguments(world.config(), tmp_path, 1)
    assert arguments.accelerator_config.non_blocking is (device == "cuda")
    assert arguments.dataloader_pin_memory is (device == "cuda")
    assert not arguments.logging_nan_inf_filter
    assert "fused" in arguments.optim


def test_the_training_section_has_the_last_word(world: World, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"logging_nan_inf_filter": True, "accelerator_config": {"non_blocking": True}}
    arguments = training_arguments(world.config(training=chosen), tmp_path, 1)
    assert arguments.logging_nan_inf_filter
    assert arguments.accelerator_config.non_blocking
