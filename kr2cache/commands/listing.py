"""``kr2cache models``, ``tasks``, ``demo`` and ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache.commands.loading import loading
from kr2cache.commands.options import Device, Json, Limit, checked, print_json
from kr2cache.commands.settings import OPTIONS
from kr2cache.config import read_toml
from kr2cache.models.files import check_obtainable
from kr2cache.models.registry import control, find_model, known_models
from kr2cache.system.console import console
from kr2cache.system.device import check_device_name
from kr2cache.system.disk import check_writable
from kr2cache.tasks import find_task


def models_cli(as_json: Json = False) -> None:
    """List the registered models, and which of them are on this machine."""
    from rich.text import Text

    from kr2cache.models.files import fault_of, local_folder
    from kr2cache.system.terminal import Column, print_table

    specs = known_models(read_toml(Path.cwd(), OPTIONS).models)
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


def tasks_cli(as_json: Json = False) -> None:
    """List the tasks, and where their data comes from."""
    from kr2cache.system.terminal import Column, print_table
    from kr2cache.tasks import task_names
    from kr2cache.tasks.udpos import LANGUAGES

    tasks = [find_task(name) for name in task_names()]
    if as_json:
        print_json(
            [
                {"name": t.name, "head": t.head, "metric": t.metric, "labels": t.labels, "data": t.default_data}
                for t in tasks
            ]
        )
        return
    columns = (
        Column("name"),
        Column("what", breaks=" ", rank=1),
        Column("metric", breaks=" ", rank=3),
        Column("hub data set", breaks="/", rank=2),
        Column("or --data with", rank=4),
    )
    f1 = "XTREME's F1, word accuracy"
    rows = [["udpos-LANG", "part-of-speech tagging", f1, "google/xtreme", "train.conllu, ..."]]
    for task in tasks:
        if not task.name.startswith("udpos-"):
            metric = f1 if task.words else task.metric
            rows.append([task.name, task.about, metric, task.default_data or "-", f"train{task.suffixes[0]}, ..."])
    print_table("Tasks", columns, rows)
    console.print(f"LANG: {', '.join(f'{code} ({name})' for code, name in sorted(LANGUAGES.items()))}")


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
