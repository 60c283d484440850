"""Pooled caches: one state for each word, or one for each sequence, instead of one for each token.

A stored position is the mean of the states of some tokens: those of one word, or all tokens of the sequence that are
not special. Special tokens have no position of their own. A word is a run of tokens with the same word number. So a
word that has no token, because it was cut off or the tokenizer drops its characters, has no position. If only a part of
a word was cut off, its position is the mean of the tokens that are left. The words of both segments of a pair follow
each other.

Shape letters: n sequences, t tokens and p stored positions of all sequences, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from kr2cache.cache.format import SPECIAL, SequenceIndex, range_indices
from kr2cache.cache.means import run_means
from kr2cache.config import Pool
from kr2cache.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Which tokens each stored position is the mean of."""

    stored: SequenceIndex
    """The index of the pooled cache."""
    places: NDArray[np.int32]
    """The place in its sequence of each token that is not special; those of all sequences in order."""
    counts: NDArray[np.int32]
    """(p,) how many of these tokens form each stored position."""
    first_place: NDArray[np.int64]
    """(n+1,) where the tokens of each sequence begin in ``places``."""

    def of(self, sequences: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """What some sequences of a batch consist of.

        Args:
            sequences: (B,) positions in the index.

        Returns:
            For each token that is not special, the row of its sequence in the batch, and its place in the sequence. Of
            how many of these tokens each stored position is the mean.
        """
        starts = self.first_place[sequences]
        lengths = self.first_place[sequences + 1] - starts
        tokens = self.places[range_indices(starts, lengths)]
        counts = self.counts[range_indices(self.stored.first_token[sequences], self.stored.n_tokens[sequences])]
        return np.repeat(np.arange(len(sequences)), lengths), tokens.astype(np.int64), counts

    def mean(self, sequence: int, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """The stored positions of one sequence, from the states of all its tokens. It gives the same bits as
        ``models.states.means`` on a CPU.

        Args:
            states: (L, T, D)

        Returns:
            (L, positions, D)
        """
        _, places, counts = self.of(np.array([sequence]))
        return run_means(states, places, counts)


def pooled(index: SequenceIndex, pool: Pool) -> Pooling:
    """How the tokens of some sequences are pooled.

    Args:
        index: All tokens of the sequences.
        pool: ``word`` or ``sequence``.

    Returns:
        It may have sequences without a stored position (``check_words``).
    """
    at = np.flatnonzero(index.word_index != SPECIAL)
    first_place = np.searchsorted(at, index.first_token)
    begins = np.flatnonzero(_begins(index, pool)[at])
    first = at[begins]
    stored = SequenceIndex(
        ids=index.ids,
        n_tokens=np.diff(np.searchsorted(first, index.first_token)).astype(np.int32),
        text_xxh3=index.text_xxh3,
        input_id=index.input_id[first],
        word_index=index.word_index[first],
        segment_id=None if index.segment_id is None else index.segment_id[first],
        tokens_xxh3=_tokens_xxh3(index),
    )
    return Pooling(
        stored=stored,
        places=(at - np.repeat(index.first_token[:-1], np.diff(first_place))).astype(np.int32),
        counts=np.diff(begins, append=len(at)).astype(np.int32),
        first_place=first_place.astype(np.int64),
    )


def check_words(stored: SequenceIndex) -> None:
    """Check that each sequence of a pooled index has a stored position.

    Raises:
        DataError: If one has special tokens alone.
    """
    empty = np.flatnonzero(stored.n_tokens == 0)
    if len(empty):
        raise DataError(
            f"{len(empty):,} of {len(stored):,} sequences have no word with a token; the first is "
            f"{stored.ids[empty[0]].decode('utf-8')}. The tokenizer drops its characters, or there are none.",
            "Without a word there is nothing to pool. Correct these texts, leave them out, or use --pool none.",
        )


def count_positions(index: SequenceIndex, pool: Pool) -> int:
    """How many positions a cache of these sequences stores."""
    return len(index.input_id) if pool == "none" else int(np.count_nonzero(_begins(index, pool)))


def _begins(index: SequenceIndex, pool: Pool) -> NDArray[np.bool_]:
    """(t,) whether a stored position begins with the token."""
    words = index.word_index
    if pool == "word":
        differs = np.ones(len(words), dtype=np.bool_)
        differs[1:] = words[1:] != words[:-1]
        differs[index.first_token[:-1]] = True
        return np.asarray(differs & (words != SPECIAL))
    at = np.flatnonzero(words != SPECIAL)
    before = np.searchsorted(at, index.first_token)
    begins = np.zeros(len(words), dtype=np.bool_)
    begins[at[before[:-1][np.diff(before) > 0]]] = True
    return begins


def _tokens_xxh3(index: SequenceIndex) -> NDArray[np.uint64]:
    """(n,) XXH3-64 of the ids and the word numbers of all tokens of each sequence."""
    ids, words = np.ascontiguousarray(index.input_id), np.ascontiguousarray(index.word_index)
    digests = np.empty(len(index), dtype=np.uint64)
    for i, (start, stop) in enumerate(pairwise(index.first_token.tolist())):
        digest = xxhash.xxh3_64(ids[start:stop].data)
        digest.update(words[start:stop].data)
        digests[i] = digest.intdigest()
    return digests
