"""Processes that are limited or killed, and system calls that are looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

# Stores a cache, its shards made before or not, where no file may grow past so many bytes.
LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny_cache
from kr2cache.cache import create
from kr2cache.errors import DiskSpaceError

folder, limit, created = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "created"
truth = tiny_cache.make((40, 60, 50), width=64)
if created:
    tiny_cache.create_shards(folder, truth.header, truth.index, 2**30)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    tiny_cache.store(folder, truth)
except DiskSpaceError as error:
    print("DiskSpaceError", error)
else:
    print("written")
"""


def run_python(program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def traced(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[Any, ...]]:
    """The calls of these functions of ``os``, with their arguments; they still do their work."""
    calls: list[tuple[Any, ...]] = []

    def follow(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, *(bytes(a) if isinstance(a, memoryview) else a for a in arguments)))
            return real(*arguments, **options)

        return call

    for name in names:
        monkeypatch.setattr(os, name, follow(name, getattr(os, name)))
    return calls
