"""Is a cache correct, at whatever moment its extraction is killed?  Extracts tiny caches, and kills at random moments.

python tests/trust/kills.py --kills 200
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import itertools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import h5py
import numpy as np
import tiny
import torch
import xxhash
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from kr2cache.cache import create, writer
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import ExtractConfig
from kr2cache.errors import CacheError
from kr2cache.extraction import batches, extract, planning
from kr2cache.store import sharing, takeover
from kr2cache.system.console import console
from kr2cache.tasks import Example

PATIENCE_S = 120.0
"""A process that should end by itself counts as hanging after so many seconds."""
WRITING_S = 0.4
"""Seconds that a slowed extraction takes for all its writes, so that a kill can fall between any two of them."""
MOST_KILLS = 20
"""How often one extraction is killed at most; then it may finish."""
FILLED_LATER = ("hidden", "hidden_scale", "examples/xxh3", "examples/complete")
"""The data sets that are filled while states are written. All others have their values from the first moment."""
SHARDS_MISSING = ("is not a folder", "holds no shard", "should hold")
"""Words of the errors that are right as long as not all shards exist."""


class Phase(enum.Enum):
    """Where an extraction was when it was killed."""

    START = "no shard yet"
    SHARDS = "shards being made"
    AGAIN = "shards there, not writing yet"
    TAKING = "states being taken over"
    WRITING = "states being written"
    END = "after the end"


PHASES = tuple(Phase)


@dataclass(frozen=True)
class Case:
    """The settings of a cache to be made."""

    name: str
    sequences: int
    settings: Mapping[str, Any]
    older: int = 0
    """How many of the sequences an older cache holds already."""

    def plan(self, model: Path, cache_dir: Path, sequences: int | None = None) -> extract.ExtractPlan:
        """The plan of an extraction of the first ``sequences`` sequences; None means all."""
        texts = tiny.sentences(self.sequences)[:sequences]
        examples = [Example(f"s{i}", (tuple(word for word, _ in text),), None) for i, text in enumerate(texts)]
        settings = {"tokens_per_batch": 64, **self.settings}
        config = ExtractConfig(
            resource=str(model), split="train", task="udpos-de", device="cpu", cache_dir=cache_dir, **settings
        )
        return planning.plan_extraction(config, examples)


SMALL_SHARDS = {"shard_gb": 50_000 / 2**30}
CASES = (
    Case("float16", 20, {"dtype": "float16"}),
    Case("float32", 60, {"dtype": "float32"}),
    Case("bfloat16", 150, {"dtype": "bfloat16"}),
    Case("int8", 60, {"dtype": "int8"}),
    Case("float16 in small shards", 60, {"dtype": "float16", **SMALL_SHARDS}),
    Case("float16, most of it taken over", 100, {"dtype": "float16"}, older=60),
    Case("int8 in small shards, most of it taken over", 100, {"dtype": "int8", **SMALL_SHARDS}, older=60),
)


@dataclass
class Report:
    """What was done and found. Each list describes faults, and should be empty."""

    kills: int = 0
    caches: int = 0
    extractions: int = 0
    unreadable: list[str] = field(default_factory=list)
    """Files that h5py cannot read."""
    wrong: list[str] = field(default_factory=list)
    """Complete sequences that differ from the uninterrupted cache, or are not complete any more."""
    refused: list[str] = field(default_factory=list)
    """Folders that ``FeatureCache`` did not open, or did not show as they are."""
    failed: list[str] = field(default_factory=list)
    """Extractions that ended by themselves with an error."""
    different: list[str] = field(default_factory=list)
    """Finished caches whose files differ from those of the uninterrupted cache."""
    phases: Counter[Phase] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def faults(self) -> list[str]:
        return [*self.unreadable, *self.wrong, *self.refused, *self.failed, *self.different]

    def print(self) -> None:
        print(f"kills                              {self.kills:6,}")
        for phase in PHASES:
            print(f"  {phase.value:<33}{self.phases[phase]:6,}")
        print(f"caches                             {self.caches:6,}")
        print(f"extractions, killed until finished {self.extractions:6,}")
        print(f"unreadable files                   {len(self.unreadable):6,}")
        print(f"lost or wrong examples             {len(self.wrong):6,}")
        print(f"folders refused or shown wrongly   {len(self.refused):6,}")
        print(f"extractions that failed            {len(self.failed):6,}")
        print(f"results unlike the uninterrupted   {len(self.different):6,}")
        print(f"seconds                            {self.seconds:6.0f}")
        for fault in self.faults[:20]:
            print(f"! {fault}")


# Processes -----------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], object], log: Path) -> int:
    """Start a child process that does ``work``, and return its number. It exits with 0. After an error it exits with 1,
    and the traceback is in ``log``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        console.quiet = True
        work()
        code = 0
    except BaseException as error:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # a second Ctrl-C came here; the traceback below is that of the first
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        log.write_text("".join(traceback.format_exception(error)), "utf-8")
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a child (-N if signal N ended it); None if it still runs after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def killed(child: int) -> int:
    """Kill a child, and return its exit code. The child may have ended before."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def record_phases(now: mmap.mmap) -> None:
    """Let the extractions of this process write their current phase into ``now``, as its number in ``PHASES``."""

    def during(owner: Any, name: str, phase: Phase, after: Phase) -> None:
        real = getattr(owner, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            now[0] = PHASES.index(phase)
            result = real(*arguments, **options)
            now[0] = PHASES.index(after)
            return result

        setattr(owner, name, recorded)

    during(sharing.SharedShards, "create", Phase.SHARDS, Phase.AGAIN)
    during(takeover.OlderCaches, "copy_into", Phase.TAKING, Phase.AGAIN)
    during(batches.BatchRunner, "run", Phase.WRITING, Phase.WRITING)
    during(writer.ShardWriter, "__exit__", Phase.WRITING, Phase.END)


def slow_down(pause: float) -> None:
    """Let the extractions of this process mark sequences often, and wait at every moment when a kill could do harm:
    before and in the middle of each write, while a shard is made, and before and after each sync.
    """
    pwrite, write_whole, build = os.pwrite, writer.write_whole, create._build

    def slow_pwrite(descriptor: int, data: Any, offset: int) -> int:
        time.sleep(pause)
        return pwrite(descriptor, data, offset)

    def in_halves(descriptor: int, data: Any, offset: int) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        return write_whole(descriptor, view[:half], offset) + write_whole(descriptor, view[half:], offset + half)

    def slow_build(*arguments: Any) -> None:
        time.sleep(0.005)
        build(*arguments)
        time.sleep(0.005)

    def slowed(real: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds)
            result = real(*arguments, **options)
            time.sleep(seconds)
            return result

        return call

    writer.SYNC_EVERY_S = 0.01
    os.pwrite = slow_pwrite
    create.write_whole = writer.write_whole = in_halves
    create._build = slow_build
    os.fsync = slowed(os.fsync, 0.005)
    writer.sync = slowed(writer.sync, pause)


# Comparing -------------------------------------------------------------------------------------------------------


def read_whole(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Every data set and every attribute of a file, read with h5py alone."""
    with h5py.File(path, "r") as file:
        arrays: dict[str, NDArray[Any]] = {}
        file.visititems(lambda name, item: arrays.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
        return arrays, {name: np.asarray(value).tolist() for name, value in file.attrs.items()}


def stored_bytes(arrays: Mapping[str, NDArray[Any]], i: int) -> bytes:
    """The bytes of one sequence: its values, then its scales if it has any."""
    rows = slice(*arrays["examples/first_row"][i : i + 2])
    return b"".join(arrays[name][rows].tobytes() for name in ("hidden", "hidden_scale") if name in arrays)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Whole:
    """A cache that was made without interruption."""

    folder: Path

    @cached_property
    def shards(self) -> dict[str, tuple[dict[str, NDArray[Any]], dict[str, Any]]]:
        return {path.name: read_whole(path) for path in sorted(self.folder.glob("shard-*.h5"))}

    @cached_property
    def cache(self) -> FeatureCache:
        return FeatureCache.open(self.folder)

    @cached_property
    def files(self) -> dict[str, bytes]:
        return files_of(self.folder)


def check(folder: Path, whole: Whole, marked_before: set[str], report: Report) -> set[str]:
    """Compare the files of a killed extraction with the uninterrupted cache. Faults are added to ``report``.

    Args:
        folder: The cache of the killed extraction.
        whole: The uninterrupted cache.
        marked_before: Ids of the sequences that were marked complete at the last check.
        report: Where faults are added.

    Returns:
        Ids of the sequences that are marked complete now.
    """
    marked: set[str] = set()
    wrong_before = len(report.wrong)
    paths = sorted(folder.glob("shard-*.h5"))
    for path in paths:
        try:
            arrays, attributes = read_whole(path)
        except (OSError, RuntimeError, LookupError, ValueError) as error:
            report.unreadable.append(f"{path}: {error}")
            continue
        if path.name not in whole.shards:
            report.wrong.append(f"{path}: the uninterrupted cache has no such file")
            continue
        expected, expected_attributes = whole.shards[path.name]
        fixed = [name for name in expected if name not in FILLED_LATER]
        if (
            attributes != expected_attributes
            or arrays.keys() != expected.keys()
            or not all(np.array_equal(arrays[name], expected[name]) for name in fixed)
            or not np.isin(arrays["examples/complete"], (0, 1)).all()
        ):
            report.wrong.append(f"{path}: its index or its attributes differ from the uninterrupted cache")
            continue
        for i in np.flatnonzero(arrays["examples/complete"]).tolist():
            name = arrays["examples/id"][i].decode("utf-8")
            stored, digest = stored_bytes(arrays, i), int(arrays["examples/xxh3"][i])
            right = stored == stored_bytes(expected, i) and digest == int(expected["examples/xxh3"][i])
            if not right or digest != xxhash.xxh3_64_intdigest(stored):
                report.wrong.append(f"{path}: {name} is marked complete, but differs from the uninterrupted cache")
            marked.add(name)
    report.wrong.extend(f"{folder}: {name} is not complete any more" for name in sorted(marked_before - marked))
    all_there = [path.name for path in paths] == list(whole.shards)
    try:
        cache = FeatureCache.open(folder)
    except CacheError as error:
        if all_there or not any(reason in error.message for reason in SHARDS_MISSING):
            report.refused.append(f"{folder} is refused: {error.message}")
    except Exception as error:
        report.refused.append(f"{folder} cannot be opened: {error!r}")
    else:
        if not all_there or set(cache.ids) != marked:
            report.refused.append(f"{folder} opens, but does not show the right sequences as complete")
        # Wrong sequences are not read: if their bytes are not in the file, reading the map would kill this process.
        elif len(report.wrong) == wrong_before and not all(
            np.array_equal(cache[name], whole.cache[name]) for name in cache.ids
        ):
            report.wrong.append(f"{folder}: FeatureCache reads other states here than in the uninterrupted cache")
    return marked


# Killing -------------------------------------------------------------------------------------------------------------


class Victim:
    """One cache. It is made once without interruption, and then again with kills, as often as wanted."""

    def __init__(self, case: Case, model: Path, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.log = folder / "log.txt"
        cache_dir = folder / "whole"
        self.older: Path | None = None
        """The folder of the older cache, below ``whole``."""
        if case.older:
            self._made(case.plan(model, cache_dir, case.older))
            self.older = self._only_cache(cache_dir)
        self.plan = case.plan(model, cache_dir)
        started = time.monotonic()
        self._made(self.plan)
        self.seconds = time.monotonic() - started + 1.2 * WRITING_S
        """About how long a slowed extraction takes."""
        self.pause = WRITING_S / (6 * case.sequences)
        self.whole = Whole(self._only_cache(cache_dir, besides=self.older))

    def _made(self, plan: extract.ExtractPlan) -> None:
        if ended(forked(lambda: extract.extract(plan), self.log), PATIENCE_S) != 0:
            raise RuntimeError(f"{self.case.name}: the uninterrupted extraction failed\n{self.log.read_text('utf-8')}")

    @staticmethod
    def _only_cache(cache_dir: Path, besides: Path | None = None) -> Path:
        (found,) = {path.parent for path in cache_dir.rglob("*.h5")} - {besides}
        return found

    def start(self, cache_dir: Path, now: mmap.mmap) -> int:
        """Start a slowed extraction into ``cache_dir`` in a child process, which writes its phase into ``now``."""
        plan = dataclasses.replace(self.plan, config=dataclasses.replace(self.plan.config, cache_dir=cache_dir))

        def work() -> None:
            record_phases(now)
            slow_down(self.pause)
            extract.extract(plan)
            time.sleep(0.05)

        now[0] = PHASES.index(Phase.START)
        self.log.unlink(missing_ok=True)
        return forked(work, self.log)

    def place(self, folder: Path) -> Path:
        """The folder of this cache if the folder of all caches is ``folder``."""
        return folder / self.whole.folder.relative_to(self.folder / "whole")

    @contextlib.contextmanager
    def new_cache_dir(self) -> Iterator[Path]:
        """A new folder of all caches. It holds the older cache, if there is one, and nothing else."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            cache_dir = Path(name)
            if self.older is not None:
                shutil.copytree(self.older, cache_dir / self.older.relative_to(self.folder / "whole"))
            yield cache_dir

    def kill_until_done(self, report: Report, kills: int, draw: random.Random) -> None:
        """Kill one extraction at random moments, at most ``kills`` times, and let it finish. Then compare the cache."""
        now = mmap.mmap(-1, 1)
        marked: set[str] = set()
        report.extractions += 1
        with self.new_cache_dir() as cache_dir:
            cache = self.place(cache_dir)
            for attempt in itertools.count():
                child = self.start(cache_dir, now)
                to_be_killed = attempt < min(kills, MOST_KILLS)
                # A third of the kills come early on purpose, because shards are made in a short part of the time.
                moment = draw.uniform(0, self.seconds * draw.choice((0.3, 1.0, 1.0)))
                code = ended(child, moment if to_be_killed else PATIENCE_S)
                if code is None:
                    code = killed(child)
                if code != -signal.SIGKILL or not to_be_killed:
                    break
                report.kills += 1
                phase = PHASES[now[0]]
                # An extraction that continues begins in the phase START too, but its shards exist already.
                again = phase is Phase.START and any(cache.glob("shard-*.h5"))
                report.phases[Phase.AGAIN if again else phase] += 1
                marked = check(cache, self.whole, marked, report)
            self._compare(cache_dir, code, report)
        now.close()

    def _compare(self, cache_dir: Path, code: int, report: Report) -> None:
        cache = self.place(cache_dir)
        if code != 0:
            said = self.log.read_text("utf-8") if self.log.exists() else "no traceback"
            report.failed.append(f"{self.case.name}: ended with exit code {code}: {said}")
        elif files_of(cache) != self.whole.files:
            report.different.append(f"{self.case.name}: the files of {cache} differ from the uninterrupted cache")
        if self.older is not None:
            older = cache_dir / self.older.relative_to(self.folder / "whole")
            if files_of(older) != files_of(self.older):
                report.wrong.append(f"{self.case.name}: the older cache was changed")


def run(kills: int, folder: Path, *, seed: int = 0, cases: Sequence[Case] = CASES) -> Report:
    """Kill extractions of these caches, and report what was found.

    Args:
        kills: How many extractions are killed in total.
        folder: Where the caches are made.
        seed: Decides the moments.
        cases: The caches.
    """
    started, draw = time.monotonic(), random.Random(seed)
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    model = tiny.save_model(folder / "tiny-bert", layers=3, width=32)
    victims = []
    for number, case in enumerate(cases):
        (folder / str(number)).mkdir()
        victims.append(Victim(case, model, folder / str(number)))
    report = Report(caches=len(victims))
    for victim in itertools.cycle(victims):
        if report.kills >= kills:
            break
        victim.kill_until_done(report, kills - report.kills, draw)
    report.seconds = time.monotonic() - started
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--folder", type=Path, help="on the disk to test; by default the temporary folder")
    arguments = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = run(arguments.kills, Path(folder), seed=arguments.seed)
    report.print()
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
