"""Importing PyTorch and transformers, which takes seconds."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from kr2cache.commands.failure import explain, report
from kr2cache.system.console import console, waiting
from kr2cache.system.interrupt import leaving_at_once


@contextlib.contextmanager
def loading(as_json: bool) -> Iterator[None]:
    """Show that PyTorch and transformers are being imported, so that the command does not seem to hang. Ctrl-C ends
    the process at once.

    Args:
        as_json: Whether an interrupt is reported as a JSON document.
    """
    if {"torch", "transformers"} <= set(sys.modules):
        yield
        return
    what = "Loading PyTorch and transformers"
    if not (sys.stderr.isatty() or console.is_terminal or console.quiet):
        sys.stderr.write(f"{what} ...\n")
        sys.stderr.flush()
    with waiting(what) as stop:

        def say() -> None:
            stop()
            report(explain(KeyboardInterrupt()), as_json)

        with leaving_at_once(say):
            yield
