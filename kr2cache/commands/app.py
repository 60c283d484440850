"""All commands, by name."""

from __future__ import annotations

from typing import Annotated

import typer

from kr2cache.commands import cache
from kr2cache.commands.extract import extract_cli
from kr2cache.commands.listing import bench_cli, demo_cli, models_cli
from kr2cache.commands.options import App
from kr2cache.commands.predict import predict_cli
from kr2cache.commands.sweep import report_cli, sweep_cli
from kr2cache.commands.tasks import tasks_cli
from kr2cache.commands.train import train_cli
from kr2cache.version import __version__

app = App(
    name="kr2cache",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a frozen language model once, keep every layer of its hidden states, and train readers on them.\n\n"
    "[bold]kr2cache extract[/] makes a cache, and [bold]kr2cache train[/] uses it for every fusion and seed. "
    "[bold]kr2cache demo[/] shows both in a few minutes. The file kr2cache.toml gives defaults for options.",
)

app.command("extract")(extract_cli)
app.command("train")(train_cli)
app.command("sweep")(sweep_cli)
app.command("report")(report_cli)
app.command("predict")(predict_cli)
app.add_typer(cache.app, name="cache")
app.command("models")(models_cli)
app.command("tasks")(tasks_cli)
app.command("bench")(bench_cli)
app.command("demo")(demo_cli)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
