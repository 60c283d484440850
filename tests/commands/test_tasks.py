"""``kr2cache tasks``: what the data of a task holds, before any model."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conllu import parse

from kr2cache.cli import run

TOML = """
[defaults]
data = "elsewhere"

[tasks.reviews]
kind = "classification"
text = ["title", "body"]
label = "stars"
data = "reviews"

[tasks.similar]
kind = "regression"
text = "text"
label = "score"
"""
TEXTS = [("a b", "c", 2), ("d", "e f g h", 10), ("i", "j", 2)]


@pytest.fixture
def place(workdir: Path) -> Path:
    (workdir / "kr2cache.toml").write_text(TOML)
    rows = [{"title": title, "body": body, "stars": stars} for title, body, stars in TEXTS]
    save(workdir / "reviews" / "train.jsonl", rows)
    save(workdir / "reviews" / "test.jsonl", [{"title": "x", "body": "y"}])
    return workdir


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    capsys.readouterr()
    code = run(shlex.split(f"tasks {line} --json"))
    return code, json.loads(capsys.readouterr().out)


def test_the_data_of_a_declared_task(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer("reviews", capsys)
    assert code == 0
    assert (found["labels"], found["data"], found["missing"]) == (["2", "10"], "reviews", ["dev"])
    assert found["splits"]["train"] == {
        "examples": 3,
        "sequences": 3,
        "labelled": 3,
        "labels": {"2": 2, "10": 1},
        "values": None,
        "median_words": 3,
        "longest_words": 5,
        "longest_id": "train-1",
        "first": [
            {"id": f"train-{number}", "texts": [[title, body]], "label": str(stars)}
            for number, (title, body, stars) in enumerate(TEXTS)
        ],
    }
    assert found["splits"]["test"]["labels"] is None
    assert run(["tasks", "reviews"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("2 (66.7%)", "train-1", "d | e f g h", "No split dev"))
    assert run(["tasks"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("reviews", "cola", "wikiann-LANG", "udpos-LANG"))


def test_the_data_of_a_corpus_of_words(workdir: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = answer(f"udpos --data {corpus}", capsys)
    sentences = parse((corpus / "dev.conllu").read_text("utf-8"))
    lengths = [len(sentence) for sentence in sentences]
    tags = Counter(token["upos"] for sentence in sentences for token in sentence)
    dev = found["splits"]["dev"]
    assert (dev["median_words"], dev["longest_words"]) == (statistics.median(lengths), max(lengths))
    assert {tag: count for tag, count in dev["labels"].items() if count} == tags
    assert run(["tasks", "udpos", "--data", str(corpus)]) == 0
    first = found["splits"]["train"]["first"][0]
    pairs = zip(first["texts"][0], first["label"], strict=True)
    assert " ".join(f"{word}/{tag}" for word, tag in pairs) in capsys.readouterr().out


def test_the_values_of_a_regression(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(place / "scores.jsonl", [{"text": "x", "score": value} for value in (1, 2.5, 4)])
    _, found = answer("similar --data scores.jsonl", capsys)
    assert found["splits"]["train"]["values"] == {"min": 1, "mean": 2.5, "max": 4}
    assert run(shlex.split("tasks similar --data scores.jsonl")) == 0
    assert "mean 2.5" in capsys.readouterr().out


def test_shares_of_several_labels_are_of_examples(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (place / "kr2cache.toml").open("a") as file:
        file.write('[tasks.emotions]\nkind = "multilabel"\ntext = "text"\nlabel = "own"\n')
    save(place / "own.jsonl", [{"text": "x", "own": own} for own in (["joy", "fear"], ["joy"], [], [])])
    assert run(shlex.split("tasks emotions --data own.jsonl")) == 0
    shown = capsys.readouterr().out
    assert "2 (50.0%)" in shown
    assert "1 (25.0%)" in shown


def test_each_choice_is_a_sequence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"goal": "a b", "sol1": "c", "sol2": "d e", "label": 0}, {"goal": "f", "sol1": "g h i j", "sol2": "k"}]
    save(place / "goals.jsonl", [rows[0], rows[1] | {"label": 1}])
    _, found = answer("piqa --data goals.jsonl", capsys)
    train = found["splits"]["train"]
    assert (train["examples"], train["sequences"], train["labels"]) == (2, 4, {"0": 1, "1": 1})
    assert (train["median_words"], train["longest_words"], train["longest_id"]) == (3.5, 5, "train-1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("review", "Did you mean 'reviews'"),
        ("--data reviews", "no task"),
        ("similar", "There is no folder elsewhere"),
        ("similar --data reviews", "text is missing (there are title, body, stars)"),
        ("similar --data empty", "has no train split"),
        ("udpos-de --data gone/", "gone"),
    ],
)
def test_faults_are_found_here(place: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    code, found = answer(line, capsys)
    assert code == 1
    assert message in " ".join((found["error"]["message"], found["error"]["remedy"]))


def test_a_split_without_train_has_no_labels_yet(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "reviews" / "train.jsonl").rename(place / "dev.jsonl")
    _, found = answer("reviews --data dev.jsonl", capsys)
    assert (found["labels"], found["missing"]) == ([], [])  # one file has no other splits
    assert found["splits"]["dev"]["labels"] is None
    assert found["splits"]["dev"]["examples"] == 3
