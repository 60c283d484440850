"""Text to token ids: the one place for word alignment and for length-sorted batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import SPECIAL, SequenceIndex, encode_ids, range_indices, text_xxh3
from kr2cache.errors import ConfigError, DataError
from kr2cache.models.words import reading_of
from kr2cache.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 1_000
"""Texts per call of the tokenizer. Its objects are large; this limits the memory they take."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[str],
    texts: Sequence[tuple[str, ...]],
    *,
    words: bool,
    max_length: int,
) -> SequenceIndex:
    """Tokenise ``texts`` and align tokens with words.

    Args:
        ids: One id per sequence.
        texts: Words (``words=True``), or one or two segments of plain text.
        words: Whether a text is a list of words. Otherwise ``word_index`` counts within the segments, as the tokenizer
            splits them.
        max_length: Tokens kept of each sequence, special tokens included; the longer segment is cut first.

    Raises:
        ConfigError: If ``max_length`` leaves no room beside the special tokens.
        DataError: If a text becomes no token, or the tokenizer's outputs contradict each other.
        UnsupportedModelError: If the tokenizer cannot read words (``reading_of``).
    """
    special = tokenizer.num_special_tokens_to_add(pair=not words and any(len(text) > 1 for text in texts))
    if max_length <= special:
        raise ConfigError(
            f"A maximal length of {max_length} leaves no room for text: {special} tokens are special.",
            f"Give --max-length {special + 1} or more.",
        )
    align = _encode_fast if tokenizer.is_fast else _encode_word_by_word
    input_ids: list[NDArray[np.int32]] = []
    word_indices: list[NDArray[np.int32]] = []
    segment_ids: list[NDArray[np.int8]] = []
    n_tokens = np.empty(len(texts), dtype=np.int32)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        for offset, one in enumerate(align(tokenizer, part, words, max_length)):
            _check_lengths(one, tokenizer, ids[start + offset], max_length)
            n_tokens[start + offset] = len(one.token_ids)
            input_ids.append(np.array(one.token_ids, dtype=np.int32))
            word_indices.append(np.array(one.word_index, dtype=np.int32))
            segment_ids.append(np.array(one.segment_ids, dtype=np.int8))
    if not n_tokens.all():
        first = int(np.argmin(n_tokens))
        raise DataError(
            f"{np.count_nonzero(n_tokens == 0):,} of {len(texts):,} texts become no token at all; the first is "
            f"{ids[first]}: {' '.join(texts[first])!r}. The tokenizer drops its characters and adds no special tokens.",
            "Without a token there are no states. Correct these texts, or leave them out.",
        )
    segments = np.concatenate(segment_ids)
    return SequenceIndex(
        ids=encode_ids(ids),
        n_tokens=n_tokens,
        text_xxh3=np.array([text_xxh3(text) for text in texts], dtype=np.uint64),
        input_id=np.concatenate(input_ids),
        word_index=np.concatenate(word_indices),
        # Without segment ids, models use zeros.
        segment_id=segments if segments.any() else None,
    )


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], task: Task, max_length: int
) -> SequenceIndex:
    """All sequences of the examples, in order."""
    return encode(
        tokenizer,
        [name for example in examples for name in example.sequence_ids],
        [text for example in examples for text in example.texts],
        words=task.words,
        max_length=max_length,
    )


class Aligned(NamedTuple):
    """The tokens of one text, as three lists of length T."""

    token_ids: Sequence[int]
    word_index: Sequence[int]
    segment_ids: Sequence[int]
    """Empty if the model has no segments, or the text is one segment."""


def _takes_segments(tokenizer: PreTrainedTokenizerBase, words: bool) -> bool:
    return not words and "token_type_ids" in tokenizer.model_input_names


def _encode_fast(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], words: bool, max_length: int
) -> list[Aligned]:
    options: dict[str, Any] = {
        "truncation": True,
        "max_length": max_length,
        "return_attention_mask": False,
        "return_token_type_ids": _takes_segments(tokenizer, words),
        "verbose": False,
    }
    if words:
        read = reading_of(tokenizer, f"The tokenizer {type(tokenizer).__name__}")
        return [
            Aligned(token_ids, [SPECIAL if word is None else word for word in word_index], [])
            for token_ids, word_index in read(tokenizer, texts, **options)
        ]
    if any(len(text) > 1 for text in texts):
        encoded = tokenizer([text[0] for text in texts], [text[1] for text in texts], **options)
    else:
        encoded = tokenizer([text[0] for text in texts], **options)
    segments = encoded.get("token_type_ids") or [[]] * len(texts)
    return [
        Aligned(token_ids, [SPECIAL if word is None else word for word in encoded.word_ids(i)], segment_ids)
        for i, (token_ids, segment_ids) in enumerate(zip(encoded["input_ids"], segments, strict=True))
    ]


def _encode_word_by_word(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], words: bool, max_length: int
) -> list[Aligned]:
    """For tokenizers written in Python (Japanese, KoBERT), which do not align tokens with words."""
    if not words:
        return [_encode_segments(tokenizer, text, max_length) for text in texts]
    room = max_length - tokenizer.num_special_tokens_to_add()
    result: list[Aligned] = []
    before = _tokens_before(tokenizer)
    for text in texts:
        pieces: list[int] = []
        aligned: list[int] = []
        for number, word in enumerate(text):
            token_ids: list[int] = np.atleast_1d(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word))).tolist()
            pieces.extend(token_ids)
            aligned.extend([number] * len(token_ids))
        pieces, aligned = pieces[:room], aligned[:room]
        whole = tokenizer.build_inputs_with_special_tokens(pieces)
        if whole[before : before + len(pieces)] == pieces:
            after = len(whole) - before - len(pieces)
            aligned = [*[SPECIAL] * before, *aligned, *[SPECIAL] * after]
        result.append(Aligned(whole, aligned, []))
    return result


def _tokens_before(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens come before a text. Found by a trial, since a tokenizer that comes as code may describe
    itself wrongly (``get_special_tokens_mask``, if it overrides only one of the two methods).
    """
    special = set(tokenizer.all_special_ids)
    ordinary = next((number for number in range(len(tokenizer)) if number not in special), 0)
    whole: list[int] = tokenizer.build_inputs_with_special_tokens([ordinary])
    return whole.index(ordinary)


def _encode_segments(tokenizer: PreTrainedTokenizerBase, text: tuple[str, ...], max_length: int) -> Aligned:
    """Encode segments with a tokenizer that does not know words: every token counts as a word of its sequence."""
    encoded = tokenizer(
        *text,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=_takes_segments(tokenizer, False),
        return_special_tokens_mask=True,
        verbose=False,
    )
    token_ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    segment_ids = encoded.get("token_type_ids") or []
    if len(mask) != len(token_ids):  # code that adds special tokens but does not mark them
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        mask = [number in special for number in token_ids]
    if len(text) == 1 and not any(segment_ids):
        segment_ids = []  # without segment ids, models use zeros; such code miscounts them too
    numbers = itertools.count()
    return Aligned(token_ids, [SPECIAL if special else next(numbers) for special in mask], segment_ids)


def _check_lengths(one: Aligned, tokenizer: PreTrainedTokenizerBase, name: str, max_length: int) -> None:
    """Raise ``DataError`` unless tokens, words and segments have equal lengths, up to ``max_length``."""
    tokens, words, segments = map(len, one)
    if words != tokens or segments not in (0, tokens):
        found = f"{words} word numbers" if words != tokens else f"{segments} segment numbers"
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} gives {tokens} tokens and {found} for {name}.",
            "Its code contradicts itself (build_inputs_with_special_tokens, create_token_type_ids_from_sequences). "
            "Correct it, or take another model.",
        )
    if tokens > max_length:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} gives {tokens} tokens for {name}, more than the maximal "
            f"length of {max_length}.",
            "Its code miscounts its special tokens (num_special_tokens_to_add). Correct it, or take another model.",
        )


def check_token_ids(index: SequenceIndex, vocabulary: int, who: str) -> None:
    """Raise ``DataError`` if the tokenizer gives ids that the model has no embedding for (a mismatched pair)."""
    highest = int(index.input_id.max(initial=0))
    if highest >= vocabulary:
        raise DataError(
            f"The tokenizer of {who} gives token id {highest}, but the model has {vocabulary} embeddings.",
            "Tokenizer and weights do not belong together.",
        )


class FirstSubwords:
    """The first token of each word, for all sequences at once."""

    def __init__(self, index: SequenceIndex) -> None:
        words, first = index.word_index, index.first_token
        differs = np.zeros(len(words) + 1, dtype=np.bool_)
        differs[1:-1] = words[1:] != words[:-1]
        differs[first] = True  # the last value is the end
        tokens = np.flatnonzero(differs[:-1] & (words != SPECIAL))
        self._first = np.searchsorted(tokens, first)
        self.counts = np.diff(self._first)
        """(sequences,) number of words that have a token."""
        self._words = words[tokens]
        self._tokens = tokens - np.repeat(first[:-1], self.counts)

    def __getitem__(self, sequence: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Token positions within the sequence, and the words that start there; each of shape (words with a token,)."""
        start, stop = self._first[sequence], self._first[sequence + 1]
        return self._tokens[start:stop], self._words[start:stop]

    def of(self, sequences: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int32]]:
        """The same for several sequences: each word's place in ``sequences``, its token position and its number."""
        starts = self._first[sequences]
        counts = self._first[sequences + 1] - starts
        at = range_indices(starts, counts)
        return np.repeat(np.arange(len(sequences)), counts), self._tokens[at], self._words[at]


class MissingWords(NamedTuple):
    """How many words have no token, so neither a state nor a label."""

    cut_off: int
    """Their text has more tokens than the maximal length."""
    no_token: int
    """The tokenizer turns them into nothing: a zero-width space, a soft hyphen."""

    @property
    def total(self) -> int:
        return self.cut_off + self.no_token

    def reasons(self, max_length: int, option: str) -> str:
        """The counts in words: ``2 cut off at 128 tokens (--max-length), 1 that becomes no token``."""
        parts = [f"{self.cut_off:,} cut off at {max_length} tokens ({option})"] if self.cut_off else []
        if self.no_token:
            becomes = "becomes" if self.no_token == 1 else "become"
            parts.append(f"{self.no_token:,} that {becomes} no token (such as a zero-width space)")
        return ", ".join(parts)


def absent_words(
    index: SequenceIndex, texts: Sequence[Sequence[str]]
) -> Iterator[tuple[int, list[int], NDArray[np.int32]]]:
    """Of each sequence with a word that has no token: its number, its words without a token, and those with one.

    Args:
        texts: The words of each sequence.
    """
    first_subwords = FirstSubwords(index)
    for i in np.flatnonzero(first_subwords.counts < np.array([len(text) for text in texts])).tolist():
        _, there = first_subwords[i]
        yield i, sorted(set(range(len(texts[i]))).difference(there.tolist())), there


def missing_words(
    index: SequenceIndex,
    texts: Sequence[Sequence[str]],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> MissingWords:
    """Count the words without a token, by reason.

    Args:
        index: The sequences, tokenised now or read from a cache.
        texts: The words of each sequence.
        max_length: The maximal length; longer sequences were cut at their end or at their beginning.
        tokenizer: Tells why words are missing at the ends of a text that fills the maximal length. Without it, they
            count as cut off.
    """
    edges: list[str] = []
    total = 0
    for i, absent, there in absent_words(index, texts):
        words = texts[i]
        total += len(absent)
        if index.n_tokens[i] >= max_length:
            # Cutting removes words at one end. A word missing between two others never had a token.
            edges += [words[k] for k in absent if not len(there) or not there.min() < k < there.max()]
    nothing = _that_become_nothing(tokenizer, set(edges)) if tokenizer is not None else set()
    cut_off = sum(word not in nothing for word in edges)
    return MissingWords(cut_off=cut_off, no_token=total - cut_off)


def _that_become_nothing(tokenizer: PreTrainedTokenizerBase, words: set[str]) -> set[str]:
    """The words that have no token even alone."""
    align = _encode_fast if tokenizer.is_fast else _encode_word_by_word
    alone = sorted(words)
    room = tokenizer.num_special_tokens_to_add() + 1
    aligned = align(tokenizer, [(word,) for word in alone], True, room) if alone else []
    return {word for word, one in zip(alone, aligned, strict=True) if all(i == SPECIAL for i in one.word_index)}


def length_sorted_batches(
    n_tokens: NDArray[np.integer[Any]], tokens_per_batch: int, *, padded: bool = True
) -> list[NDArray[np.intp]]:
    """Batches of similar lengths, longest first, of at most ``tokens_per_batch`` positions, padding included.

    Args:
        n_tokens: Length of each sequence.
        tokens_per_batch: The budget.
        padded: Whether lengths may differ within a batch.

    Sequences of equal length keep their order, so the plan depends only on the lengths and the budget. A sequence
    longer than the budget is a batch of its own.
    """
    lengths = -n_tokens.astype(np.int64)
    order = np.argsort(lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // int(n_tokens[order[start]]))
        stop = start + size
        if not padded:
            stop = min(stop, int(np.searchsorted(lengths[order], lengths[order[start]], side="right")))
        batches.append(order[start:stop])
        start = stop
    return batches


def pad(arrays: Sequence[NDArray[Any]], fill: int) -> NDArray[np.int64]:
    """Shape (B, T): ``arrays`` as rows, padded with ``fill`` to the longest."""
    result = np.full((len(arrays), max(map(len, arrays))), fill, dtype=np.int64)
    for row, array in zip(result, arrays, strict=True):
        row[: len(array)] = array
    return result


def padding_mask(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The mask of a padded batch, shape (B, T), T the largest of ``lengths`` (B,): 1 for a token, 0 for padding."""
    return (np.arange(int(lengths.max()))[None, :] < lengths[:, None]).astype(np.int64)
