"""A disk that is really full, and Ctrl-C twice: the error is clear, nothing is lost, and the same bytes come out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import kills
import pytest
import tiny

from kr2cache import cli
from kr2cache.cache import writer
from kr2cache.cache.writer import ShardWriter
from kr2cache.errors import DiskSpaceError
from kr2cache.extraction import extract, trial
from kr2cache.store import sharing

ONE_SHARD = kills.Case("float16", 60, {"dtype": "float16"})
SMALL_SHARDS = kills.Case("int8 in small shards", 60, {"dtype": "int8", "shard_gb": 40_000 / 2**30})
MANY_BATCHES = kills.Case("float16", 600, {"dtype": "float16", "tokens_per_batch": 24})
SOON_FULL = kills.Case("float16", 1000, {"dtype": "float16", "tokens_per_batch": 1024, "shard_gb": 1e6 / 2**30})
"""So many states that they, and not the index, decide whether a shard fits."""


@pytest.fixture(scope="module", params=[ONE_SHARD, SMALL_SHARDS], ids=["one shard", "small shards"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> kills.Victim:
    """A cache that was made on a disk with enough space."""
    return victim_of(request.param, tmp_path_factory.mktemp("victim"))


def victim_of(case: kills.Case, folder: Path) -> kills.Victim:
    return kills.Victim(case, tiny.save_model(folder / "tiny-bert", layers=3, width=32), folder)


@dataclass(frozen=True)
class SmallDisk:
    """A small file system of its own."""

    folder: Path

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def fill(self, leave: int) -> None:
        """Fill the disk, and leave at most ``leave`` bytes free."""
        with self.ballast.open("wb") as file:
            file.write(bytes(max(0, self.free - leave)))
        assert self.free <= leave

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], SmallDisk]]:
    """A function that mounts a disk of ``size`` bytes, in memory. The test is skipped if mounting is not allowed."""
    mounted: list[Path] = []

    def mount(size: int) -> SmallDisk:
        if not sys.platform.startswith("linux"):
            pytest.skip("mounts only on Linux")
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
            pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
        mounted.append(folder)
        return SmallDisk(folder)

    yield mount
    for folder in mounted:
        detach = 2  # unmounts even if a file is still open
        assert ctypes.CDLL(None).umount2(os.fsencode(folder), detach) == 0


def plan_in(victim: kills.Victim, cache_dir: Path) -> extract.ExtractPlan:
    return replace(victim.plan, config=replace(victim.plan.config, cache_dir=cache_dir))


def extraction(victim: kills.Victim, cache_dir: Path, log: Path) -> tuple[int, str]:
    """Extract in a child process, because a signal may end it. Returns its exit code and the traceback of an error."""
    log.unlink(missing_ok=True)
    code = kills.ended(kills.forked(lambda: extract.extract(plan_in(victim, cache_dir)), log), kills.PATIENCE_S)
    assert code is not None, "the extraction hangs"
    return code, log.read_text("utf-8") if log.exists() else ""


def no_fallocate(*_: int) -> None:
    """Fails as it does on a file system that cannot reserve space."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def after(patch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[[], object]) -> None:
    """Call ``then`` each time after the function ``name`` of ``owner`` has returned."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        then()
        return result

    patch.setattr(owner, name, call)


def assert_completes(victim: kills.Victim, cache_dir: Path, log: Path) -> None:
    assert extraction(victim, cache_dir, log) == (0, "")
    assert kills.files_of(victim.place(cache_dir)) == victim.whole.files


def test_a_disk_that_is_too_small_is_an_error_before_the_model_is_loaded(
    victim: kills.Victim, small_disk: Callable[[int], SmallDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(victim.plan.state_bytes // 2)
    monkeypatch.setattr(trial, "open_resource", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(DiskSpaceError, match=f"{disk.folder} has .* free") as caught:
        extract.extract(plan_in(victim, disk.folder))
    assert "Free some space" in caught.value.remedy
    assert list(disk.folder.iterdir()) == []


@pytest.mark.parametrize("left", [0, 0.1, 0.6], ids=["nothing", "a tenth", "more than half"])
def test_a_disk_that_fills_before_space_is_reserved(
    victim: kills.Victim, small_disk: Callable[[int], SmallDisk], tmp_path: Path, left: float
) -> None:
    """There was enough space when it was checked, but none once the model was loaded."""
    disk, log = small_disk(2**20), tmp_path / "log"
    file_bytes = sum(map(len, victim.whole.files.values()))
    with pytest.MonkeyPatch.context() as patch:
        after(patch, trial, "open_resource", lambda: disk.fill(int(left * file_bytes)))
        code, said = extraction(victim, disk.folder, log)
    assert code == 1, said
    cache = victim.place(disk.folder)
    assert f"DiskSpaceError: No space left for {cache}/shard-" in said
    assert "Make room (or give another --cache-dir) and run the same command again" in said
    names = [name for name in disk.files() if name != "ballast"]
    assert names == list(victim.whole.files)[: len(names)], "only whole shards"
    assert len(names) < len(victim.whole.files)
    assert (len(names) > 0) == (len(victim.whole.files) > 1 and left > 0.5)
    kept = {path: path.stat().st_ino for path in cache.glob("*")}
    disk.ballast.unlink()
    assert_completes(victim, disk.folder, log)
    assert {path: path.stat().st_ino for path in kept} == kept, "shards that had their space were not made again"


@pytest.mark.parametrize("sparse_again", [True, False], ids=["sparse", "reserved"])
@pytest.mark.parametrize("left", [0.2, 0.7])
def test_a_disk_that_fills_while_states_are_written_to_a_sparse_file(
    victim: kills.Victim, small_disk: Callable[[int], SmallDisk], tmp_path: Path, left: float, sparse_again: bool
) -> None:
    """Some file systems cannot reserve space. There, any write may find a full disk."""
    disk, log, report = small_disk(2**20), tmp_path / "log", kills.Report()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_fallocate)
        with patch.context() as fills:
            after(fills, sharing.SharedShards, "create", lambda: disk.fill(int(left * victim.plan.state_bytes)))
            code, said = extraction(victim, disk.folder, log)
        assert code == 1, f"ended with {code}: {said}"
        cache = victim.place(disk.folder)
        assert f"DiskSpaceError: No space left for {cache}" in said
        assert "what is complete is kept" in said
        marked = kills.check(cache, victim.whole, set(), report)
        assert report.faults == []
        assert 0 < len(marked) < victim.case.sequences
        assert extraction(victim, disk.folder, log)[0] == 1, "the disk is still full"
        assert kills.check(cache, victim.whole, marked, report) >= marked
        assert report.faults == []
        disk.ballast.unlink()
        if sparse_again:
            assert_completes(victim, disk.folder, log)
    assert_completes(victim, disk.folder, log)


def test_a_limit_on_file_sizes_in_the_middle_of_a_file(
    victim: kills.Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This acts like a full disk, also where no disk can be mounted."""
    log, report, writes, marked_some = tmp_path / "log", kills.Report(), itertools.count(1), threading.Event()
    limit = max(map(len, victim.whole.files.values())) // 10

    def limit_files() -> None:
        """Set the limit after 12 writes and once some sequences are marked. When that is depends on the syncs."""
        if next(writes) == 12:
            assert marked_some.wait(kills.PATIENCE_S)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_fallocate)
        patch.setattr(writer, "SYNC_EVERY_S", 0.0)
        after(patch, ShardWriter, "_mark", marked_some.set)
        after(patch, ShardWriter, "_pwrite", limit_files)
        code, said = extraction(victim, tmp_path / "cache", log)
    assert code == 1, f"ended with {code}: {said}"
    assert "DiskSpaceError: No space left for" in said
    assert "what is complete is kept" in said
    cache = victim.place(tmp_path / "cache")
    marked = kills.check(cache, victim.whole, set(), report)
    assert report.faults == []
    assert 0 < len(marked) < victim.case.sequences
    assert_completes(victim, tmp_path / "cache", log)


def test_space_for_the_missing_shards_is_enough_to_continue(
    small_disk: Callable[[int], SmallDisk], tmp_path: Path
) -> None:
    victim, log = victim_of(SOON_FULL, tmp_path), tmp_path / "log"
    file_bytes = sum(map(len, victim.whole.files.values()))
    disk = small_disk(file_bytes + 300_000)
    with pytest.MonkeyPatch.context() as patch:
        after(patch, trial, "open_resource", lambda: disk.fill(int(0.6 * file_bytes)))
        code, said = extraction(victim, disk.folder, log)
    assert code == 1, said
    kept = list(victim.place(disk.folder).glob("shard-*.h5"))
    assert 1 < len(kept) < len(victim.whole.files)
    disk.ballast.unlink()
    assert_completes(victim, disk.folder, log)


def test_a_disk_that_fills_while_a_sparse_shard_is_made(
    small_disk: Callable[[int], SmallDisk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, log = victim_of(ONE_SHARD, tmp_path), tmp_path / "log"
    disk = small_disk(2**20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_fallocate)
        after(patch, trial, "open_resource", lambda: disk.fill(20_480))
        code, said = extraction(victim, disk.folder, log)
    assert disk.files() == ["ballast"]
    disk.ballast.unlink()
    assert_completes(victim, disk.folder, log)
    assert code == 1
    assert "DiskSpaceError: No space left for" in said


# Ctrl-C, twice --------------------------------------------------------------------------------------------------------


def interrupt_twice(child: int, gap: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGINT)
        time.sleep(gap)
        os.kill(child, signal.SIGINT)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + kills.PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.002)


@pytest.mark.long
def test_ctrl_c_twice_loses_nothing_at_any_moment(tmp_path: Path) -> None:
    """The second Ctrl-C does not wait for the end of a batch."""
    victim, log, draw = victim_of(MANY_BATCHES, tmp_path), tmp_path / "log", random.Random(0)
    now, report, codes = mmap.mmap(-1, 1), kills.Report(), []
    for number in range(6):
        cache_dir = tmp_path / f"cut-{number}"
        plan = plan_in(victim, cache_dir)

        def work(plan: extract.ExtractPlan = plan) -> None:
            kills.record_phases(now)
            writer.SYNC_EVERY_S = 0.01
            extract.extract(plan)

        now[0] = 0
        log.unlink(missing_ok=True)
        child = kills.forked(work, log)
        wait_for(lambda: kills.PHASES[now[0]] is kills.Phase.WRITING)
        time.sleep(draw.uniform(0, 0.2))
        interrupt_twice(child, draw.uniform(0, draw.choice((0.0005, 0.005, 0.05))))
        code = kills.ended(child, 20)
        if code is None:
            kills.killed(child)
            pytest.fail("Ctrl-C did not end the extraction")
        codes.append(code)
        if code != 0:
            said = log.read_text("utf-8").strip()
            assert "InterruptedWorkError: Interrupted" in said or said.endswith("KeyboardInterrupt"), said
        marked = kills.check(victim.place(cache_dir), victim.whole, set(), report)
        assert report.faults == []
        assert (len(marked) < victim.case.sequences) == (code != 0)
        assert_completes(victim, cache_dir, log)
    now.close()
    assert set(codes) <= {0, 1}
    assert 1 in codes


@pytest.mark.usefixtures("programs")
def test_the_command_after_ctrl_c_twice(workdir: Path, bert: Path) -> None:
    count = 1_500
    (workdir / "corpus").mkdir()
    (workdir / "corpus" / "train.conllu").write_text(tiny.conllu(tiny.sentences(count, longest=3)), "utf-8")
    arguments = ["extract", "--resource", str(bert), "--data", str(workdir / "corpus"), "--task", "udpos", "--json"]
    arguments += ["--split", "train", "--device", "cpu", "--tokens-per-batch", "24", "--cache-dir"]

    def whole(cache_dir: Path) -> dict[str, bytes]:
        """Run the command to its end, and return the files of the cache."""
        log = workdir / "log"
        assert kills.ended(kills.forked(lambda: finish([*arguments, str(cache_dir)]), log), kills.PATIENCE_S) == 0
        (folder,) = {path.parent for path in cache_dir.rglob("*.h5")}
        return kills.files_of(folder)

    def writing() -> bool:
        for path in (workdir / "cut" / "udpos" / "train").glob("tiny*/shard-*.h5"):
            with h5py.File(path, "r") as file:
                return bool(file["hidden"][:].any())
        return False

    with subprocess.Popen(
        [sys.executable, "-m", "kr2cache.cli", *arguments, str(workdir / "cut")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(lambda: process.poll() is not None or writing())
        interrupt_twice(process.pid, 0.01)
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # the second Ctrl-C came inside a lock and had no effect
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=10)
        finally:
            process.kill()
    # The second Ctrl-C may come after the output, while Python exits.
    assert process.returncode in (130, -signal.SIGINT), (out, err)
    if out:
        assert json.loads(out)["error"]["type"] == "InterruptedWorkError"
    (folder,) = {path.parent for path in (workdir / "cut").rglob("*.h5")}
    assert not list(folder.glob("*.partial"))
    uninterrupted = whole(workdir / "whole")
    (reference,) = {path.parent for path in (workdir / "whole").rglob("*.h5")}
    report = kills.Report()
    marked = kills.check(folder, kills.Whole(reference), set(), report)
    assert report.faults == []
    assert len(marked) < count
    assert whole(workdir / "cut") == uninterrupted


def finish(arguments: list[str]) -> None:
    if code := cli.run(arguments):
        raise RuntimeError(f"exit code {code}")
