"""Claims: units of work that processes share, on one machine or on many machines with a shared file system.

A claim is a folder that is made exclusively (``mkdir``). Locks on files are not used: on some network file systems they
do nothing. The claims on a file or folder lie beside it:

    .NAME.claims/UNIT.ATTEMPT.TOKEN/    the claim of one holder; no other claim ever has this path
        owner.json                      who made it: for messages, and to see that a process of this machine ended
        alive                           touched every ``HEARTBEAT_S``; without this file, the folder is only a request

A process first makes its request, and then looks for other requests and claims. Of two processes, the one that looks
later sees the other one, so two processes never get the same unit. No path is used twice. So a process that was stopped
between two steps can only find that its own folder is gone; it cannot harm another process.

A process takes over the claim of a holder that ended, or that was silent for ``TIMEOUT_S``. A silent holder
may still be alive, but stopped or cut off from the file system. When it continues, it must not do harm:

- Taking over removes the claim folder of the old holder. A file is published by a rename out of the claim folder
  (``Claim.folder``), so the old holder cannot publish any more.
- ``Claim.earlier_may_live`` tells the new holder that the old one may have files open. The new holder replaces these
  files by copies before it writes to them, and then calls ``fenced``.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from kr2cache.errors import BusyError, ConfigError
from kr2cache.system.console import note_waiting
from kr2cache.system.disk import disk_error
from kr2cache.system.interrupt import uninterrupted
from kr2cache.system.owners import Owner, this_process
from kr2cache.system.silence import is_gone, is_silent

HEARTBEAT_S = 5.0
"""A holder touches its claim once in so many seconds."""
TIMEOUT_S = 90.0
"""A holder counts as silent if its claim was not touched for so many seconds. Network file systems may show a touch by
another machine 60 s late."""
DECIDE_S = 1.0
"""How many seconds a process waits at most for another process that requests the same unit at the same moment."""
PATIENCE_S = 0.5
"""Seconds before the user sees a note that the process waits."""
POLL_S = 0.2
"""A waiting process checks again after so many seconds at most."""
REMOVED = "removed-"
"""The name of a claim begins with this while the claim is being removed."""


class Claim:
    """A unit of work that this process holds. Use it as a context manager, or call ``release``."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._held = _Held(folder, owner)
        # Ctrl-C may come just before the ``with`` block: then the claim ends with this object, or with the process.
        self._release = weakref.finalize(self, self._held.release)
        threading.Thread(target=self._held.beat, name="claim", daemon=True).start()

    @property
    def folder(self) -> Path:
        """Only the holder writes here. It publishes a file by a rename out of this folder."""
        return self._held.folder

    @property
    def owner(self) -> Owner:
        return self._held.owner

    @property
    def earlier_may_live(self) -> bool:
        """Whether an earlier holder may be alive and have files open."""
        return self.owner.earlier_may_live

    def fenced(self) -> None:
        """Record that from now on no earlier holder can change the files of this unit."""
        if self.earlier_may_live:
            self._held.owner = replace(self.owner, earlier_may_live=False)
            with contextlib.suppress(OSError):  # if this fails, the next holder makes a copy that is not needed
                _write_owner(self.folder, self.owner)

    @property
    def is_held(self) -> bool:
        """False once another process has taken this claim over. Then nothing that this process writes has an effect."""
        self._held.touch()
        return not self._held.lost.is_set()

    def release(self) -> None:
        """Give up the unit. A claim that another process has taken over is not changed."""
        with uninterrupted():
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _Held:
    """What a claim needs until its end. It does not refer to the claim, so that the claim can be deleted before."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self.folder = folder
        self.owner = owner
        self.done = threading.Event()
        self.lost = threading.Event()

    def beat(self) -> None:
        while not self.done.wait(HEARTBEAT_S) and not self.lost.is_set():
            self.touch()

    def touch(self) -> None:
        if self.lost.is_set():
            return
        try:
            os.utime(self.folder / "alive")
        except OSError as error:
            # Other errors may be temporary. If they are not, ``TIMEOUT_S`` ends the claim.
            if is_gone(error):
                self.lost.set()

    def release(self) -> None:
        self.done.set()
        if os.getpid() != self.owner.pid:  # a forked process has a copy of this object, not the claim
            return
        if self.owner.earlier_may_live:  # ``fenced`` was not called: the claim stays, so that the next holder knows
            with contextlib.suppress(OSError):
                _write_owner(self.folder, replace(self.owner, released=True))
            return
        with contextlib.suppress(OSError):
            _remove(self.folder)
        _remove_leftovers(self.folder.parent)


def try_claim(place: Path, unit: str) -> Claim | None:
    """Claim a unit if nobody holds it, or if its holder has ended or is silent.

    Args:
        place: The file or folder that the unit belongs to; it need not exist. Symbolic links are followed.
        unit: The name of the unit.

    Returns:
        The claim; None if another process holds the unit.

    Raises:
        DiskSpaceError: If the disk is full.
        ConfigError: If the folder of ``place`` is not writable.
    """
    with uninterrupted():
        return _try_claim(place, unit)


def _try_claim(place: Path, unit: str) -> Claim | None:
    folder, request = claims_folder(place), None
    try:
        earlier = _claims_in(folder, unit)
        if not all(map(_is_free, earlier)):
            return None
        attempt = 1 + max((int(claim.name.split(".")[-2]) for claim in earlier), default=0)
        request = folder / f"{unit}.{attempt}.{uuid.uuid4().hex[:12]}"
        owner = this_process(attempt, earlier_may_live=_may_live(earlier))
        _make_request(request, owner)
        return _decide(request, unit, owner)
    except BaseException as error:
        if request is not None:
            with contextlib.suppress(OSError):
                _remove(request)
        if not isinstance(error, OSError):
            raise
        if is_gone(error):  # this process was stopped for so long that another process removed its request
            return None
        raise _with_remedy(error, place) from error


MOST_ATTEMPTS = 100
"""So often a folder of claims is made again that went away meanwhile. Where it always goes away, no folder can be made:
some mounts, such as /proc, say so in this way."""


def _make_request(request: Path, owner: Owner) -> None:
    for attempt in itertools.count(1):
        # When its last claim is released, the folder is removed with it. That can happen after either step, and also
        # inside the first one: the folder is there when it is made, and gone when ``exist_ok`` looks at it.
        try:
            request.parent.mkdir(parents=True, exist_ok=True)
            request.mkdir()
            break
        except FileNotFoundError as error:
            if attempt == MOST_ATTEMPTS:  # ENOENT itself would mean that another process removed the request
                raise PermissionError(errno.EACCES, "no folder can be made there", error.filename) from error
        except FileExistsError:
            if os.path.lexists(request.parent) and not request.parent.is_dir():
                raise
    try:
        _write_owner(request, owner)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # without it, others wait until the claim is silent
            raise


def _decide(request: Path, unit: str, owner: Owner) -> Claim | None:
    """Turn a request into a claim, unless another process has the unit. Of several requests, the one with the smallest
    token becomes the claim; the others are removed.
    """
    until, pause = time.monotonic() + DECIDE_S, 0.001
    while True:
        others = _claims_in(request.parent, unit)
        if request not in others:
            return None
        others.remove(request)
        rivals = [claim for claim in others if not _is_free(claim)]
        if not rivals:
            break
        # A process with a larger token may have looked before this request existed: wait until it is a claim, or gone.
        if time.monotonic() > until or any(not _is_request(one) or one.suffix < request.suffix for one in rivals):
            _remove(request)
            return None
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    if _may_live(others) and not owner.earlier_may_live:
        owner = replace(owner, earlier_may_live=True)
        _write_owner(request, owner)  # before the claims that record it are removed
    for claim in others:
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            _remove(claim)
    if others:  # a late holder could still publish files from a folder that was left over
        _remove_leftovers(request.parent)
    (request / "alive").touch()
    return Claim(request, owner)


def _may_live(claims: list[Path]) -> bool:
    """Whether a holder of these claims, or an earlier holder, may be alive and have files open. A silent request counts
    too: its process may continue at this moment, and be granted it before it is removed.
    """
    return any(o is None or o.earlier_may_live or not o.ended for o in map(_owner, claims))


def _with_remedy(error: OSError, place: Path) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(
            f"{place} cannot be written: {error.filename} is not writable ({error.strerror}).",
            "Change its permissions, or give another folder.",
        )
    return disk_error(error, claims_folder(place), 4096)


def wait_for_claim(place: Path, unit: str, *, wait: bool = True) -> Claim:
    """Claim a unit. If another process holds it and ``wait`` is True, wait. The other arguments are those of
    ``try_claim``.

    Raises:
        BusyError: If another process holds the unit and ``wait`` is False.
    """
    started, noted, pause = time.monotonic(), False, 0.01
    while (claim := try_claim(place, unit)) is None:
        if time.monotonic() - started > PATIENCE_S and not noted:
            held = f"{place} is being written by {holder(place, unit)}"
            if not wait:
                raise BusyError(f"{held}.", "Wait until it is done, or stop it.")
            note_waiting(f"{held}; waiting for it.")
            noted = True
        time.sleep(pause)
        pause = min(2 * pause, POLL_S)
    return claim


@contextlib.contextmanager
def claimed(place: Path, unit: str = "all", *, wait: bool = True) -> Iterator[Claim]:
    """Inside the block, hold a unit whose files are all published by a rename out of the claim's folder. Arguments and
    errors are those of ``wait_for_claim``.
    """
    with wait_for_claim(place, unit, wait=wait) as claim:
        claim.fenced()  # an earlier holder can publish nothing any more
        try:
            yield claim
        except OSError:
            if claim.is_held:
                raise
            raise taken_over(place) from None


def taken_over(place: Path) -> BusyError:
    """The error of a process that lost its claim."""
    why = f"this process was stopped, or cut off from the file system, for more than {TIMEOUT_S:.0f} s"
    return BusyError(f"Another process took over {place}: {why}.", "Run the same command again.")


def holder(place: Path, unit: str) -> str:
    """Who holds a unit, as text for messages."""
    owners = [owner for claim in _claims_in(claims_folder(place), unit) if (owner := _owner(claim)) is not None]
    return owners[-1].text if owners else "another process"


def claims_folder(place: Path) -> Path:
    """The folder beside ``place`` that holds the claims on it."""
    place = place.resolve()
    return place.with_name(f".{place.name}.claims")


def held_units(place: Path) -> set[str]:
    """The units that a process holds."""
    folder = claims_folder(place)
    return {match[1] for name in _names(folder) if (match := _NAME.fullmatch(name)) and not _is_free(folder / name)}


def ended_units(place: Path) -> set[str]:
    """The units whose holder ended or is silent, and that no other process took over."""
    folder = claims_folder(place)
    return {match[1] for name in _names(folder) if (match := _NAME.fullmatch(name)) and _is_free(folder / name)}


_NAME = re.compile(r"(.+)\.(\d+)\.([0-9a-f]{12})")


def _claims_in(folder: Path, unit: str) -> list[Path]:
    """The claims on a unit and the requests for it, in the order of their attempts."""
    matches = [match for name in _names(folder) if (match := _NAME.fullmatch(name)) and match[1] == unit]
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[2]))]


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        if is_gone(error):
            return []
        raise


def _is_request(claim: Path) -> bool:
    return not (claim / "alive").exists()


def _is_free(claim: Path) -> bool:
    """Whether the holder of a claim has ended or is silent."""
    owner = _owner(claim)
    return (owner is not None and owner.ended) or is_silent(claim, TIMEOUT_S, 2 * HEARTBEAT_S)


def _owner(claim: Path) -> Owner | None:
    try:
        owner = Owner(**json.loads((claim / "owner.json").read_text(encoding="utf-8")))
        datetime.fromisoformat(owner.since)
    except (OSError, ValueError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) and isinstance(owner.started, int) else None


def _write_owner(claim: Path, owner: Owner) -> None:
    (claim / "owner.new").write_text(json.dumps(asdict(owner)), encoding="utf-8")
    (claim / "owner.new").rename(claim / "owner.json")


def _remove(claim: Path) -> None:
    """Remove a claim: first rename it in one step, then delete its files. FileNotFoundError if it does not exist."""
    gone = claim.with_name(f"{REMOVED}{uuid.uuid4().hex}")
    claim.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove half-removed claims, and claims of ended processes that record nothing for the next holder."""
    for name in _names(folder):
        if name.startswith(REMOVED):
            shutil.rmtree(folder / name, ignore_errors=True)
        elif (owner := _owner(folder / name)) is not None and owner.ended and not owner.earlier_may_live:
            with contextlib.suppress(OSError):
                _remove(folder / name)
    with contextlib.suppress(OSError):  # other units are claimed
        folder.rmdir()
