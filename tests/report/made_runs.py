"""Run folders and manifests as ``train`` and ``sweep`` leave them, without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAGS = ("NOUN", "VERB", "ADJ")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), "utf-8")


def make_run(
    run_dir: Path,
    folder: str,
    seed: int,
    score: float,
    *,
    method: str = "kreader",
    fusion: str = "",
    right: Sequence[bool] = (),
    layers: Sequence[int] = (0, 1),
    weights: Sequence[float] | None = None,
    gamma: float | None = None,
    settings: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, float]] = (),
) -> Path:
    """One finished run. The task is the folder's first part: ``udpos...`` is tagging, two words a sentence.

    Args:
        score: Fraction, of the main metric.
        right: Whether each example (each sentence's first word) is right; sentences' second words are cut off.
    """
    task = folder.split("/", maxsplit=1)[0]
    tagging = task.startswith("udpos")
    path = run_dir / folder / f"seed-{seed}"
    config: dict[str, Any] = {
        "task": task,
        "method": method,
        "metric": "f1" if tagging else "accuracy",
        "data": {"train": "0" * 32},
        "reader": {"name": "xlm-r", "weights": "1" * 32, "max_length": 128},
        "epochs": 3.0,
        "batch_size": 32,
        "learning_rate": 2e-5,
        "training": {},
        "procedure": 3,
        "seed": seed,
    }
    if method == "kr2":
        config["resource"] = {"name": "gottbert", "weights": ["2" * 32], "dtype": "float16"}
        config["fusion"] = {"name": fusion, "layers": list(layers)}
        write(
            path / "fusion.json",
            {
                "fusion": fusion,
                "layers": list(layers),
                "trainable": fusion in ("fuse", "softmax", "mix"),
                "weights": weights,
                **({} if gamma is None else {"gamma": gamma}),
            },
        )
    write(path / "config.json", {"config": config | dict(settings or {}), "recorded": dict(recorded or {})})
    scores: dict[str, float] = {"accuracy": score}
    if tagging:
        scores = {"accuracy": score + 0.05, "f1": score, "cut_off_words": len(right)}
    write(path / "metrics.json", {"dev": {"accuracy": 0.1, "f1": 0.1}, "test": scores})
    write(path / "history.json", {"best_epoch": 1.0, "epochs": list(history)})
    lines = []
    for position, is_right in enumerate(right):
        gold, other = TAGS[position % 3], TAGS[(position + 1) % 3]
        predicted = gold if is_right else other
        row = {"id": f"test-{position}", "gold": gold, "predicted": predicted}
        if tagging:
            row |= {"gold": [gold, "NOUN"], "predicted": [predicted, None]}
        lines.append(json.dumps(row) + "\n")
    (path / "predictions-test.jsonl").write_text("".join(lines), "utf-8")
    return path


def cell(row: str, column: str, folder: str | None, seeds: Sequence[int] = (1, 2, 3), error: str | None = None) -> Any:
    return {"row": row, "column": column, "folder": folder, "seeds": list(seeds), "error": error}


def make_sweep(run_dir: Path, cells: Sequence[Any], name: str = "small", **more: Any) -> Path:
    """A manifest with the rows and columns of its cells, in their order."""
    content = {
        "name": name,
        "title": f"Sweep {name}",
        "paper": None,
        "rows": list(dict.fromkeys(one["row"] for one in cells)),
        "columns": list(dict.fromkeys(one["column"] for one in cells)),
        "baseline": None,
        "cells": list(cells),
    }
    path = run_dir / "sweeps" / f"{name}.json"
    write(path, content | more)
    return path
