"""The arguments of transformers' Trainer: ours, and those under ``[training]``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError, unknown_name
from kr2cache.system.device import choose_device


def training_arguments(config: TrainConfig, folder: Path, seed: int) -> TrainingArguments:
    """The Trainer's arguments: ours, with ``[training]`` of ``kr2cache.toml`` laid over the defaults.

    Raises:
        UnknownNameError: For a name that TrainingArguments does not have.
        ConfigError: For a value it refuses, or several GPUs in one process.
    """
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for name in config.training:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=6, cutoff=0.4) or sorted(known)[:6]
            raise unknown_name("argument under [training] in kr2cache.toml:", name, near, "(of many)")
    device = choose_device(config.device)
    # With auto, torchrun's processes each have a GPU of their own by now.
    if config.device != "auto" and device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(
            f"Training on --device {config.device}: the Trainer takes the first GPU it sees.",
            f"Set CUDA_VISIBLE_DEVICES={device.index} and give --device cuda.",
        )
    try:
        arguments = TrainingArguments(**_values(config, config.training, folder, seed, device))
    except Exception as error:  # whatever the packages raise that a setting asks for
        if not config.training:
            raise

        def refused(training: Mapping[str, Any]) -> Exception | None:
            try:
                TrainingArguments(**_values(config, training, folder, seed, device))
            except Exception as error:
                return error
            return None

        raise settings_error(config.training, refused) from error
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process; DataParallel would lose the resource's states.",
            "Start through torchrun --nproc-per-node N -m kr2cache.cli train ..., or set CUDA_VISIBLE_DEVICES=0.",
        )
    return arguments


def _values(
    config: TrainConfig, training: Mapping[str, Any], folder: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """What TrainingArguments is given."""
    return {
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "report_to": "none",
        # A GPU's loss is not looked at after each step, nor is a batch's copy to it waited for: the next batch is
        # gathered meanwhile. Weights that are no longer finite are noticed at the end of the run.
        "logging_nan_inf_filter": False,
        "accelerator_config": {"non_blocking": device.type == "cuda"},
        "dataloader_pin_memory": device.type == "cuda",
        **training,
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }


Failure = Callable[[Mapping[str, Any]], Exception | None]
"""What a training with these settings fails with; None if it works."""


def settings_error(training: Mapping[str, Any], failure: Failure) -> ConfigError:
    """An error that names the settings that do not work, among ``training``, which fails as a whole."""
    alone = {name: failure({name: value}) for name, value in training.items()}
    reasons = {name: error for name, error in alone.items() if error is not None}
    if not reasons:  # each works alone: those without which the others work
        together = failure(training) or ValueError("it does not work")
        for name in training:
            if failure({other: value for other, value in training.items() if other != name}) is None:
                reasons[name] = together
        reasons = reasons or dict.fromkeys(training, together)
    said = []
    for name, error in reasons.items():
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        said.append(f"{name} = {training[name]!r}: {reason}")
    return ConfigError(
        f"[training] in kr2cache.toml has settings that do not work. {'; '.join(said)}",
        "Change them or leave them out.",
    )
