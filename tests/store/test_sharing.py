"""Several processes fill the shards of one cache together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import in_child

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
import tiny_cache

from kr2cache import FeatureCache
from kr2cache.cache import writer as writers
from kr2cache.cache.writer import PackedStates, ShardWriter
from kr2cache.errors import BusyError, CacheError
from kr2cache.store import sharing
from kr2cache.store.sharing import CACHE, HeldShard, SharedShards, whole_cache
from kr2cache.system import claims
from kr2cache.system.claims import claimed, try_claim
from kr2cache.system.console import WorkProgress

SHARD_BYTES = 150
TRUTH = tiny_cache.make((3, 1, 5, 2, 4, 6, 2, 3), dtype="int8", width=5)
TRUTH = dataclasses.replace(TRUTH, header=dataclasses.replace(TRUTH.header, batch_plan={"shard_bytes": SHARD_BYTES}))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder counts as silent after half a second."""
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(claims, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(claims, "PATIENCE_S", 0.05)
    monkeypatch.setattr(sharing, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def shards(tmp_path: Path) -> SharedShards:
    made = SharedShards(tmp_path / "cache", TRUTH.header, TRUTH.index)
    with claimed(made.folder, CACHE) as claim:
        made.create(claim.folder)
    assert len(made.parts) > 3
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the same cache, written by one process."""
    return tiny_cache.folder_bytes(tiny_cache.store(tmp_path_factory.mktemp("whole"), TRUTH, shard_bytes=SHARD_BYTES))


def states(i: int, truth: tiny_cache.Truth = TRUTH) -> PackedStates:
    assert truth.scale is not None
    return PackedStates([i], truth.raw[i].reshape(-1, truth.header.width), truth.scale[i].reshape(-1))


def unfinished(shards: SharedShards, check_interrupt: Callable[[], object] = lambda: None) -> Iterator[HeldShard]:
    return shards.unfinished(check_interrupt, WorkProgress("cache", "sequences"))


def fill(shards: SharedShards, progress: WorkProgress | None = None, *, pause: float = 0.0) -> list[int]:
    """Fill the shards that no other process holds. Returns the sequences that were written."""
    written = []
    for held in shards.unfinished(lambda: None, progress or WorkProgress("cache", "sequences")):
        with held, held.writer() as writer:
            for i in (held.part.start + np.flatnonzero(writer.unfinished)).tolist():
                writer.write(states(i))
                written.append(i)
                time.sleep(pause)
                held.check()
    return written


def test_one_process_makes_the_same_files_as_the_writer(shards: SharedShards, whole: dict[str, bytes]) -> None:
    assert fill(shards) == list(range(8))
    assert tiny_cache.folder_bytes(shards.folder) == whole
    assert [path.name for path in shards.folder.parent.iterdir()] == ["cache"], "no claim is left"
    assert fill(shards) == []
    assert shards.complete_count() == 8


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_write_each_sequence_once(
    shards: SharedShards, whole: dict[str, bytes], processes: int, tmp_path: Path
) -> None:
    all_come = multiprocessing.get_context("fork").Barrier(processes)

    def work(number: int) -> Callable[[], object]:
        def run() -> None:
            all_come.wait(60)
            (tmp_path / f"wrote-{number}").write_text(json.dumps(fill(shards, pause=0.05)))

        return run

    children = [in_child(work(number)) for number in range(processes)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * processes
    wrote = [json.loads((tmp_path / f"wrote-{number}").read_text()) for number in range(processes)]
    assert sorted(itertools.chain(*wrote)) == list(range(8))
    assert sum(map(bool, wrote)) > 1, "they shared the work"
    assert tiny_cache.folder_bytes(shards.folder) == whole


def test_the_progress_of_a_process_counts_what_others_complete(shards: SharedShards) -> None:
    first, theirs = shards.parts[:2]
    claim = try_claim(shards.folder, theirs.path.name)
    assert claim is not None

    def write_theirs() -> None:
        with claim, ShardWriter(theirs.path, theirs.start) as writer:
            for i in range(theirs.start, theirs.stop):
                writer.write(states(i))

    with ShardWriter(first.path, first.start) as writer:
        writer.write(states(0))
    progress = WorkProgress("cache", "sequences")
    other = threading.Timer(0.2, write_theirs)
    other.start()
    written = fill(shards, progress)
    other.join()
    assert not set(written) & {0, *range(theirs.start, theirs.stop)}
    assert (progress.line.tasks[0].completed, progress.total) == (7, 7), "without the sequence that was there before"


def digest_of_first(path: Path) -> int:
    """Where the checksum of the shard's first sequence lies."""
    return tiny_cache.byte_offset(path, "examples/xxh3")


def wait_for_first_digest(path: Path) -> None:
    """It is the last thing that is written of a sequence, but for its mark."""
    at = digest_of_first(path)
    while not any(path.read_bytes()[at : at + 8]):
        time.sleep(0.01)


def test_the_shard_of_a_killed_process_is_filled_without_a_copy(
    shards: SharedShards, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "SYNC_EVERY_S", 60.0)
    child = in_child(lambda: fill(shards, pause=60))
    part = shards.parts[0]
    wait_for_first_digest(part.path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inode = part.path.stat().st_ino
    assert shards.complete_count() == 0, "nothing was marked yet"
    assert fill(shards) == list(range(1, 8)), "what it wrote is kept"
    assert part.path.stat().st_ino == inode
    assert tiny_cache.folder_bytes(shards.folder) == whole


def test_a_process_that_was_stopped_changes_nothing_when_it_continues(
    shards: SharedShards, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process has the shard open. It continues after another process has taken over its claim. Then it writes other
    states, as from another GPU.
    """
    part = shards.parts[0]
    other = tiny_cache.make((3, 1, 5, 2, 4, 6, 2, 3), dtype="int8", width=5, seed=5)
    stop_here, wrote = tmp_path / "stop here", tmp_path / "wrote"

    def late() -> None:
        with next(unfinished(shards)) as held, held.writer() as writer:
            stop_here.touch()
            while stop_here.exists():
                time.sleep(0.005)
            writer.write(states(0, other))
            writer.write(states(1, other))
        wrote.touch()

    child = in_child(late)
    while not stop_here.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    inode = part.path.stat().st_ino
    assert sorted(fill(shards)) == list(range(8))
    assert part.path.stat().st_ino != inode, "it is a copy, which the stopped process does not have open"
    stop_here.unlink()
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert wrote.exists()
    assert tiny_cache.folder_bytes(shards.folder) == whole
    assert FeatureCache.open(shards.folder).complete.all()
    assert [path.name for path in shards.folder.parent.glob(".*")] == []


@pytest.mark.parametrize("stopped", ["before it opens the shard", "before it marks"])
def test_a_process_that_was_stopped_never_writes_to_the_file_of_another(
    shards: SharedShards, whole: dict[str, bytes], tmp_path: Path, stopped: str
) -> None:
    """The process writes other states, as from another GPU. It continues while another process holds the shard, which
    is not finished yet.
    """
    other = tiny_cache.make((3, 1, 5, 2, 4, 6, 2, 3), dtype="int8", width=5, seed=5)
    stop_here = tmp_path / "stop here"

    def wait() -> None:
        stop_here.touch()
        while stop_here.exists():
            time.sleep(0.005)

    def late() -> None:
        with next(unfinished(shards)) as held:
            if stopped == "before it opens the shard":
                wait()
            with held.writer() as writer:
                writer.write(states(0, other))
                if stopped == "before it marks":
                    wait_for_first_digest(held.part.path)
                    wait()

    child = in_child(late)
    while not stop_here.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    if stopped == "before it marks":  # remove all claims, so that no process knows of this holder
        shutil.rmtree(claims.claims_folder(shards.folder))
        with shards.parts[0].path.open("r+b") as file:  # else its states would be kept
            file.seek(digest_of_first(shards.parts[0].path))
            file.write(bytes(8))
    else:
        claims.wait_for_claim(shards.folder, shards.parts[0].path.name).release()
    held = next(unfinished(shards))
    assert held.part == shards.parts[0]
    with held, held.writer():
        stop_here.unlink()
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert shards.complete_count() == 0
    assert sorted(fill(shards)) == list(range(8))
    assert tiny_cache.folder_bytes(shards.folder) == whole


def test_complete_sequences_in_the_shard_of_a_stopped_process_are_kept(
    shards: SharedShards, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(shards.parts[0].path) as writer:
        writer.write(states(0))
    claim = try_claim(shards.folder, shards.parts[0].path.name)
    assert claim is not None
    monkeypatch.setattr(claims.Owner, "ended", property(lambda self: self.attempt == 1))
    monkeypatch.setattr(claims, "TIMEOUT_S", -1.0)
    claim._held.done.set()
    assert fill(shards) == list(range(1, 8))
    assert tiny_cache.folder_bytes(shards.folder) == whole


def test_what_a_stopped_process_wrote_and_did_not_mark_is_kept(
    shards: SharedShards, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "SYNC_EVERY_S", 60.0)
    child = in_child(lambda: fill(shards, pause=60))
    part = shards.parts[0]
    wait_for_first_digest(part.path)
    os.kill(child, signal.SIGSTOP)
    inode = part.path.stat().st_ino
    assert sorted(fill(shards)) == list(range(1, 8))
    assert part.path.stat().st_ino != inode, "a copy"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert tiny_cache.folder_bytes(shards.folder) == whole


def test_a_damaged_shard_is_made_again_with_its_intact_sequences(
    shards: SharedShards, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(shards)
    path = shards.parts[1].path
    path.write_bytes(b"\x00" * 100 + path.read_bytes()[100:])
    again = SharedShards(shards.folder, TRUTH.header, TRUTH.index)
    assert fill(again) == [], "its sequences were intact"
    assert f"{path.name} was damaged" in capsys.readouterr().out
    assert tiny_cache.folder_bytes(shards.folder) == whole


def test_a_shard_that_is_removed_meanwhile_is_an_error(shards: SharedShards) -> None:
    shards.parts[2].path.unlink()
    with pytest.raises(CacheError, match=r"shard-00002.* was removed"):
        fill(shards)


def test_a_claim_on_the_whole_cache_waits_for_every_shard(shards: SharedShards) -> None:
    claim = try_claim(shards.folder, shards.parts[3].path.name)
    assert claim is not None
    with pytest.raises(BusyError, match="is being written by"), whole_cache(shards.folder, wait=False):
        pass
    claim.release()
    with whole_cache(shards.folder, wait=False) as held:
        held.check(shards.parts[0].path.name)
        for unit in (CACHE, *(part.path.name for part in shards.parts)):
            assert try_claim(shards.folder, unit) is None


def test_ctrl_c_ends_the_wait_for_other_processes(shards: SharedShards) -> None:
    held: list[Any] = [try_claim(shards.folder, part.path.name) for part in shards.parts]

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(unfinished(shards, interrupt))
    for claim in held:
        claim.release()


def test_a_copied_cache_folder_has_no_claims(shards: SharedShards, tmp_path: Path) -> None:
    with whole_cache(shards.folder):
        shutil.copytree(shards.folder, tmp_path / "copy")
    assert not any(path.is_dir() for path in (tmp_path / "copy").iterdir())
