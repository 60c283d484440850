"""A cache is never wrong if its extraction is killed at random moments; and the check itself finds faults."""

from __future__ import annotations

import mmap
import os
import random
import time
from pathlib import Path
from typing import Any

import h5py
import kills
import pytest
import tiny

from kr2cache.cache.writer import PackedStates, ShardWriter

FLOAT16, TAKEN_OVER = kills.CASES[0], kills.CASES[-1]


@pytest.mark.long
def test_after_kills_at_random_moments_nothing_is_lost_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    while_writing = 0
    for seed in range(1, 9):  # on a busy machine, few kills of a round come while states are written
        (tmp_path / str(seed)).mkdir()
        report = kills.run(25, tmp_path / str(seed), seed=seed, cases=(FLOAT16, TAKEN_OVER))
        assert report.faults == []
        assert report.kills == 25 == sum(report.phases.values())
        assert report.extractions >= report.caches == 2
        assert report.phases[kills.Phase.WRITING] < 25, "some come in other phases"
        while_writing += report.phases[kills.Phase.WRITING]
        if while_writing >= 5:
            break
    assert while_writing >= 5


# The check finds faults -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny-bert", layers=3, width=32)


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[kills.Whole, dict[str, bytes]]:
    """An uninterrupted cache; and the files of a cache whose extraction was killed when part of it was complete."""
    folder = tmp_path_factory.mktemp("killed")
    victim, report, now = kills.Victim(FLOAT16, model, folder), kills.Report(), mmap.mmap(-1, 1)
    cache = victim.place(folder / "cut")
    victim.pause *= 5  # so that it does not finish before it is killed
    child = victim.start(folder / "cut", now)
    deadline = time.monotonic() + kills.PATIENCE_S
    while True:
        paths = list(cache.glob("shard-*.h5"))
        if paths and any(kills.read_whole(path)[0]["examples/complete"].any() for path in paths):
            break
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert kills.killed(child) < 0
    now.close()
    marked = kills.check(cache, victim.whole, set(), report)
    assert report.faults == []
    assert 0 < len(marked) < FLOAT16.sequences
    return victim.whole, kills.files_of(cache)


@pytest.fixture
def cut(killed: tuple[kills.Whole, dict[str, bytes]], tmp_path: Path) -> Path:
    """A copy of the cache of the killed extraction; the path of its only shard."""
    for name, content in killed[1].items():
        (tmp_path / name).write_bytes(content)
    (shard,) = tmp_path.glob("shard-*.h5")
    return shard


def test_a_changed_byte_of_a_complete_sequence_is_wrong(
    killed: tuple[kills.Whole, dict[str, bytes]], cut: Path
) -> None:
    with h5py.File(cut, "r") as file:
        done = int(file["examples/complete"][...].argmax())
        at = file["hidden"].id.get_chunk_info(0).byte_offset + int(file["examples/first_row"][done]) * 32 * 2
    with cut.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    report = kills.Report()
    kills.check(cut.parent, killed[0], set(), report)
    assert f"s{done} is marked complete, but differs from the uninterrupted cache" in report.wrong[0]
    assert report.faults == report.wrong[:1]


def test_an_additional_mark_and_a_missing_mark_are_wrong(
    killed: tuple[kills.Whole, dict[str, bytes]], cut: Path
) -> None:
    with h5py.File(cut, "r+") as file:
        marks = file["examples/complete"][...]
        done, undone = int(marks.argmax()), int(marks.argmin())
        marks[[done, undone]] = 0, 1
        file["examples/complete"][...] = marks
    report = kills.Report()
    kills.check(cut.parent, killed[0], {f"s{done}"}, report)
    assert any(f"s{undone} is marked complete, but differs" in fault for fault in report.wrong)
    assert any(f"s{done} is not complete any more" in fault for fault in report.wrong)


def test_a_changed_index_is_wrong(killed: tuple[kills.Whole, dict[str, bytes]], cut: Path) -> None:
    with h5py.File(cut, "r+") as file:
        file["tokens/word_index"][0] += 1
    report = kills.Report()
    kills.check(cut.parent, killed[0], set(), report)
    assert "its index or its attributes differ" in report.wrong[0]


def test_a_truncated_file_is_unreadable_and_refused(killed: tuple[kills.Whole, dict[str, bytes]], cut: Path) -> None:
    os.truncate(cut, cut.stat().st_size // 2)
    report = kills.Report()
    kills.check(cut.parent, killed[0], set(), report)
    assert len(report.unreadable) == 1
    assert len(report.refused) == 1, "no shard is missing, so the cache should open"


def test_a_cache_may_be_refused_while_shards_are_missing(
    killed: tuple[kills.Whole, dict[str, bytes]], tmp_path: Path
) -> None:
    report = kills.Report()
    assert kills.check(tmp_path / "nothing", killed[0], set(), report) == set()
    (tmp_path / "empty").mkdir()
    assert kills.check(tmp_path / "empty", killed[0], set(), report) == set()
    assert report.faults == []


@pytest.mark.long
def test_a_writer_that_marks_before_it_writes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ShardWriter._write

    def too_early(self: ShardWriter, states: PackedStates) -> None:
        for position in states.sequences:
            os.pwrite(self._file, b"\x01", self.shard.array_offset("examples/complete") + position - self.first)
        time.sleep(0.02)  # long enough that some kills come now, even on a busy machine
        original(self, states)

    monkeypatch.setattr(ShardWriter, "_write", too_early)
    for seed in range(1, 9):  # as above
        (tmp_path / str(seed)).mkdir()
        report = kills.run(8, tmp_path / str(seed), seed=seed, cases=(FLOAT16,))
        if report.wrong:
            break
    assert report.wrong
    assert report.different, "sequences that were marked too early are never written"
    assert report.unreadable == []


def test_an_extraction_that_fails_by_itself_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, report = kills.Victim(FLOAT16, model, tmp_path), kills.Report()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ShardWriter, "_write", fail)
    victim.kill_until_done(report, 0, random.Random(0))
    assert report.kills == 0
    assert "ZeroDivisionError" in report.failed[0]
