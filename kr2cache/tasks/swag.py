"""SWAG: which of four endings follows? Multiple choice (Zellers et al. 2018)."""

from __future__ import annotations

from kr2cache.tasks.base import Example
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.tables import Row

ENDINGS = tuple(f"ending{number}" for number in range(4))


class Swag(RowTask):
    """The original CSV and the hub's rows have the same columns: ``sent1`` is the context, every ending begins with
    ``sent2``."""

    name = "swag"
    about = "which of four endings follows? (multiple choice)"
    kind = "choice"
    labels = ("0", "1", "2", "3")
    template = "sent1, sent2 + ' ' + ending"
    columns = ("sent1", "sent2", *ENDINGS)
    suffixes = (".csv",)
    hub_data = "allenai/swag"
    hub_configuration = "regular"

    def example(self, row: Row) -> Example:
        context, start = row.text("sent1"), row.get("sent2").strip()
        endings = [row.text(name) for name in ENDINGS]
        texts = tuple((context, f"{start} {ending}" if start else ending) for ending in endings)
        # In the original files, a column without a name holds the number of the row.
        return Example(row.get("") or str(row.number), texts, row.label("label", self.labels))
