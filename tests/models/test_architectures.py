"""Every architecture of transformers as a resource: its states are transformers', or it is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import NAMES, UNTRIED, try_resource

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
"""One of each kind, for every run of the tests."""


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_of_each_kind(name: str, tmp_path: Path) -> None:
    outcome = try_resource(name, tmp_path)
    assert outcome.kind == SOME[name], outcome


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_serves_or_is_refused_in_words(name: str, tmp_path: Path) -> None:
    outcome = try_resource(name, tmp_path)
    assert outcome.kind in ("equal", "refused", *(["untried"] if name in UNTRIED else [])), outcome
