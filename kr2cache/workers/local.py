"""Workers as processes of this machine.

Each worker is a new Python interpreter: a fork of a process that has used torch can hang, and ``multiprocessing`` would
import the user's script again. Each worker has its own session, so that Ctrl-C reaches only the driver. The driver then
asks the workers to stop.
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
from kr2cache.system.threads import cores
from kr2cache.workers.crew import Crew, drive
from kr2cache.workers.outcome import Outcome

EXIT_S = 10.0
"""Seconds that a worker has to end after it has sent its outcome."""
ALIGNMENT = 64
"""Bytes; arrays of a job begin at multiples of it."""


def run(
    count: int,
    work: Callable[[Any], Any],
    argument: Any,
    *,
    watch: Callable[[], None],
    gpus_per_worker: float | None = None,
) -> list[Any]:
    """As ``run_workers``. ``gpus_per_worker`` has no meaning here: each worker sees one GPU."""
    with (
        tempfile.TemporaryFile() as job,  # the file has no name: it disappears even if the driver is killed
        _Processes(count, job, _write_job(job, (work, argument))) as crew,
    ):
        return drive(crew, watch)


class _Worker:
    """A process, and the socket that connects it with the driver."""

    def __init__(
        self, place: int, line: Connection[Any, Any], process: subprocess.Popen[str], relay: threading.Thread
    ) -> None:
        self.place = place
        self.line = line
        self.process = process
        self.relay = relay
        """Shows what the process prints."""


class _Processes(Crew):
    def __init__(self, count: int, job: IO[bytes], spans: list[tuple[int, int]]) -> None:
        super().__init__()
        self.working: list[_Worker] = []
        self._count = count
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
            worker.line.close()
            try:
                worker.process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.relay.join(EXIT_S)

    def start(self) -> None:
        for place in range(self._count):
            self._hire(place)

    def listen(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.working and (left := end - time.monotonic()) > 0:
            for worker, said in self._heard(left):
                if isinstance(said, str):
                    self.note(said)
                elif said is None:
                    self._replace(worker)
                elif said.error is not None:
                    raise said.error
                else:
                    self.results[worker.place] = said.value

    def stop(self) -> None:
        for worker in self.working:
            worker.process.send_signal(signal.SIGINT)
        while self.working:
            for _, said in self._heard(None):
                if isinstance(said, str):
                    self.note(said)

    def _heard(self, seconds: float | None) -> list[tuple[_Worker, str | Outcome | None]]:
        """The workers that sent something, with the note or the outcome; None if the worker ended without an outcome.
        Workers that ended are removed from ``working``.
        """
        ready = wait([worker.line for worker in self.working], seconds)
        heard: list[tuple[_Worker, str | Outcome | None]] = []
        for worker in [one for one in self.working if one.line in ready]:
            said: str | Outcome | None = None
            with contextlib.suppress(EOFError, OSError):
                said = worker.line.recv()
            if not isinstance(said, str):
                self.working.remove(worker)
                self._ended.append(worker)
            heard.append((worker, said))
        return heard

    def _replace(self, lost: _Worker) -> None:
        code = lost.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.count_lost(
            f"Worker process {lost.process.pid} {how}",
            "If memory was too small (the system then sends SIGKILL), give fewer --workers.",
        )
        self._hire(lost.place)

    def _hire(self, place: int) -> None:
        line, theirs = Pipe()
        with theirs:
            numbers = (theirs.fileno(), self._job.fileno())
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
        self.working.append(_Worker(place, line, process, relay))
        relay.start()
        with contextlib.suppress(OSError):  # the worker has ended already: ``listen`` will notice
            line.send(self._spans)

    def _environment(self, place: int) -> dict[str, str]:
        environment = dict(os.environ)
        # A worker can import everything that this process can import.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        if not environment.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self._count))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[place % len(self._gpus)]
        return environment

    def _relay(self, output: IO[str] | None) -> None:
        """Show what libraries print in a worker, each line once."""
        assert output is not None
        with output:
            for line in output:
                text = line.rstrip()
                if text and text not in self.said:
                    self.said.add(text)
                    console.print(Text(text), soft_wrap=True)


def _write_job(file: IO[bytes], job: tuple[Callable[[Any], Any], Any]) -> list[tuple[int, int]]:
    """Pickle a job. Its arrays are written separately, so that workers can map them.

    Returns:
        Start and end in the file, first of the pickle, then of each array.
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
