"""Pooled caches against means that NumPy takes of transformers' own hidden states."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny
import tiny_cache
import torch
import trained
from numpy.typing import NDArray
from test_canaries import other_states
from test_extract import interrupt_after
from tokenizers import normalizers
from transformers import AutoModel, AutoTokenizer
from world import World, count_resource_batches, world_of_pairs

from kr2cache import FeatureCache
from kr2cache.cache.format import SPECIAL, SequenceIndex
from kr2cache.cache.pooling import count_positions, pooled
from kr2cache.cache.writer import PackedStates, ShardWriter
from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.errors import (
    CacheError,
    CacheMismatchError,
    ConfigError,
    DataError,
    InterruptedWorkError,
    UnsupportedModelError,
)
from kr2cache.extraction import canaries
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import plan_extraction
from kr2cache.extraction.repair import repair
from kr2cache.extraction.rerun import RerunConfig
from kr2cache.models.states import means
from kr2cache.prediction.predict import Predictor
from kr2cache.store.derive import derive, plan_fusion, plan_slice
from kr2cache.tasks import Example, find_task

POOLS = ("word", "sequence")
ROUNDING = {"float32": 2e-5, "float16": 2**-10, "bfloat16": 2**-8, "int8": 2**-7}
"""Of a mean, relative to the largest of its row."""
TEXTS = (
    ("das",),  # one word, one token
    ("x", "y", "z"),
    ("nebenan" * 6, "haus"),  # a word of many tokens
    ("слово", "한국어", "漢字", "ein"),
    ("zwölf", "häuser", ",", "und", "Pferde", "7", "!"),
    ("haus", "haus", "haus"),  # equal words
)


def plain(model: Path, cache_dir: Path, texts: Sequence[tuple[str, ...]], task: str, **settings: Any) -> FeatureCache:
    config = ExtractConfig(
        **{
            "resource": str(model),
            "split": "train",
            "task": task,
            "device": "cpu",
            "cache_dir": cache_dir,
            "tokens_per_batch": 48,
            **settings,
        }
    )
    examples = [Example(f"s{i}", (text,), None) for i, text in enumerate(texts)]
    return FeatureCache.open(extract(plan_extraction(config, examples)).cache)


def expected(model: Path, text: Any, pool: str, max_length: int = 128) -> tuple[NDArray[np.float64], list[int]]:
    """The means that NumPy takes of the states that transformers gives for one text, (L, positions, D), and the place
    of the first token of each.

    Args:
        text: The arguments of the tokenizer: a list of words, or one or two strings.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = isinstance(text, list)
    segments = not words and json.loads((model / "config.json").read_text("utf-8"))["type_vocab_size"] > 1
    inputs = tokenizer(
        *([one] for one in ([text] if words else text)),  # a batch: alone, an empty second segment is no segment
        is_split_into_words=words,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=segments,
        return_tensors="pt",
    )
    loaded = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        states = torch.cat(loaded(**inputs, output_hidden_states=True).hidden_states).double().numpy()
    groups: dict[Any, list[int]] = {}
    for place, (word, segment) in enumerate(zip(inputs.word_ids(), inputs.sequence_ids(), strict=True)):
        if word is not None:
            groups.setdefault((segment, word) if pool == "word" else 0, []).append(place)
    return (
        np.stack([states[:, places].mean(axis=1) for places in groups.values()], axis=1),
        [places[0] for places in groups.values()],
    )


def assert_means(states: NDArray[Any], wanted: NDArray[np.float64], dtype: str) -> None:
    assert states.shape == wanted.shape
    largest = np.abs(wanted).max(axis=2, keepdims=True)
    assert (np.abs(states - wanted) <= ROUNDING[dtype] * largest).all()


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT whose states differ much from word to word. Read only."""
    return tiny.save_model(tmp_path_factory.mktemp("pooling") / "lively", layers=2, initializer_range=0.4)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("pool", POOLS)
def test_states_are_means_of_what_transformers_gives(lively: Path, tmp_path: Path, pool: str, dtype: str) -> None:
    cache = plain(lively, tmp_path, TEXTS, "udpos-de", pool=pool, dtype=dtype)
    index = cache.tokens()
    tokenizer = AutoTokenizer.from_pretrained(lively)
    for i, text in enumerate(TEXTS):
        wanted, first = expected(lively, list(text), pool)
        assert_means(cache[f"s{i}"], wanted, dtype)
        encoded = tokenizer([list(text)], is_split_into_words=True)
        here = slice(index.first_token[i], index.first_token[i + 1])
        assert index.input_id[here].tolist() == [encoded["input_ids"][0][place] for place in first]
        assert index.word_index[here].tolist() == [encoded.word_ids(0)[place] for place in first]
    assert cache.n_tokens.tolist() == ([len(text) for text in TEXTS] if pool == "word" else [1] * len(TEXTS))
    assert cache.provenance["chosen"]["pool"] == pool


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_states_of_another_compute_dtype_are_pooled_in_float32(lively: Path, tmp_path: Path, compute: str) -> None:
    """The mean of the rounded states, not a rounded mean."""
    whole = plain(lively, tmp_path, TEXTS, "udpos-de", dtype="float32", compute_dtype=compute)
    cache = plain(lively, tmp_path / "pooled", TEXTS, "udpos-de", pool="word", dtype="float32", compute_dtype=compute)
    for i, name in enumerate(cache.ids):
        words = np.array(AutoTokenizer.from_pretrained(lively)([list(TEXTS[i])], is_split_into_words=True).word_ids(0))
        wanted = [whole[name][:, words == word].astype(np.float64).mean(axis=1) for word in range(len(TEXTS[i]))]
        np.testing.assert_allclose(cache[name], np.stack(wanted, axis=1), rtol=0, atol=1e-6)


def test_a_word_that_is_cut_is_the_mean_of_what_is_left(lively: Path, tmp_path: Path) -> None:
    texts = [("das", "nebenan", "haus"), ("ein",), ("ein", "nebenannebenan")]
    cache = plain(lively, tmp_path, texts, "udpos-de", pool="word", dtype="float32", max_length=6)
    assert cache.n_tokens.tolist() == [2, 1, 2]
    for i, text in enumerate(texts):
        assert_means(cache[f"s{i}"], expected(lively, list(text), "word", 6)[0], "float32")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("types", [1, 2], ids=["no segment ids", "segment ids"])
def test_pairs_give_the_words_of_both_segments_in_order(tmp_path: Path, pool: str, types: int) -> None:
    world = world_of_pairs(tmp_path)
    tiny.save_model(world.resource, layers=2, initializer_range=0.4, type_vocab_size=types)
    cache = FeatureCache.open(world.extract(task="snli", pool=pool, dtype="float32", max_length=30).cache)
    rows = [json.loads(line) for line in (world.data / "train.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        wanted, _ = expected(world.resource, (row["sentence1"], row["sentence2"]), pool, 30)
        assert_means(cache[row["pairID"]], wanted, "float32")
    assert cache.provenance["found"]["segments"] == (types == 2)
    config = RerunConfig(folder=cache.folder, resource=str(world.resource), data=str(world.data), device="cpu")
    assert all(canary.agrees for canary in canaries.canaries(config))


def test_words_are_read_from_pooled_pairs(lively: Path, tmp_path: Path) -> None:
    """Both segments count their words from 0. Where the first one has one word, two positions of number 0 meet."""
    pairs = [("das", "ein haus"), ("das haus", "ein"), ("x", "y")]
    whole, words = (
        plain(lively, tmp_path / pool, pairs, "snli", pool=pool, dtype="float32") for pool in ("none", "word")
    )
    for number, name in enumerate(words.ids):
        np.testing.assert_array_equal(words.words(name), words[name])
        np.testing.assert_array_equal(words.dataset(pool="word")[number], words[name])
        np.testing.assert_allclose(whole.words(name), words[name], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="one state for each sequence"):
        plain(lively, tmp_path, pairs, "snli", pool="sequence").words("s0")


def test_an_empty_segment_has_no_word(lively: Path, tmp_path: Path) -> None:
    pairs = [("das haus", ""), ("", "ein"), ("ich", "und")]
    for pool in POOLS:
        cache = plain(lively, tmp_path, pairs, "snli", pool=pool, dtype="float32")
        for i, pair in enumerate(pairs):
            assert_means(cache[f"s{i}"], expected(lively, pair, pool)[0], "float32")


def test_torch_and_numpy_take_the_same_means() -> None:
    """Bit for bit, and within a rounding of each sum of the exact mean. Words of 1 to 40 tokens, padding between."""
    draw = np.random.default_rng(0)
    words = [np.repeat(np.arange(5), draw.integers(1, 41, 5)) for _ in range(7)]
    lengths = [len(one) + 2 for one in words]
    index = SequenceIndex(
        ids=np.array([b"a", b"b", b"c", b"d", b"e", b"f", b"g"]),
        n_tokens=np.array(lengths, dtype=np.int32),
        text_xxh3=np.zeros(7, dtype=np.uint64),
        input_id=np.zeros(sum(lengths), dtype=np.int32),
        word_index=np.concatenate([[SPECIAL, *one, SPECIAL] for one in words]).astype(np.int32),
    )
    batch = np.array([4, 0, 6, 1])
    states = (100 * draw.standard_normal((2, 4, max(lengths), 8))).astype(np.float32)
    for pool in POOLS:
        pooling = pooled(index, pool)
        by_torch = [layer.numpy() for layer in means(pooling, batch, list(torch.from_numpy(states)))]
        at = 0
        for row, i in enumerate(batch.tolist()):
            own = states[:, row, : lengths[i]]
            by_numpy = pooling.mean(i, own)
            count = by_numpy.shape[1]
            np.testing.assert_array_equal(by_numpy, np.stack(by_torch)[:, at : at + count])
            inside = own[:, 1:-1].astype(np.float64)
            exact = [inside[:, words[i] == word].mean(axis=1) for word in range(5)]
            exact = exact if pool == "word" else [inside.mean(axis=1)]
            np.testing.assert_allclose(by_numpy, np.stack(exact, axis=1), rtol=0, atol=1e-4)
            at += count


def test_sequences_without_special_tokens_stay_apart() -> None:
    """Word 0 of a sequence follows word 0 of the one before it."""
    index = SequenceIndex(
        ids=np.array([b"a", b"b", b"c"]),
        n_tokens=np.array([2, 1, 3], dtype=np.int32),
        text_xxh3=np.zeros(3, dtype=np.uint64),
        input_id=np.array([5, 6, 7, 8, 9, 10], dtype=np.int32),
        word_index=np.array([0, 0, 0, 0, 1, 1], dtype=np.int32),
    )
    words, sequences = pooled(index, "word"), pooled(index, "sequence")
    assert (words.stored.n_tokens.tolist(), words.stored.input_id.tolist()) == ([1, 1, 2], [5, 7, 8, 9])
    assert words.counts.tolist() == [2, 1, 1, 2]
    assert (sequences.stored.n_tokens.tolist(), sequences.stored.input_id.tolist()) == ([1, 1, 1], [5, 7, 8])
    assert sequences.counts.tolist() == [2, 1, 3]
    assert [count_positions(index, pool) for pool in ("none", "word", "sequence")] == [6, 4, 3]


# What cannot be pooled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_a_text_without_a_word_is_named(lively: Path, tmp_path: Path, pool: str) -> None:
    texts = [("das",), ("   ",), ("ein",)]
    with pytest.raises(DataError) as refused:
        plain(lively, tmp_path, texts, "snli", pool=pool)
    assert refused.value.message.startswith("1 of 3 sequences have no word with a token; the first is s1.")
    assert not any(tmp_path.rglob("*.h5"))


def test_words_that_vanish_have_no_position(lively: Path, tmp_path: Path) -> None:
    """BERT's normaliser drops zero-width spaces and soft hyphens."""
    model = shutil.copytree(lively, tmp_path / "dropping")
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.save_pretrained(model)
    texts = [("das", "\u200b", "haus"), ("\u00ad", "ein")]
    cache = plain(model, tmp_path, texts, "udpos-de", pool="word", dtype="float32")
    for i, text in enumerate(texts):
        assert_means(cache[f"s{i}"], expected(model, list(text), "word")[0], "float32")
    assert cache.tokens().word_index.tolist() == [0, 2, 1]
    with pytest.raises(DataError, match=r"^1 of 2 sequences have no word with a token; the first is s1\."):
        plain(model, tmp_path, [("das",), ("\u200b", "\u00ad")], "udpos-de", pool="word")


def test_plain_text_needs_a_tokenizer_that_tells_words(tmp_path: Path) -> None:
    model = tiny.use_code_tokenizer(tiny.save_model(tmp_path / "letters", layers=1))
    models = {"letters": {"path": str(model), "trust_remote_code": True}}
    with pytest.raises(UnsupportedModelError, match=r"does not say which word a token belongs to") as refused:
        plain(Path("letters"), tmp_path, [("das haus", "ein")], "snli", pool="word", models=models)
    assert "--pool sequence" in refused.value.remedy
    assert plain(Path("letters"), tmp_path, [("das", "haus")], "udpos-de", pool="word", models=models).n_tokens == [2]
    assert plain(Path("letters"), tmp_path, [("das haus",)], "snli", pool="sequence", models=models).n_tokens == [1]
    llama = trained.save_model("llama2", tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="takes a whole text for one word"):
        plain(llama, tmp_path, [("das haus", "ein")], "snli", pool="word")


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_the_file_keeps_the_contract_of_version_1(world: World) -> None:
    whole, words = (world.extract(pool=pool) for pool in ("none", "word"))
    (old,), (new,) = whole.cache.glob("*.h5"), words.cache.glob("*.h5")
    with h5py.File(old) as a, h5py.File(new) as b:
        assert set(b["examples"]) - set(a["examples"]) == {"tokens_xxh3"}
        assert {*a, *a["tokens"], *a.attrs} == {*b, *b["tokens"], *b.attrs}
        assert b.attrs["format_version"] == 1
        first, n_tokens, layers = b["examples/first_row"][:], b["examples/n_tokens"][:], len(b.attrs["layers"])
        assert first.tolist() == [0, *np.cumsum(n_tokens * layers).tolist()]
        name = b["examples/id"][2].decode()
        states = b["hidden"][first[2] : first[3]].reshape(layers, n_tokens[2], -1)
    np.testing.assert_array_equal(FeatureCache.open(words.cache)[name], states)


def test_a_digest_too_few_is_damage(world: World) -> None:
    folder = world.extract(pool="word").cache
    (path,) = folder.glob("*.h5")
    with h5py.File(path, "r+") as file:
        del file["examples/tokens_xxh3"]
        file["examples/tokens_xxh3"] = np.zeros(3, dtype=np.uint64)
    with pytest.raises(CacheError, match="different lengths"):
        FeatureCache.open(folder)


@pytest.mark.parametrize("pool", POOLS)
def test_an_interrupted_extraction_gives_the_same_bytes(
    world: World, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"pool": pool, "tokens_per_batch": 32, "dtype": "int8"}
    once = tiny_cache.folder_bytes(world.extract(cache_dir=world.folder / "once", **more).cache)
    with monkeypatch.context() as patch:
        interrupt_after(6, KeyboardInterrupt(), patch)
        with pytest.raises(InterruptedWorkError):
            world.extract(**more)
    again = world.extract(**more)
    assert 0 < again.computed < 12
    assert tiny_cache.folder_bytes(again.cache) == once


@pytest.mark.usefixtures("programs")
def test_workers_share_the_shards_of_a_pooled_cache(world: World) -> None:
    more = {"pool": "word", "tokens_per_batch": 32, "shard_gb": 2e-6}
    once = tiny_cache.folder_bytes(world.extract(cache_dir=world.folder / "once", **more).cache)
    assert len(once) > 1
    assert tiny_cache.folder_bytes(world.extract(workers=2, **more).cache) == once


@pytest.mark.parametrize("pool", POOLS)
def test_repair_gives_the_bytes_back(world: World, pool: str) -> None:
    folder = world.extract(pool=pool, tokens_per_batch=32).cache
    (path,) = folder.glob("*.h5")
    whole = path.read_bytes()
    offset = tiny_cache.byte_offset(path, "hidden")
    for change in (offset, tiny_cache.byte_offset(path, "examples/tokens_xxh3") + 8):  # a state, the index
        damaged = bytearray(whole)
        damaged[change] ^= 64
        path.write_bytes(damaged)
        result = repair(RerunConfig(folder=folder, resource=str(world.resource), data=str(world.data), device="cpu"))
        assert result.damaged or result.rebuilt
        assert path.read_bytes() == whole
    path.write_bytes(damaged)
    (world.data / "train.conllu").write_text(tiny.conllu(tiny.sentences(12, seed=9), prefix="train-s"), "utf-8")
    with pytest.raises(CacheMismatchError, match="other texts"):
        repair(RerunConfig(folder=folder, resource=str(world.resource), data=str(world.data), device="cpu"))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_canaries_are_pooled(world: World, pool: str, dtype: str) -> None:
    folder = world.extract(pool=pool, dtype=dtype).cache
    small = derive(plan_slice(FeatureCache.open(folder), layers="1,2", limit=7)).cache
    fused = derive(plan_fusion(FeatureCache.open(folder), "last2")).cache
    for one in (folder, small, fused):
        config = RerunConfig(folder=one, resource=str(world.resource), data=str(world.data), device="cpu")
        found = canaries.canaries(config)
        assert len(found) == 3
        assert all(canary.agrees for canary in found)
    config = RerunConfig(folder=folder, resource=str(world.resource), data=str(world.data), device="cpu")
    with other_states():
        assert not any(canary.agrees for canary in canaries.canaries(config))


# Other caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_float32_states_of_tokens_are_pooled_without_the_model(world: World, pool: str, dtype: str) -> None:
    """The same bytes as an extraction: both pool the same float32 states."""
    direct = FeatureCache.open(world.extract(pool=pool, dtype=dtype, cache_dir=world.folder / "direct").cache)
    world.extract(dtype="float32")
    taken = world.extract(pool=pool, dtype=dtype)
    assert (taken.computed, taken.taken_over) == (0, 12)
    cache = FeatureCache.open(taken.cache)
    for position in range(12):
        for one, other in zip(cache.stored(position), direct.stored(position), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("before", ["copied", "computed"])
def test_a_kill_while_missing_states_are_added_changes_no_byte(world: World, pool: str, before: str) -> None:
    """An older cache of tokens has 7 of 12 sequences; the model runs for the others. The process is killed after some
    are copied, or after some are computed.
    """
    world.extract(dtype="float32", limit=7)
    shutil.copytree(world.caches, world.folder / "undisturbed")
    more = {"pool": pool, "dtype": "float32", "tokens_per_batch": 48, "shard_gb": 2e-6}
    once = world.extract(cache_dir=world.folder / "undisturbed", **more)
    assert (once.computed, once.taken_over) == (5, 7)
    if (child := os.fork()) == 0:
        written = 0
        original = ShardWriter.write

        def killed(writer: ShardWriter, states: PackedStates) -> None:
            nonlocal written
            original(writer, states)
            written += len(states.sequences)
            if written >= (3 if before == "copied" else 8):
                time.sleep(0.05)  # for the writing thread
                os.kill(os.getpid(), signal.SIGKILL)

        ShardWriter.write = killed  # type: ignore[method-assign]
        world.extract(**more)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder,) = [path for path in world.cache_folders() if path.name == once.cache.name]
    assert len(list(folder.glob("*.h5"))) == len(list(once.cache.glob("*.h5"))) > 1
    again = world.extract(**more)
    assert again.cache == folder
    assert 0 < again.computed + again.taken_over < 12, "what it wrote is kept"
    assert tiny_cache.folder_bytes(folder) == tiny_cache.folder_bytes(once.cache)


def test_other_states_of_tokens_are_not_pooled(world: World) -> None:
    for dtype in ("float16", "bfloat16", "int8"):
        world.extract(dtype=dtype)
    assert world.extract(pool="word").taken_over == 0, "they are rounded"
    assert world.extract(pool="sequence").taken_over == 0, "a mean of means is another mean"
    assert world.extract(dtype="float32").taken_over == 0, "tokens do not come back from means"


def test_pooled_states_are_taken_over_and_layers_come_from_several_caches(world: World) -> None:
    old = FeatureCache.open(world.extract(pool="word", layers="0,1", limit=7).cache)
    world.extract(dtype="float32", layers="2,3,4", limit=7)
    new = world.extract(pool="word", layers="0,1")
    assert (new.computed, new.taken_over) == (5, 7)
    cache = FeatureCache.open(new.cache)
    for name in old.ids:
        np.testing.assert_array_equal(cache[name], old[name])
    both = world.extract(pool="word", layers="0,1,3", limit=7)
    assert (both.computed, both.taken_over) == (0, 7)


def test_a_changed_later_subword_is_seen(world: World) -> None:
    """ "haus" begins with the token that it had, but its last two tokens swap their numbers."""
    old = world.extract(pool="word")
    path = world.resource / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    numbers = content["model"]["vocab"]
    numbers["##u"], numbers["##s"] = numbers["##s"], numbers["##u"]
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CacheMismatchError, match="gives other tokens"):
        world.train(pool="word", epochs=1.0)
    new = world.extract(pool="word")
    assert new.cache != old.cache
    first, second = FeatureCache.open(old.cache).tokens(), FeatureCache.open(new.cache).tokens()
    np.testing.assert_array_equal(first.input_id, second.input_id)
    assert 0 < new.computed < 12


# Training and prediction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_a_reader_learns_from_what_is_stored(world: World, pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--pool`` makes the caches; afterwards they are the only ones, and are used without it. predict pools too."""
    (first,) = world.train(pool=pool, epochs=1.0, fusion="mix").runs
    caches = [FeatureCache.open(folder) for folder in world.cache_folders()]
    assert {cache.provenance["chosen"]["pool"] for cache in caches} == {pool}
    with count_resource_batches() as batches:
        assert world.train(epochs=1.0, fusion="mix").runs[0].folder == first.folder
    assert batches == []
    config = json.loads((first.folder / "config.json").read_text("utf-8"))["config"]
    assert config["resource"]["pool"] == pool
    (other,) = world.train(epochs=1.0, fusion="mix", pool="none").runs
    assert other.folder.parent != first.folder.parent
    assert "pool" not in json.loads((other.folder / "config.json").read_text("utf-8"))["config"]["resource"]
    predictor = Predictor.load(first.folder, device="cpu")
    examples = find_task("udpos").read("test", str(world.data), None)
    index = predictor._resource_index(predictor.resources[0], examples)
    (online,) = predictor.online_features([index])
    states, mask = online.batch(range(len(examples)))
    cache = next(cache for cache in caches if cache.provenance["chosen"]["split"] == "test")
    for i, name in enumerate(cache.ids):
        here = cache[name]
        count = here.shape[1]
        assert mask[i].sum() == count == online.n_tokens[i]
        np.testing.assert_allclose(states[i, :, :count].numpy(), here, atol=2e-3 * np.abs(here).max())
        assert not states[i, :, count:].any()
    stored = [json.loads(line) for line in (first.folder / "predictions-test.jsonl").read_text("utf-8").splitlines()]
    assert [one.predicted for one in predictor(examples)] == [line["predicted"] for line in stored]


def test_caches_of_both_kinds_leave_the_default(world: World) -> None:
    for split in ("train", "dev", "test"):
        for pool in ("none", "word"):
            world.extract(split, pool=pool)
    unpooled, pooled_run = (world.train(epochs=1.0, **more).runs[0] for more in ({}, {"pool": "word"}))
    config = [json.loads((one.folder / "config.json").read_text("utf-8"))["config"] for one in (unpooled, pooled_run)]
    assert "pool" not in config[0]["resource"]
    assert config[1]["resource"]["pool"] == "word"
    assert len(world.cache_folders()) == 6, "nothing was made"


def test_the_command_line_names_the_pooling(world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(world.folder)
    words = ["--resource", str(world.resource), "--task", "udpos", "--data", "corpus", "--cache-dir", "cache"]
    capsys.readouterr()
    for command in ("extract", "train"):
        assert run([command, *words, "--pool", "sentence", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["error"]["remedy"] == "Known: none, sequence, word."
    assert run(["extract", *words, "--pool", "word", "--dry-run", "--json"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert run(["extract", *words, "--pool", "word"]) == 0
    assert "pooled to" in capsys.readouterr().out
    assert run(["cache", "list", "--cache-dir", "cache", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["pool"] == "word"
    cache = FeatureCache.open(entry["folder"])
    assert dry["bytes"] == cache.stored_bytes == dry["bytes_by_pool"]["word"]
    assert dry["bytes_by_pool"]["sequence"] == 12 * 5 * 16 * 2
    assert run(["cache", "info", entry["folder"]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{entry['tokens']} words, from texts of at most 128 tokens" in shown
    assert "layers 0-4, by word as float16" in shown
