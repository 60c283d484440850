"""``kr2cache extract``: stage one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache.commands.defaults import OPTIONS, choose_task
from kr2cache.commands.loading import loading
from kr2cache.commands.options import (
    CacheDir,
    Data,
    Debug,
    Device,
    Json,
    Limit,
    Task,
    merge,
    model_names,
    print_json,
)
from kr2cache.config import COMPUTE_DTYPES, ExtractConfig, default_cache_dir, read_toml
from kr2cache.errors import ConfigError
from kr2cache.extraction.checks import check_extraction
from kr2cache.models.files import model_folder
from kr2cache.models.registry import known_models
from kr2cache.system.console import waiting


def extract_cli(
    resource: Annotated[
        str | None,
        typer.Option(help="The frozen model: a name (kr2cache models), hub id or folder.", autocompletion=model_names),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, dev or test.", show_default="train")] = None,
    task: Task = None,
    data: Data = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens kept of each sequence, special ones included.", show_default="128")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="all, lastN (last4), or a list: 0,3,5. Layer 0 is the embeddings.", show_default="all"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="On disk: float16, float32, bfloat16 or int8.", show_default="float16")
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(help=f"In the forward pass: {', '.join(COMPUTE_DTYPES)} (autocast).", show_default="float32"),
    ] = None,
    device: Device = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option(help="Positions in one forward pass.", show_default="1024 on CPU, 16384 on CUDA")
    ] = None,
    shard_gb: Annotated[float | None, typer.Option(help="GiB of states in one file.", show_default="16")] = None,
    limit: Limit = None,
    cache_dir: CacheDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, for every dtype; write nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """[bold]Stage one[/]: run a frozen model once over a split and store its hidden states.

    A finished cache is found at once and never written again; an interrupted one is gone on with.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    given = merge(
        toml,
        resource=resource,
        split=split,
        task=task,
        data=data,
        max_length=max_length,
        layers=layers,
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        tokens_per_batch=tokens_per_batch,
        shard_gb=shard_gb,
        limit=limit,
        cache_dir=cache_dir,
    )
    from kr2cache.tasks import split_name

    given["split"] = split_name(given.get("split", "train"))
    where = given.get("cache_dir", default_cache_dir())
    if "resource" not in given:
        raise ConfigError(
            "Which resource?",
            "Give --resource, or resource under [defaults] in kr2cache.toml: "
            f"{', '.join(known_models(toml.models))}, a hub id or a folder.",
        )
    if "task" not in given:
        given["task"] = choose_task(given["resource"], where, toml.models)
    config = ExtractConfig(**given, models=toml.models)
    model_folder(check_extraction(config).spec)  # a download shows its own progress
    with loading(as_json):
        from kr2cache.extraction.extract import describe_result, extract
        from kr2cache.extraction.planning import describe, plan_extraction
    with waiting(f"Reading and tokenising {config.task}/{config.split}"):
        plan = plan_extraction(config)
    describe(plan)
    if dry_run:
        _show_dry_run(plan, as_json)
        return
    result = extract(plan)
    describe_result(result)
    if as_json:
        print_json(result.json())


def _show_dry_run(plan: Any, as_json: bool) -> None:
    from kr2cache.system.console import bytes_text
    from kr2cache.system.disk import free_bytes
    from kr2cache.system.terminal import Column, print_table

    choices = plan.bytes_by_choice()
    if as_json:
        print_json(
            {
                "cache": None,
                "sequences": len(plan.index),
                "tokens": plan.tokens,
                "bytes": plan.state_bytes,
                "seconds": 0.0,
                "computed": 0,
                "dry_run": True,
                "free_bytes": free_bytes(plan.config.cache_dir),
                "bytes_by_choice": choices,
            }
        )
        return
    names = list(next(iter(choices.values())))
    columns = [Column("dtype"), *(Column("all layers" if name == "all" else name, right=True) for name in names)]
    rows = [[name, *(bytes_text(size) for size in sizes.values())] for name, sizes in choices.items()]
    print_table("On disk it would take (nothing was written)", columns, rows)
