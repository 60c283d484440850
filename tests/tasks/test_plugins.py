"""Tasks that other packages bring: a small package is installed into a folder, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from kr2cache.errors import ConfigError, UnknownNameError
from kr2cache.tasks import Example, find_task, task_names

CODE = """
from kr2cache.tasks.base import Example
from kr2cache.tasks.declared import DeclaredTask
from kr2cache.tasks.rows import RowTask


class Jokes(RowTask):
    name = "jokes"
    about = "is a joke funny?"
    kind = "classification"
    labels = ("no", "yes")
    template = "setup, punchline"
    columns = ("setup", "punchline")
    suffixes = (".csv",)

    def example(self, row):
        text = (row.text("setup").strip("#"), row.text("punchline"))
        return Example(row.id("id"), (text,), row.label("funny", self.labels))


lines = DeclaredTask.of_table("jokes", {"kind": "text", "text": "joke"})


def broken():
    raise OSError("no jokes on this disk")


def nothing():
    return 3
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, points: str, package: str = "funny-tasks") -> None:
    """What an installer leaves: a module, and a dist-info folder with the entry points."""
    folder.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(CODE)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kr2cache.tasks]\n{points}\n")
    monkeypatch.syspath_prepend(folder)


def test_a_task_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="jokes"):
        find_task("jokes")
    install(monkeypatch, tmp_path / "site", "jokes = funny_tasks:Jokes")
    (tmp_path / "train.csv").write_text("setup,punchline,funny\n#Knock,Who?,yes\n")
    task = find_task("jokes")
    assert task.read("train", str(tmp_path)) == [Example("train-0", (("Knock", "Who?"),), 1)]
    assert task_names()[-1] == "jokes"
    with pytest.raises(UnknownNameError, match="Did you mean 'jokes'"):
        find_task("joks")


def test_an_entry_point_may_be_the_task_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path / "site", "jokes = other_jokes:lines", "other-jokes")
    assert find_task("jokes").kind == "text"


def test_a_built_in_task_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path / "site", "snli = funny_tasks:Jokes")
    assert find_task("snli").template == "sentence1, sentence2"
    assert task_names().count("snli") == 1


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("jokes = funny_tasks:broken", "package funny-tasks cannot be loaded: no jokes on this disk"),
        ("jokes = funny_tasks:missing", "package funny-tasks cannot be loaded: .*missing"),
        ("jokes = no_such_module:Jokes", "package funny-tasks cannot be loaded: No module named 'no_such_module'"),
        ("jokes = funny_tasks:nothing", "package funny-tasks is a int, not a Task"),
        ("wit = funny_tasks:Jokes", "package funny-tasks calls itself 'jokes'"),
    ],
)
def test_a_package_that_fails_is_named(
    points: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path / "site", points)
    with pytest.raises(ConfigError, match=message):
        find_task(points.partition(" ")[0])


def test_two_packages_with_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path / "one", "jokes = funny_tasks:Jokes")
    install(monkeypatch, tmp_path / "two", "jokes = more_tasks:Jokes", "more-tasks")
    with pytest.raises(ConfigError, match="funny-tasks, more-tasks"):
        find_task("jokes")
