"""Check before the first step that a training step fits into the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kr2cache.config import TrainConfig
from kr2cache.errors import DeviceMemoryError
from kr2cache.system.device import memory_advice
from kr2cache.training.batches import StepBatcher
from kr2cache.training.kreader import KReader

OPTIMIZER_BYTES = 8
"""Bytes per trained weight: AdamW keeps two float32 averages. It allocates them in the first step."""


def out_of_memory(config: TrainConfig, device: torch.device) -> DeviceMemoryError:
    """The error for a training step that does not fit."""
    steps = int(config.training.get("gradient_accumulation_steps", 1))
    remedy = memory_advice(device, "give a smaller --max-length or --resource-max-length")
    if config.batch_size > 1:
        remedy = (
            f"Give --batch-size {config.batch_size // 2} and write gradient_accumulation_steps = {2 * steps} under "
            "[training] in kr2cache.toml: a step then has as many examples. Or write bf16 = true there."
        )
    return DeviceMemoryError(
        f"A training step with --batch-size {config.batch_size} does not fit into the memory of {device}.", remedy
    )


class LongestBatchFirst(TrainerCallback):
    """Before the first step, runs the batch of the longest examples forward and backward once, with the memory of the
    optimizer allocated. Weights and random state do not change.
    """

    def __init__(self, reader: KReader, batcher: StepBatcher, try_batch: Callable[[dict[str, Any]], None]) -> None:
        """
        Args:
            try_batch: Runs a batch forward and backward, and drops gradients and losses.
        """
        self.reader = reader
        self.batcher = batcher
        self.try_batch = try_batch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        features = self.batcher.batcher.data.features
        read = features.sequences_read if features is not None else 0
        trained = sum(parameter.numel() for parameter in self.reader.parameters() if parameter.requires_grad)
        longest: list[int] = np.argsort(-self.batcher.positions, kind="stable")[: args.train_batch_size].tolist()
        with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
            optimizer = torch.empty(trained * OPTIMIZER_BYTES, dtype=torch.uint8, device=args.device)
            self.try_batch(self.batcher(longest))
            del optimizer
        if features is not None:
            features.sequences_read = read
