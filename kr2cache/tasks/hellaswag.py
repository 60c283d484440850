"""HellaSwag: which of four endings follows? Multiple choice (Zellers et al. 2019).

The texts are those that its authors give to BERT. If the context ends with the beginning of a sentence (``ctx_b``),
this beginning is put before each ending. So the first segment has only whole sentences. WikiHow's marks ``[header]``,
``[title]`` and ``[step]`` stay in the text.
"""

from __future__ import annotations

from kr2cache.errors import DataError
from kr2cache.tasks.base import Example
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.tables import Row


class HellaSwag(RowTask):
    """The original JSON lines and the hub's rows have the same fields."""

    name = "hellaswag"
    about = "which of four endings follows? (multiple choice)"
    kind = "choice"
    labels = ("0", "1", "2", "3")
    template = "ctx_a, ctx_b + ' ' + ending; without ctx_b: ctx, ending"
    columns = ("ctx", "endings", "endings", "endings", "endings")
    suffixes = (".jsonl",)
    releases = ("hellaswag_{split}.jsonl",)
    hub_data = "Rowan/hellaswag"

    def example(self, row: Row) -> Example:
        endings = row.values.get("endings")
        if not isinstance(endings, (list, tuple)) or not all(isinstance(ending, str) for ending in endings):
            raise DataError(f"{row.place}: endings is {str(endings)[:60]!r}, not a list of texts.", "Check the row.")
        if not all(ending.strip() for ending in endings):
            raise DataError(f"{row.place}: an ending is empty.", "Every text needs at least one word; check the row.")
        start = row.get("ctx_b").strip()
        if start:
            texts = tuple((row.text("ctx_a"), f"{start} {ending}") for ending in endings)
        else:
            texts = tuple((row.text("ctx" if "ctx" in row.values else "ctx_a"), ending) for ending in endings)
        return Example(row.id("ind"), texts, row.label("label", self.labels))
