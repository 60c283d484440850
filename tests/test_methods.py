"""The table of methods, against the design's description of each."""

import pytest

from kr2cache.config import TrainConfig
from kr2cache.methods import METHODS, PLAIN_METHODS


@pytest.mark.parametrize(
    ("method", "trained", "frozen"),
    [
        ("kreader", "B", None),
        ("kresource", "A", None),
        ("kreader2", "B", "B"),
        ("kr2", "B", "A"),
        ("kd", "B", None),
    ],
)
def test_each_method_trains_and_freezes_its_models(method: str, trained: str, frozen: str | None) -> None:
    config = TrainConfig(task="udpos-de", reader="B", resource="A", method=method)
    assert (config.trained_model, config.frozen_models) == (trained, (frozen,) if frozen else ())


def test_what_methods_need() -> None:
    assert PLAIN_METHODS == ("kreader", "kresource")
    assert [name for name, method in METHODS.items() if method.needs_resource] == ["kresource", "kr2"]
    assert [name for name, method in METHODS.items() if method.needs_teacher] == ["kd"]


@pytest.mark.parametrize("name", METHODS)
def test_the_title_of_a_method_uses_fields_of_the_settings(name: str) -> None:
    config = TrainConfig(task="udpos-de", reader="B", resource="A", teacher="T", method=name)
    assert METHODS[name].title.format_map(vars(config)).isprintable()
