"""GLUE, XNLI, PAWS-X, WikiANN and CoNLL-2003: files in the layout of each release, and rows as the hub has them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from kr2cache.tasks import Example, find_task, task_names
from kr2cache.tasks.ready import READY

Expected = list[tuple[str, tuple[str, ...], Any]]
"""Id, segments or words, label."""


def found(name: str, split: str, data: Path | None) -> Expected:
    examples: list[Example] = find_task(name).read(split, None if data is None else str(data))
    return [(one.id, one.texts[0], one.label) for one in examples]


def write(path: Path, *rows: str) -> None:
    """Rows with ``|`` for a tab; in release files, quotes are characters as any other."""
    path.write_text("".join(row.replace("|", "\t") + "\n" for row in rows), "utf-8")


# GLUE's release files ------------------------------------------------------------------------------------------------

MNLI_COLUMNS = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse|"
    "sentence1|sentence2|label1|gold_label"
)
MNLI_ROW = '0|31193|31193n|government|( a )|( b )|(ROOT a)|(ROOT b)|He said "no|Yes.|neutral|contradiction'
STSB_COLUMNS = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
GLUE_FILES: dict[str, tuple[str, tuple[str, ...], Expected]] = {
    "cola": (
        "train.tsv",
        ("gj04|1||Our friends won't buy \"this.", "gj04|0|*|They drank the pub"),
        [("train-0", ('Our friends won\'t buy "this.',), 1), ("train-1", ("They drank the pub",), 0)],
    ),
    "sst2": (
        "train.tsv",
        ("sentence|label", 'hide " new secretions |0', "a gorgeous film|1"),
        [("train-0", ('hide " new secretions ',), 0), ("train-1", ("a gorgeous film",), 1)],
    ),
    "mrpc": (
        "train.tsv",
        ("\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", '1|702876|702977|He said "a|He said b', "0|1|2|c|d"),
        [("train-0", ('He said "a', "He said b"), 1), ("train-1", ("c", "d"), 0)],
    ),
    "qqp": (
        "train.tsv",
        ("id|qid1|qid2|question1|question2|is_duplicate", "133273|1|2|How?|Why?|0", "7|1|2||Why?|0", "8|1|2|a|b|1"),
        [("133273", ("How?", "Why?"), 0), ("8", ("a", "b"), 1)],
    ),
    "stsb": (
        "train.tsv",
        (f"{STSB_COLUMNS}|score", "0|main|MSRvid|2012|1|x|y|A plane.|An air plane.|5.000", "1|a|b|c|d|e|f|g|h|2.4"),
        [("0", ("A plane.", "An air plane."), 5.0), ("1", ("g", "h"), 2.4)],
    ),
    "mnli": ("train.tsv", (MNLI_COLUMNS, MNLI_ROW), [("0", ('He said "no', "Yes."), 2)]),
    "mnli-mm": ("dev_mismatched.tsv", (MNLI_COLUMNS, MNLI_ROW), [("0", ('He said "no', "Yes."), 2)]),
    "qnli": (
        "train.tsv",
        ("index|question|sentence|label", "4|When?|In 1990.|entailment", "5|Who?|Nobody.|not_entailment"),
        [("4", ("When?", "In 1990."), 0), ("5", ("Who?", "Nobody."), 1)],
    ),
    "rte": (
        "train.tsv",
        ("index|sentence1|sentence2|label", "0|No.|Yes.|not_entailment", "1|a|b|entailment"),
        [("0", ("No.", "Yes."), 1), ("1", ("a", "b"), 0)],
    ),
    "wnli": (
        "train.tsv",
        ("index|sentence1|sentence2|label", "0|I stuck a pin.|The pin.|1", "1|a|b|0"),
        [("0", ("I stuck a pin.", "The pin."), 1), ("1", ("a", "b"), 0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE_FILES)
def test_the_release_files_of_glue(name: str, tmp_path: Path) -> None:
    file, rows, expected = GLUE_FILES[name]
    write(tmp_path / file, *rows)
    assert found(name, "dev" if file.startswith("dev") else "train", tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "file", "header", "row", "texts"),
    [
        ("cola", "test.tsv", "index|sentence", "0|Bill", ("Bill",)),
        ("sst2", "test.tsv", "index|sentence", "0|Bill", ("Bill",)),
        ("mrpc", "test.tsv", "index|#1 ID|#2 ID|#1 String|#2 String", "0|1|2|a|b", ("a", "b")),
        ("qqp", "test.tsv", "id|question1|question2", "0|a|b", ("a", "b")),
        ("stsb", "test.tsv", STSB_COLUMNS, "0|a|b|c|d|e|f|g|h", ("g", "h")),
        ("mnli", "test_matched.tsv", MNLI_COLUMNS[:-18], MNLI_ROW[:-22], ('He said "no', "Yes.")),
        ("rte", "test.tsv", "index|sentence1|sentence2", "0|a|b", ("a", "b")),
    ],
)  # fmt: skip
def test_blind_test_files_of_glue(
    name: str, file: str, header: str, row: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    write(tmp_path / file, header, row)
    assert found(name, "test", tmp_path) == [("0", texts, None)]


def test_the_decisive_metrics_are_those_of_glue() -> None:
    of_glue = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}
    assert {name: find_task(name).metric for name in GLUE_FILES} == dict.fromkeys(GLUE_FILES, "accuracy") | of_glue


# The hub -------------------------------------------------------------------------------------------------------------


def column(texts: Sequence[str], labels: Any, label: str = "label", **more: Any) -> dict[str, Any]:
    return {**{name: [f"{name} {i}" for i in range(2)] for name in texts}, label: labels, **more}


ENTAILMENT = ["entailment", "neutral", "contradiction"]
IDX = {"idx": [7, 9]}
ONE, TWO = ("sentence",), ("sentence1", "sentence2")
PREMISE = ("premise", "hypothesis")
HUB: dict[str, tuple[str, str, str, tuple[str, ...], list[str] | None, dict[str, Any]]] = {
    "cola": ("nyu-mll/glue", "cola", "validation", ONE, ["unacceptable", "acceptable"], IDX),
    "sst2": ("nyu-mll/glue", "sst2", "validation", ONE, ["negative", "positive"], IDX),
    "mrpc": ("nyu-mll/glue", "mrpc", "validation", TWO, ["not_equivalent", "equivalent"], IDX),
    "qqp": ("nyu-mll/glue", "qqp", "validation", ("question1", "question2"), ["not_duplicate", "duplicate"], IDX),
    "mnli": ("nyu-mll/glue", "mnli", "validation_matched", PREMISE, ENTAILMENT, IDX),
    "mnli-mm": ("nyu-mll/glue", "mnli", "validation_mismatched", PREMISE, ENTAILMENT, IDX),
    "qnli": ("nyu-mll/glue", "qnli", "validation", ("question", "sentence"), ["entailment", "not_entailment"], IDX),
    "rte": ("nyu-mll/glue", "rte", "validation", TWO, ["entailment", "not_entailment"], IDX),
    "wnli": ("nyu-mll/glue", "wnli", "validation", TWO, ["not_entailment", "entailment"], IDX),
    "xnli-de": ("facebook/xnli", "de", "validation", PREMISE, ENTAILMENT, {}),
    "pawsx-ko": ("google-research-datasets/paws-x", "ko", "validation", TWO, ["0", "1"], {"id": [7, 9]}),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], datasets.Dataset]:
    """What the hub has, by data set, configuration, split and revision."""
    known: dict[tuple[Any, ...], datasets.Dataset] = {}

    def load(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        return known[path, name, split, revision]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return known


@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_hub(name: str, hub: dict[tuple[Any, ...], datasets.Dataset]) -> None:
    hub_id, configuration, split, texts, labels, more = HUB[name]
    table = datasets.Dataset.from_dict(column(texts, [1, 0], **more))
    hub[hub_id, configuration, split, None] = table.cast_column("label", datasets.ClassLabel(names=labels))
    ids = more.get("idx") or more.get("id") or ["dev-0", "dev-1"]
    assert found(name, "dev", None) == [
        (str(ids[i]), tuple(f"{text} {i}" for text in texts), number) for i, number in enumerate((1, 0))
    ]
    hub[hub_id, configuration, split.replace("validation", "test"), None] = table.map(lambda row: {**row, "label": -1})
    assert [label for *_, label in found(name, "test", None)] == [None, None]


def test_similarities_of_the_hub(hub: dict[tuple[Any, ...], datasets.Dataset]) -> None:
    for split, values in (("validation", [2.5, 0.0]), ("test", [-1.0, -1.0])):
        hub["nyu-mll/glue", "stsb", split, None] = datasets.Dataset.from_dict(column(TWO, values, **IDX))
    assert [label for *_, label in found("stsb", "dev", None)] == [2.5, 0.0]
    assert [label for *_, label in found("stsb", "test", None)] == [None, None]


@pytest.mark.parametrize(
    ("name", "key", "names"),
    [
        (
            "wikiann-de",
            ("unimelb-nlp/wikiann", "de", "train", None),
            ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"],
        ),
        (
            "conll2003",
            ("eriktks/conll2003", None, "train", "refs/convert/parquet"),
            ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"],
        ),
    ],
)
def test_entities_of_the_hub(
    name: str, key: tuple[Any, ...], names: list[str], hub: dict[tuple[Any, ...], datasets.Dataset]
) -> None:
    tags = datasets.List(datasets.ClassLabel(names=names))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["Ada", "Lovelace", "rief"]], "ner_tags": [[1, 2, 0]]}
    hub[key] = datasets.Dataset.from_dict(rows, features=features)
    assert found(name, "train", None) == [("train-0", ("Ada", "Lovelace", "rief"), (1, 2, 0))]
    assert find_task(name).labels == tuple(names)


# XTREME's files, and CoNLL-2003's -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "labels"), [("xnli-de", ENTAILMENT), ("pawsx-de", ["0", "1"])])
def test_pairs_of_xtreme(name: str, labels: list[str], tmp_path: Path) -> None:
    """Its program writes them by Python's csv module: without names of columns, and with quotes where needed."""
    pairs = [('Er sagte "nein".', '"Ja"'), ("und", 'halb "offen')]
    for split, width in (("dev", 3), ("test", 2)):
        with (tmp_path / f"{split}-de.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows(
                [[*pair, label][:width] for pair, label in zip(pairs, labels, strict=False)]
            )
    assert found(name, "dev", tmp_path) == [("dev-0", pairs[0], 0), ("dev-1", pairs[1], 1)]
    assert found(name, "test", tmp_path) == [("test-0", pairs[0], None), ("test-1", pairs[1], None)]


def test_pawsx_in_its_own_release(tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "id|sentence1|sentence2|label", '1|"a" b|c "d|0', "2|e|f|1")
    assert found("pawsx-fr", "dev", tmp_path) == [("1", ('"a" b', 'c "d'), 0), ("2", ("e", "f"), 1)]


def test_entities_of_xtreme(tmp_path: Path) -> None:
    write(tmp_path / "dev-de.tsv", "Ada|B-PER", "#|O", "", "Köln|B-LOC", "", "")
    write(tmp_path / "test-de.tsv", "Ada", "rief", "", "Köln")
    assert found("wikiann-de", "dev", tmp_path) == [("dev-0", ("Ada", "#"), (1, 0)), ("dev-1", ("Köln",), (5,))]
    assert found("wikiann-de", "test", tmp_path) == [("test-0", ("Ada", "rief"), None), ("test-1", ("Köln",), None)]


def test_conll_2003(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("-DOCSTART- -X- O O\n\nCRICKET NNP I-NP O\nLEICESTERSHIRE NNP I-NP B-ORG\n")
    assert found("conll2003", "dev", tmp_path) == [("dev-0", ("CRICKET", "LEICESTERSHIRE"), (0, 3))]


def test_ready_tasks_need_no_words_in_a_run() -> None:
    assert set(READY) <= set(task_names())
    for name in READY:
        task = find_task(name)
        assert task.name == name
        assert task.declaration() is None
        assert task.labels or task.kind == "regression"
        assert task.about
