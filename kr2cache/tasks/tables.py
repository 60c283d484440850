"""The rows of a table: JSON lines, CSV, TSV, Parquet, or a text a line. Every row knows its place, for errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kr2cache.errors import DataError, error_text
from kr2cache.system.console import count_text, note
from kr2cache.system.utf8 import file_lines

LONGEST_CELL = 2**31 - 1
"""Characters of a cell of CSV; Python's own limit is 131,072, and a document may be longer."""
LANGUAGE = "language"
"""The column that says in which language a row is."""
AT_ONCE = 1_000
"""Rows of a Parquet file in memory at the same time."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table."""

    values: Mapping[str, Any]
    place: str
    """Where the row is, for errors: ``dev.jsonl:17``."""
    split: str
    number: int
    """The number of the row in its split, from 0."""
    is_cut: bool = False
    """Whether it has fewer columns than the table."""

    def get(self, column: str) -> str:
        """The text in ``column``; empty if there is none."""
        value = self.values.get(column)
        if value is None:
            return ""
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise DataError(f"{self.place}: {column} is {value!r}, not text.", "Check the row.")
        return str(value)

    def text(self, column: str) -> str:
        """The text in ``column``.

        Raises:
            DataError: If it is missing or empty.
        """
        value = self.get(column)
        if not value.strip():
            what = "is empty" if column in self.values else f"is missing (there are {', '.join(self.values) or 'none'})"
            raise DataError(f"{self.place}: {column} {what}.", "Every text needs at least one word; check the row.")
        return value

    def id(self, column: str) -> str:
        """The data's own id, else ``SPLIT-N``."""
        return self.get(column).strip() or f"{self.split}-{self.number}"

    def label(self, column: str, labels: Sequence[str]) -> int | None:
        """The label's number, from a number or a name; None if the row has no gold label (empty, or -1).

        Raises:
            DataError: For anything else.
        """
        value = self.get(column).strip()
        if value in ("", "-1"):
            return None
        if value in labels:
            return labels.index(value)
        if value.isascii() and value.isdigit() and int(value) < len(labels):
            return int(value)
        raise DataError.unknown_label(
            f"{self.place}: {column} is {value!r}.",
            f"Labels are {', '.join(labels)} (0 to {len(labels) - 1}).",
            column=column,
            labels=(value,),
        )


def json_rows(path: Path, split: str) -> Iterator[Row]:
    """The objects of a JSON lines file; blank lines are skipped."""
    number = 0
    for line_number, line in enumerate(file_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}:{line_number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON: {error}.", "Write one JSON object per line.") from error
        if not isinstance(values, dict):
            raise DataError(f"{place}: {line.strip()[:40]!r} is not a JSON object.", "Write one JSON object per line.")
        yield Row(values=values, place=place, split=split, number=number)
        number += 1


@dataclass(frozen=True, kw_only=True)
class Unnamed:
    """How to read a CSV or TSV file whose columns, or cells, may be missing."""

    columns: Sequence[str] = ()
    """The names of the columns. The last ones may be missing, as labels are in a blind test split."""
    needed: Sequence[str] = ()
    """A first line with all of these names the columns itself."""
    quoted: bool = False
    """Whether cells of TSV may stand in quotes, as Python's csv module writes them."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Other names that a first line may have for columns, and the names in ``needed``."""
    short: bool = False
    """Whether rows may have too few columns. Those that are missing are empty."""


def table_rows(path: Path, split: str, unnamed: Unnamed | None = None) -> Iterator[Row]:
    """The rows of a table, by the suffix of its file."""
    if path.suffix.lower() == ".parquet":
        return parquet_rows(path, split)
    if path.suffix.lower() in (".csv", ".tsv"):
        return csv_rows(path, split, unnamed or Unnamed())
    return json_rows(path, split)


def csv_rows(path: Path, split: str, unnamed: Unnamed) -> Iterator[Row]:
    """The rows of a CSV or TSV file under its header; blank lines are skipped. In TSV a quote is a character as any
    other.
    """
    tabs = path.suffix.lower() == ".tsv"
    _, first = next(_cells(path, tabs=tabs, quoted=not tabs), (0, []))
    named = not unnamed.columns or set(unnamed.needed) <= {unnamed.rename.get(name, name) for name in first}
    header, what = first, "the header has"
    if not named:
        there = unnamed.columns[: len(first)]
        header, what = list(there if set(unnamed.needed) <= set(there) else unnamed.columns), "there should be"
    rows = _cells(path, tabs=tabs, quoted=not tabs or (unnamed.quoted and not named))
    for number, (line, cells) in enumerate(rows, -1 if named else 0):
        if number < 0:
            continue
        missing = len(header) - len(cells)
        if missing < 0 or (missing and not unnamed.short):
            raise DataError(
                f"{path}:{line}: {len(cells)} columns, but {what} {len(header)}.",
                f"Check the row's {'tabs' if tabs else 'commas'}.",
            )
        values = dict(zip(header, [*cells, *[""] * missing], strict=True))
        yield Row(values=values, place=f"{path}:{line}", split=split, number=number, is_cut=missing > 0)


def _cells(path: Path, *, tabs: bool, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each row that is not blank."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(
        file_lines(path),
        strict=True,
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    line = 1  # a row may have several lines
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not {'TSV' if tabs else 'CSV'}: {error}.", "Check the row's quotes."
        ) from error


def parquet_rows(path: Path, split: str) -> Iterator[Row]:
    """The rows of a Parquet file. Class labels of the library ``datasets`` become their names."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = label_names(datasets.Features.from_arrow_schema(file.schema_arrow))
            for batch in file.iter_batches(AT_ONCE):
                for values in batch.to_pylist():
                    yield Row(values=by_name(values, names), place=f"{path}, row {number}", split=split, number=number)
                    number += 1
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} is not Parquet: {error_text(error)}", "Check the file.") from error


def data_set_rows(table: Any, what: str, split: str) -> Iterator[Row]:
    """The rows of a ``datasets.Dataset``. Class labels become their names: data sets number the same labels
    differently.

    Args:
        what: Its name, for errors.
    """
    names = label_names(table.features)
    for number, values in enumerate(table):
        yield Row(values=by_name(values, names), place=f"{what}, row {number}", split=split, number=number)


def label_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The names of the labels in each column of class labels, or of lists of them.

    Args:
        features: ``datasets.Features``.
    """
    kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: kind.names for column, kind in kinds.items() if hasattr(kind, "names")}


def by_name(values: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    """A row with names in place of label numbers. Values that are no label number (-1, None) stay."""
    return {**values, **{column: _named(values[column], labels) for column, labels in names.items()}}


def _named(value: Any, labels: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, labels) for one in value]
    return labels[value] if value is not None and 0 <= value < len(labels) else value


def of_language(rows: Iterable[Row], language: str, column: Callable[[str], str], words: str) -> Iterator[Row]:
    """The rows of one language, numbered without the others. Words with its prefix (``de:Haus``) lose it.

    Args:
        column: Gives the name that a column of the row has here. ``language`` has the language of the row; without such
            a column, all rows are of this language.
        words: The column with lists of words. The first list decides whether words have the prefix.
    """
    others = 0
    prefix: str | None = None
    for row in rows:
        if any(column(name) == LANGUAGE and value != language for name, value in row.values.items()):
            others += 1
            continue
        values = row.values
        if isinstance(own := values.get(words), list):
            if prefix is None:
                prefix = f"{language}:" if all(str(word).startswith(f"{language}:") for word in own) else ""
            if prefix:
                values = {**values, words: [word.removeprefix(prefix) for word in own]}
        yield replace(row, values=values, number=row.number - others)


def line_rows(path: Path, split: str, column: str) -> Iterator[Row]:
    """One row for each line of text, in ``column``. Blank lines are left out, but counted."""
    blank = number = 0
    for number, line in enumerate(file_lines(path), 1):
        if line.strip():
            values = {column: line.rstrip("\r\n")}
            yield Row(values=values, place=f"{path}:{number}", split=split, number=number - 1)
        else:
            blank += 1
    if 0 < blank < number:
        note(f"{path}: {count_text(blank, 'line')} of {number:,} blank; left out, but counted in the ids.")
