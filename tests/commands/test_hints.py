"""Advice fits the command, the folder and the files at hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from world import World

from kr2cache.cache.writer import ShardWriter
from kr2cache.cli import run
from kr2cache.commands.hints import more_advice
from kr2cache.errors import ValueRangeError


def failure(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What ``kr2cache LINE`` says, which must fail."""
    capsys.readouterr()
    assert run([*line.split(), "--json"]) == 1
    error: dict[str, str] = json.loads(capsys.readouterr().out)["error"]
    return error


def test_options_of_other_commands_are_said_to_be_theirs() -> None:
    text = "The states take 3 MB. --layers last4 takes less, --dtype int8 half; or give another --cache-dir."
    assert more_advice("extract", {"layers", "dtype", "cache-dir"}, text) == []
    assert more_advice("train", {"cache-dir", "json"}, text) == [
        "--layers and --dtype are options of kr2cache extract: run it first, then train reads its cache."
    ]
    assert more_advice("demo", {"folder"}, text) == [
        "--cache-dir is an option of other commands: the demo puts both below --folder."
    ]
    (grid,) = more_advice("sweep", {"seeds"}, "Give a smaller --max-length, or --batch-size 4.")
    assert grid.startswith("--max-length and --batch-size are options of a grid: write the name without dashes")
    assert more_advice("train", set(), "Make one:  kr2cache extract --split dev --dtype int8") == []
    assert more_advice("train", set(), "Extract again with --layers all.") == []


def test_a_state_too_large_names_what_train_can_do(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any) -> None:
        raise ValueRangeError("70,000 is too large.", "float16 ends at 65,504: --dtype bfloat16 holds larger values.")

    monkeypatch.setattr(ShardWriter, "write", too_large)
    settings = f"--task udpos --data {world.data} --cache-dir {world.caches} --resource {world.resource}"
    assert failure(f"extract {settings}", capsys)["remedy"].endswith("larger values.")
    line = f"train {settings} --reader {world.folder / 'models' / 'reader'} --run-dir {world.folder / 'runs'}"
    assert failure(line, capsys)["remedy"].endswith(
        "--dtype is an option of kr2cache extract: run it first, then train reads its cache."
    )


def test_the_demo_names_its_own_option(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "file").touch()
    error = failure("demo --folder file/here", capsys)
    assert error["message"].startswith("--folder file/here:")
    assert "--cache-dir" not in error["message"] + error["remedy"]
    (workdir / "kr2cache.toml").write_text('[models.minilm]\npath = "nowhere"\n')
    assert "nowhere" in failure("demo", capsys)["message"], "the file that an error of a missing model names is read"


def test_a_resource_that_is_too_short_names_its_own_option(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    settings = f"--task udpos --data {world.data} --cache-dir {world.caches} --resource {world.resource}"
    line = f"train {settings} --reader {world.folder / 'models' / 'reader'} --run-dir {world.folder / 'runs'}"
    for length, advice in (("9999", "--resource-max-length 600 or less"), ("2", "--resource-max-length 3 or more")):
        error = failure(f"{line} --resource-max-length {length}", capsys)
        assert length in error["message"]
        assert error["remedy"] == f"Give {advice}."
    assert failure(f"{line} --max-length 9999", capsys)["remedy"].startswith("Give --max-length ")


def test_a_kr2cache_toml_above_is_pointed_at(
    workdir: Path, bert: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "kr2cache.toml").write_text(f'[models.mine]\npath = "{bert}"\n')
    (workdir / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(workdir / "a" / "b")
    toml = workdir / "kr2cache.toml"
    there = f"{toml} is not in the working folder, so it is not read: run the command there (cd {workdir})."
    for line in (
        "extract --resource mine --task udpos",
        "extract",
        "train",
        f"extract --resource oscar --task udpos --data {corpus}",
        f"extract --resource {bert} --task udpos",
        f"extract --resource {bert}",
    ):
        assert there in failure(line, capsys)["remedy"], line
    assert there not in failure(f"extract --resource {bert} --task udpos --data . --dtype x", capsys)["remedy"]
    shutil.copy(workdir / "kr2cache.toml", ".")
    assert "so it is not read" not in failure("extract", capsys)["remedy"]


def test_the_folder_of_several_runs_names_one(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "runs" / "seed-2").mkdir(parents=True)
    (workdir / "runs" / "seed-2" / "metrics.json").write_text("{}")
    assert failure("predict --run runs das", capsys)["remedy"] == "Give the folder of a run, such as runs/seed-2."
    assert "kr2cache report RUN_DIR" in failure("report nowhere", capsys)["remedy"]
