"""The command line: where it starts and ends.

Standard output is for results; with ``--json`` it is one JSON document only. Exit codes: 0 done, 1 a failure
that was explained, 2 wrong usage, 130 interrupted by Ctrl-C, 143 stopped by SIGTERM. This module imports little, so
that Ctrl-C is explained early.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

CTRL_C = 128 + signal.SIGINT


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    as_json, debug = "--json" in arguments, "--debug" in arguments
    # Keep advice of libraries out of our output. A user who wants it sets these variables.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return _call(arguments, as_json)
    except BrokenPipeError:
        from kr2cache.commands import failure

        failure.forget_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        from kr2cache.commands import failure

        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            sys.stderr.write(f"{failure.explain(error).message}\n")
            return 2
        explained = failure.explain(error)
        if debug and explained.code == 1:
            raise
        failure.report(explained, as_json)
        return explained.code


def _call(arguments: list[str], as_json: bool) -> int:
    from kr2cache.commands.app import app
    from kr2cache.system.console import console

    console.stderr = as_json
    console.quiet = os.environ.get("RANK", "0") != "0"  # under torchrun only the first process prints
    try:
        code = app(args=arguments, prog_name="kr2cache", standalone_mode=False)
        sys.stdout.flush()
    finally:
        console.stderr = False
    if code == CTRL_C:  # how typer reports Ctrl-C
        raise KeyboardInterrupt
    return int(code or 0)


def main() -> None:
    """The console script."""
    code = CTRL_C
    with contextlib.suppress(KeyboardInterrupt):
        from kr2cache.system import interrupt

        interrupt.listen()
        try:
            from kr2cache.system import allocator, threads

            allocator.keep_free_memory()
            threads.bound_spinning()
            code = run(sys.argv[1:])
        except KeyboardInterrupt:  # before ``run`` could explain it, or while it explained another one
            code = interrupt.exit_code()
    # All work is done: from here on, the signals end the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    main()
