"""How the threads of a computation wait for each other."""

from __future__ import annotations

import os
import sys

SPINS = 1_000
"""A waiting thread checks this often before it sleeps: for up to 50 microseconds. libgomp's default, 300,000, takes
milliseconds. On idle cores a training takes as long with both (within 2 %). On busy cores a spinning thread takes time
from the thread that it waits for: an epoch took 3 to 10 times as long. Waking a sleeping thread costs 10 microseconds
(AMD EPYC, a virtual machine); five of six waits in a training step end before the thread sleeps."""
BLOCK_MS = 1
"""The same for the OpenMP libraries of LLVM and Intel; their default is 200 ms."""
CHOSEN = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
"""Environment variables with which the user sets how threads wait."""


def bound_spinning() -> None:
    """Make waiting threads of torch on a CPU sleep soon, unless the user's environment sets how they wait.

    This changes the whole process and its children, so only the command line calls it. Call it before torch is
    imported: its OpenMP library reads the environment once.
    """
    if not any(os.environ.get(name) for name in CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        os.environ["KMP_BLOCKTIME"] = str(BLOCK_MS)


def waiting() -> str:
    """How the threads of this process wait, in words."""
    said = [f"{name}={os.environ[name]}" for name in CHOSEN if os.environ.get(name)]
    return ", ".join(said) or "as their library has it"


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
