"""File systems that a test mounts for itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

READ_ONLY, REMOUNT, BIND = 1, 32, 4096
DETACH = 2
"""Unmount also what something still has open."""


@contextlib.contextmanager
def mounted(folder: Path, kind: str = "tmpfs", options: str = "") -> Iterator[None]:
    """A new file system at ``folder``; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    _mount(kind, folder, kind, 0, options)
    try:
        yield
    finally:
        assert ctypes.CDLL(None).umount2(os.fsencode(folder), DETACH) == 0


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody, not even root, can write to ``folder`` inside the block."""
    _mount(os.fspath(folder), folder, "none", BIND, "")
    try:
        _mount("none", folder, "none", BIND | REMOUNT | READ_ONLY, "")
        yield
    finally:
        assert ctypes.CDLL(None).umount2(os.fsencode(folder), DETACH) == 0


def _mount(source: str, folder: Path, kind: str, flags: int, options: str) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("mounts are made on Linux alone")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), os.fsencode(folder), kind.encode(), flags, options.encode()) != 0:
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
