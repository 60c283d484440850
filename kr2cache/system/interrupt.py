"""Handle Ctrl-C at a place where it does no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_pressed = threading.Event()
_askers: list[Callable[[], bool]] = []


def listen() -> None:
    """From now on, remember that Ctrl-C was pressed, and raise KeyboardInterrupt as before."""

    def remember(signum: int, frame: object) -> None:
        _pressed.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)


@contextlib.contextmanager
def leaving_at_once(say: Callable[[], None]) -> Iterator[None]:
    """Inside the block, Ctrl-C ends the process without cleaning up.

    For imports of extension modules: C++ code may abort ("terminate called") when KeyboardInterrupt passes through it.

    Args:
        say: Called before the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        try:
            say()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(128 + signal.SIGINT)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def was_pressed() -> bool:
    """Whether Ctrl-C was pressed since ``listen``. Then it is the cause of any error that followed."""
    return _pressed.is_set()


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
    """Yields a function to call after each batch; it raises KeyboardInterrupt if Ctrl-C was pressed.

    At any other place, the exception could be raised inside a library. If the library ignores it, the work continues;
    if the library holds a lock, the command hangs. A second Ctrl-C raises the exception at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = False

    def remember(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt
        check_asked()

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
