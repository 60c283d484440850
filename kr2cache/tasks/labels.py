"""Gold labels as data sets write them: texts, numbers, true and false, lists of such."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from kr2cache.errors import DataError
from kr2cache.tasks.base import LABELS_SHOWN
from kr2cache.tasks.declaration import label_name

BRACKETS = {"(": ")", "{": "}"}
"""What tuples and sets stand in."""
EMPTY_SET = "set()"
"""How Python writes a set without labels."""


class LabelNumbers:
    """The numbers of labels, by name. A number in the data may stand for the place of a label, if the user gave their
    order and no label is a number."""

    def __init__(self, labels: Sequence[str], *, ordered: bool) -> None:
        """
        Args:
            ordered: Whether the user gave the labels in this order; else they are the sorted names of the data.
        """
        self._labels = labels
        self._number = {label: number for number, label in enumerate(labels)}
        self._words = not any(map(is_number, labels))
        if ordered and self._words:
            self._number |= {str(number): number for number in range(len(labels))}

    def of(self, names: Sequence[str], place: str, column: str, declared_in: str) -> list[int]:
        """The numbers of the labels of one row.

        Args:
            place: Row and column, for errors.
            declared_in: Where the user can give other labels; empty if nowhere.

        Raises:
            DataError: For a name that is no label.
        """
        unknown = [name for name in names if name not in self._number]
        if unknown:
            more = len(self._labels) - LABELS_SHOWN
            known = ", ".join(self._labels[:LABELS_SHOWN]) + (f" and {more} more" if more > 0 else "")
            ordered = self._words and is_number(unknown[0])
            what = " in their order: a number is then a place among them" if ordered else ""
            other = f", or give all labels in {declared_in}{what}" if declared_in else ""
            raise DataError.unknown_label(
                f"{place} is {unknown[0]!r}.",
                f"Labels are {known}. Correct it{other}.",
                column=column,
                labels=unknown,
            )
        return [self._number[name] for name in names]


def is_number(name: str) -> bool:
    """Whether the name of a label is a number: ``1``, ``-1``, ``1.0``."""
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def name_of(value: Any, place: str) -> str | None:
    """The name of a label: ``2`` and ``2.0`` are ``"2"``, true is ``"true"``. None for null, NaN and empty text.

    Args:
        place: Row and column, for errors.

    Raises:
        DataError: For a value of another type.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, (bool, int)):
        return label_name(value)
    if isinstance(value, str):
        return value.strip() or None
    raise DataError(f"{place} is {str(value)[:60]!r}, not a label.", "A label is a text or a number; check the row.")


def names_of(value: Any, place: str, *, split: bool) -> list[str]:
    """The names of a list of labels.

    Args:
        split: Whether a text is taken as well: names with commas between them, or a list, tuple or set as
            Python or JSON writes it.

    Raises:
        DataError: For another value, or a list with an empty label.
    """
    if split and isinstance(value, str):
        text = value.strip()
        if text != EMPTY_SET and not _is_list(text):
            return [name for part in text.split(",") if (name := part.strip())]
        value = [] if text == EMPTY_SET else _list_of(text, place)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{place} is {str(value)[:60]!r}, not a list of labels.", "Check the row.")
    names = [name_of(one, place) for one in value]
    if None in names:
        raise DataError(f"{place}: label {names.index(None) + 1} is empty.", "Check the row.")
    return [name for name in names if name is not None]


def _is_list(text: str) -> bool:
    """Whether a cell writes several labels in brackets, as lists, tuples and sets are written: ``('anger', 'joy')``.
    ``(other)`` and ``(mild) anger, joy`` are labels without a list."""
    if text.startswith("["):
        return True
    close = BRACKETS.get(text[:1])
    if close is None or not text.endswith(close):
        return False
    whole = text.find(close) == len(text) - 1  # not ``(other), (odd)``
    return (whole and (close == "}" or "," in text)) or _parsed(text) is not None


def _parsed(text: str) -> Any:
    """What a cell writes as JSON, else as Python; None for a single value, and if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        # Python takes two texts side by side for one: ['anger' 'joy']
        if parse is ast.literal_eval and re.search(r"""['"]\s+['"]""", text):
            continue
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found = parse(text)
            return found if isinstance(found, list | tuple | set | dict) else None
    return None


def _list_of(text: str, place: str) -> list[Any]:
    """The list that a cell of CSV writes: ``["anger", "joy"]``, ``['anger', 'joy']``, ``{'anger'}`` or ``(27, 3)``.

    Raises:
        DataError: If it is none, such as the text of a NumPy array, which has no commas; ``{anger,joy}`` of a database;
            or a dictionary.
    """
    found = _parsed(text)
    if not isinstance(found, list | tuple | set):
        raise DataError(
            f"{place} is {text[:60]!r}: it begins like a list, but is none.",
            "Write the labels with commas between them (anger, joy), or as a list in JSON.",
        )
    return sorted(found, key=str) if isinstance(found, set) else list(found)


def value_of(value: Any, place: str) -> float | None:
    """The number that a regression learns; None for NaN and empty text.

    Raises:
        DataError: If it is no number, or infinite.
    """
    if isinstance(value, str) and not value.strip():
        return None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.inf
    except ValueError:
        number = math.inf
    if math.isinf(number):
        raise DataError(f"{place} is {str(value)[:60]!r}, not a number.", "Check the row.")
    return None if math.isnan(number) else number
