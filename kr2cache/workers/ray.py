"""Workers as actors of Ray, on the cluster at ``RAY_ADDRESS`` or on a Ray that is started on this machine.

Ray sends the return value of ``work`` to the driver, so ``work`` should write large results to shared files. After the
loss of a machine, nobody knows how much of a call was done. So Ray must not restart actors or repeat calls by itself.
Instead, the driver starts a new actor, and the claims tell the new actor which work is left.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kr2cache.errors import ConfigError, error_text
from kr2cache.system import allocator, interrupt, threads
from kr2cache.system.console import as_worker, count_text
from kr2cache.system.interrupt import also_stopped_by, handlers_kept
from kr2cache.workers.crew import Crew, drive
from kr2cache.workers.outcome import Outcome, outcome_of

CONNECT_S = 5.0
ANSWER_S = 15.0
"""Seconds that a cluster has to answer. Ray itself would wait for two minutes."""
ROOM_S = 15.0
"""Seconds before the user sees a note that workers wait for CPUs or GPUs."""
STOP_S = 60.0
"""Seconds that an actor has to stop after it was asked to. Then it is killed: if it loads a model, nothing is lost."""
LOST = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
)
"""These errors mean that an actor or its machine ended or cannot be reached. The call may have run in part or fully."""


def run(
    count: int,
    work: Callable[[Any], Any],
    argument: Any,
    *,
    watch: Callable[[], int],
    gpus_per_worker: float | None = None,
) -> list[Any]:
    """See ``run_workers``.

    Raises:
        ConfigError: Also if the cluster does not answer, or has no room for so many workers.
    """
    with _connected():
        cpus, gpus = _resources_of_each(count, gpus_per_worker)
        with _Actors(count, ray.put((work, argument)), cpus, gpus) as crew:
            return drive(crew, watch)


class Notes:
    """What workers note, until the driver reads it. An actor of its own, because the actor of a worker is busy."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Called by a worker."""
        self._texts.append(text)

    def take(self) -> list[str]:
        """The notes since the last call."""
        texts, self._texts = self._texts, []
        return texts


class Actor:
    """One worker. It runs in a process of its own on one machine of the cluster."""

    def __init__(self, path: list[str], command: list[str]) -> None:
        """
        Args:
            path: The driver's ``sys.path``, so that a worker can import everything that the driver can import.
            command: The driver's ``sys.argv``, for messages of other processes about this one.
        """
        sys.path += [folder for folder in path if folder not in sys.path]
        sys.argv = command
        interrupt.listen()
        allocator.keep_free_memory()
        threads.bound_spinning()

    def host(self) -> str:
        """The name of the machine on which it runs."""
        return platform.node()

    def work(self, job: tuple[Callable[[Any], Any], Any], folder: str, notes: Any) -> Outcome:
        """Do the job.

        Args:
            job: The function and its argument.
            folder: The driver's working folder; relative paths begin there.
            notes: The actor ``Notes``.
        """
        do, argument = job

        def send_note(text: str) -> None:
            with contextlib.suppress(exceptions.RayError):  # the work does not need it
                ray.get(notes.add.remote(text))

        def work() -> Any:
            _change_folder(folder)
            return do(argument)

        with as_worker(send_note), also_stopped_by(ray.get_runtime_context().is_canceled):
            return outcome_of(work)


@dataclass
class _Worker:
    """An actor as the driver knows it. ``host`` and ``result`` are Ray's references to the results of its two calls."""

    place: int
    actor: Any
    host: Any
    result: Any


class _Actors(Crew):
    def __init__(self, count: int, job: Any, cpus: float, gpus: float) -> None:
        super().__init__(count)
        self._job = job
        self._working: list[_Worker] = []
        self._began = time.monotonic()
        self._class = ray.remote(Actor).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._notes: Any = ray.remote(Notes).options(num_cpus=0, scheduling_strategy=here).remote()

    @property
    def is_working(self) -> bool:
        return bool(self._working)

    def start(self) -> None:
        for place in range(self.count):
            self._start_actor(place)

    def listen(self, seconds: float) -> None:
        ended = self._ended(seconds)
        self._show_notes()
        for worker in ended:
            try:
                outcome = ray.get(worker.result)
            except LOST as error:
                *_, why = (line.strip() for line in str(error).splitlines() if line.strip())
                advice = f"Ray says: {why} If memory was too small, give fewer --workers."
                self._replace(worker, "was lost", advice)
                continue
            except exceptions.RayTaskError as error:  # the worker could not read the job or send its result
                raise RuntimeError(f"A worker on {_host(worker)}: {error_text(error.cause)}") from error
            if outcome.stopped:
                self._replace(worker, "was stopped by a signal", "Another program ends workers of this cluster.")
                continue
            if outcome.error is not None:
                raise outcome.error
            self.results[worker.place] = outcome.value
        if self._working and time.monotonic() - self._began > ROOM_S:
            self._note_waiting()

    def stop(self) -> None:
        for worker in self._working:
            ray.cancel(worker.result)
        end = time.monotonic() + STOP_S
        while self._working and (left := end - time.monotonic()) > 0:
            self._ended(min(left, 1.0))  # short calls, so that a second Ctrl-C has an effect between them

    def end(self) -> None:
        for actor in [self._notes, *(worker.actor for worker in self._working)]:
            ray.kill(actor)

    def _show_notes(self) -> None:
        with contextlib.suppress(exceptions.RayError):  # the work does not need them
            for text in ray.get(self._notes.take.remote()):
                self.note(text)

    def _ended(self, seconds: float) -> list[_Worker]:
        """The workers that have ended, for any reason. Their CPUs and GPUs are free again."""
        ready, _ = ray.wait([worker.result for worker in self._working], num_returns=1, timeout=seconds)
        ended = [worker for worker in self._working if worker.result in ready]
        for worker in ended:
            self._working.remove(worker)
            ray.kill(worker.actor)  # even an actor that cannot be reached may be alive
        return ended

    def _replace(self, lost: _Worker, how: str, advice: str) -> None:
        self.count_lost(f"A worker on {_host(lost)} {how}", advice)
        self._start_actor(lost.place)

    def _start_actor(self, place: int) -> None:
        actor: Any = self._class.remote([path or os.getcwd() for path in sys.path], sys.argv)  # noqa: PTH109
        host = actor.host.remote()
        result = actor.work.remote(self._job, os.getcwd(), self._notes)  # noqa: PTH109
        self._working.append(_Worker(place, actor, host, result))
        self._began = time.monotonic()

    def _note_waiting(self) -> None:
        _, waiting = ray.wait([worker.host for worker in self._working], num_returns=len(self._working), timeout=0)
        if waiting:
            self.note(f"{count_text(len(waiting), 'worker')} not started yet: the Ray cluster has no room, or is slow.")


def _host(worker: _Worker) -> str:
    """The machine on which the worker runs or ran."""
    try:
        return str(ray.get(worker.host, timeout=1))
    except exceptions.RayError:
        return "a machine of the Ray cluster"


def _change_folder(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"The working folder {folder} cannot be used on {platform.node()}: {error.strerror}.",
            "Start the command in a folder that all machines of the Ray cluster share.",
        ) from None


def _resources_of_each(count: int, gpus: float | None) -> tuple[float, float]:
    """CPUs and GPUs of each worker. All workers get the same number of CPUs, as many as possible.

    Args:
        count: How many workers.
        gpus: GPUs of each worker; None means one GPU if the cluster has GPUs.

    Raises:
        ConfigError: If the cluster has no room for so many workers.
    """
    cluster: Any = ray
    nodes = [node["Resources"] for node in cluster.nodes() if node["Alive"]]
    cpus = [math.floor(node.get("CPU", 0)) for node in nodes]
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    on_gpus = [math.floor(node.get("GPU", 0) / gpus + 1e-6) if gpus else count for node in nodes]

    def room(share: float) -> int:
        return sum(min(math.floor(cpu / share + 1e-6), gpu) for cpu, gpu in zip(cpus, on_gpus, strict=True))

    if room(1 / count) < count:
        total = sum(node.get("GPU", 0) for node in nodes)
        raise ConfigError(
            f"--workers {count} with {gpus:g} GPUs each: the Ray cluster has {count_text(sum(cpus), 'CPU')} and "
            f"{count_text(int(total), 'GPU')}, room for {count_text(room(1 / count), 'worker')}.",
            "Give fewer --workers, or less with --gpus-per-worker.",
        )
    whole = [float(number) for number in range(max(cpus), 0, -1)]
    parts = [math.floor(10_000 / several) / 10_000 for several in range(2, count + 1)]  # Ray counts in steps of 0.0001
    return next(share for share in [*whole, *parts] if room(share) >= count), gpus


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Inside the block, this process is connected to Ray. A connection that the caller made before stays open after it.

    Raises:
        ConfigError: If there is no cluster at ``RAY_ADDRESS``, or it has another version of Ray.
    """
    with _quiet():
        if ray.is_initialized():
            yield
            return
        address = os.environ.get("RAY_ADDRESS", "")
        if address not in ("", "local", "auto"):
            _check_cluster(address)
        own: dict[str, Any] = {"address": "local", "num_cpus": threads.cores(), "include_dashboard": False}
        try:
            with handlers_kept():  # Ray's own handler would end this process on SIGTERM
                ray.init(
                    **({"address": address} if address not in ("", "local") else own),
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise _no_cluster(address or "this machine", error_text(error)) from None
        try:
            yield
        finally:
            ray.shutdown()


def _check_cluster(address: str) -> None:
    """Check that a cluster answers within seconds."""
    match = re.fullmatch(r"([^/\s]+):(\d+)", address)
    if match is None:
        raise _no_cluster(address, "it is not HOST:PORT")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error_text(error)) from None
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "health-check",
        "--address",
        address,
        "--skip-version-check",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, check=False, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, "what listens there does not answer as a Ray cluster") from None
    if answer.returncode:
        raise _no_cluster(address, answer.stderr.decode(errors="replace").strip().rpartition("\n")[2])


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"--engine ray: no Ray cluster can be used at {address}: {why.rstrip('.')}.",
        "Set RAY_ADDRESS to HOST:PORT as `ray start --head` shows it, or unset it to start a Ray on this machine.",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, Ray prints nothing on the terminal. Nothing else in the process changes."""
    from ray._private import worker

    before = {name: getattr(worker, name) for name in ("print_to_stdstream",) if hasattr(worker, name)}
    usage = os.environ.get("RAY_USAGE_STATS_ENABLED")
    logger = logging.getLogger("ray")
    level = logger.level
    for name in before:
        # Ray prints events of machines on standard output, and has no option that turns this off.
        setattr(worker, name, lambda *arguments, **options: None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = usage or "0"
    try:
        yield
    finally:
        logger.setLevel(level)
        if usage is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        for name, function in before.items():
            setattr(worker, name, function)
