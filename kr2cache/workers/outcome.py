"""The result or the error of a worker, in a form that can be sent to the driver."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kr2cache.errors import InterruptedWorkError, KR2CacheError


@dataclass(frozen=True)
class Outcome:
    """What ``work`` returned, or the error that it raised."""

    value: Any = None
    error: BaseException | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal stopped the work."""
        return isinstance(self.error, KeyboardInterrupt | InterruptedWorkError)


def outcome_of(work: Callable[[], Any]) -> Outcome:
    """Do the work. Every error becomes an outcome too, even Ctrl-C."""
    try:
        return Outcome(value=work())
    except BaseException as error:
        return Outcome(error=sendable(error))


def sendable(error: BaseException) -> BaseException:
    """The error itself, or an error with the same text if it cannot be pickled. An unexpected error gets a note with
    its traceback.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError("".join(traceback.format_exception_only(error)).strip()).with_traceback(
            error.__traceback__
        )
    if not isinstance(error, KR2CacheError | KeyboardInterrupt):
        error.add_note(f"In a worker:\n{''.join(traceback.format_exception(error))}")
    return error
