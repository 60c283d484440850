"""Workers as actors of a real Ray: on a cluster of three nodes on this machine, and on a Ray that the driver starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import pytest
import sweeps
import test_workers
import torch
from tiny import save_corpus
from tiny_cache import folder_bytes
from waiting import wait_until
from world import World

from kr2cache.cli import run as command_line
from kr2cache.errors import CacheError, ConfigError, WorkerLostError
from kr2cache.system.claims import held_units
from kr2cache.system.console import note
from kr2cache.workers import ray as engine
from kr2cache.workers import run_workers

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402


def run(work: Callable[[Any], Any], argument: Any = None, count: int = 2, **options: Any) -> list[Any]:
    return run_workers("ray", count, work, argument, **{"watch": lambda: 0, **options})


@pytest.fixture(scope="module")
def head_node() -> Iterator[Cluster]:
    """A cluster for all tests, because it takes seconds to start one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def cluster(head_node: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Three nodes, each with one CPU. Those that a test before has removed are there again."""
    while len(head_node.worker_nodes) < 2:
        head_node.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", head_node.address)
    return head_node


def describe(_: object) -> tuple[int, str, int, str]:
    time.sleep(0.5)
    return os.getpid(), ray.get_runtime_context().get_node_id(), torch.get_num_threads(), str(Path.cwd())


def note_and_wait(seen: Path) -> None:
    note("This takes long.")
    wait_until(seen.exists)


@pytest.mark.long
def test_a_cluster_of_three_nodes(
    cluster: Cluster, workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "ROOM_S", 600.0)  # no note on a busy machine
    results = run(describe, count=3)
    assert len({node for _, node, *_ in results}) == 3
    assert {tuple(rest) for *_, threads, folder in results for rest in [(threads, folder)]} == {(1, str(workdir))}
    assert not ray.is_initialized()
    capfd.readouterr()

    run(test_workers.send_notes, count=3)
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["! The model has no pooler.", "! UserWarning: old settings"]
    assert shown.err == ""

    assert run(test_workers.command_of) == [test_workers.command_of(None)] * 2

    def watch() -> int:
        if "This takes long." in capfd.readouterr().out:
            (workdir / "seen").touch()
        return 0

    run(note_and_wait, workdir / "seen", watch=watch)

    (workdir / "error").mkdir()
    with pytest.raises(CacheError, match="A shard was removed") as caught:
        run(test_workers.fail_or_stop, workdir / "error")
    assert caught.value.remedy == "Run it again."
    assert (workdir / "error" / "second done").exists()

    with pytest.raises(KeyError) as unexpected:
        run(test_workers.fail_plainly)
    assert "in fail_plainly" in unexpected.value.__notes__[0]

    (workdir / "death").mkdir()
    assert sorted(run(test_workers.die_once, workdir / "death")) == ["second", "third"]
    assert "was lost; another one takes its place." in capfd.readouterr().out

    with pytest.raises(WorkerLostError, match="was lost, and so did 3 others before") as lost:
        run(test_workers.die)
    assert "Ray says: " in lost.value.remedy
    assert capfd.readouterr().out.count("takes its place") == 3

    with pytest.raises(ConfigError, match="the Ray cluster has 3 CPUs and 0 GPUs, room for 0 workers"):
        run(describe, gpus_per_worker=1)

    monkeypatch.setattr(engine, "ROOM_S", 0.5)
    ray.init(address=cluster.address, log_to_driver=False)  # as a user's script may do
    busy = ray.remote(engine.Actor).options(num_cpus=1).remote([], [])
    ray.get(busy.host.remote())
    assert len({pid for pid, *_ in run(describe, count=3)}) == 3, "the third worker starts when another one is done"
    assert "1 worker not started yet: the Ray cluster has no room" in capfd.readouterr().out
    assert ray.is_initialized()
    ray.shutdown()


SENTENCES = 3000
SHARDS = {"shard_gb": 100_000 / 2**30, "tokens_per_batch": 64}
"""Many small batches in more than a hundred shards."""


def start(world: World, *more: str) -> subprocess.Popen[str]:
    """Start ``kr2cache extract --engine ray`` as a shell does. Paths are relative."""
    options = ["--resource=models/res", "--data=corpus", "--task=udpos", "--cache-dir=cache", "--device=cpu"]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in SHARDS.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "kr2cache.cli", "extract", "--engine=ray", *options, *more],
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def ended() -> Iterator[Callable[[subprocess.Popen[str]], subprocess.Popen[str]]]:
    """A driver that is given to it has ended when the next test uses the cluster, also after a failure."""
    with ExitStack() as running:

        def watched(driver: subprocess.Popen[str]) -> subprocess.Popen[str]:
            running.enter_context(driver)
            running.callback(driver.kill)
            return driver

        yield watched


def complete(caches: Path) -> int:
    """How many sequences are complete in the shards that exist."""
    count = 0
    for path in caches.glob("*/*/[!.]*/*.h5"):
        with contextlib.suppress(OSError), h5py.File(path, locking=False) as file:
            count += int(file["examples/complete"][:].sum())
    return count


@pytest.mark.long
def test_after_the_loss_of_a_node_the_bytes_are_the_same(cluster: Cluster, world: World, ended: Any) -> None:
    save_corpus(world.data, train=SENTENCES)
    alone = folder_bytes(world.extract(cache_dir=world.folder / "alone", **SHARDS).cache)
    driver = ended(start(world, "--workers=3"))
    test_workers.wait_until(lambda: complete(world.caches) or driver.poll() is not None, 300)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert 0 < complete(world.caches) < SENTENCES
    shown, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, shown
    assert shown.count("was lost; another one takes its place.") == 1
    assert "aylet" not in shown
    [cache] = world.cache_folders()
    assert folder_bytes(cache) == alone
    assert len(alone) > 50
    assert not held_units(cache)


@pytest.mark.long
def test_the_loss_of_a_node_changes_no_score(
    cluster: Cluster,
    world: World,
    make: Callable[[Path], World],
    monkeypatch: pytest.MonkeyPatch,
    ended: Any,
) -> None:
    """Then, on the nodes that are left, a cell that kills each of its workers."""
    alone = sweeps.with_grid(make(world.folder / "alone"), sweeps.LONG)
    with monkeypatch.context() as patch:
        patch.chdir(alone.folder)
        assert command_line(["sweep", "grid.toml"]) == 0
    expected = sweeps.scores(alone)
    driver = ended(sweeps.start(sweeps.with_grid(world, sweeps.LONG), "--engine=ray", "--workers=3"))
    sweeps.wait_for(world, driver, lambda: len(sweeps.training(world)) == 3)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    shown, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, shown
    assert shown.count("was lost; another one takes its place.") == 1
    assert shown.count(": The process that trained this cell was killed, or it crashed.") == 1
    assert "8 of 8 cells filled." in shown
    assert "aylet" not in shown
    assert sweeps.scores(world) == expected
    assert not list(world.folder.rglob("*.claims"))

    shutil.rmtree(world.folder / "runs")
    driver = ended(sweeps.start(world, "--engine=ray", "--workers=2"))
    killed = sweeps.kill_whoever_trains(world, "*-all-*", driver)
    shown, _ = driver.communicate()
    assert driver.returncode == 1, shown
    assert len(killed) == 4, "two workers for each of two cells"
    assert "6 of 8 cells filled." in shown
    assert "X · All, Y · All: The process that trained this cell was killed, or it crashed." in shown
    assert sweeps.scores(world) == {path: content for path, content in expected.items() if "-all-" not in path}


@pytest.mark.long
@pytest.mark.parametrize(("how", "cause"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Stopped by SIGTERM")])
def test_a_signal_leaves_no_process_and_no_claim(world: World, how: signal.Signals, cause: str) -> None:
    """On a Ray that the command starts itself."""
    save_corpus(world.data, train=SENTENCES)
    driver = start(world, "--workers=2")
    test_workers.wait_until(lambda: complete(world.caches) or driver.poll() is not None, 90)
    started = processes_of_session(driver.pid)
    assert sum("Actor" in name_of(pid) for pid in started) == 2
    os.killpg(driver.pid, how)  # as a terminal does on Ctrl-C
    shown, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + how, shown
    [cache] = world.cache_folders()
    assert f"{cause}. {complete(world.caches):,} of {SENTENCES:,} sequences are complete" in shown
    assert "Traceback" not in shown
    assert not list(cache.parent.glob(".*.claims"))
    test_workers.wait_until(lambda: not any(map(test_workers.is_alive, started)))


@pytest.mark.long
def test_an_actor_that_sigterm_stops_is_replaced(world: World) -> None:
    save_corpus(world.data, train=SENTENCES)
    driver = start(world, "--workers=2")
    test_workers.wait_until(lambda: complete(world.caches) or driver.poll() is not None, 90)
    actor = min(pid for pid in processes_of_session(driver.pid) if "Actor" in name_of(pid))
    os.kill(actor, signal.SIGTERM)
    shown, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, shown
    assert shown.count("was stopped by a signal; another one takes its place.") == 1
    assert "Traceback" not in shown
    assert complete(world.caches) == SENTENCES


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


DRIVER = """
import sys
from pathlib import Path
import test_workers
from kr2cache.workers import run_workers
run_workers("ray", 2, test_workers.run_batches, Path(sys.argv[1]), watch=lambda: 0)
"""


@pytest.mark.long
def test_workers_end_when_their_driver_is_killed(workdir: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(workdir)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    test_workers.wait_until(lambda: len([path for path in workdir.iterdir() if path.read_text()]) == 2, 60)
    workers = [int(path.name.partition("-")[2]) for path in workdir.iterdir()]
    assert set(workers) < processes_of_session(driver.pid)
    driver.kill()
    driver.wait()
    test_workers.wait_until(lambda: not any(map(test_workers.is_alive, workers)))


def processes_of_session(session: int) -> set[int]:
    """The process numbers of all processes in a session."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                found.add(int(path.parent.name))
    return found


def test_a_missing_installation_of_ray_is_an_error(
    bert: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command_line(["extract", "--resource", str(bert), "--task", "udpos", "--engine", "ray"]) == 1
    assert "--engine ray: Ray is not installed." in capsys.readouterr().err


def test_a_missing_cluster_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it is no Ray: it accepts connections, and sends nothing
        port = silent.getsockname()[1]
        for address, why in (
            (f"127.0.0.1:{port}", "does not answer as a Ray cluster"),
            ("127.0.0.1:1", "Connection refused"),
            ("http://127.0.0.1:8265", "it is not HOST:PORT"),
            ("node7", "it is not HOST:PORT"),
        ):
            monkeypatch.setenv("RAY_ADDRESS", address)
            began = time.monotonic()
            with pytest.raises(ConfigError, match=why) as caught:
                run(describe)
            assert address in caught.value.message
            assert "RAY_ADDRESS" in caught.value.remedy
            assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("nodes", "count", "gpus", "share"),
    [
        ([(8, 0)], 3, None, (2.0, 0.0)),
        ([(4, 0), (4, 0), (2, 0)], 3, None, (2.0, 0.0)),
        ([(1, 0), (1, 0)], 5, None, (0.3333, 0.0)),
        ([(16, 4), (2, 0)], 4, None, (4.0, 1.0)),
        ([(16, 4)], 8, 0.5, (2.0, 0.5)),
        ([(16, 4)], 3, 0, (5.0, 0.0)),
        ([(0, 0), (6, 0)], 2, None, (3.0, 0.0)),
    ],
)
def test_workers_get_equal_shares(
    nodes: list[tuple[int, int]],
    count: int,
    gpus: float | None,
    share: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)}} for c, g in nodes]
    )
    assert engine._resources_of_each(count, gpus) == share


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    with pytest.raises(ConfigError, match="8 CPUs and 2 GPUs, room for 2 workers"):
        engine._resources_of_each(3, None)
