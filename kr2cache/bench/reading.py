"""Reading random batches from a cache with BERT-base's shape, beside copying the same bytes in memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from kr2cache.bench import BenchConfig, size_text
from kr2cache.bench.race import Race, race
from kr2cache.cache.create import create_shard
from kr2cache.cache.format import SequenceIndex, ShardHeader, encode_ids, offsets, shard_name
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import open_shard, shard_paths
from kr2cache.cache.writer import PackedStates, ShardWriter

LAYERS, WIDTH, TOKENS = 13, 768, 34
BATCH = 32
SEQUENCES = 320
BATCHES = 8
"""Random batches in one turn."""
TARGET = 1.25
AGAIN_TARGET = 1.1
"""For reading into memory that is used again."""
ONE_S = 10e-6
"""Extra seconds allowed for one sequence, beside a slice of the mapped file."""
ROUNDS = 10
"""How often one turn reads each sequence."""
WORKERS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Stored:
    """The same states, stored in four ways."""

    folder: Path
    names: list[str]
    lengths: NDArray[np.int32]
    states: NDArray[np.float16]
    """In memory, (rows, D)."""

    @property
    def cache(self) -> Path:
        return self.folder / "reading"

    @property
    def apart(self) -> Path:
        """One HDF5 data set per sequence."""
        return self.folder / "apart.h5"

    @property
    def tensors(self) -> Path:
        return self.folder / "states.safetensors"

    @property
    def first(self) -> NDArray[np.int64]:
        """(n+1,) first row of each sequence; the last value is the number of rows."""
        return offsets(self.lengths) * LAYERS


def run(config: BenchConfig, folder: Path) -> list[Race]:
    """Read from the page cache, and with the page cache dropped if the system allows it."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(TOKENS // 2, TOKENS * 3 // 2, SEQUENCES).astype(np.int32)
    rows = int(lengths.sum()) * LAYERS
    states = draw.standard_normal((rows, WIDTH), dtype=np.float32).astype(np.float16)
    stored = Stored(folder, [f"s{i}" for i in range(SEQUENCES)], lengths, states)
    _store(stored)
    picks = [draw.choice(SEQUENCES, BATCH, replace=False) for _ in range(BATCHES)]
    races = [_one(config, stored, draw), _again(config, stored, picks), _warm(config, stored, picks)]
    if sys.platform == "linux":  # here processes can be forked
        races += [_workers(config, stored, picks, number) for number in WORKERS]
    if hasattr(os, "posix_fadvise"):
        races.append(_cold(config, stored))
    return races


def _one(config: BenchConfig, stored: Stored, draw: np.random.Generator) -> Race:
    """A view of one sequence by its id, beside a slice of an array over the file with known offsets."""
    cache = FeatureCache.open(stored.cache)
    shard = shard_paths(stored.cache)[0]
    mapped = np.memmap(shard, np.float16, "r", open_shard(shard).array_offset("hidden"), stored.states.shape)
    order = draw.permutation(SEQUENCES).tolist() * ROUNDS
    names = [stored.names[i] for i in order]
    first, lengths = stored.first.tolist(), stored.lengths.tolist()
    hidden = np.asarray(mapped)  # a memmap's own slices take four times as long

    def slices() -> None:
        for i in order:
            hidden[first[i] : first[i + 1]].reshape(LAYERS, lengths[i], WIDTH)

    def ours() -> None:
        for name in names:
            cache[name]

    return race(
        "reading one sequence, by its id",
        f"{len(order):,} views, nothing copied",
        {"slices of the mapped file, offsets known": slices, "kr2cache, cache[id]": ours},
        repeats=config.repeats,
        target=None,
        things=len(order),
        allowed=ONE_S,
    )


def _again(config: BenchConfig, stored: Stored, picks: list[NDArray[np.int64]]) -> Race:
    """Batches read into memory that is used again, beside copies into that memory."""
    first, names, states = stored.first.tolist(), stored.names, stored.states
    cache = FeatureCache.open(stored.cache)
    buffer = cache.buffer(BATCH)
    batches = [batch.tolist() for batch in picks]

    def copy(batch: list[int]) -> None:
        at = 0
        for i in batch:
            end = at + first[i + 1] - first[i]
            buffer[at:end] = states[first[i] : first[i + 1]]
            at = end

    def ours(batch: list[int]) -> None:
        cache.batch([names[i] for i in batch], out=buffer)

    def fresh(batch: list[int]) -> None:
        cache.batch([names[i] for i in batch])

    def through(read: Callable[[list[int]], None]) -> Callable[[], None]:
        def turn() -> None:
            for batch in batches:
                read(batch)

        return turn

    def batch_by_batch() -> tuple[float, float]:
        """Both in alternation, each with another batch: a processor's cache may still hold the previous one."""
        spent = {copy: 0.0, ours: 0.0}
        for place in range(len(batches)):
            for way, batch in ((copy, batches[place]), (ours, batches[place - len(batches) // 2])):
                started = time.perf_counter()
                way(batch)
                spent[way] += time.perf_counter() - started
        return spent[copy], spent[ours]

    return race(
        "reading into memory used again",
        _unit(stored, picks),
        {
            "copying the same bytes into it": through(copy),
            "kr2cache, FeatureCache.batch(..., out=...)": through(ours),
            "kr2cache, FeatureCache.batch into fresh memory": through(fresh),
        },
        repeats=config.repeats,
        target=AGAIN_TARGET,
        close=batch_by_batch,
    )


def _unit(stored: Stored, picks: list[NDArray[np.int64]]) -> str:
    read = sum(int(stored.lengths[batch].sum()) for batch in picks) * LAYERS * WIDTH * stored.states.itemsize
    return f"{len(picks)} random batches: {size_text(len(picks) * BATCH, read)}"


def _warm(config: BenchConfig, stored: Stored, picks: list[NDArray[np.int64]]) -> Race:
    first, names, states, lengths = stored.first, stored.names, stored.states, stored.lengths
    cache = FeatureCache.open(stored.cache)

    def copies(read: Callable[[int, NDArray[Any]], object]) -> None:
        for batch in picks:
            sizes = lengths[batch].astype(np.int64) * LAYERS
            packed = np.empty((int(sizes.sum()), WIDTH), dtype=np.float16)
            at = 0
            for i, size in zip(batch.tolist(), sizes.tolist(), strict=True):
                read(i, packed[at : at + size])
                at += size

    def in_memory(i: int, into: NDArray[Any]) -> None:
        into[...] = states[first[i] : first[i + 1]]

    def ours() -> None:
        for batch in picks:
            cache.batch([names[i] for i in batch.tolist()])

    with (
        h5py.File(next(stored.cache.glob("*.h5")), "r") as one,
        h5py.File(stored.apart, "r") as apart,
        safe_open(stored.tensors, "np") as tensors,
    ):
        hidden = one["hidden"]

        def tensor(i: int, into: NDArray[Any]) -> None:
            into[...] = tensors.get_tensor(names[i])

        def rows(i: int, into: NDArray[Any]) -> None:
            into[...] = hidden[first[i] : first[i + 1]]

        def data_set(i: int, into: NDArray[Any]) -> None:
            into[...] = apart[names[i]][...].reshape(-1, WIDTH)

        contenders: dict[str, Callable[[], object]] = {
            "copying the same bytes in memory": lambda: copies(in_memory),
            "kr2cache, FeatureCache.batch": ours,
            "safetensors, one tensor per sequence": lambda: copies(tensor),
            "h5py, slices of one data set": lambda: copies(rows),
            "h5py, one data set per sequence": lambda: copies(data_set),
        }
        unit = _unit(stored, picks)
        return race("reading, from the page cache", unit, contenders, repeats=config.repeats, target=TARGET)


def _workers(config: BenchConfig, stored: Stored, picks: list[NDArray[np.int64]], number: int) -> Race:
    """Several processes read the same batches at once; each reads its share.

    Each repeat starts new processes: the place of its memory changes a process's copying speed by a fifth or more. A
    repeat counts once, since all its turns use the same processes.
    """
    first, names, states, lengths = stored.first, stored.names, stored.states, stored.lengths
    cache = FeatureCache.open(stored.cache)

    def in_memory(batch: NDArray[np.int64]) -> None:
        sizes = lengths[batch].astype(np.int64) * LAYERS
        packed = np.empty((int(sizes.sum()), WIDTH), dtype=np.float16)
        for i, start, stop in zip(batch.tolist(), *_bounds(sizes), strict=True):
            packed[start:stop] = states[first[i] : first[i + 1]]

    def ours(batch: NDArray[np.int64]) -> None:
        cache.batch([names[i] for i in batch.tolist()])

    shares = [picks[worker::number] for worker in range(number)]
    ways = {"copying the same bytes in memory": in_memory, "kr2cache, FeatureCache.batch": ours}
    unit = _unit(stored, picks)
    title = f"reading, {number} worker{'s' if number > 1 else ''}"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        with contextlib.ExitStack() as stack:
            contenders = {name: stack.enter_context(_forked(way, shares)) for name, way in ways.items()}
            for name, times in race(title, unit, contenders, repeats=1, target=TARGET).seconds.items():
                seconds[name].append(statistics.median(times))
    # The workers are other processes: their memory is not measured.
    return Race(title=title, unit=unit, seconds=seconds, target=TARGET, peaks=dict.fromkeys(ways))


def _bounds(sizes: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    ends = np.cumsum(sizes)
    return (ends - sizes).tolist(), ends.tolist()


@contextlib.contextmanager
def _forked(
    read: Callable[[NDArray[np.int64]], None], shares: list[list[NDArray[np.int64]]]
) -> Iterator[Callable[[], None]]:
    """Start workers. A call makes each of them read its share, and returns when all are done."""
    context = multiprocessing.get_context("fork")

    def work(share: list[NDArray[np.int64]], pipe: Connection) -> None:
        while pipe.recv():
            for batch in share:
                read(batch)
            pipe.send(True)

    pipes: list[Connection] = []
    workers = []
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # it warns of forking a process with threads; these workers use none
        for share in shares:
            mine, its = context.Pipe()
            workers.append(context.Process(target=work, args=(share, its), daemon=True))
            workers[-1].start()
            its.close()  # if a worker dies, recv() then raises instead of waiting
            pipes.append(mine)

    def turn() -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    try:
        yield turn
    finally:
        for pipe, worker in zip(pipes, workers, strict=True):
            pipe.send(False)
            worker.join()


def _cold(config: BenchConfig, stored: Stored) -> Race:
    """Read every sequence once, in random order. An open cache keeps its pages, so each turn opens it again."""
    order = np.random.default_rng(1).permutation(stored.names).tolist()
    shard = next(stored.cache.glob("*.h5"))

    def batches() -> None:
        cache = FeatureCache.open(stored.cache)
        for start in range(0, SEQUENCES, BATCH):
            cache.batch(order[start : start + BATCH])

    def views() -> None:
        cache = FeatureCache.open(stored.cache)
        for name in order:
            np.array(cache[name])

    def safetensors() -> None:
        with safe_open(stored.tensors, "np") as file:
            for name in order:
                file.get_tensor(name)

    def apart() -> None:
        with h5py.File(stored.apart, "r") as file:
            for name in order:
                file[name][...]

    contenders = {
        "the file, read once from end to end": _dropping(shard, lambda: _read_all(shard)),
        "kr2cache, FeatureCache.batch": _dropping(shard, batches),
        "kr2cache, a view and a copy per sequence": _dropping(shard, views),
        "safetensors, one tensor per sequence": _dropping(stored.tensors, safetensors),
        "h5py, one data set per sequence": _dropping(stored.apart, apart),
    }
    unit = f"in random order: {size_text(SEQUENCES, stored.states.nbytes)}"
    return race("reading, page cache dropped", unit, contenders, repeats=config.repeats, target=None)


def _store(stored: Stored) -> None:
    """Write the states as a cache, as one HDF5 data set per sequence, and as safetensors."""
    tokens = int(stored.lengths.sum())
    header = ShardHeader(
        dtype="float16",
        layers=tuple(range(LAYERS)),
        model_layers=LAYERS,
        width=WIDTH,
        fingerprint="0" * 64,
        provenance={},
        batch_plan={},
    )
    index = SequenceIndex(
        ids=encode_ids(stored.names),
        n_tokens=stored.lengths,
        text_xxh3=np.zeros(len(stored.names), dtype=np.uint64),
        input_id=np.zeros(tokens, dtype=np.int32),
        word_index=np.zeros(tokens, dtype=np.int32),
    )
    parts = {name: stored.states[a:b] for name, (a, b) in zip(stored.names, pairwise(stored.first), strict=True)}
    stored.cache.mkdir()
    shard = stored.cache / shard_name(0, 1)
    create_shard(shard, header, index, stored.cache)
    with ShardWriter(shard) as writer:
        for i, part in enumerate(parts.values()):
            writer.write(PackedStates([i], part, None))
    with h5py.File(stored.apart, "w") as file:
        for name, part in parts.items():
            file.create_dataset(name, data=part.reshape(LAYERS, -1, WIDTH))
    save_file(parts, stored.tensors)
    for path in (stored.apart, stored.tensors):  # so that the system does not write while a contender reads
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _dropping(path: Path, read: Callable[[], object]) -> Callable[[], object]:
    """``read``, after the file's pages are dropped from the page cache."""

    def turn() -> object:
        drop_pages(path)
        return read()

    return turn


def drop_pages(path: Path) -> None:
    """Ask the system (Linux) to drop a file's pages from the page cache. Unwritten pages are written first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_all(path: Path) -> None:
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
