"""How threads wait: chosen by the command line, unless the user chose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kr2cache.system.threads import BLOCK_MS, CHOSEN, SPINS, bound_spinning, waiting

CODE = """
import sys
from kr2cache import cli
sys.argv = ["kr2cache", "--version"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
import torch
"""


@pytest.mark.skipif(" OpenMP" not in f" {torch.__config__.parallel_info()}", reason="torch without OpenMP")
@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP library")
def test_torchs_threads_wait_as_the_command_line_says() -> None:
    """libgomp prints the settings that it read when it was loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    spins = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert spins
    assert all(f"'{SPINS}'" in line for line in spins)


OURS = f"GOMP_SPINCOUNT={SPINS}, KMP_BLOCKTIME={BLOCK_MS}"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, OURS),
        ({"GOMP_SPINCOUNT": ""}, OURS),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT=7"),
        ({"KMP_BLOCKTIME": "0"}, "KMP_BLOCKTIME=0"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"),
    ],
)
def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], expected: str) -> None:
    for name in CHOSEN:
        monkeypatch.setenv(name, chosen.get(name, ""))  # so that what the test sets is taken back
    bound_spinning()
    assert waiting() == expected


def test_a_program_that_sets_nothing_leaves_it_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    assert waiting() == "as their library has it"
