"""Damaged files are refused, never misread."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny_cache

from kr2cache import FeatureCache
from kr2cache.errors import CacheError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


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
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 warns
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
