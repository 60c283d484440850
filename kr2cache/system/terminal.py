"""Tables that fit the terminal.

Words wrap, less important columns are left out, wide tables are split. Digits are never cut.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kr2cache.system.console import console

Cell = str | Text

BETWEEN = 3
"""Characters between two cells: a space, a line, a space."""
FOLDED = 16
"""Minimum width of a column of words, unless its words are shorter."""


@dataclass(frozen=True)
class Column:
    """A column, and how it changes if there is no room."""

    name: str
    right: bool = False
    breaks: str = ""
    """The character after which a line may break: a space or a slash. Empty for digits, ids and dates."""
    rank: int = 0
    """The column of the highest rank is left out first. A column of rank 0 is always shown."""


def print_table(
    title: Cell, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], sections: Collection[int] = ()
) -> None:
    """Print a table that fits the terminal, and name the columns that were left out.

    Args:
        sections: Numbers of the rows that get a line above.
    """
    kept = list(range(len(columns)))
    shown = [[_text(cell) for cell in row] for row in rows]
    while (widths := _widths(columns, shown, kept, console.width)) is None:
        least = max(kept, key=lambda place: columns[place].rank)
        if columns[least].rank == 0:
            break
        kept.remove(least)
    if widths is None:
        for part in _records(title, columns, shown, kept, console.width):
            console.print(part)
    else:
        console.print(_table(title, columns, shown, kept, widths, sections))
    if left_out := [columns[place].name for place in range(len(columns)) if place not in kept]:
        console.print(f"No room for {', '.join(left_out)}: widen the terminal, or use --json.", style="dim")


def in_blocks(
    title: Cell, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], keys: Sequence[int], width: int
) -> list[RenderableType]:
    """A table. If it is wider than ``width``, its columns are split into blocks, one below the other.

    Args:
        keys: The columns that every block begins with.
    """
    shown = [[_text(cell) for cell in row] for row in rows]
    everything = range(len(columns))
    if widths := _widths(columns, shown, everything, width):
        return [_table(title, columns, shown, everything, widths)]
    blocks: list[RenderableType] = []
    left = [place for place in everything if place not in keys]
    if not left:
        return _records(title, columns, shown, everything, width)
    while left:
        count = len(left)
        while not (widths := _widths(columns, shown, [*keys, *left[:count]], width)):
            count -= 1
            if count == 0:
                return _records(title, columns, shown, everything, width)
        blocks.append(_table("" if blocks else title, columns, shown, [*keys, *left[:count]], widths))
        left = left[count:]
    return blocks


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _widths(
    columns: Sequence[Column], rows: Sequence[Sequence[Text]], kept: Sequence[int], width: int
) -> list[int] | None:
    """The width of each of the ``kept`` columns; None if they do not fit."""
    narrowest, natural = [], []
    for place in kept:
        lengths = [cell_len(line) for row in rows for line in row[place].plain.split("\n")]
        name = columns[place].name
        name_word = max(map(cell_len, name.split()), default=0)
        natural.append(max([cell_len(name), *lengths, 1]))
        cells = lengths
        if columns[place].breaks:
            words = [cell_len(word) for row in rows for word in _pieces(row[place].plain, columns[place].breaks)]
            cells = [max(min(FOLDED, max(lengths, default=0)), max(words, default=0))]
        narrowest.append(max([name_word, *cells, 1]))
    room = width - BETWEEN * len(kept) - 1 - sum(narrowest)
    if room < 0:
        return None
    wanted = [most - least for most, least in zip(natural, narrowest, strict=True)]
    given = []
    for want, others in zip(wanted, (sum(wanted[place:]) for place in range(len(wanted))), strict=True):
        share = want if others <= room else room * want // others
        given.append(share)
        room -= share
    return [least + more for least, more in zip(narrowest, given, strict=True)]


def _table(
    title: Cell,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Text]],
    kept: Sequence[int],
    widths: Sequence[int],
    sections: Collection[int] = (),
) -> Table:
    table = Table(title=_text(title) if title else None, title_justify="left")
    for place, width in zip(kept, widths, strict=True):
        column = columns[place]
        table.add_column(Text(column.name), justify="right" if column.right else "left", width=width, overflow="fold")
    for number, row in enumerate(rows):
        if number in sections:
            table.add_section()
        table.add_row(
            *(
                _broken(row[place], width) if columns[place].breaks == "/" else row[place]
                for place, width in zip(kept, widths, strict=True)
            )
        )
    return table


def _pieces(text: str, breaks: str) -> list[str]:
    return text.split() if breaks == " " else re.findall(rf"[^{breaks}\n]+{breaks}?|{breaks}", text)


def _broken(path: Text, width: int) -> Text:
    """A path in lines of at most ``width`` characters, broken after slashes."""
    if path.cell_len <= width:
        return path
    ends, end, length = [], 0, 0
    for piece in _pieces(path.plain, "/"):
        if length and length + cell_len(piece) > width:
            ends.append(end)
            length = 0
        end += len(piece)
        length += cell_len(piece)
    return Text("\n").join(path.divide(ends))


def _records(
    title: Cell, columns: Sequence[Column], rows: Sequence[Sequence[Text]], kept: Sequence[int], width: int
) -> list[RenderableType]:
    """Each row as a few lines: its first cell, and below it the other cells with the names of their columns."""
    parts: list[RenderableType] = [_text(title)]
    for row in rows:
        head, *others = kept
        name = Text(row[head].plain, style="bold")
        parts.append(_broken(name, width) if columns[head].breaks == "/" else name)
        for place in others:
            if row[place].plain:
                value = Text.assemble((f"{columns[place].name}: ", "dim"), row[place])
                parts.append(Padding(value, (0, 0, 0, 2)))
    return parts
