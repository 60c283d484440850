"""The command line: parse, fill in what was not given, call the plain function, show or print what it returned.

Standard output carries results; with ``--json`` one JSON document and nothing else. Exit codes: 0 done, 1 a failure
that was explained, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache import __version__
from kr2cache.config import (
    COMPUTE_DTYPES,
    DEFAULT_FUSION,
    DEFAULT_READER,
    METHODS,
    PROJECTIONS,
    ExtractConfig,
    Toml,
    TrainConfig,
    default_cache_dir,
    read_toml,
)
from kr2cache.console import console, to_stderr
from kr2cache.defaults import OPTIONS, choose_resource, choose_task
from kr2cache.errors import ConfigError, KR2CacheError
from kr2cache.models import known_models

# typer carries click inside; its usage errors are reached through the one class it shows.
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="kr2cache",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a frozen language model once, keep every layer of its hidden states, and train readers on them.\n\n"
    "[bold]kr2cache extract[/] makes a cache, [bold]kr2cache train[/] uses it for every fusion and seed; "
    "[bold]kr2cache demo[/] shows both in a few minutes. Options that are not given come from kr2cache.toml.",
)


def _model_names() -> list[str]:
    with contextlib.suppress(KR2CacheError):
        return list(known_models(read_toml(Path.cwd(), OPTIONS).models))
    return []


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document; people's output goes to standard error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Task = Annotated[
    str | None,
    typer.Option(help="udpos-LANG, or udpos with --data (kr2cache tasks). Default: of the resource's language."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with train.conllu, dev.conllu, ... or a hub data set id. Default: the task's own on the hub."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first N examples of each split.", show_default="all")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto")]
CacheDir = Annotated[Path | None, typer.Option(help="Where caches are.", show_default="$KR2CACHE_DIR, else .kr2cache")]


@app.command("extract")
def extract_cli(
    resource: Annotated[
        str | None,
        typer.Option(help="The frozen model: a name (kr2cache models), hub id or folder.", autocompletion=_model_names),
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
    given = _merge(
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
    from kr2cache.tasks import find_task, split_name

    given["split"] = split_name(given.get("split", "train"))
    where = given.get("cache_dir", default_cache_dir())
    if "resource" not in given:
        raise ConfigError(
            "Which resource?", f"Give --resource: {', '.join(known_models(toml.models))}, a hub id or a folder."
        )
    if "task" not in given:
        given["task"] = choose_task(given["resource"], where, toml.models)
    find_task(given["task"])
    config = ExtractConfig(**given, models=toml.models)

    from kr2cache.extract import describe, describe_result, extract, plan_extraction

    plan = plan_extraction(config)
    describe(plan)
    if dry_run:
        _show_dry_run(plan, as_json)
        return
    result = extract(plan)
    describe_result(result)
    if as_json:
        _print_json(result.json())


def _show_dry_run(plan: Any, as_json: bool) -> None:
    from rich.table import Table

    from kr2cache.console import bytes_text
    from kr2cache.extract import free_bytes

    choices = plan.bytes_by_choice()
    if as_json:
        _print_json(
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
    table = Table(title="On disk it would take (nothing was written)", title_justify="left")
    table.add_column("dtype")
    for name in next(iter(choices.values())):
        table.add_column("all layers" if name == "all" else name, justify="right")
    for name, sizes in choices.items():
        table.add_row(name, *(bytes_text(size) for size in sizes.values()))
    console.print(table)


@app.command("train")
def train_cli(
    reader: Annotated[
        str | None,
        typer.Option(
            help="The model that is trained: a name, hub id or folder.",
            autocompletion=_model_names,
            show_default=DEFAULT_READER,
        ),
    ] = None,
    resource: Annotated[
        str | None,
        typer.Option(
            help="The frozen model whose states it reads. Default: the one the cache holds.",
            autocompletion=_model_names,
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
            "frozen copy as resource).",
            show_default=METHODS[0],
        ),
    ] = None,
    projection: Annotated[
        str | None, typer.Option(help="From h2 to h1: auto, none, mlp, direct.", show_default=PROJECTIONS[0])
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One run each.", show_default="1,2,3")] = None,
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
    limit: Limit = None,
    device: Device = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where runs go.", show_default="runs")] = None,
    cache_dir: CacheDir = None,
    no_extract: Annotated[
        bool, typer.Option("--no-extract", help="Fail where a cache is missing; do not make it.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """[bold]Stage two[/]: train readers on cached states, one run a seed.

    Caches that are missing are made first. A run that is there already is shown, not trained again.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    given = _merge(
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
        limit=limit,
        device=device,
        run_dir=run_dir,
        cache_dir=cache_dir,
    )
    for name in ("dtype", "compute_dtype"):
        if name in toml.defaults:
            given[name] = toml.defaults[name]
    if "max_length" in toml.defaults:  # of both stages, then
        given.setdefault("resource_max_length", toml.defaults["max_length"])
    if "seeds" in given:
        given["seeds"] = _seeds(given["seeds"])
    where = given.get("cache_dir", default_cache_dir())
    if "resource" not in given:
        try:
            given["resource"] = choose_resource(where, given.get("task"), toml.models)
        except ConfigError:
            if given.get("method", METHODS[0]) in ("kr2", "kresource"):
                raise
    if "task" not in given:
        given["task"] = choose_task(given.get("resource"), where, toml.models)
    config = TrainConfig(**given, extract=not no_extract, models=toml.models, training=toml.training)

    from kr2cache.pipeline import describe_training, train

    result = train(config)
    describe_training(result)
    if as_json:
        _print_json(result.json())


@app.command("models")
def models_cli(as_json: Json = False, debug: Debug = False) -> None:
    """The models that have a name, and which are on this machine."""
    from rich.table import Table

    from kr2cache.models import local_folder

    specs = known_models(read_toml(Path.cwd(), OPTIONS).models)
    folders = {name: local_folder(spec) for name, spec in specs.items()}
    if as_json:
        _print_json(
            [
                {
                    "name": name,
                    "hub_id": spec.hub_id,
                    "language": spec.language,
                    "folder": str(folders[name]) if folders[name] else None,
                    "needs": spec.needs,
                }
                for name, spec in specs.items()
            ]
        )
        return
    table = Table(title="Models with a name (a hub id or a folder serves as well)", title_justify="left")
    for column in ("name", "language", "hub id", "on this machine"):
        table.add_column(column)
    for name, spec in specs.items():
        missing = f"no; {spec.path} has no config.json" if spec.path else "no"
        table.add_row(
            name,
            spec.language or "many",
            spec.hub_id or "-",
            f"[green]yes[/] {folders[name]}" if folders[name] else missing,
        )
    console.print(table)
    for name, spec in specs.items():
        if spec.needs and folders[name] is None:
            console.print(f"{name} needs {spec.needs}.", soft_wrap=True)


@app.command("tasks")
def tasks_cli(as_json: Json = False, debug: Debug = False) -> None:
    """The tasks there are, and where their data comes from."""
    from rich.table import Table

    from kr2cache.tasks import find_task, task_names
    from kr2cache.tasks.udpos import LANGUAGES

    if as_json:
        tasks = [find_task(name) for name in task_names()]
        _print_json(
            [
                {"name": t.name, "head": t.head, "metric": t.metric, "labels": t.labels, "data": t.default_data}
                for t in tasks
            ]
        )
        return
    table = Table(title="Tasks", title_justify="left")
    for column in ("name", "what", "metric", "data"):
        table.add_column(column)
    table.add_row(
        "udpos-LANG", "part-of-speech tagging", "seqeval F1, word accuracy", "google/xtreme, or CoNLL-U files"
    )
    table.add_row("udpos", "the same, any language", "seqeval F1, word accuracy", "CoNLL-U files in --data")
    console.print(table)
    console.print(f"LANG: {', '.join(f'{code} ({name})' for code, name in sorted(LANGUAGES.items()))}")


@app.command("demo")
def demo_cli(
    folder: Annotated[Path, typer.Option(help="Where its models, caches and runs go.")] = Path("kr2cache-demo"),
    device: Device = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Both stages on a small corpus of our own and a real model: extract once, train eight readers, print the table."""
    from kr2cache.demo import demo

    result = demo(folder, device or "auto")
    if as_json:
        _print_json(result)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _merge(toml: Toml, **given: Any) -> dict[str, Any]:
    """What was given on the command line, over ``[defaults]``; what neither gives is left out."""
    values = {name: toml.defaults[name] for name in given if name in toml.defaults}
    return values | {name: value for name, value in given.items() if value is not None}


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--seeds {text!r} is not a list of numbers.", "Give --seeds 1,2,3") from None


def _print_json(document: Any) -> None:
    if console.quiet:
        return
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _report(kind: str, message: str, remedy: str, as_json: bool) -> None:
    if as_json:
        _print_json({"error": {"type": kind, "message": message, "remedy": remedy}})
        return
    to_stderr()
    console.print(f"[bold red]{kind}:[/] ", end="")
    console.print(message, markup=False, soft_wrap=True)
    if remedy:
        console.print(remedy, markup=False, soft_wrap=True, style="cyan")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No advice from libraries between our lines; a user who wants it sets these variables."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    yield


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    console.stderr = as_json
    console.quiet = os.environ.get("RANK", "0") != "0"  # under torchrun the first process speaks for all
    try:
        with _quiet_libraries():
            code = app(args=arguments, prog_name="kr2cache", standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except UsageError as error:
        message = error.format_message() or str(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(message + "\n")
            return 2
        _report("UsageError", message, "kr2cache --help, or kr2cache COMMAND --help, lists what there is.", as_json)
        return 2
    except KR2CacheError as error:
        if debug:
            raise
        _report(type(error).__name__, error.message, error.remedy, as_json)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        _report("Interrupted", "Interrupted. What is complete is kept.", "Run the same command again.", as_json)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
        _report(type(error).__name__, message, "Check that folder (--cache-dir, --run-dir) and its rights.", as_json)
        return 1
    except Exception as error:
        if debug:
            raise
        _report(
            type(error).__name__,
            str(error) or "no message",
            "This failure was not foreseen: run the same command with --debug and report what it prints.",
            as_json,
        )
        return 1


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
