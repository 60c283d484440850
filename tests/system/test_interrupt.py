"""Ctrl-C and broken pipes at any moment of the command line, in real processes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kr2cache.cli import run
from kr2cache.system import interrupt

AT_AN_IMPORT = """
import os, signal, sys
_, module, how, number, *sys.argv[1:] = sys.argv
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), int(number))
            except KeyboardInterrupt:
                if how == "hidden":
                    raise ImportError("initialization failed")
                if how == "raised":
                    raise
sys.meta_path.insert(0, CtrlC())
from kr2cache.cli import main
main()
"""


def interrupted(
    module: str, line: str, how: str = "raised", number: signal.Signals = signal.SIGINT
) -> subprocess.CompletedProcess[str]:
    """Run ``kr2cache LINE`` as the console script does, with a signal at the moment when ``module`` is imported.

    Args:
        how: What the import does with a KeyboardInterrupt: it is ``raised``, ``hidden`` by another error of its own,
            as extension modules do, or ``swallowed``.
    """
    return subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, module, how, str(int(number)), *shlex.split(line)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


LOADING = "Loading PyTorch and transformers ..."
SAID = "Interrupted. Complete work is kept.\nRun the same command again.\n"


@pytest.mark.parametrize(
    ("module", "how"),
    [
        *(("kr2cache.system.interrupt", "raised"), ("kr2cache.commands.app", "raised")),
        *(("typer", "raised"), ("rich.console", "hidden")),
    ],
)
def test_ctrl_c_while_the_command_line_is_imported(workdir: Path, module: str, how: str) -> None:
    done = interrupted(module, "models", how)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr == ("" if module == "kr2cache.system.interrupt" else SAID)


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
    row = '[[rows]]\nname = "Y"\nmethod = "kreader"\nreader = "model"\ndata = "corpus"\n'
    (workdir / "grid.toml").write_text(f'[[columns]]\nname = "X"\ntask = "udpos"\n{row}')
    (workdir / "runs").mkdir()
    of_a_run = {"config": {"task": "udpos", "method": "kreader", "reader": "bert", "seed": 1}, "recorded": {}}
    (workdir / "runs" / "config.json").write_text(json.dumps(of_a_run), "utf-8")
    # torch's C++ code may abort on a KeyboardInterrupt, or lose it: none is raised meanwhile.
    done = interrupted("torch", COMMANDS[command], "swallowed")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"{LOADING}\n{SAID}", "said before the seconds that torch takes"


@pytest.mark.parametrize(("module", "how"), [("rich.console", "hidden"), ("torch", "swallowed")])
def test_sigterm_is_said_and_has_an_exit_code_of_its_own(workdir: Path, module: str, how: str) -> None:
    done = interrupted(module, "demo", how, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (143, "")
    said = "Stopped by SIGTERM. Complete work is kept.\nRun the same command again.\n"
    assert done.stderr == (f"{LOADING}\n{said}" if module == "torch" else said)


def test_ctrl_c_under_json_is_one_document(workdir: Path) -> None:
    done = interrupted("torch", "demo --json")
    assert (done.returncode, done.stderr) == (130, f"{LOADING}\n")
    assert json.loads(done.stdout)["error"] == {
        "type": "InterruptedWorkError",
        "message": "Interrupted. Complete work is kept.",
        "remedy": "Run the same command again.",
    }


def test_a_terminal_shows_a_spinner_while_torch_is_imported(workdir: Path) -> None:
    terminal, shown = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", AT_AN_IMPORT, "torch", "raised", "2", "demo"], stdin=shown, stdout=shown, stderr=shown
    ) as process:
        os.close(shown)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says so that the other end was closed
            while part := os.read(terminal, 10_000):
                seen += part
    os.close(terminal)
    assert process.returncode == 130
    text = seen.decode("utf-8")
    assert re.search(rf"[\u2800-\u28ff]\S* {re.escape(LOADING)}", text), "a frame of the spinner beside it"
    assert text.index(LOADING) < text.index("Interrupted.")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


WRONG = (
    "extract --resource gotbert --task udpos",
    "extract --resource model --task udpos-dee",
    "extract --resource model --task udpos --data ./nowhere",
    "extract --resource model --task udpos --data .",
    "extract --resource model --task udpos --data corpus --split tarin",
    "extract --resource model --task udpos --data corpus --dtype float61",
    "extract --resource model --task udpos --data corpus --compute-dtype float61",
    "extract --resource model --task udpos --data corpus --device cdua",
    "extract --resource model --task udpos --data corpus --layers some",
    "extract --resource model --task udpos --data corpus --layers 9",
    "extract --resource beto --task udpos --data corpus",
    "extract --resource empty --task udpos --data corpus",
    "train --resource gotbert --task udpos",
    "train --resource model --reader gotbert --task udpos",
    "train --resource model --reader model --task udpos --data ./nowhere",
    "train --resource model --reader model --task udpos --data .",
    "train --resource model --reader model --task udpos --data corpus --fusion lst4",
    "train --resource model --reader model --task udpos --data corpus --fusion layer9",
    "train --resource model --reader model --task udpos --data corpus --method kr",
    "train --resource model --reader model --task udpos --data corpus --projection pml",
    "train --resource model --reader model --task udpos --data corpus --device cdua",
    "train --resource model --reader model --task udpos --data corpus --method kd",
    "train --resource model --reader model --task udpos --data corpus --method kd --teacher nope",
    "train --resource model --reader model --task udpos --data corpus --seeds -1",
    "train --resource beto --reader model --task udpos --data corpus",
    "predict --run nowhere das",
    "predict --run nowhere --device cdua das",
    "bench --resource nope",
    "bench --device cdua",
    "demo --device cdua",
    "cache repair nowhere",
    "sweep grid.toml",
)


def test_names_paths_and_options_are_checked_before_torch_is_imported(workdir: Path, bert: Path, corpus: Path) -> None:
    (workdir / "model").symlink_to(bert)
    (workdir / "corpus").symlink_to(corpus)
    (workdir / "empty").mkdir()
    settings = 'settings = {task = "udpos", data = "corpus", reader = "model", resource = "model"}'
    row = '[[rows]]\nname = "KR2"\nmethod = "KR2"\n[[columns]]\nname = "X"\n'
    (workdir / "grid.toml").write_text(f"{settings}\n{row}", "utf-8")
    code = (
        "import sys\nfrom kr2cache.cli import run\n"
        "codes = [run(line.split()) for line in sys.argv[1:]]\n"
        "print(set(codes), {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *WRONG], capture_output=True, text=True, check=True)
    assert done.stdout == "{1} set()\n"
    assert LOADING not in done.stderr
    assert len(re.findall(r"^\w+Error: ", done.stderr, flags=re.MULTILINE)) == len(WRONG)


IN_A_DESTRUCTOR = """
import os, signal, sys, time
from kr2cache.system import interrupt
class Gone:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000):
            pass
class Broken:
    def __del__(self):
        raise ValueError("its own")
interrupt.listen()
Broken()
try:
    Gone()
    time.sleep(60)
except KeyboardInterrupt:
    print(interrupt.exit_code())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_destructor_is_not_lost(number: signal.Signals, code: int) -> None:
    program = [sys.executable, "-c", IN_A_DESTRUCTOR, str(int(number))]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout == f"{code}\n"
    assert "ValueError: its own" in done.stderr
    assert "KeyboardInterrupt" not in done.stderr


IGNORED_BY_A_LIBRARY = """
import os, signal, sys
from kr2cache.system import interrupt
def ignoring():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
    except:
        pass
interrupt.listen()
ignoring()
try:
    with interrupt.interrupt_between_batches():
        print("a batch")
except KeyboardInterrupt:
    print(interrupt.exit_code())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_ignored_is_not_lost(number: signal.Signals, code: int) -> None:
    program = [sys.executable, "-c", IGNORED_BY_A_LIBRARY, str(int(number))]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=50)
    assert (done.stdout, done.stderr) == (f"{code}\n", "")


def test_an_error_that_was_foreseen_is_not_taken_for_ctrl_c(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interrupt, "_received", [signal.SIGINT])
    assert run(["extract", "--resource", "gotbert", "--task", "udpos"]) == 1
    assert "'gotbert'" in capsys.readouterr().err


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
