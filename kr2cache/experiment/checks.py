"""Checks of a training that do not need torch.

Importing torch and transformers takes seconds. A command line that cannot work is refused before that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from kr2cache.config import COMPUTE_DTYPES, DEFAULT_MAX_LENGTH, POOLS, PROJECTIONS, TrainConfig
from kr2cache.errors import ConfigError, UnknownNameError, unknown_name
from kr2cache.fusion import SOFTMAX, check_fusion_name, parse_fusion
from kr2cache.methods import METHODS
from kr2cache.models.files import check_obtainable, layers_in_config
from kr2cache.models.registry import ModelSpec, find_model, known_models
from kr2cache.store.stored import find_resource, has_caches
from kr2cache.system.device import check_device_map, check_device_name
from kr2cache.tasks import Task, find_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of a training, with its task and models looked up by their names."""

    config: TrainConfig
    """The settings, with those that the method implies."""
    task: Task
    reader: ModelSpec
    """The model that is trained."""
    resources: Mapping[str, ModelSpec]
    """The models that are frozen, by the name that the user gave. Empty if the method has none."""
    teacher: ModelSpec | None
    """None if the method needs no teacher, or if the teacher is a folder."""

    @property
    def positions(self) -> int | None:
        """The largest number of positions of a sequence's tokens and its states, as far as it is known before caches
        are found; None if nothing is appended."""
        if METHODS[self.config.method].frozen is None:
            return None
        longest = 1 if self.config.pool == "sequence" else self.config.resource_max_length or DEFAULT_MAX_LENGTH
        return self.config.max_length + len(self.resources) * longest


def check_names(config: TrainConfig) -> Training:
    """Check the settings of stage two. Whether models and data are on this machine makes no difference.

    Raises:
        KR2CacheError: For an unknown name, or a setting that cannot work.
    """
    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    method = METHODS[config.method]
    if config.projection not in PROJECTIONS:
        raise unknown_name("projection", config.projection, PROJECTIONS)
    if config.weights_dtype is not None and config.weights_dtype not in COMPUTE_DTYPES:
        raise unknown_name("weights dtype", config.weights_dtype, COMPUTE_DTYPES)
    if config.pool is not None and config.pool not in POOLS:
        raise unknown_name("pooling", config.pool, POOLS)
    check_device_name(config.device)
    check_device_map(config.device_map, config.device)
    task = find_task(config.task, config.tasks)
    _check_kind(config, task)
    if method.frozen == "reader":  # the reader is the resource, whatever resource is given
        config = dataclasses.replace(config, resource=config.reader, more_resources=())
    known = ", ".join(known_models(config.models))
    if method.needs_resource and config.resource is None:
        raise ConfigError(f"Method {config.method} needs --resource.", f"Registered: {known}.")
    if method.needs_teacher and config.teacher is None:
        raise ConfigError(
            f"Method {config.method} needs --teacher.",
            f"Give a model, which is fine-tuned first ({known}, a hub id, a folder), or the folder of a run "
            "(runs/…/seed-1).",
        )
    reader = find_model(config.trained_model or "", config.models)
    if method.trains == "resource" and config.more_resources:
        raise ConfigError(
            f"Method {method.name} trains one resource, but {', '.join(config.resources)} are given.",
            "Give --resource once, or --method kr2.",
        )
    resources = _find_resources(config)
    if not resources:
        check_fusion_name(config.fusion)
    teacher = None
    if method.needs_teacher and not Path(config.teacher or "").expanduser().is_dir():
        teacher = find_model(config.teacher or "", config.models)
    return Training(config=config, task=task, reader=reader, resources=resources, teacher=teacher)


def _check_kind(config: TrainConfig, task: Task) -> None:
    """Raise ``ConfigError`` for a task without labels, and for a setting that needs labels of another kind."""
    kind = task.kind if task.head else ""  # a task without labels has no head, and says so
    if kind == "regression" and METHODS[config.method].needs_teacher and config.temperature != 1:
        raise ConfigError(
            f"--temperature {config.temperature:g} softens the probabilities of labels; task {task.name!r} is a "
            "regression and has none.",
            "Leave it out: the student learns the teacher's values.",
        )
    if kind in ("regression", "multilabel") and config.training.get("label_smoothing_factor"):
        raise ConfigError(
            f"[training] in kr2cache.toml has label_smoothing_factor, which is for tasks with one right label; task "
            f"{task.name!r} is of kind {kind}.",
            "Leave it out.",
        )


def _find_resources(config: TrainConfig) -> dict[str, ModelSpec]:
    """The models whose states are appended, by the names that are given. The fusion is checked for each of them."""
    resources: dict[str, ModelSpec] = {}
    for name in config.frozen_models:
        try:
            spec = find_resource(name, config.cache_dir, config.models)
        except UnknownNameError as error:
            if "," in name:
                error.remedy = "Give --resource once for each model, or a list in kr2cache.toml and in grids."
            raise
        if spec.name in {other.name for other in resources.values()}:
            raise ConfigError(
                f"Two resources are called {spec.name!r}.",
                "Give each resource once. Models of one name need names of their own: [models.NAME] in kr2cache.toml.",
            )
        resources[name] = spec
        model_layers = layers_in_config(spec)
        check_fusion_name(config.fusion, model_layers)
        if model_layers is not None:
            with named_in_errors(spec, several=bool(config.more_resources)):
                parse_fusion(config.fusion, model_layers)
        _check_fits(config.fusion, config.projection)
    return resources


@contextlib.contextmanager
def named_in_errors(resource: ModelSpec, *, several: bool) -> Iterator[None]:
    """If there are several resources, errors about the settings of this one begin with its name."""
    try:
        yield
    except ConfigError as error:
        if several:
            error.message = f"{resource.name}: {error.message}"
        raise


def _check_fits(fusion: str, projection: str) -> None:
    """The direct projection has a weight for every number of every layer: it takes only the layers of a fusion."""
    if projection == "direct" and fusion in SOFTMAX:
        raise ConfigError(
            f"--fusion {fusion} cannot be used with --projection direct, whose matrix weights the layers itself.",
            "Give --fusion all, or another projection.",
        )


def check_training(config: TrainConfig) -> Training:
    """Check the settings of stage two, and that its models and data are available. No data is read, no model is loaded.

    Raises:
        KR2CacheError: For a name, path or setting that cannot work, or a model that is needed but not available.
    """
    training = check_names(config)
    config = training.config
    if training.teacher is not None:
        check_obtainable(training.teacher)
    training.task.check_data("train", config.data)
    training.task.check_has_splits(config.data)
    check_obtainable(training.reader)
    for resource in training.resources.values():
        if not has_caches(config.cache_dir, config.task, resource.name):
            check_obtainable(resource)
    return training
