"""A library call leaves the process as it was; the command line sets what makes it fast."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from malloc import GLIBC, large_blocks_are_mapped
from transformers.utils import logging as transformers_logging
from world import World

from kr2cache.errors import DataError
from kr2cache.prediction.predict import Predictor
from kr2cache.system import hub
from kr2cache.system.allocator import objects_set_aside
from kr2cache.tasks import find_task


def process_state() -> dict[str, Any]:
    backends: Any = torch.backends
    loggers = {
        name: one.level for name, one in logging.root.manager.loggerDict.items() if isinstance(one, logging.Logger)
    }
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "loggers": {name: level for name, level in loggers.items() if level != logging.NOTSET},
        "root logger": (logging.root.level, logging.root.manager.disable, len(logging.root.handlers)),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
        ),
        "precision": (torch.get_default_dtype(), torch.get_float32_matmul_precision(), backends.fp32_precision),
        "gradients": torch.is_grad_enabled(),
        "transformers": (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()),
        "offline": (datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE),
        "data sets": datasets.are_progress_bars_disabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "garbage": (gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()),
        "chance": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
        "folder": Path.cwd(),
        "malloc": large_blocks_are_mapped(),
    }


@pytest.mark.usefixtures("nothing_set_aside")
def test_library_calls_leave_the_process_as_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "unreachable", lambda: "no network (asked by a test)")
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    before = process_state()
    assert before["malloc"] is not False

    world.extract()
    assert process_state() == before

    settings = {"full_determinism": True, "log_level": "info", "bf16": True}
    result = world.train(epochs=1.0, training=settings)
    assert process_state() == before

    Predictor.load(result.runs[0].folder, device="cpu", models={"res": {"path": str(world.resource)}})
    assert process_state() == before

    with pytest.raises(DataError, match="cannot be loaded"):
        find_task("snli").read("train", None, None)
    assert process_state() == before


@pytest.mark.usefixtures("nothing_set_aside")
def test_objects_that_a_program_set_aside_stay_aside() -> None:
    gc.collect()
    gc.freeze()
    try:
        with objects_set_aside():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.skipif(not GLIBC, reason="another C library has another habit")
def test_the_command_line_keeps_freed_memory() -> None:
    code = """
import sys
from malloc import large_blocks_are_mapped
from kr2cache import cli
assert large_blocks_are_mapped()
sys.argv = ["kr2cache", "--version"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
assert not large_blocks_are_mapped()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
