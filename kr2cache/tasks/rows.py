"""Tasks whose data is a table: JSON lines, CSV, or the rows of a data set on the hub.

Each task says how one row becomes an example. The code here is the same for all of them: it reads the rows and checks
ids, labels and choices. Every error names the file and the line, or the data set and the row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kr2cache.errors import DataError
from kr2cache.system.console import note
from kr2cache.tasks.base import Example, Task, accuracy, note_unknown
from kr2cache.tasks.files import is_saved
from kr2cache.tasks.hub import load_hub, load_saved
from kr2cache.tasks.repeats import UniqueIds
from kr2cache.tasks.tables import Row, data_set_rows, table_rows


class RowTask(Task):
    """A task with one example per row, scored by accuracy."""

    words = False
    metric = "accuracy"
    hub_data: str | None = None
    """The hub's data set of this task."""
    hub_configuration: str | None = None
    hub_revision: str | None = None
    """The revision of ``hub_data``, if its main branch cannot be used."""
    columns: tuple[str, ...]
    """The columns from which ``example`` reads its texts. A plain line has them in this order, split by tabs. A column
    that occurs several times here is a list."""
    no_gold = ""
    """How ``has_no_gold`` recognises a row without a gold label, in words."""
    because = ""
    """Why rows are left out, if not for want of a gold label: ``have an empty text``."""
    label_it = "Label the row, or remove it."
    """What to do about a row without a label among rows that have one."""

    @abstractmethod
    def example(self, row: Row) -> Example:
        """The row's example."""

    def has_no_gold(self, row: Row) -> bool:
        """Whether annotators found no label for this row: it is used neither in training nor in scores."""
        return False

    def gold(self, row: Row) -> bool | None:
        """Whether the row has a gold label: False if it says that it has none, and is therefore left out if other rows
        of the split have one. None if this does not matter."""
        return None

    @property
    def default_data(self) -> str | None:
        return self.hub_data

    def file_examples(self, path: Path, split: str) -> Iterator[Example]:
        return self._examples(lambda: self.file_rows(path, split), str(path))

    def read_unlabelled(self, path: Path, split: str) -> list[Example]:
        def rows() -> Iterable[Row]:
            return data_set_rows(load_saved(path), str(path), split) if is_saved(path) else self.file_rows(path, split)

        return list(self._examples(rows, str(path), labels_matter=False))

    def source_files(self, split: str, data: str | None) -> dict[str, Path] | None:
        own = type(self)
        if own.file_rows is not RowTask.file_rows and own.beside is RowTask.beside:
            return None  # it may read other files
        return super().source_files(split, data)

    def file_rows(self, path: Path, split: str) -> Iterable[Row]:
        """The rows of one file, by its suffix."""
        return table_rows(path, split)

    def hub_examples(self, hub_id: str, split: str) -> Iterator[Example]:
        own = self.hub_data in (None, hub_id)  # yours may lack the configurations and splits of the official data set
        table, what = load_hub(
            hub_id,
            self.hub_configuration if own else None,
            split,
            name=self.hub_splits.get(split) if own else None,
            revision=self.hub_revision if own else None,
            suffix=self.suffixes[0],
        )
        yield from self.table_examples(table, what, split)

    def table_examples(self, table: Any, what: str, split: str) -> Iterator[Example]:
        yield from self._examples(lambda: data_set_rows(table, what, split), what)

    def from_line(self, line: str, name: str) -> Example:
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != len(self.columns):
            raise DataError(
                f"{name}: {len(fields)} fields, but {self.name} needs {len(self.columns)}.",
                f"Give these, with tabs between them: {', '.join(self.columns)}.",
            )
        values: dict[str, Any] = {}
        for column, field in zip(self.columns, fields, strict=True):
            if self.columns.count(column) > 1:
                values.setdefault(column, []).append(field)
            else:
                values[column] = field
        example = self.example(Row(values=values, place=name, split=name, number=0))
        self._check(example, name)
        return Example(name, example.texts, None)

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        return {"accuracy": accuracy(sum(a == b for a, b in zip(gold, predicted, strict=True)), len(gold))}

    def _examples(
        self, rows: Callable[[], Iterable[Row]], what: str, *, labels_matter: bool = True
    ) -> Iterator[Example]:
        """
        Args:
            rows: Gives the rows from the first on. They are read again only to name the places of an id that occurs
                twice.
            what: The file or data set, for notes.
            labels_matter: Whether rows without a gold label are left out, and unknown labels are an error. Otherwise a
                note names the unknown labels.
        """
        unknown: set[str] = set()
        total = count = unlabelled = marked = 0
        first_unlabelled = ""
        ids = UniqueIds()
        others: list[bool] = []  # whether other rows have gold labels, once it is known

        def is_marked(row: Row) -> bool:
            if not labels_matter or self.gold(row) is not False:
                return False
            if not others:
                others.append(any(self.gold(one) for one in rows()))
            return others[0]

        for row in rows():
            total += 1
            if labels_matter and self.has_no_gold(row):
                continue
            if is_marked(row):
                marked += 1
                continue
            example = self.example(row) if labels_matter else self._without_unknown(row, unknown)
            self._check(example, row.place)
            ids.add(example.id)
            count += 1
            if example.label is None:
                unlabelled += 1
                first_unlabelled = first_unlabelled or row.place
            yield example
        ids.check(
            lambda: (
                (self._without_unknown(row, unknown).id, row.place)
                for row in rows()
                if not (labels_matter and self.has_no_gold(row)) and not is_marked(row)
            )
        )
        note_unknown(what, unknown)
        if labels_matter and 0 < unlabelled < count:
            raise DataError(
                f"{first_unlabelled}: no label, while {count - unlabelled} of {count} rows have one.",
                self.label_it,
            )
        if marked:
            note(f"{what}: {marked:,} of {total:,} rows have no gold label; they are left out.")
        if total > count + marked:
            because = self.because or f"have no gold label ({self.no_gold})"
            note(f"{what}: {total - count - marked:,} of {total:,} rows {because}; they are left out.")

    def _without_unknown(self, row: Row, unknown: set[str]) -> Example:
        """The row's example; without its label if that is unknown, which is added to ``unknown``."""
        try:
            return self.example(row)
        except DataError as error:
            if not error.unknown_labels:
                raise
            unknown.update(error.unknown_labels)
            return self.example(replace(row, values={**row.values, error.label_column: None}))

    def _check(self, example: Example, place: str) -> None:
        if self.kind == "choice" and len(example.texts) != len(self.labels):
            raise DataError(
                f"{place}: {len(example.texts)} choices, but {self.name} has {len(self.labels)}.", "Check the row."
            )
        if any(not segment.strip() for text in example.texts for segment in text):
            raise DataError(f"{place}: a text is empty.", "Every text needs at least one word; check the row.")
        try:
            "".join(segment for text in example.texts for segment in text).encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can hold half a character, such as "\\ud83d"
            raise DataError(f"{place}: a text is not Unicode ({error.reason}).", "Check the row.") from error
