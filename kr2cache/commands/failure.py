"""What becomes of an error on the command line: words for people or one JSON document, and an exit code."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import typer

from kr2cache.commands.options import print_json
from kr2cache.errors import DeviceMemoryError, InterruptedWorkError, KR2CacheError, UsageError
from kr2cache.system import interrupt
from kr2cache.system.console import console, to_stderr

INTERRUPTED = 130
"""128 + the number of SIGINT, as shells say it."""
TYPER_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""typer carries click inside; its usage errors are reached through the one class it shows."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error in words, and the exit code."""

    kind: str
    message: str
    remedy: str
    code: int


def explain(error: BaseException) -> Failure:
    """Say what went wrong, and what to do."""
    # A library may turn Ctrl-C into an error of its own, most of all while it is imported.
    if isinstance(error, KeyboardInterrupt | typer.Abort) or (
        interrupt.was_pressed() and not isinstance(error, KR2CacheError)
    ):
        error = InterruptedWorkError("Interrupted. What is complete is kept.", "Run the same command again.")
    code = 1
    if isinstance(error, KR2CacheError):
        message, remedy = error.message, error.remedy
        code = {InterruptedWorkError: INTERRUPTED, UsageError: 2}.get(type(error), 1)
    elif isinstance(error, TYPER_USAGE_ERROR):
        message = error.format_message() or str(error)
        remedy = "kr2cache --help, or kr2cache COMMAND --help, lists what there is."
        return Failure(kind=UsageError.__name__, message=message, remedy=remedy, code=2)
    elif isinstance(error, RuntimeError) and _is_out_of_memory(error):
        message = f"Memory ran out: {str(error).splitlines()[0]}"
        remedy = "Free the device's memory (nvidia-smi shows who has it), or give --device cpu."
        return Failure(kind=DeviceMemoryError.__name__, message=message, remedy=remedy, code=1)
    elif isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
        remedy = "Check the path, its rights and the disk it is on."
    else:
        message = str(error) or "no message"
        remedy = "This failure was not foreseen: run the same command with --debug and report what it prints."
    return Failure(kind=type(error).__name__, message=message, remedy=remedy, code=code)


def _is_out_of_memory(error: RuntimeError) -> bool:
    if "torch" not in sys.modules:  # then it cannot be torch's, and importing it takes seconds
        return False
    from kr2cache.system.device import is_out_of_memory

    return is_out_of_memory(error)


def report(failure: Failure, as_json: bool) -> None:
    """Print a failure: one JSON document on standard output, or words on standard error."""
    if as_json:
        try:
            print_json({"error": {"type": failure.kind, "message": failure.message, "remedy": failure.remedy}})
            return
        except OSError:  # standard output itself is what failed
            forget_stdout()
    to_stderr()
    try:
        if failure.code != INTERRUPTED:  # whose message says so itself
            console.print(f"[bold red]{failure.kind}:[/] ", end="")
        console.print(failure.message, markup=False, soft_wrap=True)
        if failure.remedy:
            console.print(failure.remedy, markup=False, soft_wrap=True, style="cyan")
    finally:
        console.stderr = False


def forget_stdout() -> None:
    """Nobody can read it any more: what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
