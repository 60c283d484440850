"""The arguments of transformers' Trainer: our own and those under ``[training]`` of ``kr2cache.toml``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError, error_text, unknown_name
from kr2cache.system import hub
from kr2cache.system.device import choose_device

IN_THIS_PROCESS = {
    "dataloader_pin_memory": False,
    "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
}
"""Batches with states on the GPU: such states cannot be pinned, and no other process can gather them."""
NOT_DECIDING = (
    "report_to",
    "run_name",
    "logging_",
    "log_",
    "save_",
    "hub_",
    "push_to_hub",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
)
"""Arguments of TrainingArguments that change no result: how their names start."""


def training_arguments(
    config: TrainConfig, folder: Path, seed: int, *, states_on_gpu: bool = False
) -> TrainingArguments:
    """The Trainer's arguments: our defaults, changed by ``[training]`` of ``kr2cache.toml``, then what options decide.

    Args:
        folder: Where the Trainer may leave files.
        states_on_gpu: The resource's states are on the GPU before training starts (``DeviceFeatures``).

    Raises:
        UnknownNameError: For a name that TrainingArguments does not have.
        ConfigError: For a value it refuses, a hub that cannot be reached, or several GPUs in one process.
    """
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for name in config.training:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=6, cutoff=0.4) or sorted(known)[:6]
            raise unknown_name("argument under [training] in kr2cache.toml:", name, near, "(of many)")
    if config.training.get("push_to_hub") and (reason := hub.unreachable()) is not None:
        raise ConfigError(
            f"push_to_hub under [training] in kr2cache.toml needs the hub, which cannot be reached: {reason}",
            "Leave it out, and upload the trained reader later.",
        )
    device = choose_device(config.device)
    # With auto, each process of torchrun has already chosen its own GPU.
    if config.device != "auto" and device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(
            f"Training on --device {config.device}: the Trainer takes the first GPU it sees.",
            f"Set CUDA_VISIBLE_DEVICES={device.index} and give --device cuda.",
        )

    def made(training: Mapping[str, Any]) -> TrainingArguments:
        return TrainingArguments(**_values(config, training, folder, seed, device, states_on_gpu))

    try:
        arguments = made(config.training)
    except Exception as error:  # a setting can ask for any package, which can raise anything
        if not config.training:
            raise

        def refused(training: Mapping[str, Any]) -> Exception | None:
            try:
                made(training)
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
    config: TrainConfig,
    training: Mapping[str, Any],
    folder: Path,
    seed: int,
    device: torch.device,
    states_on_gpu: bool,
) -> dict[str, Any]:
    copies_from_cpu = device.type == "cuda" and not states_on_gpu
    return {
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "report_to": "none",
        # Do not wait for the GPU after each step, neither for the loss nor for the copy of a batch: the CPU gathers the
        # next batch meanwhile. The end of the run checks that weights are finite.
        "logging_nan_inf_filter": False,
        "accelerator_config": {"non_blocking": copies_from_cpu},
        "dataloader_pin_memory": copies_from_cpu,
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
        **(IN_THIS_PROCESS if states_on_gpu else {}),
    }


Failure = Callable[[Mapping[str, Any]], Exception | None]
"""Tries these settings and returns the error, or None if they work."""


def settings_error(training: Mapping[str, Any], failure: Failure) -> ConfigError:
    """An error that names the settings in ``training`` that do not work. All of them together must fail."""
    alone = {name: failure({name: value}) for name, value in training.items()}
    reasons = {name: error for name, error in alone.items() if error is not None}
    if not reasons:  # each works alone: blame those without which the rest works
        together = failure(training) or ValueError("it does not work")
        for name in training:
            if failure({rest: value for rest, value in training.items() if rest != name}) is None:
                reasons[name] = together
        reasons = reasons or dict.fromkeys(training, together)
    said = []
    for name, error in reasons.items():
        reason = error_text(error)
        said.append(f"{name} = {training[name]!r}: {reason}")
    return ConfigError(
        f"[training] in kr2cache.toml has settings that do not work. {'; '.join(said)}",
        "Change them or leave them out.",
    )


def deciding_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in ``[training]`` that can change the result of a run."""
    return {name: value for name, value in training.items() if not name.startswith(NOT_DECIDING)}
