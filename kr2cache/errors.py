"""Every failure that the project explains, as one small tree of exceptions.

Most classes also derive from the built-in exception that callers already catch (``ValueError``, ``FileNotFoundError``).
The message says what was wrong and with which value. The remedy says what to do; ``--json`` shows it as its own field.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KR2CacheError(Exception):
    """An expected failure, with a message and in most cases a remedy."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(KR2CacheError):
    """A command line that is not valid; the only failure whose exit code is 2."""


class UnknownNameError(KR2CacheError, ValueError):
    """A model, task, fusion, split or option that does not exist."""


class ConfigError(KR2CacheError, ValueError):
    """Settings that contradict each other, or a ``kr2cache.toml`` that is not valid."""


class DataError(KR2CacheError, ValueError):
    """A corpus that is missing or malformed; the message names file and line."""

    unknown_labels: tuple[str, ...] = ()
    """Labels of a row that are none of the task's, if that is what is wrong: ``predict`` can do without them."""
    label_column: str = ""
    """The column that holds them."""

    @classmethod
    def unknown_label(cls, message: str, remedy: str, *, column: str, labels: Iterable[str]) -> DataError:
        error = cls(message, remedy)
        error.label_column, error.unknown_labels = column, tuple(labels)
        return error


class MissingSplitError(DataError):
    """The corpus has no such split; training continues without dev or test."""


class ModelUnavailableError(KR2CacheError, FileNotFoundError):
    """A model is not on this machine and cannot be downloaded."""


class UnsupportedModelError(KR2CacheError, ValueError):
    """A model that loads, but cannot be used as resource, reader or teacher as requested."""


class CacheError(KR2CacheError, ValueError):
    """A cache is missing or incomplete, or its files do not follow the format."""


class CacheVersionError(CacheError):
    """A cache of a format version that this code does not read."""


class CacheMismatchError(CacheError):
    """A cache with the chosen settings exists, but was made from other data or another model."""


class BusyError(KR2CacheError):
    """Another process is writing to the same folder."""


class WorkerLostError(KR2CacheError):
    """Worker processes died again and again."""


class SequenceNotFoundError(KR2CacheError, KeyError):
    """An id that is not in the cache, or whose states are not complete yet."""


class DiskSpaceError(KR2CacheError):
    """The disk has too little free space."""


class DeviceMemoryError(KR2CacheError):
    """A model, or a batch of it, does not fit into the device's memory."""


class ValueRangeError(KR2CacheError, ValueError):
    """A state that the stored dtype cannot hold."""


class TrainingError(KR2CacheError):
    """A training that did not produce a usable reader."""


class InterruptedWorkError(KR2CacheError):
    """The user pressed Ctrl-C; the message says which work is kept."""


def unknown_name(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UnknownNameError:
    """An error that ``name`` is not a ``kind``, with the nearest known name and the list of known names."""
    known = sorted(known)
    return UnknownNameError(
        f"Unknown {kind} {name!r}.{nearest(name, known)}", f"Known: {', '.join(known)}. {remedy}".strip()
    )


def error_text(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class. A KeyError's message is only the key."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"KeyError: {lines[0]}" if isinstance(error, KeyError) else lines[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'kr2'?``, or empty if no known name is similar. Case does not count."""
    spelled = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), spelled, n=1, cutoff=0.5)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""
