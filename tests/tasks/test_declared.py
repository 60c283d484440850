"""Tasks that are declared by words: what is read, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kr2cache.errors import ConfigError, DataError, KR2CacheError, UnknownNameError
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.declared import DeclaredTask
from kr2cache.toml import read_toml

REVIEWS = {"kind": "classification", "text": ["title", "body"], "label": "stars"}
EMOTIONS = {"kind": "multilabel", "text": "text", "label": "emotions"}
SIMILARITY = {"kind": "regression", "text": ["a", "b"], "label": "score"}
NER = {"kind": "tagging", "words": "tokens", "label": "ner_tags", "scheme": "BIO"}
ENDINGS = {"kind": "choice", "context": "q", "choices": "endings", "label": "gold"}
OPTIONS = {"kind": "choice", "choices": ["a", "b", "c"], "label": "gold", "labels": ["A", "B", "C"]}
LINES = {"kind": "text", "text": "line"}
ALL = (REVIEWS, EMOTIONS, SIMILARITY, NER, ENDINGS, OPTIONS, LINES)


def task(words: dict[str, Any], **more: Any) -> Task:
    return find_task("mine", {"mine": words | more})


def save(folder: Path, split: str, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, "utf-8")
    return folder


def read(words: dict[str, Any], folder: Path, rows: Sequence[dict[str, Any]], **more: Any) -> list[Example]:
    """The examples of a train split with these rows, with labels."""
    data = str(save(folder / "data", "train", rows))
    return task(words, **more).with_labels_of(data).read("train", data)


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_csv_of_reviews(tmp_path: Path) -> None:
    with (tmp_path / "train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("title", "body", "stars"), ("Fine", 'He said "yes", twice', "10"), ("Bad", "No", "2"), ("Ok", "So", "9")]
        )
    own = task(REVIEWS).with_labels_of(str(tmp_path))
    assert own.labels == ("2", "9", "10")  # by value: as texts, 10 would come first
    assert own.read("train", str(tmp_path)) == [
        Example("train-0", (("Fine", 'He said "yes", twice'),), 2),
        Example("train-1", (("Bad", "No"),), 0),
        Example("train-2", (("Ok", "So"),), 1),
    ]
    assert (own.kind, own.head, own.words, own.template) == ("classification", "sequence", False, "title, body")


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        (["b", "a", " b "], ("a", "b"), [1, 0, 1]),
        ([True, False, True], ("false", "true"), [1, 0, 1]),
        ([-1, 1, 10, 9], ("-1", "1", "9", "10"), [0, 1, 3, 2]),
        ([-1, 0, -2], ("-2", "-1", "0"), [1, 2, 0]),
        (["01", "1", "0"], ("0", "01", "1"), [1, 2, 0]),
        ([1.0, 2, "3"], ("1", "2", "3"), [0, 1, 2]),
        ([0.5, 1.5], ("0.5", "1.5"), [0, 1]),
    ],
)
def test_labels_of_the_train_split(tmp_path: Path, values: list[Any], labels: Any, numbers: list[int]) -> None:
    rows = [{"text": "x", "y": value} for value in values]
    words = {"kind": "classification", "text": "text", "label": "y"}
    assert task(words).with_labels_of(str(save(tmp_path, "train", rows))).labels == labels
    assert [one.label for one in read(words, tmp_path, rows)] == numbers


@pytest.mark.parametrize(
    ("value", "labels", "number"),
    [
        ("good", ["bad", "good"], 1),
        (0, ["bad", "good"], 0),  # numbers stand for labels that are words
        ("1", ["bad", "good"], 1),
        (1, [2, 1], 1),  # where labels are numbers, 1 is the label 1
        (-1, ["bad", "good"], None),  # as the hub's blind test splits have it
        (-1, [-1, 1], 0),
        (None, ["bad", "good"], None),
        ("", ["bad", "good"], None),
        (float("nan"), ["bad", "good"], None),
    ],
)
def test_labels_that_are_given(tmp_path: Path, value: Any, labels: list[Any], number: int | None) -> None:
    words = {"kind": "classification", "text": "text", "label": "y", "labels": labels}
    assert [one.label for one in read(words, tmp_path, [{"text": "x", "y": value}])] == [number]


def test_several_labels_of_one_example(tmp_path: Path) -> None:
    rows = [{"text": "x", "emotions": ["joy", "anger", "joy"]}, {"text": "y", "emotions": []}]
    assert [one.label for one in read(EMOTIONS, tmp_path, rows)] == [(0, 1), ()]
    rows = [{"text": "x", "emotions": "joy, anger"}, {"text": "y", "emotions": ""}, {"text": "y", "emotions": "joy"}]
    assert [one.label for one in read(EMOTIONS, tmp_path, rows)] == [(0, 1), (), (1,)]
    rows = [{"text": "x", "joy": 1, "anger": "0", "fear": True}, {"text": "y", "joy": 0, "anger": False, "fear": "0"}]
    columns = ["joy", "anger", "fear"]
    assert [one.label for one in read(EMOTIONS, tmp_path, rows, label=columns)] == [(0, 2), ()]
    assert task(EMOTIONS, label=columns).labels == tuple(columns)


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("['anger', 'joy']", ("anger", "joy")),
        (' ["joy", "anger"]', ("anger", "joy")),
        ("[27, 3]", ("3", "27")),
        ("['anger' 'joy']", None),
        ("[27 3]", None),
        ("[anger, joy]", None),
        ("('anger', 'joy')", ("anger", "joy")),
        ("('anger (mild)', 'joy')", ("anger (mild)", "joy")),
        ("('anger',)", ("anger",)),
        ("(27, 3)", ("27", "3")),
        ("{'joy', 'anger'}", ("anger", "joy")),
        ("(anger, joy)", None),
        ("{anger,joy}", None),
        ("{anger}", None),
        ('{"anger": 1, "joy": 0}', None),
        ("{'anger' 'joy'}", None),
        ("(other)", ("(other)",)),
        ("(other), (odd)", ("(other)", "(odd)")),
        ("(mild) anger, joy", ("(mild) anger", "joy")),
        ("joy (mild), anger", ("joy (mild)", "anger")),
    ],
)
def test_a_cell_that_looks_like_a_list_is_one(tmp_path: Path, cell: str, labels: tuple[str, ...] | None) -> None:
    data = str(save(tmp_path, "train", [{"text": "x", "emotions": cell}, {"text": "y", "emotions": "[3]"}]))
    if labels is None:
        with pytest.raises(DataError, match=r"train.jsonl:1: emotions is .* begins like a list, but is none"):
            task(EMOTIONS).with_labels_of(data)
    else:
        assert set(labels) <= set(task(EMOTIONS).with_labels_of(data).labels) <= {*labels, "3"}


@pytest.mark.parametrize("cell", ["[]", "()", "set()", " ", ""])
def test_a_cell_without_labels(tmp_path: Path, cell: str) -> None:
    data = str(save(tmp_path, "train", [{"text": "x", "emotions": cell}, {"text": "y", "emotions": "[3]"}]))
    assert [one.label for one in task(EMOTIONS, labels=[3, 4]).read("train", data)] == [(), (0,)]


@pytest.mark.parametrize(
    ("train", "dev"), [(["world", "sports"], 0), (["world", "sports"], "1"), (["1.0", "2.0"], 1), (["1.5", "x"], 1)]
)
def test_a_number_is_no_place_among_labels_without_an_order(tmp_path: Path, train: list[str], dev: Any) -> None:
    words = {"kind": "classification", "text": "text", "label": "y"}
    save(tmp_path, "train", [{"text": "x", "y": value} for value in train])
    own = task(words).with_labels_of(str(save(tmp_path, "dev", [{"text": "x", "y": dev}])))
    for one in (own, find_task("mine", {"mine": own.declaration()})):
        with pytest.raises(DataError, match=r"dev.jsonl:1: y is '[01]'"):
            one.read("dev", str(tmp_path))


def test_minus_one_and_marks_are_no_gold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"kind": "classification", "text": "text", "label": "y"}
    data = str(save(tmp_path, "train", [{"text": "x", "y": value} for value in (1, -1, 0, "-", 1)]))
    own = task(words, unlabelled=-1, labels=[0, 1, "-"])
    assert [one.id for one in own.read("train", data)] == ["train-0", "train-2", "train-3", "train-4"]
    assert "1 of 5 rows have no gold label; they are left out" in " ".join(capsys.readouterr().out.split())
    own = task(words, unlabelled="-", labels=[0, 1])
    assert [one.label for one in own.read("train", data)] == [1, 0, 1]
    own = task(words).with_labels_of(str(save(tmp_path, "train", [{"text": "x", "y": value} for value in (1, -1, 0)])))
    assert own.labels == ("0", "1")
    with pytest.raises(DataError, match=r"train.jsonl:2: no label") as caught:
        own.read("train", data)
    assert "unlabelled = -1" in caught.value.remedy
    for one in (task(words, unlabelled=-1), task(words, unlabelled=-1).with_labels_of(data)):
        assert [example.id for example in one.read("train", data)] == ["train-0", "train-2"]
    save(tmp_path, "test", [{"text": "x", "y": -1}, {"text": "y", "y": -1}])
    assert [one.label for one in own.read("test", data)] == [None, None]
    ratings = {"kind": "regression", "text": "text", "label": "y", "unlabelled": -1}
    assert [one.label for one in task(ratings).read("train", data)] == [1.0, 0.0]


def test_an_unknown_label_of_a_text_to_predict_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "x", "y": "good"}, {"text": "z", "y": "odd"}]
    own = task({"kind": "classification", "text": "text", "label": "y", "labels": ["bad", "good"]})
    path = save(tmp_path, "new", rows) / "new.jsonl"
    assert [one.label for one in own.read_unlabelled(path, "new")] == [1, None]
    assert "these labels" in (said := " ".join(capsys.readouterr().out.split()))
    assert "odd" in said


class Shouted(DeclaredTask):
    def from_line(self, line: str, name: str) -> Example:
        return super().from_line(line.upper(), name)


def test_a_subclass_keeps_its_methods(tmp_path: Path) -> None:
    rows = [{"text": "x", "y": value} for value in (1, 2)]
    own = Shouted.of_table("mine", {"kind": "classification", "text": "text", "label": "y"})
    assert own.with_labels_of(str(save(tmp_path, "train", rows))).from_line("ja", "line-1").texts == (("JA",),)


def test_the_configuration_belongs_to_the_data_set_that_data_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(hub_id: str, configuration: str | None, split: str, **more: Any) -> Any:
        asked.append((hub_id, configuration, more["name"]))
        raise DataError("none", "")

    monkeypatch.setattr("kr2cache.tasks.rows.load_hub", load)
    for data in ({}, {"data": "own/set"}, {"data": "other/set"}):
        own = task(LINES, configuration="de", splits={"dev": "validation_matched"}, **data)
        with pytest.raises(DataError):
            own.read("dev", "own/set")
    assert asked == [("own/set", "de", "validation_matched")] * 2 + [("own/set", None, None)]


@pytest.mark.parametrize(("value", "number"), [(3, 3.0), (2.5, 2.5), ("4.75", 4.75), (None, None), ("", None)])
def test_the_value_of_a_regression(tmp_path: Path, value: Any, number: float | None) -> None:
    assert read(SIMILARITY, tmp_path, [{"id": 7, "a": "x", "b": "y", "score": value}]) == [
        Example("7", (("x", "y"),), number)
    ]


def test_words_with_tags(tmp_path: Path) -> None:
    rows = [
        {"tokens": ["New", "York", "."], "ner_tags": ["B-LOC", "I-LOC", "O"]},
        {"tokens": ["Ada"], "ner_tags": ["B-PER"]},
    ]
    own = task(NER).with_labels_of(str(save(tmp_path / "data", "train", rows)))
    assert own.labels == ("B-LOC", "B-PER", "I-LOC", "O")
    assert own.read("train", str(tmp_path / "data")) == [
        Example("train-0", (("New", "York", "."),), (0, 2, 3)),
        Example("train-1", (("Ada",),), (1,)),
    ]
    assert (own.words, own.template, own.metric) == (True, "words", "f1")
    assert own.from_line("New  York\n", "line-1") == Example("line-1", (("New", "York"),), None)


def test_choices_of_a_list_and_of_columns(tmp_path: Path) -> None:
    rows = [
        {"q": "Why?", "endings": ["a", "b", "c"], "gold": 2},
        {"q": "How?", "endings": ["d", "e", "f"], "gold": "0"},
    ]
    assert read(ENDINGS, tmp_path, rows) == [
        Example("train-0", (("Why?", "a"), ("Why?", "b"), ("Why?", "c")), 2),
        Example("train-1", (("How?", "d"), ("How?", "e"), ("How?", "f")), 0),
    ]
    rows = [{"a": "x", "b": "y", "c": "z", "gold": "B"}, {"a": "x", "b": "y", "c": "z", "gold": 2}]
    assert read(OPTIONS, tmp_path, rows) == [
        Example("train-0", (("x",), ("y",), ("z",)), 1),
        Example("train-1", (("x",), ("y",), ("z",)), 2),
    ]
    assert task(ENDINGS).template == "q, each of endings"
    assert task(OPTIONS).template == "each of a, b, c"


def test_texts_alone(tmp_path: Path) -> None:
    assert read(LINES, tmp_path, [{"line": "x"}, {"line": "y", "id": "second"}]) == [
        Example("train-0", (("x",),), None),
        Example("second", (("y",),), None),
    ]
    (tmp_path / "lines.txt").write_text("first\tline\n\nsecond\n")
    assert task(LINES).read("train", str(tmp_path / "lines.txt")) == [
        Example("train-0", (("first\tline",),), None),
        Example("train-2", (("second",),), None),
    ]
    with pytest.raises(ConfigError, match="no labels"):
        _ = task(LINES).head


@pytest.mark.parametrize("words", [REVIEWS, EMOTIONS, NER, ENDINGS], ids=lambda words: words["kind"])
def test_an_extraction_needs_no_labels(tmp_path: Path, words: dict[str, Any]) -> None:
    """The labels of a split are not looked at before a training knows them, so a split without train is enough."""
    row = {
        "title": "a", "body": "b", "text": "c", "tokens": ["d"], "q": "e", "endings": ["f", "g"], "stars": "never seen",
        "emotions": ["odd"], "ner_tags": ["B-ODD"], "gold": "0",
    }  # fmt: skip
    (example,) = task(words).read("dev", str(save(tmp_path, "dev", [row])))
    assert example.label is None


def test_the_data_of_the_declaration(tmp_path: Path) -> None:
    save(tmp_path / "own", "train", [{"line": "x"}])
    own = task(LINES, data=str(tmp_path / "own"))
    assert own.read("train", None) == [Example("train-0", (("x",),), None)]
    assert own.corpus(None) == "own"
    own.check_data("train", None)
    assert list(own.source_files("train", None) or ()) == ["train.jsonl"]


@pytest.mark.parametrize("words", ALL, ids=str)
def test_a_declaration_is_recorded_with_its_labels_and_read_again(tmp_path: Path, words: dict[str, Any]) -> None:
    row = {
        "title": "a", "body": "b", "text": "c", "tokens": ["d", "e"], "q": "e", "endings": ["f", "g"],
        "emotions": ["odd", "new"], "ner_tags": ["B-ODD", "O"], "gold": "0", "a": "h", "b": "i", "c": "j", "line": "k",
    }  # fmt: skip
    rows = [{**row, "stars": stars, "score": 1} for stars in ("x", "y")]
    data = str(save(tmp_path, "train", rows))
    own = task(words, data=data).with_labels_of(None)
    recorded = json.loads(json.dumps(own.declaration()))
    assert "data" not in recorded
    again = find_task("mine", {"mine": recorded})
    assert (again.labels, again.kind, again.metric) == (own.labels, own.kind, own.metric)
    assert again.read("train", data) == own.read("train", data)
    assert again.declaration() == recorded


def test_built_in_tasks_are_not_declared() -> None:
    for name in ("udpos", "snli", "piqa"):
        assert find_task(name).declaration() is None
        assert find_task(name).with_labels_of("nowhere").labels == find_task(name).labels


# Refused declarations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        ({}, r"\[tasks.mine\] has no kind", "classification"),
        ({"kind": "clasification"}, "Did you mean 'classification'", "regression"),
        ({"kind": 3}, "'3'", "regression"),
        (REVIEWS | {"lable": "x"}, r"word in \[tasks.mine\]: 'lable'. Did you mean 'label'", "metric"),
        (
            REVIEWS | {"words": "x"},
            "a task of kind classification has no words",
            "kind, text, label, labels, rename_labels, unlabelled, metric, about",
        ),
        ({"kind": "classification", "text": "a"}, "has no label", 'label = "stars"'),
        ({"kind": "regression", "label": "a"}, "has no text", 'text = "review"'),
        ({"kind": "tagging", "label": "a"}, "has no words", 'words = "tokens"'),
        (REVIEWS | {"text": 3}, "text = 3 cannot be used", 'text = "review"'),
        (REVIEWS | {"text": ["a", "b", "c"]}, "cannot be used", "two segments"),
        (REVIEWS | {"text": ["a", "a"]}, "cannot be used", "two segments"),
        (REVIEWS | {"label": ["a", "b"]}, "cannot be used", 'label = "stars"'),
        (REVIEWS | {"labels": ["a"]}, "cannot be used", "each once"),
        (REVIEWS | {"labels": [1, "1"]}, "cannot be used", "each once"),
        (REVIEWS | {"metric": "f2"}, "metric in", "macro_f1"),
        (REVIEWS | {"metric": "f1", "labels": ["a", "b", "c"]}, "metric in", "macro_f1"),
        (REVIEWS | {"columns": [0, 1]}, "cannot be used", "names of all columns"),
        (REVIEWS | {"rename": {"a": 3}}, "cannot be used", "name in the file"),
        (REVIEWS | {"splits": {"valid": "x"}}, "cannot be used", "validation_matched"),
        (REVIEWS | {"files": ["train.tsv"]}, "cannot be used", "{split}"),
        (REVIEWS | {"language": 3}, "language = 3 cannot be used", "column language"),
        (
            REVIEWS | {"labels": ["bad", "good"], "rename_labels": {"5": "goood"}},
            r"Unknown label in rename_labels of \[tasks.mine\]: 'goood'",
            "good",
        ),
        ({"kind": "tagging", "label": "XPOSS"}, "has no words", "columns = "),
        ({"kind": "tagging", "words": "w"}, "has no label", "CoNLL-U"),
        ({"kind": "tagging", "columns": [0, 0]}, "cannot be used", "from 0"),
        ({"kind": "tagging", "columns": [0, "tag"]}, "cannot be used", "from 0"),
        ({"kind": "tagging", "columns": [0, -2]}, "cannot be used", "from 0"),
        (REVIEWS | {"id": ""}, "id = '' cannot be used", "column"),
        (NER | {"scheme": "IOBES"}, "scheme in", "BIO"),
        (NER | {"metric": "macro_f1"}, "metric in", "precision"),
        (OPTIONS | {"labels": ["A", "B"]}, "3 choices, but 2 labels", "for each choice"),
        (OPTIONS | {"choices": ["a"]}, "cannot be used", "one column for each choice"),
        (EMOTIONS | {"label": ["a", "b"], "labels": ["a", "b", "c"]}, "2 columns of labels, but 3 labels", "names"),
        (LINES | {"label": "x"}, "a task of kind text has no label", "text"),
    ],
)
def test_a_declaration_that_cannot_be_used(words: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(KR2CacheError, match=message) as caught:
        find_task("mine", {"mine": words})
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["a/b", "", "..", "-x", "ä"])
def test_a_name_that_no_folder_has(name: str) -> None:
    with pytest.raises(ConfigError, match="name of a task"):
        find_task(name, {name: LINES})


def test_a_name_that_is_taken_and_a_name_that_is_unknown() -> None:
    with pytest.raises(ConfigError, match="built-in task snli"):
        find_task("snli", {"snli": REVIEWS})
    with pytest.raises(UnknownNameError, match="Did you mean 'reviews'") as caught:
        find_task("review", {"reviews": REVIEWS})
    assert "[tasks.NAME]" in caught.value.remedy


def test_kr2cache_toml(workdir: Path) -> None:
    (workdir / "kr2cache.toml").write_text('[tasks.lines]\nkind = "text"\ntext = "line"\n')
    assert read_toml(workdir, {}).tasks == {"lines": LINES}
    for text in ("tasks = 3\n", "[tasks]\nlines = 3\n"):
        (workdir / "kr2cache.toml").write_text(text)
        with pytest.raises(ConfigError, match="not a section"):
            read_toml(workdir, {})


# Refused data --------------------------------------------------------------------------------------------------------

GOOD = {"id": "g", "title": "a", "body": "b", "stars": 1}


@pytest.mark.parametrize(
    ("words", "row", "message"),
    [
        (REVIEWS, {"title": "a", "stars": 1}, r"train.jsonl:1: body is missing \(there are title, stars\)"),
        (REVIEWS, GOOD | {"body": " "}, "train.jsonl:1: body is empty"),
        (REVIEWS, GOOD | {"body": 5}, "train.jsonl:1: body is '5', not text"),
        (REVIEWS, GOOD | {"body": None}, "train.jsonl:1: body is null, not text"),
        (REVIEWS, GOOD | {"body": "\ud83d"}, "train.jsonl:1: a text is not Unicode"),
        (REVIEWS | {"labels": [1, 2]}, GOOD | {"stars": 3}, "train.jsonl:1: stars is '3'"),
        (REVIEWS, GOOD | {"stars": [3]}, r"train.jsonl:1: stars is '\[3\]', not a label"),
        (EMOTIONS, {"text": "x", "emotions": 3}, "train.jsonl:1: emotions is '3', not a list of labels"),
        (EMOTIONS, {"text": "x", "emotions": ["a", ""]}, "train.jsonl:1: emotions: label 2 is empty"),
        (EMOTIONS | {"label": ["a", "b"]}, {"text": "x", "a": 1, "b": 2}, "train.jsonl:1: b is '2', not 0 or 1"),
        (SIMILARITY, {"a": "x", "b": "y", "score": "high"}, "train.jsonl:1: score is 'high', not a number"),
        (SIMILARITY, {"a": "x", "b": "y", "score": True}, "train.jsonl:1: score is 'True', not a number"),
        (SIMILARITY, {"a": "x", "b": "y", "score": float("inf")}, "train.jsonl:1: score is 'inf', not a number"),
        (NER, {"tokens": "a b", "ner_tags": ["O", "O"]}, "train.jsonl:1: tokens is 'a b', not a list of texts"),
        (NER, {"tokens": ["a", " "], "ner_tags": ["O", "O"]}, "train.jsonl:1: text 2 in tokens is empty"),
        (NER, {"tokens": ["a", 5], "ner_tags": ["O", "O"]}, "train.jsonl:1: tokens is .* not a list of texts"),
        (NER, {"tokens": [], "ner_tags": []}, "train.jsonl:1: tokens is .* not a list of texts"),
        (NER, {"tokens": 5, "ner_tags": []}, "train.jsonl:1: tokens is '5', not a list of texts"),
        (NER, {"tokens": {"a": 1}, "ner_tags": []}, "train.jsonl:1: tokens is .* not a list of texts"),
        (NER | {"rename": {"w": "tokens"}}, {"w": 5, "ner_tags": []}, "train.jsonl:1: tokens is '5', not a list"),
        (NER, {"words": ["a"]}, r"train.jsonl:1: tokens is missing \(there are words\)"),
        (NER, {"tokens": ["a", "b"], "ner_tags": ["O"]}, "train.jsonl:1: ner_tags has 1 labels for 2 words"),
        (NER, {"tokens": ["a", "b"], "ner_tags": ["O", "PER"]}, "'PER' of task mine is not of scheme BIO"),
        (OPTIONS, {"a": "x", "b": "y", "c": "z", "gold": "D"}, "train.jsonl:1: gold is 'D'"),
    ],
)
def test_a_row_that_is_refused(tmp_path: Path, words: dict[str, Any], row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(words, tmp_path, [row])


def test_a_label_that_train_does_not_have(tmp_path: Path) -> None:
    save(tmp_path, "train", [GOOD, GOOD | {"id": "h", "stars": 2}])
    own = task(REVIEWS).with_labels_of(str(save(tmp_path, "dev", [GOOD, GOOD | {"id": "h", "stars": 3}])))
    with pytest.raises(DataError, match=r"dev.jsonl:2: stars is '3'") as caught:
        own.read("dev", str(tmp_path))
    assert "1, 2" in caught.value.remedy
    assert "[tasks.mine]" in caught.value.remedy


def test_a_metric_that_three_labels_do_not_have(tmp_path: Path) -> None:
    rows = [GOOD | {"id": number, "stars": number} for number in range(3)]
    with pytest.raises(ConfigError, match="'f1' is not defined for the 3 labels") as caught:
        read(REVIEWS | {"metric": "f1"}, tmp_path, rows)
    assert "macro_f1" in caught.value.remedy


def test_notes_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [GOOD, GOOD | {"id": "h", "body": "", "stars": 2}, GOOD | {"id": "i", "stars": 2}]
    examples = read(REVIEWS | {"skip_empty": True}, tmp_path, rows)
    assert [one.id for one in examples] == ["g", "i"]
    assert capsys.readouterr().out.count("1 of 3 rows have an empty text") == 1


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        (REVIEWS, [GOOD, GOOD], "id 'g' occurs twice: .*:1 and .*:2"),
        (REVIEWS, [GOOD, GOOD | {"id": "h", "stars": None}], "train.jsonl:2: no label, while 1 of 2"),
        (REVIEWS | {"label": "star"}, [GOOD], "in the column star; its columns are id, title, body, stars"),
        (REVIEWS, [GOOD, GOOD | {"id": "h"}], "are '1': there is nothing to learn"),
        (REVIEWS, [GOOD | {"id": i, "stars": f"text {i}"} for i in range(1001)], "has 1,001 different labels"),
        (ENDINGS, [{"q": "x", "endings": ["a", "b"]}, {"q": "x", "endings": ["a"]}], ":2: 1 choices, but .* have 2"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, words: dict[str, Any], rows: list[Any], message: str) -> None:
    if "no label" in message:
        words = words | {"labels": [1, 2]}
    with pytest.raises(DataError, match=message):
        read(words, tmp_path, rows)


# A line that someone types -------------------------------------------------------------------------------------------


def test_lines() -> None:
    assert task(REVIEWS).from_line("a\tb\n", "line-1") == Example("line-1", (("a", "b"),), None)
    assert task(EMOTIONS).from_line("a\tb\n", "line-1") == Example("line-1", (("a b",),), None)
    assert task(OPTIONS).from_line("a\tb\tc", "line-1").texts == (("a",), ("b",), ("c",))
    two = task(ENDINGS, labels=["0", "1"])
    assert two.from_line("q\ta\tb", "line-1").texts == (("q", "a"), ("q", "b"))
    with pytest.raises(DataError, match="line-1: 1 fields, but mine needs 2"):
        task(REVIEWS).from_line("a", "line-1")


def test_a_task_object_serves_where_a_name_does() -> None:
    own = DeclaredTask.of_table("mine", LINES)
    assert find_task("mine", {"mine": own}) is own
