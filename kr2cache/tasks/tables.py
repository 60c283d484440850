"""The rows of a table: JSON lines, CSV, or a text a line. Every row knows its place, for errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.errors import DataError
from kr2cache.system.console import count_text, note
from kr2cache.system.utf8 import file_lines


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table."""

    values: Mapping[str, Any]
    place: str
    """Where the row is, for errors: ``dev.jsonl:17``."""
    split: str
    number: int
    """The number of the row in its split, from 0."""

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
        raise DataError(
            f"{self.place}: {column} is {value!r}.", f"Labels are {', '.join(labels)} (0 to {len(labels) - 1})."
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


def csv_rows(path: Path, split: str) -> Iterator[Row]:
    """The rows of a CSV file under its header; blank lines are skipped."""
    reader = csv.reader(file_lines(path), strict=True)
    header: list[str] | None = None
    number, first_line = 0, 1  # a row may have several lines
    try:
        for cells in reader:
            place = f"{path}:{first_line}"
            first_line = reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{place}: {len(cells)} columns, but the header has {len(header)}.", "Check the row's commas."
                )
            yield Row(values=dict(zip(header, cells, strict=True)), place=place, split=split, number=number)
            number += 1
    except csv.Error as error:
        raise DataError(f"{path}:{first_line}: not CSV: {error}.", "Check the row's quotes.") from error


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
