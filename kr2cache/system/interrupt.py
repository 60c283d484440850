"""Stop on Ctrl-C or SIGTERM at a place where it does no harm.

SIGTERM is how SLURM, Kubernetes and ``kill`` ask a process to end. Both signals raise KeyboardInterrupt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Block:
    """A part of the program in which a signal is only remembered."""

    def __init__(self, *, again: bool) -> None:
        """
        Args:
            again: Whether the same signal again raises KeyboardInterrupt at once.
        """
        self.again = again
        self.waiting: list[int] = []
        self.seen: set[int] = set()


_blocks: list[_Block] = []
"""The blocks in which the main thread is, the innermost last."""
_received: list[int] = []
"""The signals that raised KeyboardInterrupt since ``listen``."""
_listening: list[bool] = []
_askers: list[Callable[[], bool]] = []


def listen() -> None:
    """From now on, Ctrl-C and SIGTERM raise KeyboardInterrupt, and are remembered."""
    _blocks.clear()  # a forked process may have those of its parent
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    if not _listening:
        _listening.append(True)
        os.register_at_fork(after_in_child=_end_on_sigterm)
        sys.unraisablehook = _raised_again(sys.unraisablehook)


def _raised_again(before: Callable[[sys.UnraisableHookArgs], object]) -> Callable[[sys.UnraisableHookArgs], object]:
    """Python drops an exception that is raised in a destructor, and prints it. If it is KeyboardInterrupt, its signal
    comes again a moment later, when the destructor is done.
    """

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not (_received and issubclass(dropped.exc_type, KeyboardInterrupt)):
            before(dropped)
            return
        again = threading.Timer(0.01, os.kill, (os.getpid(), _received[-1]))
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # the interpreter ends: it starts no thread any more
            again.start()

    return hook


def _end_on_sigterm() -> None:
    """In a forked process: libraries end their helper processes with SIGTERM."""
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ignore() -> None:
    """From now on, the signals have no effect: all work is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _blocks or (_blocks[-1].again and any(number in block.seen for block in _blocks)):
        _interrupt(number)
    _remember(number)


def _remember(number: int) -> None:
    _blocks[-1].seen.add(number)
    _blocks[-1].waiting.append(number)


def _interrupt(number: int) -> NoReturn:
    if _listening:
        _received.append(number)
    raise KeyboardInterrupt


def exit_code() -> int:
    """The exit code of a command that was interrupted, as in shells: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def signal_name() -> str:
    """What interrupted this process: ``Ctrl-C`` or ``SIGTERM``."""
    return "SIGTERM" if signal.SIGTERM in _received[:1] else "Ctrl-C"


def cause() -> str:
    """Why the work stopped, as the beginning of a message."""
    return "Interrupted" if signal_name() == "Ctrl-C" else "Stopped by SIGTERM"


def was_pressed() -> bool:
    """Whether Ctrl-C or SIGTERM came since ``listen``. Then it is the cause of any error that followed."""
    return bool(_received)


@contextlib.contextmanager
def leaving_at_once(say: Callable[[], None]) -> Iterator[None]:
    """Inside the block, Ctrl-C and SIGTERM end the process without cleaning up.

    For imports of extension modules: C++ code may abort ("terminate called") when KeyboardInterrupt passes through it.

    Args:
        say: Called before the process ends.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        try:
            say()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(exit_code())

    if threading.current_thread() is threading.main_thread():
        with _handled_by(leave):
            yield
    else:
        yield


@contextlib.contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside the block, ``handle`` handles Ctrl-C; also SIGTERM if this process listens."""
    before = {number: signal.signal(number, handle) for number in (SIGNALS if _listening else SIGNALS[:1])}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """After the block, the handlers of both signals are those from before, whatever a library did."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Inside the block, signals wait. A process that is started in it gets them once it calls ``unblock``."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock() -> None:
    """Receive the signals that ``blocked`` kept from this process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def also_stopped_by(asked: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, ``interrupt_between_batches`` also stops if ``asked`` returns True, as for Ctrl-C. This is for
    a process to which its driver cannot send a signal.
    """
    _askers.append(asked)
    try:
        yield
    finally:
        _askers.remove(asked)


def check_asked() -> None:
    """Raise KeyboardInterrupt if a driver that cannot send a signal asked this process to stop."""
    if any(asked() for asked in _askers):
        raise KeyboardInterrupt


@contextlib.contextmanager
def interrupt_between_batches() -> Iterator[Callable[[], None]]:
    """Yields a function to call after each batch; it raises KeyboardInterrupt if Ctrl-C was pressed or SIGTERM came. So
    does the end of the block.

    At any other place, the exception could be raised inside a library. If the library ignores it, the work continues;
    if the library holds a lock, the command hangs. The same signal again raises the exception at once. If a library
    ignored one that was raised before the block, the block does not begin.
    """
    if _received:  # even copyreg of Python has an ``except:``, and loading a model uses it
        raise KeyboardInterrupt
    with _remembered(again=True) as block:

        def check() -> None:
            if block.waiting:
                number = block.waiting[0]
                block.waiting.clear()
                _interrupt(number)
            check_asked()

        yield check


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside the block, Ctrl-C and SIGTERM are only remembered. The end of the block raises KeyboardInterrupt. This is
    for a few steps that belong together.
    """
    with _remembered(again=False):
        yield


@contextlib.contextmanager
def _remembered(*, again: bool) -> Iterator[_Block]:
    block = _Block(again=again)
    if threading.current_thread() is not threading.main_thread():
        yield block
        return
    with contextlib.nullcontext() if _blocks or _listening else _handled_by(_on_signal):
        _blocks.append(block)
        try:
            yield block
        finally:
            _blocks.remove(block)
            for number in block.waiting:  # to the block around this one, if there is one
                _on_signal(number, None)
