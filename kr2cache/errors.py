"""Every failure that the project explains, as one small tree.

Each class also is the built-in that callers already catch (``ValueError``, ``FileNotFoundError``, ...). A message says
what was wrong and with which value; the remedy, kept apart so that ``--json`` can show it, says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KR2CacheError(Exception):
    """A failure that was foreseen: it has a message for people, and mostly a remedy."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(KR2CacheError):
    """A command line that cannot be understood; the only failure whose exit code is 2."""


class UnknownNameError(KR2CacheError, ValueError):
    """A model, task, fusion, split or option that does not exist."""


class ConfigError(KR2CacheError, ValueError):
    """Settings that contradict each other, or a ``kr2cache.toml`` that cannot be understood."""


class DataError(KR2CacheError, ValueError):
    """A corpus that is missing or malformed; the message names file and line."""


class MissingSplitError(DataError):
    """The corpus has no such split; training goes on without dev or test."""


class ModelUnavailableError(KR2CacheError, FileNotFoundError):
    """A model is neither on this machine nor to be had."""


class UnsupportedModelError(KR2CacheError, ValueError):
    """A model that loads, but cannot serve as what it was asked for."""


class CacheError(KR2CacheError, ValueError):
    """A cache is missing, incomplete, or its files are not what the format says."""


class CacheVersionError(CacheError):
    """A cache of another version of the format."""


class CacheMismatchError(CacheError):
    """A cache of that name exists, but was made from something else."""


class BusyError(KR2CacheError):
    """Another process is writing what was to be changed."""


class SequenceNotFoundError(KR2CacheError, KeyError):
    """An id that the cache does not hold, or does not hold completely yet."""


class DiskSpaceError(KR2CacheError):
    """The disk cannot hold what has to be written."""


class DeviceMemoryError(KR2CacheError):
    """A model, or a batch of it, does not fit into the device's memory."""


class ValueRangeError(KR2CacheError, ValueError):
    """A state that the stored dtype cannot hold."""


class TrainingError(KR2CacheError):
    """A training that gave no usable reader."""


class InterruptedWorkError(KR2CacheError):
    """Ctrl-C; the message says what is kept."""


def unknown_name(kind: str, name: str, known: Iterable[str], remedy: str = "") -> UnknownNameError:
    """Say that ``name`` is not a ``kind``, with the nearest known name and the list of those that exist."""
    known = sorted(known)
    return UnknownNameError(
        f"Unknown {kind} {name!r}.{nearest(name, known)}", f"Known: {', '.join(known)}. {remedy}".strip()
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'kr2'?``, or nothing where no known name is near; kr2 is near KR2."""
    spelled = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), spelled, n=1, cutoff=0.5)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""
