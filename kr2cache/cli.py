"""The command line: the commands together, and what becomes of an error.

Standard output carries results; with ``--json`` one JSON document and nothing else. Exit codes: 0 done, 1 a failure
that was explained, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from kr2cache import __version__
from kr2cache.commands import cache
from kr2cache.commands.extract import extract_cli
from kr2cache.commands.listing import bench_cli, demo_cli, models_cli, tasks_cli
from kr2cache.commands.options import App, print_json
from kr2cache.commands.predict import predict_cli
from kr2cache.commands.sweep import report_cli, sweep_cli
from kr2cache.commands.train import train_cli
from kr2cache.console import console, to_stderr
from kr2cache.errors import KR2CacheError, UsageError

# typer carries click inside; its usage errors are reached through the one class it shows.
WrongUsage: Any = typer.BadParameter.__bases__[0]

app = App(
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


def _report(kind: str, message: str, remedy: str, as_json: bool) -> None:
    if as_json:
        try:
            print_json({"error": {"type": kind, "message": message, "remedy": remedy}})
            return
        except OSError:  # standard output itself is what failed
            _forget_stdout()
    to_stderr()
    console.print(f"[bold red]{kind}:[/] ", end="")
    console.print(message, markup=False, soft_wrap=True)
    if remedy:
        console.print(remedy, markup=False, soft_wrap=True, style="cyan")


def _forget_stdout() -> None:
    """Nobody can read it any more: what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    except WrongUsage as error:
        message = error.format_message() or str(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(message + "\n")
            return 2
        _report(
            UsageError.__name__, message, "kr2cache --help, or kr2cache COMMAND --help, lists what there is.", as_json
        )
        return 2
    except KR2CacheError as error:
        if debug:
            raise
        _report(type(error).__name__, error.message, error.remedy, as_json)
        return 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, typer.Abort):
        _report("Interrupted", "Interrupted. What is complete is kept.", "Run the same command again.", as_json)
        return 1
    except BrokenPipeError:
        _forget_stdout()
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
    finally:
        console.stderr = False


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
