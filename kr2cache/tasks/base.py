"""What every task has in common."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kr2cache.errors import ConfigError, DataError, MissingSplitError, unknown_name
from kr2cache.system.console import count_text, note
from kr2cache.tasks.files import (
    NAMES_OF_SPLITS,
    NAMES_SHOWN,
    SPLIT_FILES,
    SPLITS,
    Names,
    contents,
    data_path,
    is_folder,
    is_saved,
    kind_text,
    missing_split,
    say_unusual,
    split_files,
    split_of,
    suffix_of,
    suffixes_text,
)
from kr2cache.tasks.hub import load_saved
from kr2cache.tasks.repeats import repeated

Kind = Literal["tagging", "classification", "multilabel", "regression", "choice", "text"]
"""What the labels of a task are. ``text`` has none: its states can be extracted, and nothing can be trained."""
Head = Literal["token", "sequence", "choice"]
HEADS: Mapping[Kind, Head] = {
    "tagging": "token",
    "classification": "sequence",
    "multilabel": "sequence",
    "regression": "sequence",
    "choice": "choice",
}
"""The head of a reader for each kind that has labels."""
Label = tuple[int, ...] | int | float | None
"""The gold label of an example. Tagging: the number of each word's label. Classification and choice: one number.
Multilabel: the numbers of all its labels, in rising order. Regression: the value itself. None if the data has none."""
Prediction = list[int | None] | tuple[int, ...] | int | float
"""The same, predicted. Tagging: a list, with None for a word without a token."""


def split_name(name: str) -> str:
    """``train``, ``dev`` or ``test``; ``valid`` and ``validation`` are ``dev``."""
    for split, names in SPLIT_FILES.items():
        if name in names:
            return split
    raise unknown_name("split", name, SPLITS)


@dataclass(frozen=True, slots=True)
class Example:
    """One example as the task sees it, before any tokenizer."""

    id: str
    texts: tuple[tuple[str, ...], ...]
    """Each text is one sequence for the encoder: its words, or its segments. One text; for multiple choice one text
    per choice."""
    label: Label

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        """Ids of its sequences: its own id, or ``ID#0``, ``ID#1``, ... for several sequences."""
        if len(self.texts) == 1:
            return (self.id,)
        return tuple(f"{self.id}#{choice}" for choice in range(len(self.texts)))


class Task(ABC):
    """A data set, with its encoding and its scores."""

    name: str
    about: str
    """A short description, for people who look for a task."""
    kind: Kind
    labels: tuple[str, ...]
    words: bool
    """Whether texts are lists of words (the tokenizer then aligns its tokens with them)."""
    template: str
    """In one line, which texts of an example become tokens, and in which order. Part of a cache's provenance."""
    metric: str
    """The metric that decides which epoch is best, and that tables show first."""
    counts: Mapping[str, str] = {}
    """The scores that are counts, not fractions: name to the title of its column."""
    suffixes: tuple[str, ...]
    """File suffixes: ``.conllu``."""
    labelled_by: str = "label"
    """The place of the gold label in its files, in words, for errors."""
    releases: tuple[str, ...] = ()
    """File names of its official release, as patterns with ``{split}``."""
    parts: tuple[str, ...] = ()
    """File names of a release that divides one split into several files, as patterns."""
    left_out: str = ""
    """The parts of a file that are not examples, in words, for errors."""
    language: str | None = None
    """The language of the task, if its data exists in several."""
    hub_splits: Mapping[str, str] = {}
    """The names of the splits of its own data set on the hub, where they are not the usual ones."""

    @property
    def conllu(self) -> tuple[int, str] | None:
        """The column of CoNLL-U that holds its labels, from 0, and the key in it; None if it has none."""
        return None

    @property
    def head(self) -> Head:
        """The head of its readers.

        Raises:
            ConfigError: If the task has no labels.
        """
        if self.kind not in HEADS:
            raise ConfigError(
                f"Task {self.name!r} is of kind {self.kind}: it has no labels, so nothing can be trained on it.",
                f"Give a task of another kind: {', '.join(HEADS)}.",
            )
        return HEADS[self.kind]

    def declaration(self) -> dict[str, Any] | None:
        """The words that declare the task, with all its labels, as a plain table. A run records it, so that ``predict``
        needs no ``kr2cache.toml``. None for a task that its name alone describes."""
        return None

    def with_labels_of(self, data: str | None) -> Task:
        """The task with its labels known: the declaration of a task may leave them to the train split of ``data``.

        Raises:
            DataError: If the train split is malformed or has no labels.
        """
        return self

    @abstractmethod
    def file_examples(self, path: Path, split: str) -> Iterator[Example]:
        """The examples of one file of the task's original format, one after the other.

        Raises:
            DataError: If the file is malformed, or an id occurs twice. The message names the file and the line.
        """

    def read_unlabelled(self, path: Path, split: str) -> list[Example]:
        """The examples that ``predict`` labels: those of all rows, with or without a gold label. A note names labels
        that are none of the task's; such an example counts as one without a gold label."""
        return list(self.file_examples(path, split))

    @abstractmethod
    def hub_examples(self, hub_id: str, split: str) -> Iterator[Example]:
        """The examples of one split of a data set on the hub (or in its cache on this machine), one after the other."""

    def table_examples(self, table: Any, what: str, split: str) -> Iterator[Example]:
        """The examples of a ``datasets.Dataset``, from the hub or from disk.

        Args:
            what: Its name, for errors.
        """
        raise DataError(
            f"{what}: task {self.name!r} reads no data sets that were saved to disk.",
            f"Give files that end in {suffixes_text(self.suffixes)}.",
        )

    @property
    @abstractmethod
    def default_data(self) -> str | None:
        """The hub data set or folder that this task is read from when no ``--data`` is given."""

    @abstractmethod
    def from_line(self, line: str, name: str) -> Example:
        """One example from a plain line: words, or texts with tabs between them.

        Args:
            name: The example's id; errors name it too.

        Raises:
            DataError: If the line lacks a text that the task needs.
        """

    @abstractmethod
    def score(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, float]:
        """The task's metrics, as fractions, and its ``counts``.

        Args:
            gold: One label per example.
            predicted: One ``Prediction`` per example.
        """

    def named(self, label: Label | Prediction) -> Any:
        """A label as people read it, and as files have it: its name, a list of names for several (None for a word
        without a prediction), the value of a regression. None without gold.
        """
        if label is None or self.kind == "regression":
            return label
        if isinstance(label, (list, tuple)):
            return [None if one is None else self.labels[one] for one in label]
        return self.labels[int(label)]

    # Reading --------------------------------------------------------------------------------------------------------

    def read(self, split: str, data: str | None, limit: int | None = None) -> list[Example]:
        """The examples of a split, as ``examples`` gives them."""
        return list(self.examples(split, data, limit))

    def examples(self, split: str, data: str | None, limit: int | None = None) -> Iterator[Example]:
        """The examples of a split, one after the other, in the data's order.

        The whole split is read and checked, even if ``limit`` is smaller. Some faults, such as a duplicate id, are
        found only at the end: do not use the examples before all of them have come.

        Args:
            split: ``train``, ``dev`` or ``test``.
            data: A folder, a file, or a hub id; None for the task's own hub data set.
            limit: Only the first ``limit`` examples; None for all.

        Raises:
            MissingSplitError: If the data has no such split. The message names the files that were looked for.
            DataError: If the split is malformed or empty.
        """
        path = self.path_of(data)
        count = 0
        for example in (
            self._path_examples(path, split) if path is not None else self.hub_examples(self._hub_id(data), split)
        ):
            count += 1
            if limit is None or count <= limit:
                yield example
        if not count:
            only = f", or hold only {self.left_out}" if self.left_out else ""
            read = "" if path is None else f" ({', '.join(one.name for one in self._files(path, split)[:NAMES_SHOWN])})"
            raise DataError(
                f"The {split} split of {self.corpus(data)} holds no example.",
                f"Check its files{read}: they are empty{only}.",
            )

    def corpus(self, data: str | None) -> str:
        """The name of the data: the folder's or file's own name, or the hub id."""
        path = self.path_of(data)
        return path.resolve().name if path is not None else self._hub_id(data)

    def path_of(self, data: str | None) -> Path | None:
        """The folder or file that ``data`` names; None for a data set of the hub. Without ``data``, only a task that
        words declare can have a folder: other tasks' own data is on the hub, whatever the working folder holds.

        Raises:
            DataError: If it must be a folder or file, but does not exist.
        """
        if data is None and self.declaration() is not None:
            data = self.default_data
        return data_path(data)

    def _hub_id(self, data: str | None) -> str:
        hub_id = data or self.default_data
        if hub_id is None:
            raise ConfigError(
                f"Task {self.name!r} needs --data: a folder with train{self.suffixes[0]}, dev{self.suffixes[0]}, ...",
                "Or write data under [defaults] in kr2cache.toml, or choose a task with its own data, such as udpos-de "
                "(kr2cache tasks lists them).",
            )
        return hub_id

    def check_data(self, split: str, data: str | None) -> None:
        """Check that the files of a split exist, without reading them.

        Raises:
            MissingSplitError: If a folder has no such split, or a file is another one.
            KR2CacheError: If ``data`` is neither a folder, nor a file of this task, nor the id of a hub data set.
        """
        path = self.path_of(data)
        if path is None:
            self._hub_id(data)
        else:
            self._files(path, split)

    def check_has_splits(self, data: str | None) -> None:
        """Check that the data can have several splits, as a training needs.

        Raises:
            MissingSplitError: If it is one file.
        """
        path = self.path_of(data)
        if path is not None and not is_folder(path):
            suffix = suffix_of(path)
            raise MissingSplitError(
                f"{path} is {kind_text(path)}, but a training also needs a dev or a test split with labels to score "
                "on.",
                f"Put some of its examples into another one: train{suffix} and dev{suffix} (and test{suffix}) in one "
                "folder. Give this folder as --data.",
            )

    def source_files(self, split: str, data: str | None) -> dict[str, Path] | None:
        """All files that decide the examples of a split, by their path below the folder. None if they are not known,
        as for a data set of the hub.
        """
        path = self.path_of(data)
        if path is None:
            return None
        folder = path if is_folder(path) else path.parent
        files = [file for one in self._files(path, split) for file in (*contents(one), *self.beside(one))]
        return {file.relative_to(folder).as_posix(): file for file in files}

    def beside(self, path: Path) -> list[Path]:
        """The files that ``file_examples`` reads together with ``path``, if they are there: labels, for example."""
        return []

    @property
    def _names(self) -> Names:
        return Names(
            suffixes=self.suffixes,
            releases=self.releases,
            parts=self.parts,
            language=self.language or "",
            hub_splits={name: own for name, own in self.hub_splits.items() if own not in NAMES_OF_SPLITS},
        )

    def _files(self, folder: Path, split: str) -> list[Path]:
        """The files of a split in a folder; or the file itself, if it is one and not a folder."""
        if not is_folder(folder):
            self._check_file(folder, split)
            return [folder]
        files = split_files(folder, split, self._names)
        if not files:
            say_unusual(folder, split, self._names, files)
            raise missing_split(folder, split, self._names)
        return files

    def _check_file(self, path: Path, split: str) -> None:
        """Check that a file by itself can be this split of the task."""
        if not is_saved(path) and suffix_of(path) not in self.suffixes:
            other = (
                f" Any other file with one text a line: --data - < {path}"
                if self.kind == "text"
                else " For the states of plain text, without labels: --task text"
            )
            raise DataError(
                f"{path} is no file of task {self.name!r}, whose files end in {suffixes_text(self.suffixes)}.",
                f"Give the folder of the saved data set: {path.parent}"
                if is_saved(path.parent)
                else f"Give such a file, or a folder of them.{other}",
            )
        if (own := split_of(path)) != split:
            raise MissingSplitError(
                f"{path} is {kind_text(path)}, and is read as the {own} split, not as {split}.",
                f"Put {split} in its name, or give a folder with {' and '.join(self._names.looked_for(split)[:1])}.",
            )

    def _path_examples(self, folder: Path, split: str) -> Iterator[Example]:
        files = self._files(folder, split)
        if is_folder(folder):
            say_unusual(folder, split, self._names, files)
        if len(files) == 1 and files[0].parent in (folder, folder.parent):
            if is_saved(files[0]):
                yield from self.table_examples(load_saved(files[0]), str(files[0]), split)
            else:
                yield from self.file_examples(files[0], split)
            return
        hashes = []
        for path in files:
            hashes.append(array("q"))
            for one in self.file_examples(path, split):
                hashes[-1].append(hash((one.id, one.texts)))
                # XTREME joins all treebanks of a language, and sent_ids repeat between treebanks.
                yield Example(f"{path.name}/{one.id}", one.texts, one.label)
        if (twice := repeated(hashes)) is not None:
            count, first, other, number = twice
            name = next(itertools.islice(self.file_examples(files[number], split), first, None)).id
            note(
                f"{folder}, {split} split: {count_text(count, 'example')} with the same id and text in two files "
                f"(first: {name!r} in {files[other].name} and {files[number].name}). If a file is a copy or part of "
                "another, remove one of them."
            )


LABELS_SHOWN = 20
"""The most labels in one message."""


def note_unknown(what: str, labels: set[str]) -> None:
    """A note about labels of texts to predict that are none of the task's.

    Args:
        what: The file that has them.
    """
    if labels:
        shown = ", ".join(sorted(labels)[:LABELS_SHOWN])
        note(f"{what}: the reader does not know these labels, so there is no comparison with them: {shown}.")


def accuracy(right: NDArray[np.bool_] | int, total: int) -> float:
    """The fraction of right answers; 0 if ``total`` is 0."""
    return float(np.sum(right)) / total if total else 0.0
