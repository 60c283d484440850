"""Claims: one holder at a time, whoever dies, stops, or comes back late."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import mounts
from forking import ForkedPython

from kr2cache.errors import BusyError, ConfigError, DiskSpaceError
from kr2cache.system import claims, interrupt, owners, silence
from kr2cache.system.claims import Claim, claimed, try_claim, wait_for_claim

HOLDER = """
import sys, time
from pathlib import Path
from kr2cache.system import claims, owners
claims.HEARTBEAT_S = 0.05
claims.TIMEOUT_S = 0.5
claim = claims.try_claim(Path(sys.argv[1]), "unit")
assert claim is not None
print(claim.folder, flush=True)
while sys.stdin.readline():
    (claim.folder / "late").write_text("late") if claim.is_held else print("lost", flush=True)
claim.release()
"""


NO_NUMBER = """{"pid": "x", "machine": "", "started": [], "host": "", "user": "", "since": "2026-01-01", "command": "",
"attempt": 1, "earlier_may_live": false}"""


class Holder:
    """Another process that holds a unit."""

    def __init__(self, place: Path) -> None:
        self.process = ForkedPython(
            [sys.executable, "-c", HOLDER, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> str:
        """Continue it, and let it try to use its claim. What it says."""
        self.process.send_signal(signal.SIGCONT)
        return self.process.communicate("\n")[0].strip()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "place")
    yield holder
    if holder.process.returncode is None:
        holder.process.send_signal(signal.SIGCONT)
        holder.kill()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder is silent after half a second."""
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(claims, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(claims, "POLL_S", 0.02)


def held(claim: Claim | None) -> Claim:
    assert claim is not None
    return claim


def test_one_holder_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    place = tmp_path / "place"
    first = held(try_claim(place, "unit"))
    assert try_claim(place, "unit") is None
    other = held(try_claim(place, "another unit"))
    assert claims.held_units(place) == {"unit", "another unit"}
    first.release()
    again = held(try_claim(place, "unit"))
    assert again.folder != first.folder, "a path is never used twice"
    again.release()
    other.release()
    assert list(tmp_path.iterdir()) == []


def test_a_link_leads_to_the_same_claims(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place")
    with held(try_claim(tmp_path / "link", "unit")):
        assert try_claim(tmp_path / "place", "unit") is None


def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path) -> None:
    at_once = threading.Barrier(16)

    def come(_: int) -> Claim | None:
        at_once.wait()
        return try_claim(tmp_path / "place", "unit")

    with ThreadPoolExecutor(16) as pool:
        for _ in range(50):
            got = [claim for claim in pool.map(come, range(16)) if claim is not None]
            assert len(got) == 1
            got[0].release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_take_over_one_gets_it(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with ThreadPoolExecutor(16) as pool:
        for _ in range(5):
            Holder(place).kill()
            at_once = threading.Barrier(16)

            def come(_: int, at_once: threading.Barrier = at_once) -> Claim | None:
                at_once.wait()
                return try_claim(place, "unit")

            got = [claim for claim in pool.map(come, range(16)) if claim is not None]
            assert len(got) == 1
            assert not got[0].earlier_may_live
            got[0].release()
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_process_that_ended_is_free_at_once(tmp_path: Path, other: Holder) -> None:
    assert try_claim(tmp_path / "place", "unit") is None
    other.kill()
    claim = held(try_claim(tmp_path / "place", "unit"))
    assert not claim.earlier_may_live, "it has surely ended"
    assert claim.owner.attempt == 2
    assert not other.folder.exists()
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_process_that_ended_goes_with_the_last_one(tmp_path: Path, other: Holder) -> None:
    """Nobody takes over a unit that is done."""
    other.kill()
    held(try_claim(tmp_path / "place", "another unit")).release()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_ended_and_was_not_waited_for_has_ended(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try_claim(tmp_path / "place", "unit")
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        with held(try_claim(tmp_path / "place", "unit")) as claim:
            assert not claim.earlier_may_live
    finally:
        os.waitpid(child, 0)


@pytest.mark.usefixtures("quick")
def test_a_stopped_holder_loses_its_claim_and_cannot_publish(tmp_path: Path, other: Holder) -> None:
    place = tmp_path / "place"
    for _ in range(16):
        assert try_claim(place, "unit") is None, "it is alive, and shows it"
        time.sleep(0.05)
    other.stop()
    time.sleep(0.2)
    assert try_claim(place, "unit") is None, "not silent for long enough"
    claim = wait_for_claim(place, "unit")
    assert claim.earlier_may_live
    assert other.go_on() == "lost"
    assert claim.is_held
    assert not other.folder.exists()
    assert sorted(path.name for path in claim.folder.iterdir()) == ["alive", "owner.json"]
    claim.fenced()
    claim.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_that_a_holder_may_be_alive_is_not_forgotten_before_it_is_fenced(tmp_path: Path, other: Holder) -> None:
    place = tmp_path / "place"
    other.stop()
    wait_for_claim(place, "unit").release()
    second = held(try_claim(place, "unit"))
    assert second.earlier_may_live
    second.fenced()
    second.release()
    with held(try_claim(place, "unit")) as third:
        assert not third.earlier_may_live


@pytest.mark.usefixtures("quick")
def test_the_claim_of_another_machine_is_free_once_it_is_silent(
    tmp_path: Path, other: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "_machine", lambda: "another")
    other.kill()
    place = tmp_path / "place"
    assert try_claim(place, "unit") is None, "its process cannot be seen from here"
    claim = wait_for_claim(place, "unit")
    assert claim.earlier_may_live
    claim.release()


def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path: Path, other: Holder) -> None:
    owner = claims._owner(other.folder)
    assert owner is not None
    assert not owner.ended
    other.kill()
    other.folder.joinpath("owner.json").write_text(
        re.sub(r'"pid": \d+', f'"pid": {os.getpid()}', other.folder.joinpath("owner.json").read_text())
    )
    held(try_claim(tmp_path / "place", "unit")).release()


def test_a_process_that_ended_before_its_request_was_granted_stops_nobody(tmp_path: Path, other: Holder) -> None:
    place = tmp_path / "place"
    (other.folder / "alive").unlink()
    assert try_claim(place, "unit") is None
    other.kill()
    with held(try_claim(place, "unit")) as claim:
        assert not other.folder.exists()
        assert not claim.earlier_may_live
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00", NO_NUMBER])
def test_an_owner_that_cannot_be_read_is_free_once_silent(tmp_path: Path, other: Holder, content: str) -> None:
    place = tmp_path / "place"
    (other.folder / "owner.json").write_text(content)
    assert claims.holder(place, "unit") == "another process"
    assert try_claim(place, "unit") is None
    other.kill()
    claim = wait_for_claim(place, "unit")
    assert claim.earlier_may_live
    claim.release()


def test_the_second_says_who_holds_it_and_waits(
    tmp_path: Path, other: Holder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PATIENCE_S", 0.05)
    say = claims.note_waiting
    monkeypatch.setattr(claims, "note_waiting", lambda text: (say(text), other.kill()))
    with claimed(tmp_path / "place", "unit"):
        pass
    captured = capsys.readouterr()
    pid = other.process.pid
    assert re.search(
        rf"place is being written by process {pid} of \S+ on \S+ since [-0-9]+ [:0-9]+ UTC",
        (captured.out + captured.err).replace("\n", " "),
    )
    assert "waiting for it" in captured.out + captured.err


def test_who_does_not_wait_is_refused(tmp_path: Path, other: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE_S", 0.05)
    with pytest.raises(BusyError, match=f"is being written by process {other.process.pid} of"):
        wait_for_claim(tmp_path / "place", "unit", wait=False)


def test_who_lost_its_claim_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(BusyError, match=r"Another process took over .*place"), claimed(tmp_path / "place") as claim:
        claims._remove(claim.folder)
        (claim.folder / "built").rename(tmp_path / "published")


def test_the_folder_goes_while_it_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mkdir(exist_ok=True)`` finds the folder, and it is gone when it looks whether it is a folder."""
    folder = claims.claims_folder(tmp_path / "cache")
    folder.mkdir()
    mkdir = os.mkdir

    def too_late(path: Path, *mode: int) -> None:
        try:
            mkdir(path, *mode)
        except FileExistsError:
            if Path(path) == folder:
                folder.rmdir()  # another process released the last claim
            raise

    monkeypatch.setattr(os, "mkdir", too_late)
    claim = try_claim(tmp_path / "cache", "unit")
    assert claim is not None
    assert claim.is_held
    claim.release()
    assert not folder.exists()


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    claims.claims_folder(tmp_path / "cache").touch()
    with pytest.raises((FileExistsError, NotADirectoryError), match=r"cache\.claims"):
        try_claim(tmp_path / "cache", "unit")


def test_a_place_where_no_folder_can_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc says that a new folder is not there, however often it is made."""
    made: list[Path] = []

    def as_in_proc(self: Path, *given: Any, **named: Any) -> None:
        made.append(self)
        assert len(made) < 1000, "it would never end"
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "mkdir", as_in_proc)
    with pytest.raises(ConfigError, match=r"cannot be written: .* is not writable") as caught:
        try_claim(tmp_path / "place", "unit")
    assert "give another folder" in caught.value.remedy


def test_claims_do_not_need_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some network file systems they do nothing."""
    import fcntl

    def refuse(*_: object) -> None:
        raise AssertionError("a lock was asked for")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with claimed(tmp_path / "place"):
        assert try_claim(tmp_path / "place", "all") is None


# Harder ---------------------------------------------------------------------------------------------------------------

LATE = """
import sys, time
from pathlib import Path
from kr2cache.system import claims
real = claims._may_live
def wait(claims):
    if wait.calls:
        print("no rivals", flush=True)
        sys.stdin.readline()
    wait.calls += 1
    return real(claims)
wait.calls = 0
claims._may_live = wait
claim = claims.try_claim(Path(sys.argv[1]), "unit")
print(claim is not None and claim.is_held)
"""


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("released", [False, True])
def test_a_process_that_is_late_before_its_request_is_granted_gets_nothing(tmp_path: Path, released: bool) -> None:
    place = tmp_path / "place"
    with ForkedPython(
        [sys.executable, "-c", LATE, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as late:
        assert late.stdout is not None
        assert late.stdout.readline() == "no rivals\n"
        claim = wait_for_claim(place, "unit")
        assert claim.earlier_may_live, "it could have been granted a moment ago"
        claim.fenced()
        if released:
            claim.release()
            claim = held(try_claim(place, "unit"))
        assert late.communicate("\n")[0] == "False\n"
        assert claim.is_held
        claim.release()
    assert list(tmp_path.iterdir()) == []


def test_a_thread_that_outlives_the_main_thread_is_a_sign_of_life(tmp_path: Path) -> None:
    """As in a process that is killed while a thread waits for a disk: it counts as ended, but still writes."""
    program = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); "
    with subprocess.Popen([sys.executable, "-c", program + "ctypes.CDLL(None).pthread_exit(None)"]) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        if not stat.exists():
            pytest.skip("no /proc")
        started = owners._started(process.pid)
        while ") Z " not in stat.read_text():
            time.sleep(0.02)
        assert not owners._has_ended(process.pid, started)
        process.kill()
        while int(owners._stat(process.pid)[17]) > 1:
            time.sleep(0.02)
        assert owners._has_ended(process.pid, started)


def test_a_process_of_another_user_that_is_hidden_lives(tmp_path: Path) -> None:
    """Many clusters mount /proc so that users see their own processes alone."""
    if os.getuid() != 0:
        pytest.skip("root alone can become another user")
    parent, started, own_mounts = os.getpid(), owners._started(os.getpid()), 0x20000
    child = os.fork()
    if child == 0:
        code = 3
        try:
            if ctypes.CDLL(None).unshare(own_mounts) == 0:
                subprocess.run(["mount", "--make-rprivate", "/"], check=True)
                with mounts.mounted(Path("/proc"), "proc", "hidepid=2"):
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                    code = int(owners._has_ended(parent, started)) if not owners._stat(parent) else 2
                    os._exit(code)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 3:
        pytest.skip("/proc cannot be mounted here")
    assert code == 0


def test_a_claim_that_nobody_has_in_hands_is_released(tmp_path: Path) -> None:
    try_claim(tmp_path / "place", "unit")
    assert list(tmp_path.iterdir()) == []


STEP = 13
"""Ctrl-C comes before every thirteenth bytecode."""


def test_ctrl_c_at_any_moment_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = {module.__file__ for module in (claims, contextlib, interrupt, owners, silence, weakref)} | {__file__}
    bytecodes, moment = 0, 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal bytecodes
        if frame.f_code.co_filename not in watched:
            return None
        frame.f_trace_opcodes = True
        bytecodes += event == "opcode"
        if event == "opcode" and bytecodes == moment:
            os.kill(os.getpid(), signal.SIGINT)
        return trace

    monkeypatch.setattr(interrupt, "_listening", [True])
    monkeypatch.setattr(interrupt, "_received", [])
    before = signal.signal(signal.SIGINT, interrupt._on_signal)
    try:
        while bytecodes >= moment:
            bytecodes, moment, interrupted = 0, moment + STEP, False
            sys.settrace(trace)
            try:
                with claimed(tmp_path / "place"):
                    pass
            except KeyboardInterrupt:
                interrupted = True
            finally:
                sys.settrace(None)
            assert interrupted == (bytecodes >= moment), "the signal is not lost"
            assert list(tmp_path.iterdir()) == [], moment
    finally:
        signal.signal(signal.SIGINT, before)
    assert moment > 50 * STEP


def test_ctrl_c_before_it_is_decided_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("_decide", "_write_owner"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(claims, name, interrupt)
            try_claim(tmp_path / "place", "unit")
        held(try_claim(tmp_path / "place", "unit")).release()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_process_does_not_release_the_claim(tmp_path: Path) -> None:
    claim = held(try_claim(tmp_path / "place", "unit"))
    child = os.fork()
    if child == 0:
        claim.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert claim.is_held
    claim.release()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("hours", [-0.5, 0.5])
def test_clocks_that_differ_neither_take_a_claim_away_nor_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    """The time of a touch may be of a file server, or of the machine that touched."""
    monkeypatch.setattr(owners.Owner, "ended", False)  # it is on another machine
    program = f"import os, time\nreal = os.utime\n{HOLDER}".replace(
        "claim =",
        f"os.utime = lambda path, _=None: real(path, times=(time.time() + {3600 * hours},) * 2)\nclaim =",
    )
    with ForkedPython(
        [sys.executable, "-c", program, str(tmp_path / "place")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as far:
        assert far.stdout is not None
        far.stdout.readline()
        for _ in range(16):
            assert try_claim(tmp_path / "place", "unit") is None
            time.sleep(0.05)
        far.kill()
    wait_for_claim(tmp_path / "place", "unit").release()


WATCHER = """
import sys, time
from pathlib import Path
from kr2cache.system import claims
claims.HEARTBEAT_S = 0.05
claims.TIMEOUT_S = 0.5
looked = 0.0
for _ in range(50):
    now = time.monotonic()
    assert claims.try_claim(Path(sys.argv[1]), "unit") is None
    if now - looked > claims.TIMEOUT_S:
        print("looked", flush=True)
        sys.stdin.readline()
    looked = now
    time.sleep(0.02)
"""


def test_if_all_processes_are_stopped_and_go_on_nobody_loses_a_claim(tmp_path: Path, other: Holder) -> None:
    """As by Ctrl-Z, or by a cluster that suspends a job."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ForkedPython([sys.executable, "-c", WATCHER, str(tmp_path / "place")], **pipes) as watcher:
        assert watcher.stdin is not None and watcher.stdout is not None
        assert watcher.stdout.readline() == "looked\n"
        watcher.send_signal(signal.SIGSTOP)
        other.stop()
        time.sleep(0.8)
        watcher.send_signal(signal.SIGCONT)
        watcher.stdin.write("\n")
        watcher.stdin.flush()
        assert watcher.stdout.readline() == "looked\n", "once, after the time in which both were stopped"
        other.process.send_signal(signal.SIGCONT)
        watcher.communicate("\n")
    assert watcher.returncode == 0
    assert other.go_on() == ""


def test_a_full_disk_and_a_folder_that_is_read_only_are_said(tmp_path: Path) -> None:
    with mounts.mounted(tmp_path / "disk", options="size=1m,nr_inodes=8"):
        (tmp_path / "disk" / "ballast").write_bytes(bytes(2**20))
        with claimed(tmp_path / "disk" / "place"):
            assert try_claim(tmp_path / "disk" / "place", "all") is None, "no bytes are free: a claim needs none"
        for number in range(6):
            (tmp_path / "disk" / str(number)).touch()
        with pytest.raises(DiskSpaceError, match=r"No space left for .*\.place\.claims"):
            try_claim(tmp_path / "disk" / "place", "unit")
        with (
            mounts.read_only(tmp_path / "disk"),
            pytest.raises(ConfigError, match=r"place cannot be written: .* is not"),
        ):
            try_claim(tmp_path / "disk" / "place", "unit")
