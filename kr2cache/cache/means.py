"""Means of the states of a sequence: of each word, of the whole sequence.

Shape letters: L layers, T tokens, W words, D width. ``word_index``, shape (T,), has the input word of each token, -1
for a special token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import offsets
from kr2cache.errors import DataError


def sequence_mean(states: NDArray[np.floating], word_index: NDArray[np.int32], sequence_id: str) -> NDArray[np.float32]:
    """The mean of all tokens that are not special.

    Args:
        states: (L, T, D)
        word_index: (T,)
        sequence_id: Its id, for the error.

    Returns:
        (L, D)

    Raises:
        DataError: If all tokens are special.
    """
    kept: Any = np.flatnonzero(word_index >= 0)
    if not len(kept):
        raise DataError(
            f"The sequence {sequence_id!r} has special tokens alone: there is nothing to average.",
            "Leave this sequence out, or take its first token: pool='first'.",
        )
    if kept[-1] - kept[0] + 1 == len(kept):  # a view, as in nearly every sequence
        kept = slice(kept[0], kept[-1] + 1)
    mean: NDArray[np.float32] = states[:, kept].mean(axis=1, dtype=np.float32)
    return mean


def word_means(
    states: NDArray[np.floating], word_index: NDArray[np.int32], *, pooled: bool = False
) -> NDArray[np.float32]:
    """The mean of the tokens of each word.

    Args:
        states: (L, T, D)
        word_index: (T,)
        pooled: Whether each state is that of a whole word already.

    Returns:
        (L, W, D), row w for word w of the text; nan for a word that has no token while a later word has one. The words
        of the second segment of a pair follow those of the first one.
    """
    kept = np.flatnonzero(word_index >= 0)
    number = _numbers(kept, word_index[kept], pooled)
    words = int(number[-1]) + 1 if len(number) else 0
    begins = np.flatnonzero(np.diff(number, prepend=-1))  # the first token of each word that has one
    means = run_means(states, kept, np.diff(begins, append=len(number)))
    if len(begins) == words:
        return means
    result = np.full((len(states), words, states.shape[2]), np.nan, dtype=np.float32)
    result[:, number[begins]] = means
    return result


def run_means(
    states: NDArray[np.floating], places: NDArray[np.integer], counts: NDArray[np.integer]
) -> NDArray[np.float32]:
    """The mean of each of some runs of tokens.

    Args:
        states: (L, T, D)
        places: (K,) the tokens of all runs, one run after the other.
        counts: (P,) how many tokens each run has, at least 1. Their sum is K.

    Returns:
        (L, P, D)
    """
    first = offsets(counts)[:-1]
    result = states[:, places[first]].astype(np.float32)
    for number in range(1, int(counts.max(initial=1))):  # the second token of the runs that have one, and so on
        longer = np.flatnonzero(counts > number)
        result[:, longer] += states[:, places[first[longer] + number]]
    result /= counts[:, None].astype(np.float32)
    return result


def _numbers(places: NDArray[np.intp], words: NDArray[np.int32], pooled: bool) -> NDArray[np.int64]:
    """(K,) the numbers of words, counted on through the segments of a pair: each segment counts its words from 0.

    Args:
        places: (K,) of the tokens that are not special.
        words: (K,) their words.
        pooled: Whether each is a whole word.
    """
    step, gap = np.diff(words), (np.diff(places) > 1) | pooled
    restarts = (step < 0) | ((step == 0) & gap & (words[1:] == 0))
    before = np.where(restarts, words[:-1].astype(np.int64) + 1, 0)
    numbers = words.astype(np.int64)
    numbers[1:] += np.cumsum(before)
    return numbers
