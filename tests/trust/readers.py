"""Do readers always see correct states while a cache is written?  Eight processes read caches that one process writes.

python tests/trust/readers.py --seconds 60
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))

import numpy as np
import tiny_cache

from kr2cache.cache import writer
from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError

SEQUENCES = 240
LAYERS = (0, 1, 2, 3)
WIDTH = 24
SHARD_BYTES = 200_000
FILLING_S = 1.5
"""Seconds in which the writer fills one cache."""
SHARDS_MISSING = ("is not a folder", "holds no shard", "should hold")
"""Words of the errors that are right as long as not all shards exist."""
METHODS = ("fork",) * 4 + ("spawn",) * 4
LOADER = 0
"""The number of the reader that also reads through a ``DataLoader`` with worker processes."""


@lru_cache(maxsize=4)
def truth_of(number: int) -> tiny_cache.Truth:
    """The content of cache ``number``. It follows from the number alone."""
    draw = random.Random(number)
    return tiny_cache.make(
        [draw.randint(1, 40) for _ in range(SEQUENCES)],
        dtype=tiny_cache.DTYPES[number % len(tiny_cache.DTYPES)],
        layers=LAYERS,
        model_layers=len(LAYERS),
        width=WIDTH,
        seed=number,
        fingerprint=f"{number:016x}",
    )


def folder_of(root: Path, number: int) -> Path:
    return root / f"cache-{number:03d}"


# The writer -----------------------------------------------------------------------------------------------------------


def write_caches(root: Path, deadline: float) -> int:
    """Fill one cache after another until the deadline: slowly, and in random order. Returns how many were begun."""
    writer.SYNC_EVERY_S = 0.02
    for number in itertools.count():
        truth, folder = truth_of(number), folder_of(root, number)
        tiny_cache.create_shards(folder, truth.header, truth.index, SHARD_BYTES)
        order = list(range(SEQUENCES))
        random.Random(number).shuffle(order)
        with tiny_cache.FolderWriter(folder) as out:
            for batch in tiny_cache.batches(truth, out, order):
                out.write(batch)
                time.sleep(FILLING_S / SEQUENCES)
                if time.time() > deadline:
                    return number + 1
    raise AssertionError("not reached")


# The readers ----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What readers read, and the faults that they found."""

    examples: int = 0
    wrong: int = 0
    opened: int = 0
    growing: int = 0
    """How often a cache was opened when some of its sequences were complete, and some were not."""
    too_early: int = 0
    """How often a cache was refused because shards were missing, which is right."""
    from_loader: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.examples += other.examples
        self.wrong += other.wrong
        self.opened += other.opened
        self.growing += other.growing
        self.too_early += other.too_early
        self.from_loader += other.from_loader
        self.errors += other.errors

    def compare(self, states: Any, truth: tiny_cache.Truth, i: int, layers: tuple[int, ...] = LAYERS) -> None:
        expected = truth.states(i)[list(layers)]
        self.examples += 1
        self.wrong += not (states.shape == expected.shape and np.array_equal(states, expected))

    def read_some(self, cache: FeatureCache, truth: tiny_cache.Truth, draw: random.Random, count: int = 8) -> None:
        """Read random sequences, first one by one, then as one batch of some layers."""
        ids = cache.ids
        if not ids:
            return
        for name in draw.choices(ids, k=count):
            self.compare(cache[name], truth, int(name[1:]))
        names = draw.choices(ids, k=count)
        layers = tuple(draw.sample(LAYERS, draw.randint(1, len(LAYERS))))
        batch = cache.batch(names, layers)
        for i, name in enumerate(names):
            self.compare(batch[i], truth, int(name[1:]), layers)


class LoaderItems:
    """The complete sequences of a cache, as items for a ``DataLoader``."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.ids = cache.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[str, Any]:
        return self.ids[i], np.array(self.cache[self.ids[i]])


def loaded(cache: FeatureCache) -> Iterator[tuple[str, Any]]:
    """Every complete sequence, read by the two worker processes of a ``DataLoader``."""
    from torch.utils.data import DataLoader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        yield from DataLoader(
            LoaderItems(cache),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            shuffle=True,
            collate_fn=lambda item: item,
        )


def read_caches(root: Path, deadline: float, seed: int, through_loader: bool) -> Seen:
    """Open, read and compare caches until the deadline. Most are the newest cache, some an older one, and some were
    opened long before.
    """
    seen, draw = Seen(), random.Random(seed)
    complete_before: dict[int, set[str]] = {}
    kept: list[tuple[FeatureCache, tiny_cache.Truth]] = []
    for turn in itertools.count():
        if time.time() > deadline:
            return seen
        newest = max((int(path.name[-3:]) for path in root.glob("cache-*")), default=0)
        number = newest if draw.random() < 0.8 else draw.randint(max(0, newest - 2), newest)
        try:
            cache = FeatureCache.open(folder_of(root, number))
        except CacheError as error:
            if any(reason in error.message for reason in SHARDS_MISSING) and number not in complete_before:
                seen.too_early += 1
            else:
                seen.errors.append(f"{type(error).__name__}: {error}")
            time.sleep(0.01)
            continue
        except Exception as error:
            seen.errors.append(f"opening: {error!r}")
            continue
        try:
            cache.check_on_read = draw.random() < 0.5
            truth, ids = truth_of(number), set(cache.ids)
            seen.opened += 1
            seen.growing += 0 < len(ids) < SEQUENCES
            if lost := complete_before.get(number, set()) - ids:
                seen.errors.append(f"{sorted(lost)} of cache {number} are not complete any more")
            complete_before[number] = ids
            seen.read_some(cache, truth, draw)
            if not kept or turn % 10 == 0:
                kept = [*kept[-2:], (cache, truth)]
            seen.read_some(*draw.choice(kept), draw)
            if through_loader and ids and (not seen.from_loader or seen.opened % 20 == 0):
                for name, states in loaded(cache):
                    seen.compare(states, truth, int(name[1:]))
                    seen.from_loader += 1
        except Exception as error:
            seen.errors.append(f"reading: {error!r}")
    raise AssertionError("not reached")


# Processes ------------------------------------------------------------------------------------------------------------


def _write(root: Path, deadline: float, said: Connection) -> None:
    said.send(write_caches(root, deadline))


def _read(root: Path, deadline: float, seed: int, through_loader: bool, said: Connection) -> None:
    said.send(read_caches(root, deadline, seed, through_loader))


@dataclass
class Outcome:
    """The results of one run."""

    caches: int = 0
    readers: int = 0
    """How many readers ran to their end."""
    seen: Seen = field(default_factory=Seen)

    @property
    def right(self) -> bool:
        return self.seen.wrong == 0 and not self.seen.errors

    def print(self, seconds: float) -> None:
        seen = self.seen
        print(f"readers                       {self.readers:10,} ({', '.join(METHODS)})")
        print(f"caches written                {self.caches:10,} in {seconds:.0f} s")
        print(f"caches opened                 {seen.opened:10,}")
        print(f"  while they were growing     {seen.growing:10,}")
        print(f"refused, shards missing yet   {seen.too_early:10,}")
        print(f"examples read                 {seen.examples:10,}")
        print(f"  through a DataLoader        {seen.from_loader:10,}")
        print(f"wrong                         {seen.wrong:10,}")
        print(f"other errors                  {len(seen.errors):10,}")
        for error in seen.errors[:20]:
            print(f"! {error}")


def run(seconds: float, root: Path) -> Outcome:
    """Let one writer and eight readers work for ``seconds``."""
    outcome, started = Outcome(), []
    deadline = time.time() + seconds
    jobs: list[tuple[str, Any, tuple[Any, ...]]] = [("fork", _write, (root, deadline))]
    jobs += [(method, _read, (root, deadline, seed, seed == LOADER)) for seed, method in enumerate(METHODS)]
    for method, target, arguments in jobs:
        context = multiprocessing.get_context(method)
        here, there = multiprocessing.Pipe(duplex=False)
        process = context.Process(target=target, args=(*arguments, there))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
            process.start()
        there.close()
        started.append((process, here))
    for number, (process, here) in enumerate(started):
        said: Any = None
        try:
            if here.poll(max(0.0, deadline - time.time()) + 60):
                said = here.recv()
        except EOFError:
            pass
        process.join(10)
        if said is None or process.exitcode != 0:
            process.kill()
            process.join()
            name = f"reader {number}" if number else "the writer"
            outcome.seen.errors.append(f"{name} did not run to its end (exit code {process.exitcode})")
        elif number:
            outcome.readers += 1
            outcome.seen.add(said)
        else:
            outcome.caches = said
        process.close()
        here.close()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(arguments.seconds, Path(folder))
    outcome.print(arguments.seconds)
    return 0 if outcome.right else 1


if __name__ == "__main__":
    sys.exit(main())
