"""SNLI: does a premise entail a hypothesis? Classification of pairs (Bowman et al. 2015)."""

from __future__ import annotations

from kr2cache.tasks.base import Example
from kr2cache.tasks.rows import RowTask
from kr2cache.tasks.tables import Row


class Snli(RowTask):
    """The original files have ``gold_label``, ``sentence1``, ``sentence2`` and ``pairID``. The hub's rows have
    ``label``, ``premise`` and ``hypothesis``."""

    name = "snli"
    about = "does a premise entail a hypothesis? (pairs)"
    kind = "classification"
    labels = ("entailment", "neutral", "contradiction")
    template = "sentence1, sentence2"
    columns = ("sentence1", "sentence2")
    suffixes = (".jsonl",)
    releases = ("snli_1.0_{split}.jsonl",)
    hub_data = "stanfordnlp/snli"
    labelled_by = "gold_label"
    left_out = "rows without a gold label"
    no_gold = "gold_label - or -1: the annotators did not agree"

    def example(self, row: Row) -> Example:
        first, second = ("premise", "hypothesis") if "premise" in row.values else self.columns
        label = None if self.has_no_gold(row) else row.label(_label_column(row), self.labels)
        return Example(row.id("pairID"), ((row.text(first), row.text(second)),), label)

    def has_no_gold(self, row: Row) -> bool:
        return row.get(_label_column(row)).strip() in ("-", "-1")


def _label_column(row: Row) -> str:
    return "label" if "premise" in row.values else "gold_label"
