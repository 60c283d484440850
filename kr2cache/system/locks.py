"""Folders to write to: checks that they are writable, and locks that allow one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kr2cache.errors import BusyError, ConfigError
from kr2cache.system.console import note, seconds_text

PATIENCE_S = 0.5
"""Seconds before the user is told that the process waits."""


def check_writable(folder: Path, option: str) -> None:
    """Raise ``ConfigError`` if ``folder`` cannot be made or written to. Leaves no file behind."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option} {folder}: {there} is a file.", "Give a folder.")
    try:  # permissions are not enough: root has them in /proc too
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # a full disk has its own error, and repair in place needs no space
        reason = error.strerror or str(error)
        raise ConfigError(f"{option} {folder}: {there} is not writable ({reason}).", "Give another folder.") from None


@contextlib.contextmanager
def only_writer(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock ``FOLDER.lock`` beside the folder. Links to the folder lead to the same lock. The operating system
    releases the lock of a dead process.

    Args:
        wait: Whether to wait for another process that holds the lock.

    Raises:
        BusyError: If another process holds the lock and ``wait`` is False.
    """
    place = folder.resolve()
    path = place.with_name(place.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        held = f"{folder} is being written by {_holder(path)}"
        if not wait:
            raise BusyError(f"{held}.", "Wait until it is done, or stop it.") from None
        note(f"{held}; waiting for it.")
        lock.acquire()
    try:
        _sign(path)
        yield
    finally:
        path.unlink(missing_ok=True)  # filelock notices if a waiting process holds a removed file
        lock.release()


def _sign(path: Path) -> None:
    """Write into the lock file who holds it, over the entry of an earlier holder."""
    user = "?"
    with contextlib.suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    signature = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "user": user,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }
    with contextlib.suppress(OSError):  # for messages only
        path.write_text(json.dumps(signature), encoding="utf-8")


def _holder(path: Path) -> str:
    """``process 4711 of ada on node7 since 14:02:11 UTC (3 min 10 s): kr2cache extract ...``"""
    try:
        signature = json.loads(path.read_text(encoding="utf-8"))
        since = datetime.fromisoformat(signature["since"])
        ago = seconds_text(max(0.0, (datetime.now(UTC) - since).total_seconds()))
        return (
            f"process {int(signature['pid'])} of {signature['user']} on {signature['host']} since "
            f"{since:%Y-%m-%d %H:%M:%S} UTC ({ago} ago; {signature['command']})"
        )
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
