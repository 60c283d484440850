"""Tagged files with a word a line: CoNLL's columns, and any column of CoNLL-U."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kr2cache.errors import DataError
from kr2cache.system.utf8 import file_lines
from kr2cache.tasks.tables import Row
from kr2cache.tasks.udpos import read_conllu

SUFFIXES = (".txt", ".conll", ".tsv", ".bio", ".iob", ".iob2")
DOCUMENT = "-DOCSTART-"
"""CoNLL-2003 begins a document with a line of this word."""
CONLLU = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")
"""The columns of CoNLL-U."""
WITH_KEYS = ("FEATS", "MISC")
"""Columns of keys and values: ``Case=Nom|Number=Sing``."""
NOTHING = "_"


@dataclass
class _Sentence:
    line: int
    words: list[str] = field(default_factory=list)
    tags: list[str | None] = field(default_factory=list)


def word_rows(path: Path, split: str, columns: tuple[int, int], words: str, label: str) -> Iterator[Row]:
    """A row for each sentence of a file with a word a line; blank lines end sentences.

    Columns are split by tabs, or by spaces in a line without a tab. Lines of ``-DOCSTART-`` are left out, and so are
    comments: lines that begin with ``#`` and have too few columns for a word.

    Args:
        columns: Of the words and of the labels, from 0; -1 is the last one.
        words: The column of the row that gets the list of words.
        label: The one that gets the list of labels; it is missing if no word of the sentence has one.

    Raises:
        DataError: For a line without a word, or a sentence where only some words have a label.
    """
    number = 0
    sentence: _Sentence | None = None
    width = _width(path) if columns[1] == -1 else 0
    for line_number, line in enumerate(_with_an_end(path), 1):
        cells = _cells(line)
        if not any(cell.strip() for cell in cells):
            if sentence is not None:
                yield _row(path, split, sentence, number, words, label)
                number, sentence = number + 1, None
            continue
        word, tag = (_cell(cells, column) for column in columns)
        is_short = tag is None or len(cells) < width
        if cells[0] == DOCUMENT or (line.startswith("#") and is_short):
            continue
        if word is None:
            raise DataError(
                f"{path}:{line_number}: no word in column {columns[0]} of {len(cells)}: {line.strip()[:60]!r}",
                "Columns count from 0; check the line, and columns of the task.",
            )
        sentence = sentence or _Sentence(line_number)
        sentence.words.append(word)
        sentence.tags.append(tag)


def _cells(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t") if "\t" in line else line.split()


def _width(path: Path) -> int:
    """How many columns the first line of a word has that cannot be a comment; 0 if there is none."""
    lines = (_cells(line) for line in file_lines(path) if line.strip() and not line.startswith(("#", DOCUMENT)))
    return len(next(lines, []))


def _with_an_end(path: Path) -> Iterator[str]:
    """The lines, and a blank one that ends the last sentence."""
    yield from file_lines(path)
    yield ""


def _cell(cells: list[str], column: int) -> str | None:
    if column >= len(cells) or (column == -1 and len(cells) == 1):
        return None
    return cells[column].strip() or None


def _row(path: Path, split: str, sentence: _Sentence, number: int, words: str, label: str) -> Row:
    values: dict[str, Any] = {words: sentence.words}
    if any(tag is not None for tag in sentence.tags):
        if None in sentence.tags:
            place = sentence.tags.index(None)
            raise DataError(
                f"{path}, sentence at line {sentence.line}: word {place + 1} ({sentence.words[place]!r}) has no label.",
                "Give each word of a sentence its label, or none of them.",
            )
        values[label] = sentence.tags
    return Row(values=values, place=f"{path}:{sentence.line}", split=split, number=number)


def conllu_column(name: str) -> tuple[int, str] | None:
    """The number of a column of CoNLL-U, and the key in it: ``XPOS``, ``FEATS.Case``. None for another name."""
    column, dot, key = name.partition(".")
    if column not in CONLLU or (dot and not (key and column in WITH_KEYS)):
        return None
    return CONLLU.index(column), key


def conllu_rows(
    path: Path, split: str, words: str, label: str, form: int, tags: tuple[int, str], *, id_column: str, nothing: str
) -> Iterator[Row]:
    """A row for each sentence of a CoNLL-U file.

    Args:
        words: The column of the row that gets the list of forms.
        label: The one that gets the list of tags; it is missing if all tags of the sentence are ``_``.
        form: The column of the forms, from 0.
        tags: Column and key of the tags, from ``conllu_column``.
        id_column: The column of the row that gets the ``sent_id``.
        nothing: The tag of a word without the key.
    """
    column, key = tags
    for number, (line, sentence_id, forms, cells) in enumerate(read_conllu(path, form, column)):
        values: dict[str, Any] = {words: forms}
        if sentence_id is not None:
            values[id_column] = sentence_id
        if key:
            values[label] = [_value(cell, key) or nothing for cell in cells]
        elif any(cell != NOTHING for cell in cells):
            values[label] = cells
        yield Row(values=values, place=f"{path}:{line}", split=split, number=number)


def _value(cell: str, key: str) -> str:
    for part in cell.split("|"):
        name, _, value = part.partition("=")
        if name == key:
            return value
    return ""
