"""A shard's layout is what HDF5 says it is; of a file that is none, the parser says so at once and reads no byte of
another place.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kr2cache import FeatureCache
from kr2cache.cache import layout
from kr2cache.cache.checksum import checksum
from kr2cache.cache.layout import Layout, NotPlainError, read_layout
from kr2cache.cache.shard import readable_headers
from kr2cache.errors import CacheError

IDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROOT = 4096


# What HDF5 says ------------------------------------------------------------------------------------------------------


def assert_as_hdf5_says(path: Path, found: Layout) -> None:
    names: list[str] = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert set(found.datasets) == set(names)
        for name in names:
            ours, theirs = found.datasets[name], file[name]
            assert (ours.dtype, ours.shape, ours.nbytes) == (theirs.dtype, theirs.shape, theirs.nbytes), name
            assert ours.offset == tiny_cache.byte_offset(path, name), name
            content = np.fromfile(path, ours.dtype, int(np.prod(ours.shape)), offset=ours.offset or 0)
            assert content.tobytes() == theirs[...].tobytes(), name
        assert set(found.attributes) == set(file.attrs)
        for name, value in file.attrs.items():
            ours = found.attributes[name]
            assert np.array_equal(ours, value), name
            assert type(ours) is type(value), name
            if not isinstance(value, str):
                assert ours.dtype == value.dtype, name


@QUICK
@given(data=st.data(), ids=st.lists(IDS, min_size=1, max_size=7, unique=True), width=st.integers(1, 9))
def test_the_layout_is_hdf5s_own(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ids: list[str], width: int
) -> None:
    """Of every shard of any cache: data sets, offsets, attributes; and what lies there are the states."""
    layers = sorted(data.draw(st.sets(st.integers(0, 30), min_size=1)))
    truth = tiny_cache.make(
        data.draw(st.lists(st.integers(1, 40), min_size=len(ids), max_size=len(ids))),
        dtype=data.draw(st.sampled_from(tiny_cache.DTYPES)),
        layers=layers,
        model_layers=31,
        width=width,
        ids=ids,
        seed=data.draw(st.integers(0, 99)),
        fingerprint=data.draw(st.text("0123456789abcdef", min_size=1, max_size=64)),
        fusion=data.draw(st.sampled_from([None, {"layers": [0], "weights": [1.0]}])) if len(layers) == 1 else None,
    )
    truth.header.provenance["note"] = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
    folder = tmp_path_factory.mktemp("cache")
    tiny_cache.store(folder, truth, shard_bytes=data.draw(st.integers(1, 5000)))
    states = b""
    scales = b""
    for path in tiny_cache.shards(folder):
        found = read_layout(path)
        assert_as_hdf5_says(path, found)
        assert found.has_tail
        left = read_layout(path, skip_damaged=True)
        assert left.datasets == found.datasets
        assert list(left.attributes) == list(found.attributes)
        content = path.read_bytes()
        for name, dataset in found.datasets.items():
            part = content[dataset.offset : (dataset.offset or 0) + dataset.nbytes]
            states += part if name == "hidden" else b""
            scales += part if name == "hidden_scale" else b""
    assert states == b"".join(raw.tobytes() for raw in truth.raw)
    assert scales == b"".join(scale.tobytes() for scale in truth.scale)


@pytest.mark.parametrize("size", [4000, 60_000, 3_000_000])
def test_attributes_of_any_length(tmp_path: Path, size: int) -> None:
    """A batch plan grows with the sequences that were taken over."""
    truth = tiny_cache.make()
    truth.header.batch_plan["computed"] = "ä" * (size // 2)
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, truth))
    assert_as_hdf5_says(path, read_layout(path))


def test_many_rows_are_many_chunks(tmp_path: Path) -> None:
    """More than one chunk of 8 MiB, the last one not full."""
    truth = tiny_cache.make((9, 4000, 92), dtype="float32", width=512)
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, truth))
    found = read_layout(path)
    assert_as_hdf5_says(path, found)
    with h5py.File(path, "r") as file:
        assert file["hidden"].id.get_num_chunks() == 4
        assert file["hidden"].shape[0] % file["hidden"].chunks[0]


def test_other_layouts_are_not_called_damaged(tmp_path: Path) -> None:
    """What HDF5 may do, and the writer does not, is handed on."""
    path = tmp_path / "other.h5"
    for options in ({}, {"libver": "latest"}, {"libver": "latest", "userblock_size": 512}):
        with h5py.File(path, "w", **options) as file:
            file.create_dataset("hidden", data=np.zeros((9, 4)), compression="gzip")
            file.attrs["format"] = "kr2cache"
        with pytest.raises((NotPlainError, CacheError)) as caught:
            read_layout(path)
        assert "userblock_size" in options or caught.type is NotPlainError


# The checksum --------------------------------------------------------------------------------------------------------


def hashlittle(key: bytes, initial: int = 0) -> int:
    """Bob Jenkins' lookup3.c, byte by byte, as its comments describe it."""

    def rot(x: int, k: int) -> int:
        return (x << k | x >> (32 - k)) % 2**32

    a = b = c = (0xDEADBEEF + len(key) + initial) % 2**32
    at = 0
    while len(key) - at > 12:
        a, b, c = (
            (word + int.from_bytes(key[at + 4 * i : at + 4 * i + 4], "little")) % 2**32
            for i, word in enumerate((a, b, c))
        )
        for turn in (4, 6, 8, 16, 19, 4):  # mix: each turn renames the three
            a = (a - c) % 2**32 ^ rot(c, turn)
            c = (c + b) % 2**32
            a, b, c = b, c, a
        at += 12
    if at == len(key):
        return c
    rest = key[at:]
    a, b, c = ((word + int.from_bytes(rest[4 * i : 4 * i + 4], "little")) % 2**32 for i, word in enumerate((a, b, c)))
    for turn in (14, 11, 25, 16, 4, 14, 24):  # final
        c = ((c ^ b) - rot(b, turn)) % 2**32
        a, b, c = b, c, a
    return b


def test_the_checksum_gives_the_published_values() -> None:
    """Those of lookup3.c's own self-test."""
    for function in (checksum, hashlittle):
        assert function(b"") == 0xDEADBEEF
        assert function(b"Four score and seven years ago") == 0x17770551
    assert hashlittle(b"Four score and seven years ago", 1) == 0xCD628161
    assert hashlittle(b"", 0xDEADBEEF) == 0xBD5B7DDE


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=100))
def test_the_checksum_is_lookup3(data: bytes) -> None:
    assert checksum(data) == hashlittle(data)


def headers(content: bytes) -> Iterator[tuple[int, int]]:
    """Begin of each object header, and where its checksum lies."""
    at = content.find(b"OHDR")
    while at >= 0:
        flags = content[at + 5]
        start = at + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        end = start + width + int.from_bytes(content[start : start + width], "little")
        if end + 4 <= len(content):
            yield at, end
        at = content.find(b"OHDR", at + 4)


def with_checksums(content: bytearray) -> bytearray:
    """Make the checksums of the superblock and of every object header right."""
    if len(content) >= 48:
        struct.pack_into("<I", content, 44, checksum(bytes(content[:44])))
    for at, end in headers(content):
        struct.pack_into("<I", content, end, checksum(bytes(content[at:end])))
    return content


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_the_checksum_is_the_one_that_hdf5_wrote(tmp_path: Path, dtype: str) -> None:
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, tiny_cache.make(dtype=dtype)))
    content = path.read_bytes()
    assert struct.unpack_from("<I", content, 44)[0] == checksum(content[:44])
    found = list(headers(content))
    assert len(found) == 3 + len(tiny_cache.DATASETS) + (dtype == "int8")
    for at, end in found:
        assert struct.unpack_from("<I", content, end)[0] == checksum(content[at:end])
    assert with_checksums(bytearray(content)) == content


# Damage --------------------------------------------------------------------------------------------------------------

SLOW_S = 2.0
MOST_READS = 2000
"""A good file takes about forty."""


class Fuzz:
    """Reads damaged files; anything but a refusal or a layout, and every read elsewhere, fails the test."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.size = self.reads = 0
        self.slowest = 0.0
        self.seen: Counter[str] = Counter()
        real = os.pread

        def pread(descriptor: int, count: int, offset: int) -> bytes:
            assert offset >= 0
            assert count >= 0
            assert offset + count <= max(self.size, 48), "a read outside the file"
            self.reads += 1
            assert self.reads <= MOST_READS, "it reads on and on"
            return real(descriptor, count, offset)

        monkeypatch.setattr(layout.os, "pread", pread)

    def __call__(self, content: bytes | bytearray) -> None:
        # A new file: ext4 waits 3 ms for the disk where an old one is written anew.
        self.path.unlink(missing_ok=True)
        self.path.write_bytes(content)
        self.size = len(content)
        for skip_damaged in (False, True):
            self.reads, started = 0, time.process_time()
            try:
                found = read_layout(self.path, skip_damaged=skip_damaged)
                if not skip_damaged:
                    for dataset in found.datasets.values():
                        assert dataset.offset is not None
                        assert 0 <= dataset.offset <= dataset.offset + dataset.nbytes <= self.size
                self.seen["read"] += 1
            except CacheError as error:
                assert str(self.path) in error.message
                self.seen["refused"] += 1
            except NotPlainError:
                self.seen["not plain"] += 1
            except OSError:
                self.seen["disk"] += 1
            took = time.process_time() - started
            self.slowest = max(self.slowest, took)
            assert took < SLOW_S


@pytest.fixture
def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    return Fuzz(tmp_path / "shard-00000-of-00001.h5", monkeypatch)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The only shard of a good cache, by dtype."""
    result = {}
    for dtype in tiny_cache.DTYPES:
        truth = tiny_cache.make((2, 3), dtype=dtype)
        (path,) = tiny_cache.shards(tiny_cache.store(tmp_path_factory.mktemp("good"), truth))
        result[dtype] = path.read_bytes()
    return result


def structures(content: bytes) -> list[int]:
    """Offsets of superblock, object headers with their continuations, and heap: what the parser looks at."""
    result = list(range(48))
    for at, end in headers(content):
        result += range(at, end + 4)
    for signature, count in ((b"OCHK", 300), (b"GCOL", 500)):
        at = content.find(signature)
        assert at > 0
        result += range(at, at + count)
    return result


@pytest.mark.parametrize("seed", range(4))
def test_mutated_structures_end_in_a_refusal(good: dict[str, bytes], fuzz: Fuzz, seed: int) -> None:
    """Bits, bytes, runs and whole numbers, half of them with checksums that are right."""
    draw = random.Random(seed)
    content = good[tiny_cache.DTYPES[seed]]
    places = structures(content)
    numbers = [0, 1, 2, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 1, ROOT]
    for number in range(500):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.choice(places)
            kind = draw.choice(("bit", "byte", "run", "number"))
            if kind == "bit":
                damaged[at] ^= 1 << draw.randrange(8)
            elif kind == "byte":
                damaged[at] = draw.choice((0, 1, 0xFF, draw.randrange(256)))
            else:
                size = draw.choice((1, 2, 4, 8)) if kind == "number" else draw.randint(2, 16)
                value = (draw.choice(numbers) % 2 ** (8 * size)).to_bytes(size, "little")
                run = value if kind == "number" else draw.randbytes(size)
                damaged[at : at + size] = run
        damaged = damaged[: len(content)]
        if number % 2:
            with_checksums(damaged)
        fuzz(damaged)
    assert min(fuzz.seen[how] for how in ("read", "refused", "not plain")) >= 20, fuzz.seen


@pytest.mark.long
@pytest.mark.parametrize("value", [0x00, 0xFF])
def test_every_byte_of_every_header_may_be_wrong(good: dict[str, bytes], fuzz: Fuzz, value: int) -> None:
    """With checksums that are right, so that nothing but the parser stands before it."""
    content = good["int8"]
    for at, end in headers(content):
        for place in range(at, end):
            if content[place] != value:
                damaged = bytearray(content)
                damaged[place] = value
                fuzz(with_checksums(damaged))
    assert min(fuzz.seen["refused"], fuzz.seen["not plain"]) > 50, fuzz.seen


def test_a_file_of_any_length_ends_in_a_refusal(good: dict[str, bytes], fuzz: Fuzz) -> None:
    content = good["float16"]
    for length in sorted({*range(100), *range(0, len(content), len(content) // 300), len(content) - 1}):
        fuzz(content[:length])
    assert not fuzz.seen["disk"]
    assert fuzz.seen["not plain"] < 10


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.integers(0, 9000))
def test_bytes_of_any_kind_end_in_a_refusal(fuzz: Fuzz, data: bytes, at: int) -> None:
    for content in (data, layout.SIGNATURE + data, bytes(at) + data):
        fuzz(content)
    assert fuzz.seen["read"] == 0


# Files made by hand: headers of any messages, checksums right --------------------------------------------------------


def header(*messages: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack("<BHB", kind, len(data), 0) + data for kind, data in messages)
    head = b"OHDR\x02\x02" + struct.pack("<I", len(body)) + body
    return head + struct.pack("<I", checksum(head))


def by_hand(*parts: bytes, end: int | None = None) -> bytes:
    """A superblock, the root's header at 4,096, and further parts at 8,192, 12,288, ..."""
    body = b"".join(part.ljust(ROOT, b"\0") for part in parts)
    start = layout.SIGNATURE + b"\x03\x08\x08\0"
    start += struct.pack("<4Q", 0, layout.UNDEFINED, ROOT + len(body) if end is None else end, ROOT)
    return (start + struct.pack("<I", checksum(start))).ljust(ROOT, b"\0") + body


def link(name: str, address: int) -> tuple[int, bytes]:
    raw = name.encode()
    return layout.LINK, b"\x01\x00" + bytes([len(raw)]) + raw + struct.pack("<Q", address)


def space(*shape: int) -> tuple[int, bytes]:
    return layout.DATASPACE, struct.pack(f"<4B{len(shape)}Q", 2, len(shape), 0, 1, *shape)


UINT8 = layout.DATATYPE, b"\x10\0\0\0" + struct.pack("<I2H", 1, 0, 8)
TEXT = b"\x19\x01\0\0" + struct.pack("<I", 16) + b"\x10\0\0\0" + struct.pack("<I2H", 1, 0, 8)


def contiguous(offset: int, size: int) -> tuple[int, bytes]:
    return layout.LAYOUT, b"\x04\x01" + struct.pack("<2Q", offset, size)


def attribute(name: str, kind: bytes, shape: tuple[int, ...], value: bytes) -> tuple[int, bytes]:
    raw, dataspace = name.encode() + b"\0", space(*shape)[1]
    head = struct.pack("<BBHHHB", 3, 0, len(raw), len(kind), len(dataspace), 1)
    return layout.ATTRIBUTE, head + raw + kind + dataspace + value


def test_a_file_made_by_hand_is_read(fuzz: Fuzz) -> None:
    """Else nothing below would reach what it is meant for."""
    heap = b"GCOL\x01\0\0\0" + struct.pack("<Q", 64) + struct.pack("<HHIQ", 7, 1, 0, 5) + b"hello\0\0\0"
    content = by_hand(
        header(
            link("hidden", 2 * ROOT),
            attribute("n", UINT8[1], (3,), b"\1\2\3"),
            attribute("t", TEXT, (), struct.pack("<IQI", 5, 3 * ROOT, 7)),
        ),
        header(space(5), UINT8, contiguous(100, 5)),
        heap.ljust(64, b"\0"),
    )
    fuzz(content)
    assert fuzz.seen["read"] == 2
    found = read_layout(fuzz.path)
    assert found.datasets["hidden"].shape == (5,)
    assert (found.datasets["hidden"].offset, found.datasets["hidden"].dtype) == (100, np.uint8)
    assert (found.attributes["n"].tolist(), found.attributes["t"]) == ([1, 2, 3], "hello")
    assert not found.has_tail


HUGE = (2**31, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 2)


def loops() -> Iterator[tuple[str, bytes]]:
    block = b"OCHK" + struct.pack("<BHB2Q", layout.CONTINUATION, 16, 0, 2 * ROOT, 28)
    block += struct.pack("<I", checksum(block))
    yield "a continuation of itself", by_hand(header((layout.CONTINUATION, struct.pack("<2Q", 2 * ROOT, 28))), block)
    again = (layout.CONTINUATION, struct.pack("<2Q", 2 * ROOT, 28))
    yield "many continuations", by_hand(header(*[again] * 1000), block)
    yield "a group within itself", by_hand(header(link("hidden", ROOT), link("examples", ROOT)))
    yield "a hundred links to the root", by_hand(header(*(link(f"{i}", ROOT) for i in range(100))))
    # Objects of no length: every 16 bytes one more.
    heap = b"GCOL\x01\0\0\0" + struct.pack("<Q", 2**20) + struct.pack("<HHIQ", 9, 1, 0, 0) * 65_535
    texts = [attribute(f"t{i}", TEXT, (), struct.pack("<IQI", 1, 2 * ROOT, 7)) for i in range(20)]
    yield "a heap without an end", by_hand(header(*texts), heap)


LOOPS = dict(loops())


@pytest.mark.parametrize("what", LOOPS)
def test_what_refers_to_itself_comes_to_an_end(fuzz: Fuzz, what: str) -> None:
    fuzz(LOOPS[what])
    assert sum(fuzz.seen.values()) == 2


def test_a_group_of_many_groups_of_many_members_is_refused_at_once(fuzz: Fuzz) -> None:
    """All of them sound, and all of them the same."""
    groups = header(*(link(f"{i}", 2 * ROOT) for i in range(60)))
    members = header(*(link(f"{i}", 3 * ROOT) for i in range(60)))
    fuzz(by_hand(groups, members, header(space(5), UINT8, contiguous(100, 5))))


@pytest.mark.parametrize("huge", HUGE)
def test_numbers_that_no_file_can_have(fuzz: Fuzz, huge: int) -> None:
    """In every place of the format that holds a count, a length or an address."""
    parts = header(space(5), UINT8, contiguous(100, 5))
    heap = b"GCOL\x01\0\0\0" + struct.pack("<Q", 64) + struct.pack("<HHIQ", 7, 1, 0, huge) + bytes(40)
    great_heap = b"GCOL\x01\0\0\0" + struct.pack("<Q", huge) + bytes(48)
    chunks = b"\x04\x02\x00\x03\x08" + struct.pack("<3QBQ", 1, 5, 1, 2, 100)
    text = attribute("t", TEXT, (), struct.pack("<IQI", 5, 2 * ROOT, 7))
    cases = {
        "end": by_hand(header(), end=huge),
        "link": by_hand(header(link("hidden", huge))),
        "continuation": by_hand(header((layout.CONTINUATION, struct.pack("<2Q", huge, 30)))),
        "continuation's length": by_hand(header((layout.CONTINUATION, struct.pack("<2Q", ROOT, huge)))),
        "rows": by_hand(header(link("hidden", 2 * ROOT)), header(space(huge), UINT8, contiguous(100, 5))),
        "columns": by_hand(header(link("hidden", 2 * ROOT)), header(space(2, huge), UINT8, contiguous(100, 5))),
        "rows and room": by_hand(header(link("hidden", 2 * ROOT)), header(space(huge), UINT8, contiguous(100, huge))),
        "offset": by_hand(header(link("hidden", 2 * ROOT)), header(space(5), UINT8, contiguous(huge, 5))),
        "attribute": by_hand(header(attribute("n", UINT8[1], (huge,), b"\1")), parts),
        "attribute, twice": by_hand(header(attribute("n", UINT8[1], (huge, huge), b"\1")), parts),
        "nothing, huge times": by_hand(header(attribute("n", UINT8[1], (huge, 0), b"\1")), parts),
        "heap's place": by_hand(header(attribute("t", TEXT, (), struct.pack("<IQI", 5, huge, 7)))),
        "heap's length": by_hand(header(text), great_heap),
        "heap's object": by_hand(header(text), heap),
        "chunks": by_hand(
            header(link("hidden", 2 * ROOT)), header(space(huge, 5), UINT8, (layout.LAYOUT, chunks.ljust(40, b"\0")))
        ),
    }
    for what, content in cases.items():
        before = fuzz.seen["read"]
        fuzz(content)
        # What is known to be damaged is read as far as it goes.
        passable = ("end", "link", "rows", "columns", "rows and room", "offset", "chunks")
        allowed = 2 if what == "nothing, huge times" else what in passable
        assert fuzz.seen["read"] - before <= allowed, what


@pytest.mark.parametrize("what", ["a string of 4 GiB", "no bytes, huge times"])
def test_numpys_own_errors_are_refusals(tmp_path: Path, what: str) -> None:
    path = tmp_path / "shard-00000-of-00001.h5"
    text = layout.DATATYPE, b"\x13\x01\0\0" + struct.pack("<I", 2**32 - 2)
    cases = {
        "a string of 4 GiB": by_hand(header(link("hidden", 2 * ROOT)), header(space(5), text, contiguous(100, 5))),
        "no bytes, huge times": by_hand(header(attribute("n", UINT8[1], (2**63, 0), b""))),
    }
    path.write_bytes(cases[what])
    with pytest.raises(CacheError):
        read_layout(path)


FIELD = st.sampled_from([0, 1, 2, 3, 8, 16, 2**16 - 1, 2**32 - 1, ROOT, 2 * ROOT, 3 * ROOT, *HUGE])
NUMBERS = st.lists(FIELD, max_size=4).map(lambda fields: struct.pack(f"<{len(fields)}Q", *fields))
SHAPES = st.lists(FIELD, max_size=2).map(tuple)
TYPES = st.sampled_from([UINT8[1], TEXT])
DATA = st.one_of(
    st.binary(max_size=40),
    st.tuples(st.binary(max_size=6), NUMBERS).map(b"".join),
    st.sampled_from([space(5)[1], space(2, 3)[1], UINT8[1], TEXT, contiguous(100, 5)[1], link("hidden", 2 * ROOT)[1]]),
    st.builds(lambda kind, shape, value: attribute("n", kind, shape, value)[1], TYPES, SHAPES, st.binary(max_size=40)),
)
KINDS = [layout.DATASPACE, layout.DATATYPE, layout.LAYOUT, layout.LINK, layout.LINK_INFO, layout.ATTRIBUTE]
MESSAGES = st.lists(
    st.tuples(st.sampled_from([*KINDS, layout.ATTRIBUTE_INFO, layout.CONTINUATION, layout.FILTERS]), DATA), max_size=5
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(root=MESSAGES, inner=MESSAGES, third=st.one_of(st.binary(max_size=80), MESSAGES.map(lambda m: header(*m))))
def test_headers_of_any_messages_end_in_a_refusal(
    fuzz: Fuzz, root: list[tuple[int, bytes]], inner: list[tuple[int, bytes]], third: bytes
) -> None:
    fuzz(by_hand(header(link("hidden", 2 * ROOT), *root), header(*inner), third))


def test_a_disk_that_cannot_be_read_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, tiny_cache.make()))

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(layout.os, "pread", broken)
    with pytest.raises(OSError, match="Input/output error"):
        read_layout(path)


# What is left of a damaged file --------------------------------------------------------------------------------------


def front(content: bytes) -> int:
    """Where the attributes end: behind the root's header, its continuation and the heap."""
    heap = content.index(b"GCOL")
    return max(heap + struct.unpack_from("<Q", content, heap + 8)[0], content.index(b"OCHK") + 1024)


def assert_same_attributes(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_the_attributes_of_a_file_that_is_cut_off_behind_its_front(tmp_path: Path, dtype: str) -> None:
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, tiny_cache.make(dtype=dtype)))
    content = path.read_bytes()
    whole = read_layout(path)
    for length in sorted({front(content), *range(front(content), len(content), 997), len(content) - 1}):
        path.write_bytes(content[:length])
        with pytest.raises(CacheError):
            read_layout(path)
        left = read_layout(path, skip_damaged=True)
        assert_same_attributes(left.attributes, whole.attributes)
        assert left.datasets.items() <= whole.datasets.items()
    assert left.datasets == whole.datasets, "but for its last byte it is all there"


def test_a_file_that_is_cut_off_still_says_what_it_was(tmp_path: Path) -> None:
    """The header needs the width too, which is that of the first data set."""
    truth = tiny_cache.make()
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, truth))
    content = path.read_bytes()
    path.write_bytes(content[: tiny_cache.byte_offset(path, "hidden")])
    assert readable_headers(path) == [truth.header]
    path.write_bytes(content)
    assert readable_headers(path) == [truth.header, truth.header]


def test_the_attributes_of_a_file_with_damage_elsewhere(tmp_path: Path) -> None:
    """In the superblock, in the header of any data set, in any data set."""
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, tiny_cache.make()))
    content = path.read_bytes()
    whole = read_layout(path)
    root, *others = headers(content)
    assert root[0] == ROOT
    places = [12, 20, 44, *(at + 12 for at, _ in others), *(end for _, end in others)]
    places += [dataset.offset or 0 for dataset in whole.datasets.values()]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        assert_same_attributes(read_layout(path, skip_damaged=True).attributes, whole.attributes)


@pytest.mark.parametrize("zeros", [1, ROOT, 2**30], ids=["a byte", "a page", "the rest"])
def test_the_attributes_of_a_file_with_a_data_set_that_is_gone(tmp_path: Path, zeros: int) -> None:
    """As where a disk lost a page, or all that was written last."""
    truth = tiny_cache.make()
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path, truth))
    content = path.read_bytes()
    *_, (last, _) = headers(content)
    zeros = min(zeros, len(content) - last)
    path.write_bytes(content[:last] + bytes(zeros) + content[last + zeros :])
    with pytest.raises(CacheError):
        FeatureCache.open(tmp_path)
    assert readable_headers(path)[:1] == [truth.header]
    assert len(read_layout(path, skip_damaged=True).attributes) == 9
