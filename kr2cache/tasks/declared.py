"""A task that is declared by words: ``[tasks.NAME]`` in ``kr2cache.toml``, or the same table from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kr2cache.errors import ConfigError, DataError
from kr2cache.system.console import silent
from kr2cache.tasks import metrics
from kr2cache.tasks.base import Example, Label, Task
from kr2cache.tasks.columns import NOTHING, SUFFIXES, conllu_column, conllu_rows, word_rows
from kr2cache.tasks.declaration import Declaration, declared
from kr2cache.tasks.labels import LabelNumbers, name_of, names_of, value_of
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.tables import Row, Unnamed, line_rows, of_language, table_rows
from kr2cache.tasks.udpos import FORM_COLUMN, UdPos, is_withheld

TABLES = (".jsonl", ".parquet")
"""Suffixes of tables whose cells can be lists."""
HUB_FILES = ("{split}-*-of-*.parquet",)
"""How the hub names files of Parquet."""
MOST_LABELS = 1000
"""More different labels are taken for a wrong column."""
BIO = re.compile(r"O|[BI]-.+")


@dataclass
class Seen:
    """What a first reading of the train split finds."""

    names: set[str] = field(default_factory=set)
    columns: tuple[str, ...] = ()
    """Of the first row."""


class DeclaredTask(RowTask):
    """A task that is declared by words. Its labels are empty until they are known (``with_labels_of``)."""

    def __init__(self, name: str, declaration: Declaration, *, seen: Seen | None = None) -> None:
        """
        Args:
            seen: Collects the names of labels while the train split is read for them.
        """
        self.name = name
        self.words_of = declaration
        self.about = declaration.about or "a task of your own"
        self.kind = declaration.kind
        self.words = declaration.kind == "tagging"
        self.suffixes = _suffixes(declaration)
        self.releases = (*declaration.files, *HUB_FILES)
        self.template = _template(declaration)
        self.labels = _labels(declaration)
        self.metric = declaration.metric or next(iter(metrics.metric_names(self.kind, declaration.scheme, ())), "")
        self.counts = UdPos.counts if self.words else {}
        self.hub_data = declaration.data or None
        self.hub_configuration = declaration.configuration or None
        self.hub_revision = declaration.revision or None
        self.hub_splits = declaration.splits
        self.language = declaration.language or None
        self.because = "have _ in place of their words" if self.words else "have an empty text"
        left_out = [f"rows that {self.because}"] if self.words or declaration.skip_empty else []
        left_out += [f"rows of other languages than {self.language}"] if self.language else []
        self.left_out = " and ".join(left_out)
        self.word_column = declaration.words or "words"
        self.label_column = declaration.label or "label"
        label = self.label_column
        self.labelled_by = f"the column {label if isinstance(label, str) else ', '.join(label)}"
        self._ordered = bool(self.labels) and not declaration.derived
        self._numbers = LabelNumbers(self.labels, ordered=self._ordered)
        if not self._ordered and self.kind in ("classification", "choice"):
            self.label_it += (
                f" If -1 means that there is none, write unlabelled = -1 in [tasks.{name}]; the row is then left out."
            )
        self._seen = seen
        if declaration.scheme:
            self._check_scheme(self.labels)

    @classmethod
    def of_table(cls, name: str, table: Mapping[str, Any]) -> DeclaredTask:
        """The task that a table of words declares; arguments and errors as for ``declared``."""
        return cls(name, declared(name, table))

    # Labels ----------------------------------------------------------------------------------------------------------

    def declaration(self) -> dict[str, Any] | None:
        return self.words_of.recorded()

    def with_labels_of(self, data: str | None) -> DeclaredTask:
        if self.labels or self.kind in ("regression", "text"):
            return self
        seen = Seen()
        with silent():  # the reading that follows shows the same notes
            for _ in type(self)(self.name, self.words_of, seen=seen).examples("train", data):
                pass
        labels = in_order(seen.names - ({"-1"} if _is_no_label("-1", seen.names) else set()))
        what = f"the train split of {self.corpus(data)}"
        if not labels:
            raise DataError(
                f"No example of {what} has a label in {self.labelled_by}; its columns are {', '.join(seen.columns)}.",
                f"Check label in [tasks.{self.name}], and the data.",
            )
        if len(labels) == 1:
            raise DataError(f"All labels of {what} are {labels[0]!r}: there is nothing to learn.", "Check the data.")
        if len(labels) > MOST_LABELS:
            raise DataError(
                f"{self.labelled_by} of {what} has {len(labels):,} different labels, such as {labels[0]!r}.",
                f'Check label in [tasks.{self.name}]. For numbers write kind = "regression"; or give all labels.',
            )
        known = metrics.metric_names(self.kind, self.words_of.scheme, labels)
        if self.metric not in known:
            raise ConfigError(
                f"[tasks.{self.name}]: metric = {self.metric!r} is not defined for the {len(labels)} labels of {what}.",
                f"Give one of {', '.join(known)}.",
            )
        return type(self)(self.name, replace(self.words_of, labels=tuple(labels), derived=True))

    def _check_scheme(self, labels: Sequence[str]) -> None:
        for label in labels:
            if not BIO.fullmatch(label):
                raise DataError(
                    f"The label {label!r} of task {self.name} is not of scheme BIO: O, or B- or I- and a type.",
                    f"Correct the labels, or leave scheme out of [tasks.{self.name}].",
                )

    def source_files(self, split: str, data: str | None) -> dict[str, Path] | None:
        return Task.source_files(self, split, data)  # ``file_rows`` reads no other file

    # Examples --------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        words = self.words_of
        if self.kind == "choice":
            several = (words.choices,) * len(self.labels) if isinstance(words.choices, str) else words.choices
            return (*([words.context] if words.context else []), *several)
        return words.text

    def file_rows(self, path: Path, split: str) -> Iterable[Row]:
        if self.kind == "tagging":
            return self._tagged_rows(path, split)
        if path.suffix.lower() == ".txt":
            return line_rows(path, split, self.words_of.text[0])
        words = self.words_of
        names = tuple(map(str, words.columns))
        unnamed = Unnamed(
            columns=names, needed=self.columns, quoted=words.quoted, rename=words.rename, short=words.skip_empty
        )
        return table_rows(path, split, unnamed)

    def _examples(
        self, rows: Callable[[], Iterable[Row]], what: str, *, labels_matter: bool = True
    ) -> Iterator[Example]:
        if (language := self.language) is None:
            return super()._examples(rows, what, labels_matter=labels_matter)
        other = self.words_of.rename

        def own() -> Iterable[Row]:
            return of_language(rows(), language, lambda name: other.get(name, name), self.word_column)

        return super()._examples(own, what, labels_matter=labels_matter)

    def _tagged_rows(self, path: Path, split: str) -> Iterable[Row]:
        words, label, numbers = self.word_column, str(self.label_column), self.words_of.columns
        if path.suffix.lower() == ".conllu":
            tags = (int(numbers[1]), "") if numbers else conllu_column(label)
            assert tags is not None, "else the suffix is not among those of the task"
            form = int(numbers[0]) if numbers else (conllu_column(words) or (FORM_COLUMN, ""))[0]
            nothing = metrics.OUTSIDE if self.words_of.scheme else NOTHING
            return conllu_rows(path, split, words, label, form, tags, id_column=self.words_of.id, nothing=nothing)
        if numbers and path.suffix.lower() not in TABLES:
            return word_rows(path, split, (int(numbers[0]), int(numbers[1])), words, label)
        return table_rows(path, split)

    def has_no_gold(self, row: Row) -> bool:
        if self.words:
            words = self._renamed(row).values.get(self.word_column)
            return isinstance(words, (list, tuple)) and is_withheld(words)
        values = self._renamed(row).values
        empty = any(str(values.get(one, "-")).strip() == "" for one in self.columns)
        return self.words_of.skip_empty and (row.is_cut or empty)

    def gold(self, row: Row) -> bool | None:
        if self.kind not in ("classification", "regression", "choice"):
            return None
        column = str(self.label_column)
        value = self._renamed(row).values.get(column)
        name = name_of(value, f"{row.place}: {column}")
        if name is None:
            return None
        # Before a training, derived labels are not known; an extraction has to read the same rows as the training.
        foreign = name == "-1" and self.kind != "regression" and self._ordered and name not in self.labels
        return not (foreign or name == self.words_of.unlabelled)

    @property
    def conllu(self) -> tuple[int, str] | None:
        return conllu_column(self.label_column) if self.words and isinstance(self.label_column, str) else None

    def _renamed(self, row: Row) -> Row:
        """The row under the names of columns that the declaration has. A column that has its name already keeps it."""
        if not (other := self.words_of.rename):
            return row

        def own(column: str) -> str:
            name = other.get(column, column)
            return column if name in row.values else name

        return replace(row, values={own(column): value for column, value in row.values.items()})

    def example(self, row: Row) -> Example:
        row = self._renamed(row)
        if self._seen is not None and not self._seen.columns:
            self._seen.columns = tuple(row.values)
        texts = self._texts(row)
        return Example(row.id(self.words_of.id), texts, self._label(row, texts))

    def _texts(self, row: Row) -> tuple[tuple[str, ...], ...]:
        words = self.words_of
        if self.kind == "tagging":
            return (_texts_of(row, self.word_column),)
        if self.kind != "choice":
            return (tuple(_text_of(row, column) for column in words.text),)
        if isinstance(words.choices, str):
            choices = _texts_of(row, words.choices)
        else:
            choices = tuple(_text_of(row, column) for column in words.choices)
        before = (_text_of(row, words.context),) if words.context else ()
        return tuple((*before, choice) for choice in choices)

    def _label(self, row: Row, texts: tuple[tuple[str, ...], ...]) -> Label:
        column = self.label_column
        if self.kind == "choice" and self._seen is not None:
            self._note_choices(row, len(texts))
        if isinstance(column, tuple):
            return self._of_columns(row, column)
        value = row.values.get(column)
        place = f"{row.place}: {column}"
        if self.kind == "text" or value is None or self._is_unlabelled(value, place):
            return None
        if self.kind == "regression":
            return value_of(value, place)
        if self.kind == "tagging":
            return self._tags(value, len(texts[0]), place)
        if self.kind == "multilabel":
            numbers = self._numbered(names_of(value, place, split=True), place)
            return None if numbers is None else tuple(sorted(set(numbers)))
        name = name_of(value, place)
        if name is None or (name == "-1" and self.labels and name not in self.labels):
            return None  # as data sets of the hub have it
        numbers = self._numbered([name], place)
        return None if numbers is None else numbers[0]

    def _is_unlabelled(self, value: Any, place: str) -> bool:
        mark = self.words_of.unlabelled
        return bool(mark) and name_of(value, place) == mark

    def _tags(self, value: Any, words: int, place: str) -> Label:
        tags = names_of(value, place, split=False)
        if len(tags) != words:
            raise DataError(f"{place} has {len(tags)} labels for {words} words.", "Give one label for each word.")
        numbers = self._numbered(tags, place)
        return None if numbers is None else tuple(numbers)

    def _of_columns(self, row: Row, columns: Sequence[str]) -> Label:
        """Multilabel: the numbers of the columns that hold 1; None if a column is missing or empty."""
        marks = [name_of(row.values.get(column), f"{row.place}: {column}") for column in columns]
        for column, mark in zip(columns, marks, strict=True):
            if mark not in (None, "0", "1", "true", "false"):
                raise DataError(f"{row.place}: {column} is {mark!r}, not 0 or 1.", "Check the row.")
        return None if None in marks else tuple(i for i, mark in enumerate(marks) if mark in ("1", "true"))

    def _numbered(self, names: Sequence[str], place: str) -> list[int] | None:
        """The numbers of labels; None while the labels are not known."""
        names = [self.words_of.rename_labels.get(name, name) for name in names]
        if self.labels:
            declared_in = "" if self.declaration() is None else f"[tasks.{self.name}]"
            return self._numbers.of(names, place, str(self.label_column), declared_in)
        if self._seen is not None and self.kind != "choice":
            self._seen.names.update(names)
        return None

    def _note_choices(self, row: Row, count: int) -> None:
        assert self._seen is not None, "asked only while labels are collected"
        if self._seen.names and len(self._seen.names) != count:
            raise DataError(
                f"{row.place}: {count} choices, but the rows before have {len(self._seen.names)}.",
                "Every example needs as many choices.",
            )
        self._seen.names.update(map(str, range(count)))

    def _check(self, example: Example, place: str) -> None:
        if self.labels or self.kind != "choice":
            super()._check(example, place)

    def from_line(self, line: str, name: str) -> Example:
        if self.kind == "tagging":
            return UdPos(None).from_line(line, name)
        if len(self.columns) == 1:
            line = line.rstrip("\r\n").replace("\t", " ")
        return super().from_line(line, name)

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        return metrics.score(self.kind, self.words_of.scheme, self.labels, gold, predicted)


def _suffixes(words: Declaration) -> tuple[str, ...]:
    """The suffixes of its files; the one that is likely comes first."""
    if words.kind != "tagging":
        lines = words.kind == "text" and len(words.text) == 1
        return (*((".txt",) if lines else ()), ".jsonl", ".csv", ".tsv", ".parquet")
    if words.columns:
        return (*SUFFIXES, ".conllu", *TABLES, "")
    return (*((".conllu",) if conllu_column(str(words.label)) else ()), *TABLES)


def in_order(names: set[str]) -> list[str]:
    """Labels in sorted order; by value if all of them are whole numbers."""
    return sorted(names, key=lambda name: (int(name), name)) if _are_whole(names) else sorted(names)


def _are_whole(names: set[str]) -> bool:
    return all(re.fullmatch(r"-?[0-9]+", name) for name in names)


def _is_no_label(name: str, names: set[str]) -> bool:
    """Whether -1 among labels of the train split means that there is none, as data sets of the hub have it. It is a
    label if all are whole numbers and another one is negative (-2, -1, 0) or none is 0 (-1 and 1)."""
    negative = any(one.startswith("-") and one != name for one in names)
    return not (_are_whole(names) and (negative or "0" not in names))


def _labels(words: Declaration) -> tuple[str, ...]:
    """The labels that a declaration gives; empty if the data has to give them."""
    if words.labels:
        return words.labels
    if words.kind == "choice" and not isinstance(words.choices, str):
        return tuple(map(str, range(len(words.choices))))
    return words.label if isinstance(words.label, tuple) else ()


def _template(words: Declaration) -> str:
    """Which texts become tokens, in which order."""
    if words.kind == "tagging":
        return "words"
    if words.kind != "choice":
        return ", ".join(words.text)
    choices = f"each of {words.choices}" if isinstance(words.choices, str) else f"each of {', '.join(words.choices)}"
    return f"{words.context}, {choices}" if words.context else choices


def _text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: If there is no such column, or it holds a number, null or an empty text.
    """
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.place}: {column} is {str(value)[:60]!r}, not text.", "Check the row.")
    if value is None and column in row.values:
        raise DataError(f"{row.place}: {column} is null, not text.", "Every example needs a text; check the row.")
    return row.text(column)


def _texts_of(row: Row, column: str) -> tuple[str, ...]:
    """The texts in a column of lists; errors as for ``_text_of``."""
    value = row.values.get(column)
    if column not in row.values:
        row.text(column)
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value) or not value:
        raise DataError(f"{row.place}: {column} is {str(value)[:60]!r}, not a list of texts.", "Check the row.")
    for number, one in enumerate(value, 1):
        if not one.strip():
            raise DataError(f"{row.place}: text {number} in {column} is empty.", "Check the row.")
    return tuple(value)
