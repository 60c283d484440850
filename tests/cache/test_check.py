"""Checking a cache names what is damaged, and nothing else; reading can check for itself."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kr2cache import FeatureCache
from kr2cache.cache import check
from kr2cache.cache.check import CacheCheck, check_cache
from kr2cache.errors import CacheError

LENGTHS = (3, 1, 5, 2, 8, 4, 1, 6)
IDS = ["ä-1", "b", "c#0", "c#1", "日本", "f", "g", "h"]


@pytest.fixture(params=tiny_cache.DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def stored(folder: Path, dtype: str = "float16", *, several: bool = False, **more: Any) -> Path:
    truth = tiny_cache.make(LENGTHS, dtype=dtype, ids=IDS)
    tiny_cache.store(folder, truth, shard_bytes=200 if several else 2**34, **more)
    assert (len(tiny_cache.shards(folder)) > 2) is several
    return folder


def flip(path: Path, *offsets: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= bit
    path.write_bytes(content)


def place_of(folder: Path, name: str, sequence: int) -> tuple[Path, int, int]:
    """(shard, offset, bytes) of one sequence's part of a data set, from HDF5."""
    first = 0
    for path in tiny_cache.shards(folder):
        with h5py.File(path, "r") as file:
            count, rows = len(file["examples/id"]), file["examples/first_row"][...].tolist()
            width = file["hidden"].shape[1] * file["hidden"].dtype.itemsize
        if sequence < first + count:
            local = sequence - first
            begin, end = rows[local], rows[local + 1]
            at = tiny_cache.byte_offset(path, name)
            if name == "hidden":
                return path, at + begin * width, (end - begin) * width
            if name == "hidden_scale":
                return path, at + 4 * begin, 4 * (end - begin)
            size = {"examples/xxh3": 8, "examples/complete": 1}[name]
            return path, at + size * local, size
        first += count
    raise IndexError(sequence)


def found_in(check_: CacheCheck) -> dict[str, Any]:
    """All that a check can say, but numbers and time."""
    return {
        "damaged": check_.damaged_ids,
        "incomplete": check_.incomplete_ids,
        "index": [shard.path.name for shard in check_.shards if shard.index_damaged],
        "structure": [shard.path.name for shard in check_.shards if shard.structure_damaged],
        "unreadable": [shard.path.name for shard in check_.shards if shard.unreadable],
        "faults": check_.faults,
    }


NOTHING: dict[str, Any] = {
    "damaged": [],
    "incomplete": [],
    "index": [],
    "structure": [],
    "unreadable": [],
    "faults": [],
}


def assert_finds(folder: Path, **what: Any) -> CacheCheck:
    found = check_cache(folder)
    assert found_in(found) == NOTHING | what
    assert found.intact is not bool(set(what) - {"incomplete"})
    return found


# What is sound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one-shard", "several-shards"])
def test_a_sound_cache_is_sound(folder: Path, dtype: str, several: bool) -> None:
    read: list[int] = []
    found = check_cache(stored(folder, dtype, several=several), read.append)
    assert found_in(found) == NOTHING
    assert found.intact
    assert (found.folder, found.sequences) == (folder, 8)
    assert found.bytes == sum(read) == FeatureCache.open(folder).stored_bytes
    assert [shard.path for shard in found.shards] == tiny_cache.shards(folder)
    assert [name for shard in found.shards for name in shard.ids] == IDS
    assert not any(shard.needs_rebuild for shard in found.shards)


def test_a_folder_without_a_cache_is_refused(folder: Path) -> None:
    folder.mkdir()
    for place in (folder, folder / "nowhere"):
        with pytest.raises(CacheError, match=str(place)):
            check_cache(place)


def test_checking_changes_nothing(folder: Path, dtype: str) -> None:
    stored(folder, dtype, several=True, positions=[0, 1, 5])
    before = tiny_cache.folder_bytes(folder)
    check_cache(folder)
    assert tiny_cache.folder_bytes(folder) == before


# Sequences -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    stored_dtype=st.sampled_from(tiny_cache.DTYPES),
    several=st.booleans(),
    hurt=st.sets(st.integers(0, 7), max_size=8),
    block=st.sampled_from([1, 100, 500, 2**25]),
)
def test_exactly_the_damaged_sequences_are_named(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    stored_dtype: str,
    several: bool,
    hurt: set[int],
    block: int,
) -> None:
    """However the sequences are read together."""
    monkeypatch.setattr(check, "BLOCK_BYTES", block)
    folder = stored(tmp_path_factory.mktemp("check") / "cache", stored_dtype, several=several)
    names = ["hidden", "examples/xxh3", *(["hidden_scale"] if stored_dtype == "int8" else [])]
    for sequence in hurt:
        path, at, size = place_of(folder, data.draw(st.sampled_from(names)), sequence)
        flip(path, at + data.draw(st.integers(0, size - 1)), bit=1 << data.draw(st.integers(0, 7)))
    found = check_cache(folder)
    assert found_in(found) == NOTHING | {"damaged": [IDS[i] for i in sorted(hurt)]}
    assert found.bytes == FeatureCache.open(folder).stored_bytes


@pytest.mark.parametrize("at", ["first", "last"])
def test_the_scales_of_int8_are_checked(folder: Path, at: str) -> None:
    stored(folder, "int8")
    path, offset, size = place_of(folder, "hidden_scale", 4)
    flip(path, offset if at == "first" else offset + size - 1)
    assert_finds(folder, damaged=["日本"])


@pytest.mark.parametrize("block", [1, 2**25])
def test_incomplete_sequences_are_named_and_not_read(
    folder: Path, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "BLOCK_BYTES", block)
    written = [1, 2, 4, 7]
    stored(folder, dtype, several=True, positions=written)
    for sequence in (0, 3):
        path, at, _ = place_of(folder, "hidden", sequence)
        flip(path, at)  # never written: not damaged
    path, at, _ = place_of(folder, "hidden", 4)
    flip(path, at)
    found = assert_finds(folder, damaged=["日本"], incomplete=["ä-1", "c#1", "f", "g"])
    tokens = sum(LENGTHS[i] for i in written)
    assert found.bytes == FeatureCache.open(folder).stored_bytes * tokens // sum(LENGTHS)


def test_an_incomplete_cache_is_sound(folder: Path) -> None:
    stored(folder, positions=[0, 1])
    assert assert_finds(folder, incomplete=IDS[2:]).intact


@pytest.mark.parametrize("mark", [2, 3, 0x80, 0xFF])
def test_a_mark_that_is_neither_0_nor_1_is_damage(folder: Path, mark: int) -> None:
    stored(folder)
    path, at, _ = place_of(folder, "examples/complete", 2)
    flip(path, at, bit=1 ^ mark)
    assert_finds(folder, damaged=["c#0"])
    assert FeatureCache.open(folder).ids == [name for name in IDS if name != "c#0"]


def test_a_mark_without_states_is_damage(folder: Path) -> None:
    stored(folder, positions=[0, 1, 2, 3, 4, 5, 6])
    path, at, _ = place_of(folder, "examples/complete", 7)
    flip(path, at)
    assert_finds(folder, damaged=["h"])


# Index and structure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["examples/id", "examples/text_xxh3", "tokens/input_id", "tokens/word_index"])
def test_a_damaged_index_is_one_finding_for_its_shard(folder: Path, name: str) -> None:
    stored(folder, several=True)
    path = tiny_cache.shards(folder)[1]
    flip(path, tiny_cache.byte_offset(path, name), bit=2)
    found = check_cache(folder)
    assert found_in(found) == NOTHING | {"index": [path.name]}
    assert [shard.needs_rebuild for shard in found.shards].count(True) == 1


@pytest.mark.parametrize("name", ["examples/first_row", "examples/n_tokens"])
def test_lengths_that_contradict_each_other_make_a_shard_unreadable(folder: Path, name: str) -> None:
    stored(folder, several=True)
    path = tiny_cache.shards(folder)[1]
    flip(path, tiny_cache.byte_offset(path, name), bit=2)
    assert_finds(folder, unreadable=[path.name])


def test_lengths_that_agree_but_are_others_are_found(folder: Path) -> None:
    """Three and one tokens became one and three, with rows that fit."""
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    content = bytearray(path.read_bytes())
    struct.pack_into("<2i", content, tiny_cache.byte_offset(path, "examples/n_tokens"), 1, 3)
    struct.pack_into("<q", content, tiny_cache.byte_offset(path, "examples/first_row") + 8, 3)
    path.write_bytes(content)
    assert_finds(folder, index=[path.name], damaged=["ä-1", "b"])


def test_an_index_without_its_checksum_is_damaged(folder: Path) -> None:
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    with h5py.File(path, "r+") as file:
        del file.attrs["index_xxh3"]
    assert_finds(folder, index=[path.name])


def test_every_fixed_byte_is_guarded(folder: Path) -> None:
    """Unused space too: what is not as it was made was not made so."""
    stored(folder, "int8")
    (path,) = tiny_cache.shards(folder)
    content = path.read_bytes()
    for at in [*range(0, len(content), 1013), len(content) - 1, len(content) - 9, len(content) - 40]:
        damaged = bytearray(content)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        assert not check_cache(folder).intact, at
    path.write_bytes(content)
    assert check_cache(folder).intact


@pytest.mark.parametrize("add", [b"\0", b"kr2cache", bytes(4096)])
def test_bytes_behind_the_end_are_damage(folder: Path, add: bytes) -> None:
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    path.write_bytes(path.read_bytes() + add)
    assert not check_cache(folder).intact


@pytest.mark.parametrize("less", [1, 8, 32, 100])
def test_bytes_that_are_missing_at_the_end_are_damage(folder: Path, less: int) -> None:
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    os.truncate(path, path.stat().st_size - less)
    assert not check_cache(folder).intact


def test_a_file_cut_off_where_hdf5_ends_is_damaged(folder: Path) -> None:
    """All that it lost is the copy of its attributes."""
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    end = struct.unpack_from("<Q", path.read_bytes(), 28)[0]
    assert end < path.stat().st_size
    os.truncate(path, end)
    assert not check_cache(folder).intact


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_missing_shard_is_a_fault_and_the_others_are_checked(folder: Path, number: int) -> None:
    paths = tiny_cache.shards(stored(folder, several=True))
    with h5py.File(paths[number], "r") as file:
        lost = len(file["examples/id"])
    paths[number].unlink()
    hurt = paths[number + 1] if number >= 0 else paths[0]
    flip(hurt, tiny_cache.byte_offset(hurt, "hidden"))
    found = check_cache(folder)
    with h5py.File(hurt, "r") as file:
        first = file["examples/id"][0].decode()
    assert found.faults == [f"it should hold {len(paths):05d} shards, but holds {len(paths) - 1}"]
    assert (found.damaged_ids, found.sequences, found.intact) == ([first], 8 - lost, False)


@pytest.mark.parametrize("name", ["shard-00000-of-00009.h5", "other.h5", "a-b-c.h5", "0-².h5", "zz.h5"])
def test_a_shard_too_many_is_a_fault(folder: Path, name: str) -> None:
    paths = tiny_cache.shards(stored(folder, several=True))
    shutil.copy(paths[0], folder / name)
    found = check_cache(folder)
    assert not found.intact
    assert any("should hold" in fault for fault in found.faults)
    assert any("occurs twice" in fault for fault in found.faults)


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_shard_of_another_cache_is_a_fault(folder: Path, tmp_path: Path, number: int) -> None:
    paths = tiny_cache.shards(stored(folder, several=True))
    truth = tiny_cache.make(LENGTHS, ids=IDS, seed=1, fingerprint="fedcba9876543210")
    other = tiny_cache.shards(tiny_cache.store(tmp_path / "other", truth, shard_bytes=200))
    shutil.copy(other[number], paths[number])
    found = check_cache(folder)
    assert not found.intact
    assert found.damaged_ids == []
    assert found.faults
    for fault in found.faults:
        assert "belongs to another cache than" in fault
        assert paths[number].name in fault


def test_a_shard_that_is_there_twice_is_a_fault(folder: Path) -> None:
    paths = tiny_cache.shards(stored(folder, several=True))
    shutil.copy(paths[0], paths[1])
    (fault,) = check_cache(folder).faults
    assert "'ä-1' occurs twice" in fault


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x89HDF\r\n\x1a\n", bytes(9000)])
def test_a_file_that_is_none_is_unreadable_and_the_others_are_checked(folder: Path, content: bytes) -> None:
    paths = tiny_cache.shards(stored(folder, several=True))
    paths[1].write_bytes(content)
    flip(paths[0], tiny_cache.byte_offset(paths[0], "hidden"))
    found = assert_finds(folder, unreadable=[paths[1].name], damaged=["ä-1"])
    assert str(paths[1]) in found.shards[1].unreadable


# Other tools, and disks that fail ------------------------------------------------------------------------------------


def rewrite(path: Path, **options: Any) -> None:
    """Copy every data set and attribute into a new file, as another tool would."""
    copy = path.with_suffix(".copy")
    with h5py.File(path, "r") as old, h5py.File(copy, "w") as new:
        new.attrs.update(old.attrs)

        def take(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[...], dtype=item.dtype, **options)

        old.visititems(take)
    copy.replace(path)


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"shuffle": True, "compression": "lzf"}, {}], ids=str)
def test_files_that_another_tool_rewrote_are_checked_too(folder: Path, dtype: str, options: dict[str, Any]) -> None:
    stored(folder, dtype, positions=[0, 1, 2, 4, 5, 6, 7])
    (path,) = tiny_cache.shards(folder)
    rewrite(path, **options)
    assert FeatureCache.open(folder).mapped is not bool(options)
    assert_finds(folder, incomplete=["c#1"])
    with h5py.File(path, "r+") as file:
        file["hidden"][file["examples/first_row"][4], 0] = 1
        file["examples/xxh3"][6] += np.uint64(1)
        if dtype == "int8":
            file["hidden_scale"][0] = 77
    damaged = ["日本", "g"] if dtype != "int8" else ["ä-1", "日本", "g"]
    assert_finds(folder, damaged=damaged, incomplete=["c#1"])


def test_the_index_of_a_rewritten_file_is_checked_too(folder: Path) -> None:
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    rewrite(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["tokens/word_index"][3] += 1
    assert_finds(folder, index=[path.name])


def test_a_compressed_chunk_that_cannot_be_unpacked_is_damage(folder: Path) -> None:
    stored(folder)
    (path,) = tiny_cache.shards(folder)
    rewrite(path, compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file["hidden"].id.get_chunk_info(0)
    flip(path, *range(chunk.byte_offset, chunk.byte_offset + chunk.size), bit=0x55)
    assert_finds(folder, damaged=IDS)


class FailingDisk:
    """Reading fails for these bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: Iterable[int], code: int = errno.EIO) -> None:
        self.bad, self.code, self.failed = set(bad), code, 0
        self.real = os.preadv
        monkeypatch.setattr(check.os, "preadv", self)

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if self.bad & set(range(offset, offset + sum(map(len, buffers)))):
            self.failed += 1
            raise OSError(self.code, os.strerror(self.code))
        return self.real(descriptor, buffers, offset)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_what_the_disk_cannot_read_is_damaged(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(check, "BLOCK_BYTES", 1)  # each sequence by itself
    stored(folder, dtype)
    _, at, size = place_of(folder, "hidden_scale" if dtype == "int8" else "hidden", 4)
    disk = FailingDisk(monkeypatch, [at, at + size - 1], code)
    assert_finds(folder, damaged=["日本"])
    assert disk.failed == 1


def test_a_disk_that_reads_nothing_leaves_nothing_sound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(folder, several=True)
    disk = FailingDisk(monkeypatch, range(2**20))
    assert_finds(folder, damaged=IDS)
    assert disk.failed >= 3


def test_short_reads_are_continued(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(folder, dtype)
    real = os.preadv
    monkeypatch.setattr(check.os, "preadv", lambda file, buffers, at: real(file, [buffers[0][:7]], at))
    assert_finds(folder)


def test_a_file_that_shrinks_meanwhile_is_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more bytes are an error, not an endless loop or a signal."""
    stored(folder)
    monkeypatch.setattr(check.os, "preadv", lambda *_: 0)
    assert_finds(folder, damaged=IDS)


# check_on_read -------------------------------------------------------------------------------------------------------


def test_reading_checks_nothing_unless_asked(folder: Path, dtype: str) -> None:
    stored(folder, dtype)
    path, at, _ = place_of(folder, "hidden", 4)
    flip(path, at)
    cache = FeatureCache.open(folder)
    assert cache.check_on_read is False
    assert cache["日本"].shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*((dtype, name) for dtype in tiny_cache.DTYPES for name in ("hidden", "examples/xxh3")), ("int8", "hidden_scale")],
)
def test_reading_names_the_damaged_sequence_when_asked(folder: Path, dtype: str, name: str) -> None:
    stored(folder, dtype, several=True)
    path, at, size = place_of(folder, name, 4)
    flip(path, at + size - 1)
    cache = FeatureCache.open(folder)
    cache.check_on_read = True
    for read in (lambda: cache["日本"], lambda: cache.batch(["b", "日本"]), lambda: cache.states(4, [0])):
        with pytest.raises(CacheError, match=f"'日本' in {folder} do not match their checksum") as caught:
            read()
        assert caught.value.remedy == f"kr2cache cache repair {folder}"
    truth = tiny_cache.make(LENGTHS, dtype=dtype, ids=IDS)
    for i, other in enumerate(IDS):
        if i != 4:
            np.testing.assert_array_equal(cache[other], truth.states(i), strict=True)


def test_any_layer_that_is_read_is_checked_as_a_whole(folder: Path) -> None:
    """The checksum is of all layers: damage in the last is found when the first is read."""
    stored(folder)
    path, at, size = place_of(folder, "hidden", 2)
    flip(path, at + size - 1)
    cache = FeatureCache.open(folder)
    cache.check_on_read = True
    with pytest.raises(CacheError, match="'c#0'"):
        cache.states(2, [0])


def test_a_sequence_is_checked_when_it_is_first_read_and_not_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache.open(stored(folder))
    cache.check_on_read = True
    checked: list[int] = []
    real = FeatureCache.check
    monkeypatch.setattr(FeatureCache, "check", lambda self, position: (checked.append(position), real(self, position)))
    for _ in range(3):
        cache["b"].sum()
        cache.batch(["b", "h", "b"], [1])
    assert checked == [1, 7]


def test_check_on_read_survives_pickling(folder: Path) -> None:
    stored(folder)
    path, at, _ = place_of(folder, "hidden", 4)
    flip(path, at)
    cache = FeatureCache.open(folder)
    assert pickle.loads(pickle.dumps(cache)).check_on_read is False
    cache.check_on_read = True
    with pytest.raises(CacheError):
        cache["日本"]
    again = pickle.loads(pickle.dumps(cache))
    assert again.check_on_read is True
    assert again["b"].shape == (3, 1, 4)
    with pytest.raises(CacheError, match="'日本'"):
        again["日本"]


def test_a_rewritten_file_is_checked_on_reading_too(folder: Path, dtype: str) -> None:
    stored(folder, dtype)
    (path,) = tiny_cache.shards(folder)
    rewrite(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["examples/xxh3"][4] += np.uint64(1)
    cache = FeatureCache.open(folder)
    cache.check_on_read = True
    assert cache["b"].shape == (3, 1, 4)
    with pytest.raises(CacheError, match="'日本'"):
        cache["日本"]
