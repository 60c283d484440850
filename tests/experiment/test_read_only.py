"""Caches that nobody can write to serve every reader."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import mounts
import sweeps
from world import World

from kr2cache import cli
from kr2cache.experiment import stored_fusion
from kr2cache.training import features


@pytest.mark.parametrize("extract", [True, False])
def test_caches_on_a_read_only_disk_serve_every_reader(
    world: World, extract: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "dev", "test"):
        made = world.extract(split)
    with mounts.read_only(world.caches):
        assert world.extract("test").computed == 0
        with monkeypatch.context() as scarce:  # too large for memory: it would be stored beside the layers
            scarce.setattr(features, "MEMORY_SHARE", 0)
            scarce.setattr(stored_fusion, "fits_in_memory", lambda size: False)
            scores = world.train(fusion="last2", extract=extract)
        assert scores.runs[0].metrics["test"]
        for command in ("list", f"info {made.cache}", f"verify {made.cache}"):
            options = f" --cache-dir {world.caches}" if command == "list" else ""
            assert cli.run(shlex.split(f"cache {command}{options}")) == 0, capsys.readouterr()
        elsewhere = world.folder / "elsewhere"
        for command in ("slice --limit 2", "fuse --fusion last2"):
            assert cli.run(shlex.split(f"cache {command} {made.cache} --cache-dir {elsewhere}")) == 0
        assert len(list(elsewhere.rglob("*.h5"))) == 2


def test_where_nothing_can_be_written_a_trained_reader_works(
    world: World, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models, data, caches and runs lie on one read-only disk, as a finished experiment in an archive."""
    run, runs = world.train(fusion="last2").runs[0].folder, world.folder / "runs"
    made = world.cache_folders()[0]
    with mounts.read_only(world.folder):
        for command in (
            f"predict --run {run} --device cpu 'ein haus'",
            f"predict --run {run} --device cpu --file {next(world.data.glob('*test*'))}",
            f"report {runs} --out {tmp_path_factory.mktemp('report')}",
            f"cache info {made}",
            f"cache verify {made}",
        ):
            assert cli.run(shlex.split(command)) == 0, (command, capsys.readouterr())
        for command, option in (
            (f"report {runs}", f"--out {runs / 'report'}"),
            (f"cache repair {made}", f"the cache {made}"),
            (f"cache remove --yes {made}", ""),
        ):
            capsys.readouterr()
            assert cli.run(shlex.split(command)) == 1
            said = " ".join(capsys.readouterr().err.split())
            assert f"ConfigError: {option}" in said
            assert "not writable" in said
    assert made.is_dir()


def test_a_sweep_reads_caches_on_a_read_only_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "dev", "test"):
        world.extract(split)
    sweeps.with_grid(world)
    monkeypatch.chdir(world.folder)
    with mounts.read_only(world.caches):
        assert cli.run(["sweep", "grid.toml"]) == 0
    assert len(sweeps.scores(world)) == 3 * len(sweeps.CELLS)
