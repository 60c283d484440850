"""Reading gives what was written, whoever reads and however."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kr2cache import FeatureCache
from kr2cache.cache.dtypes import DTYPES
from kr2cache.errors import CacheError, ConfigError, SequenceNotFoundError

IDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
FORKING = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 warns


def root_map(array: NDArray[np.generic]) -> object:
    """The end of the chain of bases: an mmap, where the array is a view of one."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base


@pytest.fixture(params=tiny_cache.DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# What was written comes back -------------------------------------------------------------------------------------


@given(data=st.data(), ids=st.lists(IDS, min_size=1, max_size=7, unique=True), width=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ids: list[str], width: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=len(ids), max_size=len(ids)))
    layers = sorted(data.draw(st.sets(st.integers(0, 4), min_size=1)))
    truth = tiny_cache.make(
        lengths,
        dtype=data.draw(st.sampled_from(tiny_cache.DTYPES)),
        layers=layers,
        model_layers=5,
        width=width,
        ids=ids,
        seed=data.draw(st.integers(0, 99)),
    )
    folder = tiny_cache.store(
        tmp_path_factory.mktemp("cache"),
        truth,
        shard_bytes=data.draw(st.integers(1, 600)),
        positions=data.draw(st.permutations(range(len(ids)))),
        at_once=data.draw(st.integers(1, 3)),
    )
    cache = FeatureCache.open(folder)
    assert (cache.ids, list(cache.layers), cache.width, cache.mapped) == (ids, layers, width, True)
    assert cache.n_tokens.tolist() == lengths
    for i, name in enumerate(ids):
        np.testing.assert_array_equal(cache[name], truth.states(i), strict=True)

    any_order = st.lists(st.sampled_from(layers), min_size=1, max_size=6)  # repeats too
    wanted = data.draw(any_order | st.permutations(layers))
    asked = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=9))
    batch = cache.batch([ids[i] for i in asked], wanted)
    assert (len(batch), batch.layers, batch.n_tokens.tolist()) == (
        len(asked),
        tuple(wanted),
        [lengths[i] for i in asked],
    )
    expected = [truth.states(i)[[layers.index(layer) for layer in wanted]] for i in asked]
    for found, states in zip([batch[i] for i in range(len(batch))], expected, strict=True):
        np.testing.assert_array_equal(found, states, strict=True)
    np.testing.assert_array_equal(
        batch.states,
        np.concatenate([np.empty((0, width), np.float32), *[states.reshape(-1, width) for states in expected]]),
    )


def test_layers_come_in_the_order_asked_for(folder: Path, dtype: str) -> None:
    truth = tiny_cache.make(dtype=dtype, layers=(0, 1, 2))
    cache = FeatureCache.open(tiny_cache.store(folder, truth))
    for wanted in ([2, 1, 0], [0, 2, 1], [1, 0], [0, 0, 0], [1, 1, 2], [2, 0], [2], [1, 2], [2, 2]):
        np.testing.assert_array_equal(cache.states(2, wanted), truth.states(2)[wanted], strict=True)
        np.testing.assert_array_equal(cache.batch(["s2"], wanted)[0], truth.states(2)[wanted], strict=True)


@pytest.mark.parametrize("lengths", [(1,), (512,), (1, 512, 1)])
def test_the_shortest_and_the_longest_sequences(folder: Path, dtype: str, lengths: tuple[int, ...]) -> None:
    truth = tiny_cache.make(lengths, dtype=dtype, layers=range(13), model_layers=13, width=8)
    cache = FeatureCache.open(tiny_cache.store(folder, truth))
    assert len(cache) == len(lengths)
    for i, tokens in enumerate(lengths):
        assert cache[f"s{i}"].shape == (13, tokens, 8)
        np.testing.assert_array_equal(cache[f"s{i}"], truth.states(i), strict=True)


def test_ids_of_every_script(folder: Path) -> None:
    ids = ["日本語-1", "русский", "עברית", "ภาษาไทย", "e\u0301", "é", " ", "a/b#0", "🧑‍🚀", "\x1f", "'\"\\"]
    truth = tiny_cache.make(range(1, 12), ids=ids)
    cache = FeatureCache.open(tiny_cache.store(folder, truth, shard_bytes=300))
    assert cache.ids == ids
    for i, name in enumerate(ids):
        assert name in cache
        np.testing.assert_array_equal(cache[name], truth.states(i))


def test_a_cache_tells_what_it_is(folder: Path, dtype: str) -> None:
    truth = tiny_cache.make((3, 1, 5), dtype=dtype, layers=(1, 3), model_layers=5, width=6)
    cache = FeatureCache.open(str(tiny_cache.store(folder, truth, shard_bytes=100)))
    assert (cache.layers, cache.model_layers, cache.width, cache.dtype) == ((1, 3), 5, 6, dtype)
    assert (cache.fingerprint, cache.fusion) == ("0123456789abcdef", None)
    assert cache.provenance == {"chosen": {"resource": "gottbert"}, "found": {"texts": "ß日"}}
    assert cache.states_dtype == (np.float16 if dtype == "float16" else np.float32)
    item = {"float16": 2, "float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    assert cache.stored_bytes == 18 * (6 * item + (4 if dtype == "int8" else 0))
    assert all(part in repr(cache) for part in (str(folder), "3 of 3", "1, 3", dtype))


def test_the_index_comes_back_from_all_shards(folder: Path) -> None:
    truth = tiny_cache.make((3, 1, 5, 2))
    cache = FeatureCache.open(tiny_cache.store(folder, truth, shard_bytes=60))
    index = cache.tokens()
    np.testing.assert_array_equal(index.input_id, np.concatenate(truth.input_id))
    np.testing.assert_array_equal(index.word_index, np.concatenate(truth.word_index))
    assert [raw.decode() for raw in index.ids.tolist()] == truth.ids
    np.testing.assert_array_equal(index.text_xxh3, truth.index.text_xxh3)
    np.testing.assert_array_equal(cache.text_xxh3, truth.index.text_xxh3)
    assert index.n_tokens.tolist() == [3, 1, 5, 2]


def test_a_fused_cache_tells_its_weights(folder: Path) -> None:
    fusion = {"layers": [1, 2], "weights": [0.5, 0.5]}
    truth = tiny_cache.make(layers=(2,), fusion=fusion)
    cache = FeatureCache.open(tiny_cache.store(folder, truth))
    assert cache.fusion == fusion
    assert cache["s0"].shape == (1, 3, 4)


def test_a_layer_that_is_not_stored_is_named_with_those_that_are(folder: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(folder, tiny_cache.make(layers=(0, 2), model_layers=4)))
    with pytest.raises(ConfigError, match="does not hold layer 1, 3; it holds 0, 2"):
        cache.batch(["s0"], [0, 3, 1])
    with pytest.raises(ConfigError, match="none asked for"):
        cache.states(0, [])


# No copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_neighbouring_layers_are_a_view_of_the_map(folder: Path, stored: str) -> None:
    truth = tiny_cache.make((3, 7, 2), dtype=stored, layers=range(5), model_layers=5)
    cache = FeatureCache.open(tiny_cache.store(folder, truth))
    whole = cache["s1"]
    assert type(root_map(whole)).__name__ == "mmap"
    assert not whole.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        whole[...] = 0
    for layers in (None, [0, 1, 2, 3, 4], [1, 2, 3, 4], [0], [4], [2, 3]):
        part = cache.states(1, layers)
        assert np.shares_memory(part, whole)
        assert part.flags.c_contiguous
        assert not part.flags.owndata
        assert not part.flags.writeable
        np.testing.assert_array_equal(part, truth.states(1)[layers or slice(None)], strict=True)
    np.testing.assert_array_equal(cache.states(1, [0, 2]), truth.states(1)[[0, 2]])
    assert not np.shares_memory(cache["s0"], whole)


def test_a_view_shows_the_file_itself(folder: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(folder, tiny_cache.make()))
    view = cache["s0"]
    (path,) = tiny_cache.shards(folder)
    with path.open("r+b") as file:
        file.seek(tiny_cache.byte_offset(path, "hidden"))
        file.write(np.float16(77).tobytes())
    assert view[0, 0, 0] == 77


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_bfloat16_and_int8_are_copied_to_float32(folder: Path, stored: str) -> None:
    truth = tiny_cache.make(dtype=stored)
    cache = FeatureCache.open(tiny_cache.store(folder, truth))
    states = cache["s2"]
    assert states.dtype == np.float32
    assert not np.shares_memory(states, cache["s2"])
    assert not isinstance(root_map(states), np.memmap)
    np.testing.assert_array_equal(states, truth.states(2), strict=True)


def test_bfloat16_is_what_torch_says_it_is(folder: Path) -> None:
    import torch

    def as_torch(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
        values: NDArray[np.float32] = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
        return values

    every = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(DTYPES["bfloat16"].decode(every, None), as_torch(every), strict=True)
    truth = tiny_cache.make((64,), dtype="bfloat16", layers=(0,), width=1020)
    truth.raw[0][...] = every[np.isfinite(as_torch(every))].reshape(1, 64, 1020)  # the others are never stored
    states = FeatureCache.open(tiny_cache.store(folder, truth))["s0"]
    np.testing.assert_array_equal(states, as_torch(truth.raw[0]), strict=True)


def test_opening_leaves_no_hdf5_handle(folder: Path, dtype: str) -> None:
    before = h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_ALL)
    cache = FeatureCache.open(tiny_cache.store(folder, tiny_cache.make(dtype=dtype), shard_bytes=60))
    assert len(cache["s0"]) == 3
    cache.tokens()
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_ALL) == before


def test_a_cache_can_be_read_while_it_is_written(folder: Path) -> None:
    truth = tiny_cache.make()
    tiny_cache.store(folder, truth, positions=[0])
    with tiny_cache.FolderWriter(folder) as out:
        for batch in tiny_cache.batches(truth, out, [2, 3]):
            out.write(batch)
        cache = FeatureCache.open(folder)
        assert "s0" in cache
        assert "s1" not in cache
        np.testing.assert_array_equal(cache["s0"], truth.states(0))
    assert FeatureCache.open(folder).ids == ["s0", "s2", "s3"]


# Other processes -------------------------------------------------------------------------------------------------


def read_all(cache: FeatureCache) -> list[NDArray[np.floating]]:
    return [np.array(cache[name]) for name in cache.ids]


class States:
    """What training hands to a DataLoader."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, i: int) -> NDArray[np.floating]:
        return self.cache.batch([self.cache.ids[i]], [0, 2]).states


def test_pickled_it_is_as_small_as_its_name(folder: Path, dtype: str) -> None:
    truth = tiny_cache.make((500, 3), dtype=dtype, width=64)
    cache = FeatureCache.open(tiny_cache.store(folder, truth))
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again.ids == cache.ids
    for i, name in enumerate(truth.ids):
        np.testing.assert_array_equal(again[name], truth.states(i), strict=True)


def test_a_pickled_cache_that_was_replaced_meanwhile_is_not_mistaken(folder: Path) -> None:
    pickled = pickle.dumps(FeatureCache.open(tiny_cache.store(folder, tiny_cache.make())))
    shutil.rmtree(folder)
    tiny_cache.store(folder, tiny_cache.make(fingerprint="fedcba9876543210"))
    with pytest.raises(CacheError, match=f"{folder} was replaced by another cache"):
        pickle.loads(pickled)


@FORKING
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same(folder: Path, method: str) -> None:
    truth = tiny_cache.make(width=9)
    cache = FeatureCache.open(tiny_cache.store(folder, truth, shard_bytes=60))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        found = pool.submit(read_all, cache).result(timeout=60)
    for i, states in enumerate(found):
        np.testing.assert_array_equal(states, truth.states(i), strict=True)
    assert len(found) == 4


@FORKING
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_data_loader_workers_read_the_same(folder: Path, method: str) -> None:
    from torch.utils.data import DataLoader

    truth = tiny_cache.make(tuple(range(1, 9)), dtype="float32")
    cache = FeatureCache.open(tiny_cache.store(folder, truth, shard_bytes=300))
    loader = DataLoader(States(cache), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60)
    found = [np.asarray(states) for states in loader]
    assert len(found) == 8
    for i, states in enumerate(found):
        np.testing.assert_array_equal(states, truth.states(i)[[0, 2]].reshape(-1, 4), strict=True)


# Files that another tool rewrote -----------------------------------------------------------------------------------


def rewrite(path: Path, **options: object) -> None:
    """Copy every data set and attribute into a new file, as another tool would."""
    copy = path.with_suffix(".copy")
    with h5py.File(path, "r") as old, h5py.File(copy, "w") as new:
        new.attrs.update(old.attrs)

        def take(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                more = {key: value for key, value in options.items() if key != "chunks" or name == "hidden"}
                new.create_dataset(name, data=item[...], dtype=item.dtype, **more)

        old.visititems(take)
    copy.replace(path)


REWRITTEN = {
    "gzip": {"compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "shuffled": {"shuffle": True},
    "checksummed": {"fletcher32": True},
    "gzip, other chunks": {"compression": "gzip", "chunks": (5, 3)},
    "other chunks": {"chunks": (5, 4)},
    "chunks that cut the width": {"chunks": (5, 3)},
    "contiguous": {},
}


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize("how", REWRITTEN)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_rewritten_file_gives_the_same_results(folder: Path, dtype: str, how: str) -> None:
    truth = tiny_cache.make((3, 1, 50, 2), dtype=dtype, ids=["ä", "b", "c", "日"])
    for path in tiny_cache.shards(tiny_cache.store(folder, truth, shard_bytes=1000)):
        rewrite(path, **REWRITTEN[how])
    cache = FeatureCache.open(folder)
    assert cache.ids == truth.ids
    if how not in ("contiguous", "other chunks"):
        assert not cache.mapped
    expected_type = cache.states_dtype if cache.mapped else np.dtype(np.float32)
    for i, name in enumerate(truth.ids):
        assert cache[name].dtype == expected_type
        np.testing.assert_array_equal(cache[name], truth.states(i))
        np.testing.assert_array_equal(cache.states(i, [2, 0]), truth.states(i)[[2, 0]])
    batch = cache.batch(["日", "c", "日"], [1, 2])
    for found, i in zip([batch[0], batch[1], batch[2]], [3, 2, 3], strict=True):
        np.testing.assert_array_equal(found, truth.states(i)[1:], strict=True)
    np.testing.assert_array_equal(cache.tokens().input_id, np.concatenate(truth.input_id))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache))["c"], truth.states(2))


def test_one_rewritten_shard_among_others(folder: Path) -> None:
    truth = tiny_cache.make()
    first, *rest = tiny_cache.shards(tiny_cache.store(folder, truth, shard_bytes=60))
    assert rest
    rewrite(first, compression="gzip")
    cache = FeatureCache.open(folder)
    assert not cache.mapped
    for i, name in enumerate(truth.ids):
        np.testing.assert_array_equal(cache[name], truth.states(i))


def test_a_moved_folder_is_still_the_same_cache(folder: Path) -> None:
    truth = tiny_cache.make()
    moved = tiny_cache.store(folder, truth).rename(folder.with_name("moved"))
    np.testing.assert_array_equal(FeatureCache.open(moved)["s1"], truth.states(1))


# Caches that are not finished --------------------------------------------------------------------------------------


def test_only_complete_sequences_are_shown(folder: Path) -> None:
    truth = tiny_cache.make((3, 1, 5, 2))
    cache = FeatureCache.open(tiny_cache.store(folder, truth, shard_bytes=60, positions=[3, 1]))
    assert cache.ids == ["s1", "s3"]
    assert len(cache) == 2
    assert [name in cache for name in ("s0", "s1", "s2", "s3", "s4")] == [False, True, False, True, False]
    assert 1 not in cache
    assert cache.all_ids == ["s0", "s1", "s2", "s3"]
    assert cache.complete.tolist() == [False, True, False, True]
    assert cache.positions(["s3", "s1", "s3"]).tolist() == [3, 1, 3]
    np.testing.assert_array_equal(cache["s3"], truth.states(3))
    for ask in (lambda: cache["s0"], lambda: cache.batch(["s1", "s0"]), lambda: cache.positions(["s0"])):
        with pytest.raises(SequenceNotFoundError, match=f"'s0' in {folder} are not written yet.\nRun .*extract"):
            ask()


def test_an_unknown_id_is_named_with_an_example_of_one_that_is_there(folder: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(folder, tiny_cache.make(ids=["train-1", "b", "c", "d"])))
    with pytest.raises(SequenceNotFoundError, match=f"No sequence 'dev-1' in {folder}.\nIt holds 'train-1'"):
        cache["dev-1"]
    with pytest.raises(KeyError):
        cache.batch(["b", "dev-1"])


def test_a_cache_with_nothing_complete_is_empty_but_opens(folder: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(folder, tiny_cache.make(), positions=[]))
    assert (cache.ids, len(cache), "s0" in cache) == ([], 0, False)


def test_what_is_finished_later_is_shown_when_opened_again(folder: Path) -> None:
    truth = tiny_cache.make()
    before = FeatureCache.open(tiny_cache.store(folder, truth, positions=[0]))
    tiny_cache.write(folder, truth, [1, 2, 3])
    assert before.ids == ["s0"]
    assert FeatureCache.open(folder).ids == truth.ids


def test_a_position_in_place_of_an_id_is_named(tmp_path: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", tiny_cache.make([3, 1])))
    with pytest.raises(SequenceNotFoundError, match="No sequence 0 in"):
        cache[0]  # type: ignore[index]
