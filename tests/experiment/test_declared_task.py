"""A declared task from end to end: extracted, trained and predicted, with ``kr2cache.toml`` and later without it."""

from __future__ import annotations

import csv
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
from sklearn.metrics import f1_score
from world import World

from kr2cache import FeatureCache
from kr2cache.cli import run
from kr2cache.experiment.grid import read_grid
from kr2cache.prediction.predict import Predictor
from kr2cache.tasks.declared import DeclaredTask

TOML = """
[defaults]
data = "elsewhere"

[tasks.reviews]
kind = "classification"
text = ["title", "body"]
label = "stars"
metric = "macro_f1"
data = "reviews"
"""
WORDS = {"kind": "classification", "text": ["title", "body"], "label": "stars", "metric": "macro_f1"}


def save_reviews(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(7)
    for split, count in (("train", 12), ("dev", 6), ("test", 7)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["title", "body", "stars"])
            for number in range(count):
                texts = [" ".join(draw.choices(tiny.WORDS, k=draw.randint(1, 6))) for _ in range(2)]
                writer.writerow([*texts, ("good", "bad", "so-so")[number % 3]])
    return folder


def command(line: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert run(shlex.split(line)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_csv_is_extracted_trained_and_predicted(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world.folder)
    toml = world.folder / "kr2cache.toml"
    toml.write_text(TOML)
    save_reviews(world.folder / "reviews")
    made = command("extract --resource models/res --task reviews --json", capsys)
    cache = FeatureCache.open(made["cache"])
    assert len(cache) == 12
    assert cache.provenance["found"]["template"] == "title, body"
    line = "train --resource models/res --reader models/reader --task reviews --seeds 1 --epochs 1 --device cpu --json"
    trained = command(line, capsys)
    (folder,) = (Path(one["folder"]) for one in trained["runs"])
    config = json.loads((folder / "config.json").read_text("utf-8"))["config"]
    assert config["declaration"] == {**WORDS, "labels": ["bad", "good", "so-so"], "derived": True}
    assert config["metric"] == "macro_f1"
    rows = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text("utf-8").splitlines()]
    assert [row["gold"] for row in rows] == ["good", "bad", "so-so", "good", "bad", "so-so", "good"]
    expected = f1_score([row["gold"] for row in rows], [row["predicted"] for row in rows], average="macro")
    assert trained["runs"][0]["metrics"]["test"]["macro_f1"] == pytest.approx(expected)

    toml.unlink()  # predict knows the task from the run
    found = command(f"predict --run {folder} --file reviews/test.csv --json", capsys)
    assert [one["predicted"] for one in found["predictions"]] == [row["predicted"] for row in rows]
    assert found["metrics"]["macro_f1"] == pytest.approx(expected)


def test_labels_decide_the_run_and_a_task_object_serves_as_a_name(world: World) -> None:
    data = str(save_reviews(world.folder / "reviews"))
    settings: dict[str, Any] = {"data": data, "method": "kreader", "resource": None, "epochs": 1.0}
    named = world.train(task="reviews", tasks={"reviews": WORDS}, **settings)
    own = DeclaredTask.of_table("reviews", WORDS)
    given = world.train(task=own, **settings)
    assert given.runs[0].folder == named.runs[0].folder
    labels = ["so-so", "good", "bad"]
    other = world.train(task="reviews", tasks={"reviews": WORDS | {"labels": labels}}, **settings)
    assert other.runs[0].folder != named.runs[0].folder
    predictor = Predictor.load(other.runs[0].folder, device="cpu")
    assert predictor.task.labels == tuple(labels)


def test_a_grid_declares_a_task_and_its_data(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(TOML.split("\n\n")[1] + '[[rows]]\nname = "a"\n[[columns]]\nname = "b"\ntask = "reviews"\n')
    grid = read_grid(path, {"task": str})
    defaults = {"data": "elsewhere"}
    config = grid.config(grid.rows[0], grid.columns[0], defaults=defaults, overrides={}, models={}, training={})
    assert config.data is None
    assert config.tasks["reviews"] == WORDS | {"data": "reviews"}
    given = {"data": "typed"}
    config = grid.config(grid.rows[0], grid.columns[0], defaults=defaults, overrides=given, models={}, training={})
    assert config.data == "typed"


def test_a_sweep_knows_the_labels_of_the_train_split(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world.folder)
    (world.folder / "kr2cache.toml").write_text(TOML)
    save_reviews(world.folder / "reviews")
    (world.folder / "grid.toml").write_text(
        '[settings]\nreader = "models/reader"\ndevice = "cpu"\n[[rows]]\nname = "a"\nmethod = "kreader"\n'
        '[[columns]]\nname = "b"\ntask = "reviews"\n'
    )
    made = command("sweep grid.toml --seeds 1 --epochs 1 --json", capsys)
    (cell,) = made["cells"]
    config = json.loads((Path("runs") / cell["folder"] / "seed-1" / "config.json").read_text("utf-8"))["config"]
    assert config["declaration"]["labels"] == ["bad", "good", "so-so"]
