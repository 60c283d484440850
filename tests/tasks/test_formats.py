"""The formats of declared tasks: what other libraries write is what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import conllu
import datasets
import pandas
import pytest

from kr2cache.errors import DataError, MissingSplitError
from kr2cache.tasks import Example, Task, find_task

PAIRS = {"kind": "classification", "text": ["first", "second"], "label": "same"}
ROWS = [
    {"first": 'He said "no', "second": "x, y", "same": "no"},
    {"first": "é ü", "second": "two", "same": "yes"},
    {"first": "three", "second": "four", "same": "no"},
]
EXPECTED = [
    Example(f"train-{number}", ((row["first"], row["second"]),), int(row["same"] == "yes"))
    for number, row in enumerate(ROWS)
]


def read(words: dict[str, Any], data: Path | str, split: str = "train") -> list[Example]:
    task: Task = find_task("mine", {"mine": words})
    return task.with_labels_of(str(data)).read(split, str(data))


# Tables --------------------------------------------------------------------------------------------------------------


def test_tables_as_pandas_writes_them(tmp_path: Path) -> None:
    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "train.csv", index=False)
    assert read(PAIRS, tmp_path / "train.csv") == EXPECTED
    table.to_csv(tmp_path / "train.tsv", index=False, sep="\t", quoting=3)
    assert read(PAIRS, tmp_path / "train.tsv") == EXPECTED
    table.to_json(tmp_path / "train.jsonl", orient="records", lines=True, force_ascii=False)
    assert read(PAIRS, tmp_path / "train.jsonl") == EXPECTED
    table.astype({"same": "category"}).to_parquet(tmp_path / "train.parquet")
    assert read(PAIRS, tmp_path / "train.parquet") == EXPECTED


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_without_names_of_columns(tmp_path: Path, suffix: str) -> None:
    words = PAIRS | {"columns": ["source", "same", "first", "second"]}
    mark = {"csv": ",", "tsv": "\t"}[suffix]
    lines = [
        mark.join(["s", row["same"], row["first"].replace('"', ""), row["second"].replace(",", "")]) for row in ROWS
    ]
    path = tmp_path / f"train.{suffix}"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    assert [(one.id, one.label) for one in read(words, path)] == [("train-0", 0), ("train-1", 1), ("train-2", 0)]
    path.write_text(mark.join(["second", "first", "same"]) + "\n" + mark.join(["b", "a", "no"]) + "\n")
    (example,) = find_task("mine", {"mine": words}).read("train", str(path))
    assert example.texts == (("a", "b"),)  # a line that has the names itself counts
    path.write_text(mark.join(["a", "b"]))
    with pytest.raises(DataError, match=r":1: 2 columns, but there should be 4"):
        read(words, path)


def test_a_row_of_tabs_with_too_few(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("first\tsecond\tsame\na\tb\tyes\na\tb\n")
    with pytest.raises(DataError, match=r"train.tsv:3: 2 columns, but the header has 3") as caught:
        read(PAIRS, tmp_path)
    assert "tabs" in caught.value.remedy


def test_columns_with_other_names(tmp_path: Path) -> None:
    table = pandas.DataFrame(ROWS).rename(columns={"first": "#1 String", "same": "Quality"})
    table.to_parquet(tmp_path / "train.parquet")
    assert read(PAIRS | {"rename": {"#1 String": "first", "Quality": "same", "else": "second"}}, tmp_path) == EXPECTED


def test_class_labels_and_lists_in_parquet(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["O", "B-PER"])
    features = datasets.Features({"w": datasets.List(datasets.Value("string")), "t": datasets.List(names)})
    rows = {"w": [["Ada", "runs"], ["it"]], "t": [[1, 0], [0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    words = {"kind": "tagging", "words": "w", "label": "t", "scheme": "BIO"}
    assert read(words, tmp_path) == [
        Example("train-0", (("Ada", "runs"),), (0, 1)),
        Example("train-1", (("it",),), (1,)),
    ]


def test_parquet_that_is_none_and_parquet_with_a_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"train.parquet is not Parquet"):
        read(PAIRS, path)
    pandas.DataFrame([*ROWS, ROWS[0] | {"first": None}]).to_parquet(path)
    with pytest.raises(DataError, match=r"train.parquet, row 3: first is null"):
        read(PAIRS, path)


def test_files_with_names_of_ones_own(tmp_path: Path) -> None:
    for split, row in zip(("train", "dev"), ROWS, strict=False):
        (tmp_path / f"{split}-de.tsv").write_text("first\tsecond\tsame\n" + "\t".join(row.values()) + "\n", "utf-8")
    words = PAIRS | {"files": ["{split}-de.tsv"], "labels": ["no", "yes"]}
    assert [one.label for split in ("train", "dev") for one in read(words, tmp_path, split)] == [0, 1]


# The hub -------------------------------------------------------------------------------------------------------------


def test_a_data_set_in_the_hubs_cache_on_this_machine(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself made the cache; then there is no network, and nothing but the cache."""
    labels = datasets.ClassLabel(names=["no", "yes"])
    made = datasets.Dataset.from_list(ROWS).cast_column("same", labels)
    made.to_parquet(workdir / "source" / "train.parquet")
    made.select([1]).to_parquet(workdir / "source" / "validation.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "cache")
    built = datasets.load_dataset("parquet", data_dir=str(workdir / "source"))
    for split, name in (("train", "train"), ("validation", "matched")):
        folder = workdir / "cache" / "me___pairs" / "de" / "0.0.0" / "0123456789abcdef"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"pairs-{name}.arrow").write_bytes(Path(built[split].cache_files[0]["filename"]).read_bytes())
    info = json.loads((Path(built["train"].cache_files[0]["filename"]).parent / "dataset_info.json").read_text())
    info |= {"builder_name": "parquet", "dataset_name": "pairs", "config_name": "de"}
    info["splits"] = {
        name: {**info["splits"][split], "name": name, "dataset_name": "pairs"}
        for split, name in (("train", "train"), ("validation", "matched"))
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    words = PAIRS | {"data": "me/pairs", "configuration": "de", "splits": {"dev": "matched"}}
    task = find_task("mine", {"mine": words}).with_labels_of(None)
    assert task.read("train", None) == EXPECTED
    assert task.read("dev", None) == [Example("dev-0", EXPECTED[1].texts, 1)]
    assert task.corpus(None) == "me/pairs"
    with pytest.raises(MissingSplitError, match="me/pairs has no test split"):
        task.read("test", None)


def test_a_data_set_of_several_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['de', 'en']\nExample")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"me/pairs has several configurations: .*'de', 'en'") as caught:
        read(PAIRS | {"data": "me/pairs"}, "me/pairs")
    assert "configuration =" in caught.value.remedy


# A word a line -------------------------------------------------------------------------------------------------------

COLUMNS = {"kind": "tagging", "columns": [0, 3], "scheme": "BIO"}
CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP I-NP B-ORG
rejects VBZ I-VP O
# SYM O O

Peter NNP I-NP B-PER
Blackburn NNP I-NP I-PER
"""
TAGGED = [
    Example("train-0", (("EU", "rejects", "#"),), (0, 3, 3)),
    Example("train-1", (("Peter", "Blackburn"),), (1, 2)),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [" ", "\t"])
@pytest.mark.parametrize("columns", [[0, 3], [0, -1]])
def test_conll_2003(tmp_path: Path, mark: str, end: str, columns: list[int]) -> None:
    text = CONLL_2003.replace(" ", mark).replace("\n", end)
    (tmp_path / "train.txt").write_bytes(text.rstrip().encode())
    assert read(COLUMNS | {"columns": columns}, tmp_path) == TAGGED


def test_comments_and_words_with_spaces(tmp_path: Path) -> None:
    text = "#\thttp://example.org [2011-01-01]\n1\tNew York\tB-LOC\tO\n2\t#fun\tO\tO\n\n\n#\tsource\n1\tx\tO\tO\n"
    (tmp_path / "train.tsv").write_text(text)
    assert read(COLUMNS | {"columns": [1, 2]}, tmp_path) == [
        Example("train-0", (("New York", "#fun"),), (0, 1)),
        Example("train-1", (("x",),), (1,)),
    ]


def test_words_without_labels(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("EU\nrejects\n\nPeter\n")
    for columns in ([0, 3], [0, -1]):
        task = find_task("mine", {"mine": COLUMNS | {"columns": columns, "labels": ["O", "B-X"]}})
        assert task.read("test", str(tmp_path)) == [
            Example("test-0", (("EU", "rejects"),), None),
            Example("test-1", (("Peter",),), None),
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O O O\nb\n", r"train.txt, sentence at line 1: word 2 \('b'\) has no label"),
        ("x O O O\n\na O O Z\n", r"'Z' of task mine is not of scheme BIO"),
        ("\tO\tO\tO\n", r"train.txt:1: no word in column 0"),
        ("\n\n", "holds no example"),
        ("a\nb\n", "No example of the train split of .* has a label in the column label; its columns are words"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read(COLUMNS, tmp_path)


CONLLU = """# sent_id = s1
# text = Zum Haus
1-2\tZum\t_\t_\t_\t_\t_\t_\t_\t_
1\tZu\tzu\tADP\tAPPR\t_\t3\tcase\t_\tNER=B-LOC|SpaceAfter=No
2\tdem\tder\tDET\tART\tCase=Dat|Number=Sing\t3\tdet\t_\tNER=I-LOC
3\tHaus\tHaus\tNOUN\tNN\tCase=Dat\t0\troot\t_\t_
3.1\tgeht\tgehen\tVERB\tVV\t_\t_\t_\t_\t_

1\tJa\tja\tINTJ\tITJ\t_\t0\troot\t_\t_

# sent_id = gone
1\t_\t_\tINTJ\tITJ\t_\t0\troot\t_\t_

"""


@pytest.mark.parametrize(
    ("words", "field", "nothing"),
    [
        ({"label": "XPOS"}, lambda token: token["xpos"], "_"),
        ({"columns": [1, 4]}, lambda token: token["xpos"], "_"),
        ({"label": "XPOS", "words": "FORM"}, lambda token: token["xpos"], "_"),
        ({"label": "DEPREL"}, lambda token: token["deprel"], "_"),
        ({"label": "FEATS.Case"}, lambda token: (token["feats"] or {}).get("Case"), "_"),
        ({"label": "MISC.NER"}, lambda token: (token["misc"] or {}).get("NER"), "_"),
        ({"label": "MISC.NER", "scheme": "BIO"}, lambda token: (token["misc"] or {}).get("NER"), "O"),
    ],
)
def test_any_column_of_conllu(
    tmp_path: Path, words: dict[str, Any], field: Any, nothing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library conllu reads the same."""
    (tmp_path / "train.conllu").write_text(CONLLU, "utf-8")
    sentences = [[token for token in sentence if isinstance(token["id"], int)] for sentence in conllu.parse(CONLLU)[:2]]
    tags = [[field(token) or nothing for token in sentence] for sentence in sentences]
    task = find_task("mine", {"mine": {"kind": "tagging"} | words}).with_labels_of(str(tmp_path))
    assert task.labels == tuple(sorted({tag for own in tags for tag in own}))
    examples = task.read("train", str(tmp_path))
    assert [one.id for one in examples] == ["s1", "train-1"]
    assert [one.texts for one in examples] == [(tuple(token["form"] for token in own),) for own in sentences]
    assert [[task.labels[number] for number in one.label] for one in examples] == tags  # type: ignore[union-attr]
    assert "1 of 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize("words", [{"label": "XPOS", "words": "LEMMA"}, {"columns": [2, 4]}])
def test_lemmas_as_words(tmp_path: Path, words: dict[str, Any]) -> None:
    (tmp_path / "train.conllu").write_text(CONLLU, "utf-8")
    task = find_task("mine", {"mine": {"kind": "tagging", "labels": ["A", "B"]} | words})
    with pytest.raises(DataError, match="'APPR'"):
        task.read("train", str(tmp_path))
    task = find_task("mine", {"mine": {"kind": "tagging"} | words}).with_labels_of(str(tmp_path))
    assert task.read("train", str(tmp_path))[0].texts == (("zu", "der", "Haus"),)


def test_conllu_without_tags_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "test.conllu").write_text("1\tJa\t_\t_\t_\t_\t_\t_\t_\t_\n\n")
    task = find_task("mine", {"mine": {"kind": "tagging", "label": "XPOS", "labels": ["A", "B"]}})
    assert task.read("test", str(tmp_path)) == [Example("test-0", (("Ja",),), None)]


def test_a_document_may_be_long(tmp_path: Path) -> None:
    text = "ja " * 60_000
    (tmp_path / "train.csv").write_text(f"line\n{text}\n")
    own = find_task("mine", {"mine": {"kind": "text", "text": "line"}})
    assert [len(one.texts[0][0].split()) for one in own.read("train", str(tmp_path))] == [60_000]
