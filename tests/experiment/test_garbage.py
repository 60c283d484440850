"""Memory that is freed: inside the block, garbage collection looks only at new objects; large blocks are reused."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import types
import weakref
from collections.abc import Callable

import pytest

from kr2cache.system.allocator import objects_set_aside

pytestmark = pytest.mark.usefixtures("nothing_set_aside")


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that adds a module, as an import does."""

    def add() -> None:
        monkeypatch.setitem(sys.modules, "a_module_of_this_test", types.ModuleType("a_module_of_this_test"))

    return add


def test_objects_are_set_aside_again_after_imports_and_come_back(imported: Callable[[], None]) -> None:
    before = gc.get_freeze_count()
    with objects_set_aside():
        frozen = gc.get_freeze_count()
        assert frozen > before + 10_000
        new = [[] for _ in range(1_000)]
        with objects_set_aside():
            assert gc.get_freeze_count() <= frozen, "new objects are still collected"
        assert gc.get_freeze_count() > before + 10_000, "the inner block gives nothing back"
        imported()
        with objects_set_aside():
            assert gc.get_freeze_count() >= frozen + len(new), "modules were imported since"
        frozen = gc.get_freeze_count()
        newer = [[] for _ in range(1_000)]
        with objects_set_aside():
            assert gc.get_freeze_count() == frozen
        assert len(newer) == 1_000
    assert gc.get_freeze_count() <= before
    with objects_set_aside():
        assert gc.get_freeze_count() > before, "the next outermost block starts from the beginning"
    assert gc.get_freeze_count() <= before


class Ring:
    """Refers to itself, so only a garbage collection frees it."""

    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_and_what_is_set_aside_comes_back(imported: Callable[[], None]) -> None:
    gc.disable()
    try:
        with objects_set_aside():
            with objects_set_aside():
                dropped, kept = weakref.ref(Ring()), Ring()
            assert dropped() is not None
            imported()
            with objects_set_aside():
                assert dropped() is None, "collected before the rest was set aside"
            later = weakref.ref(kept)
            del kept
            gc.collect()
            assert later() is not None, "set aside: no collection sees it"
        gc.collect()
        assert later() is None
    finally:
        gc.enable()


CHURN = """
import ctypes
import resource
import torch
from kr2cache.system.allocator import keep_free_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault for every page, whatever the system's setting
keep_free_memory()
for turn in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batch = [torch.ones(12_000_000), *(torch.ones(1_500_000) for _ in range(20))]
    del batch
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if turn == 0:
        print(faults)
print(faults)
"""


def faults() -> list[int]:
    """Page faults of the first and of the last of ten batches. A batch allocates one block as large as an embedding's
    gradient, and many blocks as large as states.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", CHURN], env=environment, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another habit")
def test_the_memory_of_a_batch_is_the_memory_of_the_next() -> None:
    first, last = faults()
    pages = (12_000_000 + 20 * 1_500_000) * 4 // os.sysconf("SC_PAGE_SIZE")
    assert first > 0.8 * pages
    assert last < first / 40
