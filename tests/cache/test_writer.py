"""Whatever stops the writer, what is marked complete is right, and going on gives the same bytes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import LIMITED, run_python, traced

from kr2cache.cache import writer as writer_module
from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError, DiskSpaceError, KR2CacheError

HERE = Path(__file__).parent

# Writes a cache, and kills itself without warning at the Nth write, half of which reaches the file.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_cache
from kr2cache.cache import create, writer

left = int(sys.argv[3])
pwrite = os.pwrite

def dying_pwrite(descriptor, data, offset):
    global left
    left -= 1
    if left == 0:
        pwrite(descriptor, memoryview(data)[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(descriptor, data, offset)

truth = tiny_cache.make((3, 1, 5, 2, 4, 6), dtype=sys.argv[4], width=5)
tiny_cache.create_shards(Path(sys.argv[2]), truth.header, truth.index, 400)
os.pwrite = dying_pwrite
writer.SYNC_EVERY_S = 0.0
tiny_cache.store(Path(sys.argv[2]), truth, shard_bytes=400, positions=(4, 2, 5, 0, 3, 1))
"""


def assert_valid_hdf5(folder: Path) -> None:
    for path in tiny_cache.shards(folder):
        with h5py.File(path, "r") as file:
            for name in tiny_cache.DATASETS:
                file[name][...]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("at", [1, 5, 16])
def test_a_writer_killed_in_the_middle_leaves_only_right_sequences(tmp_path: Path, at: int, dtype: str) -> None:
    truth = tiny_cache.make((3, 1, 5, 2, 4, 6), dtype=dtype, width=5)
    whole = tiny_cache.store(tmp_path / "whole", truth, shard_bytes=400)
    folder = tmp_path / "killed"

    done = run_python(KILLED, HERE, folder, at, dtype)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(tiny_cache.shards(folder)) > 1
    assert_valid_hdf5(folder)
    marked = tiny_cache.marked_sequences(folder, truth)
    writes = 2 if dtype == "float16" else 3  # of a sequence: states, scales, checksum; then one mark each
    assert len(marked) <= (at - 1) // (writes + 1)
    cache = FeatureCache.open(folder)
    assert cache.ids == [truth.ids[i] for i in marked]
    for i in marked:
        np.testing.assert_array_equal(cache[truth.ids[i]], truth.states(i))

    tiny_cache.write(folder, truth, [i for i in range(6) if i not in marked])
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(whole)


def test_a_writer_killed_from_outside_leaves_only_right_sequences(tmp_path: Path) -> None:
    truth = tiny_cache.make((5,) * 300, width=64)
    folder = tmp_path / "cache"
    program = (
        "import sys, time\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "import tiny_cache\nfrom kr2cache.cache import create, writer\n"
        "writer.SYNC_EVERY_S = 0.01\n"
        "truth = tiny_cache.make((5,) * 300, width=64)\n"
        "tiny_cache.create_shards(Path(sys.argv[2]), truth.header, truth.index, 2**20)\n"
        "with tiny_cache.FolderWriter(Path(sys.argv[2])) as out:\n"
        "    for number, batch in enumerate(tiny_cache.batches(truth, out, range(300))):\n"
        "        out.write(batch)\n"
        "        time.sleep(0.002 if number < 100 else 0.05)\n"
        "        if number == 100:\n"
        "            print('on the way', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(HERE), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on the way\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    marked = tiny_cache.marked_sequences(folder, truth)
    assert 0 < len(marked) < 300
    tiny_cache.write(folder, truth, [i for i in range(300) if i not in marked])
    whole = tiny_cache.store(tmp_path / "whole", truth, shard_bytes=2**20)
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(whole)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("sync_every_s", [0.0, 100.0])
def test_a_sequence_is_marked_only_after_its_bytes_were_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, sync_every_s: float
) -> None:
    truth = tiny_cache.make((3, 1, 5, 2), dtype=dtype)
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 60)
    assert len(tiny_cache.shards(folder)) > 1
    mark_at = {path.name: tiny_cache.byte_offset(path, "examples/complete") for path in tiny_cache.shards(folder)}
    checksum_at = {path.name: tiny_cache.byte_offset(path, "examples/xxh3") for path in tiny_cache.shards(folder)}
    count = len(truth.ids)
    monkeypatch.setattr(writer_module, "SYNC_EVERY_S", sync_every_s)
    names: dict[int, str] = {}
    with tiny_cache.FolderWriter(folder) as out:
        for entry in Path("/proc/self/fd").iterdir():
            target = entry.resolve()
            if target.parent == folder.resolve() and target.suffix == ".h5" and os.access(entry, os.W_OK):
                names[int(entry.name)] = target.name
        calls = traced(monkeypatch, "pwrite", "fdatasync", "fsync")
        for batch in tiny_cache.batches(truth, out, (2, 0, 3, 1)):
            out.write(batch)

    # A checksum is the last that is written of a sequence. While one thread syncs, another may write what comes next.
    written: dict[str, set[int]] = {shard: set() for shard in mark_at}
    synced: dict[str, set[int]] = {shard: set() for shard in mark_at}
    marks = 0
    for name, descriptor, *rest in calls:
        shard = names[descriptor]
        if name != "pwrite":
            synced[shard] |= written[shard]
        elif mark_at[shard] <= rest[1] < mark_at[shard] + count:
            assert rest[0] == b"\x01"
            assert rest[1] - mark_at[shard] in synced[shard], "marked before its bytes were on disk"
            marks += 1
        elif checksum_at[shard] <= rest[1] < checksum_at[shard] + 8 * count:
            written[shard].add((rest[1] - checksum_at[shard]) // 8)
    assert marks == 4
    assert calls[-1][0] != "pwrite", "the marks themselves are synced too"
    assert tiny_cache.marked_sequences(folder, truth) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_was_written_and_not_marked_is_kept_if_it_matches_its_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    truth = tiny_cache.make((3, 1, 5, 2, 4), dtype=dtype)
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 60)
    with monkeypatch.context() as patch:  # as if killed before the sync
        patch.setattr(writer_module.ShardWriter, "_mark", lambda writer, unmarked: None)
        tiny_cache.write(folder, truth, [0, 1, 2, 3])
    assert tiny_cache.marked_sequences(folder, truth) == []
    path = tiny_cache.shards(folder)[-2]  # of sequence 3 only one half arrived
    content = bytearray(path.read_bytes())
    content[tiny_cache.byte_offset(path, "hidden_scale" if dtype == "int8" else "hidden") + 1] ^= 1
    path.write_bytes(content)

    with tiny_cache.FolderWriter(folder) as out:
        calls = traced(monkeypatch, "pwrite", "fdatasync")
        for shard in out.shards:
            shard.keep_written()
    assert sum(shard.kept for shard in out.shards) == 3
    assert tiny_cache.marked_sequences(folder, truth) == [0, 1, 2]
    written = sum(len(memoryview(data).cast("B")) for name, _, *rest in calls if name == "pwrite" for data in rest[:1])
    sequence = truth.header.stored.row_bytes(truth.header.width) * len(truth.header.layers)
    assert written == sequence * (3 + 1 + 5) + 3 * 9, "written once more, with checksum and mark"
    tiny_cache.write(folder, truth, [3, 4])
    assert tiny_cache.marked_sequences(folder, truth) == [0, 1, 2, 3, 4]


def test_a_sync_that_failed_once_is_not_taken_back_by_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fdatasync the kernel has dropped the pages; the next one says nothing of them."""
    truth = tiny_cache.make()
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 2**30)
    monkeypatch.setattr(writer_module, "SYNC_EVERY_S", 0.0)
    real, failing, go_on = os.fdatasync, threading.Event(), threading.Event()

    def fdatasync(descriptor: int) -> None:
        if not failing.is_set():
            failing.set()
            assert go_on.wait(10)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(OSError, match="Input/output error"), tiny_cache.FolderWriter(folder) as out:
        first, second = tiny_cache.batches(truth, out, [0, 1])
        out.write(first)
        assert failing.wait(10)
        out.write(second)  # the sync that fails may lose this as well
        while out.shards[0]._states.qsize() or not out.shards[0]._written.qsize():
            time.sleep(0.001)
        go_on.set()
    assert tiny_cache.marked_sequences(folder, truth) == []


def test_a_disk_that_fills_while_writing_keeps_what_is_complete(tmp_path: Path) -> None:
    truth = tiny_cache.make((40, 60, 50), width=64)
    folder = tmp_path / "cache"
    probe = tiny_cache.store(tmp_path / "whole", truth)
    # The states of the first sequence fit; whether its mark does depends on where the index lies.
    limit = tiny_cache.byte_offset(tiny_cache.shards(probe)[0], "hidden") + 40 * 3 * 64 * 2
    done = run_python(LIMITED, HERE, folder, limit, "created")
    assert done.stdout.startswith("DiskSpaceError"), done.stderr
    assert_valid_hdf5(folder)
    marked = tiny_cache.marked_sequences(folder, truth)
    assert marked in ([], [0])
    tiny_cache.write(folder, truth, [i for i in range(3) if i not in marked])
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(probe)


def test_a_full_disk_stops_the_writer_and_keeps_what_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = tiny_cache.make((3, 1, 5, 2))
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 2**30)
    (path,) = tiny_cache.shards(folder)
    third = tiny_cache.byte_offset(path, "hidden") + (3 + 1) * 3 * 8
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if offset == third:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskSpaceError, match="what is complete is kept"):
            tiny_cache.write(folder, truth)
    assert tiny_cache.marked_sequences(folder, truth) == [0, 1]


def test_a_full_disk_is_said_in_our_words_however_soon_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the writer's thread finds the words, the model's thread hands over the next batch."""
    truth = tiny_cache.make((3, 1, 5, 2))
    tiny_cache.create_shards(tmp_path, truth.header, truth.index, 2**30)
    explain, asked = writer_module.disk_error, threading.Event()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def slowly(error: OSError, path: Path, needed: int) -> Exception:
        asked.set()
        time.sleep(0.3)
        return explain(error, path, needed)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(writer_module, "disk_error", slowly)
    with pytest.raises(DiskSpaceError, match="what is complete is kept"), tiny_cache.FolderWriter(tmp_path) as writer:
        for batch in tiny_cache.batches(truth, writer, range(4)):
            writer.write(batch)
            assert asked.wait(10)


def test_a_write_that_the_system_cuts_short_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    whole = tiny_cache.store(tmp_path / "whole", tiny_cache.make(dtype="int8"))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, bytes(data)[:7], offset))
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make(dtype="int8"))
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(whole)


# Ordinary use ----------------------------------------------------------------------------------------------------


def test_an_error_of_the_caller_keeps_what_was_handed_over_and_is_not_hidden(tmp_path: Path) -> None:
    truth = tiny_cache.make()
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 2**30)
    with pytest.raises(ZeroDivisionError), tiny_cache.FolderWriter(folder) as out:
        for batch in tiny_cache.batches(truth, out, [3, 0]):
            out.write(batch)
        raise ZeroDivisionError
    assert tiny_cache.marked_sequences(folder, truth) == [0, 3]
    with tiny_cache.FolderWriter(folder) as out:
        assert out.shards[0].unfinished.tolist() == [False, True, True, False]


def test_the_writer_counts_its_bytes_and_leaves_no_thread_or_file_open(tmp_path: Path) -> None:
    truth = tiny_cache.make(dtype="int8")
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 60)
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    with tiny_cache.FolderWriter(folder) as out:
        for batch in tiny_cache.batches(truth, out, range(4)):
            out.write(batch)
    assert out.bytes_written == 3 * 11 * (4 + 4) + 4 * 8  # values and scales of 11 tokens, 4 checksums
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == (threads, files)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone has it")
def test_the_writing_thread_takes_no_core_from_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = tiny_cache.make()
    tiny_cache.create_shards(tmp_path / "cache", truth.header, truth.index, 60)
    before = os.sched_getscheduler(0)
    policies = []
    whole = writer_module.write_whole

    def write_whole(*arguments: Any) -> int:
        policies.append(os.sched_getscheduler(threading.get_native_id()))
        return whole(*arguments)

    monkeypatch.setattr(writer_module, "write_whole", write_whole)
    with tiny_cache.FolderWriter(tmp_path / "cache") as out:
        for batch in tiny_cache.batches(truth, out, range(4)):
            out.write(batch)
    assert set(policies) == {os.SCHED_BATCH if before == os.SCHED_OTHER else before}
    assert os.sched_getscheduler(0) == before, "the model's thread stays as it was"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_complete_is_never_written_again(tmp_path: Path, dtype: str) -> None:
    """Its batch may run again for a mate's sake, on another device with other last bits, while someone reads it."""
    truth, other = tiny_cache.make(dtype=dtype), tiny_cache.make(dtype=dtype, seed=1)
    folder = tiny_cache.store(tmp_path / "cache", truth, positions=[0, 2])
    other.input_id, other.word_index = truth.input_id, truth.word_index
    tiny_cache.write(folder, other, [2, 0, 1, 3], at_once=4)
    cache = FeatureCache.open(folder)
    for i, expected in enumerate((truth, other, truth, other)):
        np.testing.assert_array_equal(cache[f"s{i}"], expected.states(i))


def test_a_file_that_another_tool_rewrote_is_not_written_in_place(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make(), positions=[0])
    (path,) = tiny_cache.shards(folder)
    with h5py.File(path, "r+") as file:
        states = file["hidden"][...]
        del file["hidden"]
        file.create_dataset("hidden", data=states, chunks=(5, 4), compression="gzip")
    before = path.read_bytes()
    with pytest.raises(CacheError, match=f"{path.name} was rewritten by another tool"):
        tiny_cache.FolderWriter(folder)
    assert path.read_bytes() == before


@given(data=st.data(), at_once=st.integers(1, 4), dtype=st.sampled_from(tiny_cache.DTYPES))
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bytes_do_not_depend_on_the_order_nor_on_interruptions(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, at_once: int, dtype: str
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    truth = tiny_cache.make(lengths, dtype=dtype)
    shard_bytes = data.draw(st.integers(1, 2000))
    whole = tiny_cache.store(tmp_path_factory.mktemp("whole"), truth, shard_bytes=shard_bytes)
    order = data.draw(st.permutations(range(len(lengths))))
    stop = data.draw(st.integers(0, len(order)))
    folder = tmp_path_factory.mktemp("parts")
    tiny_cache.store(folder, truth, shard_bytes=shard_bytes, positions=order[:stop], at_once=at_once)
    assert tiny_cache.marked_sequences(folder, truth) == sorted(order[:stop])
    tiny_cache.store(folder, truth, shard_bytes=shard_bytes, positions=order[stop:], at_once=at_once)
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(whole)


def test_memory_is_bounded_when_the_disk_is_slower_than_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = tiny_cache.make((1,) * 20)
    folder = tmp_path / "cache"
    tiny_cache.create_shards(folder, truth.header, truth.index, 2**30)
    go_on, real = threading.Event(), os.pwrite

    def stuck(descriptor: int, data: bytes, offset: int) -> int:
        assert go_on.wait(20)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", stuck)
    handed_over: list[int] = []
    with tiny_cache.FolderWriter(folder) as out:

        def hand_over() -> None:
            for number, batch in enumerate(tiny_cache.batches(truth, out, range(20))):
                out.write(batch)
                handed_over.append(number)

        model = threading.Thread(target=hand_over)
        model.start()
        model.join(0.5)
        waiting = len(handed_over)
        go_on.set()
        model.join()
    assert 0 < waiting <= writer_module.PENDING_BATCHES + 1  # those that wait, and the one being written
    assert tiny_cache.marked_sequences(folder, truth) == list(range(20))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    truth = tiny_cache.make()
    with pytest.raises((KR2CacheError, PermissionError), match="cache"):
        tiny_cache.create_shards(tmp_path / "cache", truth.header, truth.index, 2**30)
