"""One extraction by several workers: real processes, some of them killed or interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import tiny
import tiny_cache
import torch
from safetensors.torch import load_file, save_file

from kr2cache.cache.reader import FeatureCache
from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.errors import InterruptedWorkError
from kr2cache.extraction import budget, extract, together, trial
from kr2cache.extraction.planning import ExtractPlan, plan_extraction
from kr2cache.models.digests import OpenedModel

SENTENCES = 1200
SHARDS = {"shard_gb": 90_000 / 2**30, "tokens_per_batch": 64}
"""Many small batches in about fifty shards."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_corpus(tmp_path_factory.mktemp("together"), train=SENTENCES, dev=5, test=0)


@pytest.fixture
def config(bert: Path, texts: Path, tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(
        resource=str(bert), split="train", task="udpos", data=str(texts), device="cpu", cache_dir=tmp_path, **SHARDS
    )


@pytest.fixture(scope="module")
def by_one(bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process makes from the same settings."""
    config = ExtractConfig(
        resource=str(bert),
        split="train",
        task="udpos",
        data=str(texts),
        device="cpu",
        cache_dir=tmp_path_factory.mktemp("one"),
        **SHARDS,
    )
    made = tiny_cache.folder_bytes(extract.extract(config).cache)
    assert 20 < len(made) < 100
    return made


def wait_until(is_so: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def stat(pid: int) -> list[str]:
    """State, parent process and more of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def iter_until(lines: Iterable[str], end: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(end):
            return


def children(pid: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [number for number in numbers if stat(number)[1:2] == [str(pid)]]


def command(config: ExtractConfig) -> list[str]:
    shown = {**dataclasses.asdict(config), "models": None, "tasks": None}  # these are of kr2cache.toml
    return [f"--{name.replace('_', '-')}={value}" for name, value in shown.items() if value is not None]


def start(config: ExtractConfig) -> subprocess.Popen[str]:
    """Start ``kr2cache extract`` as a shell does."""
    return subprocess.Popen(
        [sys.executable, "-m", "kr2cache.cli", "extract", *command(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def complete(caches: Path) -> int:
    """How many sequences are complete in the shards that exist."""
    count = 0
    for path in caches.glob("*/*/[!.]*/*.h5"):
        with contextlib.suppress(OSError), h5py.File(path, locking=False) as file:
            count += int(file["examples/complete"][:].sum())
    return count


def workers_midway(driver: subprocess.Popen[str], caches: Path) -> list[int]:
    """The process numbers of the workers. They are stopped (SIGSTOP) when some sequences are complete, and not all."""
    wait_until(lambda: len(children(driver.pid)) == 2 or driver.poll() is not None)
    workers = children(driver.pid)
    for _ in range(2000):
        send(workers, signal.SIGSTOP)
        if done := complete(caches):
            assert done < SENTENCES
            return workers
        send(workers, signal.SIGCONT)
        time.sleep(0.03)
    raise AssertionError("the workers write nothing")


def send(processes: list[int], what: signal.Signals) -> None:
    for process in processes:
        os.kill(process, what)


def is_pending(process: int, what: signal.Signals) -> bool:
    """Whether a stopped process will get a signal when it goes on."""
    lines = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd")]
    return any(mask >> (what - 1) & 1 for mask in masks)


def cache_of(caches: Path) -> Path:
    [folder] = {path.parent for path in caches.rglob("*.h5")}
    return folder


@pytest.mark.usefixtures("programs")
def test_workers_give_the_bytes_of_one_process(
    config: ExtractConfig, by_one: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_workers_give_the_bytes(by_one, config, 2, capsys)


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_four_workers_give_the_bytes_of_one_process(
    config: ExtractConfig, by_one: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_workers_give_the_bytes(by_one, config, 4, capsys)


def assert_workers_give_the_bytes(
    expected: dict[str, bytes], config: ExtractConfig, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    result = extract.extract(dataclasses.replace(config, workers=workers))
    assert tiny_cache.folder_bytes(result.cache) == expected
    assert (result.sequences, result.computed, result.taken_over) == (SENTENCES, SENTENCES, 0)
    shown = capsys.readouterr().out
    assert f"{SENTENCES}/{SENTENCES} sequences {workers} workers" in shown
    assert "waiting for it" not in shown
    assert not list(result.cache.parent.glob(".*")), "all claims are released"


def test_a_complete_cache_needs_no_worker(
    config: ExtractConfig, by_one: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, split="dev")
    extract.extract(config)
    monkeypatch.delattr(together, "run_workers")
    assert extract.extract(dataclasses.replace(config, workers=2)).computed == 0


def test_the_driver_has_freed_its_model_when_the_workers_start(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, open_resource = [], trial.open_resource

    def opened(plan: ExtractPlan) -> OpenedModel:
        model = open_resource(plan)
        gc.disable()  # it could run by chance
        model.encoder.__dict__["again"] = [model.encoder]  # a circle, as the hooks of a device map make one
        models.append(weakref.ref(model.encoder))
        return model

    def no_workers(*arguments: Any, **options: Any) -> list[Any]:
        gc.enable()
        assert [model() for model in models] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "open_resource", opened)
    monkeypatch.setattr(together, "run_workers", no_workers)
    with pytest.raises(InterruptedWorkError):
        extract.extract(dataclasses.replace(config, split="dev", workers=2))


@pytest.mark.usefixtures("programs")
def test_workers_complete_the_shards_that_one_process_began(
    config: ExtractConfig, by_one: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = extract.extract(config).cache
    (cache / sorted(by_one)[3]).write_bytes(b"")
    result = extract.extract(dataclasses.replace(config, workers=2, shard_gb=None))
    assert tiny_cache.folder_bytes(cache) == by_one
    assert 0 < result.computed < SENTENCES / 4
    assert capsys.readouterr().out.count("was damaged") == 1


@pytest.mark.usefixtures("programs")
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(
    config: ExtractConfig, by_one: dict[str, bytes], tmp_path: Path
) -> None:
    driver = start(dataclasses.replace(config, workers=2))
    workers = workers_midway(driver, tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    os.kill(workers[1], signal.SIGCONT)
    shown, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, shown
    assert shown.count("was ended by SIGKILL; another one takes its place.") == 1
    assert tiny_cache.folder_bytes(cache_of(tmp_path)) == by_one


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("how", "cause"), [(signal.SIGINT, "Interrupted"), (signal.SIGTERM, "Stopped by SIGTERM")])
def test_a_signal_leaves_no_process_and_no_claim(
    config: ExtractConfig, by_one: dict[str, bytes], tmp_path: Path, how: signal.Signals, cause: str
) -> None:
    driver = start(dataclasses.replace(config, workers=2))
    workers = workers_midway(driver, tmp_path)
    os.killpg(driver.pid, how)  # as a terminal does on Ctrl-C
    assert driver.stdout is not None
    said = "".join(iter_until(driver.stdout, "! Stopping: each worker"))
    wait_until(lambda: all(is_pending(worker, signal.SIGINT) for worker in workers))
    send(workers, signal.SIGCONT)
    shown = said + driver.communicate(timeout=60)[0]
    assert driver.returncode == 128 + how
    assert not any(map(stat, workers))
    cache = cache_of(tmp_path)
    assert not list(cache.parent.glob(".*"))
    done = int(FeatureCache.open(cache).complete.sum())
    assert 0 < done < SENTENCES
    assert f"{cause}. {done:,} of {SENTENCES:,} sequences are complete, kept in {cache}." in shown
    assert "Traceback" not in shown
    assert extract.extract(config).computed <= SENTENCES - done + 2 * 64
    assert tiny_cache.folder_bytes(cache) == by_one


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_processes_join_the_workers_of_another_command(
    config: ExtractConfig, by_one: dict[str, bytes], tmp_path: Path
) -> None:
    first = start(dataclasses.replace(config, workers=2))
    workers = workers_midway(first, tmp_path)
    others = [start(dataclasses.replace(config, workers=2)), start(config)]
    wait_until(lambda: len(children(others[0].pid)) == 2)
    send(workers, signal.SIGCONT)
    shown = [process.communicate(timeout=120)[0] for process in (first, *others)]
    assert [process.returncode for process in (first, *others)] == [0, 0, 0], shown
    computed = [int(match[1].replace(",", "")) for match in map(COMPUTED.search, shown) if match]
    assert sum(computed) == SENTENCES, "no sequence was computed twice"
    assert tiny_cache.folder_bytes(cache_of(tmp_path)) == by_one
    assert not list(tmp_path.rglob(".*.claims"))


COMPUTED = re.compile(r"([\d,]+) sequences? computed")


@pytest.mark.usefixtures("programs")
def test_an_error_of_all_workers_is_shown_once(config: ExtractConfig, tmp_path: Path) -> None:
    model = Path(shutil.copytree(config.resource, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.2.output.dense.bias"][:] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    driver = start(dataclasses.replace(config, workers=2, resource=str(model), cache_dir=tmp_path / "cache"))
    shown, _ = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert shown.count("ValueRangeError") == 1
    assert shown.count("holds numbers that are not finite (nan or inf)") == 1
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers 0 makes no sense."),
        (["--workers", "2", "--device", "cuda:1"], "--device cuda:1 is one GPU, but each worker takes one of its own."),
        (
            ["--engine", "ray", "--device", "cuda:1"],
            "--device cuda:1 is one GPU, but each worker takes one of its own.",
        ),
        (["--engine", "slurm"], "Unknown engine 'slurm'."),
        (["--engine", "ray", "--gpus-per-worker", "0"], "--gpus-per-worker 0.0 makes no sense."),
    ],
)
def test_wrong_settings_of_workers_are_refused(
    options: list[str], message: str, bert: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["extract", "--resource", str(bert), "--task", "udpos", *options]) == 1
    assert message in capsys.readouterr().err


GB = 2**30


@pytest.mark.parametrize(
    ("settings", "slurm", "expected"),
    [
        ({}, {}, 16 * GB),
        ({"workers": 4}, {}, 5 * GB),  # 160 GB in 32 shards
        ({"workers": 4, "shard_gb": 2.0}, {}, 2 * GB),
        ({"workers": 1000}, {}, 32 * 2**20),
        ({"workers": 1000, "tokens_per_batch": 2**20}, {}, 4 * 2**20 * 160),  # four batches
        ({}, {"SLURM_NTASKS": "4"}, 5 * GB),
        ({}, {"SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, 10 * GB),
        ({}, {"SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_COUNT": "2"}, 5 * GB),
        ({"workers": 2}, {"SLURM_NTASKS": "64"}, 10 * GB),
        ({}, {"SLURM_NTASKS": "many"}, 16 * GB),
    ],
)
def test_the_number_of_processes_decides_the_size_of_shards(
    settings: dict[str, Any],
    slurm: dict[str, str],
    expected: int,
    config: ExtractConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    plan = plan_extraction(dataclasses.replace(config, **{"split": "dev", "shard_gb": None, **settings}))
    assert plan.token_bytes == 160
    monkeypatch.setattr(ExtractPlan, "positions", property(lambda self: GB))
    made = budget.plan_batches(plan, lambda batch: (), padded=True)
    assert made["shard_bytes"] == expected
