"""Caches made from caches: they hold what an extraction of their own would hold, and nothing that is not sound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_cache
from numpy.typing import NDArray
from world import World, count_resource_batches, predictions, read_only

from kr2cache import FeatureCache
from kr2cache.cache.check import check_cache
from kr2cache.errors import CacheError, ConfigError, DiskSpaceError, UnknownNameError
from kr2cache.experiment import stored_fusion
from kr2cache.extraction.extract import ExtractResult
from kr2cache.store import derive, provenance
from kr2cache.training import features

LOOKS = 9
"""Passes that look at a model before a cache of it is made: at its shapes, and whether it repeats itself."""


def states_of(cache: FeatureCache) -> dict[str, NDArray[np.floating]]:
    return {name: np.array(cache[name]) for name in cache.ids}


def slice_of(result: ExtractResult, **options: object) -> FeatureCache:
    plan = derive.plan_slice(FeatureCache.open(result.cache), **options)  # type: ignore[arg-type]
    return FeatureCache.open(derive.derive(plan).cache)


def fusion_of(result: ExtractResult, name: str, **options: object) -> FeatureCache:
    plan = derive.plan_fusion(FeatureCache.open(result.cache), name, **options)  # type: ignore[arg-type]
    return FeatureCache.open(derive.derive(plan).cache)


def assert_sound(cache: FeatureCache) -> None:
    assert check_cache(cache.folder).intact
    assert provenance.contradictions(cache) == []


# Slices ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("layers", "kept"), [("last2", [3, 4]), ("0,3", [0, 3]), ("2", [2])])
def test_fewer_layers_are_those_layers(world: World, dtype: str, layers: str, kept: list[int]) -> None:
    whole = world.extract(dtype=dtype)
    cut = slice_of(whole, layers=layers)
    cache = FeatureCache.open(whole.cache)
    assert list(cut.layers) == kept
    assert cut.ids == cache.ids
    for name in cache.ids:
        np.testing.assert_array_equal(cut[name], cache[name][kept], strict=True)
    own = world.extract(dtype=dtype, layers=layers, cache_dir=world.folder / "other")
    assert cut.folder.name == own.cache.name, "it is the cache that an extraction of its own would make"
    assert_sound(cut)


def test_fewer_sequences_keep_their_order(world: World, tmp_path: Path) -> None:
    whole = world.extract()
    cache = FeatureCache.open(whole.cache)
    first = slice_of(whole, limit=5)
    assert first.ids == cache.ids[:5]
    chosen = slice_of(whole, ids=["train-s9", "train-s2", "train-s9"], layers="last4", cache_dir=tmp_path / "elsewhere")
    assert chosen.ids == ["train-s2", "train-s9"]
    np.testing.assert_array_equal(chosen["train-s9"], cache["train-s9"][1:])
    assert chosen.folder.is_relative_to(tmp_path / "elsewhere")
    own = world.extract(limit=5, cache_dir=world.folder / "other")
    assert first.folder.name == own.cache.name
    assert states_of(first).keys() == states_of(FeatureCache.open(own.cache)).keys()
    for one in (first, chosen):
        assert_sound(one)


def test_an_example_stands_for_its_choices(tmp_path: Path) -> None:
    truth = tiny_cache.make((3, 1, 5, 2), ids=["a#0", "a#1", "b#0", "c#x"])
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    assert derive._positions(cache, None, ["a", "c#x"]).tolist() == [0, 1, 3]
    assert derive._positions(cache, None, ["a#1"]).tolist() == [1]
    with pytest.raises(ConfigError, match="holds no 'c'"):
        derive._positions(cache, None, ["c"])


def test_int8_of_float16_is_what_the_formula_says(world: World) -> None:
    whole = world.extract()
    small = slice_of(whole, dtype="int8")
    cache = FeatureCache.open(whole.cache)
    for name in cache.ids:
        exact = cache[name].astype(np.float64)
        scale = np.abs(exact).max(axis=2, keepdims=True) / 127
        steps = small[name] / scale
        np.testing.assert_allclose(steps, np.round(steps), rtol=0, atol=1e-4)
        assert (np.abs(small[name] - exact) <= 0.5001 * scale).all(), "the nearest step"
    assert small.stored_bytes < 0.65 * cache.stored_bytes
    assert small.provenance["recorded"]["converted_from"] == "float16"
    assert_sound(small)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_numpy_rounds_as_the_extraction_does(world: World, dtype: str) -> None:
    """From float32, so that nothing was rounded before: the same bits as an extraction to that dtype."""
    converted = slice_of(world.extract(dtype="float32"), dtype=dtype)
    direct = FeatureCache.open(world.extract(dtype=dtype, cache_dir=world.folder / "other").cache)
    for position in range(len(direct)):
        for ours, theirs in zip(converted.stored(position), direct.stored(position), strict=True):
            if ours is not None and theirs is not None:
                np.testing.assert_array_equal(ours, theirs, strict=True)


def test_a_slice_of_an_earlier_format_version_stays_as_it_is(world: World) -> None:
    """The header of a new slice would have the present version, which is no reason to make the old slice again."""
    plan = derive.plan_slice(FeatureCache.open(world.extract().cache), layers="2")
    made = derive.derive(plan)
    before = {path.name: path.read_bytes() for path in made.cache.iterdir()}
    assert not derive.derive(replace(plan, header=replace(plan.header, format_version=2))).made
    assert {path.name: path.read_bytes() for path in made.cache.iterdir()} == before


def test_what_cannot_be_sliced_is_said(world: World) -> None:
    result = world.extract(layers="last2", dtype="int8")
    cache = FeatureCache.open(result.cache)
    for options, message in (
        ({"layers": "0"}, "does not hold layer 0; it holds 3, 4"),
        ({"dtype": "float16"}, "float16 cannot restore what it rounded away"),
        ({"limit": 0}, "keeps no sequence"),
        ({"ids": ["nobody"]}, "holds no 'nobody'"),
        ({"ids": []}, "The list of ids is empty"),
        ({}, "as it is"),
    ):
        with pytest.raises(ConfigError, match=message):
            derive.plan_slice(cache, **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError):
        derive.plan_slice(cache, dtype="float8")


def test_an_unfinished_or_damaged_source_is_not_copied(world: World) -> None:
    result = world.extract()
    (shard,) = result.cache.glob("*.h5")
    content = bytearray(shard.read_bytes())
    at = tiny_cache.byte_offset(shard, "hidden")
    content[at + 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=r"states of 'train-s1' .* do not match their checksum"):
        slice_of(result, layers="last2")
    with h5py.File(shard, "r+") as file:
        file["examples/complete"][4] = 0
    with pytest.raises(CacheError, match=r"1 of the 12 sequences .* not complete"):
        slice_of(result, layers="last2")
    assert slice_of(result, layers="last2", ids=["train-s2", "train-s3"]).ids == ["train-s2", "train-s3"]


def test_the_disk_is_asked_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    result = world.extract()
    monkeypatch.setattr(derive, "free_bytes", lambda _: 10)
    before = sorted(world.caches.rglob("*"))
    with pytest.raises(DiskSpaceError, match=r"take .* has 10 B free"):
        slice_of(result, layers="last2")
    assert [path for path in sorted(world.caches.rglob("*")) if path.is_file()] == [p for p in before if p.is_file()]


# Fusions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_a_stored_fusion_is_the_mean_of_its_layers(world: World, dtype: str) -> None:
    whole = world.extract(dtype=dtype)
    fused = fusion_of(whole, "last4")
    cache = FeatureCache.open(whole.cache)
    tolerance = {"float16": 1e-3, "float32": 1e-6, "bfloat16": 1e-2, "int8": 2e-2}[dtype]
    for name in cache.ids:
        expected = cache[name][1:].astype(np.float64).mean(axis=0)
        assert fused[name].shape == (1, *expected.shape)
        np.testing.assert_allclose(fused[name][0], expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert fused.fusion == {"layers": [1, 2, 3, 4], "weights": [0.25] * 4}
    assert fused.stored_bytes * 5 == cache.stored_bytes
    assert_sound(fused)


def test_a_fusion_is_no_layer(world: World) -> None:
    fused = fusion_of(world.extract(), "all")
    with pytest.raises(ConfigError, match="holds one fusion of layers 0, 1, 2, 3, 4, no layers"):
        fused.states(0, [4])
    with pytest.raises(ConfigError, match="holds a fusion already"):
        derive.plan_fusion(fused, "last2")
    with pytest.raises(ConfigError, match="no layers to choose from"):
        derive.plan_slice(fused, layers="4")
    few = derive.derive(derive.plan_slice(fused, limit=3))
    assert FeatureCache.open(few.cache).fusion == fused.fusion
    np.testing.assert_array_equal(FeatureCache.open(few.cache)["train-s2"], fused["train-s2"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("fuse", "trainable"), ("layer3", "is one layer"), ("last1", "is one layer"), ("last9", "has 5")],
)
def test_what_cannot_be_fused_is_said(world: World, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fusion_of(world.extract(), name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_training_on_a_stored_fusion_gives_the_same_run(
    world: World, make: Callable[[Path], World], tmp_path: Path, dtype: str
) -> None:
    """Only the fused caches are there; every prediction, metric and loss is that of the layers."""
    layers = world.train(dtype=dtype)
    other = make(tmp_path / "fused")
    for split in ("train", "dev", "test"):
        result = other.extract(split, dtype=dtype)
        fusion_of(result, "last4")
        shutil.rmtree(result.cache)
    with count_resource_batches() as batches:
        fused = other.train(dtype=dtype, extract=False)
    assert batches == []
    assert [run.folder.name for run in fused.runs] == [run.folder.name for run in layers.runs]
    for ours, theirs in zip(fused.runs, layers.runs, strict=True):
        assert ours.folder.parent.name == theirs.folder.parent.name, "the same run by its configuration"
        assert ours.metrics == theirs.metrics
        assert predictions(ours.folder, "test") == predictions(theirs.folder, "test")
        assert (ours.folder / "history.json").read_text() == (theirs.folder / "history.json").read_text()


def test_a_stored_fusion_is_taken_before_the_layers(world: World) -> None:
    for split in ("train", "dev", "test"):
        fusion_of(world.extract(split), "last4")
    result = world.train()
    recorded = json.loads((result.runs[0].folder / "config.json").read_text())["recorded"]
    for split, cache in recorded["caches"].items():
        assert FeatureCache.open(cache["folder"]).fusion is not None, split
    assert result.computed == 0


def test_a_fusion_too_large_for_memory_is_stored_when_it_is_first_used(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = world.train(run_dir=world.folder / "small")
    assert all(FeatureCache.open(folder).fusion is None for folder in world.cache_folders())
    monkeypatch.setattr(features, "MEMORY_SHARE", 0)
    large = world.train(run_dir=world.folder / "large")
    fused = [folder for folder in world.cache_folders() if FeatureCache.open(folder).fusion is not None]
    assert len(fused) == 3, "one a split"
    assert capsys.readouterr().out.count("Stored last4 of") == 3
    again = world.train(run_dir=world.folder / "again")
    assert "Stored" not in capsys.readouterr().out
    for other in (large, again):
        for one, two in zip(small.runs, other.runs, strict=True):
            assert one.folder.parent.name == two.folder.parent.name
            assert predictions(one.folder, "test") == predictions(two.folder, "test")


@pytest.mark.parametrize(
    "changes", [{"fusion": "fuse"}, {"fusion": "layer2"}, {"projection": "direct"}, {"dtype": "int8"}]
)
def test_what_cannot_be_stored_as_it_is_read_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(features, "MEMORY_SHARE", 0)
    world.train(**changes)
    assert len(world.cache_folders()) == 3


def test_without_room_for_it_the_layers_are_read(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.train(run_dir=world.folder / "first")
    monkeypatch.setattr(features, "MEMORY_SHARE", 0)

    def full(plan: Any) -> Any:
        raise DiskSpaceError("The disk is full.", "Make room.")

    monkeypatch.setattr(stored_fusion, "derive", full)
    assert world.train(run_dir=world.folder / "second").runs
    assert "last4 is not stored beside its layers: The disk is full." in capsys.readouterr().out


def test_caches_that_cannot_be_written_are_trained_from(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a fusion would be stored beside them it is kept elsewhere; a teacher's logits are not kept."""
    kd = {"method": "kd", "teacher": str(world.resource), "resource": None}
    expected = [world.train(run_dir=world.folder / "first", epochs=1.0, **changes).runs[0] for changes in ({}, kd)]
    shutil.rmtree(next(world.caches.rglob("logits.npz")).parent)
    monkeypatch.setattr(features, "MEMORY_SHARE", 0)
    before = sorted(world.caches.rglob("*"))
    capsys.readouterr()
    for number, (changes, said) in enumerate(
        [
            ({}, "last4 is not stored beside its layers: --cache-dir"),
            ({"extract": False}, "is too large for memory"),
            (kd, "The teacher's logits are not stored"),
        ]
    ):
        with read_only(world.caches):
            (run,) = world.train(run_dir=world.folder / f"again-{number}", epochs=1.0, **changes).runs
        assert said in capsys.readouterr().out
        assert predictions(run.folder, "test") == predictions(expected["method" in changes].folder, "test")
    assert sorted(world.caches.rglob("*")) == before


@pytest.mark.parametrize("changes", [{"fusion": "fuse"}, {"fusion": "last2"}, {"projection": "direct"}])
def test_a_stored_fusion_serves_no_other(world: World, changes: dict[str, str]) -> None:
    for split in ("train", "dev", "test"):
        result = world.extract(split)
        fusion_of(result, "last4")
        shutil.rmtree(result.cache)
    with pytest.raises(CacheError, match="it holds only the average of layers 1, 2, 3, 4"):
        world.train(**changes, extract=False)


def test_a_run_on_states_that_were_rounded_again_is_another_run(world: World) -> None:
    direct = world.train(dtype="int8")
    shutil.rmtree(world.caches)
    for split in ("train", "dev", "test"):
        result = world.extract(split)
        slice_of(result, dtype="int8")
        shutil.rmtree(result.cache)
    sliced = world.train(dtype="int8", extract=False)
    assert sliced.runs[0].folder.parent.name != direct.runs[0].folder.parent.name
    config = json.loads((sliced.runs[0].folder / "config.json").read_text())["config"]
    assert config["resource"]["rounded_again"] == ["dev", "test", "train"]


def test_layers_go_before_a_fusion_that_was_rounded_again(world: World) -> None:
    for split in ("train", "dev", "test"):
        fusion_of(world.extract(split, dtype="int8"), "last4")
    result = world.train(dtype="int8")
    recorded = json.loads((result.runs[0].folder / "config.json").read_text())["recorded"]
    for cache in recorded["caches"].values():
        assert FeatureCache.open(cache["folder"]).fusion is None


# Checked reading ------------------------------------------------------------------------------------------------------


def test_training_checks_states_when_asked(world: World) -> None:
    result = world.extract()
    (shard,) = result.cache.glob("*.h5")
    content = bytearray(shard.read_bytes())
    content[tiny_cache.byte_offset(shard, "hidden") + 2 * 16 * 40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=r"states of 'train-s\d+' .* do not match their checksum"):
        world.train(check_states=True)
    assert not list((world.folder / "runs").rglob("metrics.json"))
    world.train()  # off by default: one bit in float16 is trained on
