"""Is a cache correct if several processes fill it, and some of them are killed or stopped?

python tests/trust/crowd.py --kills 200

Four processes extract one tiny cache. At random moments one of them is killed, and a new one starts. Or one of them is
stopped until another process has taken over its shard. Then it continues and tries to write other states, as if it ran
on another device.
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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import kills
import tiny
import torch
from transformers.utils.logging import disable_progress_bar

from kr2cache.cache.writer import PENDING_BATCHES, ShardWriter
from kr2cache.extraction import extract
from kr2cache.store import sharing
from kr2cache.system import claims

WORKERS = 4
WRITING_S = 3.0
"""Seconds that one process would take for the writes of the whole cache: it is slowed down."""
MOST_OF_ONE = 15
"""How often processes are killed or stopped while one cache is made, at most."""
CASE = kills.Case("float16", 150, {"dtype": "float16", "shard_gb": 40_000 / 2**30})


@dataclass
class Crowd(kills.Report):
    """What was done and found. The lists describe faults, and should be empty."""

    stops: int = 0
    taken_over: int = 0
    """How many stopped processes lost their shard to another process before they continued."""
    refused_late: int = 0
    """How many processes ended because they had lost their claim; a new process was started for each."""
    computed: int = 0
    needed: int = 0
    again: int = 0
    """How many sequences were computed again: all computations, without one for each sequence."""
    allowed_again: int = 0
    """The most sequences that the killed and stopped processes can have computed without completing them."""
    leftovers: list[str] = field(default_factory=list)
    """Claims that were not removed."""

    @property
    def faults(self) -> list[str]:
        wasted = [f"{self.again} sequences were computed again, but at most {self.allowed_again} could be incomplete"]
        return [*super().faults, *self.leftovers, *(wasted if self.again > self.allowed_again else ())]

    def print(self) -> None:
        print(f"processes stopped                  {self.stops:6,}")
        print(f"  their shard was taken over       {self.taken_over:6,}")
        print(f"  and they ended with an error     {self.refused_late:6,}")
        print(f"sequences needed                   {self.needed:6,}")
        print(f"  computed again                   {self.again:6,}")
        print(f"claims left                        {len(self.leftovers):6,}")
        print(f"processes killed                   {self.kills:6,}")
        print(f"caches                             {self.extractions:6,}")
        print(f"lost or wrong examples             {len(self.wrong):6,}")
        print(f"processes that failed              {len(self.failed):6,}")
        print(f"caches unlike that of one process  {len(self.different):6,}")
        print(f"seconds                            {self.seconds:6.0f}")
        for fault in self.faults[:20]:
            print(f"! {fault}")


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
        """For each stopped process, its claims on shards."""
        self.writes_wrong = mmap.mmap(-1, 10_000)
        """For each number, whether the process writes wrong states now."""
        self.started = 0

    def start(self) -> None:
        number, self.started = self.started, self.started + 1
        self.running[kills.forked(lambda: self._work(number), self._log(number))] = number

    def _log(self, number: int) -> Path:
        return self.folder / f"log-{number}"

    def _work(self, number: int) -> None:
        claims.HEARTBEAT_S, claims.TIMEOUT_S, sharing.LOOK_EVERY_S = 0.05, 0.5, 0.02
        kills.slow_down(WRITING_S / (6 * self.victim.case.sequences))
        write, leave = ShardWriter.write, sharing.HeldShard.__exit__
        batches = os.open(self.folder / "computed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def recorded(writer: ShardWriter, states: Any) -> None:
            os.write(batches, (json.dumps([int(i) for i in states.sequences]) + "\n").encode())
            write(writer, replace(states, raw=states.raw + 1) if self.writes_wrong[number] else states)

        def right_again(held: sharing.HeldShard, *error: Any) -> bool:
            self.writes_wrong[number] = 0
            return leave(held, *error)

        ShardWriter.write = recorded  # type: ignore[method-assign]
        sharing.HeldShard.__exit__ = right_again  # type: ignore[method-assign]
        extract.extract(self.plan)

    def kill(self, process: int) -> None:
        kills.killed(process)
        self._forget(process)
        self.start()

    def stop(self, process: int, seconds: float) -> None:
        os.kill(process, signal.SIGSTOP)
        self.stopped[process] = time.monotonic() + seconds
        self.held[process] = self.shards_of(process)

    def shards_of(self, process: int) -> list[Path]:
        """The claims of a process on shards."""
        folder = claims.claims_folder(self.cache)
        return [
            claim
            for claim in folder.glob("shard-*")
            if (owner := claims._owner(claim)) is not None and owner.pid == process
        ]

    def let_continue(self, report: Crowd, *, all_now: bool = False) -> None:
        """Let stopped processes continue if they have lost their shard or their time is over, or if ``all_now``."""
        for process, moment in list(self.stopped.items()):
            taken_over = bool(self.held[process]) and not any(map(Path.exists, self.held[process]))
            if all_now or taken_over or time.monotonic() > moment:
                self.writes_wrong[self.running[process]] = taken_over
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
            writing = [process for process in active if workers.shards_of(process)]
            active = active if draw.random() < 0.1 else writing
            if active and done < disturbances and len(marked) < len(workers.plan.index):
                done += 1
                if len(active) == 1 or draw.random() < 0.6:
                    workers.kill(draw.choice(active))
                    report.kills += 1
                else:
                    workers.stop(draw.choice(active), draw.uniform(1, 8))
                    report.stops += 1
            with workers.frozen():
                marked = kills.check(workers.cache, victim.whole, marked, report)
            if time.monotonic() > deadline or report.failed:
                for process in list(workers.running):
                    kills.killed(process)
                report.failed.append(f"{len(workers.running)} processes still run after {kills.PATIENCE_S:.0f} s")
                return
        if kills.files_of(workers.cache) != victim.whole.files:
            report.different.append(f"the files of {workers.cache} differ from those that one process makes")
        # A process that was killed at the very end left its claim. The next claim on the cache removes it.
        claims.wait_for_claim(workers.cache, "after").release()
        report.leftovers.extend(str(path) for path in workers.cache.parent.rglob(".*"))
        _count(workers, report, done)


def _count(workers: Workers, report: Crowd, disturbances: int) -> None:
    batches = [json.loads(line) for line in (workers.folder / "computed").read_text("utf-8").splitlines()]
    times = Counter(i for batch in batches for i in batch)
    report.needed += len(workers.plan.index)
    report.again += sum(times.values()) - len(workers.plan.index)
    # A process that dies has incomplete batches: in the model, in the queue to the disk, and written but not marked.
    report.allowed_again += disturbances * max(map(len, batches)) * (PENDING_BATCHES + 3)


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
