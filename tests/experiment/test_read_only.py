"""Caches that nobody can write to serve every reader."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import mounts
from world import World

from kr2cache import cli
from kr2cache.experiment import resource
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
            scarce.setattr(resource, "fits_in_memory", lambda size: False)
            scores = world.train(fusion="last2", extract=extract)
        assert scores.runs[0].metrics["test"]
        for command in ("list", f"info {made.cache}", f"verify {made.cache}"):
            options = f" --cache-dir {world.caches}" if command == "list" else ""
            assert cli.run(shlex.split(f"cache {command}{options}")) == 0, capsys.readouterr()
        elsewhere = world.folder / "elsewhere"
        command = f"cache slice {made.cache} --limit 2 --cache-dir {elsewhere}"
        assert cli.run(shlex.split(command)) == 0, capsys.readouterr()
        assert list(elsewhere.rglob("*.h5"))
