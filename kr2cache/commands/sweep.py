"""``kr2cache sweep`` and ``kr2cache report``: many trainings, and the tables they fill."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from kr2cache.commands.defaults import OPTIONS, TRAIN_OPTIONS
from kr2cache.commands.loading import loading
from kr2cache.commands.options import CacheDir, Debug, Device, Json, RunDir, Seeds, checked, merge, print_json
from kr2cache.config import TrainConfig, read_toml
from kr2cache.experiment.cells import cells_of
from kr2cache.experiment.grid import Line, read_grid


def sweep_cli(
    grid: Annotated[Path, typer.Argument(help="A TOML grid, such as those in pipelines/.", metavar="FILE")],
    seeds: Seeds = None,
    epochs: Annotated[float | None, typer.Option(show_default="the grid's")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first N examples of each split.", show_default="the grid's")
    ] = None,
    device: Device = None,
    run_dir: RunDir = None,
    cache_dir: CacheDir = None,
    keep_readers: Annotated[
        bool, typer.Option("--keep-readers", help="Keep the trained readers, not their predictions alone.")
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Train the other cells where some lack data or models, instead of stopping."),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every cell of a table: methods, fusions, tasks, pairs of models, seeds.

    All cells are checked first; if some cannot run, nothing is trained. What is done is skipped, so the same command
    goes on after an interruption. A cell that fails while it runs is reported at the end, and the others go on.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    given = merge(toml, seeds=seeds, epochs=epochs, limit=limit, device=device, run_dir=run_dir, cache_dir=cache_dir)
    defaults = {name.replace("-", "_") for name in TRAIN_OPTIONS}
    table = read_grid(grid, TRAIN_OPTIONS)
    asked = {"seeds": seeds, "epochs": epochs, "limit": limit}
    above = {name: value for name, value in asked.items() if value is not None}
    above |= {name: given[name] for name in ("device", "run_dir", "cache_dir") if name in given}

    def cell_config(row: Line, column: Line) -> TrainConfig:
        return table.config(
            row,
            column,
            below={name: value for name, value in toml.defaults.items() if name in defaults},
            above=above,
            overrides=toml.models,
            training=toml.training,
        )

    cells = cells_of(table, cell_config)
    with loading(as_json):
        from kr2cache.experiment.sweep import Sweep, describe_sweep

    result = Sweep(table, cells, keep_readers=keep_readers).run(keep_going=keep_going)
    describe_sweep(result)
    from kr2cache.report import describe, report

    if any(cell.folder is not None for cell in result.cells):
        # What failed was just said, with its remedy.
        describe(dataclasses.replace(report(result.run_dir, None), failures=[]))
    if as_json:
        print_json(result.json())
    if result.failed:
        raise typer.Exit(1)


def report_cli(
    run_dir: Annotated[
        Path | None, typer.Argument(help="Where trainings left their runs.", show_default="runs", callback=checked)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Gets report.html, Markdown, LaTeX and CSV.", show_default="RUN_DIR/report", callback=checked
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tables and plots of what was run, beside the paper's numbers where it has them.

    A difference is marked where it could be noise (≈), and where there is no verdict (?): paired tests over examples
    and over seeds, corrected for the number of comparisons.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    from kr2cache.report import describe, report

    made = report(run_dir or merge(toml, run_dir=None).get("run_dir", TrainConfig.run_dir), out)
    describe(made)
    if as_json:
        print_json(made.json())
