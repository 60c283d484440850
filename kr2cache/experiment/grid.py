"""Grids: TOML files that lay out many trainings as the rows and columns of a table (``pipelines/``).

Each cell is one configuration of ``train`` with all its seeds. Its settings come from five places, and a later place
overrides an earlier one: ``[defaults]`` of ``kr2cache.toml``, the grid's ``[settings]``, the column, the row, the
command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.config import TrainConfig, parse_seeds
from kr2cache.errors import ConfigError, unknown_name
from kr2cache.methods import METHODS
from kr2cache.toml import load_toml, typed

PAPERS = ("table1", "table2", "table3")
GRID_KEYS = ("title", "paper", "baseline", "settings", "models", "tasks", "rows", "columns")
LINE_KEYS = {"rows": ("name", "swap", "baseline"), "columns": ("name",)}
"""Keys of a row or column that are no settings of ``train``."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row or a column: its name in the table and the settings of its cells."""

    name: str
    settings: Mapping[str, Any]
    """Fields of ``TrainConfig`` with their values."""
    swap: bool = False
    """Rows only. Whether reader and resource are exchanged: A-B in table 3, where other rows are B-A."""
    baseline: str | None = None
    """Rows only. The row that this row is compared with; None: the baseline of the grid."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table to fill."""

    name: str
    title: str
    paper: str | None
    """The table of the paper whose numbers the report shows beside these."""
    baseline: str | None
    """The row that the other rows are compared with."""
    settings: Mapping[str, Any]
    rows: tuple[Line, ...]
    columns: tuple[Line, ...]
    models: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]

    def config(
        self,
        row: Line,
        column: Line,
        *,
        defaults: Mapping[str, Any],
        overrides: Mapping[str, Any],
        models: Mapping[str, Mapping[str, Any]],
        training: Mapping[str, Any],
        tasks: Mapping[str, Mapping[str, Any]] = {},
    ) -> TrainConfig:
        """The configuration of one cell.

        Args:
            defaults: Settings that the grid overrides (``[defaults]`` of ``kr2cache.toml``).
            overrides: Settings that override the grid (the command line).
            models: ``[models]`` of ``kr2cache.toml``. They override the grid's models of the same name.
            training: ``[training]`` of ``kr2cache.toml``.
            tasks: ``[tasks]`` of ``kr2cache.toml``. They override the grid's tasks of the same name.

        Raises:
            ConfigError: If the cell has no task, or its row swaps reader and resource and the settings do not allow it.
        """
        nearer = {**self.settings, **column.settings, **row.settings, **overrides}
        values: dict[str, Any] = {**defaults, **nearer}
        declared = {**self.tasks, **tasks}
        if "task" not in values:
            raise ConfigError(
                f"{self.name}: the cell {row.name} / {column.name} has no task.", "Give task in its column."
            )
        if "data" not in nearer and "data" in declared.get(values["task"], {}):
            values.pop("data", None)  # the task's own data is nearer than that of [defaults]
        if row.swap:
            if "resource" not in values:
                raise ConfigError(
                    f"{self.name}: row {row.name} swaps reader and resource, but column {column.name} has no resource.",
                    "Give resource in the column.",
                )
            if "teacher" in values:
                raise ConfigError(
                    f"{self.name}: row {row.name} swaps reader and resource, but a teacher is given too.",
                    "Leave teacher out: the teacher is the resource of the cell.",
                )
            if not isinstance(values["resource"], str):
                raise ConfigError(
                    f"{self.name}: row {row.name} swaps reader and resource, but column {column.name} has several "
                    "resources.",
                    "Give one resource in the column, or leave swap out.",
                )
            values["reader"], values["resource"] = values["resource"], values.get("reader", TrainConfig.reader)
        method = METHODS.get(values.get("method", TrainConfig.method))
        if method is not None and method.needs_teacher:
            several = not isinstance(values.get("resource"), str | None)
            values.setdefault("teacher", None if several else values.get("resource"))
        if isinstance(values.get("seeds"), str):
            values["seeds"] = parse_seeds(values["seeds"])
        if "max_length" in values:  # in a grid it holds for both models
            values.setdefault("resource_max_length", values["max_length"])
        return TrainConfig(**values, models={**self.models, **models}, tasks=declared, training=training)


def read_grid(path: Path, options: Mapping[str, type]) -> Grid:
    """Read a grid.

    Args:
        options: The options of ``train`` that ``[settings]``, rows and columns may give: long names and types.

    Raises:
        ConfigError: If the file does not exist, is not TOML, or is not a grid.
        UnknownNameError: For an unknown key, or a baseline or table of the paper that does not exist.
    """
    try:
        content = load_toml(path)
    except OSError as error:
        examples = ", ".join(sorted(str(file) for file in Path("pipelines").glob("*.toml"))) or "none here"
        raise ConfigError(
            f"There is no grid {path} ({error.strerror}).", f"Grids that come with the project: {examples}."
        ) from error
    for key in content:
        if key not in GRID_KEYS:
            raise unknown_name(f"key in {path}:", key, GRID_KEYS)
    lines: dict[str, tuple[Line, ...]] = {}
    for kind in ("rows", "columns"):
        tables = content.get(kind)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise ConfigError(f"{path} has no {kind}.", f'Write [[{kind}]] and name = "..." for each of them.')
        lines[kind] = tuple(_line(table, kind, path, options) for table in tables)
        names = [line.name for line in lines[kind]]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{path}: two {kind} are called {name!r}.", "Give each of them its own name.")
    paper = content.get("paper")
    if paper is not None and paper not in PAPERS:
        raise unknown_name(f"paper in {path}:", str(paper), PAPERS)
    row_names = [row.name for row in lines["rows"]]
    for baseline in (content.get("baseline"), *(row.baseline for row in lines["rows"])):
        if baseline is not None and baseline not in row_names:
            raise unknown_name(f"baseline in {path}:", str(baseline), row_names)
    sections = {}
    for section, line in (("models", 'path = "..."'), ("tasks", 'kind = "..."')):
        tables = sections[section] = content.get(section, {})
        if not isinstance(tables, dict) or not all(isinstance(value, dict) for value in tables.values()):
            raise ConfigError(f"{section} in {path} is not a section.", f"Write [{section}.NAME] and {line}.")
    return Grid(
        name=path.stem,
        title=str(content.get("title", path.stem)),
        paper=paper,
        baseline=content.get("baseline"),
        settings=_settings(content.get("settings", {}), f"[settings] of {path}", options),
        rows=lines["rows"],
        columns=lines["columns"],
        models=sections["models"],
        tasks=sections["tasks"],
    )


def _line(table: Mapping[str, Any], kind: str, path: Path, options: Mapping[str, type]) -> Line:
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: one of its {kind} has no name.", 'Give name = "...". The table shows it.')
    where = f"{kind[:-1]} {name!r} of {path}"
    own = {key: table[key] for key in LINE_KEYS[kind] if key in table}
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
