"""Claims: units of work that processes share, on one machine or on many machines with a shared file system.

A claim is a folder that is made exclusively (``mkdir``). Locks on files are not used: on some network file systems they
do nothing. The claims on a file or folder lie beside it:

    .NAME.claims/UNIT.ATTEMPT.TOKEN/    the claim of one holder; no other claim ever has this path
        alive                           touched every ``HEARTBEAT_S``
        owner.json                      who holds it: for messages, and to see that a process of this machine ended
    .NAME.claims/UNIT.next/             exists only while the holder of a unit changes

A process takes over the claim of a holder that ended, or that showed no sign of life for ``TIMEOUT_S``. A silent holder
may be alive: stopped, or cut off from the file system. When it goes on, it must not do harm:

- Taking over removes the claim folder of the old holder. A file is published by a rename out of the claim folder
  (``Claim.folder``), so the old holder cannot publish any more.
- ``Claim.earlier_may_live`` tells the new holder that the old one may have files open. The new holder replaces these
  files by copies before it writes to them, and then calls ``fenced``.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from kr2cache.errors import BusyError
from kr2cache.system.console import note_waiting, seconds_text

HEARTBEAT_S = 5.0
"""A holder touches its claim this often."""
TIMEOUT_S = 90.0
"""A holder counts as silent after this time. Network file systems show changes of other machines up to 60 s late."""
PATIENCE_S = 0.5
"""Seconds before the user is told that the process waits."""
POLL_S = 0.2
"""A waiting process looks this often."""
REMOVED = "removed-"
"""How the name of a claim begins while it is being removed."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, as its file says."""

    pid: int
    machine: str
    """Identifies the machine, its last boot and its PID namespace. ``pid`` can be compared only if these are equal."""
    started: int
    """When the process started, in the system's units; 0 if unknown. Numbers of ended processes are used again."""
    host: str
    user: str
    since: str
    command: str
    attempt: int
    earlier_may_live: bool
    """Whether an earlier holder may be alive, with files open that were not replaced yet."""
    released: bool = False
    """True if nobody holds it: the claim only remembers ``earlier_may_live``."""

    @property
    def ended(self) -> bool:
        """Whether nobody holds the claim any more, for sure."""
        return self.released or (self.machine == _machine() and _started(self.pid) != self.started)

    @property
    def text(self) -> str:
        """``process 4711 of ada on node7 since 2026-11-28 14:02:11 UTC (3 min 10 s ago; kr2cache extract ...)``"""
        since = datetime.fromisoformat(self.since)
        ago = seconds_text(max(0.0, (datetime.now(UTC) - since).total_seconds()))
        return (
            f"process {self.pid} of {self.user} on {self.host} since {since:%Y-%m-%d %H:%M:%S} UTC ({ago} ago; "
            f"{self.command})"
        )


class Claim:
    """A unit of work that this process holds. Use it as a context manager, or call ``release``."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self.folder = folder
        """Only the holder writes here. A file is published by a rename out of this folder."""
        self.owner = owner
        self._done = threading.Event()
        self._lost = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._pulse.start()

    @property
    def earlier_may_live(self) -> bool:
        """Whether an earlier holder may be alive and have files open."""
        return self.owner.earlier_may_live

    def fenced(self) -> None:
        """Say that from now on no earlier holder can change the files of this unit."""
        if self.earlier_may_live:
            self.owner = replace(self.owner, earlier_may_live=False)
            _sign(self.folder, self.owner)

    @property
    def is_held(self) -> bool:
        """False once another process has taken this claim over. What this process writes then is of no effect."""
        if not self._lost.is_set():
            self._touch()
        return not self._lost.is_set()

    def release(self) -> None:
        """Let the unit go. A claim that another process has taken over stays as it is."""
        self._done.set()
        if self.earlier_may_live:  # nobody fenced it: the next holder has to know
            _sign(self.folder, replace(self.owner, released=True))
            return
        with contextlib.suppress(OSError):
            _remove(self.folder)
        folder = self.folder.parent
        for name in _names(folder):
            if name.startswith(REMOVED):  # its holder ended before it was gone
                shutil.rmtree(folder / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # other units are claimed
            folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S) and not self._lost.is_set():
            self._touch()

    def _touch(self) -> None:
        try:
            os.utime(self.folder / "alive")
        except OSError as error:
            # Other errors may pass; if they do not, the time-out decides.
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                self._lost.set()


def try_claim(place: Path, unit: str) -> Claim | None:
    """Claim a unit if nobody holds it, or if its holder has ended or is silent.

    Args:
        place: The file or folder that the unit belongs to; it need not exist. Links lead to the same claims.
        unit: Its name.

    Returns:
        The claim; None if another process holds the unit.
    """
    folder = claims_folder(place)
    while True:
        if not all(map(_is_free, _claims_in(folder, unit))):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        following = folder / f"{unit}.next"
        try:
            following.mkdir()
        except FileNotFoundError:  # the last claim was released meanwhile, and its folder with it
            continue
        except FileExistsError:
            if not _is_free(following):
                return None
            with contextlib.suppress(OSError):  # its maker ended in the middle: it counts as a holder that ended
                following.rename(_new_claim(folder, unit, 1))
            continue
        return _exchange(folder, unit, following)


def _exchange(folder: Path, unit: str, following: Path) -> Claim | None:
    """Make the claim. While ``following`` exists, no other process changes the holder."""
    earlier = _claims_in(folder, unit)  # again: it may have changed before ``following`` was made
    if not all(map(_is_free, earlier)):
        _remove(following)
        return None
    owners = [_owner(claim) for claim in earlier]
    may_live = any(owner is None or not owner.ended or owner.earlier_may_live for owner in owners)
    attempt = 1 + max(map(_attempt, earlier), default=0)
    owner = _this_process(attempt, earlier_may_live=may_live)
    own = _new_claim(folder, unit, attempt)
    try:
        (following / "alive").touch()
        _sign(following, owner)
        for claim in earlier:
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                _remove(claim)
        following.rename(own)
    except FileNotFoundError:  # this process was stopped for so long that another one took ``following`` away
        return None
    if _owner(own) != owner:  # for the same reason, it was the folder of another process
        _sign(own, owner)
    return Claim(own, owner)


def wait_for_claim(place: Path, unit: str, *, wait: bool = True) -> Claim:
    """Claim a unit; wait for another process that holds it.

    Args:
        place: As for ``try_claim``.
        unit: Its name.
        wait: Whether to wait.

    Raises:
        BusyError: If another process holds the unit and ``wait`` is False.
    """
    started, said, pause = time.monotonic(), False, 0.01
    while (claim := try_claim(place, unit)) is None:
        if time.monotonic() - started > PATIENCE_S and not said:
            held = f"{place} is being written by {holder(place, unit)}"
            if not wait:
                raise BusyError(f"{held}.", "Wait until it is done, or stop it.")
            note_waiting(f"{held}; waiting for it.")
            said = True
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    return claim


@contextlib.contextmanager
def claimed(place: Path, unit: str = "all", *, wait: bool = True) -> Iterator[Claim]:
    """Hold a unit whose files are all published by a rename out of the claim's folder. Arguments and errors are those
    of ``wait_for_claim``.
    """
    with wait_for_claim(place, unit, wait=wait) as claim:
        claim.fenced()  # an earlier holder cannot publish any more
        try:
            yield claim
        except OSError:
            if claim.is_held:
                raise
            raise BusyError(
                f"Another process took over {place}: this process was stopped, or cut off from the file system, for "
                f"more than {TIMEOUT_S:.0f} s.",
                "Run the same command again.",
            ) from None


def holder(place: Path, unit: str) -> str:
    """Who holds a unit, in words."""
    owners = [owner for claim in _claims_in(claims_folder(place), unit) if (owner := _owner(claim)) is not None]
    return owners[-1].text if owners else "another process"


def claims_folder(place: Path) -> Path:
    """The folder of the claims on ``place``, beside it."""
    place = place.resolve()
    return place.with_name(f".{place.name}.claims")


def held_units(place: Path) -> set[str]:
    """The units that somebody holds."""
    folder = claims_folder(place)
    return {match[1] for name in _names(folder) if (match := _NAME.fullmatch(name)) and not _is_free(folder / name)}


_NAME = re.compile(r"(.+)\.(\d+)\.[0-9a-f]{12}")


def _new_claim(folder: Path, unit: str, attempt: int) -> Path:
    return folder / f"{unit}.{attempt}.{uuid.uuid4().hex[:12]}"


def _claims_in(folder: Path, unit: str) -> list[Path]:
    """The claims on a unit, in order. More than one can be there after a process ended in ``_exchange``."""
    matches = [match for name in _names(folder) if (match := _NAME.fullmatch(name)) and match[1] == unit]
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[2]))]


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _attempt(claim: Path) -> int:
    return int(claim.name.split(".")[-2])


def _is_free(claim: Path) -> bool:
    """Whether the holder of a claim has ended or is silent."""
    owner = _owner(claim)
    return (owner is not None and owner.ended) or _is_silent(claim)


def _is_silent(claim: Path) -> bool:
    """Whether nobody has touched the claim for ``TIMEOUT_S``, by the clock of the file system."""
    try:
        try:
            # Opening a file is what makes a network file system ask the server.
            with (claim / "alive").open("rb") as file:
                touched = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:  # its maker has not come so far, or it is being removed
            touched = claim.stat().st_mtime
        with tempfile.TemporaryFile(dir=claim.parent) as file:
            return os.fstat(file.fileno()).st_mtime - touched > TIMEOUT_S
    except FileNotFoundError:
        return False  # it is gone: look again


def _owner(claim: Path) -> Owner | None:
    try:
        return Owner(**json.loads((claim / "owner.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _sign(claim: Path, owner: Owner) -> None:
    with contextlib.suppress(OSError):  # a full disk: then the time-out alone tells that this process ended
        (claim / "owner.new").write_text(json.dumps(asdict(owner)), encoding="utf-8")
        (claim / "owner.new").rename(claim / "owner.json")


def _remove(claim: Path) -> None:
    """Remove a claim: first its name, at one instant, then what is in it. FileNotFoundError if it is gone."""
    gone = claim.with_name(f"{REMOVED}{uuid.uuid4().hex}")
    claim.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _this_process(attempt: int, *, earlier_may_live: bool) -> Owner:
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
    """When a process of this machine started, in the system's units. 0 if it runs but the time is unknown; -1 if it has
    ended.
    """
    try:
        # The name in brackets may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return -1 if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        pass
    return 0
