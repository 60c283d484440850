"""Part-of-speech tagging with Universal Dependencies' UPOS tags: XTREME's ``udpos`` (the data of the paper's tables).

Only lines whose id is a plain integer are words: ``4-5`` is a multiword token, ``8.1`` an empty node. (An empty node
has a real UPOS tag, so its tag does not tell that it is no word.) The first subword of a word carries its label. The
scores are XTREME's F1 and word accuracy. A word without a token (cut off at the maximal length, or dropped by the
tokenizer) counts as wrong in both.

XTREME's F1 was computed by seqeval 0.0.12 on the raw tags. A chunk is a run of words of one tag, except that each word
tagged SCONJ or SYM is a chunk of its own: their first letter, S, is IOBES's mark for a chunk of one word. A chunk is
right if its tag, its first word and its last word are right.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kr2cache.errors import DataError
from kr2cache.system.console import note
from kr2cache.system.utf8 import file_lines
from kr2cache.tasks.base import Example, Task, accuracy, note_unknown
from kr2cache.tasks.files import is_saved
from kr2cache.tasks.hub import load_hub, load_saved
from kr2cache.tasks.repeats import UniqueIds

UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip
"""All 17 tags, even if a file lacks some, as several treebanks do."""

LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew",
    "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "kk": "Kazakh",
    "ko": "Korean", "mr": "Marathi", "nl": "Dutch", "pt": "Portuguese", "ru": "Russian", "ta": "Tamil", "te": "Telugu",
    "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "ur": "Urdu", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip
"""Language in the name of XTREME's configuration (``udpos.German``), by language code."""

FORM_COLUMN, UPOS_COLUMN = 1, 3
LABEL_NUMBER = {tag: number for number, tag in enumerate(UPOS)}
PREFIXED = tuple(f"{tag[0]}-{tag}" for tag in UPOS)
"""The name of each tag for seqeval. Since version 1 it takes the first letter of a tag for its prefix and the rest
for its type: CCONJ and SCONJ would be one type, and X would have none. With prefix and hyphen the whole tag is the
type, as in 0.0.12."""
SHARED = 2**16
"""At most about so many forms are kept to be shared between sentences."""
NO_TAG = "O"
"""The tag for seqeval of a word without a prediction: outside every chunk."""


class UdPos(Task):
    """``udpos-LANG``; ``udpos`` for your own data in any language."""

    about = "part-of-speech tagging"
    kind = "tagging"
    labels = UPOS
    words = True
    template = "words"
    metric = "f1"
    counts: Mapping[str, str] = {"cut_off_words": "words without a label"}
    suffixes = (".conllu",)
    labelled_by = "column 4 (UPOS)"
    left_out = "sentences whose text is withheld: _ in place of their words"
    releases = ("*-ud-{split}.conllu",)
    parts = ("*-ud-{split}-*.conllu",)  # large treebanks: de_hdt-ud-train-a-1.conllu, cs_pdt-ud-train-c.conllu

    def __init__(self, language: str | None) -> None:
        self.language = language
        self.name = f"udpos-{language}" if language else "udpos"

    @property
    def default_data(self) -> str | None:
        return "google/xtreme" if self.language else None

    def file_examples(self, path: Path, split: str) -> Iterator[Example]:
        return self._examples(path, split, to_predict=False)

    @property
    def conllu(self) -> tuple[int, str] | None:
        return UPOS_COLUMN, ""

    def read_unlabelled(self, path: Path, split: str) -> list[Example]:
        if is_saved(path):
            return list(self.table_examples(load_saved(path), str(path), split))
        return list(self._examples(path, split, to_predict=True))

    def _examples(self, path: Path, split: str, *, to_predict: bool) -> Iterator[Example]:
        ids = UniqueIds()
        unknown: set[str] = set()
        total = withheld = 0
        for line, sentence_id, forms, tags in read_conllu(path):
            name = sentence_id or f"{split}-{total}"
            total += 1
            if not to_predict and is_withheld(forms):
                withheld += 1
                continue
            ids.add(name)
            try:
                label = _labels(tags, path, line)
            except DataError as error:
                if not to_predict:
                    raise
                unknown.update(error.unknown_labels)
                label = None
            yield Example(name, (tuple(forms),), label)
        ids.check(
            lambda: (
                (sentence_id or f"{split}-{number}", f"{path}:{line}")
                for number, (line, sentence_id, forms, _) in enumerate(read_conllu(path))
                if to_predict or not is_withheld(forms)
            )
        )
        _say_withheld(withheld, total, str(path))
        note_unknown(str(path), unknown)

    def hub_examples(self, hub_id: str, split: str) -> Iterator[Example]:
        configuration = f"udpos.{LANGUAGES[self.language]}" if self.language else None
        table, what = load_hub(hub_id, configuration, split, suffix=self.suffixes[0])
        yield from self.table_examples(table, what, split)

    def table_examples(self, table: Any, what: str, split: str) -> Iterator[Example]:
        missing = {"tokens", "pos_tags"} - set(table.column_names)
        if missing:
            raise DataError(f"{what} has no column {' and '.join(sorted(missing))}.", "Expected XTREME's columns.")
        tags = table.features["pos_tags"].feature
        numbers = [_label_number(tag, f"{what}, labels") for tag in tags.names] if hasattr(tags, "names") else None
        withheld = 0
        for number, row in enumerate(table):
            place = f"{what}, row {number}"
            marks = row["pos_tags"]
            words = tuple(str(word) for word in row["tokens"])
            if is_withheld(words):
                withheld += 1
                continue
            label = tuple(_label_number(tag, place) if numbers is None else numbers[tag] for tag in marks)
            if len(words) != len(label) or not words:
                raise DataError(f"{place}: {len(words)} tokens, {len(label)} tags.", "Check the data set.")
            yield Example(f"{split}-{number}", (words,), label)
        _say_withheld(withheld, len(table), what)

    def from_line(self, line: str, name: str) -> Example:
        if len(columns := line.split("\t")) == 10 and columns[0].isdigit():
            raise DataError(
                f"{name} has ten columns with tabs between them: it is CoNLL-U, not a sentence.",
                "Give a file whose name ends in .conllu: --file new.conllu.",
            )
        words = tuple(line.split())
        if not words:
            raise DataError(f"{name}: it has no word.", "Give a sentence, with spaces between its words.")
        return Example(name, (words,), None)

    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        words = right = missing = 0
        for gold_tags, tags in zip(gold, predicted, strict=True):
            words += len(gold_tags)
            missing += sum(tag is None for tag in tags)
            right += sum(a == b for a, b in zip(gold_tags, tags, strict=True))
        return {"accuracy": accuracy(right, words), "f1": xtreme_f1(gold, predicted), "cut_off_words": missing}


def xtreme_f1(gold: Sequence[Sequence[int]], predicted: Sequence[Sequence[int | None]]) -> float:
    """F1 over the chunks that seqeval 0.0.12 finds in raw tags. Today's seqeval computes it.

    Args:
        gold: One label number per word, one sequence per sentence.
        predicted: The same, None for a word without a prediction.
    """
    from seqeval.metrics import f1_score

    with warnings.catch_warnings():
        # seqeval warns that N-NOUN is not an IOB tag. If no word has a prediction, it warns that there are no chunks.
        warnings.simplefilter("ignore")
        return float(
            f1_score(
                [[PREFIXED[tag] for tag in tags] for tags in gold],
                [[NO_TAG if tag is None else PREFIXED[tag] for tag in tags] for tags in predicted],
            )
        )


WITHHELD = "_"
"""The form of every word in treebanks whose text may not be redistributed."""


def is_withheld(forms: Sequence[str]) -> bool:
    """XTREME's rule: leave out sentences in which all words, or all but one, are ``_``."""
    withheld = forms.count(WITHHELD)
    return withheld > 0 and withheld >= len(forms) - 1


def _say_withheld(count: int, total: int, what: str) -> None:
    if count:
        note(
            f"{what}: {count:,} of {total:,} sentences have {WITHHELD} in place of their words; they are left out, as "
            "XTREME does. The treebank's README says how to get the text."
        )


def read_conllu(
    path: Path, form: int = FORM_COLUMN, tag: int = UPOS_COLUMN
) -> Iterator[tuple[int, str | None, list[str], list[str]]]:
    """Each sentence of a CoNLL-U file: (line of its first word, sent_id or None, forms, tags).

    Args:
        path: The file.
        form: The column of the forms, from 0.
        tag: The column of the tags.

    Raises:
        DataError: For a line without ten columns, an empty form, a sentence that has only empty nodes, or bytes that
            are not UTF-8. The message names file and line.
    """
    forms: list[str] = []
    tags: list[str] = []
    sentence_id: str | None = None
    first_line = 0
    shared: dict[str, str] = {}  # equal forms are one object in memory
    for number, whole_line in enumerate(file_lines(path), 1):
        line = whole_line.rstrip("\r\n")
        if not line.strip():
            if first_line:
                yield _sentence(path, first_line, sentence_id, forms, tags)
            forms, tags, sentence_id, first_line = [], [], None, 0
            if len(shared) > SHARED:
                shared.clear()
        elif line.startswith("#"):
            key, equals, value = line[1:].partition("=")
            if equals and key.strip() == "sent_id":
                if forms:
                    raise DataError(
                        f"{path}:{number}: a sent_id in the middle of a sentence.",
                        "Sentences end with a blank line.",
                    )
                sentence_id = value.strip() or None
        else:
            columns = line.split("\t")
            if len(columns) != 10:
                raise DataError(
                    f"{path}:{number}: {len(columns)} columns, but CoNLL-U has 10, split by tabs: {line[:60]!r}",
                    "Check the line.",
                )
            first_line = first_line or number
            if columns[0].isascii() and columns[0].isdigit():
                if int(columns[0]) != len(forms) + 1:
                    raise DataError(
                        f"{path}:{number}: word {columns[0]}, but word {len(forms) + 1} was expected.",
                        "Words are numbered from 1, and sentences end with a blank line.",
                    )
                if not columns[form].strip():
                    raise DataError(f"{path}:{number}: word {columns[0]} has no form.", "Check the line.")
                forms.append(shared.setdefault(columns[form], columns[form]))
                tags.append(shared.setdefault(columns[tag], columns[tag]))
            elif not _is_range_or_empty_node(columns[0]):
                raise DataError(
                    f"{path}:{number}: {columns[0]!r} is not a CoNLL-U id (such as 7, 4-5 or 8.1).", "Check the line."
                )
    if first_line:
        yield _sentence(path, first_line, sentence_id, forms, tags)


def _sentence(
    path: Path, first_line: int, sentence_id: str | None, forms: list[str], tags: list[str]
) -> tuple[int, str | None, list[str], list[str]]:
    if not forms:
        raise DataError(f"{path}:{first_line}: a sentence without words.", "Check the file.")
    return first_line, sentence_id, forms, tags


def _is_range_or_empty_node(text: str) -> bool:
    for mark in "-.":
        left, found, right = text.partition(mark)
        if found and left.isdigit() and right.isdigit():
            return True
    return False


def _labels(tags: Sequence[str], path: Path, line: int) -> tuple[int, ...] | None:
    """Label numbers; None if the whole sentence is untagged (``_``), as in a blind test file."""
    if all(tag == "_" for tag in tags):
        return None
    try:
        return tuple([LABEL_NUMBER[tag] for tag in tags])
    except KeyError:
        word, tag = next((i, tag) for i, tag in enumerate(tags, 1) if tag not in LABEL_NUMBER)
        raise _unknown_tag(tag, f"{os.fspath(path)}, sentence at line {line}, word {word}") from None


def _label_number(tag: str, place: str) -> int:
    number = LABEL_NUMBER.get(tag)
    if number is None:
        raise _unknown_tag(tag, place)
    return number


def _unknown_tag(tag: str, place: str) -> DataError:
    remedy = f"The UPOS tags are {' '.join(UPOS)}."
    return DataError.unknown_label(f"{place}: unknown tag {tag!r}.", remedy, column="UPOS", labels=(tag,))
