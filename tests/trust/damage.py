"""Damage caches in many ways. Is all damage found by reading or by ``kr2cache cache verify``?

    python tests/trust/damage.py --files 500

A separate process opens, reads and verifies each damaged cache. If this process crashes or hangs, that is found too.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import multiprocessing
import random
import re
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cache"))

import h5py
import numpy as np
import tiny_cache

from kr2cache import FeatureCache
from kr2cache.cache.check import check_cache
from kr2cache.cache.layout import checksum
from kr2cache.errors import CacheError
from kr2cache.store import provenance

PAGE = 4096
PATIENCE_S = 120
"""Seconds after which a process counts as hanging. If a file is not plain, HDF5 gets 30 s, up to three times."""
BY_SEQUENCE = ("hidden", "hidden_scale", "examples/xxh3", "examples/complete")
"""If only these are damaged, single sequences are damaged, and verify names them."""
INDEX = (
    "examples/id",
    "examples/first_row",
    "examples/n_tokens",
    "examples/text_xxh3",
    "examples/xxh3",
    "examples/complete",
    "tokens/input_id",
    "tokens/word_index",
)


# Undamaged caches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one data set is in its file, and where the part of each sequence ends, in bytes."""

    start: int
    stop: int
    ends: list[int]

    def sequence(self, offset: int) -> int:
        return next(i for i, end in enumerate(self.ends) if offset < end)


@dataclass(frozen=True)
class Good:
    """An undamaged cache, and another one with as many shards but other content."""

    folder: Path
    other: Path
    digest: str
    """The digest of everything that reading gives (``read_everything``)."""
    ids: list[list[str]]
    """For each shard, its ids."""
    places: list[dict[str, Place]]
    """For each shard, the places of its data sets, as HDF5 gives them."""

    @property
    def shards(self) -> list[Path]:
        return tiny_cache.shards(self.folder)


def with_provenance(truth: tiny_cache.Truth, task: str) -> tiny_cache.Truth:
    """The same content with the header that an extraction writes: provenance and fingerprint fit the content."""
    chosen = provenance.Chosen(
        resource="gottbert",
        task=task,
        corpus="made",
        split="train",
        max_length=128,
        layers=truth.header.layers,
        fusion=truth.header.fusion,
        dtype=truth.header.dtype,
        compute_dtype="float32",
    )
    made = provenance.found(truth.index, "0" * 32, "1" * 32, "words")
    header = dataclasses.replace(
        truth.header,
        fingerprint=provenance.fingerprint(chosen, made),
        provenance={"chosen": dataclasses.asdict(chosen), "found": dataclasses.asdict(made), "recorded": {}},
    )
    return dataclasses.replace(truth, header=header)


def good_cache(folder: Path, dtype: str, *, several: bool, seed: int = 0) -> Good:
    """Make caches of 13 sequences of up to 40 tokens, in one shard or in several."""
    lengths = [40, 3, 17, 1, 22, 9, 31, 2, 14, 5, 28, 7, 12]
    ids = [f"train-ä{i}" for i in range(len(lengths))]
    stored = []
    for name, task, salt in (("good", "udpos-de", 0), ("other", "udpos-es", 100)):
        truth = tiny_cache.make(lengths, dtype=dtype, width=16, ids=ids, seed=seed + salt)
        truth = with_provenance(truth, task)
        token_bytes = truth.header.hidden_row_bytes * 3 + (12 if dtype == "int8" else 0)
        shard_bytes = 70 * token_bytes if several else 2**34
        stored.append(tiny_cache.store(folder / name / f"{dtype}-{several}", truth, shard_bytes=shard_bytes))
    names, places = [], []
    for path in tiny_cache.shards(stored[0]):
        found = places_of(path)
        places.append(found)
        with h5py.File(path, "r") as file:
            names.append([raw.decode() for raw in file["examples/id"][...].tolist()])
    assert (len(names) > 2) is several
    return Good(stored[0], stored[1], read_everything(stored[0]), names, places)


def places_of(path: Path) -> dict[str, Place]:
    """The places of the data sets in a file, as HDF5 gives them."""
    result = {}
    with h5py.File(path, "r") as file:
        rows, tokens = file["examples/first_row"][...].tolist(), np.cumsum(file["examples/n_tokens"][...]).tolist()
        for name in (*INDEX, "hidden", "hidden_scale"):
            if name not in file:
                continue
            dataset = file[name]
            width = dataset.dtype.itemsize * (dataset.shape[1] if name == "hidden" else 1)
            ends = rows[1:] if name.startswith("hidden") else tokens if name.startswith("tokens") else range(1, 10**4)
            start = tiny_cache.byte_offset(path, name)
            count = len(tokens) + (name == "examples/first_row")
            result[name] = Place(start, start + dataset.nbytes, [start + width * end for end in ends][:count])
    return result


# Ways to damage them -------------------------------------------------------------------------------------------------

Damage = Callable[[random.Random, Good, Path], bool]
"""Damages the copy of the cache in the folder. Returns False if this damage is impossible with this cache."""


def pick(draw: random.Random, folder: Path) -> tuple[int, Path]:
    paths = tiny_cache.shards(folder)
    number = draw.randrange(len(paths))
    return number, paths[number]


def flip_bits(path: Path, draw: random.Random, offsets: list[int]) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def bit_in(*names: str, most: int = 1) -> Damage:
    """Flip up to ``most`` bits in these data sets."""

    def damage(draw: random.Random, good: Good, folder: Path) -> bool:
        number, path = pick(draw, folder)
        there = [place for name, place in good.places[number].items() if name in names]
        if not there:
            return False
        offsets = {draw.randrange(place.start, place.stop) for place in draw.choices(there, k=1 if most == 1 else most)}
        flip_bits(path, draw, sorted(offsets))
        return True

    return damage


def truncated(draw: random.Random, good: Good, folder: Path) -> bool:
    _, path = pick(draw, folder)
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])
    return True


def zeroed_page(draw: random.Random, good: Good, folder: Path) -> bool:
    _, path = pick(draw, folder)
    content = path.read_bytes()
    pages = [at for at in range(0, len(content), PAGE) if any(content[at : at + PAGE])]
    at = draw.choice(pages)
    path.write_bytes(content[:at] + bytes(len(content[at : at + PAGE])) + content[at + PAGE :])
    return True


def outside_data(good: Good, number: int, content: bytes) -> list[int]:
    """Offsets of all bytes that are not 0 and in no data set: HDF5's own structures, attributes and the tail."""
    inside: set[int] = set()
    for place in good.places[number].values():
        inside.update(range(place.start, place.stop))
    return [at for at, byte in enumerate(content) if byte and at not in inside]


def header_bytes(draw: random.Random, good: Good, folder: Path) -> bool:
    """Overwrite headers or attributes with 1, 4 or 16 random bytes, in one place or four."""
    number, path = pick(draw, folder)
    content = bytearray(path.read_bytes())
    for at in draw.choices(outside_data(good, number, content), k=draw.choice((1, 1, 4))):
        run = draw.randbytes(draw.choice((1, 4, 16)))
        content[at : at + len(run)] = run[: len(content) - at]
    path.write_bytes(content)
    return True


def anywhere(draw: random.Random, good: Good, folder: Path) -> bool:
    _, path = pick(draw, folder)
    content = bytearray(path.read_bytes())
    for at in [draw.randrange(len(content)) for _ in range(draw.choice((1, 2, 8)))]:
        content[at] ^= draw.randrange(1, 256)
    path.write_bytes(content)
    return True


def swapped_contents(draw: random.Random, good: Good, folder: Path) -> bool:
    number, path = pick(draw, folder)
    places = good.places[number]
    one, other = (places[name] for name in draw.sample(sorted(places), 2))
    content = bytearray(path.read_bytes())
    size = min(one.stop - one.start, other.stop - other.start)
    a, b = content[one.start : one.start + size], content[other.start : other.start + size]
    content[one.start : one.start + size], content[other.start : other.start + size] = b, a
    path.write_bytes(content)
    return True


def swapped_links(draw: random.Random, good: Good, folder: Path) -> bool:
    number, path = pick(draw, folder)
    alike = [("tokens/input_id", "tokens/word_index"), ("examples/text_xxh3", "examples/xxh3")]
    one, other = draw.choice([*alike, *alike, draw.sample(sorted(good.places[number]), 2)])
    with h5py.File(path, "r+") as file:
        file.move(one, "aside")
        file.move(other, one)
        file.move("aside", other)
    return True


ABSURD = (0, 1, 2**31 - 1, 2**32, 2**40, 2**55, 2**63 - 1, 2**64 - 1)


def absurd_by_hdf5(draw: random.Random, good: Good, folder: Path) -> bool:
    """A data set of absurd size that has no content, or attributes that contradict the data sets."""
    number, path = pick(draw, folder)
    with h5py.File(path, "r+") as file:
        what = draw.choice(("layers", "model_layers", *sorted(good.places[number])))
        if what == "layers":
            file.attrs["layers"] = draw.choice(([0, 1, 2**60], [-1, 0, 1], [0, 1], list(range(500))))
        elif what == "model_layers":
            file.attrs["model_layers"] = np.int64(draw.choice((0, 1, -3, 2**60)))
        else:
            kind, rank = file[what].dtype, file[what].ndim
            rows, width = draw.choice((2**20, 2**31, 2**50)), draw.choice((1, 16, 2**20))
            shape = (rows,) if rank == 1 else (rows, width)
            del file[what]
            file.create_dataset(what, shape, kind, chunks=(64,) if rank == 1 else (64, min(width, 1024)))
    return True


def absurd_by_bytes(draw: random.Random, good: Good, folder: Path) -> bool:
    """Overwrite one dimension in the header of a data set, and correct the checksum of this header."""
    _, path = pick(draw, folder)
    content = bytearray(path.read_bytes())
    spaces = [
        match.end() for match in re.finditer(rb"\x02[\x01\x02][\x00\x01]\x01(?=.{6}\x00\x00)", content, re.DOTALL)
    ]
    struct.pack_into("<Q", content, draw.choice(spaces), draw.choice(ABSURD))
    with_checksums(content)
    path.write_bytes(content)
    return True


def with_checksums(content: bytearray) -> None:
    """Correct the checksum of every object header."""
    at = content.find(b"OHDR")
    while at >= 0:
        flags = content[at + 5]
        start = at + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        end = start + width + int.from_bytes(content[start : start + width], "little")
        if end + 4 <= len(content):
            struct.pack_into("<I", content, end, checksum(bytes(content[at:end])))
        at = content.find(b"OHDR", at + 4)


def no_utf8(draw: random.Random, good: Good, folder: Path) -> bool:
    number, path = pick(draw, folder)
    place = good.places[number]["examples/id"]
    content = bytearray(path.read_bytes())
    content[draw.randrange(place.start, place.stop)] = draw.choice((0xFF, 0xC0, 0xF8))
    path.write_bytes(content)
    return True


def foreign_shard(draw: random.Random, good: Good, folder: Path) -> bool:
    """Replace one shard by a shard of another cache."""
    number, path = pick(draw, folder)
    if len(good.shards) == 1:
        return False  # with a single shard, the result would be the other cache, undamaged
    shutil.copy(tiny_cache.shards(good.other)[number], path)
    return True


def other_shard(draw: random.Random, good: Good, folder: Path) -> bool:
    """Replace one shard by another shard of the same cache, or swap two shards."""
    paths = tiny_cache.shards(folder)
    if len(paths) == 1:
        return False
    one, other = draw.sample(paths, 2)
    content = one.read_bytes()
    if draw.random() < 0.5:
        one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return True


def missing_shard(draw: random.Random, good: Good, folder: Path) -> bool:
    draw.choice(tiny_cache.shards(folder)).unlink()
    return True


KINDS: dict[str, Damage] = {
    "a bit in the states": bit_in("hidden"),
    "bits in states and scales of several": bit_in("hidden", "hidden_scale", most=5),
    "a bit in the scales": bit_in("hidden_scale"),
    **{f"a bit in {name}": bit_in(name) for name in INDEX},
    "cut off at a random length": truncated,
    "4 kB of zeros": zeroed_page,
    "random bytes in headers and attributes": header_bytes,
    "random bytes anywhere": anywhere,
    "contents of two data sets swapped": swapped_contents,
    "two data sets swapped by their links": swapped_links,
    "absurd dimensions, made with HDF5": absurd_by_hdf5,
    "absurd dimensions, patched in": absurd_by_bytes,
    "an id that is no UTF-8": no_utf8,
    "a shard of another cache": foreign_shard,
    "another shard of the same cache": other_shard,
    "a missing shard": missing_shard,
}


# What reading and verify find -----------------------------------------------------------------------------------------


def read_everything(folder: Path) -> str:
    """The digest of everything that a reader can see."""
    cache = FeatureCache.open(folder)
    digest = hashlib.sha256(repr((cache.all_ids, cache.layers, cache.dtype, cache.fusion, len(cache))).encode())
    for name in cache.ids:
        states = np.ascontiguousarray(cache[name])
        digest.update(f"{name} {states.shape} {states.dtype}".encode() + states.tobytes())
    index = cache.tokens()
    for array in (index.input_id, index.word_index, index.text_xxh3, index.n_tokens):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(repr((cache.provenance, cache.batch_plan, cache.fingerprint, cache.model_layers)).encode())
    return digest.hexdigest()


@dataclass
class Seen:
    """What reading and verify found in one cache."""

    read: str = ""
    """The digest of what reading gave; empty if reading was refused."""
    refused: str = ""
    """The message if opening or reading raised ``CacheError``."""
    found: bool = False
    """Whether verify found damage or something incomplete."""
    damaged: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    unexpected: str = ""
    """Any other exception, or ``crash``, or ``hang``."""
    seconds: float = 0.0


def examine(folder: Path) -> Seen:
    """Open and read a cache, then verify it as ``kr2cache cache verify`` does."""
    started = time.monotonic()
    seen = Seen()
    try:
        try:
            seen.read = read_everything(folder)
        except CacheError as error:
            seen.refused = error.message
        try:
            found = check_cache(folder)
            faults = list(found.faults)
            if found.intact:
                faults += provenance.contradictions(FeatureCache.open(folder))
            seen.found = not found.intact or bool(faults or found.incomplete_ids)
            seen.damaged, seen.incomplete = found.damaged_ids, found.incomplete_ids
        except CacheError:
            seen.found = True
    except BaseException as error:
        seen.unexpected = repr(error)
    seen.seconds = time.monotonic() - started
    return seen


def serve(pipe: Connection) -> None:
    while (folder := pipe.recv()) is not None:
        pipe.send(examine(folder))


class Examiner:
    """A process that examines caches. If it crashes or hangs, a new one takes its place."""

    def __init__(self) -> None:
        self._process: Any = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = None

    def __call__(self, folder: Path) -> Seen:
        if self._process is None:
            self._start()
        try:
            self._pipe.send(folder)
            if self._pipe.poll(PATIENCE_S):
                seen: Seen = self._pipe.recv()
                return seen
            how = "hang"
        except (EOFError, OSError):
            how = "crash"
        self._stop()
        return Seen(unexpected=how)


def expected_names(good: Good, folder: Path) -> tuple[set[str], set[str]] | None:
    """The ids that verify must name as damaged, and those that it must name as incomplete. None if more than the bytes
    of single sequences differ.
    """
    damaged: set[str] = set()
    incomplete: set[str] = set()
    for number, path in enumerate(good.shards):
        copy = folder / path.name
        if not copy.exists() or copy.stat().st_size != path.stat().st_size:
            return None
        before, after = (np.fromfile(one, dtype=np.uint8) for one in (path, copy))
        for at in np.flatnonzero(before != after).tolist():
            name = next((n for n, p in good.places[number].items() if p.start <= at < p.stop), "")
            if name not in BY_SEQUENCE:
                return None
            sequence = good.ids[number][good.places[number][name].sequence(at)]
            unmarked = name == "examples/complete" and after[at] == 0
            (incomplete if unmarked else damaged).add(sequence)
    return damaged - incomplete, incomplete


@dataclass
class Row:
    """The results for one kind of damage."""

    files: int = 0
    found: int = 0
    """Caches in which verify found damage."""
    refused: int = 0
    """Caches that could not be opened or read."""
    harmless: int = 0
    """Verify found no damage, and reading gives what was written."""
    missed: list[str] = field(default_factory=list)
    """Verify found no damage, but reading gives something else."""
    misnamed: list[str] = field(default_factory=list)
    """Verify named other ids than the damaged ones."""
    unexpected: list[str] = field(default_factory=list)
    """Crashes, hangs, and exceptions other than ``CacheError``."""
    slowest: float = 0.0


def run(files: int, seed: int = 0, folder: Path | None = None) -> dict[str, Row]:
    """Damage ``files`` caches or a few more, as many by each kind of damage. Row ``none`` is for undamaged caches."""
    with tempfile.TemporaryDirectory(dir=folder) as made, Examiner() as examiner:
        goods = [
            good_cache(Path(made), dtype, several=several, seed=number)
            for number, dtype in enumerate(tiny_cache.DTYPES)
            for several in (False, True)
        ]
        rows: dict[str, Row] = {"none": Row()}
        for good in goods:
            note(rows["none"], good, examiner(good.folder), good.folder, "none")
        copy = Path(made) / "copy"
        for kind, damage in KINDS.items():
            rows[kind] = Row()
            draw = random.Random(f"{seed} {kind}")
            tries = 0
            while rows[kind].files < -(-files // len(KINDS)):
                good = goods[tries % len(goods)]
                tries += 1
                shutil.copytree(good.folder, copy)
                if damage(draw, good, copy) and tiny_cache.folder_bytes(copy) != tiny_cache.folder_bytes(good.folder):
                    note(rows[kind], good, examiner(copy), copy, f"{kind}, {good.folder.name}, {tries}")
                shutil.rmtree(copy)
        return rows


def note(row: Row, good: Good, seen: Seen, folder: Path, what: str) -> None:
    row.files += 1
    row.found += seen.found
    row.refused += bool(seen.refused)
    row.slowest = max(row.slowest, seen.seconds)
    if seen.unexpected:
        row.unexpected.append(f"{what}: {seen.unexpected}")
        return
    if not seen.found:
        if seen.read == good.digest:
            row.harmless += 1
        else:
            row.missed.append(f"{what}: {seen.refused}")
    names = expected_names(good, folder)
    if names is not None and (set(seen.damaged), set(seen.incomplete)) != names:
        row.misnamed.append(f"{what}: {seen.damaged} and {seen.incomplete} instead of {names}")


def table(rows: dict[str, Row]) -> str:
    """The results as a table in Markdown."""
    width = max(map(len, rows))
    lines = [
        f"| {'damage':<{width}} | files | found by verify | refused at opening | harmless | missed | wrong ids | "
        "crashes, hangs, others  | slowest |",
        f"|{'-' * (width + 2)}|------:|----------------:|-------------------:|---------:|-------:|----------:|"
        "------------------------:|--------:|",
    ]
    total: Counter[str] = Counter()
    for kind, row in rows.items():
        counts = {
            "files": row.files,
            "found": row.found,
            "refused": row.refused,
            "harmless": row.harmless,
            "missed": len(row.missed),
            "misnamed": len(row.misnamed),
            "unexpected": len(row.unexpected),
        }
        if kind != "none":
            total.update(counts)
        lines.append(_line(kind, counts, row.slowest, width))
    slowest = max(row.slowest for row in rows.values())
    lines.append(_line("all but the first row", dict(total), slowest, width))
    return "\n".join(lines)


def _line(kind: str, counts: dict[str, int], slowest: float, width: int) -> str:
    return (
        f"| {kind:<{width}} | {counts['files']:>5} | {counts['found']:>15} | {counts['refused']:>18} | "
        f"{counts['harmless']:>8} | {counts['missed']:>6} | {counts['misnamed']:>9} | {counts['unexpected']:>23} | "
        f"{slowest:>5.2f} s |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    rows = run(arguments.files, arguments.seed)
    print(table(rows))
    print(f"\n{time.monotonic() - started:.0f} s")
    bad = [line for row in rows.values() for line in (*row.missed, *row.misnamed, *row.unexpected)]
    print("\n".join(bad))
    return 1 if bad or rows["none"].found else 0


if __name__ == "__main__":
    sys.exit(main())
