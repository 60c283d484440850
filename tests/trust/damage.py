"""Damage good caches in every way there is, and see what reading and ``kr2cache cache verify`` make of it.

    python tests/trust/damage.py --files 500

Each damaged cache is opened, read from end to end and verified in a process of its own, which may crash or hang.
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
"""Before a process counts as hanging: HDF5 is given 30 seconds with a file that is not plain, up to three times."""
BY_SEQUENCE = ("hidden", "hidden_scale", "examples/xxh3", "examples/complete")
"""Damage to these alone is damage of single sequences, which are named."""
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


# Good caches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one data set lies in its file, and where each sequence's part of it ends."""

    start: int
    stop: int
    ends: list[int]

    def sequence(self, offset: int) -> int:
        return next(i for i, end in enumerate(self.ends) if offset < end)


@dataclass(frozen=True)
class Good:
    """A sound cache, and another one of as many shards that differs from it."""

    folder: Path
    other: Path
    digest: str
    """Of all that reading it gives."""
    ids: list[list[str]]
    """By shard."""
    places: list[dict[str, Place]]
    """By shard, from HDF5."""

    @property
    def shards(self) -> list[Path]:
        return tiny_cache.shards(self.folder)


def with_provenance(truth: tiny_cache.Truth, task: str) -> tiny_cache.Truth:
    """The header as an extraction writes it: provenance and fingerprint are those of the content."""
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
    """13 sequences of up to 40 tokens, in one shard or three."""
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
    """Where HDF5 says that the data sets are."""
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
"""Damages the copy in the folder; False where that is impossible with this cache."""


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
    """Single bits of these data sets."""

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


def beside_data(good: Good, number: int, content: bytes) -> list[int]:
    """Offsets of HDF5's own structures, attributes and the tail: all but data sets and unused space."""
    inside: set[int] = set()
    for place in good.places[number].values():
        inside.update(range(place.start, place.stop))
    return [at for at, byte in enumerate(content) if byte and at not in inside]


def header_bytes(draw: random.Random, good: Good, folder: Path) -> bool:
    """1 to 16 random bytes somewhere in headers or attributes."""
    number, path = pick(draw, folder)
    content = bytearray(path.read_bytes())
    for at in draw.choices(beside_data(good, number, content), k=draw.choice((1, 1, 4))):
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
    """A data set that only claims its size, or attributes that contradict it."""
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
    """One dimension in a data set's header, its checksum made right again."""
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
    """Make the checksum of every object header right."""
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
    """One shard of another cache among those of this one."""
    number, path = pick(draw, folder)
    if len(good.shards) == 1:
        return False  # then it is that other cache
    shutil.copy(tiny_cache.shards(good.other)[number], path)
    return True


def other_shard(draw: random.Random, good: Good, folder: Path) -> bool:
    """Two shards of the cache are the same one, or have changed places."""
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


# What is made of it --------------------------------------------------------------------------------------------------


def read_everything(folder: Path) -> str:
    """Digest of all that a reader can see."""
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
    """What became of one damaged cache."""

    read: str = ""
    """Digest of what reading gave; empty where it was refused."""
    refused: str = ""
    """The message, where opening or reading ended in a ``CacheError``."""
    found: bool = False
    """By verify: damage, or something incomplete."""
    damaged: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    foreign: str = ""
    """Any other exception; or ``crash``, or ``hang``."""
    seconds: float = 0.0


def examine(folder: Path) -> Seen:
    """Open and read, then verify as ``kr2cache cache verify`` does."""
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
        seen.foreign = repr(error)
    seen.seconds = time.monotonic() - started
    return seen


def serve(pipe: Connection) -> None:
    while (folder := pipe.recv()) is not None:
        pipe.send(examine(folder))


class Examiner:
    """A process that may crash or hang; it is replaced then."""

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
        return Seen(foreign=how)


def expected_names(good: Good, folder: Path) -> tuple[set[str], set[str]] | None:
    """Ids that verify has to name as damaged and as incomplete, exactly; None where more than the bytes of single
    sequences differs.
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
    """One kind of damage."""

    files: int = 0
    found: int = 0
    """By verify."""
    refused: int = 0
    """At opening or reading."""
    harmless: int = 0
    """Verify is content, and reading gives what was written."""
    missed: list[str] = field(default_factory=list)
    """Verify is content, but reading gives something else."""
    misnamed: list[str] = field(default_factory=list)
    """Other ids were named than those damaged."""
    foreign: list[str] = field(default_factory=list)
    """Crashes, hangs, exceptions other than ``CacheError``."""
    slowest: float = 0.0


def run(files: int, seed: int = 0, folder: Path | None = None) -> dict[str, Row]:
    """Damage about so many caches, as many of each kind; the row ``none`` is of undamaged ones."""
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
    if seen.foreign:
        row.foreign.append(f"{what}: {seen.foreign}")
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
    """As Markdown."""
    width = max(map(len, rows))
    lines = [
        f"| {'damage':<{width}} | files | found by verify | refused at opening | harmless | missed | wrong ids | "
        "crashes, hangs, foreign | slowest |",
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
            "foreign": len(row.foreign),
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
        f"{counts['harmless']:>8} | {counts['missed']:>6} | {counts['misnamed']:>9} | {counts['foreign']:>23} | "
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
    bad = [line for row in rows.values() for line in (*row.missed, *row.misnamed, *row.foreign)]
    print("\n".join(bad))
    return 1 if bad or rows["none"].found else 0


if __name__ == "__main__":
    sys.exit(main())
