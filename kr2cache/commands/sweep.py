"""``kr2cache sweep`` and ``kr2cache report``: many trainings, and their tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache.commands.defaults import merge
from kr2cache.commands.loading import loading
from kr2cache.commands.options import Json, checked, option, print_json, takes
from kr2cache.commands.settings import EXTRACT, OPTIONS, SWEEP, TRAIN_OPTIONS
from kr2cache.config import ExtractConfig, SweepWorkers, TrainConfig
from kr2cache.experiment.cells import cells_of
from kr2cache.experiment.grid import Line, read_grid
from kr2cache.toml import read_toml


@takes(TrainConfig, SWEEP)
def sweep_cli(
    typed: dict[str, Any],
    grid: Annotated[Path, typer.Argument(help="A TOML grid, such as those in pipelines/.", metavar="FILE")],
    keep_readers: Annotated[
        bool, typer.Option("--keep-readers", help="Keep the trained readers, not only their predictions.")
    ] = False,
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="If some cells lack data or models, train the others instead of stopping."),
    ] = False,
    workers: Annotated[int | None, option(ExtractConfig, "workers", EXTRACT["workers"])] = None,
    engine: Annotated[str | None, option(ExtractConfig, "engine", EXTRACT["engine"])] = None,
    gpus_per_worker: Annotated[
        float | None, option(ExtractConfig, "gpus_per_worker", EXTRACT["gpus_per_worker"])
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every cell of a table: methods, fusions, tasks, pairs of models, seeds.

    All cells are checked first. If some cannot run, nothing is trained.
    Finished runs are skipped: the same command continues a stopped sweep.
    If a cell fails while it runs, the others go on; it is reported at the end.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    given = merge(toml, **typed)
    # The grid wins over [defaults] where it decides results; the command line wins over the grid.
    overrides = {name: value for name, value in typed.items() if value is not None}
    overrides |= {name: given[name] for name in ("device", "run_dir", "cache_dir") if name in given}
    defaults = {name: value for name, value in toml.defaults.items() if name.replace("_", "-") in TRAIN_OPTIONS}
    table = read_grid(grid, TRAIN_OPTIONS)

    def cell_config(row: Line, column: Line) -> TrainConfig:
        return table.config(
            row,
            column,
            defaults=defaults,
            overrides=overrides,
            models=toml.models,
            tasks=toml.tasks,
            training=toml.training,
        )

    cells = cells_of(table, cell_config)
    crew = SweepWorkers(**merge(toml, workers=workers, engine=engine, gpus_per_worker=gpus_per_worker))
    with loading(as_json):
        from kr2cache.experiment.sweep import Sweep, describe_sweep
        from kr2cache.experiment.sweep_together import sweep_with_workers

    sweep = Sweep(table, cells, keep_readers=keep_readers)
    if crew == SweepWorkers():
        result = sweep.run(keep_going=keep_going)
    else:
        result = sweep_with_workers(sweep, crew, keep_going=keep_going)
    describe_sweep(result)
    from kr2cache.report import describe, report

    if any(cell.folder is not None for cell in result.cells):
        # describe_sweep has named the failures and their remedies.
        describe(dataclasses.replace(report(result.run_dir, None), failures=[]))
    if as_json:
        print_json(result.json())
    if result.failed:
        raise typer.Exit(1)


def report_cli(
    run_dir: Annotated[
        Path | None,
        typer.Argument(help="Where the runs are.", show_default="runs", metavar="RUN_DIR", callback=checked),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where report.html, Markdown, LaTeX and CSV go.", show_default="RUN_DIR/report", callback=checked
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make tables, tests and plots of all runs, beside the paper's numbers where it has them.

    ≈ marks a difference that could be noise. ? means that there is no verdict.
    Tests are paired, over examples and over seeds.
    They are corrected for the number of comparisons.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    from kr2cache.report import describe, report

    made = report(run_dir or merge(toml, run_dir=None).get("run_dir", TrainConfig.run_dir), out)
    describe(made)
    if as_json:
        print_json(made.json())
