"""How much memory there is and how much a piece of work takes; aligned arrays."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.system.allocator import return_free_memory

MEMBERSHIP, MOUNTS = Path("/proc/self/cgroup"), Path("/proc/self/mountinfo")
LIMITS = {
    1: [("memory.limit_in_bytes", "memory.usage_in_bytes")],
    2: [("memory.max", "memory.current"), ("memory.high", "memory.current")],
}
"""By version of control groups: file names of the limit and of the memory in use."""


@dataclass(frozen=True)
class _Limit:
    """The memory limit of a control group of this process (Linux). A batch job or a container may use far less memory
    than the computer has, and is killed if it uses more.
    """

    bytes: int
    use: Path
    """The file with the memory in use."""

    def left(self) -> int:
        """Bytes that are left; the whole limit if the memory in use is unknown."""
        try:
            return max(0, self.bytes - max(0, int(self.use.read_text()) - self._given_up()))
        except (OSError, ValueError):
            return self.bytes

    def _given_up(self) -> int:
        """Bytes that count as used but are freed on demand, such as pages of files; 0 if unknown."""
        try:
            lines = self.use.with_name("memory.stat").read_text().splitlines()
            numbers = {name: int(number) for name, number in (line.split() for line in lines)}
        except (OSError, ValueError):
            return 0
        prefix = "total_" if "total_inactive_file" in numbers else ""  # version 1: includes the groups below
        names = (f"{prefix}inactive_file", f"{prefix}active_file", "slab_reclaimable")
        return sum(numbers.get(name, 0) for name in names)


def free_memory() -> int:
    """Bytes that this process may still take, including pages of files that are freed on demand. If the system does not
    report it, a low guess.
    """
    return min([_free_memory_of_computer(), *(limit.left() for limit in _limits())])


def total_memory() -> int:
    """Bytes that this process may take if no other process runs. If the system does not report it, a low guess."""
    return min([_memory_of_computer(), *(limit.bytes for limit in _limits())])


def _free_memory_of_computer() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not report it
        return 4 * 2**30


def _memory_of_computer() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 8 * 2**30


def _limits() -> Iterator[_Limit]:
    """The limits of all control groups that count this process's memory: its own and the groups above."""
    names = dict(_names())
    for version, mounted, top in _hierarchies():
        if version not in names:
            continue
        # A container may see the host's names; the mounted folder is the group ``top`` of the host.
        inside = os.path.relpath(names[version], top)
        own = mounted if inside.startswith("..") else mounted / inside
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(mounted))):
            for limit, use in LIMITS[version]:
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
                    yield _Limit(int((folder / limit).read_text()), folder / use)


def _names() -> Iterator[tuple[int, str]]:
    """(version, name) of the control groups that count this process's memory."""
    for line in _lines(MEMBERSHIP):
        _, controllers, name = (*line.split(":", 2), "", "")[:3]
        if name.startswith("/") and (not controllers or "memory" in controllers.split(",")):
            yield 1 if controllers else 2, name


def _hierarchies() -> Iterator[tuple[int, Path, str]]:
    """(version, folder, top group) of each mount of control groups that count memory."""
    for line in _lines(MOUNTS):
        place, _, kind = line.partition(" - ")
        fields, (system, *_, options) = place.split(), (*kind.split(), "", "")[:3]
        version = 2 if system == "cgroup2" else 1 if system == "cgroup" and "memory" in options.split(",") else 0
        if version and len(fields) > 4:
            yield version, Path(fields[4]), fields[3]


def _lines(path: Path) -> list[str]:
    try:
        return os.fsdecode(path.read_bytes()).split("\n")
    except OSError:  # not Linux
        return []


CACHE_LINE = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array that starts at a cache line, as a mapped file does. NumPy's arrays start 16 bytes after a
    cache line, and unaligned copies take up to 1.5 times as long.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + CACHE_LINE, dtype=np.uint8)
    start = -memory.__array_interface__["data"][0] % CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def peak_of(work: Callable[[], object]) -> int | None:
    """Run ``work``, and return by how many bytes the process's resident memory (with mapped files) rose at most. None
    if the system does not report it.
    """
    try:
        return_free_memory(every_s=0)  # kept memory of earlier work would hide the rise
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
    except OSError:
        work()
        return None
    work()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
