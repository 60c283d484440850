"""SNLI, SWAG, HellaSwag and PIQA: what is read is what the json and csv modules read, put together by hand here."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from kr2cache.errors import DataError, MissingSplitError
from kr2cache.tasks import Example, Task, find_task, task_names

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data beside the checkout")

NAMES = ("snli", "swag", "piqa", "hellaswag")
SUFFIX = {"snli": ".jsonl", "swag": ".csv", "piqa": ".jsonl", "hellaswag": ".jsonl"}
SNLI_LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
SWAG_COLUMNS = [
    "", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source", "ending0", "ending1", "ending2",
    "ending3", "label",
]  # fmt: skip
"""As the first line of the original train.csv has them; the row's number has no name."""

Expected = tuple[str, tuple[tuple[str, ...], ...], int | None]
"""Id, texts, label."""


# Rows of the original layouts ----------------------------------------------------------------------------------------


def snli_row(number: int = 0, **changed: Any) -> dict[str, Any]:
    label = ("entailment", "neutral", "contradiction")[number % 3]
    return {
        "annotator_labels": [label],
        "captionID": "3416050480.jpg#4",
        "gold_label": label,
        "pairID": f"3416050480.jpg#4r{number}",
        "sentence1": f"A person on horse {number} jumps over an airplane.",
        "sentence1_binary_parse": "( ( A person ) )",
        "sentence1_parse": "(ROOT (S (NP (DT A) (NN person))))",
        "sentence2": f"A person is outdoors, on horse {number}.",
        "sentence2_binary_parse": "( ( A person ) )",
        "sentence2_parse": "(ROOT (S (NP (DT A) (NN person))))",
    } | changed


def swag_row(number: int = 0, **changed: Any) -> dict[str, Any]:
    return {
        "": str(7 * number + 3),
        "video-id": "anetv_dm5WXFiQZUQ",
        "fold-ind": "18419",
        "startphrase": "He rides. He",
        "sent1": f'He rides "the" motorcycle {number}, slowly.',
        "sent2": "He",
        "gold-source": "gold",
        "ending0": "looks at a mirror.",
        "ending1": f"stops, listening to {number}.",
        "ending2": "exits the building.",
        "ending3": "pulls the bag out.",
        "label": str(number % 4),
    } | changed


def piqa_row(number: int = 0, **changed: Any) -> dict[str, Any]:
    return {
        "goal": f"How do I ready cage {number}?",
        "sol1": "Use paper strips. ",
        "sol2": f"Use {number} jeans.",
    } | changed


def hellaswag_row(number: int = 0, **changed: Any) -> dict[str, Any]:
    return {
        "ind": 5 * number + 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": f"Man {number} is sitting on a roof.",
        "ctx_b": "he",
        "ctx": f"Man {number} is sitting on a roof. he",
        "split": "val",
        "split_type": "indomain",
        "label": (number + 3) % 4,
        "endings": ["is wrapping skis.", "is ripping tiles off.", "is holding a cube.", f"starts pulling {number}."],
        "source_id": "activitynet~v_-JhWjGDPHMY",
    } | changed


WIKIHOW = {
    "ctx_a": "[header] How to ready a cage [title] Take paper. [step] Tear it.",
    "ctx_b": "",
    "ctx": "[header] How to ready a cage [title] Take paper. [step] Tear it.",
    "endings": ["[substeps] a", "[title] b [step] c", "d", "e"],
    "source_id": "wikihow~19",
}
ROW: dict[str, Callable[..., dict[str, Any]]] = {
    "snli": snli_row,
    "swag": swag_row,
    "piqa": piqa_row,
    "hellaswag": hellaswag_row,
}


def without(row: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    assert set(columns) <= set(row)
    return {column: value for column, value in row.items() if column not in columns}


def jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(*rows: Mapping[str, Any]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def text_of(name: str, *rows: Mapping[str, Any]) -> str:
    return table(*rows) if SUFFIX[name] == ".csv" else jsonl(*rows)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    return path


# What the tasks should make of them, by csv and json alone -----------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file: no code of the project."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        return [dict(zip(header, row, strict=True)) for row in rows]
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n") if line]


def expected_snli(rows: Sequence[Mapping[str, Any]], split: str) -> list[Expected]:
    return [
        (
            row.get("pairID", f"{split}-{number}"),
            ((row["sentence1"], row["sentence2"]),),
            SNLI_LABELS[row["gold_label"]],
        )
        for number, row in enumerate(rows)
        if row["gold_label"] != "-"
    ]


def expected_swag(rows: Sequence[Mapping[str, Any]], split: str) -> list[Expected]:
    return [
        (
            row[""],
            tuple((row["sent1"], row["sent2"] + " " + row[f"ending{choice}"]) for choice in range(4)),
            int(row["label"]) if "label" in row else None,
        )
        for row in rows
    ]


def expected_hellaswag(rows: Sequence[Mapping[str, Any]], split: str) -> list[Expected]:
    result: list[Expected] = []
    for row in rows:
        if row["ctx_b"]:
            texts = [(row["ctx_a"], row["ctx_b"] + " " + ending) for ending in row["endings"]]
        else:
            texts = [(row["ctx"], ending) for ending in row["endings"]]
        result.append((str(row["ind"]), tuple(texts), int(row["label"]) if "label" in row else None))
    return result


def expected_piqa(rows: Sequence[Mapping[str, Any]], split: str, labels: Path | None = None) -> list[Expected]:
    numbers = [int(line) for line in labels.read_text("utf-8").split()] if labels else [None] * len(rows)
    return [
        (f"{split}-{number}", ((row["goal"], row["sol1"]), (row["goal"], row["sol2"])), label)
        for (number, row), label in zip(enumerate(rows), numbers, strict=True)
    ]


EXPECTED: dict[str, Callable[..., list[Expected]]] = {
    "snli": expected_snli,
    "swag": expected_swag,
    "piqa": expected_piqa,
    "hellaswag": expected_hellaswag,
}


def read(name: str, split: str, folder: Path) -> list[Expected]:
    return parts(find_task(name).read(split, str(folder)))


def parts(examples: Sequence[Example]) -> list[Expected]:
    return [(example.id, example.texts, example.label) for example in examples]  # type: ignore[misc]


# Original files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_files_in_the_original_layout(name: str, folder: Path) -> None:
    path = write(folder / f"train{SUFFIX[name]}", text_of(name, *(ROW[name](number) for number in range(7))))
    labels = write(folder / "train-labels.lst", "0\n1\n1\n0\n1\n0\n0\n") if name == "piqa" else None
    expected = EXPECTED[name](rows_of(path), "train", *([labels] if labels else []))
    assert read(name, "train", folder) == expected
    assert len(expected) == 7
    assert len({label for _, _, label in expected}) == len(find_task(name).labels)


def test_what_the_layouts_become_is_as_their_papers_feed_it_to_bert(folder: Path) -> None:
    """Written out, so that an error which the references here share would show."""
    write(folder / "train.jsonl", jsonl(snli_row(2)))
    horse = ("A person on horse 2 jumps over an airplane.", "A person is outdoors, on horse 2.")
    assert read("snli", "train", folder) == [("3416050480.jpg#4r2", (horse,), 2)]

    write(folder / "train.csv", table(swag_row(1)))
    ride = 'He rides "the" motorcycle 1, slowly.'
    endings = ("looks at a mirror.", "stops, listening to 1.", "exits the building.", "pulls the bag out.")
    assert read("swag", "train", folder) == [("10", tuple((ride, f"He {ending}") for ending in endings), 1)]

    write(folder / "train.jsonl", jsonl(piqa_row(4)))
    write(folder / "train-labels.lst", "1\n")
    cage = "How do I ready cage 4?"
    assert read("piqa", "train", folder) == [("train-0", ((cage, "Use paper strips. "), (cage, "Use 4 jeans.")), 1)]

    write(folder / "train.jsonl", jsonl(hellaswag_row(0), hellaswag_row(1, **WIKIHOW)))
    roof = "Man 0 is sitting on a roof."
    follow = ("he is wrapping skis.", "he is ripping tiles off.", "he is holding a cube.", "he starts pulling 0.")
    marks = "[header] How to ready a cage [title] Take paper. [step] Tear it."
    assert read("hellaswag", "train", folder) == [
        ("24", tuple((roof, ending) for ending in follow), 3),
        ("29", tuple((marks, ending) for ending in ("[substeps] a", "[title] b [step] c", "d", "e")), 0),
    ]


@pytest.mark.long
@real_data
@pytest.mark.parametrize(
    ("name", "source", "split", "count"),
    [
        ("snli", "snli/dev_tokenized.jsonl", "dev", 9_842),
        ("snli", "snli/original_format_sample.jsonl", "train", 3),
        ("swag", "swag/val_500.csv", "dev", 500),
        ("swag", "swag/original_format_sample.csv", "train", 11),
        ("hellaswag", "hellaswag/val_1000.jsonl", "dev", 1_000),
    ],
)
def test_published_files(name: str, source: str, split: str, count: int, folder: Path) -> None:
    shutil.copyfile(DATA / source, folder / f"{split}{SUFFIX[name]}")
    expected = EXPECTED[name](rows_of(DATA / source), split)
    assert len(expected) == count
    ours = read(name, split, folder)
    assert (ours[0], ours[-1]) == (expected[0], expected[-1])
    assert ours == expected


@pytest.mark.long
@real_data
@pytest.mark.parametrize(
    ("split", "stem", "count"), [("train", "train", 16_113), ("dev", "valid", 1_838), ("test", "tests", 3_084)]
)
def test_published_piqa_with_its_labels_beside_it(split: str, stem: str, count: int) -> None:
    piqa = DATA / "piqa"
    labels = piqa / f"{stem}-labels.lst"
    assert labels.is_file() == (split != "test")
    expected = expected_piqa(rows_of(piqa / f"{stem}.jsonl"), split, labels if split != "test" else None)
    assert len(expected) == count
    assert read("piqa", split, piqa) == expected


@pytest.mark.long
@real_data
def test_published_files_by_eye(folder: Path) -> None:
    shutil.copyfile(DATA / "hellaswag" / "val_1000.jsonl", folder / "hellaswag_val.jsonl")
    name, texts, label = read("hellaswag", "dev", folder)[0]
    assert (name, label) == ("20022", 3)
    assert texts[0] == (
        "Pole vault is a sport where you run with a pole and stop and swing your body.",
        "a few women go down a rock and stop.",
    )
    name, texts, label = read("piqa", "dev", DATA / "piqa")[1]
    assert (name, label) == ("dev-1", 1)
    assert texts[0] == ("dresser", "replace drawer with bobby pin ")


# Ids -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "choices"), [("swag", 4), ("piqa", 2), ("hellaswag", 4)])
def test_choices_are_sequences_of_their_own(name: str, choices: int, folder: Path) -> None:
    write(folder / f"train{SUFFIX[name]}", text_of(name, ROW[name](1)))
    (example,) = find_task(name).read("train", str(folder))
    assert example.sequence_ids == tuple(f"{example.id}#{choice}" for choice in range(choices))
    assert len(example.texts) == choices
    assert all(len(text) == 2 for text in example.texts)


def test_a_pair_is_one_sequence_with_the_id_of_the_example(folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(snli_row()))
    (example,) = find_task("snli").read("train", str(folder))
    assert example.sequence_ids == ("3416050480.jpg#4r0",)
    assert len(example.texts) == 1


@pytest.mark.parametrize(
    ("name", "column", "names"),
    [
        ("snli", "pairID", ["dev-0", "dev-2"]),  # row 1 is left out, and counted
        ("hellaswag", "ind", ["dev-0", "dev-1", "dev-2"]),
        ("swag", "", ["0", "1", "2"]),  # as the numbers of the original files
    ],
)
def test_without_ids_rows_are_numbered_from_0(name: str, column: str, names: list[str], folder: Path) -> None:
    rows = [without(ROW[name](number), column) for number in range(3)]
    if name == "snli":
        rows[1]["gold_label"] = "-"
    write(folder / f"dev{SUFFIX[name]}", text_of(name, *rows))
    assert [one for one, _, _ in read(name, "dev", folder)] == names


def test_an_id_that_is_null_or_blank_is_none(folder: Path) -> None:
    write(folder / "dev.jsonl", jsonl(snli_row(0, pairID=None), snli_row(1, pairID="  "), snli_row(2, pairID=17)))
    assert [name for name, _, _ in read("snli", "dev", folder)] == ["dev-0", "dev-1", "17"]


def test_blank_lines_are_no_rows(folder: Path) -> None:
    rows = [without(snli_row(number), "pairID") for number in range(2)]
    write(folder / "dev.jsonl", "\n" + jsonl(rows[0]) + "\n  \n" + jsonl(rows[1]) + "\n")
    assert read("snli", "dev", folder) == expected_snli(rows, "dev")
    lines = table(*(without(swag_row(number), "") for number in range(2))).splitlines(keepends=True)
    write(folder / "dev.csv", lines[0] + "\n" + lines[1] + "\r\n" + lines[2])
    assert [name for name, _, _ in read("swag", "dev", folder)] == ["0", "1"]


# Labels --------------------------------------------------------------------------------------------------------------


def test_rows_without_agreement_are_left_out_and_counted_aloud(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [snli_row(number) for number in range(5)]
    rows[1]["gold_label"] = rows[4]["gold_label"] = "-"
    write(folder / "train.jsonl", jsonl(*rows))
    assert read("snli", "train", folder) == expected_snli(rows, "train")
    said = capsys.readouterr().out
    assert "2 of 5 rows have no gold label" in said
    assert str(folder / "train.jsonl") in said
    write(folder / "train.jsonl", jsonl(rows[0], rows[2]))
    read("snli", "train", folder)
    assert capsys.readouterr().out == ""


def test_a_split_without_a_single_agreement_is_empty(folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(snli_row(0, gold_label="-")))
    with pytest.raises(DataError, match="train split of corpus holds no example"):
        read("snli", "train", folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["no column", "empty"])
def test_a_test_split_may_have_no_labels_at_all(name: str, how: str, folder: Path) -> None:
    column = "gold_label" if name == "snli" else "label"
    rows = [ROW[name](number) for number in range(3)]
    for row in rows:
        row.pop(column, None)
        if how == "empty":
            row[column] = ""
    write(folder / f"test{SUFFIX[name]}", text_of(name, *rows))
    assert [label for _, _, label in read(name, "test", folder)] == [None] * 3


@pytest.mark.parametrize("label", [2, "2", " 2 ", "contradiction"])
def test_a_label_may_be_a_number_or_its_name(label: int | str, folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(snli_row(0, gold_label=label)))
    assert read("snli", "train", folder)[0][2] == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.sampled_from(NAMES))
def test_score_is_accuracy(pairs: list[tuple[int, int]], name: str) -> None:
    gold, predicted = [a for a, _ in pairs], [b for _, b in pairs]
    score = find_task(name).score(gold, predicted)
    assert score == {"accuracy": pytest.approx(accuracy_score(gold, predicted), abs=1e-12)}


# Where a split lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        *(("snli", "dev", f"{stem}.jsonl") for stem in ("dev", "val", "valid", "validation", "snli_1.0_dev")),
        ("snli", "test", "snli_1.0_test.jsonl"),
        ("swag", "dev", "val.csv"),
        ("piqa", "test", "tests.jsonl"),
        ("piqa", "dev", "valid.jsonl"),
        ("hellaswag", "dev", "hellaswag_val.jsonl"),
        ("hellaswag", "train", "hellaswag_train.jsonl"),
    ],
)
def test_names_of_files(name: str, split: str, file: str, folder: Path) -> None:
    for other in ("train", "dev", "test"):  # whatever else is there is not taken for it
        if other != split:
            write(folder / f"{other}{SUFFIX[name]}", text_of(name, ROW[name](9)))
    path = write(folder / file, text_of(name, ROW[name](1), ROW[name](2)))
    assert read(name, split, folder) == EXPECTED[name](rows_of(path), split)


def test_the_labels_of_piqa_go_by_the_name_of_their_rows(folder: Path) -> None:
    write(folder / "valid.jsonl", jsonl(piqa_row(0), piqa_row(1)))
    write(folder / "dev-labels.lst", "1\n1\n")
    assert [label for _, _, label in read("piqa", "dev", folder)] == [None, None]
    write(folder / "valid-labels.lst", "1\r\n0")
    assert [label for _, _, label in read("piqa", "dev", folder)] == [1, 0]
    write(folder / "valid-labels.lst", "\ufeff0\n1\n\n")
    assert [label for _, _, label in read("piqa", "dev", folder)] == [0, 1]


def test_labels_of_piqa_may_be_a_column(folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(piqa_row(0, label=1), piqa_row(1, label="0")))
    assert [label for _, _, label in read("piqa", "train", folder)] == [1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_files_is_joined_and_ids_carry_the_file(name: str, folder: Path) -> None:
    suffix = SUFFIX[name]
    first = write(folder / "train" / f"b{suffix}", text_of(name, ROW[name](0), ROW[name](1)))
    second = write(folder / "train" / f"a{suffix}", text_of(name, ROW[name](1)))
    write(folder / "train" / "README.txt", "not data")
    expected = [
        (f"{path.name}/{one}", texts, label)
        for path in (second, first)
        for one, texts, label in EXPECTED[name](rows_of(path), "train")
    ]
    assert read(name, "train", folder) == expected


@pytest.mark.parametrize("name", NAMES)
def test_data_files_that_no_split_reads_are_named(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suffix = SUFFIX[name]
    for stem in ("train", "dev", "train_full"):  # SWAG's own folder has a train_full.csv: the same rows once more
        write(folder / f"{stem}{suffix}", text_of(name, ROW[name](0)))
    write(folder / "train-labels.lst", "0\n")
    assert len(read(name, "train", folder)) == 1
    assert f"read train{suffix}. Did not read train_full{suffix}." in capsys.readouterr().out
    read(name, "dev", folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "release"), [("snli", "snli_1.0_dev.jsonl"), ("hellaswag", "hellaswag_dev.jsonl")])
def test_a_missing_split_says_what_it_looked_for(name: str, release: str, folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(ROW[name]()))
    with pytest.raises(MissingSplitError) as caught:
        read(name, "dev", folder)
    for text in (str(folder), "dev.jsonl", "val.jsonl", "validation.jsonl", release, "train.jsonl"):
        assert text in caught.value.message


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_order_mark_and_the_end_of_lines_change_nothing(name: str, folder: Path) -> None:
    text = text_of(name, ROW[name](0), ROW[name](1))
    path = write(folder / f"train{SUFFIX[name]}", text)
    expected = EXPECTED[name](rows_of(path), "train")
    for other in (
        "\ufeff" + text,
        text.replace("\r\n", "\n"),
        text.replace("\r\n", "\n").replace("\n", "\r\n"),
        text.rstrip("\r\n"),
    ):
        write(path, other)
        assert read(name, "train", folder) == expected


@pytest.mark.parametrize("name", NAMES)
def test_texts_in_other_scripts(name: str, folder: Path) -> None:
    texts = {
        "sentence1": "東京は日本の首都です。",
        "sentence2": "مرحبا بالعالم",
        "goal": "नमस्ते दुनिया",
        "sol1": "한국어 문장",
    }
    texts |= {
        "sent1": "Привет, как дела?",
        "ending3": "😀 e = mc²",
        "ctx_a": "ἐν ἀρχῇ",
        "ctx": "ἐν ἀρχῇ ἦν",
        "ctx_b": "ἦν",
    }
    row = ROW[name](1)
    changed = row | {column: text for column, text in texts.items() if column in row}
    path = write(folder / f"train{SUFFIX[name]}", text_of(name, changed))
    expected = EXPECTED[name](rows_of(path), "train")
    assert read(name, "train", folder) == expected
    used = "".join(segment for text in expected[0][1] for segment in text)
    assert sum(text in used for text in texts.values()) >= 2


# Written by csv and json, read unchanged -----------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(table_=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), plain=st.booleans())
def test_any_pair_comes_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, table_: list[tuple[str, str]], plain: bool
) -> None:
    folder = tmp_path_factory.mktemp("snli")
    rows = [snli_row(number, sentence1=a, sentence2=b) for number, (a, b) in enumerate(table_)]
    write(folder / "train.jsonl", "".join(json.dumps(row, ensure_ascii=plain) + "\n" for row in rows))
    assert [texts for _, texts, _ in read("snli", "train", folder)] == [(pair,) for pair in table_]


@QUICK
@given(
    table_=st.lists(st.tuples(*[TEXT] * 6), min_size=1, max_size=4),
    style=st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n")]),
)
def test_any_cell_of_a_csv_file_comes_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, table_: list[tuple[str, ...]], style: tuple[Any, str]
) -> None:
    folder = tmp_path_factory.mktemp("swag")
    quoting, end = style  # told to end lines by LF, csv leaves a CR in a cell without quotes, and cannot read it back
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerow(["", "sent1", "sent2", *(f"ending{choice}" for choice in range(4)), "label"])
    for number, cells in enumerate(table_):
        writer.writerow([number, *cells, number % 4])
    write(folder / "train.csv", file.getvalue())
    expected = [
        (str(number), tuple((context, f"{start.strip()} {ending}") for ending in endings), number % 4)
        for number, (context, start, *endings) in enumerate(table_)
    ]
    assert read("swag", "train", folder) == expected


@QUICK
@given(
    table_=st.lists(
        st.tuples(TEXT, st.sampled_from(["", "he", " she "]), TEXT, TEXT, TEXT, TEXT), min_size=1, max_size=4
    )
)
def test_any_ending_comes_back_behind_its_beginning(
    tmp_path_factory: pytest.TempPathFactory, table_: list[tuple[str, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("hellaswag")
    rows = [
        hellaswag_row(number, ctx_a=a, ctx_b=b, ctx=f"{a} {b}" if b else a, endings=endings)
        for number, (a, b, *endings) in enumerate(table_)
    ]
    write(folder / "train.jsonl", jsonl(*rows))
    expected = [tuple((a, f"{b.strip()} {ending}" if b else ending) for ending in endings) for a, b, *endings in table_]
    assert [texts for _, texts, _ in read("hellaswag", "train", folder)] == expected


@QUICK
@given(table_=st.lists(st.tuples(TEXT, TEXT, TEXT, st.integers(0, 1)), min_size=1, max_size=4))
def test_any_goal_and_its_solutions_come_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, table_: list[tuple[str, str, str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("piqa")
    write(folder / "dev.jsonl", jsonl(*({"goal": g, "sol1": a, "sol2": b} for g, a, b, _ in table_)))
    write(folder / "dev-labels.lst", "".join(f"{label}\n" for *_, label in table_))
    expected = [(f"dev-{number}", ((g, a), (g, b)), label) for number, (g, a, b, label) in enumerate(table_)]
    assert read("piqa", "dev", folder) == expected


# What is wrong with a file -------------------------------------------------------------------------------------------

THREE = ["a", "b", "c"]
SWAG_LINES = table(swag_row(0), swag_row(1)).splitlines(keepends=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # Choices
        ("hellaswag", jsonl(hellaswag_row(0), hellaswag_row(1, endings=THREE)), r"jsonl:2: 3 choices, but .* 4"),
        ("hellaswag", jsonl(hellaswag_row(0, endings=[*THREE, "d", "e"])), r"jsonl:1: 5 choices, but .* 4"),
        ("hellaswag", jsonl(hellaswag_row(0, endings=[])), r"jsonl:1: 0 choices, but .* 4"),
        ("hellaswag", jsonl(hellaswag_row(0, endings="a, b, c, d")), r"jsonl:1: endings is .*not a list"),
        ("hellaswag", jsonl(hellaswag_row(0, endings=[*THREE, None])), r"jsonl:1: endings is .*not a list of"),
        ("hellaswag", jsonl(without(hellaswag_row(0), "endings")), r"jsonl:1: endings is .*not a list of texts"),
        # Labels
        ("snli", jsonl(snli_row(0), without(snli_row(1), "gold_label"), snli_row(2)), r"jsonl:2: no label, .* 2 of 3"),
        ("swag", table(swag_row(0), swag_row(1, label=""), swag_row(2)), r"csv:3: no label, while 2 of 3"),
        ("hellaswag", jsonl(hellaswag_row(0, label=None), hellaswag_row(1)), r"jsonl:1: no label, while 1 of 2"),
        ("piqa", jsonl(piqa_row(0, label=1), piqa_row(1, label=-1)), r"jsonl:2: no label, while 1 of 2"),
        ("snli", jsonl(snli_row(0), snli_row(1, gold_label=3)), r"jsonl:2: gold_label is '3'"),
        ("swag", table(swag_row(0, label="4")), r"csv:2: label is '4'"),
        ("hellaswag", jsonl(hellaswag_row(0, label=-2)), r"jsonl:1: label is '-2'"),
        ("piqa", jsonl(piqa_row(0, label=2)), r"jsonl:1: label is '2'"),
        ("snli", jsonl(snli_row(0, gold_label="entailed")), r"jsonl:1: gold_label is 'entailed'"),
        ("snli", jsonl(snli_row(0, gold_label="Neutral")), r"jsonl:1: gold_label is 'Neutral'"),
        ("swag", table(swag_row(0, label="²")), r"csv:2: label is '²'"),
        ("hellaswag", jsonl(hellaswag_row(0, label=1.0)), r"jsonl:1: label is 1\.0, not text"),
        ("piqa", jsonl(piqa_row(0, label=[1])), r"jsonl:1: label is \[1\], not text"),
        # Texts
        ("snli", jsonl(snli_row(0), snli_row(1, sentence1="")), r"jsonl:2: sentence1 is empty"),
        ("snli", jsonl(snli_row(0, sentence2=" \u3000\t")), r"jsonl:1: sentence2 is empty"),
        ("snli", jsonl(snli_row(0, sentence1=None)), r"jsonl:1: sentence1 is empty"),
        ("snli", jsonl(snli_row(0, sentence1=["A", "horse"])), r"jsonl:1: sentence1 is \['A', 'horse'\], not text"),
        ("snli", jsonl(without(snli_row(0), "sentence2")), r"jsonl:1: sentence2 is missing .*pairID, sentence1"),
        ("snli", '{"sentence1": "a \\ud83d", "sentence2": "b"}\n', r"jsonl:1: .*not Unicode"),
        ("swag", table(swag_row(0), swag_row(1, sent1=" ")), r"csv:3: sent1 is empty"),
        ("swag", table(swag_row(0, ending2="")), r"csv:2: ending2 is empty"),
        ("swag", table(without(swag_row(0), "ending3")), r"csv:2: ending3 is missing .*sent1, sent2"),
        ("piqa", jsonl(piqa_row(0, goal="  ")), r"jsonl:1: goal is empty"),
        ("piqa", jsonl(piqa_row(0), without(piqa_row(1), "sol2")), r"jsonl:2: sol2 is missing"),
        ("hellaswag", jsonl(hellaswag_row(0, ctx_a="")), r"jsonl:1: ctx_a is empty"),
        ("hellaswag", jsonl(hellaswag_row(0, **(WIKIHOW | {"ctx": " "}))), r"jsonl:1: ctx is empty"),
        ("hellaswag", jsonl(hellaswag_row(0, **(WIKIHOW | {"endings": [" ", *THREE]}))), r"jsonl:1: .*empty"),
        ("hellaswag", jsonl(hellaswag_row(0, endings=["a", "", "c", "d"])), r"jsonl:1: .*empty"),
        ("hellaswag", jsonl(hellaswag_row(0, ctx_b=["he"])), r"jsonl:1: ctx_b is \['he'\], not text"),
        # JSON
        ("snli", jsonl(snli_row(0)) + "{'sentence1': 1}\n", r"jsonl:2: not JSON"),
        ("piqa", jsonl(piqa_row(0))[:-3], r"jsonl:1: not JSON"),
        ("snli", jsonl(snli_row(0)) + "\n\n[1, 2]\n", r"jsonl:4: .* is not a JSON object"),
        ("hellaswag", '"text"\n', r"jsonl:1: .* is not a JSON object"),
        ("piqa", "null\n", r"jsonl:1: .* is not a JSON object"),
        # CSV
        ("swag", SWAG_LINES[0] + SWAG_LINES[1] + SWAG_LINES[2].rstrip() + ",more,\n", r"csv:3: 14 columns, but .* 12"),
        ("swag", SWAG_LINES[0] + SWAG_LINES[1].rpartition(",")[0] + "\n", r"csv:2: 11 columns, but .* 12"),
        ("swag", SWAG_LINES[0] + "\n\n" + SWAG_LINES[1].rpartition(",")[0] + "\n", r"csv:4: 11 columns, but .* 12"),
        ("swag", table(swag_row(0, ending0="two\nlines"), swag_row(1, label="x")), r"csv:4: label is 'x'"),
        ("swag", SWAG_LINES[0] + SWAG_LINES[1] + '9,,,,"open,b\n', r"csv:3: not CSV"),
        ("swag", SWAG_LINES[0] + '9,,,,"a"b,' + "c," * 6 + "0\n", r"csv:2: not CSV"),
        ("swag", SWAG_LINES[1], r"holds no example"),
        ("swag", SWAG_LINES[1] + SWAG_LINES[2], r"csv:2: sent1 is missing"),
        # Bytes
        ("snli", jsonl(snli_row(0), snli_row(1, sentence1="Größe")).encode("latin-1"), r"jsonl:2.*UTF-8"),
        ("swag", table(swag_row(0), swag_row(1, sent1="Größe")).encode("latin-1"), r"csv:3.*UTF-8"),
        ("piqa", jsonl(piqa_row(0)).encode("utf-16"), r"jsonl:1.*UTF-8"),
        # Ids
        ("snli", jsonl(snli_row(0), snli_row(1), snli_row(0)), r"'3416050480.jpg#4r0'.*jsonl:1 and .*jsonl:3"),
        ("swag", table(swag_row(2), swag_row(2)), r"'17'.*csv:2 and .*csv:3"),
        ("hellaswag", jsonl(hellaswag_row(0), hellaswag_row(0)), r"'24'.*jsonl:1 and .*jsonl:2"),
        # Nothing
        *((name, "", r"train split of corpus holds no example") for name in NAMES),
        ("swag", SWAG_LINES[0], r"train split of corpus holds no example"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_with_file_and_line(
    name: str, text: str | bytes, message: str, folder: Path
) -> None:
    path = write(folder / f"train{SUFFIX[name]}", text)
    with pytest.raises(DataError, match=message) as caught:
        read(name, "train", folder)
    assert caught.value.remedy
    if "holds no example" not in message:
        assert str(path) in caught.value.message


def test_unknown_labels_list_those_that_exist(folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(snli_row(0, gold_label="entailed")))
    with pytest.raises(DataError) as caught:
        read("snli", "train", folder)
    assert "entailment, neutral, contradiction" in caught.value.remedy


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0\n1\n", r"train-labels\.lst has 2 labels, .*train\.jsonl has 3 rows: row 3 "),
        ("0\n1\n0\n1\n", r"train-labels\.lst has 4 labels, .*train\.jsonl has 3 rows: row 4 "),
        ("", r"train-labels\.lst has 0 labels, .*train\.jsonl has 3 rows: row 1 "),
        ("0\n2\n1\n", r"train-labels\.lst:2: the label is '2'"),
        ("0\nsol1\n1\n", r"train-labels\.lst:2: the label is 'sol1'"),
        ("0\n\n1\n", r"train\.jsonl:2: no label, while 2 of 3"),
        ("0\n\n1\n1\n", r"train-labels\.lst has 4 labels, .*train\.jsonl has 3 rows"),
        ("0\n1\n".encode("utf-16"), r"train-labels\.lst.*UTF-8"),
    ],
)
def test_labels_of_piqa_that_do_not_fit_their_rows(labels: str | bytes, message: str, folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(*(piqa_row(number) for number in range(3))))
    write(folder / "train-labels.lst", labels)
    with pytest.raises(DataError, match=message):
        read("piqa", "train", folder)


# Hub data ------------------------------------------------------------------------------------------------------------

TEXTS = ("string", "string")
HUB: dict[str, tuple[str, str | None, str | None]] = {
    "snli": ("stanfordnlp/snli", None, None),
    "swag": ("allenai/swag", "regular", None),
    "piqa": ("ybisk/piqa", None, "refs/convert/parquet"),
    "hellaswag": ("Rowan/hellaswag", None, None),
}
"""Data set, configuration, revision: what the hub shows them under."""


def hub_table(name: str, labels: Sequence[int | str | None]) -> datasets.Dataset:
    """Rows with the columns and types of the hub's data set."""
    rows: list[dict[str, Any]]
    numbers = range(len(labels))
    text = datasets.Value("string")
    if name == "snli":
        rows = [{"premise": f"Horse {n} jumps.", "hypothesis": f"It rains {n}."} for n in numbers]
        features = {"premise": text, "hypothesis": text, "label": datasets.ClassLabel(names=list(SNLI_LABELS))}
    elif name == "swag":
        rows = [without(swag_row(n), "", "label") for n in numbers]
        features = dict.fromkeys(rows[0], text) | {"label": datasets.ClassLabel(names=["0", "1", "2", "3"])}
    elif name == "piqa":
        rows = [piqa_row(n) for n in numbers]
        features = dict.fromkeys(rows[0], text) | {"label": datasets.ClassLabel(names=["0", "1"])}
    else:
        rows = [without(hellaswag_row(n, **(WIKIHOW if n % 2 else {})), "label") for n in numbers]
        features = dict.fromkeys(rows[0], text) | {
            "ind": datasets.Value("int32"),
            "endings": datasets.List(text),
            "label": text,
        }
    columns = {column: [row[column] for row in rows] for column in rows[0]} | {"label": list(labels)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def expected_from_hub(name: str, labels: Sequence[int | None], split: str) -> list[Expected]:
    if name == "snli":
        return [
            (f"{split}-{n}", ((f"Horse {n} jumps.", f"It rains {n}."),), label)
            for n, label in enumerate(labels)
            if label != -1
        ]
    rows = [ROW[name](n, **(WIKIHOW if name == "hellaswag" and n % 2 else {})) for n in range(len(labels))]
    if name == "swag":
        rows = [row | {"": str(n)} for n, row in enumerate(rows)]
    return [(one, texts, label) for (one, texts, _), label in zip(EXPECTED[name](rows, split), labels, strict=True)]


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], datasets.Dataset]:
    """What ``datasets.load_dataset`` gives by (data set, configuration, split, revision); anything else is an error."""
    known: dict[tuple[Any, ...], datasets.Dataset] = {}

    def load(path: str, name: str | None = None, *, split: str, revision: str | None = None) -> datasets.Dataset:
        if (path, name, split, revision) in known:
            return known[path, name, split, revision]
        splits = [key[2] for key in known if key[0] == path]
        if splits and split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {splits}.')
        raise FileNotFoundError(f"Couldn't find {path!r} {name!r} {split!r} {revision!r}")

    monkeypatch.setattr(datasets, "load_dataset", load)
    return known


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("split", "hub_split"), [("train", "train"), ("dev", "validation")])
def test_the_hubs_data_sets(
    name: str, split: str, hub_split: str, hub_calls: dict[tuple[Any, ...], datasets.Dataset]
) -> None:
    hub_id, configuration, revision = HUB[name]
    numbers = {"snli": [1, -1, 0, 2], "swag": [3, 0, 2, 1], "piqa": [1, 0, 0], "hellaswag": [2, 0, 3]}[name]
    labels: list[int | str | None] = [str(label) for label in numbers] if name == "hellaswag" else [*numbers]
    hub_calls[hub_id, configuration, hub_split, revision] = hub_table(name, labels)
    task = find_task(name)
    assert task.default_data == task.corpus(None) == hub_id
    expected = expected_from_hub(name, numbers, split)
    assert parts(task.read(split, None)) == expected
    assert len(expected) == sum(label != -1 for label in numbers)


def test_a_folder_with_the_name_of_the_hubs_data_set_changes_nothing(
    hub_calls: dict[tuple[Any, ...], datasets.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_calls["stanfordnlp/snli", None, "train", None] = hub_table("snli", [1, 0])
    (tmp_path / "stanfordnlp" / "snli").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    task = find_task("snli")
    assert task.corpus(None) == "stanfordnlp/snli"
    assert parts(task.read("train", None)) == expected_from_hub("snli", [1, 0], "train")
    assert task.corpus("stanfordnlp/snli") == "snli", "a folder that is given is read"


def test_the_hub_says_minus_one_where_annotators_did_not_agree(
    hub_calls: dict[tuple[Any, ...], datasets.Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    hub_calls["stanfordnlp/snli", None, "train", None] = hub_table("snli", [-1, 2, -1, 0, -1])
    examples = find_task("snli").read("train", None)
    assert [(example.id, example.label) for example in examples] == [("train-1", 2), ("train-3", 0)]
    assert "3 of 5 rows have no gold label" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "label"), [("swag", -1), ("piqa", -1), ("hellaswag", ""), ("swag", None)])
def test_test_splits_of_the_hub_have_no_labels(
    name: str, label: int | str | None, hub_calls: dict[tuple[Any, ...], datasets.Dataset]
) -> None:
    hub_id, configuration, revision = HUB[name]
    hub_calls[hub_id, configuration, "test", revision] = hub_table(name, [label] * 3)
    examples = find_task(name).read("test", None)
    assert parts(examples) == expected_from_hub(name, [None] * 3, "test")


def test_a_data_set_of_ones_own_has_its_own_configuration_and_main_branch(
    hub_calls: dict[tuple[Any, ...], datasets.Dataset],
) -> None:
    for name in ("swag", "piqa"):
        hub_calls[f"me/{name}", None, "train", None] = hub_table(name, [1, 0])
        assert parts(find_task(name).read("train", f"me/{name}")) == expected_from_hub(name, [1, 0], "train")


def test_class_labels_go_by_their_names_not_by_their_numbers(
    hub_calls: dict[tuple[Any, ...], datasets.Dataset],
) -> None:
    other = ["contradiction", "entailment", "neutral"]
    rows = hub_table("snli", [0, 1, 2, -1]).cast_column("label", datasets.ClassLabel(names=other))
    assert [row["label"] for row in rows] == [0, 1, 2, -1]
    hub_calls["me/snli", None, "train", None] = rows
    labels = [example.label for example in find_task("snli").read("train", "me/snli")]
    assert labels == [SNLI_LABELS[name] for name in other]


def test_a_folder_of_parquet_files_by_the_datasets_library_itself(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "cache")
    hub_table("snli", [2, -1, 0]).to_parquet(workdir / "mine" / "train.parquet")
    examples = list(find_task("snli").hub_examples(str(workdir / "mine"), "train"))
    assert parts(examples) == expected_from_hub("snli", [2, -1, 0], "train")
    with pytest.raises(MissingSplitError, match="has no dev split"):
        list(find_task("snli").hub_examples(str(workdir / "mine"), "dev"))


def test_a_split_that_the_hub_lacks_is_missing(hub_calls: dict[tuple[Any, ...], datasets.Dataset]) -> None:
    hub_calls["Rowan/hellaswag", None, "train", None] = hub_table("hellaswag", ["1"])
    with pytest.raises(MissingSplitError, match="Rowan/hellaswag has no dev split"):
        find_task("hellaswag").read("dev", None)


@pytest.mark.parametrize(
    ("name", "suffix", "what"),
    [
        ("swag", ".csv", "allenai/swag, configuration regular, split train"),
        ("snli", ".jsonl", "stanfordnlp/snli, split train"),
    ],
)
def test_hub_data_that_cannot_be_had(
    name: str, suffix: str, what: str, hub_calls: dict[tuple[Any, ...], datasets.Dataset]
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        find_task(name).read("train", None)
    assert f"train{suffix}" in caught.value.remedy
    assert "HF_HOME" in caught.value.remedy


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("hypothesis", [["a", "b"]] * 2, r"stanfordnlp/snli, split train, row 0: hypothesis is \['a', 'b'\], not text"),
        ("hypothesis", ["a", None], r"stanfordnlp/snli, split train, row 1: hypothesis is empty"),
        ("label", ["entailment", "maybe"], r"stanfordnlp/snli, split train, row 1: label is 'maybe'"),
        ("label", [0, 3], r"stanfordnlp/snli, split train, row 1: label is '3'"),
        ("label", [0, None], r"stanfordnlp/snli, split train, row 1: no label, while 1 of 2"),
    ],
)
def test_malformed_rows_of_the_hub_are_refused_with_data_set_and_row(
    column: str, value: list[Any], message: str, hub_calls: dict[tuple[Any, ...], datasets.Dataset]
) -> None:
    columns = {"premise": ["x", "y"], "hypothesis": ["a", "b"], "label": [0, 1]} | {column: value}
    hub_calls["stanfordnlp/snli", None, "train", None] = datasets.Dataset.from_dict(columns)
    with pytest.raises(DataError, match=message):
        find_task("snli").read("train", None)


# A line that someone types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "texts"),
    [
        ("snli", "A dog runs.\tAn animal moves.", (("A dog runs.", "An animal moves."),)),
        ("swag", "He sits.\tHe\ta\tb c\td\te", tuple(("He sits.", f"He {end}") for end in ("a", "b c", "d", "e"))),
        ("swag", "He sits.\t\ta\tb c\td\te", tuple(("He sits.", end) for end in ("a", "b c", "d", "e"))),
        ("piqa", "puncture a vein\thit it\tpop it", (("puncture a vein", "hit it"), ("puncture a vein", "pop it"))),
        ("hellaswag", "He sits.\ta\tb c\td\te", tuple(("He sits.", end) for end in ("a", "b c", "d", "e"))),
    ],
)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_line_becomes_an_unlabelled_example(
    name: str, line: str, texts: tuple[tuple[str, ...], ...], end: str
) -> None:
    assert find_task(name).from_line(line + end, "line-7") == Example("line-7", texts, None)


@pytest.mark.parametrize(("name", "fields"), [("snli", 2), ("swag", 6), ("piqa", 3), ("hellaswag", 5)])
def test_a_line_with_another_number_of_fields(name: str, fields: int) -> None:
    for count in {1, fields - 1, fields + 1}:
        with pytest.raises(DataError, match=f"line-7: {count} fields, but {name} needs {fields}") as caught:
            find_task(name).from_line("\t".join(["text"] * count) + "\n", "line-7")
        assert "tab" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "fields", "empty"),
    [("snli", 2, 1), ("swag", 6, 5), ("piqa", 3, 0), ("hellaswag", 5, 0), ("hellaswag", 5, 2)],
)
def test_a_line_with_an_empty_field(name: str, fields: int, empty: int) -> None:
    parts_ = ["text"] * fields
    parts_[empty] = " "
    with pytest.raises(DataError, match=r"line-7: .*is empty"):
        find_task(name).from_line("\t".join(parts_), "line-7")


@pytest.mark.parametrize(("name", "fields"), [("snli", 2), ("swag", 6), ("piqa", 3), ("hellaswag", 5)])
def test_a_line_of_bytes_that_are_no_text(name: str, fields: int) -> None:
    """As Python reads them from a terminal or a pipe in another encoding."""
    line = "\t".join(["Größe"] * fields).encode("latin-1").decode("utf-8", "surrogateescape")
    with pytest.raises(DataError, match=r"line-7: .*not Unicode"):
        find_task(name).from_line(line, "line-7")


def test_a_line_of_words_for_tagging() -> None:
    task = find_task("udpos-de")
    assert task.from_line("  das  Haus .\n", "line-1") == Example("line-1", (("das", "Haus", "."),), None)
    with pytest.raises(DataError, match="line-1: it has no word"):
        task.from_line(" \n", "line-1")


# Tasks by name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head", "labels"),
    [
        ("snli", "sequence", ("entailment", "neutral", "contradiction")),
        ("swag", "choice", ("0", "1", "2", "3")),
        ("piqa", "choice", ("0", "1")),
        ("hellaswag", "choice", ("0", "1", "2", "3")),
    ],
)
def test_tasks_say_what_they_are(name: str, head: str, labels: tuple[str, ...]) -> None:
    task: Task = find_task(name)
    assert name in task_names()
    assert (task.head, task.labels, task.words, task.metric) == (head, labels, False, "accuracy")
    assert task.suffixes == (SUFFIX[name],)


def test_limit_takes_the_first_examples_not_the_first_rows(folder: Path) -> None:
    write(folder / "train.jsonl", jsonl(snli_row(0, gold_label="-"), *(snli_row(number) for number in range(1, 6))))
    examples = find_task("snli").read("train", str(folder), 2)
    assert [example.id for example in examples] == ["3416050480.jpg#4r1", "3416050480.jpg#4r2"]
