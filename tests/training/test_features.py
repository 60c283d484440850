"""Stage two's data path against NumPy on what the cache gives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from world import read_only

from kr2cache.cache.reader import FeatureCache
from kr2cache.config import ExtractConfig
from kr2cache.errors import ConfigError, SequenceNotFoundError
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import plan_extraction
from kr2cache.fusion import parse_fusion
from kr2cache.system import disk
from kr2cache.training import features
from kr2cache.training.features import DeviceFeatures, ResourceFeatures, joined, room_on

DTYPES = ("float16", "float32", "bfloat16", "int8")
MODEL_LAYERS = 5


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, FeatureCache]:
    """The 12 training sentences in every dtype, float16 in several shards; and in ``last4`` four layers alone."""
    folder = tmp_path_factory.mktemp("features")
    model = tiny.save_model(folder / "model", layers=MODEL_LAYERS - 1, initializer_range=0.4)

    def made(**settings: Any) -> FeatureCache:
        config = ExtractConfig(
            resource=str(model),
            split="train",
            task="udpos",
            data=str(corpus),
            device="cpu",
            cache_dir=folder / "cache",
            **settings,
        )
        return FeatureCache.open(extract(plan_extraction(config)).cache)

    result = {dtype: made(dtype=dtype, shard_gb=1e-5 if dtype == "float16" else 16) for dtype in DTYPES}
    return {**result, "last4": made(layers="last4", dtype="float32")}


FUSIONS = {
    "all": (0, 1, 2, 3, 4),
    "last1": (4,),
    "last2": (3, 4),
    "last4": (1, 2, 3, 4),
    "layer0": (0,),
    "layer3": (3,),
}
"""The layers that each is the average of."""

FUSION_ROUNDING = {"float16": 2**-11, "float32": 1e-6, "bfloat16": 1e-6, "int8": 1e-6}
"""Fused states are kept in the precision they are read in: float16, else float32."""

BATCHES = ([0], [3, 1, 2], [5, 5, 0, 11], list(range(12))[::-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUSIONS)
def test_a_batch_is_the_average_of_its_layers_padded_with_zeros(
    name: str, dtype: str, caches: dict[str, FeatureCache]
) -> None:
    cache = caches[dtype]
    found = ResourceFeatures(cache, cache.ids, parse_fusion(name, MODEL_LAYERS), keep_layers=False)
    assert found.width == cache.width == 16
    for sequences in BATCHES:
        states, mask = found.batch(sequences)
        expected = [cache[cache.ids[i]][list(FUSIONS[name])].astype(np.float64).mean(axis=0) for i in sequences]
        lengths = [len(one) for one in expected]
        assert states.shape == (len(sequences), 1, max(lengths), 16)
        assert states.dtype == (np.float16 if dtype == "float16" else np.float32)
        assert mask.tolist() == [[1] * length + [0] * (max(lengths) - length) for length in lengths]
        for row, one in zip(states, expected, strict=True):
            atol = 1e-7 if dtype == "float16" else 1e-6
            np.testing.assert_allclose(row[0, : len(one)], one, rtol=FUSION_ROUNDING[dtype], atol=atol)
            assert (row[0, len(one) :] == 0).all()


@pytest.mark.parametrize("name", ["last1", "layer0", "layer3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_layer_is_given_exactly(dtype: str, name: str, caches: dict[str, FeatureCache]) -> None:
    cache = caches[dtype]
    states, _ = ResourceFeatures(cache, cache.ids, parse_fusion(name, MODEL_LAYERS), keep_layers=False).batch([7])
    np.testing.assert_array_equal(states[0, 0], cache[cache.ids[7]][FUSIONS[name][0]])


@pytest.mark.parametrize("name", ["fuse", "all", "last2"])
def test_layers_that_are_kept_are_given_exactly(name: str, caches: dict[str, FeatureCache]) -> None:
    cache = caches["float16"]
    fusion = parse_fusion(name, MODEL_LAYERS)
    # Trainable weights need the layers in any case.
    found = ResourceFeatures(cache, cache.ids, fusion, keep_layers=name != "fuse")
    sequences = [4, 0, 9]
    states, mask = found.batch(sequences)
    for row, marks, i in zip(states, mask, sequences, strict=True):
        expected = cache[cache.ids[i]][list(fusion.layers)]
        assert int(marks.sum()) == expected.shape[1]
        np.testing.assert_array_equal(row[:, : expected.shape[1]], expected)
        assert (row[:, expected.shape[1] :] == 0).all()


def test_sequences_are_those_asked_for_in_their_order(caches: dict[str, FeatureCache]) -> None:
    cache = caches["float16"]
    chosen = ["train-s9", "train-s2", "train-s11"]
    for name in ("all", "layer2", "fuse"):
        fusion = parse_fusion(name, MODEL_LAYERS)
        found = ResourceFeatures(cache, chosen, fusion, keep_layers=False)
        assert found.n_tokens.tolist() == [cache[one].shape[1] for one in chosen]
        states, mask = found.batch([2, 0])
        for row, marks, one in zip(states, mask, ("train-s11", "train-s9"), strict=True):
            layers = cache[one][list(fusion.layers)].astype(np.float32)
            expected = layers if name == "fuse" else layers.mean(axis=0, keepdims=True)
            np.testing.assert_allclose(row[:, : int(marks.sum())], expected, rtol=1e-3, atol=1e-6)


def test_what_batches_gave_out_is_counted(caches: dict[str, FeatureCache]) -> None:
    cache = caches["float32"]
    for name in ("fuse", "last4", "layer1"):
        found = ResourceFeatures(cache, cache.ids, parse_fusion(name, MODEL_LAYERS), keep_layers=False)
        assert found.sequences_read == 0, "fusing in advance gives nothing out"
        found.batch([1, 2, 3])
        found.batch([1, 1])
        assert found.sequences_read == 5


def test_a_cache_of_the_last_four_layers(caches: dict[str, FeatureCache]) -> None:
    few, all_layers = caches["last4"], caches["float32"]
    fusion = parse_fusion("last2", MODEL_LAYERS)
    one, _ = ResourceFeatures(few, few.ids, fusion, keep_layers=False).batch([3])
    other, _ = ResourceFeatures(all_layers, few.ids, fusion, keep_layers=False).batch([3])
    np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ConfigError, match="does not hold layer 0"):
        ResourceFeatures(few, few.ids, parse_fusion("all", MODEL_LAYERS), keep_layers=False)


def test_an_id_that_is_not_there_is_named(caches: dict[str, FeatureCache]) -> None:
    cache = caches["float32"]
    with pytest.raises(SequenceNotFoundError, match="train-s99"):
        ResourceFeatures(cache, ["train-s1", "train-s99"], parse_fusion("all", MODEL_LAYERS), keep_layers=False)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_fused_states_beyond_memory_go_to_a_temporary_file(
    dtype: str, caches: dict[str, FeatureCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches[dtype]
    fusion = parse_fusion("all", MODEL_LAYERS)
    in_memory = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
    before = sorted(path.name for path in cache.folder.parent.iterdir())
    monkeypatch.setattr(features, "MEMORY_SHARE", 0)
    on_disk = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
    assert isinstance(on_disk._fused, np.memmap)
    assert not isinstance(in_memory._fused, np.memmap)
    for sequences in BATCHES:
        for one, other in zip(in_memory.batch(sequences), on_disk.batch(sequences), strict=True):
            np.testing.assert_array_equal(one, other)
    assert sorted(path.name for path in cache.folder.parent.iterdir()) == before, "the file has no name"


def test_the_temporary_file_goes_where_it_may(
    caches: dict[str, FeatureCache],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside a cache that cannot be written: to TMPDIR; if that has no room or takes memory, no file is made."""
    cache, fusion = caches["float16"], parse_fusion("all", MODEL_LAYERS)
    usual = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
    beside = cache.folder.parent
    monkeypatch.setattr(features, "MEMORY_SHARE", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"

    def mounted(kind: str) -> None:
        number = f"{os.major(device)}:{os.minor(device)}"
        mounts.write_text(f"22 1 0:1 / /proc rw - proc proc rw\n36 35 {number} / /x rw shared:1 - {kind} name rw\n")

    monkeypatch.setattr(disk, "MOUNTS", mounts)
    mounted("ext4")
    free = {beside: 2**40, tmp_path: 2**40}
    monkeypatch.setattr(disk, "free_bytes", free.__getitem__)
    with read_only(beside):
        elsewhere = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
        assert f"it is kept in a temporary file in {tmp_path} until" in capsys.readouterr().out
        free[tmp_path] = usual.nbytes - 1
        without_room = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
        assert "computed anew for each batch" in capsys.readouterr().out
        free[tmp_path] = 2**40
        mounted("tmpfs")
        in_memory_alone = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
    free[beside] = 0
    mounted("ext4")
    beside_is_full = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
    made = [isinstance(one._fused, np.memmap) for one in (elsewhere, without_room, in_memory_alone, beside_is_full)]
    assert made == [True, False, False, True]
    for other in (elsewhere, without_room, in_memory_alone, beside_is_full):
        assert (other.layers, other.nbytes) == (1, usual.nbytes)
        for sequences in BATCHES:
            for one, two in zip(usual.batch(sequences), other.batch(sequences), strict=True):
                np.testing.assert_array_equal(one, two, strict=True)
    assert list(tmp_path.iterdir()) == [mounts], "the file has no name"


def test_fusing_in_parts_is_fusing(caches: dict[str, FeatureCache], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = caches["float16"]
    fusion = parse_fusion("last4", MODEL_LAYERS)
    at_once, _ = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False).batch(range(12))
    monkeypatch.setattr(features, "SEQUENCES_AT_ONCE", 5)
    in_parts, _ = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False).batch(range(12))
    np.testing.assert_array_equal(at_once, in_parts)


def test_what_is_read_from_the_cache_is_asked_for_ahead(
    caches: dict[str, FeatureCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch, and a split that goes to a device, all at once; nothing of what is fused already."""
    cache, events = FeatureCache.open(caches["float32"].folder), []
    ahead, states = FeatureCache.read_ahead, FeatureCache.states

    def read_ahead(self: FeatureCache, positions: NDArray[np.int64], layers: Sequence[int] | None = None) -> None:
        events.append(("asked", positions.tolist(), layers))
        ahead(self, positions, layers)

    def read(self: FeatureCache, position: int, layers: Sequence[int] | None = None) -> NDArray[np.floating]:
        events.append(("read", [position], layers))
        return states(self, position, layers)

    monkeypatch.setattr(FeatureCache, "read_ahead", read_ahead)
    monkeypatch.setattr(FeatureCache, "states", read)
    monkeypatch.setattr(features, "SEQUENCES_AT_ONCE", 7)
    fusion = parse_fusion("last2", MODEL_LAYERS)
    kept = ResourceFeatures(cache, cache.ids[::-1], fusion, keep_layers=True)
    kept.batch([3, 0])
    asked = [("asked", [8, 11], (3, 4)), ("read", [8], (3, 4)), ("read", [11], (3, 4))]
    assert events == asked
    events.clear()
    DeviceFeatures(kept, torch.device("cpu"))
    expected: list[tuple[str, list[int], tuple[int, ...]]] = []
    for part in (range(11, 4, -1), range(4, -1, -1)):
        expected += [("asked", list(part), (3, 4)), *(("read", [position], (3, 4)) for position in part)]
    assert events == expected
    fused = ResourceFeatures(cache, cache.ids, fusion, keep_layers=False)
    events.clear()
    fused.batch([3, 0])
    assert events == []


# On a device ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fuse", "last4", "layer2"])
def test_states_on_a_device_are_those_of_the_cache(name: str, dtype: str, caches: dict[str, FeatureCache]) -> None:
    cache = caches[dtype]
    states = ResourceFeatures(cache, cache.ids, parse_fusion(name, MODEL_LAYERS), keep_layers=False)
    on_device = DeviceFeatures(states, torch.device("cpu"))
    for sequences in BATCHES:
        expected, mask = states.batch(sequences)
        found, found_mask = on_device.batch(sequences)
        np.testing.assert_array_equal(found.numpy(), expected)
        np.testing.assert_array_equal(found_mask, mask)
    assert on_device.sequences_read == states.sequences_read


def test_in_parts_they_are_the_same(caches: dict[str, FeatureCache], monkeypatch: pytest.MonkeyPatch) -> None:
    states = ResourceFeatures(caches["float16"], caches["float16"].ids, parse_fusion("fuse", 5), keep_layers=False)
    at_once, _ = DeviceFeatures(states, torch.device("cpu")).batch(range(12))
    monkeypatch.setattr(features, "SEQUENCES_AT_ONCE", 5)
    in_parts, _ = DeviceFeatures(states, torch.device("cpu")).batch(range(12))
    assert torch.equal(at_once, in_parts)


def test_their_bytes_are_counted(caches: dict[str, FeatureCache]) -> None:
    cache = caches["float16"]
    tokens = int(cache.n_tokens.sum())
    for name, layers in (("fuse", MODEL_LAYERS), ("last4", 1), ("layer0", 1)):
        states = ResourceFeatures(cache, cache.ids, parse_fusion(name, MODEL_LAYERS), keep_layers=False)
        assert states.nbytes == tokens * layers * cache.width * 2


def test_a_cpu_has_its_states_in_the_page_cache() -> None:
    assert room_on(torch.device("cpu")) == 0


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_a_worker_process_does_not_pin(caches: dict[str, FeatureCache]) -> None:
    """Pinning would start CUDA there, which a forked process cannot do; without a GPU it fails as well."""
    cache = caches["float16"]
    fusion = parse_fusion("fuse", MODEL_LAYERS)
    pinned = ResourceFeatures(cache, cache.ids, fusion, keep_layers=True, pinned=True)
    usual = ResourceFeatures(cache, cache.ids, fusion, keep_layers=True)
    loader: DataLoader[Any] = DataLoader(
        range(12), batch_size=4, num_workers=1, collate_fn=pinned.batch, multiprocessing_context="fork", pin_memory=True
    )
    for start, (states, _) in zip(range(0, 12, 4), loader, strict=True):
        np.testing.assert_array_equal(states, usual.batch(range(start, start + 4))[0])


def test_states_in_memory_follow_those_on_the_device(caches: dict[str, FeatureCache]) -> None:
    """Of two resources one may fit on the GPU and one not. "meta" stands in for the GPU: it has shapes only."""
    cache, device = caches["float16"], torch.device("meta")
    parts = [
        ResourceFeatures(cache, cache.ids, parse_fusion(name, MODEL_LAYERS), keep_layers=False) for name in FUSIONS
    ]
    both = joined([parts[0], DeviceFeatures(parts[1], device)])
    states, mask = both.batch([3, 1, 2])
    assert [one.device for one in states if isinstance(one, torch.Tensor)] == [device] * 2
    lengths = [cache.n_tokens[i] for i in (3, 1, 2)]
    assert mask.shape == (3, 2 * max(lengths))
    assert mask.sum(axis=1).tolist() == [2 * length for length in lengths]
    here, _ = joined(parts[:2]).batch([3, 1, 2])
    assert all(isinstance(one, np.ndarray) for one in here)
