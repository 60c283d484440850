"""Python programs that start at once: forks of the tests' process, which has imported torch and transformers already.

A new interpreter imports them for two to three seconds. ``ForkedPython`` takes the place of ``subprocess.Popen``. Of
``python -m MODULE ...`` and ``python -c CODE ...`` it makes a fork that runs the same module or code as ``__main__``,
with the same arguments, pipes, folder, environment, session and signals. What a test has patched is patched there too.
Other commands start as always.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

_CALL = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_OPTIONS = {"-P": 1, "-X": 2}
"""Options of the interpreter that may come before the program, and how many words each is."""


class ForkedPython(subprocess.Popen[Any]):
    """As ``subprocess.Popen``, but a Python program is a fork of this process."""

    def _execute_child(self, *arguments: Any) -> None:
        call = _CALL.bind(self, *arguments).arguments
        if isinstance(call["args"], str) or call["args"][0] != sys.executable:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
            self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(call)
        self._child_created = True
        self._close_pipe_fds(*(call[name] for name in _PIPES))  # type: ignore[attr-defined]


def _be_the_child(call: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        _move_in(call)
        _run([str(word) for word in call["args"][1:]])
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _move_in(call: dict[str, Any]) -> None:
    """Take on what a new process would have."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = [os.dup(call[name]) if call[name] >= 0 else None for name in ("p2cread", "c2pwrite", "errwrite")]
    for number, file in enumerate(given):
        if file is not None:
            os.dup2(file, number)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):  # noqa: PTH208
        # Not closed: objects that the parent made would later close the number, whatever file has it then.
        if number > 2 and number not in call["pass_fds"]:
            with contextlib.suppress(OSError):  # the number that listed the others
                os.dup2(nothing, number)
    if call["start_new_session"]:
        os.setsid()
    if call["process_group"] is not None and call["process_group"] >= 0:
        os.setpgid(0, call["process_group"])
    if call["cwd"] is not None:
        os.chdir(call["cwd"])
    if call["env"] is not None:
        os.environ.clear()
        os.environ.update(call["env"])
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, open(number, mode, buffering=1, closefd=False))  # noqa: SIM115
    warnings.resetwarnings()  # tests make errors of them
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning, RuntimeWarning):
        warnings.simplefilter("ignore", kind)


def _run(words: list[str]) -> None:
    """Run a module or code as ``__main__``."""
    while words[0] in _OPTIONS:
        words = words[_OPTIONS[words[0]] :]
    kind, program, *arguments = words
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


def _leave(code: int) -> NoReturn:
    """End at once: what the tests' process would do at its end is not this process's to do."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if code == -signal.SIGINT:  # as an interpreter that nothing has caught it in
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os._exit(code)


def in_child(work: Callable[[], object]) -> int:
    """Do the work in a forked process, and return the number of this process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child
