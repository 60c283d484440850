"""Data that is in no file yet: standard input, and texts that Python has in memory.

Data may be read twice (to name both places of an id, to compare a stored token index), so it is written to a temporary
file first. Everything after that is as for any other file, and a text of any size takes no memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kr2cache.errors import ConfigError, DataError, KR2CacheError
from kr2cache.tasks.base import Task
from kr2cache.tasks.repeats import UniqueIds
from kr2cache.tasks.text import ID, Text, Words

STANDARD_INPUT = "-"
AT_ONCE = 1_000
"""Rows of a ``datasets.Dataset`` that are taken at once."""


@contextlib.contextmanager
def standard_input(task: Task, split: str) -> Iterator[Path]:
    """A file with what standard input gives, until the end of the block.

    Args:
        task: Its suffix says what standard input is: for ``text``, one text a line.
        split: The split that it is.

    Raises:
        DataError: If it is empty. Errors of the block that name the file name standard input instead.
    """
    with tempfile.TemporaryDirectory(prefix="kr2cache-") as folder:
        path = Path(folder) / f"standard-input-{split}{task.suffixes[0]}"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with path.open("rb") as file:
            if not any(line.strip() for line in file):
                raise DataError(
                    "Standard input is empty.", "Check the command before the |, or give a file: --data FILE."
                )
        path = _with_digest(path)
        try:
            yield path
        except KR2CacheError as error:
            for name in (str(path), path.name):
                error.message = error.message.replace(name, "standard input")
            raise


@contextlib.contextmanager
def texts_in_memory(texts: Any, split: str, column: str | None, id_column: str | None) -> Iterator[tuple[Task, Path]]:
    """A file with texts from Python, and the task that reads it, until the end of the block.

    Args:
        texts: An iterable of texts, a dictionary of them by id, or a ``datasets.Dataset``. A text is a string, or a
            list of words; all are of one kind.
        split: The split that they are.
        column: For a data set: the column of the texts; None for ``text``, or its only column.
        id_column: For a data set: the column of the ids; None for ids by number.

    Raises:
        DataError: If there is no text, or one is empty or neither a string nor a list of words; or if an id occurs
            twice. The message says which text it is.
        ConfigError: If a column is missing, or given where there are none.
    """
    with tempfile.TemporaryDirectory(prefix="kr2cache-") as folder:
        path = Path(folder) / f"texts-{split}.jsonl"
        task: Task | None = None
        ids = UniqueIds()
        with path.open("w", encoding="utf-8") as file:
            for number, (name, text) in enumerate(_named(texts, column, id_column)):
                place = f"texts[{number if name is None else repr(name)}]"
                own = _task_of(text, place)
                task = task or own
                if own.name != task.name:
                    raise DataError(
                        f"{place} is {_shown(text)}, but the texts before it are of another kind.",
                        "Give strings alone, or lists of words alone.",
                    )
                row: dict[str, Any] = {} if name is None else {ID: name}
                row[task.template] = text if isinstance(text, str) else list(text)
                file.write(json.dumps(row) + "\n")
                if name is not None:
                    ids.add(name)
        if task is None:
            raise DataError("There is no text: texts is empty.", "Give at least one text.")
        # Only data that can be read again has ids.
        named = enumerate(_named(texts, column, id_column))
        ids.check(lambda: ((str(name), f"texts[{number}]") for number, (name, _) in named))
        yield task, _with_digest(path)


def _with_digest(path: Path) -> Path:
    """The file, named by its content. Else ``cache list`` would take other texts for a newer version."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.rename(path.with_stem(f"{path.stem}-{digest[:8]}"))


def _named(texts: Any, column: str | None, id_column: str | None) -> Iterator[tuple[str | None, Any]]:
    """Each text, with its id if it has one."""
    columns = getattr(texts, "column_names", None)
    if isinstance(columns, dict):
        raise ConfigError(
            f"texts is a dictionary of data sets: {', '.join(columns)}.",
            f"Give one of them: texts[{next(iter(columns))!r}]",
        )
    if isinstance(columns, list) and hasattr(texts, "iter"):
        yield from _of_data_set(texts, columns, column, id_column)
        return
    if hasattr(texts, "columns") and hasattr(texts, "iloc"):
        raise ConfigError(
            f"texts is a table with the columns {', '.join(map(str, texts.columns))}.",
            f"Give the column of the texts, such as df[{next(iter(texts.columns), 'text')!r}].",
        )
    if column is not None or id_column is not None:
        raise ConfigError(
            f"column and id_column are of a datasets.Dataset, but texts is a {type(texts).__name__}.",
            "Leave them out; ids are the keys of a dictionary.",
        )
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise DataError(
            f"texts is {_shown(texts)}, not several texts.",
            "Give a list of strings, a dictionary of strings by id, or a datasets.Dataset. For a file: data=FILE.",
        )
    if isinstance(texts, Mapping):
        for name, text in texts.items():
            yield _id(name), text
    else:
        for text in texts:
            yield None, text


def _of_data_set(
    texts: Any, columns: list[str], column: str | None, id_column: str | None
) -> Iterator[tuple[str | None, Any]]:
    if column is None:
        column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    for option, name in (("column", column), ("id_column", id_column)):
        if name not in columns and (name is not None or option == "column"):
            what = "has several columns and none called text" if name is None else f"has no column {name!r}"
            raise ConfigError(f"The data set {what}.", f"Give {option}: {', '.join(columns)}")
    wanted = [name for name in (column, id_column) if name is not None]
    for batch in texts.select_columns(list(dict.fromkeys(wanted))).with_format(None).iter(AT_ONCE):
        names = map(_id, batch[id_column]) if id_column is not None else [None] * len(batch[column])
        yield from zip(names, batch[column], strict=True)


def _id(name: Any) -> str:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"The id {name!r} is neither text nor a whole number.", "Give each text an id of these types.")
    if not (written := str(name).strip()):
        raise DataError(f"The id {name!r} is empty.", "Give each text an id with at least one character.")
    return written


def _task_of(text: Any, place: str) -> Task:
    """The task that reads such a text.

    Raises:
        DataError: If it is no text, or an empty one.
    """
    words = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else []
    if not words and not isinstance(text, list | tuple):
        raise DataError(f"{place} is {_shown(text)}, not text.", "Give strings, or lists of words.")
    if not all(isinstance(word, str) for word in words):
        raise DataError(f"{place} is {_shown(text)}, not a list of words.", "Give strings, or lists of words.")
    if not words or not all(word.strip() for word in words):
        what = "is empty" if isinstance(text, str) or not words else "has an empty word"
        raise DataError(f"{place} {what}: {_shown(text)}.", "Leave it out: without text there are no states.")
    return Text() if isinstance(text, str) else Words()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
