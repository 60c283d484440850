"""What malloc does now. Little is imported here: a child process asks too."""

from __future__ import annotations

import ctypes
import platform

import numpy as np

GLIBC = platform.libc_ver()[0] == "glibc"
LARGE = 2**30
"""Bytes. By default glibc maps a block of this size on its own, and gives it back when it is freed."""


class MallInfo(ctypes.Structure):
    """``mallinfo2`` of malloc.h."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


def large_blocks_are_mapped() -> bool | None:
    """Whether malloc maps large blocks on their own, as it does unless it was told otherwise."""
    if not GLIBC:
        return None
    information = ctypes.CDLL(None).mallinfo2
    information.restype = MallInfo
    before = information().hblks
    block = np.empty(LARGE, dtype=np.uint8)  # never written to: it costs nothing
    mapped = bool(information().hblks > before)
    del block
    return mapped
