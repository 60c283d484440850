"""Text in and labels out: the examples that a reader is given, and how its predictions are written down."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kr2cache.errors import ConfigError, DataError
from kr2cache.prediction.predict import Predicted
from kr2cache.system import utf8
from kr2cache.tasks import Example, Task

# What goes in --------------------------------------------------------------------------------------------------------


def read_lines(task: Task, lines: Iterable[str], name: str = "line") -> list[Example]:
    """Examples that someone typed, one a line: words split by spaces, or texts split by tabs. Blank lines are skipped.

    Args:
        name: Ids are this and the number of the line, from 1: ``line-1``.

    Raises:
        DataError: For a line that is not UTF-8 or has not the texts the task needs, or nothing but blank lines.
    """
    examples = []
    for number, line in enumerate(lines, 1):
        place = f"{name}-{number}"
        utf8.check(line, place)
        text = line.removeprefix(utf8.BYTE_ORDER_MARK) if number == 1 else line
        if text.strip():
            examples.append(task.from_line(text, place))
    if not examples:
        raise DataError("There is no text to label.", "Give one example a line.")
    return examples


def typed_lines(raw_lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Lines of text as ``utf8.lines`` gives them, whichever way they end (``\\n``, ``\\r\\n``, ``\\r``)."""
    for line in utf8.lines(raw_lines, name):
        yield from io.StringIO(line, newline=None)


def read_file(task: Task, path: Path) -> list[Example]:
    """The examples of a file: in the task's own format by its suffix, else one a line.

    Gold labels are kept where the file has them.

    Raises:
        DataError: If it is missing, empty, or not what its suffix says; naming file and line.
    """
    try:
        if path.suffix in task.suffixes:
            examples = task.read_unlabelled(path, path.stem)
        else:
            with path.open("rb") as file:
                return read_lines(task, typed_lines(file, str(path)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if not examples:
        raise DataError(f"{path} holds no example.", "Check the file.")
    return examples


# What comes out ------------------------------------------------------------------------------------------------------


def score(task: Task, examples: Sequence[Example], predicted: Sequence[Predicted]) -> dict[str, float] | None:
    """The task's metrics; None unless every example has a gold label: a score over a part is not the file's."""
    if not examples or any(example.label is None for example in examples):
        return None
    numbers = {label: number for number, label in enumerate(task.labels)}

    def numbered(one: Predicted) -> Any:
        if isinstance(one.predicted, list):
            return [None if tag is None else numbers[tag] for tag in one.predicted]
        return numbers[one.predicted]

    return task.score([example.label for example in examples], [numbered(one) for one in predicted])


UNKNOWN = "_"
"""What CoNLL-U writes where it knows nothing."""


def as_text(task: Task, example: Example, predicted: Predicted) -> str:
    """One line for people: ``Das/DET ist/AUX``, ``word/_`` where a word has no label; else label, probability and text
    (of several choices the one that was chosen)."""
    if isinstance(predicted.predicted, list):
        tags = [UNKNOWN if tag is None else tag for tag in predicted.predicted]
        return " ".join(f"{_one_line(word)}/{tag}" for word, tag in zip(example.texts[0], tags, strict=True))
    assert predicted.scores is not None, "labels of whole examples have probabilities"
    label = predicted.predicted
    text = example.texts[task.labels.index(label) if task.head == "choice" else 0]
    return f"{label}  {predicted.scores[label]:.2f}  {' | '.join(map(_one_line, text))}"


def conllu(examples: Sequence[Example], predicted: Sequence[Predicted]) -> str:
    """A CoNLL-U file of tagged sentences: forms and UPOS. Whatever else its columns are for is unknown, so ``_``.

    Raises:
        ConfigError: For predictions of a task that does not tag words.
    """
    sentences = []
    for example, one in zip(examples, predicted, strict=True):
        if not isinstance(one.predicted, list):
            raise ConfigError("CoNLL-U holds tagged words; these predictions are labels of whole examples.")
        forms = [_one_line(word) or UNKNOWN for word in example.texts[0]]
        lines = [f"# sent_id = {_one_line(example.id)}", f"# text = {' '.join(forms)}"]
        for number, (form, tag) in enumerate(zip(forms, one.predicted, strict=True), 1):
            columns = [str(number), form, UNKNOWN, UNKNOWN if tag is None else tag, *[UNKNOWN] * 6]
            lines.append("\t".join(columns))
        sentences.append("\n".join(lines) + "\n\n")
    return "".join(sentences)


BREAKS = re.compile("[ \t-\r\x1c-\x1f\x85\u2028\u2029]+")
"""What would end a line or a column, and several spaces, at which lenient parsers split columns. A no-break space is
part of a word."""


def _one_line(text: str) -> str:
    return BREAKS.sub(" ", text).strip(" ")
