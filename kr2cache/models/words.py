"""The tokens of a text that is a list of words: each word gets those that it has in running text.

A fast tokenizer encodes a given word as if nothing stood before it. SentencePiece's tokenizers put their mark of a new
word before it all the same. A byte-level BPE does not, unless it is told to, and then reads every word as the middle of
a longer one. How it is told differs by class, and may change more than the space: Llama 3's and Qwen's tokenizers then
put a space before every digit too. So a tokenizer is tried on a few words, and the first of these readings is taken
that gives each of them its tokens in running text:

- ``as_words``: each word alone, by the tokenizer as it is or as it is when loaded with ``add_prefix_space=True``
  (``one_by_one``, where its class cannot take several texts at once),
- ``with_spaces``: each word alone, all but the first with a space before it,
- ``in_running_text``: the words joined by spaces; tokens are found by their place in the text.

The first word begins the text, so ``with_spaces`` and ``in_running_text`` give it no space. A tokenizer that puts one
there by itself (SentencePiece's, RoBERTa's with ``add_prefix_space``) does so in running text too.
"""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kr2cache.errors import DataError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = (
    *("one", "of", "the", "first", "12", "dogs", "in", "the", "house", "doesn't", "bark", "(", "zwölfjährige", "Hunde"),
    *("bellen", ")", ",", "그", "한국어", "문장", "слово", "2024", "."),
)
"""Words that tokenizers treat differently: frequent ones that one token may join, digits, an apostrophe, punctuation,
several scripts."""

WordTokens = tuple[Sequence[int], Sequence[int | None]]
"""The token ids of a text, and the word of each token: None for a special token."""
Reading = Callable[..., list[WordTokens]]
"""From a fast tokenizer, texts as words, and options of the tokenizer's call, to the tokens of each text."""


def as_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], **options: Any) -> list[WordTokens]:
    """Each word alone."""
    encoded = tokenizer([list(text) for text in texts], is_split_into_words=True, **options)
    return [(ids, encoded.word_ids(i)) for i, ids in enumerate(encoded["input_ids"])]


def one_by_one(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], **options: Any) -> list[WordTokens]:
    """Each word alone, and a call for each text: LUKE's class takes a list of word lists for pairs of texts."""
    encoded = (tokenizer(list(text), is_split_into_words=True, **options) for text in texts)
    return [(one["input_ids"], one.word_ids()) for one in encoded]


def with_spaces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], **options: Any) -> list[WordTokens]:
    """Each word alone, all but the first with a space before it."""
    spaced = [[*text[:1], *(f" {word}" for word in text[1:])] for text in texts]
    return as_words(tokenizer, spaced, **options)


def in_running_text(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], **options: Any
) -> list[WordTokens]:
    """The words joined by spaces; a token belongs to the word that its characters belong to.

    Raises:
        DataError: If a token has characters of several words. One of them would have no token of its own.
    """
    result: list[WordTokens] = []
    for text, running in zip(texts, _running(tokenizer, texts, **options), strict=True):
        joined = running.joined()
        if joined is not None:
            raise DataError(
                f"The tokenizer {type(tokenizer).__name__} makes {joined.said(tokenizer, text)} "
                f"in the text {' '.join(text)!r}.",
                "Each word needs a token of its own. Leave this text out, or choose another model.",
            )
        result.append((running.ids, [None if span is None else span[0] for span in running.spans]))
    return result


_ALONE = (as_words, one_by_one)


def load_for_words(
    tokenizer: PreTrainedTokenizerBase, load_with_space: Callable[[], PreTrainedTokenizerBase], who: str
) -> PreTrainedTokenizerBase:
    """The tokenizer, told to put a space before each word if that is what it lacks.

    Args:
        tokenizer: A fast tokenizer, as loaded.
        load_with_space: Loads it with ``add_prefix_space=True``.
        who: The tokenizer, for the error.

    Raises:
        UnsupportedModelError: If no reading gives each word its tokens in running text.
    """
    (expected,) = _running(tokenizer, [PROBE])
    if any(_agrees(reading, tokenizer, expected) for reading in _ALONE):
        return tokenizer
    with contextlib.suppress(TypeError):  # a class that comes as code need not take the argument
        told = load_with_space()
        if any(_agrees(reading, told, expected) for reading in _ALONE):
            return told
    reading_of(tokenizer, who)
    return tokenizer


def reading_of(tokenizer: PreTrainedTokenizerBase, who: str) -> Reading:
    """The reading that gives each word its tokens in running text. It takes two or three short calls of the tokenizer.

    Args:
        tokenizer: A fast tokenizer, from ``load_for_words``.
        who: The tokenizer, for the error.

    Raises:
        UnsupportedModelError: If there is none.
    """
    (expected,) = _running(tokenizer, [PROBE])
    for reading in (*_ALONE, with_spaces):
        if _agrees(reading, tokenizer, expected):
            return reading
    joined = expected.joined()
    if joined is None:
        return in_running_text
    raise UnsupportedModelError(
        f"{who} cannot read texts that are lists of words: in the text {' '.join(PROBE)!r} it makes "
        f"{joined.said(tokenizer, PROBE)}, and a word that it is given alone gets other tokens than there"
        f"{_example(tokenizer, expected)}.",
        "Choose a model whose tokens end where words end. This one serves for tasks with plain text.",
    )


def check_tells_words(tokenizer: PreTrainedTokenizerBase, who: str) -> None:
    """Check that the tokenizer says which word of a plain text each token belongs to.

    Args:
        tokenizer: From ``load_tokenizer``, for plain text.
        who: The tokenizer, for the error.

    Raises:
        UnsupportedModelError: If it is written in Python, or takes a whole text for one word (Llama 2's).
    """
    told = 0
    if tokenizer.is_fast:
        told = len({word for word in tokenizer(" ".join(PROBE)).word_ids() if word is not None})
    if told < 2:
        why = "takes a whole text for one word" if told else "does not say which word a token belongs to"
        raise UnsupportedModelError(
            f"{who} ({type(tokenizer).__name__}) {why}, so the states of a plain text cannot be pooled by word.",
            "Give --pool sequence, omit --pool, or choose another model. Tasks whose texts are lists of words can be "
            "pooled by word with every model.",
        )


class _Joined(NamedTuple):
    """A token with characters of several words."""

    token: int
    first: int
    """The first of its words."""

    def said(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[str]) -> str:
        one, two = text[self.first : self.first + 2]
        return f"one token, {tokenizer.convert_ids_to_tokens(self.token)!r}, of the words {one!r} and {two!r}"


class _Running(NamedTuple):
    """The tokens of running text."""

    ids: Sequence[int]
    spans: Sequence[tuple[int, int] | None]
    """The first and the last word that each token has characters of; None for a special token."""

    def joined(self) -> _Joined | None:
        """The first token of several words."""
        for token, span in zip(self.ids, self.spans, strict=True):
            if span is not None and span[0] != span[1]:
                return _Joined(token, span[0])
        return None

    def clear(self, unknown: int | None) -> dict[int, list[int]]:
        """The tokens of each word that tells how words are read.

        Not the first one, which may have a space before it or none; not a word that the tokenizer does not know, or
        that shares a token with another word.
        """
        words: dict[int, list[int]] = {}
        unclear = {0}
        for token, span in zip(self.ids, self.spans, strict=True):
            if span is not None:
                first, last = span
                words.setdefault(first, []).append(token)
                if first != last or token == unknown:
                    unclear.update(range(first, last + 1))
        return {word: tokens for word, tokens in words.items() if word not in unclear}


def _running(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], **options: Any) -> list[_Running]:
    """The words joined by spaces, and the place of each token. The space before a word counts as the word's."""
    encoded = tokenizer([" ".join(text) for text in texts], return_offsets_mapping=True, **options)
    result = []
    for i, text in enumerate(texts):
        # The end of each word; there is the space before the next one.
        ends = [end - 1 for end in itertools.accumulate(len(word) + 1 for word in text)]
        last_word = len(text) - 1
        spans: list[tuple[int, int] | None] = []
        for (start, stop), sequence in zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True):
            first = min(bisect_right(ends, start), last_word)
            # A token may also end with the space after its word.
            spans.append(None if sequence is None else (first, max(first, bisect_left(ends, stop - 1))))
        result.append(_Running(encoded["input_ids"][i], spans))
    return result


def _agrees(reading: Reading, tokenizer: PreTrainedTokenizerBase, expected: _Running) -> bool:
    """Whether words have the tokens that they have in running text, as far as that can be told."""
    try:
        found = _by_word(reading(tokenizer, [PROBE])[0])
    except ValueError:  # its class takes words in another way
        return False
    return all(found.get(word) == tokens for word, tokens in expected.clear(tokenizer.unk_token_id).items())


def _by_word(tokens: WordTokens) -> dict[int, list[int]]:
    words: dict[int, list[int]] = {}
    for token, word in zip(*tokens, strict=True):
        if word is not None:
            words.setdefault(word, []).append(token)
    return words


def _example(tokenizer: PreTrainedTokenizerBase, expected: _Running) -> str:
    """The first word whose tokens differ, with its tokens."""
    spaced = _by_word(with_spaces(tokenizer, [PROBE])[0])
    for word, tokens in expected.clear(tokenizer.unk_token_id).items():
        if spaced.get(word) != tokens:
            alone = _by_word(as_words(tokenizer, [PROBE])[0])
            said = [tokenizer.convert_ids_to_tokens(ids) for ids in (tokens, alone.get(word, []), spaced.get(word, []))]
            return f" ({PROBE[word]!r}: {said[0]} there, {said[1]} alone, {said[2]} with a space before it)"
    return ""
