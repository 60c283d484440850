"""Text in and labels out: read the examples that a reader labels, and format its predictions."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kr2cache.errors import ConfigError, DataError
from kr2cache.prediction.predict import Predicted
from kr2cache.system import utf8
from kr2cache.system.utf8 import file_lines
from kr2cache.tasks import Example, Task
from kr2cache.tasks.columns import DOCUMENT
from kr2cache.tasks.files import DATA_SUFFIXES, is_saved, names_split, suffix_of, suffixes_text
from kr2cache.training.evaluate import scores

# Input --------------------------------------------------------------------------------------------------------


def read_lines(task: Task, lines: Iterable[str], name: str = "line") -> list[Example]:
    """Examples from plain lines, one example per line: words split by spaces, or texts split by tabs. Blank lines are
    skipped.

    Args:
        name: Ids are this name and the line number, from 1: ``line-1``.

    Raises:
        DataError: If a line is not UTF-8, lacks a text that the task needs, or if all lines are blank.
    """
    examples = []
    for number, line in enumerate(lines, 1):
        place = f"{name}-{number}"
        utf8.check(line, place)
        text = line.removeprefix(utf8.BYTE_ORDER_MARK) if number == 1 else line
        if text.strip():
            examples.append(task.from_line(text, place))
    if not examples:
        raise DataError("There is no text to label.", "Give one example per line.")
    return examples


def typed_lines(raw_lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Decoded lines, with any line ending (``\\n``, ``\\r\\n``, ``\\r``)."""
    for line in utf8.lines(raw_lines, name):
        yield from io.StringIO(line, newline=None)


def read_file(task: Task, path: Path) -> list[Example]:
    """The examples of a file: in the task's own format if the suffix matches, else one example per line. The suffix of
    another format is refused. The folder of a ``datasets.Dataset`` that was saved to disk is read as well.

    Gold labels are kept if the file has them.

    Raises:
        DataError: If the file is missing or empty, or its content does not fit its suffix. The message names the file
            and the line.
    """
    suffix = suffix_of(path).lower()
    if suffix in DATA_SUFFIXES and suffix not in (".txt", *task.suffixes):
        raise DataError(
            f"{path} is no file of task {task.name}, whose files end in {suffixes_text(task.suffixes)}.",
            "Write it in this format. A file with one example per line ends in .txt.",
        )
    try:
        if is_saved(path) or (suffix in task.suffixes and not _is_plain(path, suffix, task)):
            examples = task.read_unlabelled(path, path.stem)
        else:
            with path.open("rb") as file:
                return read_lines(task, typed_lines(file, str(path)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if not examples:
        raise DataError(f"{path} holds no example.", "Check the file.")
    return examples


def _is_plain(path: Path, suffix: str, task: Task) -> bool:
    """Whether a file that may be of the task's format has one example per line. Without a suffix, a split's name says
    that it is no such file: ``eng.testb``."""
    if suffix == "" and not names_split(path):
        return True
    return suffix in ("", ".txt") and task.words and _is_sentences(path)


def _is_sentences(path: Path) -> bool:
    """Whether a text file holds a sentence a line, not a word a line with its columns.

    Raises:
        DataError: If it may be either.
    """
    fields: set[int] = set()
    longest = block = blank = 0
    tabs = True
    for line in file_lines(path):
        cells = line.split()
        block = block + 1 if cells else 0
        longest, blank = max(longest, block), blank + (not cells)
        if cells and cells[0] != DOCUMENT and not line.startswith("#"):
            fields.add(len(cells))
            tabs = tabs and "\t" in line.strip("\r\n")
    if tabs or fields == {1} or (len(fields) == 1 and blank and longest > 1):
        return False
    if len(fields) > 1 and (not blank or longest == 1):
        return True
    raise DataError(
        f"{path} may hold a sentence a line or a word a line.",
        "For words with columns, let its name end in .conll; for sentences, give it as standard input: --file -",
    )


# Output ------------------------------------------------------------------------------------------------------


def score(task: Task, examples: Sequence[Example], predicted: Sequence[Predicted]) -> dict[str, float] | None:
    """The task's metrics. None unless every example has a gold label: the score of a part is not the score of the
    file."""
    if not examples or any(example.label is None for example in examples):
        return None
    numbers: dict[str | None, int | None] = {None: None} | {label: number for number, label in enumerate(task.labels)}

    def numbered(label: Any) -> Any:
        if task.kind == "multilabel":
            return tuple(numbers[one] for one in label)
        if isinstance(label, list):
            return [numbers[tag] for tag in label]
        return numbers[label] if isinstance(label, str) else label

    return scores(
        task, [example.label for example in examples], [numbered(prediction.predicted) for prediction in predicted]
    )


UNKNOWN = "_"
"""CoNLL-U's sign for an unknown value."""
NO_LABEL = "no label"
"""In place of labels, if an example has none."""


def as_text(task: Task, example: Example, predicted: Predicted) -> str:
    """One line to read: ``Das/DET ist/AUX`` for tagging, ``word/_`` for a word without a label; else the label, its
    probability and the text (with several choices, the chosen text). Multilabel: each label with its probability.
    Regression: the value and the text.
    """
    answer, probabilities = predicted.predicted, predicted.scores or {}
    if task.kind == "tagging":
        assert isinstance(answer, list), "one label per word"
        tags = [UNKNOWN if tag is None else tag for tag in answer]
        return " ".join(f"{_one_line(word)}/{tag}" for word, tag in zip(example.texts[0], tags, strict=True))
    text = example.texts[task.labels.index(str(answer)) if task.kind == "choice" else 0]
    if isinstance(answer, float):
        said = f"{answer:.3f}"
    elif isinstance(answer, list):
        said = ", ".join(f"{label} {probabilities[str(label)]:.2f}" for label in answer) or NO_LABEL
    else:
        said = f"{answer}  {probabilities[answer]:.2f}"
    return f"{said}  {' | '.join(map(_one_line, text))}"


def conllu(task: Task, examples: Sequence[Example], predicted: Sequence[Predicted]) -> str:
    """A CoNLL-U file of tagged sentences: forms, and labels in the column of the task. All other columns are unknown
    (``_``).

    Raises:
        ConfigError: If the task does not tag words, or its labels are of no column of CoNLL-U.
    """
    if task.kind == "tagging" and task.conllu is None:
        raise ConfigError(
            f"The labels of task {task.name} are of no column of CoNLL-U.",
            'Leave out --conllu, or give --json. A declared task has such a column with label = "XPOS" or "MISC.NER".',
        )
    column, key = task.conllu or (0, "")
    sentences = []
    for example, prediction in zip(examples, predicted, strict=True):
        if not isinstance(prediction.predicted, list) or prediction.scores is not None:
            raise ConfigError("CoNLL-U holds tagged words; these predictions are labels of whole examples.")
        forms = [_one_line(word) or UNKNOWN for word in example.texts[0]]
        lines = [f"# sent_id = {_one_line(example.id)}", f"# text = {' '.join(forms)}"]
        for number, (form, tag) in enumerate(zip(forms, prediction.predicted, strict=True), 1):
            columns = [str(number), form, *[UNKNOWN] * 8]
            if tag is not None:
                columns[column] = f"{key}={tag}" if key and tag != UNKNOWN else tag
            lines.append("\t".join(columns))
        sentences.append("\n".join(lines) + "\n\n")
    return "".join(sentences)


BREAKS = re.compile("[ \t-\r\x1c-\x1f\x85\u2028\u2029]+")
"""Characters that would end a line or a column, and runs of spaces, where lenient parsers split columns. A no-break
space is part of a word."""


def _one_line(text: str) -> str:
    return BREAKS.sub(" ", text).strip(" ")
