"""Regression and multilabel from data to predictions: runs, their files and scores, and what is refused at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
import tiny
import torch
from scipy.special import expit
from scipy.stats import pearsonr
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from world import World, predictions

from kr2cache.errors import ConfigError, KR2CacheError
from kr2cache.experiment.pipeline import describe_training
from kr2cache.prediction.predict import Predicted, Predictor
from kr2cache.prediction.texts import as_text, conllu, read_file, read_lines, score
from kr2cache.report import report
from kr2cache.tasks.base import Example, Kind
from kr2cache.tasks.rows import Row, RowTask
from kr2cache.tasks.survey import survey

SAVE = {"ratings": kinds.save_ratings, "moods": kinds.save_moods}
TASKS = {"ratings": kinds.Ratings(), "moods": kinds.Moods()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A folder with models, and data for both tasks."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, model_type in (("res", "bert"), ("reader", "xlm-roberta")):  # with weights so large that texts matter
        tiny.save_model(folder / "models" / name, model_type, layers=4, initializer_range=0.3)
    for task, save in SAVE.items():
        save(folder / task)
    return World(folder)


def trained(place: World, task: str, **changes: Any) -> Path:
    """A run of this task, trained once."""
    settings: dict[str, Any] = {"epochs": 3.0, "data": str(place.folder / task)}
    result = place.train(task=TASKS[task], **settings | changes)
    return result.runs[0].folder


@pytest.mark.parametrize("task", SAVE)
def test_metrics_are_those_of_the_written_predictions(place: World, task: str) -> None:
    run = trained(place, task)
    metrics = json.loads((run / "metrics.json").read_text())
    config = json.loads((run / "reader" / "config.json").read_text())
    assert len(config.get("id2label", "?")) == (1 if task == "ratings" else 3)
    for split in ("dev", "test"):
        rows = predictions(run, split)
        data = [json.loads(line) for line in (place.folder / task / f"{split}.jsonl").read_text().splitlines()]
        gold, predicted = [row["gold"] for row in rows], [row["predicted"] for row in rows]
        if task == "ratings":
            assert config["problem_type"] == "regression"
            assert gold == [row["value"] for row in data]
            expected = {"pearson": pearsonr(gold, predicted).statistic}
            assert abs(expected["pearson"]) > 0.05, "not a constant: this shows something"
        else:
            assert config["problem_type"] == "multi_label_classification"
            assert gold == [row["moods"] for row in data]
            sets = [[[mood in one for mood in kinds.MOODS] for one in side] for side in (gold, predicted)]
            expected = {
                "micro_f1": f1_score(*sets, average="micro"),
                "accuracy": np.mean(np.all(sets[0] == np.array(sets[1]), axis=1)),
            }
            assert 0.1 < expected["micro_f1"] < 1
        assert metrics[split] == pytest.approx(expected)


def by_transformers(reader: Path, task: str, rows: list[dict[str, Any]]) -> np.ndarray:
    """Logits of a plain reader, each text alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reader), AutoTokenizer.from_pretrained(reader)
    columns = TASKS[task].columns
    with torch.inference_mode():
        texts = [
            tokenizer(*(row[one] for one in columns), return_token_type_ids=True, return_tensors="pt") for row in rows
        ]
        found = [model.eval()(**one).logits[0] for one in texts]
    return torch.stack(found).double().numpy()


def rows_of(place: World, task: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.folder / task / f"{split}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("task", SAVE)
def test_new_texts_get_what_the_run_predicted(place: World, task: str) -> None:
    run = trained(place, task)
    predictor = Predictor.load(run, tasks=TASKS)
    examples = read_file(predictor.task, place.folder / task / "test.jsonl")
    found, expected = predictor(examples), predictions(run, "test")
    assert [one.id for one in found] == [one["id"] for one in expected]
    logits = np.concatenate(predictor.logits(examples)).astype(np.float64)
    for one, of_run, row in zip(found, expected, logits, strict=True):
        if task == "ratings":
            assert one.predicted == pytest.approx(of_run["predicted"], rel=0.01, abs=0.01), "the cache has float16"
            assert one.predicted == row[0]
            assert one.scores is None
        else:
            assert one.predicted == of_run["predicted"]
            assert one.scores == pytest.approx(dict(zip(kinds.MOODS, 1 / (1 + np.exp(-row)), strict=True)))
            assert one.predicted == [mood for mood, probability in one.scores.items() if probability >= 0.5]
    metrics = json.loads((run / "metrics.json").read_text())["test"]
    assert score(predictor.task, examples, found) == pytest.approx(metrics, abs=0.01)


def test_predictions_as_lines_to_read() -> None:
    ratings, moods = kinds.Ratings(), kinds.Moods()
    (pair,) = read_lines(ratings, ["das haus\tein hund"])
    assert as_text(ratings, pair, Predicted(id="a", predicted=-1.23456, scores=None)) == "-1.235  das haus | ein hund"
    scores = {"anger": 0.25, "joy": 0.5, "fear": 0.981}
    (text,) = read_lines(moods, ["das haus"])
    several = Predicted(id="a", predicted=["joy", "fear"], scores=scores)
    assert as_text(moods, text, several) == "joy 0.50, fear 0.98  das haus"
    assert as_text(moods, text, Predicted(id="a", predicted=[], scores=scores)) == "no label  das haus"
    assert several.json() == {"id": "a", "predicted": ["joy", "fear"], "scores": scores}
    for own, example, one in ((moods, text, several), (ratings, pair, Predicted(id="a", predicted=2.0, scores=None))):
        with pytest.raises(ConfigError, match="tagged words"):
            conllu(own, [example], [one])


@pytest.mark.parametrize("task", SAVE)
def test_a_student_learns_its_teachers_values_or_probabilities(place: World, task: str) -> None:
    """One step so small that weights stay as they are: the logged losses can be computed from the readers."""
    still = {"path": str(place.folder / "models" / "reader"), "dropout": 0.0}
    settings: dict[str, Any] = {"models": {"still": still}, "learning_rate": 1e-12, "epochs": 1.0, "batch_size": 24}
    if task == "moods":
        settings["temperature"] = 2.0
    run = trained(place, task, reader="still", method="kd", teacher=str(place.resource), **settings)
    rows = rows_of(place, task, "train")
    (teacher,) = (place.folder / "runs" / task).glob("kresource-*/seed-1/reader")
    student, taught = by_transformers(run / "reader", task, rows), by_transformers(teacher, task, rows)
    if task == "ratings":
        hard = np.mean((student - [[row["value"]] for row in rows]) ** 2)
        soft = np.mean((student - taught) ** 2)
    else:
        gold = np.array([[mood in row["moods"] for mood in kinds.MOODS] for row in rows])
        hard = -np.where(gold, np.log(expit(student)), np.log(expit(-student))).mean()
        p = expit(taught / 2)
        soft = -4 * (p * np.log(expit(student / 2)) + (1 - p) * np.log(expit(-student / 2))).mean()
    logged = json.loads((run / "history.json").read_text())["epochs"][0]
    assert logged["soft_loss"] == pytest.approx(soft, rel=1e-4)
    assert logged["loss"] == pytest.approx(hard + 0.5 * soft, rel=1e-4)


# What is refused before anything long starts -------------------------------------------------------------------------


def edit(folder: Path, split: str, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(change(number, row)) + "\n" for number, row in enumerate(rows)), "utf-8")


def with_value(value: Any, where: int = 3) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    return lambda number, row: {**row, "value": value} if number == where else row


class NoMetric(kinds.Ratings):
    name = "no-metric"
    metric = "spearman"


class NoScore(kinds.Ratings):
    name = "no-score"

    def score(self, gold: Any, predicted: Any) -> dict[str, float]:
        raise ZeroDivisionError("of the user's own")


class NoAlike(kinds.Ratings):
    """Its score divides by what differs between predictions."""

    name = "no-alike"

    def score(self, gold: Any, predicted: Any) -> dict[str, float]:
        return {"pearson": 1 / len({*predicted} - {predicted[0]})}


class CountsSets(kinds.Moods):
    """Its score also has a count."""

    name = "counts-sets"
    counts: Mapping[str, str] = {"exact": "sets that are right"}

    def score(self, gold: Any, predicted: Any) -> dict[str, float]:
        return super().score(gold, predicted) | {
            "exact": float(sum(a == b for a, b in zip(gold, predicted, strict=True)))
        }


class CountDecides(CountsSets):
    name = "count-decides"
    metric = "exact"


class Numbers(kinds.Moods):
    """Sets of label numbers, as they stand in the file."""

    name = "numbers"

    def example(self, row: Row) -> Example:
        return Example(row.id("id"), ((row.text("text"),),), row.values["numbers"] and tuple(row.values["numbers"]))


class OneLabel(kinds.Moods):
    name = "one-label"
    kind: Kind = "classification"
    labels = ("joy",)
    metric = "accuracy"
    score = RowTask.score

    def example(self, row: Row) -> Example:
        return Example(row.id("id"), ((row.text("text"),),), 0)


class AllAlike(OneLabel):
    name = "all-alike"
    labels = ("joy", "fear")


class States(kinds.Moods):
    name = "states"
    kind: Kind = "text"


class TwoTexts(kinds.Ratings):
    name = "two-texts"

    def example(self, row: Row) -> Example:
        return Example(row.id("id"), ((row.text("one"),), (row.text("two"),)), 1.0)


REFUSED: dict[str, tuple[type[RowTask], dict[str, Any], Any, str]] = {
    "a value that is text": (
        kinds.Ratings,
        {"train": with_value("high")},
        {},
        r"'train-3' of the train .* 'high', not",
    ),
    "two texts": (TwoTexts, {}, {}, "'train-0' of the train split .* it has 2 texts, not 1"),
    "nan": (kinds.Ratings, {"dev": with_value(math.nan)}, {}, "'dev-3' of the dev split .* nan, not a finite number"),
    "inf": (
        kinds.Ratings,
        {"test": with_value(math.inf)},
        {},
        "'test-3' of the test split .* inf, not a finite number",
    ),
    "true": (kinds.Ratings, {"train": with_value(True)}, {}, "its value is True"),
    "no value": (kinds.Ratings, {"train": with_value(None)}, {}, "no label, while 23 of 24 rows have one"),
    "one value": (kinds.Ratings, {"train": lambda _, row: {**row, "value": 2.5}}, {}, "All 24 .* have the label 2.5"),
    "no number": (
        Numbers,
        {"train": lambda i, row: {**row, "numbers": ["joy"]}},
        {},
        "label is 'joy', not a number from 0 to 2",
    ),
    "a number too large": (
        Numbers,
        {"train": lambda i, row: {**row, "numbers": [1, 3]}},
        {},
        "its label is 3, not a number",
    ),
    "numbers that fall": (Numbers, {"train": lambda i, row: {**row, "numbers": [2, 1]}}, {}, r"\(2, 1\) do not rise"),
    "one label": (OneLabel, {}, {}, r"has 1 label \(joy\): there is nothing to learn"),
    "all alike": (AllAlike, {}, {}, "All 24 training examples have the label joy"),
    "no metric": (NoMetric, {}, {}, "score of task 'no-metric' fails .* no 'spearman', only pearson"),
    "a score that fails": (NoScore, {}, {}, "score of task 'no-score' fails .*: of the user's own"),
    "a score of other predictions": (
        NoAlike,
        {},
        {},
        "score of task 'no-alike' fails on predictions that are all alike: division by zero",
    ),
    "a count that decides": (CountDecides, {}, {}, "'count-decides' that decides is 'exact', one of its counts"),
    "no labels at all": (States, {}, {}, "'states' is of kind text: it has no labels"),
    "only train": (kinds.Ratings, {"dev": None, "test": None}, {}, "neither a dev nor a test split"),
    "temperature": (
        kinds.Ratings,
        {},
        {"method": "kd", "teacher": "models/res", "temperature": 2.0},
        "--temperature 2 softens the probabilities",
    ),
    "label smoothing": (kinds.Moods, {}, {"training": {"label_smoothing_factor": 0.1}}, "has label_smoothing_factor"),
    "a head of labels": (kinds.Ratings, {}, {"keep_head": True}, "it gives 2 numbers, a regression has one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(
    case: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, edits, settings, message = REFUSED[case]
    data = SAVE["moods" if issubclass(task, kinds.Moods) else "ratings"](world.folder / "data")
    for split in ("train", "dev", "test") if task is Numbers else ():
        edit(data, split, lambda number, row: {**row, "numbers": [number % 3]})
    for split, change in edits.items():
        if change is None:
            (data / f"{split}.jsonl").unlink()
        else:
            edit(data, split, change)
    monkeypatch.chdir(world.folder)
    with pytest.raises(KR2CacheError, match=message) as caught:
        world.train(task=task(), data=str(data), **settings)
    assert caught.value.remedy
    assert not world.caches.exists()
    assert not (world.folder / "runs").exists() or not any((world.folder / "runs").rglob("*.json"))


def test_counts_of_a_users_task_are_shown_as_counts(
    place: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "data": str(place.folder / "moods"),
        "method": "kreader",
        "epochs": 1.0,
        "run_dir": place.folder / "counts",
    }
    result = place.train(task=CountsSets(), **settings)
    rows = predictions(result.runs[0].folder, "test")
    exact = sum(row["gold"] == row["predicted"] for row in rows)
    assert exact > 0
    assert result.mean["test"]["exact"] == exact
    capsys.readouterr()
    describe_training(result)
    shown = capsys.readouterr().out
    assert "sets that are right" in shown
    assert "exact %" not in shown
    assert f"{100 * exact}.0" not in shown
    header, *lines = repr(result).splitlines()[1:3]
    assert dict(zip(header.split("  ")[-3:], lines[0].split()[-3:], strict=True))["test exact"] == str(exact)
    (table,) = report(place.folder / "counts", None).tables
    assert table.columns[-2] == "sets that are right"
    assert str(table.rows[0][-2].text) == str(exact)


def test_labels_that_training_lacks_are_said(world: World) -> None:
    data = kinds.save_moods(world.folder / "data")
    edit(data, "train", lambda _, row: {**row, "moods": [one for one in row["moods"] if one != "joy"]})
    result = world.train(task=kinds.Moods(), data=str(data), method="kreader", epochs=1.0)
    said = [one for one in result.notes if one.startswith("No training example")]
    assert said == [f"No training example has these labels of the {split} split: joy." for split in ("dev", "test")]


def test_the_first_examples_may_all_have_one_label(world: World) -> None:
    data = kinds.save_moods(world.folder / "data")
    result = world.train(task=AllAlike(), data=str(data), method="kreader", epochs=1.0, train_limit=5)
    assert any(note.startswith("All 5 training examples have the label joy") for note in result.notes)


def test_whole_numbers_of_a_regression_are_surveyed(tmp_path: Path) -> None:
    data = kinds.save_ratings(tmp_path / "data")
    for split in ("train", "dev", "test"):
        edit(data, split, lambda number, row: {**row, "value": number % 5 + 3})
    found = survey(kinds.Ratings(), str(data)).splits["train"]
    assert (found.values or {})["max"] == 7
    assert isinstance(found.first[0]["label"], int)
