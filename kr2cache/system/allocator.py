"""Process-wide settings of malloc and of garbage collection."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of these settings in glibc's malloc.h."""


def keep_free_memory() -> None:
    """Make malloc keep freed blocks for later use. By default glibc returns large blocks to the system at once, and the
    next batch causes a page fault for every 4 KB: a tenth of a training step on two cores.

    This changes the whole process, so the command line calls it and a library call does not. ``return_free_memory``
    returns unused blocks now and then. Other C libraries have neither this behaviour nor this setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # blocks outside of the heap are not used again, so allocate none
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap


_returned_at = [time.monotonic()]
"""Time of the last return; at first the start of the program, so that short programs do not return anything."""


def return_free_memory(every_s: float) -> None:
    """Return freed blocks to the system. glibc keeps blocks of sizes that are never needed again, and memory would grow
    with the number of batches and trainings.

    Args:
        every_s: Do nothing if the last return was less than so many seconds ago: allocating returned memory again
            costs 20 to 50 ms.
    """
    now = time.monotonic()
    if now - _returned_at[0] < every_s:
        return
    _returned_at[0] = now
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_modules: list[int] = []
"""Number of imported modules when objects were last set aside; empty outside of such a block."""


@contextlib.contextmanager
def objects_set_aside() -> Iterator[None]:
    """Inside the block, garbage collection looks only at new objects. The objects of torch and transformers cost a
    quarter of a second per collection, and each training has two collections.

    Blocks may be nested, as trainings are in a sweep. An inner block sets objects aside only if modules were imported
    since. If the program has frozen objects itself, the block does nothing.
    """
    outermost = not _modules
    if outermost and gc.get_freeze_count():
        yield
        return
    try:
        if outermost or len(sys.modules) > _modules[0]:
            _modules[:] = [len(sys.modules)]
            gc.collect()
            gc.freeze()
        yield
    finally:
        if outermost:
            _modules.clear()
            gc.unfreeze()
