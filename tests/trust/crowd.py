"""Is a cache correct if several processes fill it, and some of them are killed or stopped?

python tests/trust/crowd.py --kills 200

Four processes extract one tiny cache. At random moments one of them is killed, and a new one starts. Or one of them is
stopped until another process has taken over its shard. Then it continues and tries to write other states, as if it ran
on another device.

All of them append to one journal: which shard they took, which batches they began and which they wrote. It shows
whether a shard was given out twice, and whether a batch was computed again although it was written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kills
import tiny
import torch
from transformers.utils.logging import disable_progress_bar

from kr2cache.cache import writer as writers
from kr2cache.cache.writer import PENDING_BATCHES, PackedStates, ShardWriter
from kr2cache.extraction import extract
from kr2cache.extraction.batches import BatchRunner
from kr2cache.store import sharing
from kr2cache.system import claims

WORKERS = 4
WRITING_S = 3.0
"""Seconds that one process would take for the writes of the whole cache: it is slowed down."""
TAKEN_OVER_S = 20.0
"""The longest time that a process is stopped. If it holds a shard, another one takes the shard over much sooner."""
MOST_OF_ONE = 15
"""How often processes are killed or stopped while one cache is made, at most."""
CASE = kills.Case("float16", 150, {"dtype": "float16", "shard_gb": 100_000 / 2**30})
LOST_AT_ONCE = PENDING_BATCHES + 2
"""The most batches that a killed process has in its memory: one that is computed, one that is written, and those that
wait between the two. (On a GPU one more is being copied.)
"""


@dataclass
class Crowd(kills.Report):
    """What was done and found. The lists describe faults, and should be empty."""

    stops: int = 0
    taken_over: int = 0
    """How many stopped processes lost their shard to another process before they continued."""
    refused_late: int = 0
    """How many processes ended because they had lost their claim; a new process was started for each."""
    needed: int = 0
    """Batches."""
    again: int = 0
    """How many times a batch was begun again."""
    lost_most: int = 0
    """Of one process that was killed or stopped: batches that it began and did not write."""
    wasted: list[str] = field(default_factory=list)
    """Batches computed again although they were written, and batches lost without need."""
    twice: list[str] = field(default_factory=list)
    """Shards that two processes held at the same time."""
    leftovers: list[str] = field(default_factory=list)
    """Claims that were not removed."""

    @property
    def faults(self) -> list[str]:
        return [*super().faults, *self.wasted, *self.twice, *self.leftovers]

    def print(self) -> None:
        print(f"processes killed                   {self.kills:6,}")
        print(f"processes stopped                  {self.stops:6,}")
        print(f"  their shard was taken over       {self.taken_over:6,}")
        print(f"  and they ended with an error     {self.refused_late:6,}")
        print(f"caches                             {self.extractions:6,}")
        print(f"batches needed                     {self.needed:6,}")
        print(f"  computed again                   {self.again:6,}")
        print(f"  lost by one process, at most     {self.lost_most:6,}")
        print(f"  lost though written, or too many {len(self.wasted):6,}")
        print(f"shards held twice                  {len(self.twice):6,}")
        print(f"claims left                        {len(self.leftovers):6,}")
        print(f"lost or wrong examples             {len(self.wrong):6,}")
        print(f"processes that failed              {len(self.failed):6,}")
        print(f"caches unlike that of one process  {len(self.different):6,}")
        print(f"seconds                            {self.seconds:6.0f}")
        for fault in self.faults[:20]:
            print(f"! {fault}")


class Journal:
    """What the processes of one cache did, in order: a file that all of them append to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, number: int, about: Any = "") -> None:
        """
        Args:
            what: ``takes`` and ``leaves`` a shard, or ``loses`` it to another process; ``begins`` and ``wrote`` a
                batch; ``disturbed``: it is killed or stopped now.
            number: Of the process.
            about: The name of the shard, or the sequences of the batch.
        """
        os.write(self._file, (json.dumps([what, number, about]) + "\n").encode())

    def lines(self) -> list[tuple[str, int, Any]]:
        os.close(self._file)
        return [tuple(json.loads(line)) for line in self.path.read_text("utf-8").splitlines()]


def audit(lines: Iterable[tuple[str, int, Any]], report: Crowd) -> None:
    """Read a journal, and add to ``report`` what was wasted and what two processes held."""
    lines = list(lines)
    disturbed = Counter(number for what, number, _ in lines if what == "disturbed")
    # On a busy machine, a process can seem silent without being stopped. It says so when it loses its shard.
    gone = {number for what, number, _ in lines if what == "loses"}
    disturbed.update(gone - disturbed.keys())
    holders: dict[str, int] = {}
    written: set[int] = set()
    begun: Counter[tuple[int, ...]] = Counter()
    in_hand: dict[int, set[tuple[int, ...]]] = {number: set() for _, number, _ in lines}
    for what, number, about in lines:
        if what == "disturbed":
            gone.add(number)
            holders = {shard: holder for shard, holder in holders.items() if holder != number}
        elif what == "takes":
            if holders.get(about, number) != number:
                report.twice.append(f"process {number} took {about} while process {holders[about]} held it")
            if number not in gone:
                holders[about] = number
        elif what == "leaves" and holders.get(about) == number:
            del holders[about]
        elif what == "begins":
            if number not in gone and written.issuperset(about):
                report.wasted.append(f"process {number} computed {about} again, which was written")
            begun[tuple(about)] += 1
            in_hand[number].add(tuple(about))
        elif what == "wrote":
            written.update(about)
            in_hand[number].discard(tuple(about))
    for number, batches in in_hand.items():
        report.lost_most = max(report.lost_most, len(batches) if disturbed[number] == 1 else 0)
        if len(batches) > LOST_AT_ONCE * disturbed[number]:
            report.wasted.append(f"process {number} lost {len(batches)} batches, disturbed {disturbed[number]} times")
    report.needed += len(begun)
    report.again += begun.total() - len(begun)


class Workers:
    """The processes that make one cache."""

    def __init__(self, victim: kills.Victim, cache_dir: Path, folder: Path) -> None:
        self.victim = victim
        self.plan = replace(victim.plan, config=replace(victim.plan.config, cache_dir=cache_dir))
        self.cache = victim.place(cache_dir)
        self.folder = folder
        self.running: dict[int, int] = {}
        """For each process (its process id) its number: 0, 1, and so on."""
        self.stopped: dict[int, float] = {}
        """For each stopped process, when it may continue at the latest."""
        self.held: dict[int, list[Path]] = {}
        """For each stopped process, its claims."""
        self.writes_wrong = mmap.mmap(-1, 10_000)
        """For each number, whether the process writes wrong states now."""
        self.journal = Journal(folder / "journal")
        self.killed: set[int] = set()
        self.started = 0

    def start(self) -> None:
        number, self.started = self.started, self.started + 1
        self.running[kills.forked(lambda: self._work(number), self._log(number))] = number

    def _log(self, number: int) -> Path:
        return self.folder / f"log-{number}"

    def _work(self, number: int) -> None:
        claims.HEARTBEAT_S, claims.TIMEOUT_S, sharing.LOOK_EVERY_S = 0.05, 0.5, 0.02
        kills.slow_down(WRITING_S / (6 * self.victim.case.sequences))
        if number % 2:  # what is written waits long for its mark
            writers.SYNC_EVERY_S = 0.3
        self._keep_journal(number)
        write, try_claim = ShardWriter.write, sharing.try_claim

        def write_either(writer: ShardWriter, states: PackedStates) -> None:
            write(writer, replace(states, raw=states.raw + 1) if self.writes_wrong[number] else states)

        def right_again(place: Path, unit: str) -> claims.Claim | None:
            claim = try_claim(place, unit)
            self.writes_wrong[number] = 0  # it was stopped without this claim
            return claim

        ShardWriter.write = write_either  # type: ignore[method-assign]
        sharing.try_claim = right_again
        extract.extract(self.plan)

    def _keep_journal(self, number: int) -> None:
        note, batches, write = self.journal.note, BatchRunner._unfinished_batches, ShardWriter._write
        take, leave = sharing.HeldShard.__enter__, sharing.HeldShard.__exit__

        def begins(runner: BatchRunner, writer: ShardWriter) -> Iterator[Any]:
            for batch in batches(runner, writer):
                note("begins", number, batch.tolist())
                yield batch

        def wrote(writer: ShardWriter, states: PackedStates) -> None:
            write(writer, states)
            writer._check()  # who took the shard over meanwhile may not have seen this batch
            note("wrote", number, list(states.sequences))

        def takes(held: sharing.HeldShard) -> Any:
            if held.claim.is_held:  # it may have been stopped since it got its claim
                note("takes", number, held.part.path.name)
            return take(held)

        def leaves(held: sharing.HeldShard, *error: Any) -> bool:
            note("leaves" if held.claim.is_held else "loses", number, held.part.path.name)
            return leave(held, *error)

        BatchRunner._unfinished_batches = begins  # type: ignore[method-assign]
        ShardWriter._write = wrote  # type: ignore[method-assign]
        sharing.HeldShard.__enter__ = takes  # type: ignore[method-assign]
        sharing.HeldShard.__exit__ = leaves  # type: ignore[method-assign]

    def kill(self, process: int) -> None:
        self.journal.note("disturbed", self.running[process])
        self.killed.add(process)
        kills.killed(process)
        self._forget(process)
        self.start()

    def stop(self, process: int, draw: random.Random) -> None:
        """Stop it for a moment; or, if it holds a claim, until another process has taken it over."""
        self.journal.note("disturbed", self.running[process])
        os.kill(process, signal.SIGSTOP)
        os.waitid(os.P_PID, process, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it may just release a claim
        self.held[process] = self.claims_of(process)
        long = self.held[process] and draw.random() < 0.7
        self.stopped[process] = time.monotonic() + (TAKEN_OVER_S if long else draw.uniform(0.1, 2))

    def claims_of(self, process: int, units: str = "*") -> list[Path]:
        """The claims of a process."""
        folder = claims.claims_folder(self.cache)
        return [
            claim
            for claim in folder.glob(units)
            if (owner := claims._owner(claim)) is not None and owner.pid == process
        ]

    def let_continue(self, report: Crowd, *, all_now: bool = False) -> None:
        """Let stopped processes continue if they have lost their shard or their time is over, or if ``all_now``."""
        for process, moment in list(self.stopped.items()):
            held = self.held[process]
            taken_over = bool(held) and not any(map(Path.exists, held))
            if all_now or taken_over or time.monotonic() > moment:
                self.writes_wrong[self.running[process]] = taken_over and held[0].name.startswith("shard-")
                report.taken_over += taken_over
                del self.stopped[process]
                os.kill(process, signal.SIGCONT)

    def collect_ended(self, report: Crowd) -> None:
        """Forget processes that ended. Start a new one for each that ended because it lost its claim."""
        for process, number in list(self.running.items()):
            if process in self.stopped or (code := kills.ended(process, 0)) is None:
                continue
            self._forget(process)
            said = self._log(number).read_text("utf-8") if self._log(number).exists() else ""
            if code != 0 and "BusyError: Another process took over" in said:
                report.refused_late += 1
                self.start()
            elif code != 0:
                report.failed.append(f"process {number} ended with exit code {code}: {said}")

    def _forget(self, process: int) -> None:
        del self.running[process]
        self.stopped.pop(process, None)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block, all processes are stopped."""
        active = [process for process in self.running if process not in self.stopped]
        for process in active:
            os.kill(process, signal.SIGSTOP)
        for process in active:
            os.waitid(os.P_PID, process, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
        for process in active:
            os.kill(process, signal.SIGCONT)


def make_one(victim: kills.Victim, report: Crowd, disturbances: int, draw: random.Random) -> None:
    """Let several processes make one cache, and kill or stop some of them. Then compare the cache."""
    marked: set[str] = set()
    report.extractions += 1
    with victim.new_cache_dir() as cache_dir, tempfile.TemporaryDirectory(dir=victim.folder) as logs:
        workers = Workers(victim, cache_dir, Path(logs))
        for _ in range(WORKERS):
            workers.start()
        done, deadline = 0, time.monotonic() + kills.PATIENCE_S
        while workers.running:
            time.sleep(draw.uniform(0.02, 0.25))
            workers.let_continue(report, all_now=done >= disturbances and len(workers.stopped) == len(workers.running))
            workers.collect_ended(report)
            active = [process for process in workers.running if process not in workers.stopped]
            # Mostly disturb processes that hold a shard. A start takes longer than all writes, so chance would rarely
            # choose such a moment.
            writing = [process for process in active if workers.claims_of(process, "shard-*")]
            active = active if draw.random() < 0.1 else writing
            # To take over from a stopped process, another one has to watch it for some time.
            quiet = workers.stopped and draw.random() < 0.8
            if active and not quiet and done < disturbances and len(marked) < len(workers.plan.index):
                done += 1
                if len(workers.stopped) > 1 or draw.random() < 0.6:
                    workers.kill(draw.choice(active))
                    report.kills += 1
                else:
                    workers.stop(draw.choice(active), draw)
                    report.stops += 1
            if draw.random() < 0.3:
                with workers.frozen():
                    marked = kills.check(workers.cache, victim.whole, marked, report)
            if time.monotonic() > deadline or report.failed:
                for process in list(workers.running):
                    kills.killed(process)
                report.failed.append(f"{len(workers.running)} processes still run after {kills.PATIENCE_S:.0f} s")
                return
        kills.check(workers.cache, victim.whole, marked, report)
        if kills.files_of(workers.cache) != victim.whole.files:
            report.different.append(f"the files of {workers.cache} differ from those that one process makes")
        _look_for_claims(workers, report)
        audit(workers.journal.lines(), report)


def _look_for_claims(workers: Workers, report: Crowd) -> None:
    """Claims that are left: only those of killed processes may be, until the next claim on the cache."""

    def left() -> dict[Path, claims.Owner | None]:
        return {claim: claims._owner(claim) for claim in claims.claims_folder(workers.cache).glob("*")}

    for claim, owner in left().items():
        if owner is not None and owner.pid not in workers.killed and not owner.released:
            report.leftovers.append(f"{claim} of a process that was not killed")
    claims.wait_for_claim(workers.cache, "after").release()
    for claim, owner in left().items():
        # An unknown owner was killed within its request, which ends by the time-out. Other claims still say something.
        if claim.name.startswith(claims.REMOVED) or (owner is not None and not owner.earlier_may_live):
            report.leftovers.append(f"{claim} was not cleared away")
    others = set(workers.cache.parent.rglob(".*")) - {claims.claims_folder(workers.cache)}
    report.leftovers.extend(map(str, others))


def run(kill: int, folder: Path, *, seed: int = 0) -> Crowd:
    """Make caches until ``kill`` processes were killed, and report what was found. ``seed`` decides the moments."""
    started, draw = time.monotonic(), random.Random(seed)
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    victim = kills.Victim(CASE, tiny.save_model(folder / "tiny-bert", layers=3, width=32), folder)
    report = Crowd(caches=1)
    while report.kills < kill and not report.faults:
        make_one(victim, report, min(MOST_OF_ONE, 2 * (kill - report.kills)), draw)
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
