"""Every architecture of transformers as a resource: its states are transformers', or it is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import try_resource

SOME = {
    "albert": "equal",
    "big_bird": "equal",
    "bloom": "equal",
    "clip": "equal",
    "convbert": "equal",
    "funnel": "refused",
    "gpt_neox": "equal",
    "led": "equal",
    "modernbert": "equal",
    "qwen3": "equal",
    "vit": "refused",
    "xlnet": "equal",
}
"""One of each kind; ``test_table.py`` tries all."""


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_of_each_kind(name: str, tmp_path: Path) -> None:
    outcome = try_resource(name, tmp_path)
    assert outcome.kind == SOME[name], outcome
