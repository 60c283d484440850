"""Segment ids of pairs equal those of transformers. Every state equals the one that transformers gives for the pair."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, BertJapaneseTokenizer, CanineTokenizer, PreTrainedTokenizerBase

from kr2cache.cache.format import SPECIAL, SequenceIndex
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import ExtractConfig
from kr2cache.extraction import extract, planning
from kr2cache.models.encode import TEXTS_AT_ONCE, encode, encode_examples
from kr2cache.models.registry import ModelSpec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.store import find
from kr2cache.tasks import Example, find_task

Pair = tuple[str, str]

WITH_SEGMENTS = ["input_ids", "token_type_ids", "attention_mask"]
"""Input names of BERT's own tokenizer. The general tokenizer class of transformers leaves the segments out."""
LIVELY = {"initializer_range": 0.4}
"""Random weights that are so large that a wrong segment clearly changes every layer."""
FLOAT16 = 2**-11
COMPUTED = 2e-5
"""Largest difference between a state in a batch and alone: float32, relative to the largest state."""


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(tiny.WORDS, k=count))


PAIRS: list[Pair] = [
    ("das haus", "ein"),  # one word, one token
    ("ich", "."),
    ("das haus und das haus", "the dog ran , there ."),
    (words(9, 1), words(2, 2)),
    (words(1, 3), words(8, 4)),
    (words(30, 5), words(3, 6)),  # at 16 and at 64, only the first segment is cut
    (words(3, 7), words(30, 8)),  # only the second segment is cut
    (words(30, 9), words(31, 10)),  # both segments are cut
]


def model_folder(folder: Path, model_type: str, **settings_: Any) -> Path:
    """A tiny model. Its tokenizer always gives segment ids, even if the model has no use for them."""
    tiny.save_model(folder, model_type, **LIVELY, **settings_)
    return lists_segments(folder)


def lists_segments(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_input_names": WITH_SEGMENTS}), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "token_type_ids" in tokenizer("ich", "ein"), "without segment ids this test proves nothing"
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = WITH_SEGMENTS
    return tokenizer


TOKENIZER = tiny_tokenizer()


def names(count: int) -> list[str]:
    return [f"s{i}" for i in range(count)]


def encoded(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int = 128) -> SequenceIndex:
    return encode(tokenizer, names(len(pairs)), pairs, words=False, max_length=max_length)


def by_sequence(index: SequenceIndex) -> list[tuple[list[int], list[int], list[int]]]:
    """(token ids, word index, segment ids) of each sequence."""
    assert index.segment_id is not None
    assert index.segment_id.dtype == np.int8
    ends = np.cumsum(index.n_tokens)
    assert len(index.segment_id) == len(index.input_id) == len(index.word_index) == ends[-1]
    return list(
        zip(
            *(
                [part.tolist() for part in np.split(array, ends[:-1])]
                for array in (index.input_id, index.word_index, index.segment_id)
            ),
            strict=True,
        )
    )


def assert_tokenizers_own(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_length: int) -> None:
    """Token ids, segment ids and special tokens equal those of a tokenizer's call with one pair."""
    for (ids, word_index, segments), pair in zip(
        by_sequence(encoded(tokenizer, pairs, max_length)), pairs, strict=True
    ):
        own = tokenizer(
            *pair,
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=True,
            return_special_tokens_mask=True,
        )
        assert ids == own["input_ids"]
        assert segments == own["token_type_ids"]
        assert len(ids) <= max_length
        special = [number == SPECIAL for number in word_index]
        assert special == [bool(mark) for mark in own["special_tokens_mask"]]


# Segment ids of fast tokenizers --------------------------------------------------------------------------------------

WORD = st.text("abthenxyzäß7.", min_size=1, max_size=5)
SEGMENT = st.lists(WORD, min_size=1, max_size=9).map(" ".join)
QUICK = settings(max_examples=50, deadline=None)


@QUICK
@given(pairs=st.lists(st.tuples(SEGMENT, SEGMENT), min_size=1, max_size=4), max_length=st.integers(4, 40))
def test_segments_are_the_tokenizers_own(pairs: list[Pair], max_length: int) -> None:
    assert_tokenizers_own(TOKENIZER, pairs, max_length)


@QUICK
@given(pair=st.tuples(SEGMENT, SEGMENT))
def test_the_second_segment_begins_after_the_first_separator(pair: Pair) -> None:
    (ids, _, segments), *_ = by_sequence(encoded(TOKENIZER, [pair], 512))
    first, second = (len(TOKENIZER.tokenize(segment)) for segment in pair)
    assert segments == [0] * (first + 2) + [1] * (second + 1)
    assert [i for i, number in enumerate(ids) if number in (0, 2)] == [0, first + 1, first + second + 2]


def test_segments_of_a_real_tokenizer() -> None:
    tokenizer = load_tokenizer(ModelSpec(name="minilm", path=Path(tiny.minilm())), words=False)
    pairs = [
        ("A person on a horse jumps over a broken down airplane.", "A person is outdoors, on a horse."),
        ("dresser", "replace drawer with bobby pin "),
        ("[header] How to make a cage [title] Take paper. [step] Tear it.", "[substeps] e = mc² 😀"),
        ("東京は日本の首都です。", "Привет , как дела ?"),
        ("a [SEP] b", "[CLS] c"),
        ("antidisestablishmentarianism " * 9, "I do n't think so"),
    ]
    for max_length in (16, 128):
        assert_tokenizers_own(tokenizer, pairs, max_length)
    for (ids, _, segments), pair in zip(by_sequence(encoded(tokenizer, pairs)), pairs, strict=True):
        own = AutoTokenizer.from_pretrained(tiny.minilm())(*pair, truncation=True, max_length=128)
        assert (ids, segments) == (own["input_ids"], own["token_type_ids"])
        assert set(segments) == {0, 1}


def longest_first(first: int, second: int, room: int) -> set[tuple[int, int]]:
    """Lengths after cutting the longer segment, token by token. If both are equal, either may be cut."""
    if first + second <= room:
        return {(first, second)}
    shorter = min(first, second)
    if 2 * shorter <= room:
        return {(room - shorter, shorter)} if first > second else {(shorter, room - shorter)}
    return {(room // 2, room - room // 2), (room - room // 2, room // 2)}


@QUICK
@given(pair=st.tuples(SEGMENT, SEGMENT), max_length=st.sampled_from([5, 16, 17]))
def test_the_longer_segment_is_cut_first(pair: Pair, max_length: int) -> None:
    ((ids, _, segments),) = by_sequence(encoded(TOKENIZER, [pair], max_length))
    pieces = [TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize(segment)) for segment in pair]
    second = segments.count(1) - 1
    first = len(ids) - second - 3
    assert (first, second) in longest_first(len(pieces[0]), len(pieces[1]), max_length - 3)
    assert ids == [0, *pieces[0][:first], 2, *pieces[1][:second], 2]


@pytest.mark.parametrize(
    ("pair", "kept"),
    [(("a b c d e f g h i j k l m n", "x y"), (11, 2)), (("x y", "a b c d e f g h i j k l m n"), (2, 11))],
)
def test_at_16_tokens_a_short_segment_stays_whole(pair: Pair, kept: tuple[int, int]) -> None:
    ((ids, _, segments),) = by_sequence(encoded(TOKENIZER, [pair], 16))
    assert len(ids) == 16
    assert (segments.count(0) - 2, segments.count(1) - 1) == kept


def test_words_and_single_texts_have_no_segments() -> None:
    assert encode(TOKENIZER, ["a"], [("das", "haus")], words=True, max_length=16).segment_id is None
    assert encode(TOKENIZER, ["a"], [("das haus",)], words=False, max_length=16).segment_id is None
    assert encoded(TOKENIZER, [("das haus", "ein")], 16).segment_id is not None


def test_more_pairs_than_are_tokenised_at_once_stay_in_order() -> None:
    count = TEXTS_AT_ONCE + 3
    pairs = [("a " * (1 + i % 3), "b " * (1 + i % 5)) for i in range(count)]
    ours = by_sequence(encoded(TOKENIZER, pairs))
    for i in (0, 1, TEXTS_AT_ONCE - 1, TEXTS_AT_ONCE, count - 1):
        assert ours[i][2] == [0] * (3 + i % 3) + [1] * (2 + i % 5)


@QUICK
@given(data=st.data())
def test_parts_and_selections_keep_their_segments(data: st.DataObject) -> None:
    index = encoded(TOKENIZER, PAIRS, 20)
    whole = by_sequence(index)
    start = data.draw(st.integers(0, len(PAIRS) - 1))
    stop = data.draw(st.integers(start + 1, len(PAIRS)))
    assert by_sequence(index.part(start, stop)) == whole[start:stop]
    positions = data.draw(st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=12))
    assert by_sequence(index.select(np.array(positions))) == [whole[i] for i in positions]
    without = dataclasses.replace(index, segment_id=None)
    assert without.part(start, stop).segment_id is without.select(np.array(positions)).segment_id is None


def test_choices_are_encoded_as_pairs_in_their_order() -> None:
    endings = ("he ran .", "he", "das haus .")
    examples = [
        Example("x", tuple(("the dog ran .", ending) for ending in endings), 1),
        Example("y", (("ich", "ein"),), None),
    ]
    index = encode_examples(TOKENIZER, examples, find_task("swag"), 128)
    assert [raw.decode() for raw in index.ids.tolist()] == ["x#0", "x#1", "x#2", "y"]
    pairs = [*(("the dog ran .", ending) for ending in endings), ("ich", "ein")]
    for (ids, _, segments), pair in zip(by_sequence(index), pairs, strict=True):
        own = TOKENIZER(*pair, return_token_type_ids=True)
        assert (ids, segments) == (own["input_ids"], own["token_type_ids"])


# Which models take them ----------------------------------------------------------------------------------------------

MODELS = [
    ("bert", {}, True),
    ("electra", {}, True),
    ("ernie", {}, True),
    ("roberta", {"type_vocab_size": 2}, True),
    ("roberta", {"type_vocab_size": 1}, False),
    ("xlm-roberta", {"type_vocab_size": 1}, False),
    ("bert", {"type_vocab_size": 1}, False),
    ("distilbert", {}, False),
    ("mpnet", {}, False),
    ("mpnet", {"type_vocab_size": 2}, False),  # its configuration has segments, but its forward pass takes none
]


@pytest.mark.parametrize(("model_type", "settings_", "takes"), MODELS)
def test_only_models_with_segments_are_given_them(
    model_type: str, settings_: dict[str, Any], takes: bool, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", model_type, **settings_)
    tokenizer = load_tokenizer(ModelSpec(name="x", path=folder), words=False)
    assert ("token_type_ids" in tokenizer.model_input_names) == takes
    assert {"input_ids", "attention_mask"} <= set(tokenizer.model_input_names)
    index = encoded(tokenizer, PAIRS, 64)
    assert (index.segment_id is not None) == takes
    own = AutoTokenizer.from_pretrained(folder)
    assert index.input_id.tolist() == [
        number for pair in PAIRS for number in own(*pair, truncation=True, max_length=64)["input_ids"]
    ], "dropping the segments changes no token"


# The states equal those of transformers ------------------------------------------------------------------------------


def states_alone(folder: Path, pairs: Sequence[Pair], max_length: int, segments: bool) -> list[NDArray[np.float32]]:
    """States that transformers gives for each pair in a batch of its own, without padding: (L + 1, T, D)."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = []
    for first, second in pairs:
        inputs = tokenizer(
            first,
            second,
            truncation="longest_first",
            max_length=max_length,
            return_tensors="pt",
            return_token_type_ids=segments,
        )
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states
        result.append(torch.cat(hidden).numpy())
    return result


def plan_of(
    folder: Path, cache_dir: Path, task: str, examples: Sequence[Example] | None, **settings_: Any
) -> extract.ExtractPlan:
    values: dict[str, Any] = {"split": "dev", "device": "cpu", "tokens_per_batch": 256, "max_length": 64} | settings_
    config = ExtractConfig(resource=str(folder), task=task, cache_dir=cache_dir, **values)
    return planning.plan_extraction(config, examples)


def extracted(plan: extract.ExtractPlan) -> FeatureCache:
    return FeatureCache.open(extract.extract(plan).cache)


def excess(cache: FeatureCache, expected: Sequence[NDArray[np.float32]]) -> list[float]:
    """The largest error of each sequence. 1 is the error that rounding to float16 and batching may cause."""
    assert len(cache.ids) == len(expected)
    result = []
    for name, states in zip(cache.ids, expected, strict=True):
        assert cache[name].shape == states.shape, name
        allowed = 1.01 * FLOAT16 * np.abs(states) + COMPUTED * np.abs(states).max()
        result.append(float((np.abs(cache[name].astype(np.float64) - states) / allowed).max()))
    return result


def pairs_as_examples(pairs: Sequence[Pair]) -> list[Example]:
    return [Example(f"e{i}", (pair,), i % 3) for i, pair in enumerate(pairs)]


def pairs_as_choices(pairs: Sequence[Pair], choices: int) -> list[Example]:
    assert len(pairs) % choices == 0
    return [
        Example(f"e{i}", tuple(pairs[i * choices : (i + 1) * choices]), i % choices)
        for i in range(len(pairs) // choices)
    ]


@pytest.mark.parametrize(
    ("model_type", "settings_", "takes"),
    [
        ("bert", {}, True),
        ("electra", {}, True),
        ("roberta", {"type_vocab_size": 2}, True),
        ("roberta", {"type_vocab_size": 1}, False),
        ("distilbert", {}, False),
    ],
)
def test_every_state_of_a_pair_is_transformers_own(
    model_type: str, settings_: dict[str, Any], takes: bool, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", model_type, **settings_)
    pairs_cache = extracted(plan_of(folder, tmp_path / "cache", "snli", pairs_as_examples(PAIRS)))
    choice_cache = extracted(plan_of(folder, tmp_path / "cache", "swag", pairs_as_choices(PAIRS, 4)))
    assert pairs_cache.ids == [f"e{i}" for i in range(8)]
    assert choice_cache.ids == [f"e{i}#{choice}" for i in range(2) for choice in range(4)]
    assert pairs_cache.layers == (0, 1, 2)
    assert pairs_cache.provenance["found"]["segments"] is choice_cache.provenance["found"]["segments"] is takes
    right = states_alone(folder, PAIRS, 64, takes)
    assert max(excess(pairs_cache, right)) <= 1
    assert max(excess(choice_cache, right)) <= 1
    if takes:
        wrong = states_alone(folder, PAIRS, 64, False)
        assert min(excess(pairs_cache, wrong)) > 100, "a test that missing segments would pass proves nothing"
        assert min(excess(choice_cache, wrong)) > 100


def test_512_tokens_beside_very_short_pairs(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    pairs: list[Pair] = [(words(400, 1), words(300, 2)), ("ich", "ein"), (words(20, 3), words(500, 4)), ("a", "b")]
    cache = extracted(
        plan_of(folder, tmp_path / "cache", "piqa", pairs_as_choices(pairs, 2), max_length=512, tokens_per_batch=1100)
    )
    assert cache.n_tokens.tolist()[::2] == [512, 512]
    assert max(excess(cache, states_alone(folder, pairs, 512, True))) <= 1
    assert min(excess(cache, states_alone(folder, pairs, 512, False))) > 100


def test_padding_and_batch_mates_change_no_segment(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    right = states_alone(folder, PAIRS, 64, True)
    for tokens_per_batch in (1, 10_000):
        plan = plan_of(
            folder,
            tmp_path / f"cache-{tokens_per_batch}",
            "snli",
            pairs_as_examples(PAIRS),
            tokens_per_batch=tokens_per_batch,
        )
        assert max(excess(extracted(plan), right)) <= 1


def test_several_shards_keep_their_segments(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    plan = plan_of(folder, tmp_path / "cache", "snli", pairs_as_examples(PAIRS), shard_gb=1e-5)
    cache = extracted(plan)
    assert len(list(cache.folder.glob("*.h5"))) > 2
    assert max(excess(cache, states_alone(folder, PAIRS, 64, True))) <= 1


def test_from_the_file_to_the_cache(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    rows = [
        {"ind": 7, "ctx_a": "the dog ran .", "ctx_b": "he", "ctx": "the dog ran . he", "label": 2},
        {"ind": 3, "ctx_a": "[header] das haus", "ctx_b": "", "ctx": "[header] das haus", "label": 0},
    ]
    endings = ["ran .", "ein", "[step] das haus und ich", "there"]
    data = tmp_path / "data"
    data.mkdir()
    (data / "hellaswag_val.jsonl").write_text(
        "".join(json.dumps(row | {"endings": endings}) + "\n" for row in rows), "utf-8"
    )
    cache = extracted(plan_of(folder, tmp_path / "cache", "hellaswag", None, data=str(data)))
    assert cache.ids == [*(f"7#{i}" for i in range(4)), *(f"3#{i}" for i in range(4))]
    pairs = [
        *(("the dog ran .", f"he {ending}") for ending in endings),
        *(("[header] das haus", ending) for ending in endings),
    ]
    assert max(excess(cache, states_alone(folder, pairs, 64, True))) <= 1
    assert cache.provenance["chosen"]["task"] == "hellaswag"


# Provenance ----------------------------------------------------------------------------------------------------------


def wanted_of(plan: extract.ExtractPlan, cache: FeatureCache) -> find.Wanted:
    return find.Wanted(
        resource=plan.spec.name,
        task=plan.config.task,
        corpus=plan.corpus,
        split=plan.config.split,
        max_length=plan.config.max_length,
        dtype=plan.config.dtype,
        compute_dtype=plan.config.compute_dtype,
        fusion="all",
        weights=cache.provenance["found"]["weights"],
        config=cache.provenance["found"]["config"],
        template=plan.template,
        ids=tuple(raw.decode() for raw in plan.index.ids.tolist()),
        text_xxh3=plan.index.text_xxh3,
    )


def test_a_cache_made_without_segments_does_not_fit(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    plan = plan_of(folder, tmp_path / "cache", "snli", pairs_as_examples(PAIRS))
    blind_plan = dataclasses.replace(plan, index=dataclasses.replace(plan.index, segment_id=None))
    blind, cache = extracted(blind_plan), extracted(plan)
    assert blind.fingerprint != cache.fingerprint
    assert blind.folder != cache.folder
    assert max(excess(blind, states_alone(folder, PAIRS, 64, False))) <= 1
    wanted = wanted_of(plan, cache)
    assert find.found_differences(cache, wanted, plan.index) == []
    assert find.found_differences(blind, wanted, blind_plan.index) == []

    (difference,) = find.found_differences(blind, wanted, plan.index)
    assert difference.field == "segments"
    assert "made without segment ids, now the model runs with them" in difference.text
    (difference,) = find.found_differences(cache, wanted, blind_plan.index)
    assert difference.field == "segments"
    assert "made with segment ids, now the model runs without them" in difference.text

    # Without the tokenizer nothing can be compared. A cache that is older than the field has no segments.
    assert find.found_differences(blind, wanted, None) == []
    del blind.provenance["found"]["segments"]
    assert [one.field for one in find.found_differences(blind, wanted, plan.index)] == ["segments"]
    assert find.found_differences(blind, wanted, blind_plan.index) == []


def test_segments_of_a_part_of_the_examples_are_compared_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "bert")
    examples = pairs_as_examples(PAIRS)
    cache = extracted(plan_of(folder, tmp_path / "cache", "snli", examples))
    few = plan_of(folder, tmp_path / "cache", "snli", examples[2:5])
    assert find.found_differences(cache, wanted_of(few, cache), few.index) == []
    blind = dataclasses.replace(few.index, segment_id=None)
    assert [one.field for one in find.found_differences(cache, wanted_of(few, cache), blind)] == ["segments"]


# Tokenizers written in Python ----------------------------------------------------------------------------------------

JAPANESE = "猫犬はがいる東京都走"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *JAPANESE, *(f"##{c}" for c in JAPANESE), "東京", "##いる"]
JAPANESE_WORDS = st.lists(st.text(JAPANESE, min_size=1, max_size=4), min_size=1, max_size=6)


def wordpiece(word: str) -> list[int]:
    """Greedy longest match, as BERT's WordPiece is defined; every character is in the vocabulary."""
    pieces: list[int] = []
    while word:
        prefix = "##" if pieces else ""
        end = next(end for end in range(len(word), 0, -1) if prefix + word[:end] in VOCABULARY)
        pieces.append(VOCABULARY.index(prefix + word[:end]))
        word = word[end:]
    return pieces


@pytest.fixture(scope="module")
def japanese(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Japanese BERT, its tokenizer written in Python. Read only."""
    folder = tmp_path_factory.mktemp("japanese") / "model"
    tiny.save_model(folder, "bert", vocab_size=len(VOCABULARY), **(LIVELY | {"pad_token_id": 0}))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    BertJapaneseTokenizer(
        str(vocabulary), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece"
    ).save_pretrained(folder)
    assert not AutoTokenizer.from_pretrained(folder).is_fast, "this test needs a tokenizer written in Python"
    return lists_segments(folder)


@QUICK
@given(
    pairs=st.lists(st.tuples(JAPANESE_WORDS, JAPANESE_WORDS), min_size=1, max_size=3),
    max_length=st.sampled_from([4, 16, 100]),
)
def test_pairs_by_a_python_tokenizer(japanese: Path, pairs: list[tuple[list[str], list[str]]], max_length: int) -> None:
    tokenizer = load_tokenizer(ModelSpec(name="japanese", path=japanese), words=False)
    texts = [(" ".join(a), " ".join(b)) for a, b in pairs]
    assert_tokenizers_own(tokenizer, texts, max_length)
    for (ids, word_index, segments), pair in zip(
        by_sequence(encoded(tokenizer, texts, max_length)), pairs, strict=True
    ):
        pieces = [[number for word in segment for number in wordpiece(word)] for segment in pair]
        second = segments.count(1) - 1
        first = len(ids) - second - 3
        assert (first, second) in longest_first(len(pieces[0]), len(pieces[1]), max_length - 3)
        assert ids == [2, *pieces[0][:first], 3, *pieces[1][:second], 3]
        assert segments == [0] * (first + 2) + [1] * (second + 1)
        marks = {0, first + 1, first + second + 2}
        assert {i for i, number in enumerate(word_index) if number == SPECIAL} == marks
        counted = [number for number in word_index if number != SPECIAL]
        assert counted == list(range(first + second)), "every token counts as one"


def test_a_single_text_by_a_python_tokenizer(japanese: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec(name="japanese", path=japanese), words=False)
    index = encode(tokenizer, ["a"], [("東京都 はいる",)], words=False, max_length=5)
    assert index.segment_id is None
    assert index.input_id.tolist() == [2, *[*wordpiece("東京都"), *wordpiece("はいる")][:3], 3]
    assert index.word_index.tolist() == [SPECIAL, 0, 1, 2, SPECIAL]


def test_states_of_pairs_by_a_python_tokenizer(japanese: Path, tmp_path: Path) -> None:
    pairs = [("東京都 は 猫", "いる"), ("犬 が 走", "東京 がいる 猫 は 犬"), ("猫", "犬"), ("走 " * 40, "猫 " * 9)]
    cache = extracted(plan_of(japanese, tmp_path / "cache", "piqa", pairs_as_choices(pairs, 2), max_length=32))
    assert cache.provenance["found"]["segments"] is True
    assert max(excess(cache, states_alone(japanese, pairs, 32, True))) <= 1
    assert min(excess(cache, states_alone(japanese, pairs, 32, False))) > 100


def test_pairs_by_characters() -> None:
    """CANINE's tokens are characters. Its tokenizer, written in Python, adds special tokens of its own."""
    tokenizer = CanineTokenizer()
    assert not tokenizer.is_fast
    pairs = [("das haus", "ein"), ("x", "y"), ("a" * 30, "b" * 30)]
    index = encoded(tokenizer, pairs, 20)
    first = index.first_token
    cls, sep = 0xE000, 0xE001
    for i, pair in enumerate(pairs):
        ids = index.input_id[first[i] : first[i + 1]].tolist()
        own = tokenizer(*pair, truncation=True, max_length=20)
        assert ids == own["input_ids"]
        assert (ids[0], ids[-1], ids.count(cls), ids.count(sep)) == (cls, sep, 1, 2)
        word_index = index.word_index[first[i] : first[i + 1]].tolist()
        assert [number == SPECIAL for number in word_index] == [number in (cls, sep) for number in ids]
        assert [number for number in word_index if number != SPECIAL] == list(range(len(ids) - 3))
        segments = [0] * len(ids) if index.segment_id is None else index.segment_id[first[i] : first[i + 1]].tolist()
        assert segments == own["token_type_ids"]
