"""Means of sequences and words, and a cache as a data set: the values, computed token by token; orders, workers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kr2cache import FeatureCache
from kr2cache.cache import views
from kr2cache.cache.means import word_means
from kr2cache.errors import ConfigError, DataError, SequenceNotFoundError, UnknownNameError

FORKING = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 warns

WORDS = ([-1, 0, 0, 2, -1], [-1, 0, -1], [-1, -1], [1, 1, 1, 2], [-1, 0, 1, 1, -1, 0, 1, -1], [-1, 0, -1, 0, -1])
"""A word without a token; one token; special tokens alone; a text that was cut at its beginning, without special
tokens; pairs of segments."""
NAMES = ["gap", "one", "none", "cut", "pair", "short pair"]
ROWS = (
    [[1, 2], [], [3]],
    [[1]],
    [],
    [[], [0, 1, 2], [3]],
    [[1], [2, 3], [5], [6]],
    [[1], [3]],
)
"""For each word, the places of its tokens."""


def made(folder: Path, dtype: str = "float16") -> tuple[FeatureCache, tiny_cache.Truth]:
    truth = tiny_cache.make(list(map(len, WORDS)), dtype=dtype, layers=(0, 1, 2, 4), model_layers=5, ids=NAMES)
    truth.word_index[:] = [np.array(words, dtype=np.int32) for words in WORDS]
    return FeatureCache.open(tiny_cache.store(folder, truth, shard_bytes=600)), truth


def mean_of(states: NDArray[np.floating], places: list[int]) -> NDArray[np.float64]:
    """(L, D), in float64."""
    return sum(states[:, place].astype(np.float64) for place in places) / len(places)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_means_are_those_of_the_tokens(dtype: str, tmp_path: Path) -> None:
    cache, truth = made(tmp_path / "cache", dtype)
    assert len(list((tmp_path / "cache").iterdir())) > 1, "several shards"
    for i, name in enumerate(NAMES):
        states = truth.states(i)
        found = cache.words(name)
        assert (found.dtype, found.shape) == (np.float32, (4, len(ROWS[i]), 4))
        for word, places in enumerate(ROWS[i]):
            if places:
                np.testing.assert_allclose(found[:, word], mean_of(states, places), rtol=1e-5, atol=1e-6)
            else:
                assert np.isnan(found[:, word]).all()
        if kept := [place for place, word in enumerate(WORDS[i]) if word >= 0]:
            mean = cache.mean(name)
            assert (mean.dtype, mean.shape) == (np.float32, (4, 4))
            np.testing.assert_allclose(mean, mean_of(states, kept), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="'none' has special tokens alone"):
        cache.mean("none")
    with pytest.raises(SequenceNotFoundError):
        cache.words("nothing")


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_words_of_any_length(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(lambda all_: all_[-1] > 0))
    states = np.random.default_rng(0).standard_normal((2, sum(counts) + 2, 3)).astype(np.float16)
    word_index = np.array([-1, *np.repeat(np.arange(len(counts)), counts), -1], dtype=np.int32)
    found = word_means(states, word_index)
    assert found.shape == (2, len(counts), 3)
    for word in range(len(counts)):
        places = np.flatnonzero(word_index == word).tolist()
        if places:
            np.testing.assert_allclose(found[:, word], mean_of(states, places), rtol=1e-5, atol=1e-6)
        else:
            assert np.isnan(found[:, word]).all()


@pytest.mark.parametrize(
    ("layers", "places"), [(None, [0, 1, 2, 3]), ("all", [0, 1, 2, 3]), ("2,4", [2, 3]), ([4, 0], [3, 0])]
)
def test_layers_are_chosen_by_name_or_number(layers: Any, places: list[int], tmp_path: Path) -> None:
    cache, truth = made(tmp_path / "cache")
    assert np.array_equal(cache.mean("one", layers), cache.mean("one")[places])
    assert np.array_equal(cache.words("gap", layers), cache.words("gap")[places], equal_nan=True)
    data = cache.dataset(layers=layers, pool="first")
    assert np.array_equal(data[0], truth.states(0)[places, 0].astype(np.float32))
    with pytest.raises(ConfigError, match="does not hold layer 3"):
        cache.dataset(layers="last2")
    with pytest.raises(ConfigError, match="asks for layer 7"):
        cache.mean("one", "7")


@pytest.mark.parametrize("pool", [None, "sequence", "word", "first", "last"])
def test_a_data_set_has_every_sequence_in_the_wanted_order(pool: str | None, tmp_path: Path) -> None:
    cache, truth = made(tmp_path / "cache")
    expected = {
        None: lambda name: truth.states(NAMES.index(name)),
        "sequence": cache.mean,
        "word": cache.words,
        "first": lambda name: truth.states(NAMES.index(name))[:, 0].astype(np.float32),
        "last": lambda name: truth.states(NAMES.index(name))[:, -1].astype(np.float32),
    }[pool]
    names = ["cut", "gap", "pair"]
    data = cache.dataset(names, pool=pool)
    assert (len(data), data.ids) == (3, names)
    for number, name in enumerate(names):
        for found in (data[number], data[number - 3], data[np.int64(number)], data.__getitems__([0, number])[1]):
            assert np.array_equal(found, expected(name), equal_nan=True)
            assert found.dtype == expected(name).dtype
            assert found.flags.writeable, "torch warns of a read-only array"
    assert pickle.loads(pickle.dumps(data))[1].shape == data[1].shape
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(TypeError):
        data[0:1]  # type: ignore[index]


def test_only_complete_sequences_are_in_a_data_set(tmp_path: Path) -> None:
    truth = tiny_cache.make((3, 2, 4))
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth, positions=[0, 2]))
    assert cache.dataset(pool="first").ids == ["s0", "s2"] == cache.ids
    with pytest.raises(SequenceNotFoundError, match="'s1'"):
        cache.dataset(["s0", "s1"])


def test_an_unknown_pooling_is_named(tmp_path: Path) -> None:
    cache, _ = made(tmp_path / "cache")
    with pytest.raises(UnknownNameError, match=r"Unknown pooling 'firs'\. Did you mean 'first'"):
        cache.dataset(pool="firs")


@FORKING
@pytest.mark.parametrize("method", [None, "fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_a_loader_of_torch_gives_batches(method: str | None, tmp_path: Path) -> None:
    import torch
    from torch.utils.data import DataLoader, StackDataset

    cache, _ = made(tmp_path / "cache")
    names = ["gap", "one", "cut", "pair"]
    data: Any = StackDataset(cache.dataset(names, pool="sequence", layers=[0, 4]), list(range(4)))
    loader = DataLoader(data, batch_size=3, num_workers=0 if method is None else 2, multiprocessing_context=method)
    batches = list(loader)
    assert [states.shape for states, _ in batches] == [(3, 2, 4), (1, 2, 4)]
    states = torch.cat([states for states, _ in batches])
    assert torch.equal(states, torch.tensor(np.stack([cache.mean(name, [0, 4]) for name in names])))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("piece", [1, 30, 2**26])
def test_a_cache_becomes_a_data_set_of_datasets(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "PIECE", piece)
    cache, truth = made(tmp_path / "cache")
    words = cache.to_dataset(["gap", "pair"], pool="word", layers="0,4")
    assert words["id"] == ["gap", "pair"]
    assert np.array_equal(np.array(words[0]["states"]).swapaxes(0, 1), cache.words("gap", [0, 4]), equal_nan=True)
    assert words.with_format("numpy")[1]["states"].shape == (4, 2, 4)
    sequences = cache.to_dataset(["one", "cut"], pool="sequence").with_format("numpy")
    assert np.array_equal(sequences[1]["states"], cache.mean("cut"))
    assert len(cache.to_dataset([], pool="word")) == 0
    whole = cache.to_dataset().with_format("numpy")
    assert whole.column_names == ["id", "word_index", "states"]
    for i, row in enumerate(whole):
        assert np.array_equal(row["states"].swapaxes(0, 1), truth.states(i).astype(np.float32))
        assert row["word_index"].tolist() == WORDS[i]
