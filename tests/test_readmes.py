"""What the READMEs and CONTRIBUTING.md say can be done: Python runs, commands parse, files and names exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import typer
from world import unpack_old_world

from kr2cache.commands.app import app

ROOT = Path(__file__).parents[1]
OWN_FOLDERS = ("kr2cache", "pipelines", "data", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in OWN_FOLDERS for page in (ROOT / folder).rglob("README.md"))])
PAGES.remove(ROOT / "CHANGELOG.md")  # what was true once
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
SUFFIXES = (".py", ".md", ".toml", ".txt")
EXAMPLE_FILES = ("kr2cache/tasks/reviews.py", "kr2cache.toml")
"""Named as what a user may write."""
CACHE, RUN = re.compile(r"\.kr2cache/[\w./-]+-[0-9a-f]{8}"), re.compile(r"runs/[\w./-]+/seed-1")
OLD_CACHE, OLD_RUN = "caches/udpos/train/res-949d8033", "runs/udpos/kr2-reader-res-last2-1ea417a2/seed-1"
OLD_DEV_CACHE = "caches/udpos/dev/res-48a41ba1"


def blocks(page: Path, language: str) -> list[str]:
    return [content for name, content in BLOCK.findall(page.read_text("utf-8")) if name == language]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def console_lines() -> Iterator[tuple[str, str]]:
    """Where it stands, and each command line of the console blocks."""
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in block.splitlines():
                if line.startswith("$ "):
                    yield name_of(page), line.removeprefix("$ ")


def words_of(line: str) -> list[str]:
    """The words of a command line, without comment, redirection and pipe."""
    words = shlex.split(line, comments=True)
    stop = next((i for i, word in enumerate(words) if word in (">", "|", "&&", ";")), len(words))
    return words[:stop]


def parse(arguments: list[str]) -> tuple[str, str | None]:
    """Parse a command line as the command line does, and run nothing: the command's name, and what is wrong."""
    command: Any = typer.main.get_command(app)
    name = "kr2cache"
    try:
        while hasattr(command, "commands"):
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, arguments)
    except Exception as error:  # of typer, or of ours; a command that is not there is a KeyError
        return name, repr(error)
    return name, None


def test_every_page_is_found() -> None:
    names = {name_of(page) for page in PAGES}
    rooms = ("cache", "models", "tasks", "training", "workers")
    assert {"README.md", "CONTRIBUTING.md", "pipelines/README.md", "tests/benchmarks/README.md"} <= names
    assert {f"kr2cache/{room}/README.md" for room in rooms} <= names


def test_every_command_of_the_readmes_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = set()
    for page, line in console_lines():
        program, *arguments = words_of(line)
        if program == "srun":
            program, *arguments = arguments[arguments.index("kr2cache") :]
        if program == "kr2cache":
            command, wrong = parse(arguments)
            assert wrong is None, f"{page}: {line}: {wrong}"
            seen.add(command)
        elif program == "make":
            assert set(arguments) <= targets, f"{page}: {line}"
        elif program.startswith((".", "python")):
            assert all((ROOT / word).exists() for word in (program, *arguments) if "/" in word), f"{page}: {line}"
        else:
            assert program in ("git", "source", "pip", "ray", "export", "sort"), f"{page}: {line}"
    assert {"extract", "train", "sweep", "report", "predict", "list", "verify", "repair", "slice", "fuse"} <= seen


@pytest.mark.parametrize(
    "line", ["train --fuzion last4", "train --seeds", "cache fuse", "extrakt", "train --fusion all --fusion last4"]
)
def test_a_command_that_does_not_exist_is_seen(line: str) -> None:
    assert parse(line.split())[1] is not None


def test_python_in_the_readmes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cache and a run that an earlier version wrote, under the names that the READMEs give them."""
    monkeypatch.chdir(unpack_old_world(tmp_path))
    (tmp_path / "res").symlink_to("models/res")  # where the run's resource is looked for without kr2cache.toml
    (tmp_path / "models" / "gottbert-base").symlink_to("res")
    (tmp_path / "models" / "xlm-roberta-base").symlink_to("reader")
    (tmp_path / "corpus" / "de").symlink_to(".")
    ran: dict[str, dict[str, Any]] = {}
    for page in PAGES:
        for block in blocks(page, "python"):
            code = RUN.sub(OLD_RUN, CACHE.sub(lambda name: OLD_DEV_CACHE if "/dev/" in name[0] else OLD_CACHE, block))
            code = code.replace('"minilm"', '"models/res"')
            names: dict[str, Any] = {"__name__": "readme"}
            exec(compile(code, name_of(page), "exec"), names)
            ran.setdefault(name_of(page), {}).update(names)
    both_stages = ran["kr2cache/training/README.md"]
    assert both_stages["made"].folder.is_relative_to(".kr2cache/udpos-de/train")
    assert len(both_stages["result"].runs) == 2
    reading = ran["kr2cache/cache/README.md"]
    layers, tokens, width = reading["states"].shape
    assert (layers, width) == (len(reading["cache"].layers), reading["cache"].width)
    assert reading["both"].folders == (Path(OLD_CACHE), Path(OLD_DEV_CACHE))
    assert (reading["both"].ids[0], reading["both"].ids[-1], len(reading["pair"])) == ("train-1", "dev-2", 2)
    assert reading["batch"][0].shape == (2, tokens, width)
    assert reading["items"][0].shape == (2, width)
    assert reading["padded_states"].shape[2:] == (layers, width)
    assert np.array(reading["table"][0]["states"]).shape[1:] == (layers, width)
    labelled = both_stages["labelled"]
    assert len(labelled[0].predicted) == len(("Das", "ist", "ein", "Haus", "."))
    reviews = ran["kr2cache/tasks/README.md"]["Reviews"]()
    (tmp_path / "dev.csv").write_text("id,title,text,label\na,Good,I like it,good\n,Bad,I do not,bad\n")
    examples = reviews.read("dev", str(tmp_path))
    assert [(one.id, one.texts, one.label) for one in examples] == [
        ("a", (("Good", "I like it"),), 1),
        ("dev-1", (("Bad", "I do not"),), 0),
    ]


def test_a_probe_of_every_layer_takes_ten_lines(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's, with the real model: it prints what the README shows."""
    tiny.minilm()
    (probe,) = [block for block in blocks(ROOT / "README.md", "python") if "LogisticRegression" in block]
    assert sum(bool(line.strip()) for line in probe.splitlines()) <= 10
    exec(compile(probe, "README.md", "exec"), {"__name__": "readme"})
    line = re.compile(r"^layer (\d): (\d\.\d\d)$", re.MULTILINE)
    found, shown = line.findall(capsys.readouterr().out), line.findall((ROOT / "README.md").read_text("utf-8"))
    assert [layer for layer, _ in found] == [layer for layer, _ in shown] == list("0123456")
    for (_, score), (_, said) in zip(found, shown, strict=True):  # one sentence of 32 more or less
        assert abs(float(score) - float(said)) < 0.04


def test_toml_in_the_readmes_is_toml() -> None:
    found = [tomllib.loads(block) for page in PAGES for block in blocks(page, "toml")]
    assert {"defaults", "models", "training"} in [set(one) for one in found]


@cache
def code_files() -> list[Path]:
    return [path for folder in OWN_FOLDERS for path in (ROOT / folder).rglob("*.py")]


@cache
def words_of_code() -> frozenset[str]:
    return frozenset(word for path in code_files() for word in re.findall(r"\w+", path.read_text("utf-8")))


def is_there(name: str, page: Path) -> bool:
    """Whether a file is there: from the root, the page's folder or one above; in CONTRIBUTING.md by its name alone."""
    if any((place / name).exists() for place in (ROOT, ROOT / "kr2cache", *page.parents)):
        return True
    return page.name == "CONTRIBUTING.md" and name in {path.name for path in code_files()}


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    missing = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if path.startswith("http"):
            continue
        if not there.exists() or (anchor and anchor not in headings(there)):
            missing.append(target)
    for code in CODE.findall(BLOCK.sub("", text)):
        if FILE.fullmatch(code) and (
            code.startswith(tuple(f"{one}/" for one in OWN_FOLDERS)) or code.endswith(SUFFIXES)
        ):
            if code not in (*EXAMPLE_FILES, *SUFFIXES) and not is_there(code, page):
                missing.append(code)
        elif page.name == "CONTRIBUTING.md" and code.isidentifier() and code not in words_of_code():
            missing.append(code)
    assert not missing
