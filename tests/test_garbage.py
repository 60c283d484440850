"""Collecting garbage looks at new objects alone inside the block, however often it is entered."""

from __future__ import annotations

import gc
import weakref

from kr2cache.memory import objects_set_aside


def test_objects_are_set_aside_twice_at_most_and_come_back() -> None:
    before = gc.get_freeze_count()
    with objects_set_aside():
        frozen = gc.get_freeze_count()
        assert frozen > before + 10_000
        new = [[] for _ in range(1_000)]
        with objects_set_aside():
            assert gc.get_freeze_count() == frozen, "what is new stays in sight"
        assert gc.get_freeze_count() == frozen, "the inner block gives nothing back"
        with objects_set_aside():
            assert gc.get_freeze_count() >= frozen + len(new), "what the first inner block loaded is set aside too"
        frozen = gc.get_freeze_count()
        newer = [[] for _ in range(1_000)]
        with objects_set_aside():
            assert gc.get_freeze_count() == frozen, "what later ones made stays in sight"
        assert len(newer) == 1_000
    assert gc.get_freeze_count() <= before
    with objects_set_aside():
        assert gc.get_freeze_count() > before, "the next outermost block begins anew"
    assert gc.get_freeze_count() <= before


def test_garbage_of_the_blocks_is_collected() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me = self

    with objects_set_aside():
        rings = []
        for _ in range(4):
            with objects_set_aside():
                ring = Ring()
                rings.append(weakref.ref(ring))
                del ring
                gc.collect()
                assert rings[-1]() is None
