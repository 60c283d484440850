"""State of the whole process that a library call must leave unchanged."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def process_unchanged() -> Iterator[None]:
    """Restore after the block: environment variables, random states, torch's settings for deterministic algorithms and
    for the precision of matrix products, and the verbosity of transformers.

    transformers' Trainer changes them, and so does importing scikit-learn. Changes that other threads make during the
    block are undone too.
    """
    import numpy as np
    import torch
    from transformers.utils import logging

    environment = dict(os.environ)
    python, numbers, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    backends: Any = torch.backends
    precision = getattr(backends, "fp32_precision", None)  # since torch 2.9
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()  # type: ignore[no-untyped-call]
        if precision is not None:
            backends.fp32_precision = precision
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)
        torch.set_rng_state(tensors)
        np.random.set_state(numbers)
        random.setstate(python)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
