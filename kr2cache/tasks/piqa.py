"""PIQA: which of two solutions reaches a goal? Multiple choice (Bisk et al. 2020)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from kr2cache.errors import DataError
from kr2cache.system.utf8 import file_lines
from kr2cache.tasks.base import Example
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.tables import Row, json_rows

LABEL_PLACE = "place of the label"
"""The column for where the label of a row stands, for errors."""


class Piqa(RowTask):
    """The texts are ``goal``, ``sol1`` and ``sol2``. Line N of ``SPLIT-labels.lst`` is the label of row N of the JSON
    lines. The hub's rows have a column ``label``."""

    name = "piqa"
    about = "which of two solutions reaches a goal? (multiple choice)"
    kind = "choice"
    labels = ("0", "1")
    template = "goal, solution"
    columns = ("goal", "sol1", "sol2")
    suffixes = (".jsonl",)
    labelled_by = "SPLIT-labels.lst"
    hub_data = "ybisk/piqa"
    # The main branch holds a script, and the datasets library no longer runs scripts.
    hub_revision = "refs/convert/parquet"

    def beside(self, path: Path) -> list[Path]:
        labels = path.with_name(f"{path.stem}-labels.lst")
        return [labels] if labels.is_file() else []

    def file_rows(self, path: Path, split: str) -> Iterator[Row]:
        if not (found := self.beside(path)):
            yield from json_rows(path, split)
            return
        (labels,) = found
        given = [line.strip() for line in file_lines(labels)]
        while given and not given[-1]:
            given.pop()
        rows = json_rows(path, split)
        for number, (row, label) in enumerate(itertools.zip_longest(rows, given), 1):
            if row is None or label is None:
                count = number - 1 if row is None else number + sum(1 for _ in rows)
                raise DataError(
                    f"{labels} has {len(given)} labels, {path} has {count} rows: row {number} is in one of them only.",
                    "Line N of the one file must belong to line N of the other.",
                )
            yield dataclasses.replace(row, values={**row.values, "label": label, LABEL_PLACE: f"{labels}:{number}"})

    def example(self, row: Row) -> Example:
        goal = row.text("goal")
        label, place = row.values.get("label"), row.values.get(LABEL_PLACE)
        if place is not None and label not in (None, "", "-1", *self.labels):
            what = f"{place}: the label is {label!r}."
            raise DataError.unknown_label(what, "0 is sol1, 1 is sol2.", column="label", labels=(str(label),))
        texts = tuple((goal, row.text(name)) for name in ("sol1", "sol2"))
        return Example(row.id("id"), texts, row.label("label", self.labels))
