"""Claims: one holder at a time, whoever dies, stops, or comes back late."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kr2cache.errors import BusyError
from kr2cache.system import claims
from kr2cache.system.claims import Claim, claimed, claims_folder, try_claim, wait_for_claim

HOLDER = """
import sys, time
from pathlib import Path
from kr2cache.system import claims
claims.HEARTBEAT_S = 0.05
claims.TIMEOUT_S = 0.5
claim = claims.try_claim(Path(sys.argv[1]), "unit")
assert claim is not None
print(claim.folder, flush=True)
while sys.stdin.readline():
    (claim.folder / "late").write_text("late") if claim.is_held else print("lost", flush=True)
claim.release()
"""


class Holder:
    """Another process that holds a unit."""

    def __init__(self, place: Path) -> None:
        self.process = subprocess.Popen(
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


def test_a_child_that_ended_and_was_not_waited_for_has_ended(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try_claim(tmp_path / "place", "unit")
        os._exit(0)
    time.sleep(0.2)
    try:
        with held(try_claim(tmp_path / "place", "unit")) as claim:
            assert not claim.earlier_may_live
    finally:
        os.waitpid(child, 0)


@pytest.mark.usefixtures("quick")
def test_a_stopped_holder_loses_its_claim_and_cannot_publish(tmp_path: Path, other: Holder) -> None:
    place = tmp_path / "place"
    time.sleep(1.0)
    assert try_claim(place, "unit") is None, "it is alive, and shows it"
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
    monkeypatch.setattr(claims, "_machine", lambda: "another")
    other.kill()
    place = tmp_path / "place"
    assert try_claim(place, "unit") is None, "its process cannot be seen from here"
    started = time.monotonic()
    claim = wait_for_claim(place, "unit")
    assert time.monotonic() - started < 5
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


def test_a_process_that_ended_while_the_holder_changed_stops_nobody(tmp_path: Path, other: Holder) -> None:
    place = tmp_path / "place"
    following = claims_folder(place) / "unit.next"
    other.folder.rename(following)  # as if it had ended before it gave the folder its name
    assert try_claim(place, "unit") is None
    other.kill()
    with held(try_claim(place, "unit")) as claim:
        assert not following.exists()
        assert not claim.earlier_may_live
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "\x00"])
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
    threading.Timer(0.5, other.kill).start()
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


def test_claims_do_not_need_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some network file systems they do nothing."""
    import fcntl

    def refuse(*_: object) -> None:
        raise AssertionError("a lock was asked for")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with claimed(tmp_path / "place"):
        assert try_claim(tmp_path / "place", "all") is None
