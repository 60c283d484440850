"""Text that comes from outside: files, standard input, arguments. All of it passes here, so all of it is checked alike:
it is UTF-8, and a byte order mark at its start is no part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from kr2cache.errors import DataError, KR2CacheError

BYTE_ORDER_MARK = "\ufeff"


def lines(raw_lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a text, with their ends.

    Args:
        raw_lines: As a file opened for bytes gives them.
        name: Of the text, for errors.

    Raises:
        DataError: Naming the line that is not UTF-8.
    """
    for number, raw in enumerate(raw_lines, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: not UTF-8 ({error.reason}).", "Save the text as UTF-8.") from error


def file_lines(path: Path) -> Iterator[str]:
    """The lines of a file, as ``lines`` gives them.

    Raises:
        DataError: Naming file and line that are not UTF-8.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        yield from lines(file, str(path))


def check(text: str, name: str, error_class: type[KR2CacheError] = DataError) -> None:
    """Check text that was decoded by Python, such as an argument.

    Raises:
        error_class: If its bytes were not UTF-8: Python keeps such bytes as surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise error_class(f"{name}: not UTF-8: {shown[:60]}", "Give it in UTF-8, the encoding of all text.") from error
