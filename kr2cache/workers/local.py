"""Workers as processes on this machine.

Each worker is a new Python interpreter. A fork of a process that has used torch can hang, and ``multiprocessing`` would
import the user's script again. Each worker has its own session, so Ctrl-C reaches only the driver, which then asks the
workers to stop. A worker that was asked by somebody else (SIGTERM) is replaced, as one that died.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from rich.text import Text

from kr2cache.system.console import console
from kr2cache.system.device import visible_gpus
from kr2cache.system.interrupt import blocked
from kr2cache.system.threads import cores
from kr2cache.workers.crew import Crew, drive
from kr2cache.workers.outcome import Outcome

EXIT_S = 10.0
"""Seconds that a worker has to end after it has sent its outcome."""
INTERRUPT_S = 0.05
"""After so many seconds at most, the driver asks its workers to stop."""
ALIGNMENT = 64
"""Each array of a job begins at a multiple of this, in bytes."""


def run(
    count: int,
    work: Callable[[Any], Any],
    argument: Any,
    *,
    watch: Callable[[], int],
    gpus_per_worker: float | None = None,
) -> list[Any]:
    """See ``run_workers``. ``gpus_per_worker`` has no effect: each worker sees one GPU."""
    with (
        tempfile.TemporaryFile() as job,  # the file has no name: it disappears even if the driver is killed
        _Processes(count, job, _write_job(job, (work, argument))) as crew,
    ):
        return drive(crew, watch)


class _Worker:
    """A process, and the connection between it and the driver."""

    def __init__(
        self, place: int, connection: Connection[Any, Any], process: subprocess.Popen[str], relay: threading.Thread
    ) -> None:
        self.place = place
        self.connection = connection
        self.process = process
        self.relay = relay
        """The thread that shows what the process prints."""


class _Processes(Crew):
    def __init__(self, count: int, job: IO[bytes], spans: list[tuple[int, int]]) -> None:
        super().__init__(count)
        self.working: list[_Worker] = []
        self._ended: list[_Worker] = []
        self._gpus = visible_gpus()
        self._job = job
        self._spans = spans

    @property
    def is_working(self) -> bool:
        return bool(self.working)

    def end(self) -> None:
        for worker in self.working:
            worker.process.kill()
        for worker in [*self.working, *self._ended]:
            worker.connection.close()
            try:
                worker.process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.relay.join(EXIT_S)

    def start(self) -> None:
        for place in range(self.count):
            self._start_worker(place)

    def listen(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.working and (left := end - time.monotonic()) > 0:
            self.check_interrupt()
            for worker, received in self._receive(min(left, INTERRUPT_S)):
                if isinstance(received, str):
                    self.note(received)
                elif received is None or received.stopped:
                    self._replace(worker, received)
                elif received.error is not None:
                    raise received.error
                else:
                    self.results[worker.place] = received.value

    def stop(self) -> None:
        for worker in self.working:
            worker.process.send_signal(signal.SIGINT)
        while self.working:
            for _, received in self._receive(None):
                if isinstance(received, str):
                    self.note(received)

    def _receive(self, seconds: float | None) -> list[tuple[_Worker, str | Outcome | None]]:
        """Wait until workers send a note or an outcome, or end. None means that the worker ended without an outcome.
        Workers that ended are removed from ``working``.
        """
        ready = wait([worker.connection for worker in self.working], seconds)
        result: list[tuple[_Worker, str | Outcome | None]] = []
        for worker in [one for one in self.working if one.connection in ready]:
            received: str | Outcome | None = None
            with contextlib.suppress(EOFError, OSError):
                received = worker.connection.recv()
            if not isinstance(received, str):
                self.working.remove(worker)
                self._ended.append(worker)
            result.append((worker, received))
        return result

    def _replace(self, lost: _Worker, outcome: Outcome | None) -> None:
        if outcome is not None:
            how = "was stopped by a signal"
        else:
            code = lost.process.wait()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.count_lost(
            f"Worker process {lost.process.pid} {how}",
            "If memory was too small (the system then sends SIGKILL), give fewer --workers.",
        )
        self._start_worker(lost.place)

    def _start_worker(self, place: int) -> None:
        connection, theirs = Pipe()
        with theirs:
            numbers = (theirs.fileno(), self._job.fileno())
            with blocked():  # the worker receives signals from when it can handle them
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "kr2cache.workers.process", *map(str, numbers), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=self._environment(place),
                    pass_fds=numbers,
                    start_new_session=True,
                )
        relay = threading.Thread(target=self._relay, args=(process.stdout,), daemon=True)
        self.working.append(_Worker(place, connection, process, relay))
        relay.start()
        with contextlib.suppress(OSError):  # the worker has ended already: ``listen`` will notice
            connection.send((self._spans, sys.argv))

    def _environment(self, place: int) -> dict[str, str]:
        environment = dict(os.environ)
        # A worker can import everything that this process can import.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        if not environment.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.count))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        return environment

    def _relay(self, output: IO[str] | None) -> None:
        """Show what libraries print in a worker. The user sees each line once."""
        assert output is not None
        with output:
            for line in output:
                text = line.rstrip()
                if text and text not in self.shown:
                    self.shown.add(text)
                    console.print(Text(text), soft_wrap=True)


def _write_job(file: IO[bytes], job: tuple[Callable[[Any], Any], Any]) -> list[tuple[int, int]]:
    """Pickle a job into a file. Its arrays are written separately, so that workers can map them.

    Returns:
        The spans: start and end in the file, in bytes, first of the pickle, then of each array.
    """
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(job, protocol=5, buffer_callback=arrays.append)
    spans = []
    for part in (memoryview(head), *(array.raw() for array in arrays)):
        start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        file.seek(start)
        file.write(part)
        spans.append((start, start + part.nbytes))
    file.flush()
    return spans
