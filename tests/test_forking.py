"""A forked Python program is as a new one, to those who start it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forking import ForkedPython

SAYS_ALL = """
import os, sys
print(sys.argv, os.getcwd(), sorted(os.environ.items()), sys.stdin.read(), __name__, os.getsid(0) == os.getpid())
print(sorted(os.path.exists(f"/dev/fd/{number}") for number in range(3)), file=sys.stderr)
"""
ENDS = {
    "well": "pass",
    "with a code": "import sys; sys.exit(7)",
    "with words": "import sys; sys.exit('words')",
    "with an error": "1 / 0",
    "by Ctrl-C": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "at once": "import os; os._exit(3)",
}


def test_a_fork_gets_what_a_program_gets(tmp_path: Path) -> None:
    said = []
    for kind in (subprocess.Popen, ForkedPython):
        with kind(
            [sys.executable, "-P", "-X", "faulthandler", "-c", SAYS_ALL, "a", "b"],
            cwd=tmp_path,
            env={"LC_CTYPE": "C.UTF-8", "one": "two"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            said.append(process.communicate("given"))
    assert said[0] == said[1]
    assert "given" in said[0][0]


@pytest.mark.parametrize("how", ENDS)
def test_a_fork_ends_as_a_program_ends(how: str) -> None:
    ended = []
    for kind in (subprocess.Popen, ForkedPython):
        with kind(
            [sys.executable, "-c", ENDS[how]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            out, errors = process.communicate()
        ended.append((process.returncode, out, errors.splitlines()[-1:]))
    assert ended[0] == ended[1]
    assert how != "by Ctrl-C" or ended[0][0] == -signal.SIGINT


def test_a_module_runs_as_the_main_one_and_other_commands_start_as_ever() -> None:
    command = [sys.executable, "-m", "kr2cache.cli", "--version"]
    with ForkedPython(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == subprocess.run(command, capture_output=True, text=True, check=True).stdout
    with ForkedPython(["echo", "here"], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == "here\n"


def test_a_fork_holds_no_pipe_of_its_parent_open() -> None:
    """Else whoever reads from a process that ended would wait for its sisters."""
    waiting = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with ForkedPython(waiting, stdin=subprocess.PIPE) as first, ForkedPython(waiting, stdin=subprocess.PIPE):
        assert first.stdin is not None
        first.stdin.close()
        assert first.wait(60) == 0
