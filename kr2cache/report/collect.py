"""Read run folders and sweep manifests into plain records.

A folder that cannot be read becomes a note with its path and the fault; the other folders are still reported. All paths
are relative to RUN_DIR, so that the report does not change if RUN_DIR moves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from kr2cache.errors import CacheError
from kr2cache.report.records import (
    OLDER,
    Collected,
    Configuration,
    Fused,
    Run,
    Sweep,
    SweepCell,
    mapping,
    number,
    sequence,
)
from kr2cache.system.console import count_text
from kr2cache.training.runs import RunFolder, fusions_of

_SEED_FOLDER = re.compile(r"seed-(\d+)")


def collect(run_dir: Path) -> Collected:
    """Read every finished run and every manifest under ``run_dir``.

    Raises:
        CacheError: If there is no finished run.
    """
    if not run_dir.is_dir():
        raise CacheError(
            f"There is no run folder {run_dir}.", "Give the folder that trainings wrote to: kr2cache report RUN_DIR."
        )
    found = Collected()
    for folder in sorted(path for path in run_dir.glob("*/*") if path.is_dir()):
        configuration = _read_configuration(run_dir, folder, found.notes)
        if configuration is not None:
            found.configurations.append(configuration)
    by_folder = {one.folder: one for one in found.configurations}
    for path in sorted(run_dir.glob("sweeps/*.json")):
        try:
            found.sweeps.append(_read_sweep(path, by_folder, found.notes))
        except CacheError as error:
            found.notes.append(f"{_relative(path, run_dir)}: {error.message}; the sweep is left out.")
    _note_extra_seeds(found)
    _note_older_scores(found)
    if not found.configurations:
        reasons = found.notes + [text for sweep in found.sweeps for text in failures(sweep)]
        raise CacheError(
            "\n".join([f"{run_dir} holds no finished run.", *reasons]),
            "Train some first: kr2cache train or kr2cache sweep. Runs in another folder: kr2cache report FOLDER",
        )
    return found


def failures(sweep: Sweep) -> list[str]:
    """One sentence for each reason why cells failed."""
    cells: dict[str, list[str]] = {}
    for cell in sweep.cells.values():
        if cell.error:
            cells.setdefault(cell.error, []).append(f"{cell.row}, {cell.column}")
    return [
        f"{sweep.title}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} failed: {error}"
        for error, names in cells.items()
    ]


def _read_configuration(run_dir: Path, folder: Path, notes: list[str]) -> Configuration | None:
    found: dict[int, Run] = {}
    config: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        match = _SEED_FOLDER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        try:
            run, seed_config = _read_run(RunFolder(path), int(match[1]))
        except CacheError as error:
            notes.append(f"{_relative(path, run_dir)}: {error.message}; the run is left out.")
            continue
        other = next(iter(found.values()), run)
        if (run.split, run.scores.keys()) != (other.split, other.scores.keys()):
            here, there = (f"{', '.join(sorted(one.scores))} on {one.split}" for one in (run, other))
            notes.append(
                f"{_relative(path, run_dir)}: it has {here}, but seed {other.seed} has {there}; the run is left out."
            )
            continue
        found[run.seed], config = run, seed_config
    if not found:
        return None
    return Configuration(_relative(folder, run_dir), config, dict(sorted(found.items())))


def _read_run(folder: RunFolder, seed: int) -> tuple[Run, dict[str, Any]]:
    """Returns the run and its configuration."""
    if not folder.is_finished:
        raise CacheError("there is no metrics.json")
    content = _read_object(folder.config_file)
    config = mapping(content.get("config"))
    missing = [name for name in ("method", "task") if name not in config]
    if missing:
        raise CacheError(f"config.json lacks {' and '.join(missing)}, so another version wrote it")
    metrics = _read_object(folder.metrics_file)
    split = next((name for name in ("test", "dev") if mapping(metrics.get(name))), None)
    if split is None:
        raise CacheError("metrics.json has no score of test or dev")
    scores = {str(name): number(value) for name, value in metrics[split].items()}
    wrong = [name for name, value in scores.items() if value is None]
    if wrong:
        raise CacheError(f"metrics.json: {split} {wrong[0]} is {metrics[split][wrong[0]]!r}, not a number")
    fusion = _read_object(folder.fusion_file) if folder.fusion_file.is_file() else {}
    history = _read_object(folder.history_file) if folder.history_file.is_file() else {}
    run = Run(
        seed=seed,
        path=folder.path,
        split=split,
        scores={name: value for name, value in scores.items() if value is not None},
        recorded=mapping(content.get("recorded")),
        history=[entry for entry in sequence(history.get("epochs")) if isinstance(entry, Mapping)],
        fusions={name: _fused(one) for name, one in fusions_of(fusion).items()} if fusion else {},
        trained=folder.metrics_file.stat().st_mtime,
    )
    return run, config


def _fused(fusion: Mapping[str, Any]) -> Fused:
    layers = tuple(layer for layer in sequence(fusion.get("layers")) if isinstance(layer, int))
    weights = tuple(weight for weight in map(number, sequence(fusion.get("weights"))) if weight is not None)
    learned = fusion.get("trainable") is True and weights and len(weights) == len(layers)
    return Fused(layers, weights if learned else None, number(fusion.get("gamma")) if learned else None)


def _read_sweep(path: Path, by_folder: Mapping[str, Configuration], notes: list[str]) -> Sweep:
    content = _read_object(path)
    rows, columns = ([str(name) for name in sequence(content.get(key))] for key in ("rows", "columns"))
    if not rows or not columns:
        raise CacheError("it has no rows or no columns")
    title = str(content.get("title") or path.stem)
    cells: dict[tuple[str, str], SweepCell] = {}
    for entry in sequence(content.get("cells")):
        cell = _read_cell(mapping(entry), by_folder)
        if cell.row not in rows or cell.column not in columns:
            notes.append(
                f"{title}: the cell {cell.row!r}, {cell.column!r} is in none of its rows and columns; it is left out."
            )
            continue
        cells[cell.row, cell.column] = cell
    return Sweep(
        name=path.stem,
        title=title,
        paper=content.get("paper") if isinstance(content.get("paper"), str) else None,
        rows=tuple(rows),
        columns=tuple(columns),
        baseline=content.get("baseline"),
        baselines={str(row): str(other) for row, other in mapping(content.get("baselines")).items()},
        cells=dict(sorted(cells.items(), key=lambda item: (rows.index(item[0][0]), columns.index(item[0][1])))),
    )


def _read_cell(entry: Mapping[str, Any], by_folder: Mapping[str, Configuration]) -> SweepCell:
    failed = bool(entry.get("error"))  # a folder there holds something else
    folder = str(PurePosixPath(entry["folder"])) if isinstance(entry.get("folder"), str) and not failed else None
    return SweepCell(
        row=str(entry.get("row")),
        column=str(entry.get("column")),
        seeds=tuple(sorted(seed for seed in sequence(entry.get("seeds")) if isinstance(seed, int))),
        folder=folder,
        error=str(entry["error"]) if entry.get("error") else None,
        configuration=by_folder.get(folder or ""),
    )


def _note_extra_seeds(found: Collected) -> None:
    """Note finished seeds that no table shows: a sweep shows only its own seeds."""
    asked: dict[str, set[int]] = {}
    for sweep in found.sweeps:
        for cell in sweep.cells.values():
            asked.setdefault(cell.folder or "", set()).update(cell.seeds)
    for one in found.configurations:
        extra = sorted(set(one.runs) - asked[one.folder]) if one.folder in asked else []
        if extra:
            seeds = ", ".join(map(str, extra))
            found.notes.append(f"{one.folder}: no sweep asks for seed {seeds}, so no table shows it.")


def _note_older_scores(found: Collected) -> None:
    """Note scores that an older version computed differently."""
    older = [one.folder for one in found.configurations if "f1" in one.first.scores and one.older("f1")]
    if older:
        found.notes.append(
            f'F1 of {count_text(len(older), "configuration")} is not XTREME\'s and is marked "{OLDER}": an older '
            "version counted CCONJ and SCONJ as one tag. Word accuracy is right, but the older F1 chose the epoch. "
            f"Train them again to compare them. First: {older[0]}."
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CacheError(f"there is no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CacheError(f"{path.name} is not a JSON object")
    return content


def _relative(path: Path, run_dir: Path) -> str:
    return path.relative_to(run_dir).as_posix()
