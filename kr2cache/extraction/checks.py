"""Check the settings of stage one before torch is imported.

Importing torch and transformers takes seconds; a command with wrong settings fails before that.
"""

from __future__ import annotations

import dataclasses

from kr2cache.cache.dtypes import DTYPES
from kr2cache.config import COMPUTE_DTYPES, POOLS, ExtractConfig
from kr2cache.errors import ConfigError, unknown_name
from kr2cache.fusion import check_layers_form, parse_layers
from kr2cache.models.files import check_obtainable, layers_in_config
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.system.device import check_device_map, check_device_name
from kr2cache.tasks import Task, find_task
from kr2cache.workers import check_engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """The model and the task that the settings name."""

    spec: ModelSpec
    task: Task


def check_extraction(config: ExtractConfig) -> Extraction:
    """Check the settings of stage one. No data is read and no model is loaded.

    Raises:
        KR2CacheError: If a name, path or setting is wrong, or the model cannot be obtained.
    """
    if config.dtype not in DTYPES:
        raise unknown_name("dtype", config.dtype, DTYPES)
    if config.compute_dtype not in COMPUTE_DTYPES:
        raise unknown_name("compute dtype", config.compute_dtype, COMPUTE_DTYPES)
    if config.weights_dtype not in COMPUTE_DTYPES:
        raise unknown_name("weights dtype", config.weights_dtype, COMPUTE_DTYPES)
    if config.pool not in POOLS:
        raise unknown_name("pooling", config.pool, POOLS)
    check_device_name(config.device)
    check_device_map(config.device_map, config.device)
    check_workers(config.engine, config.workers, config.device)
    if config.device_map is not None and config.engine == "local" and config.workers > 1:
        raise ConfigError(
            f"--device-map {config.device_map} spreads one model over all GPUs, but each of --workers {config.workers} "
            "takes one GPU of its own.",
            "Leave out one of the two. With --engine ray, --gpus-per-worker gives each worker several GPUs.",
        )
    check_layers_form(config.layers)
    task = find_task(config.task, config.tasks)
    spec = find_model(config.resource, config.models)
    task.check_data(config.split, config.data)
    check_obtainable(spec)
    if (model_layers := layers_in_config(spec)) is not None:
        parse_layers(config.layers, model_layers)
    return Extraction(spec=spec, task=task)


def check_workers(engine: str, workers: int, device: str) -> None:
    """Check the settings that concern workers.

    Raises:
        UnknownNameError: If there is no such engine.
        ConfigError: If the engine is not installed, or one GPU is named for several workers.
    """
    check_engine(engine)
    if (workers > 1 or engine == "ray") and device.startswith("cuda:"):
        raise ConfigError(
            f"--device {device} is one GPU, but each worker takes one of its own.",
            "Give --device cuda; CUDA_VISIBLE_DEVICES says which GPUs they use.",
        )
