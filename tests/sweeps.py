"""A grid of eight cells, processes of its sweep, and what they leave."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from world import World

from kr2cache.experiment.shared_cells import WORKER
from kr2cache.system.claims import held_units

GRID = """
title = "A shared table"
[settings]
task = "udpos"
reader = "reader"
resource = "res"
data = "corpus"
device = "cpu"
epochs = 1
batch-size = 4
learning-rate = 1e-3
seeds = [1]
[[columns]]
name = "X"
[[columns]]
name = "Y"
batch-size = 3
[[rows]]
name = "KD"
method = "kd"
[[rows]]
name = "KR2"
fusion = "last4"
[[rows]]
name = "KResource"
method = "kresource"
[[rows]]
name = "All"
fusion = "all"
"""
CELLS = {f"{column} · {row}" for column in "XY" for row in ("KD", "KR2", "KResource", "All")}
TOML = '[defaults]\ncache-dir = "cache"\n[models.res]\npath = "models/res"\n[models.reader]\npath = "models/reader"\n'
LONG = GRID.replace("epochs = 1", "epochs = 12")
"""Each cell takes half a second and more, so that a kill falls into it."""


def with_grid(world: World, grid: str = GRID) -> World:
    """The world with a grid of eight cells. The grid's paths are relative, so they are the same in every world."""
    (world.folder / "grid.toml").write_text(grid, "utf-8")
    (world.folder / "kr2cache.toml").write_text(TOML, "utf-8")
    return world


def a_world(folder: Path, bert: Path, reader_model: Path, corpus: Path, grid: str = GRID) -> World:
    (folder / "models").mkdir()
    for name, there in (("models/res", bert), ("models/reader", reader_model), ("corpus", corpus)):
        (folder / name).symlink_to(there)
    return with_grid(World(folder), grid)


def start(world: World, *options: str) -> subprocess.Popen[str]:
    """One process of the sweep."""
    return subprocess.Popen(
        [sys.executable, "-m", "kr2cache.cli", "sweep", "grid.toml", *options],
        cwd=world.folder,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def manifest_of(world: World) -> Path:
    return world.folder / "runs" / "sweeps" / "grid.json"


def trained(shown: str) -> list[str]:
    """The cells that a process worked on, in order."""
    return re.findall(r"^─* ?\d/8 +(.+?) ─", shown, flags=re.MULTILINE)


def table(shown: str) -> str:
    """The table that a process shows at the end."""
    return shown[shown.index("A shared table ─") :]


def scores(world: World) -> dict[str, bytes]:
    """The files with scores and predictions of every run."""
    runs = world.folder / "runs"
    names = ("metrics.json", "history.json", "predictions-test.jsonl")
    return {str(path.relative_to(runs)): path.read_bytes() for name in names for path in runs.rglob(name)}


def signal_in_training(world: World, process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Send a signal to a process once it trains a cell."""
    while not any(str(process.pid) in holder for holder in holders(world.folder / "runs" / "udpos")):
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.01)
    process.send_signal(how)


def holders(folder: Path, runs: str = "*") -> Iterator[str]:
    """The content of the owner files of all claims on runs whose configuration matches."""
    for path in folder.glob(f"{runs}/.seed-*.claims/*/owner.json"):
        with contextlib.suppress(FileNotFoundError):
            yield path.read_text("utf-8")


def training(world: World, runs: str = "*") -> set[int]:
    """The processes that train runs now."""
    found = [re.search(r'"pid": (\d+)', text) for text in holders(world.folder / "runs" / "udpos", runs)]
    return {int(match[1]) for match in found if match}


def let_both_come(world: World, *processes: subprocess.Popen[str]) -> None:
    """The first process that trains a cell waits until all have come, however long their start takes."""
    wait_for(world, processes[0], lambda: training(world))
    [first] = training(world)
    os.kill(first, signal.SIGSTOP)
    wait_for(world, processes[0], lambda: len(workers_on(world)) == len(processes))
    os.kill(first, signal.SIGCONT)


def workers_on(world: World) -> list[str]:
    return [unit for unit in held_units(manifest_of(world)) if unit.startswith(WORKER)]


def wait_for(world: World, process: subprocess.Popen[str], there: Callable[[], object]) -> None:
    while not there():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def kill_whoever_trains(world: World, runs: str, driver: subprocess.Popen[str]) -> set[int]:
    """As the system does when memory is too small: end every process that trains such a run, until the driver ends."""
    killed: set[int] = set()
    while driver.poll() is None:
        for pid in training(world, runs) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.005)
    return killed
