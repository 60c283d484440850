"""XTREME's F1, computed without the package: chunks as seqeval 0.0.12 found them, which XTREME was scored by.

Of a tag, that version took the first letter as prefix and what follows the last hyphen as type, so of a tag without a
hyphen the whole tag. On the cases of ``tests/tasks/test_udpos.py`` it gave the same numbers as this file.
"""

from __future__ import annotations

from collections.abc import Sequence


def chunks(sentences: Sequence[Sequence[str]]) -> set[tuple[str, int, int]]:
    """(type, first place, last place) of every chunk; places count through all sentences, with one gap after each."""
    found = set()
    prefix_before, kind_before, first = "O", "", 0
    for place, tag in enumerate([*(tag for sentence in sentences for tag in (*sentence, "O")), "O"]):
        prefix, kind = tag[0], tag.split("-")[-1]
        changed = kind != kind_before
        ends = (
            prefix_before in "ES"
            or (prefix_before in "BI" and prefix in "BSO")
            or (prefix_before not in "O." and changed)
        )
        starts = prefix in "BS" or (prefix_before in "ESO" and prefix in "EI") or (prefix not in "O." and changed)
        if ends:
            found.add((kind_before, first, place - 1))
        if starts:
            first = place
        prefix_before, kind_before = prefix, kind
    return found


def f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str | None]]) -> float:
    """Harmonic mean of precision and recall over chunks; a word without a prediction (None) is in no chunk."""
    wanted, given = chunks(gold), chunks([[tag or "O" for tag in tags] for tags in predicted])
    right = len(wanted & given)
    return 2 * right / (len(wanted) + len(given)) if right else 0.0
