"""How the command line reports an error: text for people or one JSON document, and an exit code."""

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

TYPER_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]
"""The base class of usage errors. typer contains its own click and exports only subclasses."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error explained, and the exit code."""

    kind: str
    message: str
    remedy: str
    code: int


def explain(error: BaseException) -> Failure:
    """Explain what went wrong and what to do."""
    # A library may turn Ctrl-C into its own error, most often while it is imported.
    if isinstance(error, KeyboardInterrupt | typer.Abort) or (
        interrupt.was_pressed() and not isinstance(error, KR2CacheError)
    ):
        error = InterruptedWorkError(f"{interrupt.cause()}. Complete work is kept.", "Run the same command again.")
    code = 1
    if isinstance(error, KR2CacheError):
        message, remedy = error.message, error.remedy
        code = {InterruptedWorkError: interrupt.exit_code(), UsageError: 2}.get(type(error), 1)
    elif isinstance(error, TYPER_USAGE_ERROR):
        message = error.format_message() or str(error)
        remedy = "kr2cache --help lists the commands, kr2cache COMMAND --help its options."
        return Failure(kind=UsageError.__name__, message=message, remedy=remedy, code=2)
    elif isinstance(error, RuntimeError) and _is_out_of_memory(error):
        message = f"Memory ran out: {str(error).splitlines()[0]}"
        remedy = "Free the device's memory (nvidia-smi shows who uses it), or give --device cpu."
        return Failure(kind=DeviceMemoryError.__name__, message=message, remedy=remedy, code=1)
    elif isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{where}"
        remedy = "Check the path, its permissions and its disk."
    else:
        message = str(error) or "no message"
        remedy = "This error was not expected: run the same command with --debug and report what it prints."
    return Failure(kind=type(error).__name__, message=message, remedy=remedy, code=code)


def _is_out_of_memory(error: RuntimeError) -> bool:
    if "torch" not in sys.modules:  # then the error is not from torch; importing torch would take seconds
        return False
    from kr2cache.system.device import is_out_of_memory

    return is_out_of_memory(error)


def report(failure: Failure, as_json: bool) -> None:
    """Print a failure: one JSON document on standard output, or text on standard error."""
    if as_json:
        try:
            print_json({"error": {"type": failure.kind, "message": failure.message, "remedy": failure.remedy}})
            return
        except OSError:  # writing to standard output is what failed
            forget_stdout()
    to_stderr()
    try:
        if failure.kind != InterruptedWorkError.__name__:  # its message already says so
            console.print(f"[bold red]{failure.kind}:[/] ", end="")
        console.print(failure.message, markup=False, soft_wrap=True)
        if failure.remedy:
            console.print(failure.remedy, markup=False, soft_wrap=True, style="cyan")
    finally:
        console.stderr = False


def forget_stdout() -> None:
    """Discard what is not flushed yet: nobody reads standard output any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
