"""What holds for the options of every command."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.text import Text

from kr2cache.cli import run
from kr2cache.commands.app import app
from kr2cache.commands.options import App
from kr2cache.commands.settings import OPTIONS, TRAIN_OPTIONS, default_text, kind
from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.errors import UsageError


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_no_command_takes_an_option_twice(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = set()
    for path, command in commands(typer.main.get_command(app)):
        for option in command.params:
            if option.param_type_name != "option" or option.is_flag or option.multiple:
                continue
            long = option.opts[0]
            assert run([*path, long, "1", f"{long}=1", "--json"]) == 2, (path, long)
            error = json.loads(capsys.readouterr().out)["error"]
            assert error["type"] == "UsageError"
            assert error["message"] == f"{long} is given 2 times, but takes one value."
            assert error["remedy"]
            tried.add((*path, long))
    assert tried >= {("train", "--reader"), ("train", "--seeds"), ("sweep", "--seeds"), ("cache", "slice", "--ids")}
    assert len(tried) > 60
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("train --seeds 1 --seeds 2", "--seeds 1,2"),
        ("extract --layers 0 --layers 3", "--layers 0,3,5"),
        ("extract --resource gottbert --resource bert", "once for each"),
    ],
)
def test_the_remedy_says_how_several_are_given(line: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert remedy in " ".join(capsys.readouterr().err.split())


def test_short_options_count_and_flags_and_lists_may_be_repeated() -> None:
    small, got = App(), {}

    @small.command()
    def only(
        number: Annotated[int, typer.Option("--number", "-n")] = 0,
        names: Annotated[list[str] | None, typer.Option("--name")] = None,
        flag: Annotated[bool, typer.Option("--flag", "-f")] = False,
        loud: Annotated[int, typer.Option("--loud", "-l", count=True)] = 0,
    ) -> None:
        got.update(number=number, names=names, flag=flag, loud=loud)

    small(args=["-n", "3", "--flag", "-ff", "--name", "a", "--name=b", "-ll", "-l"], standalone_mode=False)
    assert got == {"number": 3, "names": ["a", "b"], "flag": True, "loud": 3}
    for twice in (["-n1", "-n", "2"], ["-n", "1", "--number=1"], ["-fn1", "-n2"]):
        with pytest.raises(UsageError, match="--number is given 2 times"):
            small(args=twice, standalone_mode=False)


def test_the_types_and_defaults_of_options_come_from_the_fields() -> None:
    assert {name: kind(TrainConfig, name) for name in ("seeds", "method", "limit", "epochs", "run_dir")} == {
        "seeds": str,
        "method": str,
        "limit": int,
        "epochs": float,
        "run_dir": Path,
    }
    texts = {name: default_text(TrainConfig, name) for name in ("seeds", "learning_rate", "batch_size", "teacher")}
    assert texts == {"seeds": "1,2,3", "learning_rate": "2e-5", "batch_size": "32", "teacher": ""}
    assert default_text(ExtractConfig, "max_length") == "128"
    own = {"split", "layers", "tokens-per-batch", "shard-gb", "workers", "engine", "gpus-per-worker"}
    assert OPTIONS.keys() - TRAIN_OPTIONS.keys() == own
    assert OPTIONS["check-states"] is bool


def test_every_command_accepts_debug() -> None:
    for path, command in commands(typer.main.get_command(app)):
        assert "--debug" in {name for option in command.params for name in option.opts}, path
        assert "debug" not in inspect.signature(inspect.unwrap(command.callback)).parameters, path


def test_no_line_of_a_help_text_ends_within_a_sentence() -> None:
    """Typer keeps the line breaks of every paragraph after the first."""
    for path, command in commands(typer.main.get_command(app)):
        _, *paragraphs = inspect.cleandoc(command.help).split("\n\n")
        for line in "\n".join(paragraphs).splitlines():
            assert line.endswith("."), (path, line)


def test_brackets_of_help_texts_are_shown() -> None:
    """Rich takes [tasks] for markup, and shows nothing."""
    for path, command in commands(typer.main.get_command(app)):
        for text in (command.help or "", *(getattr(option, "help", None) or "" for option in command.params)):
            shown = Text.from_markup(text).plain
            for section in ("tasks", "models", "defaults", "training"):
                assert (f"[{section}]" in text) == (f"[{section}]" in shown), (path, text)


def test_help_shows_a_default_in_one_pair_of_brackets(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["extract", "--help"]) == 0
    words = " ".join(word for word in capsys.readouterr().out.split() if word != "│")
    assert "[default: all]" in words
    for path, command in commands(typer.main.get_command(app)):
        for option in command.params:
            assert not isinstance(option.show_default, str), (path, option.name)
