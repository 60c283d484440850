"""The numbers in Tables 1 to 3 of the paper. A report shows them beside its own.

Fan, Duan, Li, Zhou: "KR2: Revisiting Pre-trained Language Models as Knowledge Resource". Percent, means over three
seeds: F1 of universal POS tagging for the languages, accuracy for the other tasks.
"""

from __future__ import annotations

_LANGUAGES = "De Ko Ja Zh Ar Es"

_TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "table1": (
        f"{_LANGUAGES} SNLI SWAG PIQA HellaSwag",
        {
            "KReader": "84.3 45.6 48.9 61.5 62.2 81.8 89.3 78.1 61.7 38.7",
            "KResource": "83.8 25.8 46.4 48.8 58.5 81.6 88.6 65.5 61.6 35.5",
            "KReader2": "84.6 46.2 49.5 61.5 62.0 82.1 89.2 77.8 62.7 38.0",
            "KR2": "84.7 46.2 50.0 61.9 62.8 82.4 89.4 78.4 63.3 38.0",
        },
    ),
    "table2": (
        "De Zh Ar Es mean",
        {
            "KReader": "84.3 61.5 62.2 81.8 72.5",
            "layer 0": "84.6 61.4 63.0 82.5 72.9",
            "layer 1": "84.7 61.5 62.4 82.4 72.8",
            "layer 3": "84.7 62.4 61.6 82.4 72.8",
            "layer 5": "84.4 61.9 62.6 82.5 72.9",
            "layer 7": "84.6 61.5 63.1 82.3 72.9",
            "layer 9": "84.8 61.5 62.7 82.5 72.9",
            "layer 11": "84.6 62.0 62.7 82.1 72.9",
            "average of all": "84.5 61.9 62.7 82.3 72.9",
            "average of the last 4": "84.7 61.9 62.8 82.4 73.0",
            "trainable": "84.7 62.2 63.0 82.5 73.1",
        },
    ),
    "table3": (
        _LANGUAGES,
        {
            "KReader (A)": "84.3 45.6 48.9 61.5 62.2 81.8",
            "KR2 (B-A)": "84.7 46.2 50.0 61.9 62.8 82.4",
            "KD (B-A)": "84.6 46.1 48.6 61.3 62.3 82.0",
            "KResource (B)": "83.8 25.8 46.4 48.8 58.5 81.6",
            "KR2 (A-B)": "84.4 25.9 46.8 48.7 59.2 82.6",
            "KD (A-B)": "84.4 26.3 46.6 49.2 59.4 82.4",
        },
    ),
}

_NUMBERS: dict[tuple[str, str, str], float] = {
    (table, row.lower(), column.lower()): float(number)
    for table, (columns, rows) in _TABLES.items()
    for row, numbers in rows.items()
    for column, number in zip(columns.split(), numbers.split(), strict=True)
}

MEAN = "mean"
"""Table 2's last column: the mean over its languages."""


def paper_number(table: str | None, row: str, column: str) -> float | None:
    """Percent as printed in the paper; None if it has no such cell. Upper and lower case are the same.

    >>> paper_number("table2", "Trainable", "mean")
    73.1
    """
    return _NUMBERS.get((table or "", row.strip().lower(), column.strip().lower()))


def paper_columns(table: str) -> list[str]:
    """Names of a table's columns in the paper, without the mean of Table 2."""
    return [column for column in _TABLES[table][0].split() if column != MEAN]
