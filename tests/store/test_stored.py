"""Training from caches alone: they name a resource whose model is not on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from world import SPLITS, World, change_a_weight, predictions

from kr2cache.cli import run
from kr2cache.commands.defaults import choose_task
from kr2cache.errors import CacheError, ConfigError, UnknownNameError
from kr2cache.store.stored import find_resource


@pytest.fixture
def moved(world: World, workdir: Path) -> tuple[World, str]:
    """A world whose caches were copied from where their model is, which was given as a folder; and its run there."""
    for split in SPLITS:
        world.extract(split)
    there = world.train(epochs=1.0).runs[0].folder
    shutil.copytree(there, world.folder / "there")
    shutil.rmtree(world.folder / "runs")
    shutil.rmtree(world.resource)
    shutil.copytree(world.caches, workdir / ".kr2cache", dirs_exist_ok=True)
    shutil.rmtree(world.caches)
    return world, there.parent.name


def train(world: World, resource: str, capsys: pytest.CaptureFixture[str], more: str = "") -> tuple[int, Any]:
    """``kr2cache train`` from the copied caches: exit code, and the JSON document with what people were told."""
    options = {"reader": str(world.folder / "models" / "reader"), "data": str(world.data), "batch-size": "4"}
    options |= {"seeds": "1", "epochs": "1", "learning-rate": "1e-3", "fusion": "last4", "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    capsys.readouterr()
    code = run(["train", *words, *resource.split(), *more.split(), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) | {"said": " ".join(captured.err.split())}


def test_a_cache_trains_without_its_model_under_each_of_its_names(
    moved: tuple[World, str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, name_of_run = moved
    (folder,) = (workdir / ".kr2cache" / "udpos" / "train").iterdir()
    names = ["", "--resource res", f"--resource {folder.name}", f"--resource udpos/train/{folder.name}"]
    names += [f"--resource .kr2cache/udpos/train/{folder.name}", f"--resource {folder}/"]
    for name in names:
        code, document = train(world, name, capsys)
        assert code == 0, document
        assert document["resource_sequences"]["computed"] == 0
        (one,) = document["runs"]
        assert Path(one["folder"]).parent.name == name_of_run, "the run that the model itself gives"
        trusted = "The weights of res are in no known folder: its caches are used without comparing them"
        assert trusted in document["said"]
    for split in ("dev", "test"):
        assert predictions(Path(one["folder"]), split) == predictions(world.folder / "there", split)


def test_what_the_caches_lack_is_said_with_what_can_be_done(
    moved: tuple[World, str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, _ = moved
    shutil.rmtree(workdir / ".kr2cache" / "udpos" / "dev")
    for more in ("", "--no-extract"):
        code, document = train(world, "--resource res", capsys, more)
        assert code == 1
        assert "No cache of res on udpos/dev fits" in document["error"]["message"]
        assert "--resource FOLDER" in document["error"]["remedy"]
        assert "kr2cache extract" not in document["error"]["remedy"], "there is nothing to run it with"
    code, document = train(world, "--resource rse --task udpos", capsys)
    assert (code, document["error"]["type"]) == (1, "UnknownNameError")


def test_caches_of_two_models_of_one_name_are_not_mixed(world: World) -> None:
    for split in SPLITS:
        world.extract(split)
    away = world.resource.rename(world.folder / "models" / "away")
    shutil.copytree(away, world.resource)
    change_a_weight(world.resource)
    world.extract("train")
    changed = world.resource.rename(world.folder / "models" / "changed")
    with pytest.raises(CacheError, match=r"Caches of res were made with different weights: .*res-\w{8} \(digest"):
        world.train(resource="res")
    assert world.train(resource=str(away), epochs=1.0).runs
    shutil.rmtree(away)
    shutil.rmtree(changed)


def test_a_split_of_another_model_of_that_name_is_refused(world: World) -> None:
    world.extract("train")
    change_a_weight(world.resource)
    for split in ("dev", "test"):
        world.extract(split)
    shutil.rmtree(world.resource)
    with pytest.raises(CacheError, match="the weights of res changed") as caught:
        world.train(resource="res")
    assert "--resource FOLDER" in caught.value.remedy


def test_names_that_are_known_go_before_those_of_caches(workdir: Path, bert: Path) -> None:
    def cache_of(name: str) -> None:
        folder = workdir / "cache" / "udpos" / "train" / f"{name}-01234567"
        folder.mkdir(parents=True)
        (folder / "shard-00000-of-00001.h5").touch()

    for name in ("bert", "owner--model", "tiny-bert", "mine-2"):
        cache_of(name)

    def found(name: str) -> tuple[str, str | None, Path | None]:
        spec = find_resource(name, workdir / "cache", {})
        return spec.name, spec.hub_id, spec.path

    assert found("bert-01234567") == found("bert") == ("bert", "google-bert/bert-base-uncased", None)
    assert found("owner--model") == found("owner--model-01234567") == ("owner--model", "owner/model", None)
    assert found("mine-2") == found("mine-2-01234567") == ("mine-2", None, None)
    assert found(str(bert)) == ("tiny-bert", None, bert)
    assert found("tiny-bert") == ("tiny-bert", None, None)
    for name in ("mine", "mine-2-0123456", "mine-2-01234568"):
        with pytest.raises(UnknownNameError, match=name):
            found(name)


def test_the_tasks_of_a_resources_caches_are_the_choice(workdir: Path) -> None:
    for task in ("udpos", "snli"):
        folder = workdir / "cache" / task / "train" / "mine-01234567"
        folder.mkdir(parents=True)
        (folder / "shard-00000-of-00001.h5").touch()
    (workdir / "cache" / "piqa" / "train" / "other-01234567").mkdir(parents=True)
    (workdir / "cache" / "piqa" / "train" / "other-01234567" / "shard-00000-of-00001.h5").touch()
    assert choose_task("other", workdir / "cache", {}) == "piqa"
    with pytest.raises(ConfigError, match="holds caches of mine for several") as caught:
        choose_task("mine", workdir / "cache", {})
    assert caught.value.remedy.endswith(": snli, udpos")
