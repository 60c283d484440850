"""One table in four formats: rich for the terminal, Markdown, LaTeX (booktabs) and CSV.

The first three show the same cells. CSV has the records with unrounded numbers, for programs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

Record = Mapping[str, str | float | bool | None]


@dataclass(frozen=True)
class Cell:
    """Text and marks of one cell."""

    text: str = ""
    bold: bool = False
    mark: str = ""
    """``≈``, ``?`` or empty."""
    remark: str = ""
    """Such as ``2/3``, finished of planned seeds; empty if all are finished."""
    under: str = ""
    """A second line: the paper's number."""

    @property
    def plain(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.text}{remark}"


@dataclass(frozen=True)
class Table:
    """A table with its legend."""

    name: str
    """File name without ending."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    legend: tuple[str, ...]
    """Sentences."""
    records: tuple[Record, ...]
    labels: int = 1
    """How many columns on the left hold names."""
    keys: tuple[int, ...] = (0,)
    """The columns that identify a row. Each part of a wide table begins with them."""
    under: str = "paper"
    """What the second lines of cells show."""
    details: bool = False
    """Belongs to the table before it: folded on the page, not shown in the terminal."""

    @property
    def marked(self) -> bool:
        return any(cell.mark for row in self.rows for cell in row)


def to_rich(table: Table, width: int) -> list[RenderableType]:
    """For ``console.print``. Markup in cells has no effect.

    Returns:
        The table, or blocks of its columns if it is wider than ``width``.
    """
    from rich.text import Text

    from kr2cache.system.terminal import Column, in_blocks

    names = [place < table.labels for place in range(len(table.columns))]
    columns = [
        Column(text, right=not name, breaks=" " if name else "")
        for text, name in zip(table.columns, names, strict=True)
    ]
    rows = []
    for row in table.rows:
        cells: list[str | Text] = []
        for position, cell in enumerate(row):
            text = Text(cell.plain, style="bold" if cell.bold else "")
            if table.marked and position >= table.labels and cell.text:
                text.append(f" {cell.mark or ' '}", style="not bold")
            if cell.under:
                text.append(f"\n{table.under} {cell.under}{'  ' if table.marked else ''}", style="dim not bold")
            cells.append(text)
        rows.append(cells)
    return in_blocks(Text(table.title, style="bold"), columns, rows, table.keys, width)


def to_markdown(table: Table) -> str:
    """A GitHub table with title and legend. The second lines of cells become rows."""
    lines = [f"**{_markdown(table.title)}**", "", _markdown_row([_markdown(column) for column in table.columns])]
    lines.append(_markdown_row(["---" if i < table.labels else "--:" for i in range(len(table.columns))]))
    for row in table.rows:
        texts = [f"**{_markdown(c.plain)}**" if c.bold else _markdown(c.plain) for c in row]
        lines.append(_markdown_row([f"{text} {c.mark}".rstrip() for text, c in zip(texts, row, strict=True)]))
        if any(cell.under for cell in row):
            lines.append(_markdown_row([f"*{table.under}*", *(_markdown(cell.under) for cell in row[1:])]))
    lines += [line for sentence in table.legend for line in ("", _markdown(sentence))]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """A ``table`` environment for the packages booktabs and graphicx. The second lines of cells become rows.

    A table that is wider than the text is scaled down. If its text would be too small to read, the table is rotated.
    """
    body = []
    for row in table.rows:
        texts = [rf"\textbf{{{_latex(c.plain)}}}" if c.bold else _latex(c.plain) for c in row]
        body.append(_latex_row([f"{text} {_latex(c.mark)}".rstrip() for text, c in zip(texts, row, strict=True)]))
        if any(cell.under for cell in row):
            small = [rf"\footnotesize {_latex(cell.under)}" if cell.under else "" for cell in row[1:]]
            body.append(_latex_row([rf"\quad\footnotesize {_latex(table.under)}", *small]))
    points = sum(_POINTS_A_CHARACTER * longest + _POINTS_BETWEEN for longest in characters(table))
    turned = points > _TURNED_FROM
    environment = "sidewaystable" if turned else "table"
    lines = [
        rf"% needs \usepackage{{booktabs,graphicx{',rotating' if turned else ''}}}",
        rf"\begin{{{environment}}}",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * table.labels}{'r' * (len(table.columns) - table.labels)}}}",
        r"\toprule",
        _latex_row([_latex(column) for column in table.columns]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\par\smallskip{{\footnotesize {_latex(sentence)}\par}}" for sentence in table.legend),
        rf"\end{{{environment}}}",
    ]
    return "\n".join(lines) + "\n"


_POINTS_A_CHARACTER, _POINTS_BETWEEN = 4.7, 12.0
"""Points: about the width of a character of 10-point type, and the space between two columns."""
_TURNED_FROM = 560.0
"""Points. A page of text is about 345 wide, so characters of a wider table would be smaller than 6 points."""


def characters(table: Table) -> list[int]:
    """Length of the longest cell of each column, including its name."""
    longest = [len(name) for name in table.columns]
    for row in table.rows:
        for place, cell in enumerate(row):
            under = f"{table.under} {cell.under}" if cell.under else ""
            longest[place] = max(longest[place], len(f"{cell.plain} {cell.mark}"), len(under))
    return longest


def to_csv(table: Table) -> str:
    """One line per record; a missing number is an empty field."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(table.records[0]) if table.records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv(value) for name, value in record.items()} for record in table.records)
    return file.getvalue()


FORMS = {"md": to_markdown, "tex": to_latex, "csv": to_csv}
"""File ending to the function that formats a table."""


def _csv(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else value


def _markdown(text: str) -> str:
    for character in "\\|*<`":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "−": r"$-$",
    "→": r"$\rightarrow$",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
