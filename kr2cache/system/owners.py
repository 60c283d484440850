"""Which process holds a claim, and whether that process has ended. Which process reads files."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import socket
import sys
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from kr2cache.system.console import seconds_text


@dataclass(frozen=True)
class Owner:
    """The process that holds a claim, as the file ``owner.json`` records it."""

    pid: int
    machine: str
    """Identifies the machine, its last boot and its PID namespace. ``pid`` can be compared only if these are equal."""
    started: int
    """When the process started, in the system's units; 0 if unknown. It tells processes with the same number apart."""
    host: str
    user: str
    since: str
    command: str
    attempt: int
    earlier_may_live: bool
    """Whether an earlier holder may be alive, with files open that were not replaced yet."""
    released: bool = False
    """True if no process holds the claim any more, and it stays only to record ``earlier_may_live``."""

    @property
    def ended(self) -> bool:
        """True only if it is certain that no process holds the claim any more."""
        return self.released or (self.machine == _machine() and _has_ended(self.pid, self.started))

    @property
    def text(self) -> str:
        """``process 4711 of ada on node7 since 2026-11-28 14:02:11 UTC (3 min 10 s ago; kr2cache extract ...)``"""
        since = datetime.fromisoformat(self.since)
        ago = seconds_text(max(0.0, (datetime.now(UTC) - since).total_seconds()))
        return (
            f"process {self.pid} of {self.user} on {self.host} since {since:%Y-%m-%d %H:%M:%S} UTC ({ago} ago; "
            f"{self.command})"
        )


def this_process(attempt: int, *, earlier_may_live: bool) -> Owner:
    user = "?"
    with contextlib.suppress(OSError, KeyError, ImportError):
        user = getpass.getuser()
    return Owner(
        pid=os.getpid(),
        machine=_machine(),
        started=_started(os.getpid()),
        host=socket.gethostname(),
        user=user,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        attempt=attempt,
        earlier_may_live=earlier_may_live,
    )


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{socket.gethostname()}:{uuid.getnode():x}"


def _started(pid: int) -> int:
    """When a process of this machine started, in the system's units; 0 if unknown."""
    return int(_stat(pid)[19]) if _stat(pid) else 0


def _has_ended(pid: int, started: int) -> bool:
    """True only if it is certain that a process of this machine has ended, with all its threads."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass  # it may be a process of another user: see what /proc shows
    stat = _stat(pid)
    if not stat:
        return False
    # A killed process may be shown as ended ("Z") while one of its threads still waits for the disk.
    return (stat[0] in "ZX" and int(stat[17]) <= 1) or int(stat[19]) != started != 0


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the state on; empty if unknown."""
    try:
        # The name of the program is in brackets before the state. It may itself contain spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def reader_of(folder: Path) -> str | None:
    """Another process of this machine that has mapped a file in a folder, as text for messages; None if there is none,
    and for processes of other users.
    """
    start = f"{folder.resolve()}{os.sep}"
    for maps in Path("/proc").glob("[0-9]*/maps"):
        pid = int(maps.parent.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and start in maps.read_text("utf-8", "replace"):
                words = maps.with_name("cmdline").read_text("utf-8", "replace").split("\0")
                return f"process {pid} ({shlex.join(words).strip()[:200]})"
    return None
