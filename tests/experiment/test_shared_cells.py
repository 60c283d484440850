"""Processes that share the cells of one sweep."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mounts
import pytest
from forking import in_child
from sweeps import (
    CELLS,
    GRID,
    LONG,
    a_world,
    holders,
    kill_whoever_trains,
    let_both_come,
    manifest_of,
    scores,
    signal_in_training,
    start,
    table,
    trained,
    training,
    wait_for,
    with_grid,
)
from waiting import is_alive, wait_until
from world import World

from kr2cache import cli
from kr2cache.commands.settings import TRAIN_OPTIONS
from kr2cache.config import TrainConfig
from kr2cache.errors import BusyError, ConfigError, TrainingError
from kr2cache.experiment import pipeline, shared_cells
from kr2cache.experiment.cells import Cell, cells_of
from kr2cache.experiment.grid import Grid, read_grid
from kr2cache.experiment.manifest import WORK_KEYS, read_manifest, unit_of
from kr2cache.experiment.shared_cells import DrivenCells, SharedCells
from kr2cache.experiment.sweep import Sweep
from kr2cache.system import claims
from kr2cache.system.console import as_worker
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(world.folder)
    return with_grid(world)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, bert: Path, reader_model: Path, corpus: Path) -> World:
    """A world in which one process has run the sweep."""
    world = a_world(tmp_path_factory.mktemp("alone"), bert, reader_model, corpus)
    with contextlib.chdir(world.folder):
        assert cli.run(["sweep", "grid.toml"]) == 0
    return world


@pytest.fixture
def started(here: World) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """A function that starts a process of the sweep. The processes are killed at the end of the test."""
    with contextlib.ExitStack() as running:

        def begin() -> subprocess.Popen[str]:
            process = running.enter_context(start(here))
            running.callback(process.kill)
            return process

        yield begin


# Whole sweeps --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("programs", "quick")
def test_two_processes_share_the_cells_and_show_the_same(
    here: World, alone: World, started: Callable[[], subprocess.Popen[str]]
) -> None:
    processes = [started(), started()]
    let_both_come(here, *processes)
    shown = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    one, other = map(trained, shown)
    assert sorted(one + other) == sorted(CELLS), "every cell is trained once"
    assert one and other
    assert table(shown[0]) == table(shown[1])
    assert "8 of 8 cells filled." in shown[0]
    assert scores(here) == scores(alone)
    assert manifest_of(here).read_bytes() == manifest_of(alone).read_bytes()
    assert not list((here.folder / "runs").rglob("reader")), "no reader is left"
    assert not list(here.folder.rglob("*.claims"))
    splits = [path.parent.name for path in here.caches.rglob("*.h5")]
    assert len(splits) == 3, "one cache for each split"


@pytest.mark.usefixtures("programs", "quick")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_cell_of_a_process_that_ends_is_trained_by_another(
    here: World, alone: World, started: Callable[[], subprocess.Popen[str]], how: signal.Signals
) -> None:
    first = started()
    signal_in_training(here, first, how)
    second = started()
    said = first.communicate()[0]
    assert first.returncode == (-how if how is signal.SIGKILL else 128 + how)
    if how is not signal.SIGKILL:
        assert "The sweep grid stopped at cell 1 of 8 (X · KResource)." in said
        assert "Traceback" not in said
    shown = second.communicate()[0]
    assert second.returncode == 0, shown
    assert ("was killed, or it crashed" in shown) == (how is signal.SIGKILL)
    assert trained(said) == ["X · KResource"], "the teacher comes first"
    assert sorted(trained(shown)) == sorted(CELLS)
    assert scores(here) == scores(alone)
    assert manifest_of(here).read_bytes() == manifest_of(alone).read_bytes()
    assert not list(here.folder.rglob("*.claims"))


@pytest.mark.usefixtures("programs", "quick")
def test_workers_train_the_cells_of_one_command(here: World, alone: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sweep", "grid.toml", "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    assert sorted(re.findall(r"^([XY] · \w+): f1 ", shown, flags=re.MULTILINE)) == sorted(CELLS), "each is shown once"
    assert "8 of 8 cells filled." in shown
    assert scores(here) == scores(alone)
    assert manifest_of(here).read_bytes() == manifest_of(alone).read_bytes()
    assert not list((here.folder / "runs").rglob("reader"))
    assert not list(here.folder.rglob("*.claims"))


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_processes_join_the_workers_of_another_sweep(here: World, alone: World) -> None:
    first = start(here, "--workers", "2")
    wait_for(here, first, lambda: training(here))
    joined = [start(here, "--workers", "2"), start(here)]
    shown = [process.communicate()[0] for process in (first, *joined)]
    late = start(here)
    shown.append(late.communicate()[0])
    assert [process.returncode for process in (first, *joined, late)] == [0] * 4, shown
    assert len({table(text) for text in shown}) == 1
    assert scores(here) == scores(alone)
    assert manifest_of(here).read_bytes() == manifest_of(alone).read_bytes()
    assert not list(here.folder.rglob("*.claims"))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_read_caches_on_a_read_only_disk(here: World, alone: World, engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    shutil.copytree(alone.caches, here.caches)
    with mounts.read_only(here.caches):
        process = start(here, "--workers", "2", "--engine", engine)
        shown = process.communicate()[0]
    assert process.returncode == 0, shown
    assert scores(here) == scores(alone)


@pytest.mark.usefixtures("programs", "quick")
def test_a_failure_in_a_worker_is_shown_once_and_at_the_end(here: World, capsys: pytest.CaptureFixture[str]) -> None:
    grid = here.folder / "grid.toml"
    grid.write_text(
        GRID.replace('fusion = "all"', 'fusion = "all"\nlearning-rate = 1e38').replace("[1]", "[2]"), "utf-8"
    )
    assert cli.run(["sweep", "grid.toml", "--workers", "2"]) == 1
    shown = capsys.readouterr().out
    assert "6 of 8 cells filled." in shown
    before, _, after = shown.partition("6 of 8 cells filled.")
    assert before.count("✗ X · All: ") == before.count("✗ Y · All: ") == 1
    assert after.count("X · All, Y · All: ") == 1
    assert "done" not in json.loads(manifest_of(here).read_text("utf-8"))["cells"][0]


@pytest.mark.usefixtures("programs", "quick")
@pytest.mark.parametrize(("how", "cause"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Stopped by SIGTERM")])
def test_a_signal_ends_the_workers_too(here: World, how: signal.Signals, cause: str) -> None:
    process = start(here, "--workers", "2")
    while not any(holders(here.folder / "runs" / "udpos")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    said = process.communicate()[0]
    assert process.returncode == 128 + how, said
    assert re.search(rf"{cause}\. The sweep grid stopped after \d of 8 cells\.", said)
    assert "Traceback" not in said
    assert not list(here.folder.rglob("*.claims"))
    assert "taken_by" not in manifest_of(here).read_text("utf-8"), "no process died in a cell"


@pytest.mark.parametrize("options", [["--workers", "0"], ["--engine", "rai"], ["--gpus-per-worker", "-1"]])
def test_wrong_settings_of_workers_are_refused(
    here: World, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sweep", "grid.toml", *options]) == 1
    assert options[1] in capsys.readouterr().err
    assert not (here.folder / "runs").exists()


# Processes that are killed -------------------------------------------------------------------------------------------


@pytest.fixture
def long(here: World) -> World:
    (here.folder / "grid.toml").write_text(LONG, "utf-8")
    return here


@pytest.fixture(scope="module")
def long_scores(tmp_path_factory: pytest.TempPathFactory, bert: Path, reader_model: Path, corpus: Path) -> Any:
    """What one process makes of the long grid."""
    world = a_world(tmp_path_factory.mktemp("long"), bert, reader_model, corpus, LONG)
    with contextlib.chdir(world.folder):
        assert cli.run(["sweep", "grid.toml"]) == 0
    return scores(world)


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_a_process_that_is_killed_beside_another_costs_its_cell_alone(
    long: World, long_scores: dict[str, bytes], started: Callable[[], subprocess.Popen[str]]
) -> None:
    one, other = started(), started()
    let_both_come(long, one, other)
    runs = long.folder / "runs"

    def both_train() -> bool:
        return training(long) == {one.pid, other.pid} and bool(list(runs.rglob("seed-1/metrics.json")))

    wait_for(long, other, both_train)
    one.kill()
    finished = {path: path.stat().st_ino for path in runs.rglob("seed-1/metrics.json")}
    lost, shown = one.communicate()[0], other.communicate()[0]
    assert other.returncode == 0, shown
    assert one.returncode == -signal.SIGKILL
    killed = trained(lost)[-1]
    assert sorted(trained(lost) + trained(shown)) == sorted([*CELLS, killed]), "no other cell was begun twice"
    died = f"✗ {killed}: The process that trained this cell was killed, or it crashed."
    assert f"{died} This process tries it again." in shown
    assert "8 of 8 cells filled." in shown
    assert scores(long) == long_scores
    assert finished and all(path.stat().st_ino == inode for path, inode in finished.items())
    assert not list(long.folder.rglob("*.claims"))


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_a_worker_that_is_killed_is_replaced(long: World, long_scores: dict[str, bytes]) -> None:
    driver = start(long, "--workers", "2")
    wait_for(long, driver, lambda: len(training(long)) == 2)
    os.kill(min(training(long)), signal.SIGKILL)
    shown = driver.communicate()[0]
    assert driver.returncode == 0, shown
    assert shown.count("was ended by SIGKILL; another one takes its place.") == 1
    assert shown.count("was killed, or it crashed. Another worker tries it again.") == 1
    assert "8 of 8 cells filled." in shown
    assert scores(long) == long_scores
    assert not list(long.folder.rglob("*.claims"))


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_a_worker_that_sigterm_stops_is_no_failure(long: World, long_scores: dict[str, bytes]) -> None:
    driver = start(long, "--workers", "2")
    wait_for(long, driver, lambda: len(training(long)) == 2)
    os.kill(min(training(long)), signal.SIGTERM)
    shown = driver.communicate()[0]
    assert driver.returncode == 0, shown
    assert shown.count("was stopped by a signal; another one takes its place.") == 1
    assert "was killed, or it crashed" not in shown
    assert "8 of 8 cells filled." in shown
    assert scores(long) == long_scores
    assert not list(long.folder.rglob("*.claims"))


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_a_cell_that_kills_every_worker_is_reported_and_the_others_are_trained(
    long: World, long_scores: dict[str, bytes]
) -> None:
    driver = start(long, "--workers", "2")
    killed = kill_whoever_trains(long, "*-all-*", driver)
    shown = driver.communicate()[0]
    assert driver.returncode == 1, shown
    assert len(killed) == 4, "two workers for each of two cells"
    assert "6 of 8 cells filled." in shown
    assert "X · All, Y · All: The process that trained this cell was killed, or it crashed." in shown
    for cell in ("X · All", "Y · All"):
        said = re.findall(rf"✗ {re.escape(f'{cell}: {shared_cells.DIED.message}')} (.+)", shown)
        assert said == ["Another worker tries it again.", "It is not tried again."]
    assert scores(long) == {path: content for path, content in long_scores.items() if "-all-" not in path}
    again = start(long, "--workers", "2")
    shown = again.communicate()[0]
    assert again.returncode == 0, shown
    assert scores(long) == long_scores
    assert not list(long.folder.rglob("*.claims"))


def no_worker_left(workers: set[int]) -> bool:
    return not any(map(is_alive, workers))


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_after_ctrl_c_and_after_the_death_of_the_driver_the_next_sweep_goes_on(
    long: World, long_scores: dict[str, bytes]
) -> None:
    for how in (signal.SIGINT, signal.SIGKILL):
        driver = start(long, "--workers", "2")
        wait_for(long, driver, lambda: len(training(long)) == 2)
        workers = training(long)
        driver.send_signal(how)
        said = driver.communicate()[0]
        assert driver.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), said
        if how is signal.SIGINT:
            assert no_worker_left(workers)
            assert not list(long.folder.rglob("*.claims"))
        wait_until(partial(no_worker_left, workers))
    last = start(long, "--workers", "2")
    shown = last.communicate()[0]
    assert last.returncode == 0, shown
    assert "was killed, or it crashed" not in shown, "workers that were asked to stop did not die"
    assert scores(long) == long_scores
    assert not list(long.folder.rglob("*.claims"))


def test_processes_that_die_in_a_cell_are_failures(
    world: World, quick: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = pipeline.train_seed

    def dying(job: Any, *rest: Any) -> Any:
        if job.config.fusion == "all" and job.config.batch_size == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(job, *rest)

    monkeypatch.setattr(pipeline, "train_seed", dying)
    wait_for_all(3, monkeypatch)

    def work() -> None:
        result = Sweep(*cells_in(world), keep_readers=False).run()
        assert [cell.name for cell in result.failed] == ["X · All"]
        assert result.failed[0].error is not None
        assert result.failed[0].error.message == shared_cells.DIED.message

    children = [in_child(work) for _ in range(3)]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0], capfd.readouterr().out
    cells = json.loads((world.folder / "runs" / "sweeps" / "small.json").read_text("utf-8"))["cells"]
    assert [cell["row"] for cell in cells if cell["folder"] is None] == ["All"]
    assert not any(key in cell for cell in cells for key in WORK_KEYS)


def die_in_a_cell(sharing: Callable[[], SharedCells], name: str) -> None:
    def work() -> None:
        shared = sharing()
        shared.__enter__()
        held = shared.take(cell for cell in shared.cells if cell.name == name)
        assert held is not None
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == -signal.SIGKILL


def fill(shared: SharedCells) -> list[str]:
    """Fill all cells that are left; returns their names."""
    names = []
    while (held := shared.take(shared.cells)) is not None:
        with held:
            names.append(held.cell.name)
            held.cell.error, held.cell.folder = None, "udpos/here"
            shared.settle(held.cell)
    return names


def test_a_cell_in_which_a_process_died_comes_last_in_the_next_sweep(
    world: World, sharing: Callable[[], SharedCells], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        die_in_a_cell(sharing, "X · KR2")
    with sharing() as shared:
        names = fill(shared)
        manifest = shared.manifest
    assert len(names) == 8 and names[-1] == "X · KR2", "the sweeps before have ended: it is tried"
    assert capsys.readouterr().out == f"✗ X · KR2: {shared_cells.DIED.message} This process tries it again.\n"
    assert not any(key in manifest.read_text("utf-8") for key in WORK_KEYS)


def test_the_deaths_of_workers_count_while_their_driver_is_there(
    world: World, sharing: Callable[[], SharedCells]
) -> None:
    alone = sharing()
    with DrivenCells(alone.grid, alone.cells, alone.manifest) as alone:
        for _ in range(2):
            die_in_a_cell(sharing, "X · KR2")
        with sharing() as last:
            names = fill(last)
            assert len(names) == 7 and "X · KR2" not in names, "two died in it"
            assert alone.what_next(alone.cells[1], 2) == "It is not tried again."
            assert last.cells[1].error is not None and last.cells[1].error.remedy == shared_cells.DIED.remedy
        entry = read_manifest(alone.manifest)[unit_of(alone.cells[1])]
        assert list(entry["failed_by"].values()) == [shared_cells.DIED.message] * 2
    assert not any(key in alone.manifest.read_text("utf-8") for key in WORK_KEYS)


def test_a_process_that_is_interrupted_did_not_die(world: World, sharing: Callable[[], SharedCells]) -> None:
    with sharing() as other:
        with pytest.raises(KeyboardInterrupt), sharing() as one:
            held = one.take(one.cells)
            assert held is not None and held.cell.name == "X · KR2"
            with held:
                assert "taken_by" in one.manifest.read_text("utf-8")
                raise KeyboardInterrupt
        assert fill(other)[0] == "X · KR2"
        assert all(cell.error is None for cell in other.cells)


# One cell that fails -------------------------------------------------------------------------------------------------


def cells_in(world: World, text: str = GRID) -> tuple[Grid, list[Cell]]:
    (world.folder / "small.toml").write_text(text, "utf-8")
    grid = read_grid(world.folder / "small.toml", TRAIN_OPTIONS)
    models = {name: {"path": str(world.folder / "models" / name)} for name in ("res", "reader")}
    defaults = {"run_dir": world.folder / "runs", "cache_dir": world.caches}
    return grid, cells_of(
        grid, lambda row, column: grid.config(
            row, column, defaults=defaults, overrides={"data": str(world.data)}, models=models, training={}
        )
    )  # fmt: skip


def ended_well(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cells, "LOOK_EVERY_S", 0.02)


def wait_for_all(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each of so many processes wait, once it has joined, until all have joined."""
    barrier, join = multiprocessing.get_context("fork").Barrier(count), SharedCells.__enter__

    def joined(shared: SharedCells) -> SharedCells:
        join(shared)
        barrier.wait(60)
        return shared

    monkeypatch.setattr(SharedCells, "__enter__", joined)


@pytest.fixture
def sharing(world: World, quick: None) -> Iterator[Callable[[], SharedCells]]:
    """A function that makes the ``SharedCells`` of one process; all share one manifest."""
    yield lambda: SharedCells(*cells_in(world), world.folder / "runs" / "sweeps" / "small.json")


def test_a_cell_that_fails_is_tried_by_two_processes_and_reported_once(
    world: World, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tries = tmp_path / "tries"
    tries.mkdir()
    real = pipeline.train_seed

    def failing(job: Any, *rest: Any) -> Any:
        if job.config.fusion == "all":
            (tries / f"{job.config.batch_size}-{os.getpid()}").touch()
            raise TrainingError("It diverged.", "Lower it.")
        return real(job, *rest)

    monkeypatch.setattr(pipeline, "train_seed", failing)
    wait_for_all(2, monkeypatch)

    def work() -> None:
        result = Sweep(*cells_in(world), keep_readers=False).run()
        assert [cell.name for cell in result.failed] == ["X · All", "Y · All"]
        assert result.json()["failed"] == 2

    children = [in_child(work), in_child(work)]
    assert all(map(ended_well, children)), capfd.readouterr().out
    assert len({path.name for path in tries.iterdir()}) == 4, "both processes tried both cells"
    cells = json.loads((world.folder / "runs" / "sweeps" / "small.json").read_text("utf-8"))["cells"]
    assert [cell["error"] for cell in cells if cell["row"] == "All"] == ["It diverged."] * 2
    assert sum("failed_by" in cell or "done" in cell for cell in cells) == 0
    shown = capfd.readouterr().out
    assert re.search(r"Another process of this sweep tries [XY] · All once more\.", shown)


def test_a_cell_that_another_process_can_train_is_no_failure(world: World, sharing: Callable[[], SharedCells]) -> None:
    with sharing() as one, sharing() as other:
        cell, same = one.cells[1], other.cells[1]
        held = one.take([cell])
        assert held is not None
        with held:
            cell.fail(TrainingError("It diverged.", "Lower it."))
            one.settle(cell)
        assert not one.is_settled(cell), "the other process has not tried it yet"
        again = other.take([same])
        assert again is not None and again.cell is same
        with again:
            assert same.error is not None and same.error.remedy == "Lower it."
            same.error, same.folder = None, "udpos/here"
            other.settle(same)
        one._refresh()
        assert one.is_settled(cell)
        assert (cell.error, cell.folder) == (None, "udpos/here")


def test_a_process_says_for_whom_it_waits_but_a_worker_does_not(
    world: World, sharing: Callable[[], SharedCells], capsys: pytest.CaptureFixture[str]
) -> None:
    with sharing() as one, sharing() as other:
        held = one.take([one.cells[1]])
        assert held is not None
        with held:
            said: list[str] = []
            with as_worker(said.append):
                one._note_waiting(one.cells)
            assert (said, capsys.readouterr().out) == ([], "")
            other._note_waiting(other.cells)
            assert capsys.readouterr().out.startswith(f"! X · KR2 is being trained by process {os.getpid()} of ")


def test_a_failure_is_final_once_no_process_is_left_to_try(world: World, sharing: Callable[[], SharedCells]) -> None:
    one = sharing()
    one.cells[4].fail(ConfigError("no model here", ""))
    with one:
        excluded = one.cells[4]
        assert one.is_settled(excluded), "its check failed, and there is no other process"
        with sharing() as other:
            one._refresh()
            assert not one.is_settled(excluded), "the other process may have the model"
            other.cells[0].fail(TrainingError("It diverged.", ""))
            other.settle(other.cells[0])
            one._refresh()
            assert not one.is_settled(one.cells[0])
            one.cells[0].fail(TrainingError("It diverged.", ""))
            one.settle(one.cells[0])
            assert one.is_settled(one.cells[0]), "two processes failed"
        one._refresh()
        assert one.is_settled(excluded)
        assert excluded.error is not None and excluded.error.message == "no model here"


def test_processes_do_not_wait_forever_for_each_other_to_retry(
    world: World, sharing: Callable[[], SharedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_all(2, monkeypatch)

    def work(failing: str, excluded: str) -> Callable[[], None]:
        def run() -> None:
            shared = sharing()
            for cell in shared.cells:
                if cell.row.name == excluded:
                    cell.fail(ConfigError("no model here", ""))
            order = [cell for cell in shared.cells if cell.error is None]
            with shared:
                while (held := shared.take(order)) is not None:
                    with held:
                        held.cell.folder = "udpos/here"
                        if held.cell.row.name == failing:
                            held.cell.fail(TrainingError("It diverged.", ""))
                        shared.settle(held.cell)
            assert {cell.row.name for cell in shared.cells if cell.error} == {"KR2", "All"}

        return run

    children = [in_child(work("KR2", "All")), in_child(work("All", "KR2"))]
    assert all(map(ended_well, children))


# Order, readers, manifest --------------------------------------------------------------------------------------------


def test_a_distillation_is_not_taken_while_its_teacher_is_being_trained(
    world: World, sharing: Callable[[], SharedCells]
) -> None:
    with sharing() as one, sharing() as other:
        learner, _, teacher, _ = one.cells[:4]
        assert teacher.teaches(learner) and not learner.teaches(teacher) and not teacher.teaches(one.cells[4])
        held = one.take([teacher, learner])
        assert held is not None and held.cell is teacher
        free = other.take([other.cells[0], other.cells[3]])
        assert free is not None and free.cell is other.cells[3], "the cell that waits for no teacher"
        with held:
            teacher.folder = "udpos/here"
            one.settle(teacher)
        following = other.take([other.cells[0]])
        assert following is not None and following.cell is other.cells[0]
        for taken in (free, following):
            with taken:
                pass


def test_a_reader_is_dropped_when_no_process_needs_it_any_more(world: World, quick: None) -> None:
    grid, cells = cells_in(world)
    manifest = world.folder / "runs" / "sweeps" / "small.json"
    sweep = Sweep(grid, cells, keep_readers=False)
    learner, _, teacher, _ = cells[:4]
    run = RunFolder(world.folder / "runs" / "udpos" / "teacher" / "seed-1")
    run.reader.mkdir(parents=True)
    run.metrics_file.write_text("{}", "utf-8")
    decided = {"task": "udpos", "method": "kresource", "reader": {}, "seed": 1}
    run.config_file.write_text(json.dumps({"config": decided, "recorded": {"temporary_reader": True}}), "utf-8")
    with SharedCells(grid, cells, manifest) as one, SharedCells(*cells_in(world), manifest) as other:
        teacher.folder = "udpos/teacher"
        one.settle(teacher)
        held = other.take([other.cells[0]])
        assert held is not None
        sweep._drop_readers(one)
        assert run.reader.is_dir(), "the other process still learns from it"
        held.cell.folder = "udpos/learner"
        with held:
            other.settle(held.cell)
        one._refresh()
        sweep._drop_readers(one)
        assert not run.reader.is_dir()
        assert learner.folder == "udpos/learner"


def test_the_manifest_is_complete_at_every_moment(
    world: World, sharing: Callable[[], SharedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = world.folder / "runs" / "sweeps" / "small.json"
    with sharing():  # writes the manifest before the others start
        pass
    wait_for_all(3, monkeypatch)

    def work() -> None:
        with sharing() as shared:
            while (held := shared.take(shared.cells)) is not None:
                with held:
                    time.sleep(0.01)
                    held.cell.folder = f"udpos/{held.cell.row.name}"
                    shared.settle(held.cell)

    children = [in_child(work) for _ in range(3)]
    seen, filled = 0, [0]
    while children:
        content = json.loads(manifest.read_text("utf-8"))
        assert len(content["cells"]) == 8 and content["title"] == "A shared table"
        filled.append(sum(cell["folder"] is not None for cell in content["cells"]))
        seen += 1
        if (ended := os.waitpid(-1, os.WNOHANG))[0]:
            assert os.waitstatus_to_exitcode(ended[1]) == 0
            children.remove(ended[0])
    assert seen > 20
    assert filled == sorted(filled), "no result is lost"
    assert filled[-1] == 8
    assert [path.name for path in manifest.parent.iterdir()] == ["small.json"]


def test_another_version_of_the_grid_is_refused_while_processes_work(
    world: World, sharing: Callable[[], SharedCells]
) -> None:
    manifest = world.folder / "runs" / "sweeps" / "small.json"
    edited = SharedCells(*cells_in(world, GRID.replace('"last4"', '"layer1"')), manifest)
    with sharing():
        before = manifest.read_bytes()
        with pytest.raises(BusyError, match=r"Another version of the grid small is being trained in .*runs by process"):
            edited.__enter__()
        assert manifest.read_bytes() == before
    with edited:
        assert "layer1" in manifest.read_text("utf-8")


def test_a_process_that_was_stopped_for_long_joins_again(
    world: World, sharing: Callable[[], SharedCells], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(claims, "TIMEOUT_S", 0.5)
    with sharing() as one:
        assert one._presence is not None
        one._presence._held.done.set()  # this ends its heartbeat
        with sharing() as other:
            while one._process in other._present:
                time.sleep(0.05)
                other._refresh()
        assert not one._presence.is_held, "the other process removed it when it left"
        one._refresh()
        with sharing() as other:
            other._refresh()
            assert not other.is_settled(other.cells[0]) and other._present > {other._process}


def test_torchrun_is_refused(here: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["sweep", "grid.toml"]) == 1
    assert "Start kr2cache sweep once for each GPU, without torchrun" in capsys.readouterr().err
    assert not (here.folder / "runs").exists()


def test_two_distillations_train_their_teacher_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"method": "kd", "teacher": str(world.resource), "resource": None, "epochs": 1.0}

    def work(seed: int) -> Callable[[], object]:
        config: TrainConfig = world.config(seeds=(seed,), **settings)
        return lambda: pipeline.train(config)

    log = world.folder / "log"
    real = pipeline.train_seed

    def counted(job: Any, *rest: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{job.config.method}\n")
        return real(job, *rest)

    monkeypatch.setattr(pipeline, "train_seed", counted)
    children = [in_child(work(1)), in_child(work(2))]
    assert all(map(ended_well, children))
    assert sorted(log.read_text().split()) == ["kd", "kd", "kresource"]


def test_a_teacher_whose_reader_another_sweep_drops_meanwhile_is_trained_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dropped = {"keep_readers": True, "temporary_readers": True}  # as a sweep trains teachers
    teacher = world.train(method="kresource", epochs=1.0, **dropped).runs[0].folder
    real = KReader.load

    def late(folder: Path, **options: Any) -> KReader:
        RunFolder(teacher).drop_temporary_reader()
        return real(folder, **options)

    monkeypatch.setattr(KReader, "load", late)
    capsys.readouterr()
    result = world.train(method="kd", teacher=str(world.resource), resource=None, epochs=1.0)
    assert result.runs[0].metrics["test"]
    assert "its reader: fine-tuning it again." in capsys.readouterr().out


def test_no_process_sees_half_of_a_reader_that_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.reader.mkdir()
    (run.reader / "model.safetensors").touch()
    real = shutil.rmtree

    def watched(folder: Path, **options: Any) -> None:
        assert not run.reader.exists()
        real(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    run.drop_reader()
    assert not list(tmp_path.iterdir())
