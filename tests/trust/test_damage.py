"""``kr2cache cache verify`` finds all damage to a cache. Nothing crashes or hangs, and no wrong states are read."""

from __future__ import annotations

import os
from pathlib import Path

import damage
import pytest
from damage import KINDS, Examiner, Row


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return damage.run(500)


@pytest.mark.long
def test_in_undamaged_caches_nothing_is_found(rows: dict[str, Row]) -> None:
    none = rows["none"]
    assert (none.files, none.found, none.refused, none.harmless) == (8, 0, 0, 8)
    assert none.missed == none.misnamed == none.unexpected == []


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_all_damage_is_found(rows: dict[str, Row], kind: str) -> None:
    row = rows[kind]
    assert row.files >= 20
    assert row.unexpected == [], "crashes, hangs, other exceptions"
    assert row.missed == []
    assert (row.found, row.harmless) == (row.files, 0)
    assert row.slowest < 30


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bit" in kind])
def test_exactly_the_damaged_sequences_are_named(rows: dict[str, Row], kind: str) -> None:
    assert rows[kind].misnamed == []


class Dies:
    """Ends the process that is asked to examine it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


def test_a_process_that_dies_is_noticed_and_replaced(tmp_path: Path) -> None:
    good = damage.good_cache(tmp_path, "float16", several=False)
    with Examiner() as examine:
        assert examine(Dies()).unexpected == "crash"  # type: ignore[arg-type]
        seen = examine(good.folder)
        assert (seen.read, seen.found, seen.unexpected) == (good.digest, False, "")
        (tmp_path / "file").write_text("")
        assert "is not a folder" in examine(tmp_path / "file").refused


@pytest.mark.long
def test_the_table_has_a_row_for_each_kind(rows: dict[str, Row]) -> None:
    lines = damage.table(rows).splitlines()
    assert len(lines) == 2 + 1 + len(KINDS) + 1
    assert len({len(line) for line in lines}) == 1
