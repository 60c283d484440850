"""``kr2cache train``: stage two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kr2cache.commands.defaults import OPTIONS, choose_resource, choose_task
from kr2cache.commands.loading import loading
from kr2cache.commands.options import (
    CacheDir,
    Data,
    Debug,
    Device,
    Json,
    Limit,
    RunDir,
    Seeds,
    Task,
    merge,
    model_names,
    print_json,
)
from kr2cache.config import (
    DEFAULT_FUSION,
    DEFAULT_READER,
    METHODS,
    PROJECTIONS,
    TrainConfig,
    default_cache_dir,
    parse_seeds,
    read_toml,
)
from kr2cache.errors import ConfigError
from kr2cache.experiment.checks import check_training
from kr2cache.models.files import model_folder
from kr2cache.system.console import note


def train_cli(
    reader: Annotated[
        str | None,
        typer.Option(
            help="The model that is trained: a name, hub id or folder.",
            autocompletion=model_names,
            show_default=DEFAULT_READER,
        ),
    ] = None,
    resource: Annotated[
        str | None,
        typer.Option(
            help="The frozen model whose states it reads. Default: the one the cache holds.",
            autocompletion=model_names,
        ),
    ] = None,
    task: Task = None,
    data: Data = None,
    fusion: Annotated[
        str | None,
        typer.Option(
            help="fuse (trainable), all, lastN (an average) or layerN (layer0: embeddings).",
            show_default=DEFAULT_FUSION,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="kr2; kreader (the reader alone); kresource (the resource fine-tuned); kreader2 (the reader's "
            "frozen copy as resource); kd (distillation from --teacher).",
            show_default=METHODS[0],
        ),
    ] = None,
    projection: Annotated[
        str | None, typer.Option(help="From h2 to h1: auto, none, mlp, direct.", show_default=PROJECTIONS[0])
    ] = None,
    seeds: Seeds = None,
    epochs: Annotated[float | None, typer.Option(show_default="10")] = None,
    batch_size: Annotated[int | None, typer.Option(show_default="32")] = None,
    learning_rate: Annotated[float | None, typer.Option(show_default="2e-5")] = None,
    fusion_learning_rate: Annotated[
        float | None, typer.Option(help="Of the trainable weights w.", show_default="the same")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the reader's sequences.", show_default="128")
    ] = None,
    resource_max_length: Annotated[
        int | None, typer.Option(help="Tokens of the resource's.", show_default="the cache's, else 128")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Of kd: a model, fine-tuned first, or the folder of a run.", autocompletion=model_names),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of kd's soft labels.", show_default="1")] = None,
    soft_weight: Annotated[float | None, typer.Option(help="Of kd's L_soft beside L_hard.", show_default="0.5")] = None,
    limit: Limit = None,
    device: Device = None,
    run_dir: RunDir = None,
    cache_dir: CacheDir = None,
    no_extract: Annotated[
        bool, typer.Option("--no-extract", help="Fail where a cache is missing; do not make it.")
    ] = False,
    check_states: Annotated[
        bool | None,
        typer.Option("--check-states", help="Compare cached states with their checksums as they are first read."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """[bold]Stage two[/]: train readers on cached states, one run a seed.

    Caches that are missing are made first. A run that is there already is shown, not trained again.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    given = merge(
        toml,
        reader=reader,
        resource=resource,
        task=task,
        data=data,
        fusion=fusion,
        method=method,
        projection=projection,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        fusion_learning_rate=fusion_learning_rate,
        max_length=max_length,
        resource_max_length=resource_max_length,
        teacher=teacher,
        temperature=temperature,
        soft_weight=soft_weight,
        limit=limit,
        device=device,
        run_dir=run_dir,
        cache_dir=cache_dir,
        check_states=check_states,
    )
    for name in ("dtype", "compute_dtype"):
        if name in toml.defaults:
            given[name] = toml.defaults[name]
    if "max_length" in toml.defaults:  # of both stages, then
        given.setdefault("resource_max_length", toml.defaults["max_length"])
    if "seeds" in given:
        given["seeds"] = parse_seeds(given["seeds"])
    where = given.get("cache_dir", default_cache_dir())
    if "resource" not in given:
        try:
            given["resource"] = choose_resource(
                where, given.get("task"), given.get("reader", DEFAULT_READER), toml.models
            )
        except ConfigError:
            if given.get("method", METHODS[0]) in ("kr2", "kresource"):
                raise
    if "task" not in given:
        given["task"] = choose_task(given.get("resource"), where, toml.models)
    config = TrainConfig(**given, extract=not no_extract, models=toml.models, training=toml.training)
    model_folder(check_training(config).reader)  # a download shows its own progress
    of_fusion = {"fusion": fusion, "projection": projection, "fusion-learning-rate": fusion_learning_rate}
    of_distillation = {"teacher": teacher, "temperature": temperature, "soft-weight": soft_weight}
    idle = {} if config.method in ("kr2", "kreader2") else of_fusion | {"resource-max-length": resource_max_length}
    idle |= {} if config.method == "kd" else of_distillation
    if typed := [f"--{name}" for name, value in idle.items() if value is not None]:
        note(f"Method {config.method} makes no use of {', '.join(typed)}.")

    with loading(as_json):
        from kr2cache.experiment.pipeline import describe_training, train

    result = train(config)
    describe_training(result)
    if as_json:
        print_json(result.json())
