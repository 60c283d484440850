"""A worker process, as ``local`` starts it: ``python -m kr2cache.workers.process LINE JOB DRIVER``.

LINE is the file descriptor of the socket to the driver. The worker receives the spans of the job from it, and sends
notes and one ``Outcome``. JOB is the descriptor of the open file that holds the job. DRIVER is the driver's process id.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from kr2cache.system import allocator, threads
from kr2cache.system.console import as_worker
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.workers.outcome import Outcome, outcome_of, sendable

GRACE_S = 60.0
"""Seconds that a worker has to finish its current batch after its driver ended."""


def main(line_number: int, job_number: int, driver: int) -> None:
    """Do the job, and send the outcome to the driver."""
    allocator.keep_free_memory()
    threads.bound_spinning()
    line: Connection[Any, Any] = Connection(line_number)
    done = threading.Event()
    try:
        spans = line.recv()
    except EOFError:  # the driver is gone already
        return
    # If a shell started the command in the background, Ctrl-C is ignored until here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_follow, args=(line, driver, done), daemon=True).start()
    one_at_a_time = threading.Lock()

    def say(text: str) -> None:
        with one_at_a_time:
            line.send(text)

    with as_worker(say):
        outcome = outcome_of(lambda: _do(job_number, spans))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    done.set()
    _send(line, outcome)


def _do(job_number: int, spans: list[tuple[int, int]]) -> Any:
    # Imports of extension modules must not see Ctrl-C: C++ code may abort.
    with interrupt_between_batches() as check_interrupt:
        work, argument = _job(job_number, spans)
        check_interrupt()
    return work(argument)


def _job(job_number: int, spans: list[tuple[int, int]]) -> tuple[Any, Any]:
    """Read the job. Its arrays are mapped: all workers share the memory, but changes stay in one worker."""
    mapped = memoryview(mmap.mmap(job_number, 0, access=mmap.ACCESS_COPY))
    parts = [mapped[start:stop] for start, stop in spans]
    job: tuple[Any, Any] = pickle.loads(parts[0], buffers=parts[1:])
    return job


def _send(line: Connection[Any, Any], outcome: Outcome) -> None:
    with contextlib.suppress(OSError):  # the driver is gone
        try:
            line.send(outcome)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            line.send(Outcome(error=sendable(error)))


def _follow(line: Connection[Any, Any], driver: int, done: threading.Event) -> None:
    """Stop this process once its driver has ended, even if another child of the driver keeps the socket open."""
    while not line.poll(1.0) and os.getppid() == driver:
        pass
    if not done.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        if not done.wait(GRACE_S):
            os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
