"""``[tasks.NAME]``: the words that declare a task, and their checks.

A declaration is a plain table, as ``kr2cache.toml`` and the ``config.json`` of a run hold it. ``README.md`` of this
folder explains the words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from kr2cache.errors import ConfigError, unknown_name
from kr2cache.tasks.base import Kind
from kr2cache.tasks.columns import conllu_column
from kr2cache.tasks.files import SPLITS
from kr2cache.tasks.metrics import SCHEMES, metric_names

KINDS: tuple[Kind, ...] = get_args(Kind)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names that a folder can have on every system."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The words of one task; empty for those that are not given."""

    kind: Kind
    about: str = ""
    text: tuple[str, ...] = ()
    """One column, or two: the segments of a pair."""
    context: str = ""
    """For choice: the column of the text before every choice."""
    choices: tuple[str, ...] | str = ()
    """For choice: one column for each choice, or one column with a list."""
    words: str = ""
    """For tagging: a column with lists of words."""
    label: tuple[str, ...] | str = ""
    """The column of the gold labels. For multilabel it may be several columns of 0 and 1."""
    labels: tuple[str, ...] = ()
    """The names of all labels. Empty for those of the train split."""
    derived: bool = False
    """Whether ``labels`` are those of the train split, in sorted order. A run records it; users do not write it."""
    id: str = "id"
    """The column of the ids, if the data has it."""
    unlabelled: str = ""
    """What stands in the place of a label that is not known."""
    skip_empty: bool = False
    """Whether rows with an empty text are left out."""
    scheme: str = ""
    """For tagging: how labels mark the words of an entity."""
    metric: str = ""
    """The metric that decides; empty for the first of the kind."""
    columns: tuple[int, ...] | tuple[str, ...] = ()
    """Of files that do not name their columns. Tagging: those of word and label, from 0. Otherwise all names."""
    quoted: bool = False
    """Whether TSV without names of columns has quotes as CSV has them."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Other names that the data may have for columns, and the names that are used here."""
    rename_labels: Mapping[str, str] = field(default_factory=dict)
    """The same for labels."""
    language: str = ""
    """Of data in several languages, the one that is read. Rows whose column ``language`` has another one are left out.
    Words with this prefix (``de:Haus``) lose it."""
    files: tuple[str, ...] = ()
    """Patterns of file names, with ``{split}``."""
    data: str = ""
    """The value of ``--data`` where none is given."""
    configuration: str = ""
    """Of the hub data set ``data``, like the next two."""
    revision: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    """The names that the data set has for train, dev and test."""

    def recorded(self) -> dict[str, Any]:
        """The words that decide what examples and predictions are, as a plain table. ``declared`` reads it again."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in WHERE}
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value}
        return {name: value for name, value in given.items() if (name, value) != ("id", "id")}


WHERE = ("about", "files", "data", "configuration", "revision", "splits")
"""Words that say where the data is, or what it is about: a run of the same data does not depend on them."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_text, value.values()))


def _is_label(value: Any) -> bool:
    return isinstance(value, (bool, int)) or _is_text(value)


@dataclass(frozen=True)
class Word:
    """What a word of a declaration may be."""

    example: str
    """How to write it, for errors."""
    fits: Callable[[Any], bool] = _is_text


WORDS: Mapping[str, Word] = {
    "kind": Word('kind = "classification"'),
    "about": Word('about = "is a review good or bad?"'),
    "text": Word(
        'text = "review" (the column of the text), or text = ["title", "body"] (the two segments of a pair)',
        lambda value: _is_text(value) or (_are_texts(value) and len(value) <= 2),
    ),
    "context": Word('context = "question" (the column of the text before every choice)'),
    "choices": Word(
        'choices = ["a", "b"] (one column for each choice), or choices = "endings" (a column with a list)',
        lambda value: _is_text(value) or (_are_texts(value) and len(value) >= 2),
    ),
    "words": Word('words = "tokens" (a column with lists of words)'),
    "label": Word('label = "stars" (the column of the gold labels)'),
    "labels": Word(
        'labels = ["bad", "good"], all labels, each once; without it, those of the train split',
        lambda value: (
            isinstance(value, list)
            and all(map(_is_label, value))
            and len(value) >= 2
            and len(set(map(label_name, value))) == len(value)
        ),
    ),
    "id": Word('id = "id" (the column of the ids)'),
    "scheme": Word('scheme = "BIO"'),
    "metric": Word('metric = "accuracy"'),
    "columns": Word(
        'columns = ["sentence", "label"] (the names of all columns, for files without a line of names)', _are_texts
    ),
    "quoted": Word("quoted = true", _is_switch),
    "unlabelled": Word('unlabelled = "-" (what stands in the place of a label that is not known)', _is_label),
    "skip_empty": Word("skip_empty = true", _is_switch),
    "rename": Word('rename = {"Satz" = "sentence"} (the name in the file = the name used here)', _are_names),
    "rename_labels": Word(
        'rename_labels = {"contradictory" = "contradiction"} (the label in the file = the label used here)', _are_names
    ),
    "language": Word('language = "de" (what the column language has in the rows that are read)'),
    "files": Word(
        'files = ["{split}-de.tsv"]', lambda value: _are_texts(value) and all("{split}" in one for one in value)
    ),
    "data": Word('data = "data/reviews"'),
    "configuration": Word('configuration = "de" (of the hub data set that data names)'),
    "revision": Word('revision = "main" (of the hub data set that data names)'),
    "splits": Word(
        'splits = {dev = "validation_matched"} (the name used here = the name on the hub)',
        lambda value: _are_names(value) and set(value) <= set(SPLITS),
    ),
}
TAGGED_COLUMNS = Word(
    "columns = [0, 3] (of the word and its label, from 0; -1 is the last one)",
    lambda value: (
        isinstance(value, list)
        and len(set(value)) == len(value) == 2
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= -1 for one in value)
    ),
)
"""``columns`` of a tagging task."""
SEVERAL_LABEL_COLUMNS = Word(
    'label = "emotions" (a column with a list of labels), or label = ["anger", "joy"] (a column of 0 and 1 for each)',
    lambda value: _is_text(value) or (_are_texts(value) and len(value) >= 2),
)
"""``label`` of a multilabel task."""
ANY_KIND = (
    "about",
    "id",
    "skip_empty",
    "columns",
    "quoted",
    "rename",
    "language",
    "files",
    "data",
    "configuration",
    "revision",
    "splits",
)
OF_KIND: Mapping[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tagging": ((), ("words", "label", "labels", "rename_labels", "scheme", "metric")),
    "classification": (("text", "label"), ("labels", "rename_labels", "unlabelled", "metric")),
    "multilabel": (("text", "label"), ("labels", "rename_labels", "metric")),
    "regression": (("text", "label"), ("unlabelled", "metric")),
    "choice": (("choices", "label"), ("context", "labels", "rename_labels", "unlabelled", "metric")),
    "text": (("text",), ()),
}
"""The words that a kind needs, and those that it may have."""


def label_name(value: Any) -> str:
    """The name of a label that is a text, a whole number, or true or false."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def declared(name: str, table: Mapping[str, Any]) -> Declaration:
    """Check a declaration.

    Args:
        name: The task's.
        table: The words and their values.

    Raises:
        ConfigError: For a name that no folder can have, a word that is missing, or a value of another type.
        UnknownNameError: For a word, kind, metric or scheme that does not exist.
    """
    where = f"[tasks.{name}]"
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} cannot be the name of a task, because folders are named after tasks.",
            "Use letters, digits, hyphens, underscores and dots; a letter or digit comes first.",
        )
    derived = table.get("derived") is True
    table = {word: value for word, value in table.items() if word != "derived"}
    kind = table.get("kind")
    if kind is None:
        raise ConfigError(f"{where} has no kind.", f"Write kind = and one of {', '.join(KINDS)}, in quotes.")
    if kind not in KINDS:
        raise unknown_name(f"kind in {where}:", str(kind), KINDS)
    needed, optional = OF_KIND[kind]
    for word in table:
        if word not in (known := ("kind", *needed, *optional, *ANY_KIND)):
            if word in WORDS:
                raise ConfigError(
                    f"{where}: a task of kind {kind} has no {word}.", f"The words of this kind: {', '.join(known)}."
                )
            raise unknown_name(f"word in {where}:", word, known)
    for word in needed:
        if word not in table:
            raise ConfigError(f"{where} has no {word}.", f"Write {_word(kind, word).example}.")
    for word, value in table.items():
        if not _word(kind, word).fits(value):
            raise ConfigError(f"{where}: {word} = {value!r} cannot be used.", f"Write {_word(kind, word).example}.")
    return _declaration(where, {word: _plain(word, value) for word, value in table.items()} | {"derived": derived})


def _word(kind: Kind, word: str) -> Word:
    own = {("multilabel", "label"): SEVERAL_LABEL_COLUMNS, ("tagging", "columns"): TAGGED_COLUMNS}
    return own.get((kind, word), WORDS[word])


def _plain(word: str, value: Any) -> Any:
    if word == "text" and isinstance(value, str):
        return (value,)
    if word == "labels":
        return tuple(map(label_name, value))
    if word == "unlabelled":
        return label_name(value)
    return tuple(value) if isinstance(value, list) else value


def _declaration(where: str, words: dict[str, Any]) -> Declaration:
    """The declaration, once each word by itself is right."""
    made = Declaration(**words)
    complete = made.columns or (made.label and (made.words or conllu_column(str(made.label))))
    if made.kind == "tagging" and not complete:
        raise ConfigError(
            f"{where} has no {'words' if made.label else 'label'}.",
            f'Write {WORDS["words"].example} and label = "tags"; or columns = [0, 3] for files with a word a line; or '
            'label = "XPOS" or label = "MISC.NER" for CoNLL-U.',
        )
    if made.scheme and made.scheme not in SCHEMES:
        raise unknown_name(f"scheme in {where}:", made.scheme, SCHEMES)
    if made.metric and made.metric not in (known := metric_names(made.kind, made.scheme, made.labels)):
        raise unknown_name(f"metric in {where}:", made.metric, known)
    if isinstance(made.label, tuple) and made.labels and len(made.labels) != len(made.label):
        raise ConfigError(
            f"{where}: {len(made.label)} columns of labels, but {len(made.labels)} labels.",
            "Give a label for each column, or leave labels out: the columns' names are then the labels.",
        )
    if made.labels and (strange := set(made.rename_labels.values()) - set(made.labels)):
        raise unknown_name(f"label in rename_labels of {where}:", min(strange), made.labels)
    if made.choices and isinstance(made.choices, tuple) and made.labels and len(made.labels) != len(made.choices):
        raise ConfigError(
            f"{where}: {len(made.choices)} choices, but {len(made.labels)} labels.",
            "Give a label for each choice, in their order, or leave labels out: they are then 0, 1, and so on.",
        )
    return made
