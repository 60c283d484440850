"""Workers: processes that do one piece of work together.

The workers divide the work themselves: each takes units that no other worker has claimed (``kr2cache.system.claims``).
An engine starts the workers, shows their messages to the user, and replaces a worker that died. When the work ends, no
worker process is left.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

from kr2cache.errors import ConfigError, unknown_name

A = TypeVar("A")
R = TypeVar("R")

ENGINES = {"local": "kr2cache.workers.local", "ray": "kr2cache.workers.ray"}
"""Name to module: ``local`` starts processes on this machine, ``ray`` actors on a Ray cluster."""


def check_engine(engine: str) -> None:
    """Check that an engine exists and is installed.

    Raises:
        UnknownNameError: If there is no such engine.
        ConfigError: If Ray is not installed.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine ray: Ray is not installed.",
            "pip install 'kr2cache[ray]', or give --engine local for this machine.",
        )


def run_workers(
    engine: str,
    count: int,
    work: Callable[[A], R],
    argument: A,
    *,
    watch: Callable[[], int],
    gpus_per_worker: float | None = None,
) -> list[R]:
    """Start workers that each call ``work(argument)``, and wait for them.

    The user sees each message once, even if every worker sends it. A worker that dies is replaced, but only a few times
    before a unit of work is done. On an error or on Ctrl-C, the workers are asked (SIGINT) to finish their current
    batch, and the driver waits for them. A second Ctrl-C ends them at once.

    Args:
        engine: A name in ``ENGINES``.
        count: How many workers.
        work: A function at the top level of a module, so that a worker can import it.
        argument: An object that can be pickled. The workers of one machine share the memory of its arrays.
        watch: Called in this process about every half second and after the last result, to show progress. It returns
            how many units of work are done or given up. An error in it stops the workers and is raised.
        gpus_per_worker: For Ray: GPUs of each worker. 0.5 is half a GPU. None means one GPU if the cluster has GPUs.

    Returns:
        What each worker returned.

    Raises:
        ConfigError: If the engine is not installed.
        WorkerLostError: If too many workers die.
        KeyboardInterrupt: On Ctrl-C.
        Exception: The first error of a worker. If it was not expected, its ``__notes__`` hold the traceback.
    """
    check_engine(engine)
    module: Any = importlib.import_module(ENGINES[engine])
    results: list[R] = module.run(count, work, argument, watch=watch, gpus_per_worker=gpus_per_worker)
    return results
