"""Tasks that come with the package and are declared in the words of ``[tasks.NAME]``: GLUE, XNLI, PAWS-X, WikiANN and
CoNLL-2003.

Columns have the names that they have on the hub; ``rename`` has those of the release files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kr2cache.tasks.declaration import Declaration
from kr2cache.tasks.declared import DeclaredTask

LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "xnli": ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"),
    "pawsx": ("de", "en", "es", "fr", "ja", "ko", "zh"),
    "wikiann": (
        "af", "ar", "az", "bg", "bn", "de", "el", "en", "es", "et", "eu", "fa", "fi", "fr", "gu", "he", "hi", "hu",
        "id", "it", "ja", "jv", "ka", "kk", "ko", "lt", "ml", "mr", "ms", "my", "nl", "pa", "pl", "pt", "qu", "ro",
        "ru", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "yo", "zh",
    ),
}  # fmt: skip
"""The languages of XTREME, by the first part of a task's name: ``xnli-de``."""

PAIR = {"kind": "classification", "text": ["sentence1", "sentence2"], "label": "label"}
INDEX = {"index": "idx"}
ENTAILMENT = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}
"""The names that SNLI, MultiNLI and XNLI have in their own releases."""
GLUE: Mapping[str, Mapping[str, Any]] = {
    "cola": {
        "about": "is a sentence acceptable English? (GLUE)",
        "kind": "classification",
        "text": "sentence",
        "label": "label",
        "labels": ["unacceptable", "acceptable"],
        "metric": "matthews",
        "columns": ["source", "label", "star", "sentence"],
    },
    "sst2": {
        "about": "is a sentence of a film review positive? (GLUE)",
        "kind": "classification",
        "text": "sentence",
        "label": "label",
        "labels": ["negative", "positive"],
    },
    "mrpc": PAIR
    | {
        "about": "do two sentences of news mean the same? (GLUE)",
        "labels": ["not_equivalent", "equivalent"],
        "metric": "f1",
        "rename": INDEX | {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
    },
    "qqp": PAIR
    | {
        "about": "do two questions ask the same? (GLUE)",
        "text": ["question1", "question2"],
        "labels": ["not_duplicate", "duplicate"],
        "metric": "f1",
        "skip_empty": True,  # a few questions are empty
        "rename": INDEX | {"id": "idx", "is_duplicate": "label"},
    },
    "stsb": PAIR
    | {
        "about": "how similar are two sentences, from 0 to 5? (GLUE)",
        "kind": "regression",
        "unlabelled": -1,
        "rename": INDEX | {"score": "label"},
    },
    "mnli": PAIR
    | {
        "about": "does a premise entail a hypothesis? dev and test of the train split's genres (GLUE)",
        "text": ["premise", "hypothesis"],
        "labels": ["entailment", "neutral", "contradiction"],
        "rename": INDEX | ENTAILMENT,
        "unlabelled": "-",
        "files": ["{split}_matched.tsv", "multinli_1.0_{split}_matched.jsonl"],
        "splits": {"dev": "validation_matched", "test": "test_matched"},
    },
    "qnli": PAIR
    | {
        "about": "does a sentence hold the answer to a question? (GLUE)",
        "text": ["question", "sentence"],
        "labels": ["entailment", "not_entailment"],
    },
    "rte": PAIR
    | {"about": "does a text entail another? (GLUE)", "labels": ["entailment", "not_entailment"]},
    "wnli": PAIR
    | {
        "about": "does a sentence follow, with its pronoun resolved? (GLUE)",
        "labels": ["not_entailment", "entailment"],
    },
}  # fmt: skip
XNLI: Mapping[str, Any] = PAIR | {
    "about": "does a premise entail a hypothesis? (XTREME)",
    "text": ["premise", "hypothesis"],
    "labels": ["entailment", "neutral", "contradiction"],
    "columns": ["premise", "hypothesis", "label"],
    "quoted": True,
    "unlabelled": "-",
    "rename": ENTAILMENT | {"hypo": "hypothesis"},  # hypo, contradictory: MultiNLI as XNLI's authors translated it
    "rename_labels": {"contradictory": "contradiction"},
    "data": "facebook/xnli",
}
PAWS_X: Mapping[str, Any] = PAIR | {
    "about": "do two sentences mean the same? (XTREME)",
    "labels": ["0", "1"],
    "skip_empty": True,  # a few sentences of the train split have no translation
    "columns": ["sentence1", "sentence2", "label"],
    "quoted": True,
    "data": "google-research-datasets/paws-x",
}
ENTITIES = {"kind": "tagging", "words": "tokens", "label": "ner_tags", "scheme": "BIO"}
WIKIANN: Mapping[str, Any] = ENTITIES | {
    "about": "named entities (XTREME)",
    "labels": ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"],
    "columns": [0, 1],
    "data": "unimelb-nlp/wikiann",
}
CONLL_2003: Mapping[str, Any] = ENTITIES | {
    "about": "named entities in English news",
    "labels": ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"],
    "columns": [0, -1],  # the German files have a column more
    "data": "eriktks/conll2003",
    "revision": "refs/convert/parquet",  # the main branch holds a script
}


def _tables() -> dict[str, Mapping[str, Any]]:
    tables = {
        name: {
            "id": "idx",
            "data": "nyu-mll/glue",
            "configuration": name,
            "rename": INDEX,
            **words,
        }
        for name, words in GLUE.items()
    }
    tables["mnli-mm"] = tables["mnli"] | {
        "about": "mnli, with dev and test of other genres than the train split (GLUE)",
        "files": ["{split}_mismatched.tsv", "multinli_1.0_{split}_mismatched.jsonl"],
        "splits": {"dev": "validation_mismatched", "test": "test_mismatched"},
    }
    for family, words in (("xnli", XNLI), ("pawsx", PAWS_X), ("wikiann", WIKIANN)):
        for language in LANGUAGES[family]:
            own = {"configuration": language, "language": language, "files": [f"{{split}}-{language}.tsv"]}
            tables[f"{family}-{language}"] = {**words, **own}
    return tables | {"conll2003": CONLL_2003}


READY = _tables()
"""The declarations, by name."""


class ReadyTask(DeclaredTask):
    """A declared task of the package. Its name alone describes it, so runs do not record its declaration."""

    def __init__(self, name: str, declaration: Declaration) -> None:
        super().__init__(name, declaration)
        if declaration.files or self.kind != "tagging":  # as GLUE and XTREME release it
            self.suffixes = (".tsv", *(one for one in self.suffixes if one != ".tsv"))

    def declaration(self) -> None:
        return None
