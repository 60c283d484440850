"""Plain text: lines, tables, one file, standard input; and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest

from kr2cache.errors import ConfigError, DataError, MissingSplitError
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.spool import standard_input, texts_in_memory


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def read(name: str, data: str, split: str = "train") -> list[tuple[str, tuple[str, ...]]]:
    """Ids and texts."""
    return [(one.id, one.texts[0]) for one in find_task(name).examples(split, data)]


def test_each_line_is_a_text_and_blank_lines_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "sentences.txt", "\ufeffDas Haus \r\n\n  \nздравствуй, мир\t!\nlast")
    assert read("text", data) == [
        ("train-0", ("Das Haus ",)),
        ("train-3", ("здравствуй, мир\t!",)),
        ("train-4", ("last",)),
    ]
    assert "2 lines of 5 blank; left out, but counted in the ids" in capsys.readouterr().out
    assert read("words", data)[1] == ("train-3", ("здравствуй,", "мир", "!"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"id": 7, "label": "x", "text": "a b"}, {"text": "c"}], [("7", "a b"), ("train-1", "c")]),
        ([{"id": "q", "label": "no", "title": "a b", "body": "no"}], [("q", "a b")]),
    ],
    ids=["the column text", "the first column"],
)
def test_a_table_has_its_text_in_one_column(
    rows: list[dict[str, str]], expected: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read("text", data) == [(name, (text,)) for name, text in expected]
    said = "has no column text: its texts are in title, the first one" in capsys.readouterr().out
    assert said == ("title" in rows[0])


def test_csv_and_lists_of_words(tmp_path: Path) -> None:
    assert read("text", write(tmp_path / "a.csv", 'stars,text\n5,"so, ""good"""\n')) == [("train-0", ('so, "good"',))]
    rows = '{"tokens": ["New York", "is"], "tags": [0, 0]}\n{"tokens": "big  here"}\n'
    assert read("words", write(tmp_path / "b.jsonl", rows)) == [
        ("train-0", ("New York", "is")),
        ("train-1", ("big", "here")),
    ]


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("text", "a.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2: there is no text \(there are body\)"),
        ("text", "a.jsonl", '{"text": "a"}\n{"text": "  "}\n', r"a\.jsonl:2: text is empty"),
        ("text", "a.jsonl", '{"id": 1}\n', r"a\.jsonl:1: there is no text"),
        ("text", "a.jsonl", '{"id": "x", "text": "a"}\n{"id": "x", "text": "b"}\n', r"'x' occurs twice: .*:1 and .*:2"),
        ("text", "a.jsonl", '{"text": ["a"]}\n', r"a\.jsonl:1: text is \['a'\], not text"),
        ("words", "a.jsonl", '{"words": ["a", 1]}\n', r"a\.jsonl:1: words is \['a', 1\], not a list of words"),
        ("words", "a.jsonl", '{"words": ["a", " "]}\n', r"a\.jsonl:1: a text is empty"),
        ("text", "a.txt", "\n \n", r"a\.txt holds no example"),
        ("text", "a.md", "text\n", r"a\.md is no file of task 'text', whose files end in \.txt or \.jsonl or \.csv"),
        ("snli", "a.txt", "text\n", r"a\.txt is no file of task 'snli'"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(
    task: str, name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read(task, write(tmp_path / name, content))


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        read("text", str(tmp_path / "a.txt"))


def test_an_example_comes_before_the_next_line_is_read(tmp_path: Path) -> None:
    """So a file of any size takes no memory."""
    data = write(tmp_path / "a.txt", "one\n" * 3)
    with Path(data).open("ab") as file:
        file.write(b"\xff\n")
    examples = find_task("text").examples("train", data)
    assert [next(examples).id for _ in range(3)] == ["train-0", "train-1", "train-2"]
    with pytest.raises(DataError, match="not UTF-8"):
        next(examples)


@pytest.mark.parametrize(("name", "split"), [("sentences", "train"), ("reviews-test", "test"), ("dev", "dev")])
def test_a_file_by_itself_is_the_split_in_its_name(name: str, split: str, tmp_path: Path) -> None:
    data = write(tmp_path / f"{name}.txt", "a\n")
    assert read("text", data, split) == [(f"{split}-0", ("a",))]
    other = "dev" if split == "train" else "train"
    with pytest.raises(MissingSplitError, match=f"is read as the {split} split, not as {other}"):
        find_task("text").check_data(other, data)
    assert find_task("text").corpus(data) == f"{name}.txt"
    assert find_task("text").source_files(split, data) == {f"{name}.txt": Path(data)}


def test_a_folder_has_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "test.jsonl", '{"text": "b"}\n')
    assert read("text", str(tmp_path)) == [("train-0", ("a",))]
    assert read("text", str(tmp_path), "test") == [("test-0", ("b",))]


def test_what_looks_like_a_file_is_not_looked_for_on_the_hub(workdir: Path) -> None:
    with pytest.raises(DataError, match=r"There is no data folder or file sentences\.txt"):
        read("text", "sentences.txt")


def test_nothing_can_be_trained_on_text() -> None:
    with pytest.raises(ConfigError, match="kind text: it has no labels"):
        find_task("text").head  # noqa: B018


# Without a file ------------------------------------------------------------------------------------------------------


def test_standard_input_is_read_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a b\n\nc\n")))
    with standard_input(find_task("text"), "dev") as path:
        assert read("text", str(path), "dev") == [("dev-0", ("a b",)), ("dev-2", ("c",))]
        assert read("text", str(path), "dev") == read("text", str(path), "dev")
    assert not path.parent.exists()


@pytest.mark.parametrize("given", [b"", b"\n \n"])
def test_empty_standard_input_is_called_by_its_name(given: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(given)))
    empty = pytest.raises(
        DataError, match=r"^Standard input is empty\.\nCheck the command before the \|, or give a file"
    )
    with empty, standard_input(find_task("text"), "dev"):
        pytest.fail("there is nothing to read")


def test_a_fault_of_standard_input_is_told_by_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a b\n\xff\n")))
    with (
        pytest.raises(DataError, match=r"^standard input:2: not UTF-8"),
        standard_input(find_task("text"), "dev") as path,
    ):
        read("text", str(path), "dev")


def examples_of(texts: object, column: str | None = None, id_column: str | None = None) -> tuple[str, list[Example]]:
    with texts_in_memory(texts, "train", column, id_column) as (task, path):
        return task.name, list(task.examples("train", str(path)))


@pytest.mark.parametrize(
    ("texts", "task", "expected"),
    [
        (["Das\nHaus", " ü "], "text", [("train-0", ("Das\nHaus",)), ("train-1", (" ü ",))]),
        ({"q": "a", 3: "b"}, "text", [("q", ("a",)), ("3", ("b",))]),
        ([["New York", "is"], ("big",)], "words", [("train-0", ("New York", "is")), ("train-1", ("big",))]),
    ],
    ids=["strings", "dictionary", "words"],
)
def test_texts_in_memory(texts: object, task: str, expected: list[tuple[str, tuple[str, ...]]]) -> None:
    name, examples = examples_of(texts)
    assert name == task
    assert [(one.id, one.texts[0], one.label) for one in examples] == [(*one, None) for one in expected]


def test_a_generator_is_read_once() -> None:
    assert len(examples_of(f"text {number}" for number in range(3))[1]) == 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "There is no text: texts is empty"),
        ({}, "There is no text"),
        ("one string", "texts is 'one string', not several texts"),
        (7, "texts is 7, not several texts"),
        (["a", float("nan")], r"texts\[1\] is nan, not text"),
        (["a", None], r"texts\[1\] is None, not text"),
        (["a", " \n"], r"texts\[1\] is empty: ' \\n'"),
        ([["a"], []], r"texts\[1\] is empty"),
        ([["a", ""]], r"texts\[0\] has an empty word"),
        ([["a", 1]], r"texts\[0\] is \['a', 1\], not a list of words"),
        (["a", ["b"]], r"texts\[1\] is \['b'\], but the texts before it are of another kind"),
        ({"q": " "}, r"texts\['q'\] is empty"),
        ({1: "a", "1": "b"}, r"'1' occurs twice: texts\[0\] and texts\[1\]"),
        ({1.5: "a"}, "The id 1.5 is neither text nor a whole number"),
        (["half \ud83d"], "a text is not Unicode"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_by_its_place(texts: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        examples_of(texts)


def test_a_data_set_of_datasets() -> None:
    from datasets import Dataset, DatasetDict

    rows = {"review": ["a", "b"], "name": ["x", "y"], "n": [4, 5]}
    data = Dataset.from_dict(rows)
    assert [one.id for one in examples_of(data, "review")[1]] == ["train-0", "train-1"]
    assert [one.id for one in examples_of(data, "review", "n")[1]] == ["4", "5"]
    assert [one.texts for one in examples_of(data.with_format("numpy"), "name")[1]] == [(("x",),), (("y",),)]
    assert examples_of(Dataset.from_dict({"tokens": [["a", "b"]]}))[0] == "words"
    with pytest.raises(ConfigError, match="several columns and none called text") as caught:
        examples_of(data)
    assert "review, name, n" in caught.value.remedy
    with pytest.raises(ConfigError, match="no column 'nam'"):
        examples_of(data, "review", "nam")
    with pytest.raises(ConfigError, match="is a dictionary of data sets: train"):
        examples_of(DatasetDict(train=data), "review")
    with pytest.raises(DataError, match=r"'q' occurs twice: texts\[0\] and texts\[1\]"):
        examples_of(Dataset.from_dict({"text": ["a", "b"], "id": ["q", "q"]}), id_column="id")
    with pytest.raises(ConfigError, match=r"column and id_column are of a datasets\.Dataset"):
        examples_of(["a"], "text")


def test_a_table_in_memory_is_not_its_names_of_columns() -> None:
    table = pandas.DataFrame({"review": ["ein haus"], "stars": [3]})
    with pytest.raises(ConfigError, match="a table with the columns review, stars") as caught, in_memory(table):
        pass
    assert "df['review']" in caught.value.remedy
    with in_memory(table["review"]) as (task, path):
        assert [one.texts for one in task.read("train", str(path))] == [(("ein haus",),)]


@pytest.mark.parametrize(
    ("texts", "message"), [({" ": "ja"}, "The id ' ' is empty"), ({"a": "ja", " a": "nein"}, "'a'")]
)
def test_ids_in_memory_that_are_blank_or_differ_by_spaces(texts: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message), in_memory(texts):
        pass


def in_memory(texts: object) -> contextlib.AbstractContextManager[tuple[Task, Path]]:
    return texts_in_memory(texts, "train", None, None)
