"""Several folders with parts of one corpus are read as one cache, and parts that do not fit are refused."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_cache
from numpy.typing import NDArray

from kr2cache import FeatureCache
from kr2cache.cache import ids as ids_module
from kr2cache.errors import CacheError, ConfigError, SequenceNotFoundError

LENGTHS = ((3, 1, 5), (2, 4), (1, 7, 2, 6))
FORKING = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 warns


def part(
    number: int,
    lengths: Sequence[int] = (3, 1),
    *,
    ids: Sequence[str] | None = None,
    chosen: dict[str, Any] | None = None,
    found: dict[str, Any] | None = None,
    **options: Any,
) -> tiny_cache.Truth:
    """Part ``number`` of a corpus; names of parts from 10 on are longer."""
    truth = tiny_cache.make(
        lengths,
        ids=ids or [f"part-{number}-s{i}" for i in range(len(lengths))],
        seed=number,
        fingerprint=f"{number:064}",
        **options,
    )
    provenance = {
        "chosen": {"resource": "gottbert", "corpus": f"corpus-{number}", "max_length": 512, **(chosen or {})},
        "found": {"weights": "a1b2", "config": "c3", "texts": f"{number}", "sequences": len(lengths), **(found or {})},
    }
    truth.header = dataclasses.replace(truth.header, provenance=provenance)
    return truth


class Corpus:
    """A corpus in three folders, with what they should hold."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.truths = [part(9 + i, lengths, dtype=dtype) for i, lengths in enumerate(LENGTHS)]
        self.folders = [folder / f"part-{i}" for i in range(3)]
        for path, truth in zip(self.folders, self.truths, strict=True):
            tiny_cache.store(path, truth, shard_bytes=90)
        assert len(tiny_cache.shards(self.folders[2])) > 1
        self.ids = [name for truth in self.truths for name in truth.ids]
        self.states = [truth.states(i) for truth in self.truths for i in range(len(truth.ids))]


@pytest.fixture(params=tiny_cache.DTYPES)
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    return Corpus(tmp_path, str(request.param))


@pytest.fixture(params=["a dictionary", "hashes"])
def lookup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For few ids, and as if they were many."""
    if request.param == "hashes":
        monkeypatch.setattr(ids_module, "DICTIONARY_MAX", 0)
    return str(request.param)


# As one ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lookup")
def test_all_sequences_are_there_in_the_order_of_the_folders(corpus: Corpus) -> None:
    cache = FeatureCache.open(corpus.folders)
    assert cache.ids == cache.all_ids == corpus.ids
    assert cache.folders == tuple(corpus.folders)
    assert cache.n_tokens.tolist() == [tokens for lengths in LENGTHS for tokens in lengths]
    assert (len(cache), cache.complete.all(), "part-10-s1" in cache, "part-10-s2" in cache) == (9, True, True, False)
    assert cache.positions(reversed(corpus.ids)).tolist() == list(range(9))[::-1]
    assert cache.find(["part-11-s3", "x", "part-9-s0"]).tolist() == [8, -1, 0]
    assert cache.text_xxh3.tolist() == [value for truth in corpus.truths for value in truth.index.text_xxh3.tolist()]
    assert cache.stored_bytes == sum(FeatureCache.open(folder).stored_bytes for folder in corpus.folders)


@pytest.mark.usefixtures("lookup")
def test_states_come_from_the_right_folder(corpus: Corpus) -> None:
    cache = FeatureCache.open([str(folder) for folder in corpus.folders])
    cache.check_on_read = True
    cache.read_ahead(np.arange(9), [0, 2])
    for position, (name, states) in enumerate(zip(corpus.ids, corpus.states, strict=True)):
        np.testing.assert_array_equal(cache[name], states, strict=True)
        np.testing.assert_array_equal(cache.states(position, [2, 0]), states[[2, 0]], strict=True)
        cache.check(position)
    order = [8, 0, 4, 4, 2, 6]
    batch = cache.batch([corpus.ids[i] for i in order], [1, 2], out=cache.buffer(6, [1, 2]))
    for i, position in enumerate(order):
        np.testing.assert_array_equal(batch[i], corpus.states[position][1:], strict=True)
    many = cache.batch(corpus.ids * 5)
    np.testing.assert_array_equal(many[44], corpus.states[8], strict=True)


def test_the_index_is_that_of_all_folders(corpus: Corpus) -> None:
    index = FeatureCache.open(corpus.folders).tokens()
    assert [raw.decode() for raw in index.ids.tolist()] == corpus.ids
    for name in ("n_tokens", "text_xxh3", "input_id", "word_index"):
        expected = np.concatenate([getattr(truth.index, name) for truth in corpus.truths])
        np.testing.assert_array_equal(getattr(index, name), expected)


def test_one_folder_in_a_list_is_that_cache(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "a", part(1))
    one, listed = FeatureCache.open(folder), FeatureCache.open([folder])
    assert listed.folder == one.folder == folder
    assert (listed.fingerprint, listed.provenance, listed.batch_plan, repr(listed)) == (
        one.fingerprint,
        one.provenance,
        one.batch_plan,
        repr(one),
    )


def test_what_the_folders_do_not_share_is_not_told_as_shared(tmp_path: Path) -> None:
    folders = [tiny_cache.store(tmp_path / f"{i}", part(i)) for i in range(3)]
    cache = FeatureCache.open(folders)
    assert cache.provenance == {
        "chosen": {"resource": "gottbert", "max_length": 512},
        "found": {"weights": "a1b2", "config": "c3", "sequences": 2},
    }
    prints = {FeatureCache.open(some).fingerprint for some in (folders, folders[:2], folders[::-1], folders[:1])}
    assert len(prints) == 4
    for name in ("folder", "batch_plan"):
        with pytest.raises(ConfigError, match=f"{folders[0]} .and 2 more folders. were opened as one, but each has"):
            getattr(cache, name)
    assert f"{folders[0]} (and 2 more folders)" in repr(cache)


def test_sequences_that_are_not_written_name_their_own_folder(tmp_path: Path) -> None:
    first = tiny_cache.store(tmp_path / "a", part(1), positions=[1])
    second = tiny_cache.store(tmp_path / "b", part(2), positions=[0])
    cache = FeatureCache.open([first, second])
    assert (cache.ids, cache.complete.tolist()) == (["part-1-s1", "part-2-s0"], [False, True, True, False])
    with pytest.raises(SequenceNotFoundError, match=f"'part-2-s1' in {second} are not written yet"):
        cache["part-2-s1"]
    with pytest.raises(SequenceNotFoundError, match=f"'part-1-s0' in {first} are not written yet"):
        cache.batch(["part-2-s0", "part-1-s0"])
    with pytest.raises(SequenceNotFoundError, match=f"No sequence 'x' in {first} .and 1 more folder."):
        cache["x"]


def test_a_damaged_sequence_names_its_own_folder(tmp_path: Path) -> None:
    first, second = (tiny_cache.store(tmp_path / name, part(i)) for i, name in enumerate("ab"))
    (path,) = tiny_cache.shards(second)
    with path.open("r+b") as file:
        file.seek(tiny_cache.byte_offset(path, "hidden"))
        file.write(np.float16(77).tobytes())
    cache = FeatureCache.open([first, second])
    cache.check(0)
    with pytest.raises(CacheError, match=f"'part-1-s0' in {second} do not match .*\nkr2cache cache repair {second}"):
        cache.check(2)


# Other processes -------------------------------------------------------------------------------------------------


class States:
    """What training hands to a DataLoader."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, i: int) -> tuple[int, NDArray[np.floating]]:
        return os.getpid(), self.cache.batch([self.cache.ids[i]], [0, 2]).states


@FORKING
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_data_loader_workers_read_all_folders(tmp_path: Path, method: str) -> None:
    from torch.utils.data import DataLoader

    corpus = Corpus(tmp_path, "float32")
    cache = FeatureCache.open(corpus.folders)
    context = multiprocessing.get_context(method)
    loader = DataLoader(States(cache), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60)
    found = list(loader)
    assert len({pid for pid, _ in found} - {os.getpid()}) == 2
    for (_, states), expected in zip(found, corpus.states, strict=True):
        np.testing.assert_array_equal(np.asarray(states), expected[[0, 2]].reshape(-1, 4), strict=True)


def test_a_pickle_holds_the_folders_alone_and_notices_another_part(tmp_path: Path) -> None:
    folders = [tiny_cache.store(tmp_path / f"{i}", part(i, (500, 3))) for i in range(3)]
    cache = FeatureCache.open(folders)
    cache.check_on_read = True
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert (again.ids, again.folders, again.check_on_read) == (cache.ids, cache.folders, True)
    shutil.rmtree(folders[1])
    tiny_cache.store(folders[1], part(7))
    with pytest.raises(CacheError, match=f"{folders[0]} .and 2 more folders. are not the same caches any more"):
        pickle.loads(pickled)


# Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lookup")
@pytest.mark.parametrize("asked", ["find", "positions", "batch", "states"])
def test_an_id_in_two_folders_is_refused_with_both(tmp_path: Path, asked: str) -> None:
    names = (["a", "b"], ["c", "d"], ["e", "b"])
    folders = [tiny_cache.store(tmp_path / f"{i}", part(i, ids=ids)) for i, ids in enumerate(names)]
    cache = FeatureCache.open(folders)
    ask = {"find": cache.find, "positions": cache.positions, "batch": cache.batch, "states": lambda ids: cache[ids[0]]}
    with pytest.raises(CacheError, match=f"The id 'b' is in {folders[0]} and in {folders[2]}"):
        ask[asked](["e"])
    assert FeatureCache.open(folders[:2]).find(["d"]).tolist() == [3]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers": (0, 2)}, "layers is 0, 2, not 0, 1, 2"),
    "model": ({"model_layers": 4}, "model_layers is 4, not 3"),
    "width": ({"width": 5}, "width is 5, not 4"),
    "dtype": ({"dtype": "int8"}, "dtype is int8, not float16"),
    "fusion": ({"layers": (2,), "fusion": {"layers": [2], "weights": [1]}}, "layers is 2, not 0, 1, 2"),
    "weights": ({"found": {"weights": "ffff"}}, "weights is ffff, not a1b2"),
    "config": ({"found": {"config": "ffff"}}, "config is ffff, not c3"),
    "length": ({"chosen": {"max_length": 128}}, "max_length is 128, not 512"),
    "a field more": ({"found": {"segments": True}}, "segments is True, not unknown"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_parts_that_do_not_fit_are_refused_with_what_differs(tmp_path: Path, what: str) -> None:
    options, message = OTHERS[what]
    fitting = [tiny_cache.store(tmp_path / f"{i}", part(i)) for i in range(2)]
    other = tiny_cache.store(tmp_path / "other", part(2, **options))
    with pytest.raises(CacheError, match=f"^{other} cannot be read as one cache with {fitting[0]}: {message}"):
        FeatureCache.open([*fitting, other])


def test_fusions_with_other_weights_are_refused(tmp_path: Path) -> None:
    fusions = [{"layers": [1, 2], "weights": [0.5, 0.5]}, {"layers": [1, 2], "weights": [0.25, 0.75]}]
    folders = [
        tiny_cache.store(tmp_path / f"{i}", part(i, layers=(2,), fusion=fusion)) for i, fusion in enumerate(fusions)
    ]
    with pytest.raises(CacheError, match=r"fusion is .*0\.25, 0\.75.*, not .*0\.5, 0\.5"):
        FeatureCache.open(folders)


def test_the_digest_of_the_weights_decides_and_not_the_name(tmp_path: Path) -> None:
    first, second = part(1), part(2, chosen={"resource": "/models/gottbert"})
    folders = [tiny_cache.store(tmp_path / f"{i}", truth) for i, truth in enumerate((first, second))]
    assert len(FeatureCache.open(folders)) == 4
    for i, truth in enumerate((first, second)):  # of another program, which records no digest
        chosen = {"chosen": truth.header.provenance["chosen"]}
        truth.header = dataclasses.replace(truth.header, provenance=chosen)
        shutil.rmtree(folders[i])
        tiny_cache.store(folders[i], truth)
    with pytest.raises(CacheError, match="resource is /models/gottbert, not gottbert"):
        FeatureCache.open(folders)


def test_no_folder_and_one_twice_are_refused(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "a", part(1))
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="no cache folder to open"):
        FeatureCache.open([])
    with pytest.raises(ConfigError, match=f"{folder} is given twice"):
        FeatureCache.open([folder, folder])
    with pytest.raises(ConfigError, match=f"{tmp_path / 'link'}, which is also {folder}, is given twice"):
        FeatureCache.open([folder, tmp_path / "link"])


def test_a_folder_that_is_not_a_cache_is_named(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "a", part(1))
    with pytest.raises(CacheError, match=f"{tmp_path / 'b'} is not a folder"):
        FeatureCache.open([folder, tmp_path / "b"])
