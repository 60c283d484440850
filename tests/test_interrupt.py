"""Ctrl-C and broken pipes at any moment of the command line, in real processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kr2cache import interrupt
from kr2cache.cli import run

AT_AN_IMPORT = """
import os, signal, sys
_, module, how, *sys.argv[1:] = sys.argv
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if how == "hidden":
                    raise ImportError("initialization failed")
                raise
sys.meta_path.insert(0, CtrlC())
from kr2cache.cli import main
main()
"""


def interrupted(module: str, line: str, *, hidden: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``kr2cache LINE`` as the console script does, with SIGINT at the moment when ``module`` is imported.

    Args:
        hidden: Whether the import turns the KeyboardInterrupt into an error of its own, as extension modules do.
    """
    how = "hidden" if hidden else "raised"
    return subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, module, how, *shlex.split(line)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


SAID = "Interrupted. What is complete is kept.\nRun the same command again.\n"


@pytest.mark.parametrize("module", ["kr2cache.interrupt", "kr2cache.commands.app", "typer", "rich.console"])
def test_ctrl_c_while_the_command_line_is_imported(workdir: Path, module: str) -> None:
    done = interrupted(module, "models")
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == ("" if module == "kr2cache.interrupt" else SAID)


COMMANDS = {
    "extract": "extract --resource model --task udpos --data corpus",
    "train": "train --reader model --method kreader --task udpos --data corpus",
    "sweep": "sweep grid.toml",
    "predict": "predict --run runs das",
    "bench": "bench",
    "demo": "demo",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_torch_is_imported(workdir: Path, bert: Path, corpus: Path, command: str) -> None:
    (workdir / "model").symlink_to(bert)
    (workdir / "corpus").symlink_to(corpus)
    done = interrupted("torch", COMMANDS[command], hidden=command == "extract")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith(SAID)
    assert "Traceback" not in done.stderr


def test_ctrl_c_under_json_is_one_document(workdir: Path) -> None:
    done = interrupted("rich.table", "models --json")
    assert done.returncode == 130
    assert json.loads(done.stdout)["error"] == {
        "type": "InterruptedWorkError",
        "message": "Interrupted. What is complete is kept.",
        "remedy": "Run the same command again.",
    }


def test_an_error_that_was_foreseen_is_not_taken_for_ctrl_c(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt._pressed.set()
    try:
        assert run(["extract", "--resource", "gotbert", "--task", "udpos"]) == 1
        assert "'gotbert'" in capsys.readouterr().err
    finally:
        interrupt._pressed.clear()


@pytest.mark.parametrize("line", ["tasks", "models --json", "train --help"])
def test_a_broken_pipe_is_silent(workdir: Path, line: str) -> None:
    """As after ``| head``; the reader is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "kr2cache.cli", *line.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1
