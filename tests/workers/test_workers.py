"""Workers on this machine: real processes that start, send notes, die, are interrupted and are replaced."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import is_alive, wait_until

from kr2cache.errors import CacheError, ConfigError, UnknownNameError, WorkerLostError
from kr2cache.system.console import WorkProgress, console, note, note_waiting
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.system.owners import this_process
from kr2cache.workers import local, run_workers


def run(work: Callable[[Any], Any], argument: Any = None, count: int = 2, **options: Any) -> list[Any]:
    return run_workers("local", count, work, argument, **{"watch": lambda: 0, **options})


def claim_a_name(folder: Path) -> str:
    """The first of these names that no other worker has claimed."""
    for name in ("first", "second", "third", "fourth", "fifth"):
        with contextlib.suppress(FileExistsError):
            (folder / name).touch(exist_ok=False)
            return name
    raise AssertionError(folder)


def sum_of(argument: tuple[np.ndarray[Any, Any], int]) -> tuple[int, int, bool]:
    array, times = argument
    array[0] = 7  # changes only this worker's copy
    return os.getpid(), int(array[1:].sum()) * times, array.flags.owndata


def test_each_worker_is_a_process_and_all_share_the_memory_of_arrays() -> None:
    array = np.arange(100_000)
    results = run(sum_of, (array, 2), 3)
    assert len({pid for pid, *_ in results} | {os.getpid()}) == 4
    assert [rest for _, *rest in results] == [[int(array.sum()) * 2, False]] * 3
    assert array[0] == 0


def command_of(_: object) -> str:
    return this_process(1, earlier_may_live=False).command


@pytest.mark.usefixtures("forked_programs")
def test_a_claim_of_a_worker_names_the_command_of_its_driver() -> None:
    assert run(command_of) == [command_of(None)] * 2


def environment(_: object) -> tuple[str | None, str | None]:
    return os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize(("machine", "count", "share"), [(8, 3, "2"), (2, 4, "1")])
def test_workers_share_cores_and_gpus(machine: int, count: int, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(local, "cores", lambda: machine)
    monkeypatch.setattr(local, "visible_gpus", lambda: ["4", "6"])
    assert run(environment, count=count) == [(share, gpu) for gpu in ("4", "6", "4", "6")[:count]]


@pytest.mark.usefixtures("forked_programs")
def test_workers_use_the_number_of_threads_that_the_user_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [threads for threads, _ in run(environment)] == ["3", "3"]


def send_notes(_: object) -> None:
    note("The model has no pooler.")
    note_waiting("Somebody writes; waiting.")
    warnings.warn("old settings", UserWarning, stacklevel=1)
    os.write(2, b"from C++\n")
    console.print("a table")
    with WorkProgress("work", "steps", 1) as progress:
        progress.advance(1)


def test_a_note_of_several_workers_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    run(send_notes, count=3)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "! The model has no pooler.",
        "! UserWarning: old settings",
        "from C++",
    ]


def die_once(folder: Path) -> str:
    name = claim_a_name(folder)
    if name == "first":
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def test_a_worker_that_dies_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(run(die_once, tmp_path)) == ["second", "third"]
    assert "was ended by SIGKILL; another one takes its place." in capsys.readouterr().out


def die(_: object) -> None:
    os._exit(3)


@pytest.mark.usefixtures("forked_programs")
def test_workers_that_die_again_and_again_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerLostError, match="ended with exit code 3, and so did 3 others before"):
        run(die)
    assert capsys.readouterr().out.count("takes its place") == 3


def fail_or_stop(folder: Path) -> None:
    if claim_a_name(folder) == "first":
        wait_until((folder / "second at work").exists)
        raise CacheError("A shard was removed.", "Run it again.")
    with interrupt_between_batches() as check_interrupt:
        (folder / "second at work").touch()
        try:
            for _ in range(1000):
                time.sleep(0.02)
                check_interrupt()
        finally:
            (folder / "second done").touch()


@pytest.mark.usefixtures("forked_programs")
def test_an_error_of_one_worker_stops_the_others_and_is_raised_once(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="A shard was removed") as caught:
        run(fail_or_stop, tmp_path)
    assert caught.value.remedy == "Run it again."
    assert (tmp_path / "second done").exists()


class OddError(Exception):
    """It cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} is not {two}")


def fail_oddly(_: object) -> None:
    raise OddError(1, 2)


def fail_plainly(_: object) -> None:
    {}["key"]  # type: ignore[var-annotated]


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize(
    ("work", "kind", "text"), [(fail_oddly, RuntimeError, "OddError: 1 is not 2"), (fail_plainly, KeyError, "key")]
)
def test_an_unexpected_error_keeps_its_traceback(work: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        run(work)
    [place] = caught.value.__notes__
    assert f"in {work.__name__}" in place


def give_a_function(_: object) -> Any:
    return lambda: None


@pytest.mark.usefixtures("forked_programs")
def test_a_result_that_cannot_be_sent_is_an_error_and_the_worker_is_not_replaced() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="give_a_function"):
        run(give_a_function)


def run_batches(folder: Path) -> None:
    """Run batches until Ctrl-C. Each takes a moment and is noted in the worker's file."""
    mark = folder / f"worker-{os.getpid()}"
    with interrupt_between_batches() as check_interrupt:
        mark.write_text("at work")
        while True:
            mark.write_text("in a batch")
            time.sleep(0.1)
            mark.write_text("between batches")
            try:
                check_interrupt()
            except KeyboardInterrupt:
                mark.write_text("stopped")
                raise


@pytest.mark.usefixtures("forked_programs")
def test_an_error_in_watch_stops_the_workers(tmp_path: Path) -> None:
    def watch() -> int:
        if len(list(tmp_path.iterdir())) == 2:
            raise CacheError("no disk")
        return 0

    with pytest.raises(CacheError, match="no disk"):
        run(run_batches, tmp_path, watch=watch)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["stopped"] * 2


DRIVER = """
import sys
from pathlib import Path
import test_workers
from kr2cache.system import interrupt
interrupt.listen()
try:
    test_workers.run(test_workers.run_batches, Path(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(interrupt.exit_code())
"""


def driver_at_work(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A driver with two workers that run batches, and the process numbers of the workers."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len([path for path in folder.iterdir() if path.read_text()]) == 2)
    return driver, [int(path.name.partition("-")[2]) for path in folder.iterdir()]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGTERM to all"])
def test_a_signal_lets_workers_finish_their_batch_and_leaves_no_process(tmp_path: Path, how: str) -> None:
    driver, workers = driver_at_work(tmp_path)
    number = signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM
    os.killpg(driver.pid, number)  # as a terminal does on Ctrl-C
    for worker in workers if how == "SIGTERM to all" else ():  # as SLURM does
        os.kill(worker, number)
    shown, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + number
    again = f"{how.split(maxsplit=1)[0]} again ends the workers at once."
    assert shown == f"! Stopping: each worker finishes its current batch. {again}\n"
    assert not any(map(is_alive, workers))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["stopped"] * 2


@pytest.mark.usefixtures("programs")
def test_ctrl_c_while_the_workers_start_shows_no_traceback(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text())
    driver.send_signal(signal.SIGINT)
    shown, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert shown == "! Stopping: each worker finishes its current batch. Ctrl-C again ends the workers at once.\n"


def stop_once(folder: Path) -> str:
    name = claim_a_name(folder)
    if name == "first":
        with interrupt_between_batches() as check_interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            (folder / "batch done").touch()
            check_interrupt()
    return name


@pytest.mark.usefixtures("programs")
def test_a_worker_that_a_signal_stops_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(run(stop_once, tmp_path)) == ["second", "third"]
    assert (tmp_path / "batch done").exists()
    shown = capsys.readouterr().out
    assert re.fullmatch(r"! Worker process \d+ was stopped by a signal; another one takes its place\.\n", shown)


@pytest.mark.usefixtures("programs")
def test_workers_stop_when_their_driver_is_killed(tmp_path: Path) -> None:
    driver, workers = driver_at_work(tmp_path)
    driver.kill()
    driver.communicate()
    wait_until(lambda: not any(map(is_alive, workers)))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["stopped"] * 2


@pytest.mark.usefixtures("programs")
def test_a_second_ctrl_c_ends_workers_at_once(tmp_path: Path) -> None:
    driver, workers = driver_at_work(tmp_path)
    os.kill(workers[0], signal.SIGSTOP)  # this worker never finishes its batch
    driver.send_signal(signal.SIGINT)
    wait_until(lambda: not is_alive(workers[1]))
    time.sleep(0.2)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=60)
    assert driver.returncode == 130, "it does not wait for the stopped worker"
    assert not any(map(is_alive, workers))


def test_an_engine_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown engine 'locale'\. Did you mean 'local'"):
        run_workers("locale", 1, sum_of, None, watch=lambda: 0)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert importlib.util.find_spec("ray") is None
    with pytest.raises(ConfigError, match="Ray is not installed"):
        run_workers("ray", 1, sum_of, None, watch=lambda: 0)  # type: ignore[arg-type]
