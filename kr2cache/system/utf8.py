"""Text from outside: files, standard input, arguments.

This module checks that it is UTF-8 and removes a byte order mark at its start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from kr2cache.errors import DataError, KR2CacheError

BYTE_ORDER_MARK = "\ufeff"


def lines(raw_lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a text, with their line ends.

    Args:
        raw_lines: Lines of bytes, such as a file opened in binary mode.
        name: Name of the text, for errors.

    Raises:
        DataError: If a line is not UTF-8; the message gives its number.
    """
    for number, raw in enumerate(raw_lines, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: not UTF-8 ({error.reason}).",
                "Save the text as UTF-8. If it is Latin-1: iconv -f latin1 -t utf8 OLD > NEW",
            ) from error


def file_lines(path: Path) -> Iterator[str]:
    """The lines of a file, as ``lines`` gives them.

    Raises:
        DataError: If a line is not UTF-8; the message names file and line.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        yield from lines(file, str(path))


def check(text: str, name: str, error_class: type[KR2CacheError] = DataError) -> None:
    """Check text that was decoded by Python, such as an argument.

    Raises:
        error_class: If its bytes were not UTF-8. Python keeps such bytes as surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise error_class(f"{name}: not UTF-8: {shown[:60]}", "Give it in UTF-8, the encoding of all text.") from error
