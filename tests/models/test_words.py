"""Words get the tokens that they have in running text, whatever the tokenizer takes to give them their space.

The expected tokens come from the tokenizer's backend: it encodes the running text, and a token belongs to the word in
which its characters lie.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trained
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kr2cache.cache.format import SPECIAL
from kr2cache.errors import DataError, UnsupportedModelError
from kr2cache.models.encode import MissingWords, encode, missing_words
from kr2cache.models.registry import ModelSpec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.models.words import as_words, in_running_text, one_by_one, reading_of, with_spaces

READINGS = {
    "modernbert": with_spaces,
    "eurobert": with_spaces,
    "llama3": with_spaces,
    "qwen3": with_spaces,
    "roberta": as_words,
    "luke": one_by_one,
    "gemma": with_spaces,
    "llama2": as_words,
    "deberta-v3": as_words,
    "t5": as_words,
}
Tokens = tuple[list[int], list[int]]
"""Token ids, and the word of each."""


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a trained tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("trained")

    def of(name: str) -> Path:
        return folder / name if (folder / name).exists() else trained.save(name, folder / name)

    return of


def for_words(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(name="mine", path=folder), words=True)


def ours(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], max_length: int = 10_000) -> list[Tokens]:
    given = [tuple(text) for text in texts]
    index = encode(tokenizer, [str(i) for i in range(len(given))], given, words=True, max_length=max_length)
    first = index.first_token.tolist()
    return [
        (index.input_id[start:stop].tolist(), index.word_index[start:stop].tolist())
        for start, stop in itertools.pairwise(first)
    ]


def plain(folder: Path, **settings: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers loads it."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **settings)
    return tokenizer


def of_running_text(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> Tokens:
    """By the tokenizer's backend. The space before a word belongs to the word."""
    owner = [number for number, word in enumerate(words) for _ in (" " if number else "") + word]
    encoding = tokenizer.backend_tokenizer.encode(" ".join(words))
    numbers = []
    for (start, stop), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        covered = set(owner[start : max(stop, start + 1)])
        assert special or len(covered) == 1, "a token of two words"
        numbers.append(SPECIAL if special else covered.pop())
    return encoding.ids, numbers


# Tokenizers of today's models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "de", "ko"])
@pytest.mark.parametrize("name", trained.TOKENIZERS)
def test_words_have_the_tokens_of_running_text(saved: Callable[[str], Path], name: str, language: str) -> None:
    folder = saved(name)
    tokenizer = for_words(folder)
    assert reading_of(tokenizer, "mine") is READINGS[name]
    # These classes are told to put a space before words. They put one before the first word too.
    expected = plain(folder, add_prefix_space=True) if name in ("roberta", "luke") else plain(folder)
    texts = trained.sentences(language)
    for text, found in zip(texts, ours(tokenizer, texts), strict=True):
        assert found == of_running_text(expected, text)
        assert set(found[1]) >= set(range(len(text))), "no word is lost"


@pytest.mark.parametrize("name", [name for name, reading in READINGS.items() if reading is with_spaces])
def test_odd_words_have_the_tokens_of_running_text(saved: Callable[[str], Path], name: str) -> None:
    # A mask takes all whitespace before it, so a no-break space may not stand there.
    odd = ["\u200d", "1 000", "\u200b", "e\u0301", "\u0301", "👩\u200d👧", "2024", "n't", "\u00a0", "-", "[MASK]", "a"]
    texts = [*itertools.permutations(odd[:4]), odd, odd[::-1], *([word] for word in odd)]
    expected = plain(saved(name))
    for text, found in zip(texts, ours(for_words(saved(name)), texts), strict=True):
        assert found == of_running_text(expected, text)
        assert set(found[1]) >= set(range(len(text)))


@pytest.mark.parametrize("name", ["modernbert", "llama3", "gemma"])
def test_only_the_first_word_has_no_space(saved: Callable[[str], Path], name: str) -> None:
    tokenizer = for_words(saved(name))
    ((ids, words),) = ours(tokenizer, [("house", "house", "house")])
    mark = "▁" if name == "gemma" else "Ġ"
    begins = [tokenizer.convert_ids_to_tokens(ids[words.index(word)])[0] == mark for word in range(3)]
    assert begins == [False, True, True]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["modernbert", "qwen3", "gemma", "deberta-v3"])
def test_long_texts_are_cut_as_running_text_is(saved: Callable[[str], Path], name: str, side: str) -> None:
    folder = saved(name)
    tokenizer, expected = for_words(folder), plain(folder)
    tokenizer.truncation_side = expected.truncation_side = side
    text = tuple(itertools.chain.from_iterable(trained.own_sentences("en")[:60]))
    whole = of_running_text(expected, text)
    assert len(whole[0]) > 512
    for max_length in (expected.num_special_tokens_to_add() + 1, 40, 512):
        ((ids, words),) = ours(tokenizer, [text], max_length)
        cut = expected(" ".join(text), truncation=True, max_length=max_length)["input_ids"]
        assert ids == cut
        assert len(ids) == max_length
        expected.backend_tokenizer.no_truncation()
        inside = [word for word in whole[1] if word != SPECIAL]
        kept = max_length - expected.num_special_tokens_to_add()
        assert [word for word in words if word != SPECIAL] == (inside[:kept] if side == "right" else inside[-kept:])
        index = encode(tokenizer, ["a"], [text], words=True, max_length=max_length)
        lost = len(text) - len(set(words) - {SPECIAL})
        assert missing_words(index, [text], max_length, tokenizer) == MissingWords(cut_off=lost, no_token=0)


def test_the_setting_in_the_file_stays_as_the_user_made_it(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A tokenizer.json whose ByteLevel puts a space before every text: it gives the tokens that it always gave."""
    folder = trained.save("modernbert", tmp_path / "edited")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokenizer = for_words(folder)
    assert reading_of(tokenizer, "mine") is as_words
    text = trained.own_sentences("de")[3]
    encoded = plain(folder)(list(text), is_split_into_words=True)
    assert ours(tokenizer, [text])[0][0] == encoded["input_ids"]
    inside = ours(for_words(saved("modernbert")), [("x", *text)])[0]
    assert [id_ for id_, word in zip(*inside, strict=True) if word > 0] == encoded["input_ids"][1:-1]


# Other tokenizers ----------------------------------------------------------------------------------------------------


def generic(backend: Tokenizer, folder: Path) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    tokenizer.save_pretrained(folder)
    BertConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def byte_level(*steps: pre_tokenizers.PreTokenizer, vocabulary: int = 700, end: str = "") -> Tokenizer:
    """A byte-level BPE that first cuts a text by ``steps``."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix=end))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_of])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=end,
        show_progress=False,
    )
    backend.train_from_iterator(trained.texts(), trainer)
    return backend


SPACE_BEHIND = pre_tokenizers.Split(" ", behavior="merged_with_previous")
"""The space belongs to the word before it, so no word alone has its tokens in running text."""


def test_where_no_word_alone_has_its_tokens_they_are_found_in_running_text(tmp_path: Path) -> None:
    folder = generic(byte_level(SPACE_BEHIND), tmp_path / "behind")
    tokenizer, expected = for_words(folder), plain(folder)
    assert reading_of(tokenizer, "mine") is in_running_text
    for language in ("en", "de", "ko"):
        texts = trained.sentences(language)
        for text, (ids, words) in zip(texts, ours(tokenizer, texts), strict=True):
            assert ids == expected(" ".join(text))["input_ids"]
            assert words == sorted(words)
            for number, word in enumerate(text):
                own = [token for token, place in zip(ids, words, strict=True) if place == number]
                assert tokenizer.decode(own).strip() == word
    ((ids, words),) = ours(tokenizer, [("bark", "loud")], 3)
    assert len(ids) == len(words) == 3


def test_a_text_in_which_words_share_a_token_is_named(tmp_path: Path) -> None:
    backend = byte_level(SPACE_BEHIND)
    backend.add_tokens(["the cat"])
    tokenizer = for_words(generic(backend, tmp_path / "shares"))
    texts = [("a", "cat"), ("so", "the", "cat", "ran")]
    assert len(ours(tokenizer, texts[:1])) == 1
    said = r"TokenizersBackend makes one token, 'the cat', of the words 'the' and 'cat' in the text 'so the cat ran'\."
    with pytest.raises(DataError, match=said):
        ours(tokenizer, texts)


def test_a_tokenizer_whose_tokens_end_anywhere_is_refused_with_what_was_seen(tmp_path: Path) -> None:
    cut = pre_tokenizers.Split(Regex(".{1,5}"), behavior="isolated")
    folder = generic(byte_level(cut, vocabulary=1_500), tmp_path / "five")
    with pytest.raises(UnsupportedModelError) as caught:
        for_words(folder)
    shared = (
        r"The tokenizer of 'mine' cannot read texts .* makes one token, '[^']+Ġ[^']+', of the words '\w+' and '\w+'"
    )
    assert re.match(shared, caught.value.message)
    assert re.search(r"\('[^']+': \[.*\] there, \[.*\] alone, \[.*\] with a space before it\)\.$", caught.value.message)
    assert "tasks with plain text" in caught.value.remedy
    assert load_tokenizer(ModelSpec(name="mine", path=folder), words=False)("the dog")["input_ids"]


def test_a_byte_level_bpe_that_marks_where_words_end_needs_no_space(tmp_path: Path) -> None:
    """CLIP's: spaces are dropped, and the last token of a word ends with </w>."""
    cut = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    folder = generic(byte_level(cut, end="</w>"), tmp_path / "clip")
    tokenizer, expected = for_words(folder), plain(folder)
    assert reading_of(tokenizer, "mine") is as_words
    for text in trained.own_sentences("en")[:20]:
        assert ours(tokenizer, [text])[0] == of_running_text(expected, text)


def test_unknown_words_tell_nothing(tmp_path: Path) -> None:
    """A list of words without a rule where words end: only given words are known."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "dog": 2}, unk_token="<unk>"))
    tokenizer = for_words(generic(backend, tmp_path / "words"))
    assert reading_of(tokenizer, "mine") is as_words
    assert ours(tokenizer, [("the", "dog", "ran")]) == [([1, 2, 0], [0, 1, 2])]


def test_a_space_that_is_unknown_is_none(tmp_path: Path) -> None:
    """Letters alone, as the tokenizers of molecules: a space would be one more unknown token before each word."""
    letters = Tokenizer(models.WordLevel({"<unk>": 0} | {chr(97 + i): i + 1 for i in range(26)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer = for_words(generic(letters, tmp_path / "letters"))
    assert tokenizer("ab c")["input_ids"] == [1, 2, 0, 3]
    assert ours(tokenizer, [("ab", "c")]) == [([1, 2, 3], [0, 0, 1])]
