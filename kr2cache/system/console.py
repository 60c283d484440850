"""Output for people: one console, progress, and numbers as text."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
)
from rich.progress import Task as ProgressTask
from rich.table import Column, Table
from rich.text import Text

SHORT_NAME = 6
"""A progress line keeps at least so many characters of its name; the time left gives way first."""
REFRESH = 4
"""How often a progress line changes, per second."""
PIPE_WIDTH = 120
"""Width in characters if the output is not a terminal, so that tables in a log are not cut."""

console = Console(highlight=False, width=None if sys.stderr.isatty() and sys.stdout.isatty() else PIPE_WIDTH)
"""All output for people. With ``--json`` it goes to standard error."""


_driver: list[Callable[[str], object]] = []
"""Where the notes of a worker go; empty in other processes."""
_silent: list[bool] = []


def is_silent() -> bool:
    """Whether notes are not shown."""
    return bool(_silent)


def note(text: str) -> None:
    """Print something to know. rich markup in it is not interpreted."""
    if _silent:
        return
    if _driver:
        _driver[-1](text)
    else:
        console.print(Text.assemble(("! ", "yellow"), text), soft_wrap=True)


def note_waiting(text: str) -> None:
    """Print that this process waits for another one. A worker does not: its driver shows the progress of all."""
    if not _driver:
        note(text)


def done(text: str) -> None:
    """Print a success."""
    console.print(Text.assemble(("✓ ", "green"), text), soft_wrap=True)


def failed(text: str) -> None:
    """Print a failure."""
    console.print(Text.assemble(("✗ ", "red"), text), soft_wrap=True)


def heading(text: str) -> None:
    """Print a horizontal rule with a title."""
    console.rule(Text(text, style="bold"), align="left")


def to_stderr() -> None:
    """Keep standard output free for one JSON document."""
    console.stderr = True


def bytes_text(count: float) -> str:
    """``512 B``, ``8.4 MB``, ``21.6 GB`` (powers of 1000, as for disks)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """``0.4 s``, ``38 s``, ``4 min 10 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def time_text(seconds: float) -> str:
    """``2026-11-27 23:50``, in this machine's time zone, for seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def count_text(count: int, noun: str, plural: str = "") -> str:
    """``1 sequence``, ``12,544 sequences``"""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def ranges_text(numbers: Sequence[int]) -> str:
    """``0-12``, ``9-12``, ``0,3,5``"""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside the block nothing is printed, and a worker sends no notes to its driver."""
    _silent.append(True)
    try:
        with _quiet():
            yield
    finally:
        _silent.pop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


@contextlib.contextmanager
def as_worker(say: Callable[[str], object]) -> Iterator[None]:
    """Inside the block this process works for a driver: notes and warnings go to ``say``, and nothing else is printed,
    also no progress.
    """

    def say_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        say(f"{category.__name__}: {message}")

    _driver.append(say)
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.showwarning = say_warning
            yield
    finally:
        _driver.pop()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Inside the block a spinner shows ``what`` is running. Without a terminal nothing is shown.

    Yields:
        A function that removes the spinner at once.
    """
    screen = console if console.is_terminal else Console(stderr=True, quiet=console.quiet)
    if not screen.is_terminal:
        yield lambda: None
        return
    with screen.status(Text(f"{what} ...")) as status:
        yield status.stop


class TimeLeft(ProgressColumn):
    """Time left in words, estimated from the work done so far."""

    def render(self, task: ProgressTask) -> Text:
        if task.finished:
            return Text(f"in {seconds_text(task.finished_time or 0)}", style="green")
        if not task.completed or task.total is None or task.elapsed is None:
            return Text("")
        return Text(f"{seconds_text(task.elapsed / task.completed * (task.total - task.completed))} left", style="cyan")


class WorkName(ProgressColumn):
    """The name of the work. If it is too long, its middle is left out: names differ at both ends."""

    def __init__(self, width: int) -> None:
        self._width = width
        super().__init__(Column(no_wrap=True))

    def render(self, task: ProgressTask) -> Text:
        name = task.description
        if cell_len(name) <= self._width:
            return Text(name)
        tail = self._width // 2
        head = set_cell_size(name, self._width - tail - 1).rstrip()
        return Text(f"{head}…{name[len(name) - tail :]}")


class NotebookOutput:
    """One output of a notebook's cell that changes in place. rich itself needs ipywidgets for it, and warns without."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_at = 0.0

    def show(self, make: Callable[[], Table], *, at_once: bool) -> None:
        """Show a table in place of the one before.

        Args:
            make: Makes the table.
            at_once: Whether to show it even if the last one was shown just before.
        """
        if not at_once and time.monotonic() - self._shown_at < 1 / REFRESH:
            return
        self._shown_at = time.monotonic()
        if self._handle is None:
            from IPython.display import display

            self._handle = display(make(), display_id=True)
        else:
            self._handle.update(make())


class ProgressLine(Progress):
    """A line of progress that fits the terminal. The count is never cut; bar and note shrink or are left out."""

    def __init__(self, unit: str) -> None:
        self._spinner = SpinnerColumn(finished_text="[green]✓")
        self._count, self._time = MofNCompleteColumn(), TimeLeft()
        self._unit = TextColumn(unit)
        self._note = TextColumn("{task.fields[note]}")
        self._notebook = NotebookOutput() if console.is_jupyter else None
        super().__init__(console=console, refresh_per_second=REFRESH, disable=self._notebook is not None)

    def start(self) -> None:
        super().start()
        self._show_in_notebook(at_once=True)

    def stop(self) -> None:
        super().stop()
        self._show_in_notebook(at_once=True)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a line. Arguments are those of ``Progress.update``."""
        super().update(task_id, **changes)
        self._show_in_notebook()

    def _show_in_notebook(self, *, at_once: bool = False) -> None:
        if self._notebook is not None:
            self._notebook.show(lambda: self.make_tasks_table(self.tasks), at_once=at_once)

    def make_tasks_table(self, tasks: Iterable[ProgressTask]) -> Table:
        shown = list(tasks)
        self.columns = self._fitting(shown)
        return super().make_tasks_table(shown)

    def _fitting(self, tasks: Sequence[ProgressTask]) -> tuple[ProgressColumn, ...]:
        """The columns that fit."""

        def width(column: ProgressColumn) -> int:
            return max((cell_len(str(column.render(task))) for task in tasks), default=0)

        name = max((cell_len(task.description) for task in tasks), default=0)
        room, bar = 0, 0
        others: tuple[ProgressColumn, ...] = ()
        for bar, others in (
            (24, (self._count, self._unit, self._note, self._time)),
            (8, (self._count, self._unit, self._note, self._time)),
            (8, (self._count, self._unit, self._time)),
            (0, (self._count, self._unit, self._time)),
            (0, (self._count, self._time)),
            (0, (self._count,)),
        ):
            room = console.width - 2 - sum(width(column) + 1 for column in others) - (bar + 1 if bar else 0)
            if room >= (name if len(others) > 2 else min(name, SHORT_NAME)):
                break
        return (self._spinner, WorkName(max(1, room)), *([BarColumn(bar_width=bar)] if bar else []), *others)


class WorkProgress:
    """The progress of one piece of work on the terminal: name, bar, how much is done, a note, time left.

        with WorkProgress("gottbert on udpos-de/train", "sequences") as progress:
            progress.total = 450
            progress.advance(32, "73,082 tokens/s")

    Args:
        name: What is worked on.
        unit: What is counted, plural.
        total: How much there is to do; None if it is not known yet.
    """

    def __init__(self, name: str, unit: str, total: float | None = None) -> None:
        self.line = ProgressLine(unit)
        self._task = self.line.add_task(name, total=total, note="")

    @property
    def total(self) -> float | None:
        return self.line.tasks[0].total

    @total.setter
    def total(self, total: float) -> None:
        """Setting it starts the count again at 0."""
        self.line.update(self._task, total=total, completed=0)

    def show(self, done: float) -> None:
        """So much is done since the total was set, whatever was counted before."""
        self.line.update(self._task, completed=done)

    def advance(self, count: float, note: str | None = None) -> None:
        """``count`` more is done.

        Args:
            note: Shown beside it from now on; None to keep the note.
        """
        changed: dict[str, Any] = {} if note is None else {"note": note}
        self.line.update(self._task, advance=count, **changed)

    def start(self) -> None:
        """Show it."""
        self.line.start()

    def stop(self) -> None:
        """Show it for the last time; the line stays on the terminal."""
        self.line.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
