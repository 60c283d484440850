"""Stage one against transformers itself: every stored state is the one the model gives for that sentence alone."""

from __future__ import annotations

import collections
import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertModel

from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.writer import ShardWriter
from kr2cache.config import ExtractConfig
from kr2cache.errors import (
    ConfigError,
    DataError,
    DiskSpaceError,
    InterruptedWorkError,
    ModelUnavailableError,
    UnknownNameError,
    UnsupportedModelError,
    ValueRangeError,
)
from kr2cache.extraction import extract, planning, trial
from kr2cache.extraction.repair import repair
from kr2cache.extraction.rerun import RerunConfig
from kr2cache.models.digests import weights_digest
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.models.repeatable import depends_on_history
from kr2cache.models.stack import load_encoder
from kr2cache.system import claims
from kr2cache.tasks import Example

LIVELY = {"initializer_range": 0.4}
"""Random weights so large that a wrong mask or position shows in every layer, not in the sixth digit."""

ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
"""Largest relative error of rounding to nearest (bfloat16 has 8 significant bits)."""
COMPUTED = 2e-5
"""Batched against alone, in float32, relative to the largest state."""


def examples_of(texts: Sequence[str]) -> list[Example]:
    return [Example(f"s{i}", (tuple(text.split()),), None) for i, text in enumerate(texts)]


def sentences(count: int, *, seed: int = 3, longest: int = 9) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(tiny.WORDS, k=draw.randint(1, longest))) for _ in range(count)]


TEXTS = sentences(9)


def plan_of(
    model: Path | str, cache_dir: Path, texts: Sequence[str] | None = TEXTS, **settings: Any
) -> extract.ExtractPlan:
    config = ExtractConfig(
        **{
            "resource": str(model),
            "split": "train",
            "task": "udpos-de",
            "device": "cpu",
            "cache_dir": cache_dir,
            "tokens_per_batch": 64,
            **settings,
        }
    )
    return planning.plan_extraction(config, None if texts is None else examples_of(texts))


def extracted(model: Path | str, cache_dir: Path, texts: Sequence[str] | None = TEXTS, **settings: Any) -> FeatureCache:
    return FeatureCache.open(extract.extract(plan_of(model, cache_dir, texts, **settings)).cache)


def states_alone(folder: Path, texts: Sequence[str], max_length: int = 128) -> list[NDArray[np.float32]]:
    """What transformers gives for each text in a batch of its own, without padding: (L + 1, T, D). Nothing ran in the
    model before."""
    loaded = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = []
    for text in texts:
        inputs = tokenizer(
            [text.split()],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        with torch.no_grad():
            hidden = copy.deepcopy(loaded)(**inputs, output_hidden_states=True).hidden_states
        result.append(torch.cat(hidden).numpy())
    return result


def assert_states(cache: FeatureCache, expected: Sequence[NDArray[np.float32]], *, rounding: float) -> None:
    """Every sequence has every layer of ``expected``, within rounding."""
    assert cache.ids == [f"s{i}" for i in range(len(expected))]
    for name, states in zip(cache.ids, expected, strict=True):
        largest = float(np.abs(states).max())
        assert cache[name].shape == states.shape
        np.testing.assert_allclose(
            cache[name].astype(np.float32), states, rtol=1.01 * rounding, atol=COMPUTED * largest, err_msg=name
        )


def shard_bytes(cache: FeatureCache) -> dict[str, str]:
    """Digest of every file of the cache, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(cache.folder.iterdir())}


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, 5 layers with the embedding output, width 16. Read only."""
    return tiny.save_model(tmp_path_factory.mktemp("lively") / "lively-bert", layers=4, **LIVELY)


@pytest.fixture(scope="module")
def alone(lively: Path) -> list[NDArray[np.float32]]:
    return states_alone(lively, TEXTS)


# The states are transformers' ----------------------------------------------------------------------------------------

ARCHITECTURES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "ernie",
    "megatron-bert",
    "electra",
    "albert",
    "mpnet",
    "deberta",
    "deberta-v2",
    "roformer",
    "data2vec-text",
    "esm",
    "rembert",
    "roberta-prelayernorm",
    "modernbert",
)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_state_of_every_layer_is_transformers_own(model_type: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", model_type, **LIVELY)
    cache = extracted(folder, tmp_path / "cache")
    assert cache.layers == (0, 1, 2)
    assert cache.dtype == "float16"
    assert_states(cache, states_alone(folder, TEXTS), rounding=ROUNDING["float16"])


@pytest.mark.parametrize("model_type", ["fnet", "convbert", "nystromformer", "yoso"])
def test_an_architecture_that_padding_changes_is_refused_or_right(model_type: str, tmp_path: Path) -> None:
    # FNet mixes all positions without a mask, ConvBERT convolves over padding, the others approximate attention by it.
    folder = tiny.save_model(tmp_path / "model", model_type, **LIVELY)
    try:
        cache = extracted(folder, tmp_path / "cache", tokens_per_batch=1024)
    except UnsupportedModelError as error:
        assert model_type in str(error)
        return
    assert_states(cache, states_alone(folder, TEXTS), rounding=ROUNDING["float16"])


def test_a_real_model_and_texts_in_several_scripts(tmp_path: Path) -> None:
    texts = [
        "The quick brown fox jumps over the lazy dog .",
        "Hello",
        "Das Haus steht neben der alten Mühle am Fluss .",
        "東京 は 日本 の 首都 です 。",
        "Привет , как дела ?",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "한국어 문장 입니다",
        "I do n't think antidisestablishmentarianism is a word , really ; e = mc² 😀",
        "a " * 40,
    ]
    cache = extracted(tiny.minilm(), tmp_path, texts, tokens_per_batch=128)
    assert (len(cache.layers), cache.width) == (7, 384)
    assert_states(cache, states_alone(tiny.minilm(), texts), rounding=ROUNDING["float16"])


def test_padding_and_batch_mates_change_nothing(lively: Path, tmp_path: Path) -> None:
    alone = extracted(lively, tmp_path / "alone", tokens_per_batch=1)
    together = extracted(lively, tmp_path / "together", tokens_per_batch=10_000)
    largest = max(np.abs(alone[name]).max() for name in alone.ids)
    worst = max(np.abs(alone[name].astype(float) - together[name]).max() for name in alone.ids)
    assert worst <= 1e-3 * largest
    assert alone.fingerprint == together.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_keep_what_they_can(dtype: str, lively: Path, alone: list[NDArray[np.float32]], tmp_path: Path) -> None:
    cache = extracted(lively, tmp_path, dtype=dtype)
    assert_states(cache, alone, rounding=ROUNDING[dtype])
    assert cache["s0"].dtype == np.float32


def test_int8_keeps_each_row_to_half_a_step_of_its_scale(
    lively: Path, alone: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    cache = extracted(lively, tmp_path, dtype="int8")
    for name, states in zip(cache.ids, alone, strict=True):
        step = np.abs(states).max(axis=-1, keepdims=True) / 127
        assert (np.abs(cache[name] - states) <= step * 0.501 + COMPUTED).all()


def test_int8_of_a_row_of_zeros_is_zeros(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)
    edit_weights(folder, "encoder.layer.0.output.LayerNorm.weight", lambda weight: weight * 0)
    cache = extracted(folder, tmp_path / "cache", dtype="int8")
    assert all((cache[name][1] == 0).all() and (cache[name][0] != 0).any() for name in cache.ids)


def test_compute_dtype_is_autocast(lively: Path, alone: list[NDArray[np.float32]], tmp_path: Path) -> None:
    cache = extracted(lively, tmp_path, dtype="float32", compute_dtype="bfloat16", tokens_per_batch=1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = states_alone(lively, TEXTS)
    for name, states, exact in zip(cache.ids, expected, alone, strict=True):
        np.testing.assert_allclose(cache[name], states, atol=1e-3)
        assert np.abs(cache[name] - exact).max() > 1e-3
    plain = extracted(lively, tmp_path, dtype="float32")
    assert plain.folder != cache.folder, "the compute dtype is a chosen field"


@pytest.mark.parametrize(
    ("layers", "numbers"), [("all", (0, 1, 2, 3, 4)), ("last4", (1, 2, 3, 4)), ("0,2", (0, 2)), ("4", (4,))]
)
def test_layers(
    layers: str, numbers: tuple[int, ...], lively: Path, alone: list[NDArray[np.float32]], tmp_path: Path
) -> None:
    cache = extracted(lively, tmp_path, layers=layers)
    assert (cache.layers, cache.model_layers) == (numbers, 5)
    assert_states(cache, [states[list(numbers)] for states in alone], rounding=ROUNDING["float16"])


def test_a_layer_that_is_not_there_is_refused(lively: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        plan_of(lively, tmp_path, layers="0,5")


def test_limit_reads_the_first_examples_of_the_data(bert: Path, corpus: Path, tmp_path: Path) -> None:
    settings = {"task": "udpos", "data": str(corpus), "texts": None}
    whole = extracted(bert, tmp_path, **settings)
    part = extracted(bert, tmp_path, limit=5, **settings)
    assert whole.ids == [f"train-s{i}" for i in range(1, 13)]
    assert part.ids == whole.ids[:5]
    texts = [" ".join(word for word, _ in sentence) for sentence in tiny.sentences(12, seed=0)]
    for name, states in zip(whole.ids, states_alone(bert, texts), strict=True):
        np.testing.assert_allclose(whole[name], states, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_a_gpu_gives_the_same_states(dtype: str, lively: Path, tmp_path: Path) -> None:
    texts = sentences(60, seed=8)
    here = extracted(lively, tmp_path / "cpu", texts, dtype="float32")
    there = extracted(lively, tmp_path / "cuda", texts, dtype=dtype, device="cuda")
    tolerance = {"float16": 1e-3, "float32": 1e-3, "bfloat16": 5e-3, "int8": 6e-3}[dtype]
    for name in here.ids:
        largest = np.abs(here[name]).max(axis=-1, keepdims=True)
        assert (np.abs(there[name] - here[name]) <= tolerance * largest + 1e-6).all()
    assert there.provenance["found"] == here.provenance["found"]


# Shapes of texts -----------------------------------------------------------------------------------------------------


def test_one_word_512_tokens_foreign_scripts_and_words_longer_than_the_limit(lively: Path, tmp_path: Path) -> None:
    texts = ["haus", "a " * 700, "東京 は 日本", "naïve", "x" * 190 + " dog", "schön " + "ab" * 90, "b " * 510]
    cache = extracted(lively, tmp_path, texts, max_length=512, tokens_per_batch=600)
    assert cache["s1"].shape[1] == 512
    assert cache["s6"].shape[1] == 512
    assert_states(cache, states_alone(lively, texts, 512), rounding=ROUNDING["float16"])
    cut = extracted(lively, tmp_path, texts, max_length=8)
    assert cut.n_tokens.max() == 8
    assert_states(cut, states_alone(lively, texts, 8), rounding=ROUNDING["float16"])


def test_the_index_says_which_token_belongs_to_which_word(lively: Path, tmp_path: Path) -> None:
    texts = ["haus das", "東京 zwölf", "qqqqqq"]
    cache = extracted(lively, tmp_path, texts, max_length=6)
    index = cache.tokens()
    tokenizer = tiny.tokenizer()
    expected = [tokenizer(text.split(), is_split_into_words=True, truncation=True, max_length=6) for text in texts]
    assert index.input_id.tolist() == [number for one in expected for number in one["input_ids"]]
    words = [-1 if word is None else word for one in expected for word in one.word_ids()]
    assert index.word_index.tolist() == words
    joined = ["haus\x1fdas", "東京\x1fzwölf", "qqqqqq"]
    assert index.text_xxh3.tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in joined]


def test_a_maximal_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "roberta", positions=20)
    with pytest.raises(ConfigError, match="the 18 positions of"):
        plan_of(folder, tmp_path, max_length=19)
    cache = extracted(folder, tmp_path, ["a " * 40], max_length=18)
    assert cache["s0"].shape[1] == 18


@pytest.mark.parametrize("model_type", ["mpnet", "data2vec-text", "roberta-prelayernorm"])
def test_every_architecture_that_counts_positions_as_roberta_does_knows_its_limit(
    model_type: str, tmp_path: Path
) -> None:
    folder = tiny.save_model(tmp_path / "model", model_type, positions=20)
    with pytest.raises(ConfigError, match="positions"):
        extracted(folder, tmp_path, ["a " * 40], max_length=20)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", vocab_size=20)
    with pytest.raises(DataError, match="20 embeddings"):
        plan_of(folder, tmp_path)


def test_unknown_dtypes_are_refused(lively: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'float16'"):
        plan_of(lively, tmp_path, dtype="float61")
    with pytest.raises(UnknownNameError, match="compute dtype 'int8'"):
        plan_of(lively, tmp_path, compute_dtype="int8")


# Plan ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 7, 40, 1024])
def test_batch_plan_is_longest_first_and_within_budget(budget: int) -> None:
    n_tokens = np.random.default_rng(budget).integers(2, 30, size=60)
    batches = length_sorted_batches(n_tokens, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(60))
    longest = [int(n_tokens[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, length in zip(batches, longest, strict=True):
        assert len(batch) * length <= budget or len(batch) == 1
    order = np.concatenate(batches)
    assert order.tolist() == sorted(range(60), key=lambda i: (-n_tokens[i], i)), "equal lengths keep their order"


def test_the_model_runs_the_planned_batches(lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = trial.hidden_states

    def watched(encoder: Any, index: Any, sequences: Any, **settings: Any) -> Any:
        seen.append([int(i) for i in sequences])
        return original(encoder, index, sequences, **settings)

    monkeypatch.setattr(trial, "hidden_states", watched)
    monkeypatch.setattr(trial, "depends_on_history", lambda *_: None)  # its batches are not planned ones
    plan = plan_of(lively, tmp_path, tokens_per_batch=40)
    result = extract.extract(plan)
    ran = seen[2:]  # the first two try the shortest sequence alone and beside the longest
    assert sorted(i for batch in ran for i in batch) == list(range(len(TEXTS)))
    longest = [max(int(plan.index.n_tokens[i]) for i in batch) for batch in ran]
    assert longest == sorted(longest, reverse=True)
    assert all(len(batch) * length <= 40 or len(batch) == 1 for batch, length in zip(ran, longest, strict=True))
    with h5py.File(result.cache / "shard-00000-of-00001.h5") as file:
        assert json.loads(file.attrs["batch_plan"])["tokens_per_batch"] == 40


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_planned_bytes_are_the_real_bytes(dtype: str, lively: Path, tmp_path: Path) -> None:
    plan = plan_of(lively, tmp_path, dtype=dtype, layers="last4")
    assert not any(tmp_path.iterdir()), "planning writes nothing"
    result = extract.extract(plan)
    with h5py.File(result.cache / "shard-00000-of-00001.h5") as file:
        real = file["hidden"].nbytes + (file["hidden_scale"].nbytes if dtype == "int8" else 0)
    tokens = sum(states.shape[1] for states in states_alone(lively, TEXTS))
    assert plan.state_bytes == real == plan.bytes_by_choice()[dtype]["last4"]
    assert (plan.tokens, result.tokens, result.sequences) == (tokens, tokens, len(TEXTS))
    assert result.bytes == sum(path.stat().st_size for path in result.cache.iterdir())


# Shards, second calls, interruptions ---------------------------------------------------------------------------------


SMALL_SHARDS = {"shard_gb": 6_000 / 2**30, "tokens_per_batch": 24}
"""A token takes 5 layers * 16 values * 2 bytes = 160 bytes, so a shard holds some 37 tokens."""


def test_shards(lively: Path, alone: list[NDArray[np.float32]], tmp_path: Path) -> None:
    cache = extracted(lively, tmp_path, **SMALL_SHARDS)
    shards = sorted(cache.folder.iterdir())
    assert len(shards) > 2
    assert [path.name for path in shards] == [f"shard-{i:05d}-of-{len(shards):05d}.h5" for i in range(len(shards))]
    for path in shards:
        with h5py.File(path) as file:
            assert file["hidden"].nbytes <= 6_000 or len(file["examples/id"]) == 1
    assert_states(cache, alone, rounding=ROUNDING["float16"])


def test_a_cache_keeps_the_shards_that_it_was_begun_with_and_says_so(
    lively: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = extracted(lively, tmp_path, **SMALL_SHARDS)
    whole = shard_bytes(FeatureCache.open(cache.folder))
    assert len(whole) > 2
    for again, said in (({}, False), ({"shard_gb": 16.0}, True)):
        sorted(cache.folder.iterdir())[1].unlink()
        extracted(lively, tmp_path, **{**SMALL_SHARDS, **again})
        assert shard_bytes(FeatureCache.open(cache.folder)) == whole
        shown = capsys.readouterr().out
        assert ("! --shard-gb 16 has no effect: the cache was begun with --shard-gb 5.59e-06.\n" in shown) is said
        assert ("--shard-gb" in shown) is said


def test_a_second_call_computes_nothing(lively: Path, tmp_path: Path) -> None:
    first = extract.extract(plan_of(lively, tmp_path))
    before = shard_bytes(FeatureCache.open(first.cache))
    second = extract.extract(plan_of(lively, tmp_path, tokens_per_batch=7))
    assert (first.computed, second.computed) == (len(TEXTS), 0)
    assert second.cache == first.cache
    assert shard_bytes(FeatureCache.open(first.cache)) == before
    assert sorted(path.name for path in first.cache.parent.iterdir()) == [first.cache.name], "no lock is left"


def interrupt_after(batches: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass after so many batches raises instead."""
    original, count = trial.hidden_states, 0

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        if count > batches + 2:  # two more: the shortest sequence is tried first, alone and beside the longest
            raise error
        return original(*arguments, **settings)

    monkeypatch.setattr(trial, "hidden_states", interrupted)
    monkeypatch.setattr(trial, "depends_on_history", lambda *_: None)  # its batches are not counted


@pytest.mark.parametrize("shards", [{"tokens_per_batch": 24}, SMALL_SHARDS], ids=["one shard", "shards"])
@pytest.mark.parametrize("batches", [0, 2])
def test_an_interrupted_extraction_goes_on_and_gives_the_same_bytes(
    batches: int, shards: dict[str, Any], lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extracted(lively, tmp_path / "whole", **shards)
    with monkeypatch.context() as patch:
        interrupt_after(batches, KeyboardInterrupt(), patch)
        with pytest.raises(InterruptedWorkError, match=r"Interrupted\. \d+ of 9 sequences are complete"):
            extracted(lively, tmp_path / "cut", **shards)
    folder = tmp_path / "cut" / whole.folder.relative_to(tmp_path / "whole")
    left = FeatureCache.open(folder)
    assert (len(left) > 0) == (batches > 0)
    assert len(left) < len(TEXTS)
    for name in left.ids:
        np.testing.assert_array_equal(left[name], whole[name])
    # A different budget now: the stored plan goes on all the same.
    result = extract.extract(plan_of(lively, tmp_path / "cut", **{**shards, "tokens_per_batch": 999}))
    assert 0 < result.computed <= len(TEXTS)
    assert result.computed < len(TEXTS) or batches == 0
    assert shard_bytes(FeatureCache.open(folder)) == shard_bytes(whole)


def test_states_are_whole_where_only_marks_are_missing(lively: Path, tmp_path: Path) -> None:
    # A sequence whose mark is missing is computed again, with its whole batch, and only that batch.
    cache = extracted(lively, tmp_path, tokens_per_batch=24)
    before = shard_bytes(cache)
    short = int(np.argmin(cache.n_tokens))
    with h5py.File(cache.folder / "shard-00000-of-00001.h5", "r+") as file:
        file["examples/complete"][short] = 0
        first, last = file["examples/first_row"][short : short + 2]
        file["hidden"][first:last] = 0
    batch = next(batch for batch in length_sorted_batches(cache.n_tokens, 24) if short in batch)
    result = extract.extract(plan_of(lively, tmp_path))
    assert result.computed == len(batch) < len(TEXTS)
    assert shard_bytes(FeatureCache.open(cache.folder)) == before


KILLED = """
import os, signal, sys, time
sys.path[:0] = {tests!r}
import test_extract
from kr2cache.extraction import trial
from kr2cache.models.stack import load_encoder
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.cache import writer
from pathlib import Path

test_extract.torch.set_num_threads(1)  # as here: the number of threads shows in the last bits
writer.SYNC_EVERY_S = 0.0
original, count = trial.hidden_states, 0

def killed(*arguments, **settings):
    global count
    count += 1
    if count == 4:
        time.sleep(0.5)  # the writer's thread marks what it has
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **settings)

trial.hidden_states = killed
trial.depends_on_history = lambda *_: None  # its batches are not counted
test_extract.extracted({model!r}, Path({cache!r}), tokens_per_batch=24)
"""


@pytest.mark.usefixtures("programs")
def test_a_killed_extraction_leaves_valid_hdf5_and_goes_on(lively: Path, tmp_path: Path) -> None:
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = KILLED.format(tests=folders, model=str(lively), cache=str(tmp_path / "cut"))
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ}, timeout=120
    )
    assert ended.returncode == -9, ended.stderr
    whole = extracted(lively, tmp_path / "whole", tokens_per_batch=24)
    left = FeatureCache.open(tmp_path / "cut" / whole.folder.relative_to(tmp_path / "whole"))
    assert 0 < len(left) < len(TEXTS)
    for name in left.ids:
        np.testing.assert_array_equal(left[name], whole[name])
    again = extract.extract(plan_of(lively, tmp_path / "cut"))
    assert again.computed == len(TEXTS) - len(left)
    assert shard_bytes(FeatureCache.open(again.cache)) == shard_bytes(whole)


def test_a_stop_while_shards_are_made_goes_on(lively: Path, tmp_path: Path) -> None:
    whole = extracted(lively, tmp_path / "whole", **SMALL_SHARDS)
    cut = extracted(lively, tmp_path / "cut", **SMALL_SHARDS)
    last = sorted(cut.folder.iterdir())[-1]
    last.rename(last.with_name(last.name + ".partial"))
    result = extract.extract(plan_of(lively, tmp_path / "cut", **SMALL_SHARDS))
    assert 0 < result.computed < len(TEXTS)
    assert shard_bytes(FeatureCache.open(cut.folder)) == shard_bytes(whole)


def test_equal_content_is_equal_bytes(lively: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / lively.name
    shutil.copytree(lively, copy)
    assert shard_bytes(extracted(lively, tmp_path / "a")) == shard_bytes(extracted(copy, tmp_path / "b"))


def test_one_extraction_at_a_time_the_second_waits_and_finds_it_done(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, plan = trial.hidden_states, plan_of(lively, tmp_path)
    results: list[extract.ExtractResult] = []
    second = threading.Thread(target=lambda: results.append(extract.extract(plan)))

    def started_twice(*arguments: Any, **settings: Any) -> Any:
        if second.ident is None:
            second.start()
            second.join(timeout=1.0)
            assert second.is_alive(), "it waits"
        return original(*arguments, **settings)

    monkeypatch.setattr(trial, "hidden_states", started_twice)
    monkeypatch.setattr(claims, "PATIENCE_S", 0.05)
    first = extract.extract(plan)
    second.join(timeout=60)
    assert first.computed == len(TEXTS)
    assert [(one.cache, one.computed) for one in results] == [(first.cache, 0)]


def test_a_shard_that_is_lost_before_it_is_open_is_done_later(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = extracted(lively, tmp_path / "whole")
    opened, lost = ShardWriter.__init__, []

    def stopped_before(writer: ShardWriter, path: Path, *more: Any) -> None:
        if not lost:  # another process took it over meanwhile, and let it go
            lost.append(path)
            shutil.rmtree(claims.claims_folder(path.parent))
        opened(writer, path, *more)

    monkeypatch.setattr(ShardWriter, "__init__", stopped_before)
    late = extracted(lively, tmp_path / "late")
    assert f"Another process took over {lost[0].name}" in " ".join(capsys.readouterr().out.split())
    assert shard_bytes(late) == shard_bytes(whole)


def test_what_ran_is_counted_though_another_process_took_the_shard_over(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(lively, tmp_path)
    ran, original = [], trial.layers_of

    def stopped_for_long(*arguments: Any, **settings: Any) -> Any:
        if shards := list(tmp_path.rglob("*.h5")):  # it is no trial of the model
            if not ran:
                shutil.rmtree(claims.claims_folder(shards[0].parent))
            ran.append(len(arguments[2]))
        return original(*arguments, **settings)

    monkeypatch.setattr(trial, "layers_of", stopped_for_long)
    result = extract.extract(plan)
    assert FeatureCache.open(result.cache).complete.all()
    assert result.computed == sum(ran)  # all, and the first batch once more if it was not written


# What cannot be stored -----------------------------------------------------------------------------------------------


def edit_weights(folder: Path, name: str, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_value_beyond_float16_names_example_and_layer(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)
    edit_weights(folder, "encoder.layer.1.output.LayerNorm.weight", lambda weight: weight * 1e6)
    plan = plan_of(folder, tmp_path / "cache")
    shortest = f"s{int(np.argmin(plan.index.n_tokens))}"
    with pytest.raises(ValueRangeError, match=rf"'{shortest}' at layer 2 is not a finite float16 value") as caught:
        extract.extract(plan)
    assert "--dtype bfloat16" in caught.value.remedy
    assert not list(tmp_path.rglob("*.h5")), "the trial of the model found it"
    cache = extracted(folder, tmp_path / "cache", dtype="bfloat16")
    assert_states(cache, states_alone(folder, TEXTS), rounding=ROUNDING["bfloat16"])
    # Without the layer that is too large, float16 will do.
    assert len(extracted(folder, tmp_path / "cache", layers="0,1")) == len(TEXTS)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_nan_stops_and_keeps_what_is_complete(dtype: str, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[tiny.VOCABULARY.index("q"), 3] = float("nan")
        return weight

    edit_weights(folder, "embeddings.word_embeddings.weight", spoil)
    texts = ["das haus und ich", "the dog ran there", "q ran there", "haus"]  # neither the longest nor the shortest
    with pytest.raises(ValueRangeError, match=rf"'s2' at layer 0 is not a finite {dtype} value: it is nan") as caught:
        extracted(folder, tmp_path / "cache", texts, dtype=dtype, tokens_per_batch=1)
    assert (
        "'model' holds numbers that are not finite (nan or inf), in embeddings.word_embeddings.weight."
        in caught.value.message
    )
    assert caught.value.remedy.startswith("Get an undamaged copy of its weights; no --dtype helps.")
    (cache_folder,) = [path for path in (tmp_path / "cache" / "udpos-de" / "train").iterdir() if path.is_dir()]
    left = FeatureCache.open(cache_folder)
    assert left.ids == ["s0", "s1"], "longer sequences run first"
    good = extracted(folder, tmp_path / "good", ["das haus und ich", "the dog ran there"], dtype=dtype)
    np.testing.assert_allclose(left["s0"], good["s0"], atol=0.05)


def test_an_infinite_state_that_the_model_computes_is_not_put_down_to_the_dtype(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)
    edit_weights(folder, "encoder.layer.1.output.LayerNorm.bias", lambda weight: weight + 3e38)
    edit_weights(folder, "encoder.layer.1.output.LayerNorm.weight", lambda weight: weight * 3e38)
    with pytest.raises(ValueRangeError, match="at layer 2 is not a finite float32 value") as caught:
        extracted(folder, tmp_path / "cache", dtype="float32")
    assert "The model computed this value, so no other --dtype helps" in caught.value.remedy


DiskUsage = collections.namedtuple("DiskUsage", "total used free")


def test_a_disk_too_small_is_said_before_the_model_is_loaded(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_yet(spec: ModelSpec) -> Any:
        pytest.fail("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10_000, 9_000, 1_000))
        patch.setattr(trial, "open_resource", not_yet)
        with pytest.raises(DiskSpaceError, match="free") as caught:
            extracted(lively, tmp_path / "cache")
        assert "--layers last4" in caught.value.remedy
        assert not list(tmp_path.rglob("*.h5*"))
    extracted(lively, tmp_path / "cache")
    # Its space is reserved: a disk that is full by now does not matter.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10_000, 9_000, 1_000))
    assert extract.extract(plan_of(lively, tmp_path / "cache")).computed == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ["--layers last4", "--dtype int8"]),
        ({"layers": "last4"}, ["--dtype int8"]),
        ({"dtype": "int8"}, ["--layers last4"]),
        ({"layers": "4", "dtype": "int8"}, []),
    ],
)
def test_on_a_small_disk_only_settings_that_take_fewer_bytes_are_named(
    changes: dict[str, str], named: list[str], lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(lively, tmp_path, **changes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10_000, 9_990, 10))
    with pytest.raises(DiskSpaceError) as caught:
        planning.check_disk(plan)
    assert [option for option in ("--layers last4", "--dtype int8") if option in caught.value.remedy] == named


def test_a_cache_of_other_settings_reserves_no_space(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted(lively, tmp_path, dtype="float16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10_000, 9_000, 1_000))
    with pytest.raises(DiskSpaceError, match="The states take"):  # bfloat16 takes as many bytes
        planning.check_disk(plan_of(lively, tmp_path, dtype="bfloat16"))


def test_a_disk_that_fills_up_meanwhile_is_said(lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_pwrite", lambda self, array, offset: full(0, array, offset))
        with pytest.raises(DiskSpaceError, match="No space left"):
            extracted(lively, tmp_path)
    assert extract.extract(plan_of(lively, tmp_path)).computed == len(TEXTS)


# States that depend on what ran before --------------------------------------------------------------------------------

LONG = " ".join(["das haus und ich"] * 10)


def big_bird(folder: Path, **settings: Any) -> Path:
    """At most 28 tokens switch it from sparse to full attention, for good."""
    return tiny.save_model(folder, "big_bird", block_size=4, num_random_blocks=1, **LIVELY, **settings)


def test_states_of_a_model_that_a_short_text_changes_depend_on_nothing_else(tmp_path: Path) -> None:
    folder, texts = big_bird(tmp_path / "model"), [*TEXTS, LONG]
    # Independently: the same text before and after a short one.
    model, ids = AutoModel.from_pretrained(folder).eval(), torch.arange(60)[None] % 40 + 5
    with torch.no_grad():
        before, _, after = (model(input_ids=one).last_hidden_state for one in (ids, ids[:, :6], ids))
    assert (before - after).abs().max() > 0.1
    # In several shards, the long text runs after short ones; in one it would be the first.
    cache = extracted(folder, tmp_path / "cache", texts, **SMALL_SHARDS)
    assert_states(cache, states_alone(folder, texts), rounding=ROUNDING["float16"])
    assert cache.batch_plan["fresh"]
    # Its last block is filled for the model: the last of its hidden states is still its output.
    assert cache.provenance["recorded"]["model"]["last_is_output"] is True
    # What these texts never switch runs as any model.
    assert "fresh" not in extracted(folder, tmp_path / "short", TEXTS).batch_plan


@pytest.mark.parametrize(
    ("lengths", "attribute"),
    [
        # "dynamic" rotary embeddings: frequencies of the longest so far, until one below the limit comes.
        ((3, 20, 30), "longest"),
        ((20, 30), "longest"),
        ((3, 30), "shortest"),
        ((5,), "runs"),
    ],
)
def test_any_memory_of_what_ran_is_seen(lengths: tuple[int, ...], attribute: str) -> None:
    class Remembers(torch.nn.Module):
        config = tiny.config("bert")

        def __init__(self) -> None:
            super().__init__()
            self.memory = 0

        def forward(self, length: int) -> tuple[torch.Tensor, ...]:
            if attribute == "longest":
                self.memory = 0 if length < 10 else max(self.memory, length)
            else:
                self.memory = length if attribute == "shortest" and length < 10 else self.memory + 1
            memory = self.memory if attribute == "runs" or length >= 10 else 0
            return torch.ones(1, length, 4), torch.full((1, length, 4), 1.0 + memory)

    model: Any = Remembers()
    moved = depends_on_history(model, np.array(lengths), lambda one, i: one(lengths[i]), "it")
    assert moved is not None
    assert moved.startswith("layer 1 moves by")
    assert model.memory == 0, "copies ran"


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "reformer", **tiny.REFORMER)
    with pytest.raises(UnsupportedModelError, match=r"'model' \(reformer\) gives other states .* each time") as caught:
        extracted(folder, tmp_path / "cache")
    assert "hash_seed" in caught.value.remedy
    assert not list(tmp_path.rglob("*.h5"))


def test_a_cache_of_such_a_model_is_resumed_and_repaired_with_the_same_bytes(tmp_path: Path) -> None:
    folder, texts = big_bird(tmp_path / "model"), [*TEXTS, LONG]
    cache = extracted(folder, tmp_path / "cache", texts)
    (shard,), whole = cache.folder.glob("*.h5"), shard_bytes(cache)
    for mend in (
        lambda: extracted(folder, tmp_path / "cache", texts),
        lambda: repair(RerunConfig(folder=cache.folder, resource=str(folder), device="cpu")),
    ):
        with h5py.File(shard, "r+") as file:
            file["examples/complete"][2] = 0
        mend()
        assert shard_bytes(cache) == whole


def test_a_cache_that_was_made_without_regard_to_it_is_neither_resumed_nor_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = big_bird(tmp_path / "model"), [*TEXTS, LONG]
    with monkeypatch.context() as patch:  # as version 0.1 without the check made it
        patch.setattr(trial, "depends_on_history", lambda *_: None)
        cache = extracted(folder, tmp_path / "cache", texts)
    (shard,) = cache.folder.glob("*.h5")
    assert extract.extract(plan_of(folder, tmp_path / "cache", texts)).cache == cache.folder, "complete, it is found"
    with h5py.File(shard, "r+") as file:
        file["examples/complete"][2] = 0
    before = shard_bytes(cache)
    with pytest.raises(UnsupportedModelError, match="it would mix both"):
        extracted(folder, tmp_path / "cache", texts)
    with pytest.raises(UnsupportedModelError, match="it would mix both"):
        repair(RerunConfig(folder=cache.folder, resource=str(folder), device="cpu"))
    assert shard_bytes(cache) == before


# Models that cannot serve --------------------------------------------------------------------------------------------


def test_a_model_that_fails_on_its_first_text_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", chunk_size_feed_forward=7)  # lengths have to be a multiple of it
    with pytest.raises(UnsupportedModelError, match=r"'model' \(bert\) fails on its first texts: .*chunk size 7"):
        extracted(folder, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.h5"))


def test_a_model_that_fails_beside_another_text_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text alone runs; its first padded batch does not."""
    real = BertModel.forward

    def alone(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        if len(input_ids) > 1:
            raise KeyError("batch")
        return real(self, input_ids, **inputs)

    monkeypatch.setattr(BertModel, "forward", alone)
    with pytest.raises(UnsupportedModelError, match=r"'model' \(bert\) fails on its first texts: KeyError: 'batch'"):
        extracted(tiny.save_model(tmp_path / "model"), tmp_path / "cache")
    assert not list(tmp_path.rglob("*.h5"))


def test_a_checkpoint_without_a_weight_of_the_encoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 weights.*layer\.1\.attention\.self\.query\.weight"):
        extracted(folder, tmp_path / "cache")
    assert not list(tmp_path.rglob("*.h5"))


def test_a_checkpoint_without_a_pooler_serves(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)
    expected = states_alone(folder, TEXTS)
    weights = {name: w for name, w in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_states(extracted(folder, tmp_path / "cache"), expected, rounding=ROUNDING["float16"])


def test_weights_of_other_shapes_are_explained(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    edit_weights(folder, "encoder.layer.0.output.dense.weight", lambda weight: weight[:, :3].contiguous())
    with pytest.raises((ModelUnavailableError, UnsupportedModelError), match="model"):
        extracted(folder, tmp_path / "cache")


def test_a_float16_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)
    model = AutoModel.from_pretrained(folder).half()
    model.save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    expected = states_alone(folder, TEXTS)  # loads in float32 itself
    assert_states(extracted(folder, tmp_path / "cache", dtype="float32"), expected, rounding=0.0)


# What a cache was made from ------------------------------------------------------------------------------------------


def digest_of(folder: Path) -> str:
    return weights_digest(load_encoder(find_model(str(folder), {})))


def test_weights_digest_is_of_the_weights_not_of_the_file(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "safe", seed=1)
    model = AutoModel.from_pretrained(folder)
    model.half().float().save_pretrained(folder)  # values that float16 holds, as float32
    digest = digest_of(folder)

    binary = tmp_path / "binary"
    shutil.copytree(folder, binary)
    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    assert digest_of(binary) == digest

    half = tmp_path / "half"
    shutil.copytree(folder, half)
    model.half().save_pretrained(half)
    assert digest_of(half) == digest

    headed = tmp_path / "headed"
    shutil.copytree(folder, headed)
    with_head = AutoModelForMaskedLM.from_config(tiny.config("bert"))
    with_head.bert.load_state_dict(model.float().state_dict(), strict=False)
    with_head.save_pretrained(headed)
    assert digest_of(headed) == digest

    edit_weights(folder, "encoder.layer.1.output.dense.bias", lambda w: w + torch.eye(16)[5] * 1e-6)
    assert digest_of(folder) != digest


def test_provenance_is_as_designed(lively: Path, tmp_path: Path) -> None:
    cache = extracted(lively, tmp_path, layers="last4", dtype="float32", max_length=20)
    assert set(cache.provenance) == {"chosen", "found", "recorded"}
    assert cache.provenance["chosen"] == {
        "resource": "lively-bert",
        "task": "udpos-de",
        "corpus": "google/xtreme",
        "split": "train",
        "max_length": 20,
        "layers": [1, 2, 3, 4],
        "fusion": None,
        "dtype": "float32",
        "compute_dtype": "float32",
    }
    found = cache.provenance["found"]
    assert set(found) == {"weights", "config", "tokens", "template", "texts", "sequences", "segments"}
    assert found["segments"] is False
    assert found["weights"] == digest_of(lively)
    assert (found["template"], found["sequences"]) == ("words", len(TEXTS))
    recorded = cache.provenance["recorded"]
    assert recorded["device"] == "cpu"
    assert recorded["versions"]["torch"] == torch.__version__
    text = json.dumps({"chosen": cache.provenance["chosen"], "found": found})
    for never in ("cpu", torch.__version__, str(lively), str(tmp_path)):
        assert never not in text
    assert cache.folder == tmp_path / "udpos-de" / "train" / f"lively-bert-{cache.fingerprint[:8]}"
    assert cache.fingerprint == extracted(lively, tmp_path / "b", **_other_batches()).fingerprint


def _other_batches() -> dict[str, Any]:
    return {"layers": "last4", "dtype": "float32", "max_length": 20, "tokens_per_batch": 5, **{"shard_gb": 1e-6}}


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 99},
        {"dtype": "bfloat16"},
        {"layers": "last4"},
        {"compute_dtype": "bfloat16"},
        {"texts": [*TEXTS[:-1], "the dog"]},
        {"split": "test"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_states_makes_another_cache(change: dict[str, Any], lively: Path, tmp_path: Path) -> None:
    assert extracted(lively, tmp_path).fingerprint != extracted(lively, tmp_path, **change).fingerprint
    assert len(list((tmp_path / "udpos-de").glob("*/*/*.h5"))) == 2


def test_changed_weights_make_a_new_cache_beside_the_old_one(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", **LIVELY)
    old = extracted(folder, tmp_path / "cache")
    kept = shard_bytes(old)
    edit_weights(folder, "embeddings.word_embeddings.weight", lambda weight: weight + 0.25)
    new = extracted(folder, tmp_path / "cache")
    assert new.folder != old.folder
    assert shard_bytes(old) == kept
    assert old.provenance["found"]["weights"] != new.provenance["found"]["weights"]
    assert_states(new, states_alone(folder, TEXTS), rounding=ROUNDING["float16"])
