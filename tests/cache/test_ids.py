"""Ids to positions: as a dictionary would have it, for any text."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from kr2cache.cache import ids as ids_module
from kr2cache.cache.format import encode_ids
from kr2cache.cache.ids import BULK_LOOKUP, IdIndex, _hash, _hash_one


def names_of(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    alphabet = "ab-#/0123456789éß汉字ع😀 "
    names = {"".join(draw.choices(alphabet, k=draw.randint(1, 24))) for _ in range(count)}
    made = sorted(names)
    draw.shuffle(made)
    return made


@pytest.fixture(params=["a dictionary", "hashes"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test for few ids, and as if they were many."""
    if request.param == "hashes":
        monkeypatch.setattr(ids_module, "DICTIONARY_MAX", 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("asked", [1, BULK_LOOKUP - 1, BULK_LOOKUP, 500])
def test_finds_what_a_dictionary_finds(seed: int, asked: int) -> None:
    names = names_of(400, seed)
    index, known = IdIndex([encode_ids(names)]), {name: i for i, name in enumerate(names)}
    draw = random.Random(seed)
    wanted = [draw.choice(names) if draw.random() < 0.7 else draw.choice(names) + "x" for _ in range(asked)]
    assert index.find(wanted) == [known.get(name, -1) for name in wanted]
    assert [index.find_one(name) for name in wanted] == [known.get(name, -1) for name in wanted]
    assert index.duplicate() is None
    assert index.names() == names
    assert [index.name(i) for i in (0, len(names) - 1)] == [names[0], names[-1]]


@pytest.mark.parametrize("asked", [1, BULK_LOOKUP, 1000])
def test_ids_of_several_shards_are_one_list(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    """Arrays of different widths, sorted in several ranges, looked up in several pieces."""
    monkeypatch.setattr(ids_module, "SORTED_AT_ONCE", 50)
    monkeypatch.setattr(ids_module, "LOOKUPS", 300)
    names = sorted(names_of(1200, 0)[:1000], key=len)  # the longest are in the last shard
    bounds = [0, 1, 400, 990, 1000]
    parts = [encode_ids(names[start:stop]) for start, stop in itertools.pairwise(bounds)]
    assert len({part.dtype for part in parts}) == 4
    index, known = IdIndex(parts), {name: i for i, name in enumerate(names)}
    draw = random.Random(0)
    wanted = [draw.choice([*names, "x", names[0] + "x"]) for _ in range(asked)]
    assert index.find(wanted) == [known.get(name, -1) for name in wanted]
    assert index.find(names) == [index.find_one(name) for name in names] == list(range(1000))
    assert (index.names(), [index.name(i) for i in (0, 1, 999)]) == (names, [names[0], names[1], names[999]])
    assert (len(index), index.duplicate()) == (1000, None)
    assert IdIndex([*parts, encode_ids(["one more", names[400]])]).duplicate() == (400, 1001)


@pytest.mark.parametrize("padding", [0, BULK_LOOKUP])
def test_what_would_equal_an_id_in_a_fixed_width_is_not_it(padding: int) -> None:
    """Cut to the array's width, or filled up with the NULs that fixed-length strings end in."""
    index = IdIndex([encode_ids(["abc", "abcd"])])
    more = ["abc"] * padding
    assert index.find(["abcde", "abc\0", "", "ABC", "\ud800", "abcd", *more])[:6] == [-1, -1, -1, -1, -1, 1]
    assert index.find(["x", *["y"] * padding]) == [-1] * (1 + padding)


def test_both_hashes_are_one() -> None:
    for width in (1, 3, 8, 9, 24):
        raw = [bytes(random.Random(i).choices(range(1, 256), k=random.Random(i).randint(1, width))) for i in range(200)]
        array = np.array(raw, dtype=f"S{width}")
        assert _hash(array, width).tolist() == [_hash_one(one, width) for one in raw]


@pytest.mark.parametrize("asked", [1, 3 * BULK_LOOKUP])
def test_ids_of_equal_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch, asked: int) -> None:
    monkeypatch.setattr(ids_module, "_hash", lambda ids, width: np.full(len(ids), 7, dtype=np.uint64))
    monkeypatch.setattr(ids_module, "_hash_one", lambda *_: 7)
    names = [f"s{i}" for i in range(50)]
    index = IdIndex([encode_ids(names)])
    wanted = [random.Random(i).choice([*names, "t"]) for i in range(asked)]
    assert index.find(wanted) == [names.index(name) if name in names else -1 for name in wanted]
    assert index.duplicate() is None
    assert IdIndex([encode_ids([*names, "s31"])]).duplicate() == (31, 50)


@pytest.mark.parametrize("least", [0, 2**63, 2**64 - 500])
def test_hashes_that_are_not_spread_evenly_are_found(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """Where one lies is guessed; all of them far from where they should be."""
    names = [f"{i:03}" for i in range(0, 500, 2)]
    monkeypatch.setattr(ids_module, "_hash", lambda ids, width: ids.astype("U").astype(np.uint64) + np.uint64(least))
    monkeypatch.setattr(ids_module, "_hash_one", lambda raw, width: int(raw) + least)
    index = IdIndex([encode_ids(names)])
    wanted = [f"{i:03}" for i in range(500)]
    expected = [i // 2 if i % 2 == 0 else -1 for i in range(500)]
    assert [index.find_one(name) for name in wanted] == index.find(wanted) == expected


@pytest.mark.parametrize("more", [0, BULK_LOOKUP])
def test_a_number_is_no_id(more: int) -> None:
    index = IdIndex([encode_ids(["0", "1"])])
    wanted: list[Any] = [0, None, b"1", ("1",), ["1"], "1", *["0"] * more]
    assert index.find(wanted)[:6] == [-1, -1, -1, -1, -1, 1]


def test_an_id_that_is_there_twice_is_named() -> None:
    assert IdIndex([encode_ids([*map(str, range(100)), "17"])]).duplicate() == (17, 100)
    assert IdIndex([encode_ids(["a"])]).duplicate() is None
