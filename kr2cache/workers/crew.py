"""The common part of the engines: how the driver watches its workers, the crew."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from kr2cache.errors import WorkerLostError
from kr2cache.system import interrupt
from kr2cache.system.console import count_text, note

WATCH_EVERY_S = 0.5
MOST_REPLACED = 3
"""So many workers are replaced, or each worker once if there are more, before a unit of work is done."""


class Crew(ABC):
    """The workers of one run. At the end of the ``with`` block, workers that still run are ended."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: How many workers.
        """
        self.count = count
        self.results: dict[int, Any] = {}
        """The result of each worker, by its place (0, 1, ...)."""
        self.shown: set[str] = set()
        """What workers sent or printed and the user saw."""
        self.check_interrupt: Callable[[], None] = lambda: None
        """Raises KeyboardInterrupt if this process was asked to stop. ``drive`` sets it."""
        self._done = 0
        self._replaced = 0
        """Workers that were replaced since ``_done`` grew."""

    @property
    @abstractmethod
    def is_working(self) -> bool:
        """Whether a worker has not ended yet."""

    @abstractmethod
    def start(self) -> None:
        """Start all workers."""

    @abstractmethod
    def listen(self, seconds: float) -> None:
        """Receive messages and results of the workers, for ``seconds`` or until all workers are done.

        Raises:
            WorkerLostError: If too many workers died.
            BaseException: What a worker raised.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask the workers to finish their current batch, and wait for them. From now on their errors are ignored."""

    @abstractmethod
    def end(self) -> None:
        """End at once all workers that still run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def note(self, text: str) -> None:
        """Show a message of a worker, unless it was shown before."""
        if text not in self.shown:
            self.shown.add(text)
            note(text)

    def count_lost(self, what: str, advice: str) -> None:
        """Count a worker that died or was stopped, and is replaced now. Tell the user.

        Args:
            what: Which worker died, and how: the first part of the message.
            advice: What the user can do about it.

        Raises:
            WorkerLostError: If too many workers were replaced before.
            KeyboardInterrupt: If this process was asked to stop: perhaps the same signal ended the worker.
        """
        self.check_interrupt()
        if self._replaced == max(MOST_REPLACED, self.count):
            raise WorkerLostError(
                f"{what}, and so did {count_text(self._replaced, 'other')} before. What they completed is kept.",
                f"{advice} Run the same command again to continue.",
            )
        self._replaced += 1
        note(f"{what}; another one takes its place.")

    def see_done(self, done: int) -> None:
        """Count lost workers from 0 again if more is done than before, as ``run_workers`` says."""
        if done > self._done:
            self._done, self._replaced = done, 0


def drive(crew: Crew, watch: Callable[[], int]) -> list[Any]:
    """Let a crew work until it is done. ``run_workers`` describes the behaviour. Call this function inside the ``with``
    block of the crew.
    """
    with interrupt.interrupt_between_batches() as check_interrupt:
        crew.check_interrupt = check_interrupt
        try:
            crew.start()
            while crew.is_working:
                crew.listen(WATCH_EVERY_S)
                check_interrupt()
                crew.see_done(watch())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                again = f"{interrupt.signal_name()} again ends the workers at once."
                note(f"Stopping: each worker finishes its current batch. {again}")
            crew.stop()
            raise
    return [crew.results[place] for place in sorted(crew.results)]
