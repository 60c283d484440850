"""Data as its authors release it, in folders as they are unpacked; and data sets of the hub that were saved to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from seqeval.metrics import f1_score

from kr2cache.errors import DataError, MissingSplitError
from kr2cache.prediction.texts import read_file
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.files import SPLITS

Expected = list[tuple[str, tuple[str, ...], Any]]
"""Id, segments or words, label by name."""
ENTITY_LABELS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]


def shown(task: Task, examples: Sequence[Example]) -> Expected:
    return [(one.id, one.texts[0], task.named(one.label)) for one in examples]


def found(name: str, split: str, data: Path, declared: Mapping[str, Any] = {}) -> Expected:
    task = find_task(name, declared).with_labels_of(str(data))
    return shown(task, task.read(split, str(data)))


def write(path: Path, *rows: str, encoding: str = "utf-8") -> Path:
    """Rows with ``|`` for a tab."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(row.replace("|", "\t") + "\n" for row in rows).encode(encoding))
    return path


# XNLI and MultiNLI ---------------------------------------------------------------------------------------------------

XNLI_COLUMNS = (
    "language|gold_label|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse|sentence1|"
    "sentence2|promptID|pairID|genre|label1|label2|label3|label4|label5|sentence1_tokenized|sentence2_tokenized|match"
)
XNLI_ROWS = [
    ("ar", "neutral", "وقال", "اتصل"),
    ("ar", "contradiction", "وقال", "لم ينطق"),
    ("de", "neutral", 'und er sagte "Mama', "Er rief an"),
    ("de", "entailment", "Das ist wahr", 'Es "stimmt"'),
    ("de", "contradiction", "Das ist wahr", "Es ist falsch"),
]
GERMAN: Expected = [
    (f"dev-{number}", (first, second), label)
    for number, (_, label, first, second) in enumerate(row for row in XNLI_ROWS if row[0] == "de")
]


def xnli(folder: Path, split: str, *, tsv: bool = True, jsonl: bool = True) -> None:
    rows = [
        f"{language}|{label}|||||{first}|{second}|{i}|{i}|face-to-face|{label}|neutral|neutral|neutral|{label}|t|t|True"
        for i, (language, label, first, second) in enumerate(XNLI_ROWS)
    ]
    if tsv:
        write(folder / f"xnli.{split}.tsv", XNLI_COLUMNS, *rows)
    lines = [dict(zip(XNLI_COLUMNS.split("|"), row.split("|"), strict=True)) for row in rows]
    if jsonl:
        write(folder / f"xnli.{split}.jsonl", *(json.dumps(one, ensure_ascii=False) for one in lines))


@pytest.mark.parametrize("kinds", [{}, {"tsv": False}, {"jsonl": False}], ids=["both", "jsonl", "tsv"])
def test_xnli_has_all_languages_in_one_file(
    tmp_path: Path, kinds: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids count the rows of the language, so they are those of XTREME's files and of the hub."""
    xnli(tmp_path, "dev", **kinds)
    assert found("xnli-de", "dev", tmp_path) == GERMAN
    name = "xnli.dev.jsonl" if kinds == {"tsv": False} else "xnli.dev.tsv"
    out = " ".join(capsys.readouterr().out.split())
    assert f"dev split: read {name}, because its name says so." in out
    assert ("dev split: read xnli.dev.tsv, not xnli.dev.jsonl of that name." in out) == (not kinds)
    assert [row[0] for row in found("xnli-ar", "dev", tmp_path)] == ["dev-0", "dev-1"]
    with pytest.raises(DataError, match="holds no example") as caught:
        found("xnli-sw", "dev", tmp_path)
    assert caught.value.remedy.startswith(f"Check its files ({name}): they are empty, or hold only ")
    assert "rows of other languages than sw" in caught.value.remedy
    with pytest.raises(MissingSplitError):
        found("xnli-de", "test", tmp_path)


def test_a_file_of_all_languages_is_data_and_can_be_labelled(tmp_path: Path) -> None:
    xnli(tmp_path, "test")
    path = tmp_path / "xnli.test.tsv"
    task = find_task("xnli-de")
    assert [row[1:] for row in found("xnli-de", "test", path)] == [row[1:] for row in GERMAN]
    assert [row[1:] for row in shown(task, read_file(task, path))] == [row[1:] for row in GERMAN]


MULTINLI = {
    "annotator_labels": ["neutral"], "genre": "government", "pairID": "31193n", "promptID": "31193",
    "sentence1_binary_parse": "( a )", "sentence1_parse": "(ROOT a)",
    "sentence2_binary_parse": "", "sentence2_parse": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "split"),
    [
        ("xnli-en", "multinli_1.0_train.jsonl", "train"),
        ("xnli-de", "multinli_1.0_train.jsonl", "train"),  # trained in English, tested in German
        ("mnli", "multinli_1.0_train.jsonl", "train"),
        ("mnli", "multinli_1.0_dev_matched.jsonl", "dev"),
        ("mnli-mm", "multinli_1.0_dev_mismatched.jsonl", "dev"),
        ("snli", "snli_1.0_train.jsonl", "train"),
    ],
)
def test_multinli_in_its_own_files(
    tmp_path: Path, name: str, file: str, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [MULTINLI | {"gold_label": label, "sentence1": "a", "sentence2": "b"} for label in ("neutral", "-")]
    rows = [row | {"pairID": f"{i}n"} for i, row in enumerate(rows)]
    write(tmp_path / file, *map(json.dumps, rows))
    assert [row[1:] for row in found(name, split, tmp_path)] == [(("a", "b"), "neutral")]
    assert "1 of 2 rows" in capsys.readouterr().out, "the annotators did not agree on one"


def test_multinli_as_the_authors_of_xnli_translated_it(tmp_path: Path) -> None:
    for language in ("de", "en", "ur"):
        path = tmp_path / f"multinli.train.{language}.tsv"
        write(path, "premise|hypo|label", f"{language} 1|b|contradictory", "c|d|entailment")
    expected = [("train-0", ("de 1", "b"), "contradiction"), ("train-1", ("c", "d"), "entailment")]
    assert found("xnli-de", "train", tmp_path) == expected
    for language in ("de", "ur"):
        (tmp_path / f"multinli.train.{language}.tsv").unlink()
    with pytest.raises(MissingSplitError):  # English is not taken for German
        found("xnli-de", "train", tmp_path)


# CoNLL-2003 ----------------------------------------------------------------------------------------------------------

ENGLISH = ("-DOCSTART- -X- -X- O", "", "EU NNP I-NP I-ORG", "rejects VBZ I-VP O", "", "Peter NNP I-NP I-PER")
GERMAN_NEWS = ("-DOCSTART- -X- -X- -X- O", "", "Köln Köln NE I-NC I-LOC", "ruft rufen VVFIN I-VC O")


def test_conll_2003_by_its_own_names(tmp_path: Path) -> None:
    for end in ("train", "testa", "testb"):
        write(tmp_path / f"eng.{end}", *ENGLISH, f"{end} NNP I-NP B-PER")
        write(tmp_path / "german" / f"deu.{end}", *GERMAN_NEWS)
    for end, split in zip(("train", "testa", "testb"), SPLITS, strict=True):
        expected = [
            (f"{split}-0", ("EU", "rejects"), ["I-ORG", "O"]),
            (f"{split}-1", ("Peter", end), ["I-PER", "B-PER"]),
        ]
        assert found("conll2003", split, tmp_path) == expected
        assert found("conll2003", split, tmp_path / f"eng.{end}") == expected
        assert found("conll2003", split, tmp_path / "german") == [(f"{split}-0", ("Köln", "ruft"), ["I-LOC", "O"])]
    task = find_task("conll2003")
    read = read_file(task, tmp_path / "eng.testb")
    assert [row[1:] for row in shown(task, read)] == [row[1:] for row in found("conll2003", "test", tmp_path)]
    words = {"kind": "tagging", "columns": [0, 1]}
    assert found("mine", "train", tmp_path, {"mine": words})[0][2] == ["NNP", "VBZ"]


def test_entities_of_both_schemes_are_the_same(tmp_path: Path) -> None:
    """The files begin an entity with I-, the hub with B-; F1 counts entities."""
    task = find_task("conll2003")
    files = [["I-PER", "B-PER", "O", "I-ORG", "I-ORG"]]
    hub = [["B-PER", "B-PER", "O", "B-ORG", "I-ORG"]]
    assert f1_score(files, hub) == 1
    numbers = [[[task.labels.index(tag) for tag in tags] for tags in one] for one in (files, hub)]
    assert task.score(*numbers)["f1"] == 1


def test_german_news_in_latin_1_say_how_to_convert_them(tmp_path: Path) -> None:
    write(tmp_path / "deu.train", *GERMAN_NEWS, encoding="latin-1")
    with pytest.raises(DataError, match=r"deu\.train:3: not UTF-8") as caught:
        found("conll2003", "train", tmp_path)
    assert "iconv -f latin1 -t utf8" in caught.value.remedy


# WikiANN -------------------------------------------------------------------------------------------------------------


def test_wikiann_by_its_own_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "dev", "test", "extra"):
        write(tmp_path / name, f"de:{name}|B-LOC", "de:de:x|O", "", "de:Köln|B-LOC", "de::|O", "")
    for split in SPLITS:
        expected = [(f"{split}-0", (split, "de:x"), ["B-LOC", "O"]), (f"{split}-1", ("Köln", ":"), ["B-LOC", "O"])]
        assert found("wikiann-de", split, tmp_path) == expected
        assert found("wikiann-de", split, tmp_path / split) == expected
    task = find_task("wikiann-de")
    assert [one.texts[0] for one in read_file(task, tmp_path / "dev")] == [("dev", "de:x"), ("Köln", ":")]
    assert capsys.readouterr().out == ""


def test_words_of_other_files_keep_what_looks_like_a_language(tmp_path: Path) -> None:
    write(tmp_path / "dev-de.tsv", "Köln|B-LOC", "", "de:Haus|O")
    assert [row[1] for row in found("wikiann-de", "dev", tmp_path)] == [("Köln",), ("de:Haus",)]
    write(tmp_path / "train.tsv", "de:Haus|x", "Köln|y")
    words = {"kind": "tagging", "columns": [0, 1], "language": "de"}
    assert found("mine", "train", tmp_path, {"mine": words})[0][1] == ("de:Haus", "Köln")


# PAWS-X and GLUE -----------------------------------------------------------------------------------------------------


def test_paws_x_as_it_is_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x-final" / "de"
    for name in ("translated_train", "dev_2k", "test_2k"):
        write(folder / f"{name}.tsv", "id|sentence1|sentence2|label", f'1|{name}|"b|0', "2||d|1", "3|e|f|1")
        write(tmp_path / "x-final" / "fr" / f"{name}.tsv", "id|sentence1|sentence2|label")
    for split, name in zip(SPLITS, ("translated_train", "dev_2k", "test_2k"), strict=True):
        assert found("pawsx-de", split, folder) == [("1", (name, '"b'), "0"), ("3", ("e", "f"), "1")]
    assert "1 of 3 rows have an empty text" in capsys.readouterr().out, "some have no translation"
    with pytest.raises(MissingSplitError) as caught:
        found("pawsx-de", "dev", folder.parent)
    assert caught.value.remedy == f"Folders in it that have one: de. Give the right one: --data {folder}"
    with pytest.raises(MissingSplitError) as caught:
        found("mrpc", "dev", folder.parent)
    assert (
        caught.value.remedy == f"Folders in it that have one: de, fr. Give the right one: --data {folder}, for example"
    )


def test_rows_of_qqp_that_a_line_end_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = "id|qid1|qid2|question1|question2|is_duplicate"
    write(tmp_path / "train.tsv", header, "1|1|2|a|b|0", "7|13|14|Who was he?", '"|Was he real?|0', "9|3|4|c|d|1")
    assert found("qqp", "train", tmp_path) == [
        ("1", ("a", "b"), "not_duplicate"),
        ("9", ("c", "d"), "duplicate"),
    ]
    assert "2 of 4 rows" in capsys.readouterr().out
    write(tmp_path / "train.tsv", header, "1|1|2|a|b|0", "7|13|14|Who?|Was he re", "al?|0", "9|3|4|c|d|1")
    assert [one[0] for one in found("qqp", "train", tmp_path)] == ["1", "9"], "cut in the second text"
    assert "2 of 4 rows" in capsys.readouterr().out
    write(tmp_path / "train.tsv", header, "1|1|2|a|b|0", "9|3|4|c|d|1|more")
    with pytest.raises(DataError, match=r"train\.tsv:3: 7 columns, but the header has 6"):
        found("qqp", "train", tmp_path)


def test_files_of_another_format_are_named(tmp_path: Path) -> None:
    write(tmp_path / "msr_paraphrase_train.txt", "Quality|#1 ID|#2 ID|#1 String|#2 String", "1|1|2|a|b")
    with pytest.raises(MissingSplitError) as caught:
        found("mrpc", "train", tmp_path)
    assert (
        "If msr_paraphrase_train.txt is this split, write it in a format of the task (.tsv or " in caught.value.remedy
    )
    (tmp_path / "msr_paraphrase_train.txt").rename(tmp_path / "msr_paraphrase_train.tsv")
    assert found("mrpc", "train", tmp_path) == [("train-0", ("a", "b"), "equivalent")]


# Names of files ------------------------------------------------------------------------------------------------------

REVIEWS = {"reviews": {"kind": "classification", "text": "review", "label": "stars"}}


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("reviews_train.csv", "train"),
        ("Train-2024.csv", "train"),
        ("reviews.val.csv", "dev"),
        ("dev_2k.csv", "dev"),
        ("test-00000.csv", "test"),
        ("contest.csv", None),
        ("train_dev.csv", None),
        ("pretrained.csv", None),
        ("train.md", None),
    ],
)
def test_a_file_is_the_split_that_its_name_names(tmp_path: Path, file: str, split: str | None) -> None:
    write(tmp_path / file, "review,stars", "good,5", "bad,1")
    for one in SPLITS:
        task = find_task("reviews", REVIEWS)
        if one == split:
            assert [example.id for example in task.read(one, str(tmp_path))] == [f"{one}-0", f"{one}-1"]
            assert list(task.source_files(one, str(tmp_path)) or ()) == [file]
        else:
            with pytest.raises(MissingSplitError):
                task.read(one, str(tmp_path))


def test_a_plain_name_comes_first_and_several_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "my_train", "dev_a", "dev_b"):
        write(tmp_path / f"{name}.csv", "review,stars", f"{name},1", "x,2")
    assert found("reviews", "train", tmp_path, REVIEWS)[0][1] == ("train",)
    assert "Did not read my_train.csv." in capsys.readouterr().out
    with pytest.raises(MissingSplitError, match=r"files may be the dev split: dev_a\.csv, dev_b\.csv") as caught:
        find_task("reviews", REVIEWS).read("dev", str(tmp_path))
    assert str(tmp_path / "dev") in caught.value.remedy


def test_files_beside_usual_names_are_no_splits(tmp_path: Path) -> None:
    for name in ("train", "dev", "test_predictions"):
        write(tmp_path / f"{name}.csv", "review,stars", f"{name},1", "x,2")
    with pytest.raises(MissingSplitError) as caught:
        find_task("reviews", REVIEWS).read("test", str(tmp_path))
    assert caught.value.remedy == "If test_predictions.csv is this split, call it test.csv."


def test_a_hub_split_of_another_name_is_not_a_file_of_this_name(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write(tmp_path / f"{name}.csv", "review,stars", f"{name},1", "x,2")
    words = {"reviews": {**REVIEWS["reviews"], "splits": {"test": "validation"}}}
    assert found("reviews", "dev", tmp_path, words)[0][1] == ("validation",)
    with pytest.raises(MissingSplitError):
        found("reviews", "test", tmp_path, words)


def test_one_split_in_two_releases_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "dev_matched.tsv", "index|sentence1|sentence2|gold_label", "7|a|b|neutral")
    row = {"sentence1": "c", "sentence2": "d", "gold_label": "neutral", "pairID": "7c"}
    write(tmp_path / "multinli_1.0_dev_matched.jsonl", json.dumps(row))
    assert found("mnli", "dev", tmp_path) == [("7", ("a", "b"), "neutral")]
    assert "Did not read multinli_1.0_dev_matched.jsonl" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_cannot_be_read_does_not_hide_the_missing_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.csv", "review,stars", "a,1", "x,2")
    (tmp_path / "lost+found").mkdir()
    listed = Path.iterdir

    def refused(path: Path) -> Any:
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(MissingSplitError, match="has no test split"):
        find_task("reviews", REVIEWS).read("test", str(tmp_path))


def test_a_column_with_the_name_used_here_comes_before_a_renamed_one(tmp_path: Path) -> None:
    german = {"premise": "Hallo Welt", "hypothesis": "Guten Tag", "label": "neutral"}
    english = {"sentence1": "Hello world", "sentence2": "Good day", "gold_label": "contradiction"}
    for number, row in enumerate(({**german, **english}, {**english, **german})):
        write(tmp_path / str(number) / "train.jsonl", json.dumps(row))
        expected = [("train-0", ("Hallo Welt", "Guten Tag"), "neutral")]
        assert found("xnli-de", "train", tmp_path / str(number)) == expected


def test_comments_of_three_cells_are_no_words(tmp_path: Path) -> None:
    words = ("EU NNP B-NP B-ORG", "rejects VBZ B-VP O", "# SYM B-NP O")
    write(tmp_path / "train.txt", "# id 3", *words, "", "# id 4", "London NNP B-NP B-LOC", "")
    expected = [("train-0", ("EU", "rejects", "#"), ["B-ORG", "O", "O"]), ("train-1", ("London",), ["B-LOC"])]
    assert found("conll2003", "train", tmp_path) == expected


# Rows of one language, and labels with other names, in a task of one's own -------------------------------------------


def test_words_for_languages_and_labels(tmp_path: Path) -> None:
    words = REVIEWS["reviews"] | {"rename": {"lang": "language"}, "language": "de", "rename_labels": {"5 stars": "5"}}
    write(tmp_path / "train.csv", "lang,review,stars", "fr,bon,5", "de,gut,5 stars", "de,schlecht,1", "en,bad,1")
    assert found("mine", "train", tmp_path, {"mine": words}) == [
        ("train-0", ("gut",), "5"),
        ("train-1", ("schlecht",), "1"),
    ]


# Saved to disk -------------------------------------------------------------------------------------------------------


def saved(folder: Path, table: datasets.Dataset, *splits: str) -> Path:
    datasets.DatasetDict(dict.fromkeys(splits, table)).save_to_disk(folder)
    return folder


def test_a_saved_dictionary_is_the_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_dict(
        {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0], "idx": [7, 9]}
    )
    table = table.cast_column("label", datasets.ClassLabel(names=["entailment", "not_entailment"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    task = find_task("rte")
    data = str(saved(tmp_path / "rte", table, "train", "validation", "test"))
    for split in SPLITS:
        assert task.read(split, data) == task.read(split, None)
    assert shown(task, task.read("dev", data))[0] == ("7", ("a", "b"), "not_entailment")
    assert task.corpus(data) == "rte"
    files = task.source_files("dev", data) or {}
    assert {Path(name).suffix for name in files} == {".arrow", ".json"}
    assert all(path.is_file() for path in files.values())


def test_saved_splits_by_the_names_of_the_hub(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"premise": ["a"], "hypothesis": ["b"], "label": ["neutral"], "idx": [3]})
    splits = ("train", "validation_matched", "validation_mismatched")
    data = saved(tmp_path / "mnli", table, *splits)
    other = table.map(lambda row: row | {"premise": "other"})
    (datasets.DatasetDict({"validation_mismatched": other})).save_to_disk(tmp_path / "mm")
    assert found("mnli", "dev", data) == [("3", ("a", "b"), "neutral")]
    assert found("mnli-mm", "dev", tmp_path / "mm") == [("3", ("other", "b"), "neutral")]
    with pytest.raises(MissingSplitError, match="validation_matched, validation_mismatched"):
        words = {
            "kind": "classification",
            "text": ["premise", "hypothesis"],
            "label": "label",
            "labels": ["neutral", "x"],
        }
        find_task("mine", {"mine": words}).read("dev", str(data))


def test_one_saved_data_set_is_as_one_file(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"review": ["good", "bad", "so"], "stars": [5, 1, 3], "id": ["a", "b", "c"]})
    table.save_to_disk(tmp_path / "reviews", num_shards=2)
    task = find_task("reviews", REVIEWS).with_labels_of(str(tmp_path / "reviews"))
    assert shown(task, task.read("train", str(tmp_path / "reviews"))) == [
        ("a", ("good",), "5"), ("b", ("bad",), "1"), ("c", ("so",), "3"),
    ]  # fmt: skip
    other = table.map(lambda row: row | {"stars": 7 if row["stars"] == 3 else row["stars"]})
    other.save_to_disk(tmp_path / "new")
    assert [row[2] for row in shown(task, read_file(task, tmp_path / "new"))] == ["5", "1", None]
    with pytest.raises(MissingSplitError, match="is one saved data set, and is read as the train split, not as dev"):
        task.read("dev", str(tmp_path / "reviews"))
    with pytest.raises(MissingSplitError, match="one saved data set, but a training also needs a dev or a test"):
        task.check_has_splits(str(tmp_path / "reviews"))
    file = next((tmp_path / "reviews").glob("*.arrow"))
    with pytest.raises(DataError) as caught:
        task.read("train", str(file))
    assert caught.value.remedy == f"Give the folder of the saved data set: {tmp_path / 'reviews'}"
    with pytest.raises(DataError, match="no file of task reviews"):
        read_file(task, file)
    file.write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be loaded"):
        task.read("train", str(tmp_path / "reviews"))


def test_saved_words_with_tags(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "pos_tags": datasets.List(datasets.ClassLabel(names=["X", "NOUN"])),
            "ner_tags": datasets.List(datasets.ClassLabel(names=ENTITY_LABELS)),
        }
    )
    rows = {"tokens": [["Ada", "rief"]], "pos_tags": [[1, 0]], "ner_tags": [[1, 0]]}
    data = saved(tmp_path / "words", datasets.Dataset.from_dict(rows, features=features), "train")
    assert found("udpos-de", "train", data) == [("train-0", ("Ada", "rief"), ["NOUN", "X"])]
    assert [one.texts[0] for one in read_file(find_task("udpos-de"), data / "train")] == [("Ada", "rief")]
    assert found("wikiann-de", "train", data) == [("train-0", ("Ada", "rief"), ["B-PER", "O"])]
    assert [row[:2] for row in found("words", "train", data)] == [("train-0", ("Ada", "rief"))]
