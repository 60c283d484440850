"""``kr2cache train``: stage two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache.commands.defaults import train_config
from kr2cache.commands.loading import loading
from kr2cache.commands.options import Json, print_json, takes
from kr2cache.commands.settings import OPTIONS, TRAIN
from kr2cache.config import TrainConfig
from kr2cache.experiment.checks import check_training
from kr2cache.methods import METHODS, Method
from kr2cache.models.files import model_folder
from kr2cache.system.console import note
from kr2cache.toml import read_toml


@takes(TrainConfig, TRAIN)
def train_cli(
    typed: dict[str, Any],
    no_extract: Annotated[
        bool, typer.Option("--no-extract", help="Fail if a cache is missing, instead of making it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """[bold]Stage two[/]: train readers on cached states, one run for each seed.

    Missing caches are made first. A finished run is shown, not trained again.
    """
    config = train_config(read_toml(Path.cwd(), OPTIONS), extract=not no_extract, **typed)
    model_folder(check_training(config).reader)  # a download shows its own progress
    _note_unused(METHODS[config.method], typed)
    with loading(as_json):
        from kr2cache.experiment.pipeline import describe_training, train

    result = train(config)
    describe_training(result)
    if as_json:
        print_json(result.json())


def _note_unused(method: Method, typed: dict[str, Any]) -> None:
    """Name the options that the user typed although this method does not use them."""
    unused: list[str] = []
    # One resource may have given the task by its language.
    tells_task = typed["task"] is None and isinstance(typed["resource"], str)
    if "resource" not in (method.trains, method.frozen) and not tells_task:
        unused.append("resource")
    if method.frozen is None:
        unused += ["fusion", "projection", "fusion_learning_rate", "resource_max_length", "pool"]
    if not method.needs_teacher:
        unused += ["teacher", "temperature", "soft_weight"]
    if options := [f"--{name.replace('_', '-')}" for name in unused if typed[name] is not None]:
        note(f"Method {method.name} does not use {', '.join(options)}.")
