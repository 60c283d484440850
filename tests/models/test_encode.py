"""Token ids and word alignment, against the tokenizer's own answer; batches by length; padding."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertJapaneseTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
)

from kr2cache.cache.format import SequenceIndex, encode_ids, text_xxh3
from kr2cache.errors import ConfigError, DataError
from kr2cache.models.encode import (
    SPECIAL,
    TEXTS_AT_ONCE,
    FirstSubwords,
    MissingWords,
    check_token_ids,
    encode,
    encode_examples,
    length_sorted_batches,
    missing_words,
    pad,
    padding_mask,
)
from kr2cache.models.registry import ModelSpec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.tasks import Example, find_task

WORD = st.text("abthenxyzäß7.", min_size=1, max_size=6)
SENTENCES = st.lists(st.lists(WORD, min_size=1, max_size=8), min_size=1, max_size=5)


def names(count: int) -> list[str]:
    return [f"s{i}" for i in range(count)]


def by_sequence(index: SequenceIndex) -> list[tuple[list[int], list[int]]]:
    """(token ids, word index) of each sequence."""
    first = index.first_token
    return [
        (index.input_id[first[i] : first[i + 1]].tolist(), index.word_index[first[i] : first[i + 1]].tolist())
        for i in range(len(index))
    ]


def encode_words(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sequence[str]], max_length: int = 128
) -> list[tuple[list[int], list[int]]]:
    texts = [tuple(words) for words in sentences]
    return by_sequence(encode(tokenizer, names(len(texts)), texts, words=True, max_length=max_length))


# Fast tokenizers -----------------------------------------------------------------------------------------------------

TOKENIZER = tiny.tokenizer()


@given(sentences=SENTENCES, max_length=st.integers(3, 20))
def test_words_and_ids_are_the_tokenizers_own(sentences: list[list[str]], max_length: int) -> None:
    ours = encode_words(TOKENIZER, sentences, max_length)
    for (ids, words), sentence in zip(ours, sentences, strict=True):
        alone = TOKENIZER(sentence, is_split_into_words=True, truncation=True, max_length=max_length)
        assert ids == alone["input_ids"]
        assert words == [SPECIAL if word is None else word for word in alone.word_ids()]
        assert len(ids) <= max_length


@given(sentence=st.lists(WORD, min_size=1, max_size=8))
def test_pieces_of_a_word_spell_that_word(sentence: list[str]) -> None:
    ((ids, words),) = encode_words(TOKENIZER, [sentence])
    spelled = ["" for _ in sentence]
    for piece, word in zip(TOKENIZER.convert_ids_to_tokens(ids), words, strict=True):
        if word != SPECIAL:
            spelled[word] += piece.removeprefix("##")
    assert spelled == sentence


def test_more_texts_than_are_tokenised_at_once_stay_in_order() -> None:
    count = TEXTS_AT_ONCE + 7
    sentences = [[tiny.WORDS[i % len(tiny.WORDS)]] * (1 + i % 3) for i in range(count)]
    index = encode(TOKENIZER, names(count), [tuple(words) for words in sentences], words=True, max_length=128)
    assert [raw.decode() for raw in index.ids.tolist()] == names(count)
    for i in (0, 1, TEXTS_AT_ONCE - 1, TEXTS_AT_ONCE, count - 1):
        assert by_sequence(index.part(i, i + 1))[0][0] == TOKENIZER(sentences[i], is_split_into_words=True)["input_ids"]
    assert index.n_tokens.sum() == len(index.input_id) == len(index.word_index)


def test_texts_are_hashed_whole_though_tokens_are_cut_off() -> None:
    texts = [("das", "haus") * 20, ("das", "haus") * 21]
    index = encode(TOKENIZER, names(2), texts, words=True, max_length=5)
    assert index.n_tokens.tolist() == [5, 5]
    assert index.text_xxh3.tolist() == [text_xxh3(text) for text in texts]
    assert len(set(index.text_xxh3.tolist())) == 2


def test_pairs_of_segments_are_cut_longest_first() -> None:
    texts = [("das haus", "ein"), ("das haus und das haus und das haus", "ein")]
    index = encode(TOKENIZER, names(2), texts, words=False, max_length=10)
    for (ids, _), (first, second) in zip(by_sequence(index), texts, strict=True):
        assert ids == TOKENIZER(first, second, truncation="longest_first", max_length=10)["input_ids"]


def test_examples_are_encoded_by_sequence() -> None:
    examples = [Example("a", (("das", "haus"),), (0, 1)), Example("b", (("ein",),), None)]
    index = encode_examples(TOKENIZER, examples, find_task("udpos"), 128)
    assert [raw.decode() for raw in index.ids.tolist()] == ["a", "b"]
    assert by_sequence(index)[1][0] == TOKENIZER(["ein"], is_split_into_words=True)["input_ids"]


def test_words_without_a_token_shift_no_other_word() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    sentence = ["das", "\u200b", "haus", "\ufeff\u200d", "ein"]
    index = encode(tokenizer, names(1), [sentence], words=True, max_length=20)
    ((ids, words),) = by_sequence(index)
    assert sorted(set(words)) == [SPECIAL, 0, 2, 4]
    starts, started = FirstSubwords(index)[0]
    assert started.tolist() == [0, 2, 4]
    first_pieces = [tokenizer.tokenize(word)[0] for word in ("das", "haus", "ein")]
    assert tokenizer.convert_ids_to_tokens([ids[start] for start in starts]) == first_pieces


@pytest.mark.parametrize("max_length", [0, 1, 2])
def test_no_room_beside_the_special_tokens(max_length: int) -> None:
    with pytest.raises(ConfigError, match=f"maximal length of {max_length} leaves no room") as caught:
        encode_words(TOKENIZER, [["das"]], max_length)
    assert "--max-length 3" in caught.value.remedy
    assert len(encode_words(TOKENIZER, [["das"]], 3)[0][0]) == 3


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    index = encode(TOKENIZER, ["a"], [("##nonsense",)], words=True, max_length=128)
    highest = int(index.input_id.max())
    check_token_ids(index, highest + 1, "'me'")
    with pytest.raises(DataError, match=f"tokenizer of 'me' gives token id {highest}, but .* {highest} embeddings"):
        check_token_ids(index, highest, "'me'")


# Tokenizers written in Python ----------------------------------------------------------------------------------------

JAPANESE = "猫犬はがいる東京都走"
JAPANESE_VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *JAPANESE, *(f"##{c}" for c in JAPANESE), "東京", "##いる",
]  # fmt: skip
JAPANESE_WORD = st.text(JAPANESE, min_size=1, max_size=4)


def japanese_folder(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(JAPANESE_VOCABULARY) + "\n", "utf-8")
    BertJapaneseTokenizer(
        str(folder / "vocab.txt"), subword_tokenizer_type="wordpiece", **({"word_tokenizer_type": "basic"} | settings)
    ).save_pretrained(folder)
    BertConfig(vocab_size=len(JAPANESE_VOCABULARY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def japanese(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = japanese_folder(tmp_path_factory.mktemp("japanese"))
    tokenizer = load_tokenizer(ModelSpec(name="japanese", path=folder), words=True)
    assert not tokenizer.is_fast, "the point of it"
    with pytest.raises(ValueError, match="word_ids"):
        tokenizer("猫").word_ids()
    return tokenizer


def wordpiece(word: str) -> list[int]:
    """Greedy longest match, as BERT's WordPiece is defined."""
    numbers = {piece: number for number, piece in enumerate(JAPANESE_VOCABULARY)}
    pieces: list[int] = []
    while word:
        for end in range(len(word), 0, -1):
            piece = ("##" if pieces else "") + word[:end]
            if piece in numbers:
                pieces.append(numbers[piece])
                word = word[end:]
                break
        else:
            return [numbers["[UNK]"]]
    return pieces


@given(
    sentences=st.lists(st.lists(JAPANESE_WORD, min_size=1, max_size=6), min_size=1, max_size=3), room=st.integers(1, 9)
)
def test_python_tokenizers_are_aligned_word_by_word(
    japanese: PreTrainedTokenizerBase, sentences: list[list[str]], room: int
) -> None:
    ours = encode_words(japanese, sentences, room + 2)
    for (ids, words), sentence in zip(ours, sentences, strict=True):
        pieces = [(number, i) for i, word in enumerate(sentence) for number in wordpiece(word)][:room]
        assert ids == [2, *(number for number, _ in pieces), 3]
        assert words == [SPECIAL, *(word for _, word in pieces), SPECIAL]


def test_python_tokenizers_and_words_without_a_token(japanese: PreTrainedTokenizerBase) -> None:
    ((ids, words),) = encode_words(japanese, [["猫", "\u200b", "いる"]])
    assert words[0] == words[-1] == SPECIAL
    assert sorted(set(words[1:-1])) == [0, 2]
    assert ids[1] == JAPANESE_VOCABULARY.index("猫")


def test_python_tokenizers_leave_no_room_either(japanese: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="leaves no room"):
        encode_words(japanese, [["猫"]], 2)


class OwnSpecials(BertJapaneseTokenizer):
    """Adds special tokens of its own; what it says of them is still what the class it is made of says."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [2, 4, *token_ids_0, 3] + ([*token_ids_1, 3, 3] if token_ids_1 is not None else [])


class MoreThanItSays(OwnSpecials):
    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 1


def of_class(kind: type[BertJapaneseTokenizer], folder: Path) -> BertJapaneseTokenizer:
    return kind(str(japanese_folder(folder) / "vocab.txt"), subword_tokenizer_type="wordpiece")


def test_special_tokens_are_seen_not_believed(tmp_path: Path) -> None:
    own = of_class(OwnSpecials, tmp_path)
    text = ["猫", "\u200b", "がいる", "走"]
    pieces = [(number, i) for i, word in enumerate(text) if i != 1 for number in wordpiece(word)]
    assert len(own.get_special_tokens_mask([5, 6])) != len(own.build_inputs_with_special_tokens([5, 6]))
    for room in (1, 3, 100):
        ((ids, words),) = encode_words(own, [text], 3 + room)
        assert ids == [2, 4, *(number for number, _ in pieces[:room]), 3]
        assert words == [SPECIAL, SPECIAL, *(word for _, word in pieces[:room]), SPECIAL]
    ((ids, words),) = encode_words(own, [["[CLS]", "猫"]])  # a word that reads like a special token
    assert (ids[:2], ids[-2:]) == ([2, 4], [5, 3])
    assert words == [SPECIAL, SPECIAL, 0, 1, SPECIAL]
    for segments, expected in (
        (("猫犬",), [2, 4, *wordpiece("猫犬"), 3]),
        (("猫犬", "走"), [2, 4, *wordpiece("猫犬"), 3, *wordpiece("走"), 3, 3]),
    ):
        ((ids, words),) = by_sequence(encode(own, ["a"], [segments], words=False, max_length=20))
        assert ids == expected
        assert [number in (2, 3, 4) for number in ids] == [word == SPECIAL for word in words]


def test_a_tokenizer_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    own = of_class(OwnSpecials, tmp_path)
    own.model_input_names = ["input_ids", "token_type_ids"]
    own.create_token_type_ids_from_sequences = lambda first, second=None: [0] * len(first) + [1] * len(second or ())
    with pytest.raises(DataError, match=r"OwnSpecials gives 8 tokens and 3 segment numbers for b\."):
        encode(own, ["a", "b"], [("猫",), ("猫犬", "走")], words=False, max_length=20)
    more = of_class(MoreThanItSays, tmp_path)
    with pytest.raises(DataError, match=r"MoreThanItSays gives 10 tokens for s0, more than the maximal length of 8"):
        encode_words(more, [["猫"] * 20], 8)


def test_a_text_without_a_token_is_named(tmp_path: Path, japanese: PreTrainedTokenizerBase) -> None:
    bare = tiny.tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    nothing = of_class(OwnSpecials, tmp_path)
    nothing.build_inputs_with_special_tokens = lambda first, second=None: [*first, *(second or ())]
    for tokenizer, words in ((bare, True), (bare, False), (nothing, True)):
        texts = [("das",), ("\u200a",), ("haus",), ("\u2003",)]
        with pytest.raises(DataError, match=r"2 of 4 texts become no token at all; the first is s1: '\\u200a'\."):
            encode(tokenizer, names(4), texts, words=words, max_length=9)
    assert encode_words(japanese, [["\u200a"]]) == [([2, 3], [SPECIAL, SPECIAL])], "special tokens have states"


@pytest.mark.skipif(
    not (importlib.util.find_spec("fugashi") and importlib.util.find_spec("ipadic")),
    reason="the extra japanese is not installed",
)
def test_mecab_with_ipadic_is_aligned_word_by_word(tmp_path: Path) -> None:
    folder = japanese_folder(tmp_path / "mecab", word_tokenizer_type="mecab", mecab_kwargs={"mecab_dic": "ipadic"})
    spec = ModelSpec(name="wwm", path=folder, tokenizer={"mecab_kwargs": {"mecab_dic": "ipadic"}})
    tokenizer = load_tokenizer(spec, words=True)
    sentence = ["東京", "都", "は", "猫", "がいる"]
    ((ids, words),) = encode_words(tokenizer, [sentence])
    pieces = [number for word in sentence for number in tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))]
    assert ids == [2, *pieces, 3]
    assert sorted(set(words)) == [SPECIAL, 0, 1, 2, 3, 4]


# Byte-level BPE ------------------------------------------------------------------------------------------------------

SPACED = ["das haus ist schön und das ist gut", "ich gehe heute nach haus und das ist gut", "zwölf hunde gehen"]


def byte_level(folder: Path) -> Path:
    """A tiny byte-level BPE as gottbert's is stored: vocab and merges of RoBERTa."""
    backend = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SPACED * 20, trainer)
    folder.mkdir(parents=True)
    RobertaConfig(vocab_size=backend.get_vocab_size()).save_pretrained(folder)
    backend.model.save(str(folder))
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_gottberts_byte_level_bpe_gets_its_space_before_every_word(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "gottbert")
    plain = AutoTokenizer.from_pretrained(folder)
    spec = ModelSpec(name="gottbert", path=folder)
    tokenizer = load_tokenizer(spec, words=True)
    for text in SPACED:
        ((ids, words),) = encode_words(tokenizer, [text.split(" ")])
        inside = plain(". " + text, add_special_tokens=False)["input_ids"]
        dot = plain(".", add_special_tokens=False)["input_ids"]
        assert ids == [0, *inside[len(dot) :], 2], "as the words stand inside a text"
        assert [w for w in dict.fromkeys(words) if w != SPECIAL] == list(range(len(text.split(" "))))
        without = plain(text.split(" "), is_split_into_words=True)["input_ids"]
        assert ids != without, "a test that cannot see the missing space proves nothing"


def test_plain_text_keeps_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "gottbert")
    tokenizer = load_tokenizer(ModelSpec(name="gottbert", path=folder), words=False)
    assert tokenizer(SPACED[0])["input_ids"] == AutoTokenizer.from_pretrained(folder)(SPACED[0])["input_ids"]


# Where words start ---------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=6), st.booleans())
def test_first_subwords_by_a_plain_loop(sentences: list[list[int]], specials: bool) -> None:
    """Without special tokens a word may follow one of equal number, of the sentence before; one may have no token."""
    word_indices = []
    for counts in sentences:
        inner = [word for word, count in enumerate(counts) for _ in range(count)]
        word_indices.append([SPECIAL, *inner, SPECIAL] if specials else inner)
    first_subwords = FirstSubwords(
        SequenceIndex(
            ids=encode_ids(names(len(sentences))),
            n_tokens=np.array([len(one) for one in word_indices], dtype=np.int32),
            text_xxh3=np.zeros(len(sentences), dtype=np.uint64),
            input_id=np.zeros(sum(map(len, word_indices)), dtype=np.int32),
            word_index=np.array([word for one in word_indices for word in one], dtype=np.int32),
        )
    )
    for i, one in enumerate(word_indices):
        starts, words = first_subwords[i]
        expected = [(place, word) for place, word in enumerate(one) if word >= 0 and word not in one[:place]]
        assert list(zip(starts.tolist(), words.tolist(), strict=True)) == expected
    several = np.arange(len(sentences))[::-2]
    together = [
        (place, start, word)
        for place, i in enumerate(several.tolist())
        for start, word in zip(*(part.tolist() for part in first_subwords[i]), strict=True)
    ]
    assert list(zip(*(part.tolist() for part in first_subwords.of(several)), strict=True)) == together


# Words without a token -----------------------------------------------------------------------------------------------

VANISHING = ("\u200b", "\u00ad", "\u200b\u00ad")
"""A zero-width space and soft hyphens: BERT's normalizer drops them."""


def dropping_tokenizer(side: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.truncation_side = side
    return tokenizer


DROPPING = {side: dropping_tokenizer(side) for side in ("right", "left")}


@given(
    sentences=st.lists(
        st.lists(st.sampled_from(("das", "haus", "abx", *VANISHING)), min_size=1, max_size=9), min_size=1, max_size=5
    ),
    side=st.sampled_from(("right", "left")),
    max_length=st.integers(3, 16),
)
def test_words_without_a_token_are_counted_by_their_reason(
    sentences: list[list[str]], side: str, max_length: int
) -> None:
    """Against the tokenizer's own answer with and without truncation."""
    tokenizer = DROPPING[side]
    cut_off = no_token = 0
    for sentence in sentences:
        whole = tokenizer(sentence, is_split_into_words=True)
        cut = tokenizer(sentence, is_split_into_words=True, truncation=True, max_length=max_length)
        for word in range(len(sentence)):
            no_token += word not in whole.word_ids()
            cut_off += word in whole.word_ids() and word not in cut.word_ids()
    texts = [tuple(sentence) for sentence in sentences]
    index = encode(tokenizer, names(len(texts)), texts, words=True, max_length=max_length)
    assert missing_words(index, texts, max_length, tokenizer) == MissingWords(cut_off, no_token)
    by_index = missing_words(index, texts, max_length)
    assert by_index.total == cut_off + no_token
    assert by_index.cut_off >= cut_off, (
        "without the tokenizer, dropped words at the end of a full text count as cut off"
    )


def test_words_without_a_token_of_tokenizers_written_in_python(japanese: PreTrainedTokenizerBase) -> None:
    texts = [("猫", "\u200b", "いる", "\u200b"), ("\u200b", "猫", "猫", "いる"), ("猫",)]
    index = encode(japanese, names(3), texts, words=True, max_length=4)
    assert missing_words(index, texts, 4, japanese) == MissingWords(cut_off=1, no_token=3)


# Batches -------------------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@given(lengths=LENGTHS, budget=st.integers(1, 200))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    n_tokens = np.array(lengths, dtype=np.int32)
    batches = length_sorted_batches(n_tokens, budget)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) >= 1
        assert len(batch) == 1 or len(batch) * n_tokens[batch].max() <= budget
    order = [(-lengths[i], i) for batch in batches for i in batch.tolist()]
    assert order == sorted(order), "longest first, equal lengths in their order"


@given(lengths=LENGTHS, budget=st.integers(1, 200))
def test_no_batch_could_take_one_more(lengths: list[int], budget: int) -> None:
    n_tokens = np.array(lengths, dtype=np.int32)
    for batch in length_sorted_batches(n_tokens, budget)[:-1]:
        assert (len(batch) + 1) * n_tokens[batch].max() > budget


@given(lengths=LENGTHS, budget=st.integers(1, 200))
def test_the_plan_depends_on_lengths_and_budget_alone(lengths: list[int], budget: int) -> None:
    one = length_sorted_batches(np.array(lengths, dtype=np.int32), budget)
    two = length_sorted_batches(np.array(lengths, dtype=np.int64), budget)
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in two]


@given(st.lists(st.lists(st.integers(-5, 5), max_size=7), min_size=1, max_size=6), st.integers(-9, 9))
def test_pad_fills_every_row_to_the_longest(rows: list[list[int]], fill: int) -> None:
    width = max(map(len, rows))
    padded = pad([np.array(row, dtype=np.int64) for row in rows], fill)
    assert padded.dtype == np.int64
    assert padded.tolist() == [row + [fill] * (width - len(row)) for row in rows]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_mask_of_a_padded_batch_says_where_tokens_are(lengths: list[int]) -> None:
    mask = padding_mask(np.array(lengths, dtype=np.int32))
    assert mask.dtype == np.int64
    assert mask.tolist() == [[1] * length + [0] * (max(lengths) - length) for length in lengths]
