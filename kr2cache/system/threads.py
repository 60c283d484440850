"""How the threads of a computation wait for each other."""

from __future__ import annotations

import os

SPINS = 1_000
"""So often a waiting thread looks again before it sleeps: for up to 50 microseconds. libgomp's own 300,000 are
milliseconds. Alone, a training takes as long with either (within 2 %). On busy cores a thread that spins burns the time
that the thread it waits for needs: an epoch took 3 to 10 times as long. To wake a thread that sleeps costs 10
microseconds (AMD EPYC, a virtual machine); five of six waits in a training step are over before it sleeps."""
BLOCK_MS = 1
"""The same for the OpenMP libraries of LLVM and Intel, whose own value is 200 ms."""
CHOSEN = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
"""Variables by which the user says how threads wait."""


def bound_spinning() -> None:
    """Let the threads of torch on a CPU wait asleep, unless the user's environment says how they wait.

    For the whole process and its children, so the command line calls it. It has an effect before torch is loaded: the
    OpenMP library of torch reads the environment once.
    """
    if not any(os.environ.get(name) for name in CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
        os.environ["KMP_BLOCKTIME"] = str(BLOCK_MS)


def waiting() -> str:
    """How the threads of this process wait, in words."""
    said = [f"{name}={os.environ[name]}" for name in CHOSEN if os.environ.get(name)]
    return ", ".join(said) or "as their library has it"
