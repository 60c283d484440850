"""Files to predict: which are read as the task's own, which as text, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kr2cache.errors import ConfigError, DataError, UnknownNameError
from kr2cache.prediction.predict import Predicted, _task_of
from kr2cache.prediction.texts import conllu, read_file
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.declared import DeclaredTask

REVIEWS = {"kind": "classification", "text": "text", "label": "y", "labels": ["bad", "good"]}
NER = {"kind": "tagging", "columns": [0, 1], "labels": ["O", "B-X"]}


def task(words: dict[str, Any], **more: Any) -> Task:
    return find_task("mine", {"mine": words | more})


@pytest.mark.parametrize("name", ["new.json", "new.conll", "NEW.TSV2.Json", "new.conllu"])
def test_the_suffix_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[\n]\n")
    with pytest.raises(DataError, match=r"no file of task mine, whose files end in \.jsonl or \.csv"):
        read_file(task(REVIEWS), tmp_path / name)


@pytest.mark.parametrize("name", ["new.CSV", "new.csv"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,y\nein haus,good\n")
    assert read_file(task(REVIEWS), tmp_path / name) == [Example("new-0", (("ein haus",),), 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Das ist ein Haus\nNein danke\n", [("Das", "ist", "ein", "Haus"), ("Nein", "danke")]),
        ("Das ist ein Haus\n\nNein danke\n", [("Das", "ist", "ein", "Haus"), ("Nein", "danke")]),
        ("Das\nist\n\nNein\n", [("Das", "ist"), ("Nein",)]),
        ("Das O\nist O\n\nNein O\n", [("Das", "ist"), ("Nein",)]),
        ("Das\tO\nist\tO\n", [("Das", "ist")]),
        ("Das ist\nNein danke\n", None),
        ("Das ist gut\nNein danke\n\nJa gut\n", None),
    ],
)
def test_sentences_are_not_taken_for_words_with_columns(tmp_path: Path, text: str, words: Any) -> None:
    (tmp_path / "new.txt").write_text(text)
    if words is None:
        with pytest.raises(DataError, match="may hold a sentence a line or a word a line") as caught:
            read_file(task(NER), tmp_path / "new.txt")
        assert ".conll" in caught.value.remedy
    else:
        assert [one.texts[0] for one in read_file(task(NER), tmp_path / "new.txt")] == words


@pytest.mark.parametrize(
    ("label", "column", "cell"),
    [("XPOS", 4, "A"), ("UPOS", 3, "A"), ("MISC.NER", 9, "NER=A"), ("FEATS.Case", 5, "Case=A")],
)
def test_labels_stand_in_their_column_of_conllu(label: str, column: int, cell: str) -> None:
    own = task({"kind": "tagging", "label": label, "labels": ["A", "B"]})
    said = conllu(own, [Example("x", (("Ja", "Nein"),), None)], [Predicted(id="x", predicted=["A", None], scores=None)])
    first, second = (line.split("\t") for line in said.splitlines()[2:4])
    assert first == ["1", "Ja", *["_"] * (column - 2), cell, *["_"] * (9 - column)]
    assert second == ["2", "Nein", *["_"] * 8]


def test_labels_of_no_column_of_conllu_are_refused() -> None:
    with pytest.raises(ConfigError, match="of no column of CoNLL-U"):
        conllu(task(NER), [], [])


class Mine(DeclaredTask):
    pass


def test_a_run_is_predicted_with_the_task_that_it_recorded() -> None:
    own = Mine.of_table("snli", REVIEWS)
    with pytest.raises(ConfigError, match="built-in task snli"):
        find_task("snli", {"snli": own})
    assert find_task("snli", {"snli": find_task("snli")}).name == "snli"
    recorded = {"task": "snli", "declaration": own.declaration()}  # by an earlier version
    assert _task_of(recorded, {}).labels == ("bad", "good")
    assert type(_task_of(recorded, {"snli": own})) is Mine
    with pytest.raises(UnknownNameError, match="jokes") as caught:
        _task_of({"task": "jokes"}, {})
    assert "Predictor.load" in caught.value.remedy


CONLLU = "1\tHaus\t_\tNAME\t_\t_\t_\t_\t_\t_\n"
ENDINGS = {"activity_label": "x", "ctx_a": "a", "ctx_b": "", "ctx": "a", "endings": ["a", "b", "c", "d"], "ind": 1}
OF_UNKNOWN_LABELS: dict[str, tuple[str, str]] = {
    "snli": ("new.jsonl", json.dumps({"gold_label": "NAME", "sentence1": "a", "sentence2": "b"})),
    "swag": ("new.csv", "sent1,sent2,ending0,ending1,ending2,ending3,label\na,b,c,d,e,f,NAME"),
    "hellaswag": ("new.jsonl", json.dumps(ENDINGS | {"label": "NAME"})),
    "piqa": ("new.jsonl", json.dumps({"goal": "a", "sol1": "b", "sol2": "c"})),
    "udpos-de": ("new.conllu", CONLLU),
    "conll2003": ("eng.new.conll", "Haus NN I-NP NAME"),
    "xnli-de": ("new.tsv", "language\tgold_label\tsentence1\tsentence2\nde\tNAME\ta\tb"),
    "rte": ("new.tsv", "index\tsentence1\tsentence2\tlabel\n4\ta\tb\tNAME"),
}


@pytest.mark.parametrize("name", OF_UNKNOWN_LABELS)
def test_labels_that_a_built_in_task_does_not_know_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a declared task: the labels of a file to predict are only compared. In training they are an error."""
    file, text = OF_UNKNOWN_LABELS[name]
    (tmp_path / file).write_text(f"{text}\n")
    (tmp_path / "new-labels.lst").write_text("NAME\n")
    own = find_task(name)
    (example,) = read_file(own, tmp_path / file)
    assert example.label is None
    assert example.texts
    assert "does not know these labels, so there is no comparison with them: NAME." in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(DataError, match="NAME") as caught:
        list(own.file_examples(tmp_path / file, "train"))
    assert "[tasks." not in caught.value.remedy, "nobody can declare it"


def test_a_file_without_a_suffix_is_lines_unless_it_names_a_split(tmp_path: Path) -> None:
    for name in ("sentences", "eng.testb"):
        (tmp_path / name).write_text("Haus O\nHund O\n\nKöln B-X\n")
    assert [one.texts[0] for one in read_file(task(NER), tmp_path / "sentences")] == [
        ("Haus", "O"), ("Hund", "O"), ("Köln", "B-X"),
    ]  # fmt: skip
    assert [one.texts[0] for one in read_file(task(NER), tmp_path / "eng.testb")] == [("Haus", "Hund"), ("Köln",)]
