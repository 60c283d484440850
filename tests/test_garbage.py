"""Collecting garbage looks at new objects alone inside the block, however often it is entered."""

from __future__ import annotations

import gc

from kr2cache.memory import objects_set_aside


def test_objects_are_set_aside_once_and_come_back() -> None:
    before = gc.get_freeze_count()
    with objects_set_aside():
        frozen = gc.get_freeze_count()
        assert frozen > before + 10_000
        new = [[] for _ in range(1_000)]
        with objects_set_aside():
            assert gc.get_freeze_count() == frozen, "what is new stays in sight"
        assert gc.get_freeze_count() == frozen, "the inner block gives nothing back"
        assert len(new) == 1_000
    assert gc.get_freeze_count() < frozen
