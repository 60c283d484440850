"""``kr2cache models``, ``demo`` and ``bench``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kr2cache.commands.defaults import merge
from kr2cache.commands.loading import loading
from kr2cache.commands.options import Device, Json, Limit, WeightsDtype, checked, model_names, print_json
from kr2cache.commands.settings import OPTIONS
from kr2cache.config import COMPUTE_DTYPES, DEFAULT_WEIGHTS_DTYPE
from kr2cache.errors import ConfigError, unknown_name
from kr2cache.models.files import check_here, check_obtainable
from kr2cache.models.registry import ModelSpec, control, find_model, known_models
from kr2cache.system.console import bytes_text, console
from kr2cache.system.device import check_device_name
from kr2cache.system.disk import check_writable
from kr2cache.tasks import find_task
from kr2cache.toml import read_toml

if TYPE_CHECKING:
    from kr2cache.experiment.suitability import Suitability


def models_cli(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A model: a name, a hub id or a folder.",
            show_default="list the registered models",
            autocompletion=model_names,
        ),
    ] = None,
    weights_dtype: WeightsDtype = None,
    as_json: Json = False,
) -> None:
    """List the registered models, and which of them are on this machine.

    With NAME: say of one model what it can serve as and why not, and its layers, width, positions and bytes per token.

    The model is loaded and tried on two short texts. If memory is too small for it, it is not tried.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    if model is None:
        if weights_dtype is not None:
            raise ConfigError("--weights-dtype is for one model.", "Name it: kr2cache models NAME --weights-dtype ...")
        _registered_models(known_models(toml.models), as_json)
        return
    dtype = merge(toml, weights_dtype=weights_dtype).get("weights_dtype", DEFAULT_WEIGHTS_DTYPE)
    if dtype not in COMPUTE_DTYPES:
        raise unknown_name("weights dtype", dtype, COMPUTE_DTYPES)
    _one_model(find_model(model, toml.models), dtype, as_json)


def _registered_models(specs: Mapping[str, ModelSpec], as_json: bool) -> None:
    """Show the models by name, and which of them are on this machine."""
    from rich.text import Text

    from kr2cache.models.files import fault_of, local_folder
    from kr2cache.system.terminal import Column, print_table

    there = {name: local_folder(spec) for name, spec in specs.items()}
    faults = {name: fault_of(specs[name], folder) for name, folder in there.items() if folder is not None}
    folders = {name: folder for name, folder in there.items() if faults.get(name) is None}
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "hub_id": spec.hub_id,
                    "language": spec.language,
                    "folder": str(folders[name]) if folders.get(name) else None,
                    "fault": " ".join(wrong) if (wrong := faults.get(name)) else None,
                    "needs": spec.needs,
                    **control(spec),
                }
                for name, spec in specs.items()
            ]
        )
        return
    columns = (
        Column("name"),
        Column("language", rank=2),
        Column("hub id", breaks="/", rank=1),
        Column("here"),
        Column("folder", breaks="/", rank=3),
    )
    rows: list[list[str | Text]] = []
    for name, spec in specs.items():
        folder, wrong = folders.get(name), faults.get(name)
        missing = wrong[0] if wrong else f"{spec.path} has no config.json" if spec.path else ""
        here = Text("yes", style="green") if folder else Text("no")
        rows.append([spec.label, spec.language or "many", spec.hub_id or "-", here, str(folder) if folder else missing])
    print_table("Registered models (a hub id or a folder is accepted too)", columns, rows)
    for name, spec in specs.items():
        if wrong := faults.get(name):
            console.print(f"{name}: {wrong[1]}", markup=False, soft_wrap=True)
        elif spec.needs and folders.get(name) is None:
            console.print(f"{name} needs {spec.needs}.", markup=False, soft_wrap=True)


HEAD_NAMES = {"token": "tagging", "sequence": "classification", "choice": "multiple choice"}


def _one_model(spec: ModelSpec, weights_dtype: str, as_json: bool) -> None:
    """Show what a model can serve as."""
    from rich.text import Text

    from kr2cache.system.terminal import Column, print_table

    check_here(spec)
    with loading(as_json):
        from kr2cache.experiment.suitability import ROLES, reasons, suitability

    found = suitability(spec, weights_dtype)
    if as_json:
        print_json(found.json())
        return
    _print_facts(found)
    console.print()
    words = {True: ("yes", "green"), False: ("no", "red"), None: ("not tried", "yellow")}
    able: dict[tuple[str, str], Text] = {(one.role, one.head): Text(*words[one.able]) for one in found.answers}
    rows: list[list[str | Text]] = [[role, *(able[role, head] for head in HEAD_NAMES)] for role in ROLES]
    print_table("Can serve as", [Column(text) for text in ("", *HEAD_NAMES.values())], rows)
    for (why, remedy), answers in reasons(found.answers).items():
        parts = {role: [HEAD_NAMES[one.head] for one in answers if one.role == role] for role in ROLES}
        where = "; ".join(
            role + ("" if len(heads) == len(HEAD_NAMES) else f" for {', '.join(heads)}")
            for role, heads in parts.items()
            if heads
        )
        end = "" if why.endswith((".", "!", "?")) else "."  # some reasons are another library's
        console.print(f"{where}: {why}{end} {remedy or ''}".rstrip(), markup=False, soft_wrap=True)


def _print_facts(found: Suitability) -> None:
    from rich.table import Table
    from rich.text import Text

    spec, tokenizer = found.spec, found.tokenizer
    sizes = [f"{name} {size:,}" for name, size in found.token_bytes.items()]
    aligned = "words are aligned with tokens" if tokenizer["aligns_words"] else "words cannot be aligned with tokens"
    kind = "" if tokenizer["fast"] else " (written in Python)"
    rows = {
        "model": f"{spec.label} ({found.architecture}){f', hub id {spec.hub_id}' if spec.hub_id else ''}",
        "folder": str(found.folder),
        "layers": f"{found.layers} of width {found.width}, the embedding output included"
        if sizes
        else "not in its configuration",
        "positions": f"{found.positions:,}" if found.positions else found.positions_fault or "no limit",
        "weights": f"{found.parameters:,} numbers: "
        + ", ".join(f"{bytes_text(size)} in {name}" for name, size in found.weight_bytes.items())
        if found.parameters is not None
        else "",
        "bytes per token": ", ".join(sizes) + " (all layers)" if sizes else "",
        "tokenizer": f"{tokenizer['class']}{kind}, {tokenizer['tokens']:,} tokens; {aligned}"
        if tokenizer["class"]
        else "cannot be used",
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for title, text in rows.items():
        table.add_row(Text(title, style="bold"), Text(text))
    console.print(table)


def demo_cli(
    folder: Annotated[Path, typer.Option(help="Where caches and runs go.", callback=checked)] = Path("kr2cache-demo"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show both stages with a real model and a small corpus: extract once, train eight readers, print the table."""
    check_device_name(device or "auto")
    check_writable(folder, "--folder")
    overrides = read_toml(Path.cwd(), OPTIONS).models
    for model in ("minilm", "minilm-3"):
        check_obtainable(find_model(model, overrides))
    with loading(as_json):
        from kr2cache.demo import demo

    result = demo(folder, device or "auto", overrides)
    if as_json:
        print_json(result)


def bench_cli(
    resource: Annotated[str, typer.Option(help="The frozen model.")] = "minilm",
    reader: Annotated[str, typer.Option(help="The model to train.")] = "minilm-3",
    data: Annotated[str | None, typer.Option(help="Data for stage one.", show_default="the demo's")] = None,
    task: Annotated[str, typer.Option(help="Task of that data.")] = "udpos",
    split: Annotated[str, typer.Option(help="Split of that data.")] = "test",
    limit: Limit = None,
    training_data: Annotated[
        str | None, typer.Option(help="A tagged corpus for the training steps.", show_default="the demo's")
    ] = None,
    device: Device = None,
    repeats: Annotated[
        int,
        typer.Option(help="How often the other programs run; kr2cache and its limits mostly run more often.", min=1),
    ] = 5,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="A folder on the disk to measure; its files are removed afterwards.",
            show_default="temporary",
            callback=checked,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the table as bars into this file: bench.svg, .png or .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine: extracting, reading and training, compared with limits and other programs."""
    overrides = read_toml(Path.cwd(), OPTIONS).models
    find_task(task)
    check_device_name(device or "auto")
    for model in (resource, reader):
        check_obtainable(find_model(model, overrides))
    with loading(as_json):
        from kr2cache.bench import BenchConfig, bench, describe_bench
        from kr2cache.bench.plot import check_plot
        from kr2cache.bench.plot import plot as draw
        from kr2cache.config import ExtractConfig, TrainConfig
        from kr2cache.demo import corpus

    if plot is not None:
        check_plot(plot)
    shared: dict[str, Any] = {"resource": resource, "device": device or "auto", "models": overrides}
    extraction = ExtractConfig(**shared, split=split, task=task, data=data or str(corpus()), limit=limit)
    training = TrainConfig(**shared, task="udpos", reader=reader, data=training_data or str(corpus()))
    result = bench(BenchConfig(extraction=extraction, training=training, repeats=repeats, folder=folder))
    describe_bench(result)
    if plot is not None:
        draw(result, plot)
        console.print(f"Plot: {plot}", markup=False, soft_wrap=True)
    if as_json:
        print_json(result)
