"""Plain text without labels: states can be extracted, and nothing can be trained.

``text`` takes each text as it is. ``words`` takes sentences that are split into words, so that states can be averaged
by word. Both read the same files:

- ``.txt``: one text a line. Its id is ``SPLIT-N``, N counting all lines from 0. Blank lines are left out, and counted:
  so line N + 1 of the file has the id ``SPLIT-N``.
- JSON lines, CSV and data sets of the hub: a row has its text in the column ``text`` (``words`` or ``tokens``); if
  there is no such column, in the first one that is neither ``id`` nor ``label``, and a note says which. The column
  ``id`` has its id; without it, ``SPLIT-N``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kr2cache.errors import DataError
from kr2cache.system.console import note
from kr2cache.tasks.base import Example, Task
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.tables import Row, line_rows

ID = "id"
NO_TEXT = (ID, "label")
"""Columns that are not taken for the text."""


class Text(RowTask):
    """``text``: each text becomes the tokens that the model's tokenizer gives it."""

    name = "text"
    about = "plain text without labels, for its states"
    kind = "text"
    labels = ()
    metric = ""
    template = "text"
    columns = ("text",)
    text_columns: tuple[str, ...] = ("text",)
    """The names that the column with the text may have."""
    suffixes = (".txt", ".jsonl", ".csv")
    left_out = "blank lines"

    def file_rows(self, path: Path, split: str) -> Iterable[Row]:
        return line_rows(path, split, self.columns[0]) if path.suffix == ".txt" else super().file_rows(path, split)

    def source_files(self, split: str, data: str | None) -> dict[str, Path] | None:
        return Task.source_files(self, split, data)  # ``file_rows`` reads no other file

    def example(self, row: Row) -> Example:
        return Example(row.id(ID), (self.words_of(row),), None)

    def words_of(self, row: Row) -> tuple[str, ...]:
        """The text of a row that has only this column and maybe an id: one string, or its words."""
        (column,) = (name for name in row.values if name != ID)
        return (row.text(column),)

    def _examples(
        self, rows: Callable[[], Iterable[Row]], what: str, *, labels_matter: bool = True
    ) -> Iterator[Example]:
        return super()._examples(lambda: self._texts(rows(), what), what, labels_matter=labels_matter)

    def _texts(self, rows: Iterable[Row], what: str) -> Iterator[Row]:
        """The rows with id and text alone. The first row decides which column is the text."""
        column = None
        for row in rows:
            column = column or self._column(row, what)
            values = {name: value for name, value in row.values.items() if name in (ID, column)}
            if column not in values:
                raise DataError(
                    f"{row.place}: there is no {column} (there are {', '.join(row.values) or 'none'}).",
                    f"The first row has its text in {column}: every row needs it.",
                )
            yield row if len(values) == len(row.values) else dataclasses.replace(row, values=values)

    def _column(self, row: Row, what: str) -> str:
        if (named := next((name for name in self.text_columns if name in row.values), None)) is not None:
            return named
        others = [name for name in row.values if name not in NO_TEXT]
        if not others:
            raise DataError(f"{row.place}: there is no text.", f"Give each row a column {self.columns[0]}.")
        if len(others) > 1:
            note(f"{what} has no column {self.columns[0]}: its texts are in {others[0]}, the first one.")
        return others[0]


class Words(Text):
    """``words``: a text is a list of words. In a line of a ``.txt`` file, and in a column that is text, spaces separate
    them."""

    name = "words"
    about = "sentences split into words, without labels, for their states"
    words = True
    template = "words"
    columns = ("words",)
    text_columns = ("words", "tokens")

    def words_of(self, row: Row) -> tuple[str, ...]:
        (column,) = (name for name in row.values if name != ID)
        value = row.values[column]
        if not isinstance(value, list):
            return tuple(row.text(column).split())
        if not value or not all(isinstance(word, str) for word in value):
            raise DataError(f"{row.place}: {column} is {value!r}, not a list of words.", "Check the row.")
        return tuple(value)
