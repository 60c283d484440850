"""The file, read with plain h5py or by hand, is what the format's contract says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny_cache
import xxhash

from kr2cache.cache.format import canonical_json, chunk_rows, encode_ids, shard_name, text_xxh3
from kr2cache.errors import CacheError, ConfigError

TYPES = {
    "examples/complete": "|u1",
    "examples/first_row": "<i8",
    "examples/n_tokens": "<i4",
    "examples/text_xxh3": "<u8",
    "examples/xxh3": "<u8",
    "tokens/input_id": "<i4",
    "tokens/word_index": "<i4",
}


def only_shard(folder: Path) -> Path:
    (path,) = tiny_cache.shards(folder)
    return path


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_data_sets_have_the_names_shapes_and_types_of_the_contract(tmp_path: Path, dtype: str) -> None:
    truth = tiny_cache.make((3, 1, 5), dtype=dtype, layers=(1, 2), width=6, ids=["a", "ßß", "日本語"])
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    shapes = {
        "hidden": (18, 6),
        "examples/complete": (3,),
        "examples/first_row": (4,),
        "examples/id": (3,),
        "examples/n_tokens": (3,),
        "examples/text_xxh3": (3,),
        "examples/xxh3": (3,),
        "tokens/input_id": (9,),
        "tokens/word_index": (9,),
    }
    if dtype == "int8":
        shapes["hidden_scale"] = (18,)
    assert path.name == "shard-00000-of-00001.h5"
    with h5py.File(path, "r") as file:
        found: dict[str, tuple[int, ...]] = {}
        file.visititems(lambda name, item: found.update({name: item.shape} if isinstance(item, h5py.Dataset) else {}))
        assert found == shapes
        assert {name: file[name].dtype for name in TYPES} == TYPES
        assert file["hidden"].dtype == tiny_cache.STORED[dtype]
        if dtype == "int8":
            assert file["hidden_scale"].dtype == "<f4"
        string = h5py.check_string_dtype(file["examples/id"].dtype)
        assert (string.encoding, string.length) == ("utf-8", 9)
        for name in found:
            properties = file[name].id.get_create_plist()
            assert properties.get_nfilters() == 0
            assert properties.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
            assert properties.get_fill_time() == h5py.h5d.FILL_TIME_NEVER
            assert file[name].maxshape == file[name].shape
            layout = h5py.h5d.CHUNKED if name == "hidden" else h5py.h5d.CONTIGUOUS
            assert properties.get_layout() == layout, name
        assert file["hidden"].chunks == (18, 6)


@pytest.mark.parametrize(("dtype", "item"), [("float16", 2), ("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_a_chunk_is_about_8_mib_and_none_is_nearly_empty(dtype: str, item: int) -> None:
    for width in (1, 384, 768, 1024, 4096, 5000):
        most = 8 * 2**20 // (width * item)
        assert 0.99 * 8 * 2**20 < chunk_rows(10**9, width, dtype) * width * item <= 8 * 2**20
        for rows in (7, most - 1, most, most + 1, 2 * most + 1, 5 * most - 3):
            inside = chunk_rows(rows, width, dtype)
            chunks = -(-rows // inside)
            assert inside <= most
            assert chunks == -(-rows // most), "no more of them than needed"
            assert chunks * inside - rows < chunks, "less than a row of each is left over"
        assert chunk_rows(7, width, dtype) == 7
    assert chunk_rows(10, 10**8, dtype) == 1
    assert chunk_rows(0, width, dtype) == 1


def test_several_chunks_are_one_plain_array(tmp_path: Path) -> None:
    truth = tiny_cache.make((40, 50, 61), width=32768, layers=(0, 1))
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    with h5py.File(path, "r") as file:
        hidden = file["hidden"]
        assert hidden.chunks == (101, 32768)  # 8 MiB of float16 are 128 rows; the third chunk is not full
        assert hidden.id.get_num_chunks() == 3
        through_hdf5 = hidden[...]
    offset = tiny_cache.byte_offset(path, "hidden")
    by_hand = np.memmap(path, dtype="<f2", mode="r", offset=offset, shape=(302, 32768))
    assert offset % 4096 == 0
    np.testing.assert_array_equal(by_hand, np.concatenate([raw.reshape(-1, 32768) for raw in truth.raw]))
    np.testing.assert_array_equal(by_hand, through_hdf5)


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_the_states_lie_at_a_page_boundary_where_a_map_by_hand_finds_them(tmp_path: Path, dtype: str) -> None:
    truth = tiny_cache.make((300, 1, 512), dtype=dtype, width=8)
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    offset = tiny_cache.byte_offset(path, "hidden")
    rows = 3 * 813
    by_hand = np.memmap(path, dtype=tiny_cache.STORED[dtype], mode="r", offset=offset, shape=(rows, 8))
    assert offset % 4096 == 0
    np.testing.assert_array_equal(by_hand, np.concatenate([raw.reshape(-1, 8) for raw in truth.raw]))
    if dtype == "int8":
        at = tiny_cache.byte_offset(path, "hidden_scale")
        scales = np.memmap(path, dtype="<f4", mode="r", offset=at, shape=(rows,))
        np.testing.assert_array_equal(scales, np.concatenate([scale.reshape(-1) for scale in truth.scale]))


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_a_cache_of_a_few_bytes_has_its_states_at_a_page_boundary_too(tmp_path: Path, dtype: str) -> None:
    path = only_shard(tiny_cache.store(tmp_path / "cache", tiny_cache.make((1,), dtype=dtype, width=1)))
    assert tiny_cache.byte_offset(path, "hidden") % 4096 == 0


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_plain_h5py_gives_the_states_that_were_written(tmp_path: Path, dtype: str) -> None:
    truth = tiny_cache.make((3, 1, 512, 2), dtype=dtype, layers=(0, 2, 5), model_layers=7, width=5)
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth, positions=(2, 0, 3, 1)))
    with h5py.File(path, "r") as file:
        first_row = file["examples/first_row"][...]
        assert first_row.tolist() == [0, 9, 12, 1548, 1554]
        assert file["examples/n_tokens"][...].tolist() == [3, 1, 512, 2]
        assert file["examples/complete"][...].tolist() == [1, 1, 1, 1]
        assert file["examples/id"].asstr()[...].tolist() == truth.ids
        for i, tokens in enumerate(truth.n_tokens):
            rows = file["hidden"][first_row[i] : first_row[i + 1]]
            np.testing.assert_array_equal(rows.reshape(3, tokens, 5), truth.raw[i])
            if dtype == "int8":
                scale = file["hidden_scale"][first_row[i] : first_row[i + 1]]
                np.testing.assert_array_equal(scale.reshape(3, tokens), truth.scale[i])
            expected = xxhash.xxh3_64(truth.stored_bytes(i)).intdigest()
            assert int(file["examples/xxh3"][i]) == expected
        np.testing.assert_array_equal(file["tokens/input_id"][...], np.concatenate(truth.input_id))
        np.testing.assert_array_equal(file["tokens/word_index"][...], np.concatenate(truth.word_index))


def test_bfloat16_is_the_upper_half_of_each_float32(tmp_path: Path) -> None:
    truth = tiny_cache.make((2,), dtype="bfloat16", layers=(0,), width=2)
    truth.raw[0][...] = [[[0x3F80, 0xC000], [0x7F7F, 0x0000]]]
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    with h5py.File(path, "r") as file:
        bits = file["hidden"][...].astype(np.uint32) * 65536
    np.testing.assert_array_equal(bits.view(np.float32), np.float32([[1.0, -2.0], [3.3895314e38, 0.0]]))


def test_attributes_say_what_the_contract_lists(tmp_path: Path) -> None:
    truth = tiny_cache.make((2, 3), layers=(0, 4), model_layers=13)
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    with h5py.File(path, "r") as file:
        attributes = dict(file.attrs)
    assert attributes.pop("layers").tolist() == [0, 4]
    provenance = json.loads(attributes.pop("provenance"))
    assert len(provenance.pop("header_xxh3")) == 16
    assert provenance == truth.header.provenance
    assert json.loads(attributes.pop("batch_plan")) == truth.header.batch_plan
    assert attributes.pop("index_xxh3").dtype == np.uint64
    assert attributes == {
        "format": "kr2cache",
        "format_version": 1,
        "dtype": "float16",
        "model_layers": 13,
        "fingerprint": "0123456789abcdef",
    }


def test_a_fused_cache_says_of_which_layers_with_which_weights(tmp_path: Path) -> None:
    fusion = {"layers": [9, 10, 11, 12], "weights": [0.25] * 4}
    truth = tiny_cache.make((2, 3), layers=(12,), model_layers=13, fusion=fusion)
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    with h5py.File(path, "r") as file:
        assert json.loads(file.attrs["fusion"]) == fusion
        assert file["hidden"].shape == (5, 4)
    with pytest.raises(CacheError, match="stores one layer, but this header names 2"):
        tiny_cache.make((2,), layers=(0, 1), fusion=fusion)


@pytest.mark.parametrize("dtype", tiny_cache.DTYPES)
def test_index_xxh3_is_of_the_data_sets_fixed_at_creation(tmp_path: Path, dtype: str) -> None:
    truth = tiny_cache.make((2, 3, 1), dtype=dtype, ids=["é", "train-s1", "日"])
    folder = tiny_cache.store(tmp_path / "cache", truth, shard_bytes=1)
    assert len(tiny_cache.shards(folder)) == 3
    for path in tiny_cache.shards(folder):
        with h5py.File(path, "r") as file:
            content = b"".join(
                file[name][...].tobytes()
                for name in (
                    "examples/id",
                    "examples/first_row",
                    "examples/n_tokens",
                    "examples/text_xxh3",
                    "tokens/input_id",
                    "tokens/word_index",
                )
            )
            assert int(file.attrs["index_xxh3"]) == xxhash.xxh3_64(content).intdigest()


@pytest.mark.parametrize("words", [["ich"], ["Über", "Größe"], ["a b", "c"], ["a", "b c"], ["日本", "🙂"], [""]])
def test_a_text_is_hashed_as_its_words_joined_by_the_unit_separator(words: list[str]) -> None:
    content = words[0].encode()
    for word in words[1:]:
        content += b"\x1f" + word.encode()
    assert text_xxh3(words) == xxhash.xxh3_64(content).intdigest()


def test_the_text_hashes_are_stored(tmp_path: Path) -> None:
    truth = tiny_cache.make((2, 3))
    truth.words = [["Das", "Haus"], ["ein", "großer", "Hund"]]
    path = only_shard(tiny_cache.store(tmp_path / "cache", truth))
    expected = [xxhash.xxh3_64("\x1f".join(words).encode()).intdigest() for words in truth.words]
    with h5py.File(path, "r") as file:
        assert file["examples/text_xxh3"][...].tolist() == expected


def test_equal_content_is_equal_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    made = []
    for number, at_once in enumerate((1, 3)):
        for dtype in tiny_cache.DTYPES:
            order = range(4) if number else reversed(range(4))
            truth = tiny_cache.make(dtype=dtype, width=7)
            folder = tmp_path / f"run-{number}" / dtype
            tiny_cache.store(folder, truth, shard_bytes=200, positions=order, at_once=at_once)
        made.append({dtype: tiny_cache.folder_bytes(tmp_path / f"run-{number}" / dtype) for dtype in tiny_cache.DTYPES})
        time.sleep(1.1 if number == 0 else 0)  # HDF5 keeps times in whole seconds
    assert len(made[0]["float16"]) > 1
    assert made[0] == made[1]


def test_other_content_is_other_bytes(tmp_path: Path) -> None:
    first = only_shard(tiny_cache.store(tmp_path / "a", tiny_cache.make(seed=0))).read_bytes()
    second = only_shard(tiny_cache.store(tmp_path / "b", tiny_cache.make(seed=1))).read_bytes()
    assert len(first) == len(second)
    assert first != second


@pytest.mark.parametrize("name", ["", "a\0b", "\0"])
def test_an_id_that_cannot_be_kept_is_refused(name: str) -> None:
    with pytest.raises(CacheError, match="cannot be the id of a sequence"):
        encode_ids(["fine", name])


def test_an_id_that_is_no_unicode_text_is_refused() -> None:
    with pytest.raises(CacheError):
        encode_ids(["fine", "\ud800"])  # as JSON may hold it


def test_ids_are_as_long_as_the_longest_in_utf8() -> None:
    encoded = encode_ids(["a", "日本", "ß"])
    assert encoded.dtype == "S6"
    assert [raw.decode() for raw in encoded.tolist()] == ["a", "日本", "ß"]


def test_names_and_json_are_the_same_every_time() -> None:
    assert shard_name(7, 12) == "shard-00007-of-00012.h5"
    assert canonical_json({"b": [1, 0.5], "a": "ß"}) == canonical_json({"a": "ß", "b": [1, 0.5]})
    assert canonical_json({"b": [1, 0.5], "a": "ß"}) == '{"a":"ß","b":[1,0.5]}'


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    header = tiny_cache.make().header
    with pytest.raises(ConfigError, match=r"float64.*\n.*float16, float32, bfloat16, int8"):
        type(header)(**{**vars(header), "dtype": "float64"})


def test_reading_a_cache_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = tiny_cache.store(tmp_path / "cache", tiny_cache.make())
    program = (
        "import sys\n"
        "from kr2cache import FeatureCache\n"
        "print(FeatureCache.open(sys.argv[1])['s2'].shape)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 5, 4)\n[]\n"
