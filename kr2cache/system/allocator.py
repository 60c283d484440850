"""Memory that is used again: malloc's habits, and collecting garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""As glibc's malloc.h numbers them."""


def keep_free_memory() -> None:
    """Let freed blocks be used again as they are. glibc would give large ones back to the system at once, and the next
    batch would ask for them again with a page fault for every 4 KB: a tenth of a training step on two cores.

    For the whole process, from now on, so the command line calls it and a library call does not.
    ``return_free_memory`` gives back what piles up. Other C libraries do not have the call, nor the habit.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # no block outside of the heap, where it cannot be used again
        mallopt(M_TRIM_THRESHOLD, -1)  # none at all


_returned_at = [time.monotonic()]
"""When it was last done, at first the program's start: what is over sooner has nothing to give back."""


def return_free_memory(every_s: float) -> None:
    """Give freed blocks back to the system: glibc keeps those of shapes that never come again, and memory would grow
    with the number of batches and trainings.

    Args:
        every_s: Do nothing where it was done less than so many seconds ago: what is given back has to be asked for
            again, which costs 20 to 50 ms.
    """
    now = time.monotonic()
    if now - _returned_at[0] < every_s:
        return
    _returned_at[0] = now
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_modules: list[int] = []
"""How many were there when objects were last set aside; empty outside of such a block."""


@contextlib.contextmanager
def objects_set_aside() -> Iterator[None]:
    """Inside the block collecting garbage looks at new objects alone: those that torch and transformers import cost a
    quarter of a second each time, and around every training there are two collections.

    Blocks may lie inside one another, as trainings do inside a sweep: an inner one does nothing unless modules were
    imported since; then their objects are set aside too. A program that set objects aside itself keeps its own.
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
