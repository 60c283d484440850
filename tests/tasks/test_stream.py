"""Examples come one after the other: the list of all of them is never needed, and every fault is still found."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest
import tiny

from kr2cache.errors import DataError
from kr2cache.tasks import base, find_task, repeats


def snli(folder: Path, names: list[str]) -> Path:
    rows = [{"gold_label": "neutral", "sentence1": "a b", "sentence2": "c", "pairID": name} for name in names]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def udpos(folder: Path, names: list[str]) -> Path:
    blocks = [f"# sent_id = {name}\n{tiny.conllu([[('das', 'DET')]], prefix=None)}" for name in names]
    (folder / "train.conllu").write_text("".join(blocks), "utf-8")
    return folder


WRITE = {"snli": snli, "udpos": udpos}


@pytest.mark.parametrize("task", WRITE)
def test_an_example_comes_before_the_next_line_is_read(task: str, tmp_path: Path) -> None:
    folder = WRITE[task](tmp_path, ["a", "b"])
    with next(folder.iterdir()).open("a", encoding="utf-8") as file:
        file.write("broken\n")
    examples = find_task(task).examples("train", str(folder))
    assert [next(examples).id, next(examples).id] == ["a", "b"]
    with pytest.raises(DataError, match=r"train\.\w+:\d+: "):
        next(examples)


@pytest.mark.parametrize("task", WRITE)
def test_a_limit_hides_no_fault(task: str, tmp_path: Path) -> None:
    folder = WRITE[task](tmp_path, ["a", "b", "c", "b"])
    examples = find_task(task).examples("train", str(folder), 1)
    assert next(examples).id == "a"
    with pytest.raises(DataError, match="'b' occurs twice"):
        next(examples)


@pytest.mark.parametrize(("task", "places"), [("snli", (2, 4)), ("udpos", (5, 11))])
def test_an_id_that_occurs_twice_is_named_with_both_places(task: str, places: tuple[int, int], tmp_path: Path) -> None:
    folder = WRITE[task](tmp_path, ["a", "b", "c", "b", "c"])
    with pytest.raises(DataError, match=rf"'b' occurs twice: \S+:{places[0]} and \S+:{places[1]}\."):
        list(find_task(task).examples("train", str(folder)))


@pytest.mark.parametrize("task", WRITE)
def test_equal_hashes_are_no_equal_ids(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, repeats):
        monkeypatch.setattr(module, "hash", lambda value: 7, raising=False)
    names = ["a", "b", "c"]
    assert [one.id for one in find_task(task).read("train", str(WRITE[task](tmp_path, names)))] == names
    with pytest.raises(DataError, match="'a' occurs twice"):
        find_task(task).read("train", str(WRITE[task](tmp_path, [*names, "a"])))


def test_repeated_examples_are_counted_and_the_first_is_found() -> None:
    """(count, place in its file, earlier file, its file), as a dictionary of all examples gives them."""
    files = [[1, 2, 3], [4, 5], [6, 3, 1, 5, 7, 7]]
    assert repeats.repeated([array("q", file) for file in files]) == (3, 1, 0, 2)
    assert repeats.repeated([array("q", [1, 2]), array("q"), array("q", [3])]) is None
