"""Settings: one frozen dataclass for each stage.

An option that is not given comes from ``[defaults]`` of ``kr2cache.toml`` in the working folder, then from the registry
(a resource knows its language), then from the cache, then from the defaults in this module.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from kr2cache.errors import ConfigError
from kr2cache.methods import METHODS
from kr2cache.system import utf8

Projection = Literal["auto", "none", "mlp", "direct"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
ComputeDtype = Literal["float32", "bfloat16", "float16"]
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
Pool = Literal["none", "word", "sequence"]
POOLS: tuple[Pool, ...] = get_args(Pool)
"""What one stored state stands for: a token, a word (the mean of its tokens), or a sequence (the mean of all its tokens
that are not special)."""

DEFAULT_READER = "xlm-r"
DEFAULT_MAX_LENGTH = 128
DEFAULT_DTYPE = "float16"
DEFAULT_COMPUTE_DTYPE: ComputeDtype = "float32"
DEFAULT_WEIGHTS_DTYPE: ComputeDtype = "float32"
DEFAULT_POOL: Pool = "none"
DEFAULT_FUSION = "last4"


def default_cache_dir() -> Path:
    """``$KR2CACHE_DIR``, else ``.kr2cache`` in the working folder.

    Raises:
        ConfigError: If the variable holds a URL.
    """
    return local(Path(os.environ.get("KR2CACHE_DIR") or ".kr2cache"), "$KR2CACHE_DIR")


URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def local(path: Path, what: str) -> Path:
    """``path``, unless it is a URL: the path ``s3://bucket`` would be a folder ``s3:`` in the working folder.

    Args:
        what: What gives the path, such as an option. For the error.

    Raises:
        ConfigError: For a URL.
    """
    if (scheme := URL.match(str(path))) is not None:
        url = f"{scheme[1]}://{str(path)[scheme.end() :]}"
        raise ConfigError(
            f"{what} {url} is a URL. kr2cache works on folders of this machine; {scheme[1]}:// is not supported yet.",
            "Give a folder: mount the storage (as with rclone mount), or copy it here.",
        )
    return path


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """One call of stage one."""

    resource: str
    """A registered name, a hub id or a folder."""
    split: str
    task: str
    data: str | None = None
    """A folder in the task's original format, or a hub data set id; None for the task's own."""
    max_length: int = DEFAULT_MAX_LENGTH
    """Tokens kept of each sequence, special tokens included."""
    layers: str = "all"
    """``all``, ``lastN`` or a list such as ``0,3,5``."""
    dtype: str = DEFAULT_DTYPE
    """On disk: float16, float32, bfloat16 or int8."""
    pool: Pool = DEFAULT_POOL
    """Whether each token's state is stored, or means of them: a name in ``POOLS``."""
    compute_dtype: ComputeDtype = DEFAULT_COMPUTE_DTYPE
    """The dtype of the forward pass; bfloat16 and float16 use autocast. With float32, the weights' dtype decides."""
    weights_dtype: ComputeDtype = DEFAULT_WEIGHTS_DTYPE
    """The dtype of the model's weights in memory."""
    device_map: str | None = None
    """``auto`` to spread the model's layers over all GPUs and the computer's memory; None for one device."""
    device: str = "auto"
    """Where the model runs. It does not decide which cache fits."""
    tokens_per_batch: int | None = None
    """Positions in one forward pass, padding included; None for the device's default. Recorded, never compared."""
    shard_gb: float | None = None
    """Maximum GiB of states in one shard; None for 16, or less if processes share the shards. A cache that was begun
    keeps its shards."""
    limit: int | None = None
    """Use only the first ``limit`` examples of the split."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    workers: int = 1
    """Processes that share the work."""
    engine: str = "local"
    """What starts the workers: a name in ``kr2cache.workers.ENGINES``."""
    gpus_per_worker: float | None = None
    """For the engine ray: GPUs of each worker; None for one where there are GPUs."""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``[models]`` of ``kr2cache.toml``."""
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """``[tasks]`` of ``kr2cache.toml``, or ``Task`` objects by their names. The field ``task`` takes such an object
    too: it then holds its name, and the object is here."""

    def __post_init__(self) -> None:
        _name_task(self)
        _check_text(self)
        _positive("--max-length", self.max_length)
        _positive("--tokens-per-batch", self.tokens_per_batch)
        _positive("--limit", self.limit)
        _positive("--shard-gb", self.shard_gb)
        _positive("--workers", self.workers)
        _positive("--gpus-per-worker", self.gpus_per_worker)


@dataclass(frozen=True, kw_only=True)
class SweepWorkers:
    """The processes that share a sweep; the fields are those of ``ExtractConfig``."""

    workers: int = 1
    engine: str = "local"
    gpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        _check_text(self)
        _positive("--workers", self.workers)
        _positive("--gpus-per-worker", self.gpus_per_worker)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One call of stage two: one reader, one method, several seeds."""

    task: str
    reader: str = DEFAULT_READER
    resource: str | None = None
    """The frozen model; None if the method needs no resource. A list of several is accepted too: its first one is kept
    here, the others in ``more_resources``."""
    more_resources: tuple[str, ...] = ()
    """Frozen models whose states stand behind those of ``resource``, in this order. Only for method kr2."""
    data: str | None = None
    fusion: str = DEFAULT_FUSION
    method: str = "kr2"
    """A name in ``METHODS``."""
    projection: Projection = "auto"
    seeds: tuple[int, ...] = (1, 2, 3)
    epochs: float = 10
    batch_size: int = 32
    learning_rate: float = 2e-5
    fusion_learning_rate: float | None = None
    """Learning rate of the trainable weights of the fusion; None for ``learning_rate``, as in the paper."""
    max_length: int = DEFAULT_MAX_LENGTH
    """Maximum number of tokens in the reader's sequences."""
    resource_max_length: int | None = None
    """Maximum number of tokens in the resource's sequences; None for the cache's, or 128 if there is no cache."""
    teacher: str | None = None
    """For method kd: a model, which is fine-tuned first, or the folder of a run."""
    temperature: float = 1.0
    """Temperature of the distributions in L_soft."""
    soft_weight: float = 0.5
    """Weight of L_soft in the loss."""
    limit: int | None = None
    """Use only the first ``limit`` examples of each split."""
    train_limit: int | None = None
    """The same for the train split alone; the other splits stay whole."""
    device: str = "auto"
    run_dir: Path = Path("runs")
    keep_head: bool = False
    """Whether the trained model keeps the head of its checkpoint, whose label names have to be those of the task."""
    keep_readers: bool = True
    """Whether a run keeps the trained reader beside its predictions."""
    temporary_readers: bool = False
    """Whether a sweep may drop a kept reader when no later training learns from it."""
    cache_dir: Path = field(default_factory=default_cache_dir)
    extract: bool = True
    """Whether missing caches are made."""
    check_states: bool = False
    """Whether the first read of a sequence compares its states with their checksum."""
    dtype: str | None = None
    """Dtype of the cache to use or make; None for the cache's, or float16 if there is no cache. ``dtype`` and
    ``compute_dtype`` come from ``[defaults]``."""
    pool: Pool | None = None
    """Pooling of the cache to use or make, a name in ``POOLS``; None for the cache's, or none if there is no cache."""
    compute_dtype: ComputeDtype | None = None
    weights_dtype: ComputeDtype | None = None
    """Dtype of the resource's weights; None for that of its caches, or float32 if there is no cache."""
    device_map: str | None = None
    """As in ``ExtractConfig``, where missing caches are made."""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """As in ``ExtractConfig``."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """``[training]`` of ``kr2cache.toml``: passed on to transformers.TrainingArguments."""

    def __post_init__(self) -> None:
        several: Any = self.resource
        if isinstance(several, list | tuple):
            object.__setattr__(self, "resource", several[0] if several else None)
            object.__setattr__(self, "more_resources", (*several[1:], *self.more_resources))
        _name_task(self)
        _check_text(self)
        # 10 and 10.0 are one setting, and have to name one run.
        for name in ("epochs", "learning_rate", "fusion_learning_rate", "temperature", "soft_weight"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))
        for name in (
            "batch_size",
            "max_length",
            "resource_max_length",
            "limit",
            "train_limit",
            "epochs",
            "learning_rate",
        ):
            _positive(f"--{name.replace('_', '-')}", getattr(self, name))
        _positive("--fusion-learning-rate", self.fusion_learning_rate)
        _positive("--temperature", self.temperature)
        if not (self.soft_weight >= 0 and math.isfinite(self.soft_weight)):
            raise ConfigError(f"--soft-weight {self.soft_weight} makes no sense.", "Give 0 or more; the paper has 0.5.")
        _check_seeds(self.seeds)
        own = sorted(set(self.training) & set(OWN_TRAINING))
        if own:
            raise ConfigError(
                f"[training] in kr2cache.toml sets {own[0]}, which has an option of its own.",
                f"Use {OWN_TRAINING[own[0]]} instead.",
            )

    @property
    def resources(self) -> tuple[str, ...]:
        """The names of all frozen models that are given, in their order."""
        return (*([] if self.resource is None else [self.resource]), *self.more_resources)

    def limit_of(self, split: str) -> int | None:
        """How many examples of a split are used at most; None for all."""
        limits = (self.limit, self.train_limit if split == "train" else None)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def trained_model(self) -> str | None:
        """The name of the model that is trained."""
        return self.resource if METHODS[self.method].trains == "resource" else self.reader

    @property
    def frozen_models(self) -> tuple[str, ...]:
        """The names of the models whose states are appended; empty for a method that appends none."""
        frozen = METHODS[self.method].frozen
        return () if frozen is None else (self.reader,) if frozen == "reader" else self.resources


LAST_SEED = 2**32 - 1
"""The largest seed that NumPy accepts."""
OWN_TRAINING = {
    "output_dir": "--run-dir",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "seed": "--seeds",
    "use_cpu": "--device",
    "eval_strategy": "a dev and a test split (the best epoch on dev is kept)",
    "load_best_model_at_end": "a dev and a test split (the best epoch on dev is kept)",
}
"""Arguments of TrainingArguments that have an option of their own in kr2cache."""


def _name_task(config: ExtractConfig | TrainConfig) -> None:
    """Where a task itself is given, keep it among ``tasks`` and its name in its place."""
    task: Any = config.task
    if not isinstance(task, str):
        object.__setattr__(config, "tasks", {**config.tasks, task.name: task})
        object.__setattr__(config, "task", task.name)


def _check_text(config: ExtractConfig | SweepWorkers | TrainConfig) -> None:
    """Names and folders must be UTF-8, because they are recorded with the results. Folders must be on this machine."""
    for one in fields(config):
        value = getattr(config, one.name)
        option = f"--{one.name.replace('_', '-')}"
        if isinstance(value, str | Path):
            utf8.check(str(value), option, ConfigError)
        if isinstance(value, Path):
            local(value, option)


def _check_seeds(seeds: tuple[int, ...]) -> None:
    remedy = f"Give different whole numbers from 0 to {LAST_SEED}: --seeds 1,2,3"
    if not seeds:
        raise ConfigError("--seeds names no seed.", remedy)
    for seed in seeds:
        if not 0 <= seed <= LAST_SEED:
            raise ConfigError(f"--seeds {','.join(map(str, seeds))}: {seed} is not a seed.", remedy)
        if seeds.count(seed) > 1:
            raise ConfigError(f"--seeds {','.join(map(str, seeds))} has {seed} more than once.", remedy)


def _positive(option: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{option} {value} makes no sense.", "Give a number above 0.")


def parse_seeds(text: str) -> tuple[int, ...]:
    """``1,2,3``

    Raises:
        ConfigError: If it is not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not a list of whole numbers.", "Give --seeds 1,2,3") from None
