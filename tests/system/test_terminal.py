"""Tables and progress at widths from 120 to 40 columns: nothing wider than the terminal, no number and no id cut."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from rich.text import Text

from kr2cache.report.tables import Cell, Table, to_rich
from kr2cache.system.console import WorkProgress, console
from kr2cache.system.terminal import Column, in_blocks, print_table

WIDTHS = (120, 80, 60, 40)
COLUMNS = (
    Column("cache", breaks="/"),
    Column("corpus", rank=5),
    Column("layers", breaks=" ", rank=4),
    Column("dtype", rank=6),
    Column("sequences", right=True, rank=3),
    Column("on disk", right=True, rank=1),
    Column("written", rank=2),
    Column("state", breaks=" "),
)
ROWS = (
    ("udpos-de/train/gottbert-1f3a9c2e", "corpus", "0-12", "float16", "12,544", "21.6 GB", "2026-11-27 23:50", "stale"),
    ("udpos-de/train/gottbert-77aa0011", "corpus", "average of 9-12", "int8", "1,234,567", "1.2 TB", "", "complete"),
)


def printed(width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``print_table`` shows; no line of it is wider than the terminal."""
    monkeypatch.setattr(console, "width", width)
    with console.capture() as capture:
        print_table("Caches [here]", COLUMNS, ROWS)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].rstrip() == "Caches [here]"
    return capture.get()


@pytest.mark.parametrize("width", WIDTHS)
def test_columns_go_by_importance_and_are_named(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(width, monkeypatch)
    header = text.splitlines()[2]
    left_out = re.search(r"No room for (.*): widen the terminal", " ".join(text.split()))
    names = left_out[1].split(", ") if left_out else []
    by_rank = sorted((column for column in COLUMNS if column.rank), key=lambda column: -column.rank)
    assert set(names) == {column.name for column in by_rank[: len(names)]}
    for place, column in enumerate(COLUMNS):
        assert (column.name in header) == (column.name not in names)
        pieces = [piece for row in ROWS for piece in re.findall(r"[^/ ]+", row[place])]
        assert column.name in names or all(piece in text for piece in pieces), "shown whole"


def test_a_terminal_too_narrow_for_any_column_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(22, monkeypatch)
    assert "udpos-de/train/\ngottbert-1f3a9c2e\n" in text
    assert "  state: stale" in text


def test_a_single_column_without_room_is_shown_as_lines() -> None:
    (title, row) = in_blocks("Names", [Column("name")], [["word " * 9]], [0], 20)
    assert (str(title), str(row)) == ("Names", "word " * 9)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_of_a_report_is_cut_into_blocks_between_columns(width: int) -> None:
    names = ("method", "reader", "learning_rate", "run")
    scores = [f"column {number}" for number in range(8)]
    cells = [[f"{80 + row}.{place} ± 0.{place}" for place in range(8)] for row in range(2)]
    table = Table(
        name="wide",
        title="Wide",
        columns=(*names, *scores),
        rows=tuple(
            tuple(map(Cell, ("KR2", "multilingual-e5-small", "2e-05", f"1f3a9c2{row}", *numbers)))
            for row, numbers in enumerate(cells)
        ),
        legend=(),
        records=(),
        labels=len(names),
        keys=(3,),
    )
    out = Console(width=width, record=True, force_terminal=False)
    with out.capture() as capture:
        for part in to_rich(table, width):
            out.print(part)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    for row in range(2):
        mine = [line for line in lines if f"1f3a9c2{row}" in line]
        shown = [cell.strip() for line in mine for cell in line.split("│")[1:-1]]
        assert [text for text in shown if "±" in text] == cells[row], "each number once, whole, in its row"
        assert {"KR2", "multilingual-e5-small", "2e-05"} <= set(shown)
    heads = " ".join(" ".join(cell.split()) for line in lines for cell in re.split("[┃│]", line))
    assert all(name in heads for name in names)


@pytest.mark.parametrize("width", (*WIDTHS, 30))
@pytest.mark.parametrize("finished", [False, True])
def test_progress_stays_on_one_line_and_shows_its_count(
    width: int, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", width)
    progress = WorkProgress("gottbert on udpos-de/train", "sequences", 1_254_400)
    line_shown = progress.line
    line_shown.tasks[0].start_time = line_shown.get_time() - 1000
    progress.advance(1_254_400 if finished else 122_600, "73,082 tokens/s, 38.2 GB written")
    with console.capture() as capture:
        console.print(line_shown.make_tasks_table(line_shown.tasks))
    (line,) = capture.get().splitlines()
    assert Text(line).cell_len <= width
    assert ("1254400/1254400" if finished else "122600/1254400") in line
    assert ("gottbert on udpos-de/train" in line) == (width >= 60)
    assert re.search(r"go.*ain ", line), "both ends of the name"
    if width >= 40:
        assert ("in 16 min 40 s" if finished else "2 h 33 min left") in line
