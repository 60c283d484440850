"""Fusion names: which layers, which weights, and the sum they stand for."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kr2cache.errors import ConfigError, UnknownNameError
from kr2cache.fusion import check_fusion_name, last_layers, parse_fusion, parse_layers


@pytest.mark.parametrize(
    ("name", "layers", "trainable"),
    [
        ("fuse", tuple(range(13)), True),
        ("softmax", tuple(range(13)), True),
        ("mix", tuple(range(13)), True),
        ("all", tuple(range(13)), False),
        ("last1", (12,), False),
        ("last4", (9, 10, 11, 12), False),
        ("last13", tuple(range(13)), False),
        ("layer0", (0,), False),
        ("layer12", (12,), False),
    ],
)
def test_names(name: str, layers: tuple[int, ...], trainable: bool) -> None:
    fusion = parse_fusion(name, 13)
    assert (fusion.name, fusion.layers, fusion.trainable) == (name, layers, trainable)
    assert fusion.weights.dtype == np.float32
    np.testing.assert_allclose(fusion.weights, [1 / len(layers)] * len(layers), rtol=1e-7)


@pytest.mark.parametrize("name", ["last14", "last100"])
def test_more_layers_than_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"asks for {name[4:]} layers, but this model has 13"):
        parse_fusion(name, 13)


def test_a_layer_beyond_the_last() -> None:
    with pytest.raises(ConfigError, match="layer 13, but this resource has layers 0 to 12") as caught:
        parse_fusion("layer13", 13)
    assert "embedding output" in caught.value.remedy


@pytest.mark.parametrize(
    "name",
    [
        *("", "lst4", "last0", "last", "last-1", "layer", "layer1.5", "Fuse", "fused", "all ", "4"),
        *("softmax4", "mixed", "Mix"),
        *("layer04", "layer00", "last04", "layer\uff14", "last1\uff12"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownNameError, match="Unknown fusion") as caught:
        parse_fusion(name, 13)
    assert all(
        part in caught.value.remedy for part in ("fuse", "softmax", "mix", "all", "N from 1 to 13", "N from 0 to 12")
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [("lst4", "last4"), ("LAST4", "last4"), ("Fuse", "fuse"), ("layr12", "layer12"), ("sofmax", "softmax")],
)
def test_the_nearest_name_is_given(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{near}'"):
        check_fusion_name(name, 13)


@pytest.mark.parametrize("name", ["lst9", "last04", "layer", "layer09"])
@pytest.mark.parametrize("model_layers", [None, 1, 4])
def test_only_fusions_that_the_resource_has_are_suggested(name: str, model_layers: int | None) -> None:
    with pytest.raises(UnknownNameError, match="Unknown fusion") as caught:
        check_fusion_name(name, model_layers)
    for suggested in re.findall(r"Did you mean '(\w+)'", caught.value.message):
        assert parse_fusion(suggested, model_layers or 1).name == suggested
    numbers = {int(number) for number in re.findall(r"\d+", caught.value.remedy)}
    assert numbers == ({0, 1} if model_layers is None else {0, 1, model_layers - 1, model_layers})


@given(st.data())
def test_apply_is_the_average_of_its_layers(data: st.DataObject) -> None:
    model_layers = data.draw(st.integers(1, 8))
    name = data.draw(
        st.one_of(
            st.sampled_from(["fuse", "all"]),
            st.integers(1, model_layers).map("last{}".format),
            st.integers(0, model_layers - 1).map("layer{}".format),
        )
    )
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    states = draw.normal(size=(model_layers, data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))))
    states = states.astype(data.draw(st.sampled_from(["float16", "float32"])))
    taken = {"fuse": states, "all": states}.get(name)
    if name.startswith("last"):
        taken = states[-int(name[4:]) :]
    elif name.startswith("layer"):
        taken = states[int(name[5:])][None]
    assert taken is not None
    fusion = parse_fusion(name, model_layers)
    found = fusion.apply(states[list(fusion.layers)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, taken.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_float16_states_are_added_in_float32() -> None:
    # In float16 the sum of these two, 120,000, would be infinite, and 2048 + 1 would be 2048.
    fusion = parse_fusion("last2", 2)
    found = fusion.apply(np.array([[[60_000, 2048]], [[60_000, 1]]], dtype=np.float16))
    np.testing.assert_array_equal(found, [[60_000, 1024.5]])


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("last4", (1, 2, 3, 4)),
        ("last5", (0, 1, 2, 3, 4)),
        ("0", (0,)),
        ("4,0,2", (0, 2, 4)),
        ("3, 1 ,1,3", (1, 3)),
    ],
)
def test_layers_of_extract(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 5) == layers


@pytest.mark.parametrize(
    "text", ["", "last0", "last", "0,,2", "0-3", "-1", "0,2,", "every", "1;2", "last1\uff12", "\uff10,3"]
)
def test_layers_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match="is not understood") as caught:
        parse_layers(text, 5)
    assert "last4" in caught.value.remedy


def test_layers_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="asks for layer 5, but this model has layers 0 to 4"):
        parse_layers("5,0", 5)
    with pytest.raises(ConfigError, match="--layers last6 asks for 6 layers, but this model has 5"):
        parse_layers("last6", 5)


def test_last_layers() -> None:
    assert last_layers(2, 7, "it") == (5, 6)
    with pytest.raises(ConfigError, match="it asks for 8 layers"):
        last_layers(8, 7, "it")
