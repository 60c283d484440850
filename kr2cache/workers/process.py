"""A worker process, as ``local`` starts it: ``python -m kr2cache.workers.process CONNECTION JOB DRIVER``.

CONNECTION is the file descriptor of the connection to the driver. On it the worker receives the spans of the job, and
the driver's ``sys.argv``, which tells other processes what this one does; it sends notes and one ``Outcome``. JOB is
the descriptor of the open file with the job. DRIVER is the driver's process id.
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

from kr2cache.system import allocator, interrupt, threads
from kr2cache.system.console import as_worker
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.workers.outcome import Outcome, outcome_of, sendable

GRACE_S = 60.0
"""Seconds that a worker has to finish its current batch after its driver ended."""


def main(connection_number: int, job_number: int, driver: int) -> None:
    """Do the job, and send the outcome to the driver."""
    allocator.keep_free_memory()
    threads.bound_spinning()
    connection: Connection[Any, Any] = Connection(connection_number)
    done = threading.Event()
    try:
        spans, sys.argv = connection.recv()
    except EOFError:  # the driver has ended already
        return
    interrupt.listen()
    threading.Thread(target=_stop_with_driver, args=(connection, driver, done), daemon=True).start()
    sending = threading.Lock()

    def send_note(text: str) -> None:
        with sending:
            connection.send(text)

    try:
        with as_worker(send_note):
            outcome = outcome_of(lambda: _do(job_number, spans))
        interrupt.ignore()
    except KeyboardInterrupt as error:  # when the work had just ended
        interrupt.ignore()
        outcome = Outcome(error=error)
    done.set()
    _send(connection, outcome)


def _do(job_number: int, spans: list[tuple[int, int]]) -> Any:
    # Ctrl-C must not reach imports of extension modules: their C++ code may abort the process.
    with interrupt_between_batches() as check_interrupt:
        interrupt.unblock()
        work, argument = _job(job_number, spans)
        check_interrupt()
    return work(argument)


def _job(job_number: int, spans: list[tuple[int, int]]) -> tuple[Any, Any]:
    """Read the job. Its arrays are mapped: all workers share their memory. If a worker changes an array, the others do
    not see it.
    """
    mapped = memoryview(mmap.mmap(job_number, 0, access=mmap.ACCESS_COPY))
    parts = [mapped[start:stop] for start, stop in spans]
    job: tuple[Any, Any] = pickle.loads(parts[0], buffers=parts[1:])
    return job


def _send(connection: Connection[Any, Any], outcome: Outcome) -> None:
    with contextlib.suppress(OSError):  # the driver has ended
        try:
            connection.send(outcome)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            connection.send(Outcome(error=sendable(error)))


def _stop_with_driver(connection: Connection[Any, Any], driver: int, done: threading.Event) -> None:
    """Stop this process once its driver has ended, even if another child of the driver keeps the connection open."""
    while not connection.poll(1.0) and os.getppid() == driver:
        pass
    if not done.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        if not done.wait(GRACE_S):
            os._exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
