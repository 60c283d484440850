"""Sweeps: many trainings, laid out as the rows and columns of a table.

A grid is a TOML file (``pipelines/``). Each cell is one configuration of ``train`` with all its seeds; a later place
overrides an earlier one: ``[defaults]`` of ``kr2cache.toml``, the grid's ``[settings]``, its column, its row, the
command line. What is done is skipped, a cell that fails is reported and the others go on. ``RUN_DIR/sweeps/NAME.json``
says which run belongs where; ``report`` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache import models, runs
from kr2cache.allocator import objects_set_aside
from kr2cache.config import METHODS, PLAIN_METHODS, PROJECTIONS, TrainConfig, load_toml, parse_seeds, typed
from kr2cache.console import console, count_text, failed, heading
from kr2cache.errors import ConfigError, DataError, InterruptedWorkError, KR2CacheError, unknown_name
from kr2cache.fusion import check_fusion_name, parse_fusion
from kr2cache.locks import check_writable
from kr2cache.pipeline import TrainResult, train
from kr2cache.shared import Shared
from kr2cache.stored import find_resource
from kr2cache.tasks import find_task
from kr2cache.tasks.files import data_folder
from kr2cache.tasks.udpos import UdPos

MANIFESTS = "sweeps"
"""Folder in the run folder."""
PAPERS = ("table1", "table2", "table3")
TOP = ("title", "paper", "baseline", "settings", "models", "rows", "columns")
OWN_KEYS = {"rows": ("name", "swap", "baseline"), "columns": ("name",)}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row or a column: its name in the table and the settings it brings."""

    name: str
    settings: Mapping[str, Any]
    """Of ``TrainConfig``."""
    swap: bool = False
    """Whether reader and resource change places (rows only): A-B where the others are B-A."""
    baseline: str | None = None
    """The row that it is compared with (rows only)."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table to fill."""

    name: str
    title: str
    paper: str | None
    """The table of the paper whose numbers belong beside these."""
    baseline: str | None
    settings: Mapping[str, Any]
    rows: tuple[Line, ...]
    columns: tuple[Line, ...]
    models: Mapping[str, Mapping[str, Any]]

    def config(
        self,
        row: Line,
        column: Line,
        *,
        below: Mapping[str, Any],
        above: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, Any]],
        training: Mapping[str, Any],
    ) -> TrainConfig:
        """The configuration of one cell.

        Args:
            below: What the grid overrides (``[defaults]`` of ``kr2cache.toml``).
            above: What overrides the grid (the command line).
            overrides: ``[models]`` of ``kr2cache.toml``; they go before the grid's.
            training: ``[training]`` of ``kr2cache.toml``.
        """
        values: dict[str, Any] = {**below, **self.settings, **column.settings, **row.settings, **above}
        if "task" not in values:
            raise ConfigError(
                f"{self.name}: the cell {row.name} / {column.name} has no task.", "Give task in its column."
            )
        if row.swap:
            if "resource" not in values:
                raise ConfigError(
                    f"{self.name}: row {row.name} swaps reader and resource; column {column.name} has no resource.",
                    "Give resource in the column.",
                )
            if "teacher" in values:
                raise ConfigError(
                    f"{self.name}: row {row.name} swaps reader and resource, and a teacher is given beside them.",
                    "Leave teacher out: it is the resource of the cell.",
                )
            values["reader"], values["resource"] = values["resource"], values.get("reader", TrainConfig.reader)
        if values.get("method") == "kd":
            values.setdefault("teacher", values.get("resource"))
        if isinstance(values.get("seeds"), str):
            values["seeds"] = parse_seeds(values["seeds"])
        if "max_length" in values:  # of both models, then
            values.setdefault("resource_max_length", values["max_length"])
        return TrainConfig(**values, models={**self.models, **overrides}, training=training)


def read_grid(path: Path, options: Mapping[str, type]) -> Grid:
    """Read a grid.

    Args:
        options: The options of ``train`` that ``[settings]``, rows and columns may give, by their long names.

    Raises:
        ConfigError: If it is not there, not TOML, or not a grid.
        UnknownNameError: For a key that does not exist.
    """
    try:
        content = load_toml(path)
    except OSError as error:
        near = ", ".join(sorted(str(one) for one in Path("pipelines").glob("*.toml"))) or "none here"
        raise ConfigError(
            f"There is no grid {path} ({error.strerror}).", f"Grids that come with the project: {near}."
        ) from error
    for key in content:
        if key not in TOP:
            raise unknown_name(f"key in {path}:", key, TOP)
    lines: dict[str, tuple[Line, ...]] = {}
    for kind in ("rows", "columns"):
        tables = content.get(kind)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise ConfigError(f"{path} has no {kind}.", f'Write [[{kind}]] and name = "...", one for each.')
        lines[kind] = tuple(_line(table, kind, path, options) for table in tables)
        names = [line.name for line in lines[kind]]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{path}: two {kind} are called {name!r}.", "Give each a name of its own.")
    paper = content.get("paper")
    if paper is not None and paper not in PAPERS:
        raise unknown_name(f"paper in {path}:", str(paper), PAPERS)
    row_names = [row.name for row in lines["rows"]]
    for baseline in (content.get("baseline"), *(row.baseline for row in lines["rows"])):
        if baseline is not None and baseline not in row_names:
            raise unknown_name(f"baseline in {path}:", str(baseline), row_names)
    named = content.get("models", {})
    if not isinstance(named, dict) or not all(isinstance(value, dict) for value in named.values()):
        raise ConfigError(f"models in {path} is not a section.", 'Write [models.NAME] and path = "...".')
    return Grid(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        paper=paper,
        baseline=content.get("baseline"),
        settings=_settings(content.get("settings", {}), f"[settings] of {path}", options),
        rows=lines["rows"],
        columns=lines["columns"],
        models=named,
    )


def _line(table: Mapping[str, Any], kind: str, path: Path, options: Mapping[str, type]) -> Line:
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{path}: one of its {kind} has no name.", 'Give name = "..." as it shall stand in the table.'
        )
    where = f"{kind[:-1]} {name!r} of {path}"
    own = {key: table[key] for key in OWN_KEYS[kind] if key in table}
    swap = own.get("swap", False)
    if not isinstance(swap, bool):
        raise ConfigError(f"swap = {swap!r} in {where} should be true or false.", "Correct it.")
    settings = _settings({key: value for key, value in table.items() if key not in own}, where, options)
    return Line(name=name, settings=settings, swap=swap, baseline=own.get("baseline"))


def _settings(table: Any, where: str, options: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is not a section.", "Write [settings].")
    settings = {}
    for name, value in table.items():
        key = name.replace("_", "-")
        if key not in options:
            raise unknown_name(f"setting in {where}:", name, options)
        settings[key.replace("-", "_")] = typed(key, value, options[key], where)
    return settings


@dataclass(kw_only=True)
class Cell:
    """One configuration of the grid, and what became of it."""

    row: Line
    column: Line
    config: TrainConfig
    folder: str | None = None
    """Of its runs, relative to the run folder; None until it is known."""
    error: str | None = None
    result: TrainResult | None = None

    def json(self) -> dict[str, Any]:
        """The cell in the manifest."""
        config = self.config
        frozen = config.reader if config.method == "kreader2" else config.resource
        return {
            "row": self.row.name,
            "column": self.column.name,
            "folder": self.folder,
            "seeds": list(config.seeds),
            "task": config.task,
            "method": config.method,
            "fusion": config.fusion if config.method in ("kr2", "kreader2") else None,
            "reader": config.resource if config.method == "kresource" else config.reader,
            "resource": frozen if config.method in ("kr2", "kreader2") else None,
            "teacher": config.teacher,
            "settings": self.settings,
            "error": self.error,
        }

    @property
    def settings(self) -> str:
        """A digest of everything that was asked for, the place of files aside."""
        aside = dict.fromkeys(("run_dir", "cache_dir", "device", "keep_readers", "temporary_readers"))
        fields = {**dataclasses.asdict(self.config), **aside}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep left."""

    grid: Grid
    manifest: Path
    cells: list[Cell]

    @property
    def run_dir(self) -> Path:
        return self.manifest.parent.parent

    @property
    def failed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.error is not None]

    def json(self) -> dict[str, Any]:
        return {
            "manifest": str(self.manifest),
            "cells": [
                cell.json() | {"mean": cell.result.json()["mean"] if cell.result is not None else None}
                for cell in self.cells
            ],
            "failed": len(self.failed),
        }


class Sweep:
    """A grid on its way."""

    def __init__(self, grid: Grid, cell_config: Callable[[Line, Line], TrainConfig], *, keep_readers: bool) -> None:
        """
        Args:
            cell_config: The configuration of a row in a column.
            keep_readers: Whether trained readers stay on disk after their predictions are written.

        Raises:
            KR2CacheError: For a cell that could not be run whatever is on this machine: an unknown name, a setting that
                makes no sense.
        """
        self.grid = grid
        self.keep_readers = keep_readers
        self.cells = [
            Cell(row=row, column=column, config=cell_config(row, column))
            for column in grid.columns
            for row in grid.rows
        ]
        self._shared = Shared()
        for cell in self.cells:
            _check_names(cell)
        _check_languages(grid, self.cells)
        self.run_dir = self.cells[0].config.run_dir
        self.manifest = self.run_dir / MANIFESTS / f"{grid.name}.json"

    @objects_set_aside()
    def run(self) -> SweepResult:
        """Fill every cell.

        Raises:
            InterruptedWorkError: On Ctrl-C; what is complete is kept, and the manifest says what there is.
        """
        check_writable(self.run_dir, "--run-dir")
        self._take_over()
        self._write()
        for number, cell in enumerate(self._in_order(), 1):
            what = f"{cell.column.name} · {cell.row.name}"
            heading(f"{number}/{len(self.cells)}  {what}")
            teaches = self._teaches(cell)
            cell.config = dataclasses.replace(
                cell.config, keep_readers=self.keep_readers or teaches, temporary_readers=not self.keep_readers
            )
            try:
                self._fill(cell)
            except InterruptedWorkError as error:
                raise InterruptedWorkError(
                    f"{error.message.rstrip('.')}. The sweep {self.grid.name} stopped at cell {number} of "
                    f"{len(self.cells)} ({what}).",
                    "Run the same command again: it skips what is done.",
                ) from None
            finally:
                self._write()
            if not any(other.config.method == "kd" for other in self._rest_of_column(cell)):
                self._drop_readers(cell.column)
        return SweepResult(grid=self.grid, manifest=self.manifest, cells=self.cells)

    def _fill(self, cell: Cell) -> None:
        cell.error = None
        try:
            cell.result = train(cell.config, self._shared)
        except InterruptedWorkError:
            raise
        except KR2CacheError as error:
            cell.error = error.message
        except KeyboardInterrupt:
            raise InterruptedWorkError("Interrupted.") from None
        except Exception as error:  # one cell's unforeseen failure is no reason to lose the others
            cell.error = f"{type(error).__name__}: {error}"
        if cell.error is not None:
            cell.folder = None  # an earlier configuration's score is not this one's
            failed(f"{cell.column.name} · {cell.row.name}: {cell.error}")
            return
        assert cell.result is not None, "train returned"
        cell.folder = Path(os.path.relpath(cell.result.runs[0].folder.parent, self.run_dir)).as_posix()
        mean, metric = cell.result.json()["mean"], cell.result.task.metric
        split = "test" if "test" in mean else "dev"
        console.print(f"{cell.column.name} · {cell.row.name}: {metric} {100 * mean[split][metric]:.1f}", markup=False)

    def _in_order(self) -> list[Cell]:
        """Column by column; plain trainings first where they teach, so that no model is fine-tuned twice."""
        order = []
        for column in self.grid.columns:
            cells = [cell for cell in self.cells if cell.column is column]
            order += sorted(cells, key=lambda cell: not self._teaches(cell))
        self._order = order
        return order

    def _teaches(self, cell: Cell) -> bool:
        """Whether a distillation in the same column learns from this cell's model."""
        if cell.config.method not in PLAIN_METHODS:
            return False
        model = cell.config.resource if cell.config.method == "kresource" else cell.config.reader
        return any(
            other.config.method == "kd" and other.config.teacher == model
            for other in self.cells
            if other.column is cell.column
        )

    def _rest_of_column(self, cell: Cell) -> list[Cell]:
        return [other for other in self._order[self._order.index(cell) + 1 :] if other.column is cell.column]

    def _drop_readers(self, column: Line) -> None:
        """Of the runs that a sweep trained: 120 readers of the size of XLM-R are 130 GB."""
        for cell in self.cells:
            if not self.keep_readers and cell.column is column and cell.folder is not None:
                for seed in cell.config.seeds:
                    runs.drop_temporary_reader(runs.seed_folder(self.run_dir / cell.folder, seed))

    def _take_over(self) -> None:
        """Where an earlier call of the same sweep left its runs, so that a report shows them while this one goes on."""
        try:
            earlier = json.loads(self.manifest.read_text("utf-8"))
            known = {(cell["row"], cell["column"], cell["settings"]): cell["folder"] for cell in earlier["cells"]}
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or not readable: the runs themselves say what is done
        for cell in self.cells:
            cell.folder = known.get((cell.row.name, cell.column.name, cell.settings))

    def _write(self) -> None:
        grid = self.grid
        self.manifest.parent.mkdir(parents=True, exist_ok=True)
        partial = self.manifest.with_suffix(".partial")
        runs.write_json(
            partial,
            {
                "name": grid.name,
                "title": grid.title,
                "paper": grid.paper,
                "baseline": grid.baseline,
                "baselines": {row.name: row.baseline for row in grid.rows if row.baseline is not None},
                "rows": [row.name for row in grid.rows],
                "columns": [column.name for column in grid.columns],
                "cells": [cell.json() for cell in self.cells],
            },
        )
        partial.replace(self.manifest)


def _check_languages(grid: Grid, cells: Sequence[Cell]) -> None:
    """A folder has sentences of one language: under the names of two a table would be wrong without a word."""
    first: dict[Path, tuple[str, Cell]] = {}
    for cell in cells:
        task = find_task(cell.config.task)
        try:
            folder = data_folder(cell.config.data)
        except DataError:  # the cell will say so; others can be run
            continue
        if not isinstance(task, UdPos) or task.language is None or folder is None:
            continue
        language, other = first.setdefault(folder.resolve(), (task.language, cell))
        if language != task.language:
            raise ConfigError(
                f"{grid.name}: {other.row.name} / {other.column.name} ({other.config.task}) and {cell.row.name} / "
                f"{cell.column.name} ({cell.config.task}) would read the same sentences, {cell.config.data}.",
                "Give each column data of its own; what [defaults] of kr2cache.toml says serves all that have none.",
            )


def _check_names(cell: Cell) -> None:
    """What needs no model and no data to be seen wrong."""
    config = cell.config
    where = f"the cell {cell.row.name} / {cell.column.name}"
    find_task(config.task)
    if config.method not in METHODS:
        raise unknown_name(f"method in {where}:", config.method, METHODS)
    check_fusion_name(config.fusion)
    if config.projection not in PROJECTIONS:
        raise unknown_name(f"projection in {where}:", config.projection, PROJECTIONS)
    if config.method in ("kr2", "kresource", "kd") and (config.resource or config.teacher) is None:
        raise ConfigError(f"Method {config.method} in {where} needs a resource.", "Give resource in its column.")
    names = {config.reader}
    if config.method == "kresource" and config.resource is not None:
        names.add(config.resource)
    if config.teacher is not None and not runs.is_finished(Path(config.teacher).expanduser()):
        names.add(config.teacher)
    for name in names:
        models.find_model(name, config.models)
    if config.resource is not None:
        find_resource(config.resource, config.cache_dir, config.models)
    if config.method in ("kr2", "kreader2"):
        frozen = config.reader if config.method == "kreader2" else config.resource
        spec = find_resource(str(frozen), config.cache_dir, config.models)
        if models.local_folder(spec) is not None:
            layers, _ = models.encoder_shape(models.load_config(spec))
            parse_fusion(config.fusion, layers)


def describe_sweep(result: SweepResult) -> None:
    """What was filled and what failed."""
    filled: Sequence[Cell] = [cell for cell in result.cells if cell.error is None]
    heading(result.grid.title)
    console.print(f"{len(filled)} of {count_text(len(result.cells), 'cell')} filled.")
    for cell in result.failed:
        failed(f"{cell.column.name} · {cell.row.name}: {cell.error}")
    if result.failed:
        console.print("Mend what failed and run the same command again: what is done is skipped.", style="cyan")
