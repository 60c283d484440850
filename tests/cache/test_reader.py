"""Reading gives what was written, whoever reads and however; damaged files are refused, never misread."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kr2cache import FeatureCache
from kr2cache.cache import rows
from kr2cache.cache.dtypes import DTYPES, StoredDtype
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


# Damage ----------------------------------------------------------------------------------------------------------


def read_everything(folder: Path) -> None:
    cache = FeatureCache.open(folder)
    for name in cache.ids:
        cache[name].sum()
    cache.tokens()
    repr(cache)
    assert cache.provenance is not None


@pytest.fixture(scope="module")
def good_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only shard of a good cache. Read only."""
    truth = tiny_cache.make((30, 20, 50), width=16)
    (path,) = tiny_cache.shards(tiny_cache.store(tmp_path_factory.mktemp("good"), truth))
    return path


@pytest.fixture
def shard(folder: Path, good_shard: Path) -> Path:
    """The only shard of a cache that is still good."""
    folder.mkdir()
    return Path(shutil.copy(good_shard, folder))


def refused(shard: Path) -> str:
    with pytest.raises(CacheError) as caught:
        read_everything(shard.parent)
    assert str(shard) in caught.value.message
    return str(caught.value)


def test_a_truncated_file_is_refused_at_every_length(shard: Path) -> None:
    content = shard.read_bytes()
    size = len(content)
    lengths = {0, 1, 7, 8, 48, 95, 96, 511, 2048, 4095, 4096, size // 2, size - 4096, size - 2, size - 1}
    for length in sorted(lengths | set(range(0, size, size // 60))):
        shard.write_bytes(content[:length])
        refused(shard)


def read_damaged(shard: Path, damages: list[dict[int, int]], outcomes: Connection) -> None:
    """For each damage (bytes by offset) send how reading ends."""
    content = shard.read_bytes()
    for damage in damages:
        damaged = bytearray(content)
        for at, byte in damage.items():
            damaged[at] = byte
        shard.write_bytes(damaged)
        try:
            read_everything(shard.parent)
            outcomes.send("read")  # what the index says may be wrong then: verify finds it by its checksum
        except CacheError as error:
            outcomes.send("refused" if str(shard.parent) in error.message else f"no path: {error.message}")
        except BaseException as error:
            outcomes.send(repr(error))


def outcomes_of(shard: Path, damages: list[dict[int, int]]) -> list[str]:
    """How reading each damaged file ends, in a process that may crash or hang."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=read_damaged, args=(shard, damages, there))
    process.start()
    there.close()
    outcomes: list[str] = []
    try:
        while len(outcomes) < len(damages):
            outcomes.append(here.recv() if here.poll(15) else "hangs")
            if outcomes[-1] == "hangs":
                break
    except EOFError:
        outcomes.append("crashes")
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()
    return outcomes


@pytest.mark.usefixtures("forked_programs")
@FORKING
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits_never_end_in_anything_but_a_cache_error(shard: Path, seed: int) -> None:
    content = shard.read_bytes()
    states = range(*(tiny_cache.byte_offset(shard, "hidden") + at for at in (0, 100 * 3 * 16 * 2)))
    elsewhere = [at for at, byte in enumerate(content) if at not in states and (byte or at < 1024)]
    draw = random.Random(seed)
    damages = [
        {at: content[at] ^ draw.randrange(1, 256) for at in draw.sample(elsewhere, draw.choice((1, 1, 4)))}
        for _ in range(120)
    ]
    outcomes = outcomes_of(shard, damages)
    foreign = [(how, damage) for how, damage in zip(outcomes, damages, strict=False) if how not in ("read", "refused")]
    assert foreign == []
    assert outcomes.count("refused") > 10


def test_an_id_that_is_no_utf8_is_a_cache_error(shard: Path) -> None:
    at = tiny_cache.byte_offset(shard, "examples/id")
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    refused(shard)


def change(shard: Path, do: Callable[[h5py.File], object]) -> None:
    with h5py.File(shard, "r+") as file:
        do(file)


def replace(file: h5py.File, name: str, **options: object) -> None:
    del file[name]
    file.create_dataset(name, **options)


def corrupt_values(file: h5py.File, name: str, i: int, value: int) -> None:
    file[name][i] = value


ATTRIBUTES = {
    "another format": ("format", "safetensors"),
    "format is a number": ("format", 1),
    "format is several": ("format", ["kr2cache", "kr2cache"]),
    "a later version": ("format_version", 2),
    "version 0": ("format_version", 0),
    "version is text": ("format_version", "one"),
    "version is nan": ("format_version", float("nan")),
    "version is infinite": ("format_version", float("inf")),
    "version is empty": ("format_version", h5py.Empty("i8")),
    "an unknown dtype": ("dtype", "float64"),
    "dtype is a number": ("dtype", 16),
    "dtype of other data": ("dtype", "float32"),
    "int8 without scales": ("dtype", "int8"),
    "no layers": ("layers", np.zeros(0, dtype=np.int64)),
    "layers is one number": ("layers", 3),
    "layers is text": ("layers", "all"),
    "negative layers": ("layers", [-1, 0, 1]),
    "more layers than the model": ("layers", [0, 1, 3]),
    "fewer layers than rows": ("layers", [0, 1]),
    "fewer model layers": ("model_layers", 2),
    "model_layers is text": ("model_layers", "three"),
    "provenance is no JSON": ("provenance", "{"),
    "provenance is a list": ("provenance", "[]"),
    "provenance is a number": ("provenance", 3),
    "provenance is nested deeply": ("provenance", "[" * 50_000),
    "batch_plan is no JSON": ("batch_plan", ""),
    "fusion is no JSON": ("fusion", "uniform"),
    "fusion of several layers": ("fusion", '{"layers": [0], "weights": [1]}'),
}


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize("what", ATTRIBUTES)
def test_an_attribute_that_is_wrong_is_refused(shard: Path, what: str) -> None:
    name, value = ATTRIBUTES[what]
    change(shard, lambda file: file.attrs.__setitem__(name, value))
    message = refused(shard)
    if what == "a later version":
        assert "format version 2; this kr2cache reads version 1" in message


@pytest.mark.parametrize(
    "name", ["format", "format_version", "dtype", "layers", "model_layers", "fingerprint", "provenance", "batch_plan"]
)
def test_an_attribute_that_is_missing_is_refused(shard: Path, name: str) -> None:
    change(shard, lambda file: file.attrs.__delitem__(name))
    refused(shard)


@pytest.mark.parametrize("name", [*tiny_cache.DATASETS, "examples", "tokens"])
def test_a_data_set_that_is_missing_is_refused(shard: Path, name: str) -> None:
    change(shard, lambda file: file.__delitem__(name))
    refused(shard)


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize("name", tiny_cache.DATASETS)
@pytest.mark.parametrize(
    "options",
    [
        {"data": np.arange(100, dtype=">f8")},
        {"data": "text"},
        {"data": h5py.Empty("f2")},
        {"data": np.zeros((2, 3, 4), dtype="<f2")},
        {"shape": (0,), "dtype": "<i4"},
        {"shape": (0, 0), "dtype": "<f2"},
        {"data": np.zeros(3, dtype=[("a", "<i4"), ("b", "<f4")])},
        {"data": ["of any length"] * 3},
    ],
    ids=["float64", "text", "empty", "rank-3", "none", "none-2d", "compound", "strings"],
)
def test_a_data_set_of_another_type_or_shape_is_refused(shard: Path, name: str, options: dict[str, object]) -> None:
    change(shard, lambda file: replace(file, name, **options))
    refused(shard)


@pytest.mark.parametrize("name", ["hidden", "examples/id", "examples", "tokens"])
def test_a_group_where_a_data_set_belongs_or_the_reverse_is_refused(shard: Path, name: str) -> None:
    def swap(file: h5py.File) -> None:
        group = isinstance(file[name], h5py.Group)
        del file[name]
        if group:
            file.create_dataset(name, data=np.zeros(3))
        else:
            file.create_group(name)

    change(shard, swap)
    refused(shard)


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("soft", name) for name in tiny_cache.DATASETS]
    + [(kind, name) for kind in ("external", "dangling") for name in (*tiny_cache.DATASETS, "examples", "tokens")],
)
def test_links_out_of_the_file_or_astray_are_refused(shard: Path, name: str, kind: str) -> None:
    other = shard.with_name("other")  # not .h5: no shard of this folder
    shutil.copy(shard, other)

    def link(file: h5py.File) -> None:
        if kind == "soft":
            file.move(name, "elsewhere")
            file[name] = h5py.SoftLink("/elsewhere")
        else:
            del file[name]
            file[name] = h5py.ExternalLink("other", name if kind == "external" else "nothing")

    change(shard, link)
    refused(shard)


@pytest.mark.parametrize("what", ["virtual", "external"])
def test_states_that_lie_in_other_files_are_refused(shard: Path, what: str) -> None:
    with h5py.File(shard, "r") as file:
        shape, states = file["hidden"].shape, file["hidden"][...]

    def move_out(file: h5py.File) -> None:
        del file["hidden"]
        if what == "external":
            raw = shard.with_name("raw")
            raw.write_bytes(states.tobytes())
            file.create_dataset("hidden", shape, "<f2", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
        else:
            shutil.copy(shard, shard.with_name("other"))
            layout = h5py.VirtualLayout(shape, "<f2")
            layout[...] = h5py.VirtualSource(str(shard.with_name("other")), "hidden", shape)
            file.create_virtual_dataset("hidden", layout)

    change(shard, move_out)
    refused(shard)


INDEX = {
    "a sequence without tokens": ("examples/n_tokens", 0, 0),
    "a negative length": ("examples/n_tokens", 0, -30),
    "a longer sequence": ("examples/n_tokens", 1, 21),
    "rows that do not begin at 0": ("examples/first_row", 0, 1),
    "rows beyond the states": ("examples/first_row", 3, 2**60),
    "rows in another order": ("examples/first_row", 1, 200),
}


@pytest.mark.parametrize("what", INDEX)
def test_an_index_that_contradicts_itself_is_refused(shard: Path, what: str) -> None:
    change(shard, lambda file: corrupt_values(file, *INDEX[what]))
    refused(shard)


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize("name", [name for name in tiny_cache.DATASETS if name != "hidden"])
def test_an_index_of_another_length_is_refused(shard: Path, name: str) -> None:
    with h5py.File(shard, "r") as file:
        array = file[name][...]
    change(shard, lambda file: replace(file, name, data=array[:-1], dtype=array.dtype))
    refused(shard)


def test_scales_of_another_length_are_refused(folder: Path) -> None:
    (path,) = tiny_cache.shards(tiny_cache.store(folder, tiny_cache.make(dtype="int8")))
    change(path, lambda file: replace(file, "hidden_scale", data=np.ones(4, dtype="<f4")))
    assert "4 scales for 33 rows" in refused(path)


@pytest.mark.parametrize("name", ["hidden", "tokens/input_id", "examples/id"])
def test_a_size_that_no_memory_holds_is_refused(shard: Path, name: str) -> None:
    """A data set that only claims its size: chunked, none of it written."""
    with h5py.File(shard, "r") as file:
        kind, rank = file[name].dtype, len(file[name].shape)
    shape = (2**55, 16)[:rank]
    change(shard, lambda file: replace(file, name, shape=shape, dtype=kind, chunks=(1024, 16)[:rank]))
    refused(shard)


def test_what_is_no_hdf5_file_is_refused(folder: Path) -> None:
    folder.mkdir()
    path = folder / "shard-00000-of-00001.h5"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(path)


def test_another_kind_of_hdf5_file_is_refused(folder: Path) -> None:
    folder.mkdir()
    path = folder / "shard-00000-of-00001.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.arange(10)
    assert "not a kr2cache shard" in refused(path)


@pytest.mark.parametrize("what", ["folder", "dangling link", "link to itself"])
def test_a_shard_that_is_no_file_is_refused(folder: Path, what: str) -> None:
    folder.mkdir()
    path = folder / "shard-00000-of-00001.h5"
    if what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if what == "link to itself" else folder / "nothing")
    refused(path)


@pytest.mark.parametrize("name", ["nothing", "a file", "empty", "x" * 300, "with\0nul"])
def test_a_folder_without_a_cache_is_refused(tmp_path: Path, name: str) -> None:
    if name == "a file":
        (tmp_path / name).write_text("")
    if name == "empty":
        (tmp_path / name).mkdir()
    with pytest.raises(CacheError) as caught:
        FeatureCache.open(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message
    assert "kr2cache extract" in caught.value.remedy


def several_shards(folder: Path) -> Iterator[Path]:
    paths = tiny_cache.shards(tiny_cache.store(folder, tiny_cache.make(), shard_bytes=60))
    assert len(paths) == 4
    yield from paths


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_shard_is_refused(folder: Path, missing: int) -> None:
    list(several_shards(folder))[missing].unlink()
    with pytest.raises(CacheError, match=f"{folder} should hold 00004 shards, but holds 3"):
        FeatureCache.open(folder)


@pytest.mark.parametrize(
    "name", ["shard-00004-of-00005.h5", "shard-00000-of-00001.h5", "other.h5", "a-b-c.h5", "0-².h5"]
)
def test_a_shard_too_many_is_refused(folder: Path, name: str) -> None:
    first, *_ = several_shards(folder)
    shutil.copy(first, folder / name)
    with pytest.raises(CacheError) as caught:
        FeatureCache.open(folder)
    assert str(folder) in caught.value.message


def test_a_name_that_promises_countless_shards_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "shard-00000-of-999999999999.h5").write_text("")
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "from kr2cache import FeatureCache\n"
        "from kr2cache.errors import CacheError\n"
        "try:\n    FeatureCache.open(sys.argv[1])\n"
        "except CacheError as error:\n    print(error.message)\n"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert str(tmp_path) in done.stdout, done.stderr


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "fedcba9876543210"},
        {"width": 5},
        {"dtype": "float32"},
        {"layers": (0, 1)},
        {"model_layers": 7},
    ],
    ids=str,
)
def test_a_shard_of_another_cache_is_refused(folder: Path, tmp_path: Path, other: dict[str, object]) -> None:
    *_, last = several_shards(folder)
    foreign = tiny_cache.store(tmp_path / "other", tiny_cache.make(**other), shard_bytes=1)  # type: ignore[arg-type]
    shutil.copy(foreign / last.name, last)
    assert "another cache" in refused(last)


def test_an_id_in_two_shards_is_refused(folder: Path) -> None:
    paths = list(several_shards(folder))
    shutil.copy(paths[0], paths[1])
    with pytest.raises(CacheError) as caught:
        read_everything(folder)
    assert str(folder) in caught.value.message


def test_a_file_that_this_process_has_open_already_is_read_all_the_same(shard: Path) -> None:
    with h5py.File(shard, "r"):
        assert len(FeatureCache.open(shard.parent)) > 0


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_reading_ahead_changes_no_result(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range has to lie in its file, the last one too."""
    truth = tiny_cache.make([3, 1, 7, 2, 5], dtype=dtype, layers=[0, 1, 2, 4], model_layers=5, width=2_000)
    folder = tiny_cache.store(tmp_path / "cache", truth, shard_bytes=150_000)
    as_ever = FeatureCache.open(folder)
    monkeypatch.setattr(rows, "MEMORY_SHARE", 0)
    ahead = FeatureCache.open(folder)
    assert (as_ever._rows.is_large, ahead._rows.is_large) == (False, True)
    names = [*ahead.ids[::-1], ahead.ids[2]]
    for layers in (None, (4,), (1, 2), (2, 1), (4, 0), (0, 2, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(rows, "READ_AHEAD", None)
            expected = as_ever.batch(names, layers).states
        np.testing.assert_array_equal(ahead.batch(names, layers).states, expected)
        np.testing.assert_array_equal(as_ever.batch(names, layers).states, expected)


class Watched:
    """What the states of a cache of one shard were asked for, and when they were touched, as ranges of bytes."""

    def __init__(self, cache: FeatureCache, shard: Path, row_bytes: int) -> None:
        self.size, self.row_bytes = shard.stat().st_size, row_bytes
        self.hidden = tiny_cache.byte_offset(shard, "hidden")
        self.events: list[tuple[str, int, int]] = []
        self._rows = cache._rows._hidden[0]
        cache._rows._maps, cache._rows._hidden = [self], [self]  # type: ignore[list-item]

    def madvise(self, advice: int, start: int, length: int) -> None:
        assert advice == rows.READ_AHEAD
        assert start % mmap.PAGESIZE == 0
        assert 0 < length <= 128 * 1024, "more than every disk takes"
        assert start + length <= self.size
        first = start if start > self.hidden else self.hidden  # the first page may begin before
        if self.events and self.events[-1][0] == "asked" and self.events[-1][2] == start:
            self.events[-1] = ("asked", self.events[-1][1], start + length)
        else:
            self.events.append(("asked", first, start + length))

    def __getitem__(self, rows: slice) -> NDArray[np.generic]:
        self.events.append(("touched", *self.bytes(rows.start, rows.stop)))
        assert self._rows is not None
        return self._rows[rows]

    def bytes(self, start: int, stop: int) -> tuple[int, int]:
        return self.hidden + start * self.row_bytes, self.hidden + stop * self.row_bytes

    def asked(self, start: int, stop: int) -> tuple[str, int, int]:
        """For these rows, from the page on that the first of them lies in."""
        first, last = self.bytes(start, stop)
        return "asked", max(first // mmap.PAGESIZE * mmap.PAGESIZE, self.hidden), last

    def touched(self, start: int, stop: int) -> tuple[str, int, int]:
        return "touched", *self.bytes(start, stop)

    def of(self, read: Callable[[], object]) -> list[tuple[str, int, int]]:
        self.events = []
        read()
        return self.events


@pytest.mark.parametrize("large", [False, True], ids=["stays in memory", "larger than memory"])
def test_states_are_asked_for_before_they_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """All of them, nothing else; of what stays in memory once."""
    width, layers = 20_000, 3
    truth = tiny_cache.make([3, 70, 1, 2], width=width)
    folder = tiny_cache.store(tmp_path / "cache", truth)
    if large:
        monkeypatch.setattr(rows, "MEMORY_SHARE", 0)
    cache = FeatureCache.open(folder)
    watched = Watched(cache, tiny_cache.shards(folder)[0], 2 * width)
    asked, touched = watched.asked, watched.touched
    long, last = (3 * layers, 73 * layers), (74 * layers, 76 * layers)
    both = [touched(*long), touched(*last)]
    assert watched.of(lambda: cache.batch(["s1", "s3"])) == [asked(*long), asked(*last), *both]
    again = [asked(*last), asked(*long)] if large else []
    assert watched.of(lambda: cache.batch(["s3", "s1"])) == [*again, *both[::-1]]
    assert watched.of(lambda: cache["s3"]) == [*([asked(*last)] if large else []), touched(*last)]
    assert watched.of(lambda: cache["s0"]) == [asked(0, 3 * layers), touched(0, 3 * layers)]
    # Layer by layer: s3 has two rows of each.
    at = 74 * layers
    for names in ((1, 2), (2,)):
        span = (at + 2 * names[0], at + 6)
        assert watched.of(lambda names=names: cache.batch(["s3"], names)) == [asked(*span), touched(*span)]
    apart = [asked(at, at + 2), asked(at + 4, at + 6), touched(at, at + 6)]
    assert watched.of(lambda: cache.batch(["s3"], (2, 0))) == apart, "layer 1 is not asked for"


def test_what_is_checked_is_asked_for_whole(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make([3, 4], width=20_000))
    cache = FeatureCache.open(folder)
    watched = Watched(cache, tiny_cache.shards(folder)[0], 40_000)
    cache.check_on_read = True
    assert watched.of(lambda: cache.batch(["s1"], (2,)))[:2] == [watched.asked(9, 21), watched.touched(9, 21)]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_layers_between_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """They would be touched, and were not asked for."""
    truth = tiny_cache.make([3, 4], dtype=dtype)
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    decoded: list[tuple[int, ...]] = []

    stored = type(DTYPES[dtype])
    decode = stored.decode

    def watched(self: StoredDtype, raw: NDArray[np.generic], *rest: Any) -> NDArray[np.floating]:
        decoded.append(raw.shape)
        return decode(self, raw, *rest)

    monkeypatch.setattr(stored, "decode", watched)
    np.testing.assert_array_equal(cache.states(1, (2, 0)), truth.states(1)[[2, 0]])
    np.testing.assert_array_equal(cache.states(1, (1, 2)), truth.states(1)[[1, 2]])
    assert [shape[:2] for shape in decoded] == [(2, 4), (2, 4)]


def test_scales_are_asked_for_as_well(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make([300, 400], dtype="int8", width=5))
    (shard,) = tiny_cache.shards(folder)
    cache = FeatureCache.open(folder)
    watched = Watched(cache, shard, 5)
    scales = tiny_cache.byte_offset(shard, "hidden_scale")
    page = mmap.PAGESIZE
    *asked, _ = watched.of(lambda: cache["s1"])
    first = (scales + 4 * 900) // page * page
    assert asked == [watched.asked(900, 2100), ("asked", max(first, watched.hidden), scales + 4 * 2100)]


def test_advice_that_the_system_does_not_take_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = tiny_cache.make([3, 4])
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    monkeypatch.setattr(rows, "READ_AHEAD", 9999)
    np.testing.assert_array_equal(cache["s1"], truth.states(1))


def test_a_batch_lies_as_the_file_does(tmp_path: Path) -> None:
    """Copying takes up to half as long again where it does not."""
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", tiny_cache.make([3, 4, 5], width=32)))
    for names in (["s0"], ["s2", "s1"]):
        assert cache.batch(names).states.ctypes.data % 64 == cache["s0"].ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_a_batch_into_memory_that_is_used_again(tmp_path: Path, dtype: str) -> None:
    truth = tiny_cache.make([3, 1, 7, 2], dtype=dtype, layers=[0, 1, 3], model_layers=4)
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth, shard_bytes=60))
    assert len(tiny_cache.shards(cache.folder)) > 1
    for layers, places in ((None, [0, 1, 2]), ((1, 3), [1, 2]), ((3, 0), [2, 0]), ((0, 0), [0, 0])):
        out = cache.buffer(3, layers)
        assert out.ctypes.data % 64 == 0
        for names in (["s2", "s2", "s2"], ["s0", "s3"], ["s1"]):
            out[...] = 77
            batch = cache.batch(names, layers, out=out)
            assert np.shares_memory(batch.states, out)
            assert [len(batch), batch.states.shape[0]] == [len(names), batch.first_row[-1]]
            for i, name in enumerate(names):
                np.testing.assert_array_equal(batch[i], truth.states(int(name[1:]))[places], strict=True)
            assert (out[len(batch.states) :] == 77).all(), "no more than the batch"


def test_memory_of_another_kind_is_refused(tmp_path: Path) -> None:
    truth = tiny_cache.make([3, 1, 7], width=8)
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", truth))
    fits = np.zeros((12, 8), dtype=np.float16)
    read_only = fits.copy()
    read_only.flags.writeable = False
    for out, said in (
        (np.zeros((11, 8), dtype=np.float16), r"float16 of shape \(11, 8\)\. .* 12 or more rows of 8"),
        (np.zeros((12, 9), dtype=np.float16), r"\(12, 9\)"),
        (np.zeros((12, 8), dtype=np.float32), "float32 of"),
        (np.zeros(96, dtype=np.float16), r"\(96,\)"),
        (np.zeros((12, 16), dtype=np.float16)[:, ::2], "not contiguous"),
        (np.zeros((24, 8), dtype=np.float16)[::2], "not contiguous"),
        (read_only, "read-only"),
        ([0.0], "out is a list"),
    ):
        before = np.array(out)
        with pytest.raises(ConfigError, match=said):
            cache.batch(["s0", "s1"], out=out)  # type: ignore[arg-type]
        np.testing.assert_array_equal(out, before)
    cache.batch(["s0", "s1"], out=fits)
    np.testing.assert_array_equal(fits, np.concatenate([truth.states(i).reshape(-1, 8) for i in (0, 1)]))
    with pytest.raises(SequenceNotFoundError):
        cache.batch(["s0", "x"], out=fits)


def steps_of(work: Callable[[], object]) -> int:
    """Functions called, Python's and C's: what the time of small work goes by, on a machine of any speed."""
    calls = [0]

    def count(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls[0]


def test_what_is_small_takes_few_steps(tmp_path: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", tiny_cache.make([3] * 64)))
    names = [f"s{i}" for i in range(32)]
    cache.batch(names)
    one = steps_of(lambda: cache["s1"])
    first, all_of_them = steps_of(lambda: cache.batch(names[:1])), steps_of(lambda: cache.batch(names))
    assert one <= 32
    assert first <= 42
    assert (all_of_them - first) / 31 <= 7
    with pytest.raises(ValueError, match="read-only"):
        cache["s1"][0, 0, 0] = 1


def test_a_position_in_place_of_an_id_is_named(tmp_path: Path) -> None:
    cache = FeatureCache.open(tiny_cache.store(tmp_path / "cache", tiny_cache.make([3, 1])))
    with pytest.raises(SequenceNotFoundError, match="No sequence 0 in"):
        cache[0]  # type: ignore[index]
