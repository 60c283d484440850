"""Several processes fill one cache; some are killed or stopped. It also works where file locks do nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import crowd
import kills
import pytest
import tiny

from kr2cache.cache.writer import PackedStates, ShardWriter
from kr2cache.store import sharing
from kr2cache.system import claims

NO_LOCKS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
int flock(int file, int how) { return 0; }
int lockf(int file, int how, off_t size) { return 0; }
int lockf64(int file, int how, off64_t size) { return 0; }
static int control(const char *name, int file, int what, void *with) {
    if (what == F_SETLK || what == F_SETLKW || what == F_OFD_SETLK || what == F_OFD_SETLKW) return 0;
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(file, what, with);
}
int fcntl(int file, int what, ...) {
    va_list rest; va_start(rest, what); void *with = va_arg(rest, void *); va_end(rest);
    return control("fcntl", file, what, with);
}
int fcntl64(int file, int what, ...) {
    va_list rest; va_start(rest, what); void *with = va_arg(rest, void *); va_end(rest);
    return control("fcntl64", file, what, with);
}
"""


def test_kills_and_stops_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    report = crowd.run(2, tmp_path, seed=2)
    assert report.faults == []
    assert report.kills >= 2


@pytest.mark.long
def test_many_kills_and_stops_change_no_byte(tmp_path: Path) -> None:
    """The script kills 200."""
    report = crowd.run(20, tmp_path, seed=1)
    assert report.faults == []
    assert report.taken_over > 0
    assert 0 < report.lost_most <= crowd.LOST_AT_ONCE, "some processes were killed before their states were written"


def late_marks(patch: pytest.MonkeyPatch) -> None:
    """Nobody asks whether the claim is still held, and a late holder has the file of its successor open."""
    patch.setattr(sharing.HeldShard, "_check_held", lambda held: None)
    patch.setattr(claims.Claim, "earlier_may_live", False)


def given_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sharing, "try_claim", lambda place, unit: claims.try_claim(place, f"{unit}-{os.getpid()}"))


def marked_early(patch: pytest.MonkeyPatch) -> None:
    write = ShardWriter._write

    def too_early(writer: ShardWriter, states: PackedStates) -> None:
        for position in states.sequences:
            os.pwrite(writer._file, b"\x01", writer.shard.array_offset("examples/complete") + position - writer.first)
        write(writer, states)

    patch.setattr(ShardWriter, "_write", too_early)


def not_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardWriter, "keep_written", lambda writer: None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("broken", "seen_in"),
    [(late_marks, "wrong"), (given_twice, "twice"), (marked_early, "wrong"), (not_kept, "wasted")],
)
def test_a_fault_of_the_code_is_seen(
    broken: Callable[[pytest.MonkeyPatch], None], seen_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    report = crowd.run(60, tmp_path, seed=3)
    assert getattr(report, seen_in), report.faults


@pytest.fixture
def no_locks(tmp_path: Path) -> Path:
    """A library to preload: with it, every file lock succeeds and does nothing."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs cc and Linux")
    library = tmp_path / "no_locks.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"], input=NO_LOCKS.encode(), check=True
    )
    return library


def test_two_processes_share_a_cache_without_file_locks(
    tmp_path: Path, bert: Path, forked_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a file lock was asked for")

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, refuse)
    assert_two_make_the_files_of_one(tmp_path, bert)


LOCKED_TWICE = "import fcntl; a, b = open('x', 'w'), open('x', 'w'); [fcntl.flock(f, 6) for f in (a, b)]"
WITHOUT_LOCKS = f"""
import subprocess, sys
from pathlib import Path
from forking import ForkedPython
from test_crowd import assert_two_make_the_files_of_one
{LOCKED_TWICE}
subprocess.Popen = ForkedPython
assert_two_make_the_files_of_one(Path.cwd(), Path(sys.argv[1]))
"""
"""A program that forks the others, which have its preloaded library too."""


@pytest.mark.long
def test_two_processes_share_a_cache_where_file_locks_do_nothing(tmp_path: Path, no_locks: Path, bert: Path) -> None:
    assert subprocess.run([sys.executable, "-c", LOCKED_TWICE], cwd=tmp_path, check=False).returncode != 0
    environment = os.environ | {"LD_PRELOAD": str(no_locks), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WITHOUT_LOCKS, str(bert)], cwd=tmp_path, check=True, env=environment)


def assert_two_make_the_files_of_one(tmp_path: Path, bert: Path) -> None:
    """Two processes that start at once make together the files that one process makes."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.conllu").write_text(tiny.conllu(tiny.sentences(400)), "utf-8")

    def start(cache_dir: Path) -> subprocess.Popen[str]:
        arguments = ["extract", "--resource", str(bert), "--data", str(tmp_path / "corpus"), "--task", "udpos"]
        arguments += ["--split", "train", "--device", "cpu", "--shard-gb", "0.0003", "--cache-dir", str(cache_dir)]
        command = [sys.executable, "-m", "kr2cache.cli", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    made = {}
    for name, count in (("one", 1), ("two", 2)):
        processes = [start(tmp_path / name) for _ in range(count)]
        said = [process.communicate(timeout=kills.PATIENCE_S)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, said
        (folder,) = {path.parent for path in (tmp_path / name).rglob("*.h5")}
        made[name] = kills.files_of(folder)
        assert not list(folder.parent.rglob(".*claims"))
    assert len(made["one"]) > 3
    assert made["two"] == made["one"]
