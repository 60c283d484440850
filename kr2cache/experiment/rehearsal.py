"""One training step of a tiny reader with the settings under ``[training]``, before long work starts.

Many settings of transformers fail only when the Trainer is built or makes its first step: an optimizer whose package is
not installed, a scheduler that lacks an argument, a batch that is never full. Without the rehearsal, such a training
would fail only after its caches were made.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForTokenClassification, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError
from kr2cache.training.arguments import settings_error, training_arguments
from kr2cache.training.kreader import KReader
from kr2cache.training.trainer import ReaderTrainer

NOT_REHEARSED: dict[str, Any] = {"push_to_hub": False, "torch_compile": False, "torch_compile_backend": None}
"""Values that the rehearsal uses for settings that act outside of this machine or take minutes."""

SEED = 1


class _OneStep(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def rehearse(config: TrainConfig, examples: int) -> None:
    """Try the settings under ``[training]``, if there are any.

    Args:
        examples: The number of training examples.

    Raises:
        ConfigError: For settings that do not work. The message names them.
    """

    def failure(training: Mapping[str, Any]) -> Exception | None:
        given = {name: NOT_REHEARSED.get(name, value) for name, value in training.items()}
        with (
            tempfile.TemporaryDirectory(prefix="kr2cache-rehearsal-", ignore_cleanup_errors=True) as folder,
            warnings.catch_warnings(action="ignore"),  # the training itself shows them
        ):
            try:
                arguments = training_arguments(dataclasses.replace(config, training=given), Path(folder), SEED)
                _check_full_batch(arguments, examples)
                trainer = _trainer(config, arguments, examples)
                if not (arguments.deepspeed or arguments.fsdp):  # these need the real model
                    trainer.train()
            except ConfigError as error:  # its cause is the error of TrainingArguments
                return error.__cause__ if isinstance(error.__cause__, Exception) else error
            except Exception as error:  # the Trainer and its packages raise errors of many types
                return error
        return None

    if config.training and (error := failure(config.training)) is not None:
        raise settings_error(config.training, failure) from error


def _check_full_batch(arguments: TrainingArguments, examples: int) -> None:
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and examples < batch:
        raise ValueError(f"{examples} training examples do not fill one batch of {batch}, so there would be no step.")


def _trainer(config: TrainConfig, arguments: TrainingArguments, examples: int) -> ReaderTrainer:
    tiny = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    tokens = torch.ones(1, 4, dtype=torch.long)
    part = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens, "labels_share": 1.0}
    trainer = ReaderTrainer(
        model=KReader(BertForTokenClassification(tiny), "token"),
        args=arguments,
        data_collator=lambda numbers: {"parts": [dict(part)]},
        train_dataset=list(range(examples)),
        config=config,
        positions=np.full(examples, 4),
    )
    # Without the callbacks that report: a rehearsal is not a run.
    trainer.callback_handler.callbacks = [DefaultFlowCallback(), _OneStep()]
    return trainer
