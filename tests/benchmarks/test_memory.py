"""The benchmark runs: also in small sizes, five times the sentences need the same memory."""

from __future__ import annotations

import pytest
import tiny
from memory import peak_mb

from kr2cache import demo


@pytest.mark.long
def test_memory_does_not_grow_with_the_data() -> None:
    few, many = (peak_mb(tiny.minilm(), demo.corpus(), "udpos", limit) for limit in (50, 270))
    assert few > 100, "a real model was loaded"
    assert many < 1.1 * few
