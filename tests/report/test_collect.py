"""What is read, what is skipped, and that every skip is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import cell, make_run, make_sweep, write

from kr2cache.errors import CacheError
from kr2cache.report.collect import collect

FOLDER = "piqa/kreader-x-11111111"


def test_a_run_is_read(tmp_path: Path) -> None:
    caches = {"train": 100, "test": 23}
    make_run(tmp_path, FOLDER, 2, 0.5, recorded={"seconds": 12.5, "cache_bytes": caches})
    make_run(tmp_path, FOLDER, 10, 0.6)
    (one,) = collect(tmp_path).configurations
    assert list(one.runs) == [2, 10]
    assert (one.task, one.method, one.metric, one.split) == ("piqa", "kreader", "accuracy", "test")
    assert one.values("accuracy") == [0.5, 0.6]
    assert (one.runs[2].seconds, one.runs[2].cache_bytes) == (12.5, 123)
    assert (one.runs[10].seconds, one.runs[10].cache_bytes) == (None, None)


def test_without_test_dev_is_scored(tmp_path: Path) -> None:
    path = make_run(tmp_path, FOLDER, 1, 0.5)
    write(path / "metrics.json", {"dev": {"accuracy": 0.25}})
    (one,) = collect(tmp_path).configurations
    assert (one.split, one.values(one.metric)) == ("dev", [0.25])


@pytest.mark.parametrize(
    ("settings", "scores", "metric"),
    [
        ({"metric": "accuracy"}, {"accuracy": 0.1, "f1": 0.2}, "accuracy"),
        ({"metric": None}, {"accuracy": 0.1, "f1": 0.2}, "f1"),
        ({"metric": "gone"}, {"accuracy": 0.1}, "accuracy"),
        ({"metric": None}, {"mcc": 0.1}, "mcc"),
    ],
)
def test_the_main_metric(
    tmp_path: Path, settings: dict[str, str | None], scores: dict[str, float], metric: str
) -> None:
    path = make_run(tmp_path, FOLDER, 1, 0.5, settings=settings)
    write(path / "metrics.json", {"test": scores})
    assert collect(tmp_path).configurations[0].metric == metric


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("metrics.json", "{", "metrics.json cannot be read"),
        ("metrics.json", None, "there is no metrics.json"),
        ("metrics.json", "{}", "metrics.json has no score of test or dev"),
        ("metrics.json", '{"test": {"accuracy": NaN}}', "metrics.json: test accuracy is nan, not a number"),
        ("metrics.json", '{"test": {"accuracy": "high"}}', "metrics.json: test accuracy is 'high', not a number"),
        ("config.json", None, "there is no config.json"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", '{"config": {"task": "piqa"}}', "config.json lacks method, so another version wrote it"),
        ("config.json", "{}", "config.json lacks method and task"),
        ("history.json", "\xff", "history.json cannot be read"),
        ("metrics.json", '{"dev": {"accuracy": 0.5}}', "it has accuracy on dev, but seed 1 has accuracy on test"),
        ("metrics.json", '{"test": {"f1": 0.5}}', "it has f1 on test, but seed 1 has accuracy on test"),
    ],
)
def test_a_broken_run_becomes_a_note_and_the_others_stay(
    tmp_path: Path, file: str, content: str | None, why: str
) -> None:
    make_run(tmp_path, FOLDER, 1, 0.5)
    path = make_run(tmp_path, FOLDER, 2, 0.6) / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content, "latin-1")
    found = collect(tmp_path)
    assert list(found.configurations[0].runs) == [1]
    (note,) = found.notes
    assert note.startswith(f"{FOLDER}/seed-2: {why}")
    assert note.endswith("the run is left out.")


def test_unfinished_runs_are_skipped(tmp_path: Path) -> None:
    make_run(tmp_path, FOLDER, 1, 0.5)
    make_run(tmp_path, FOLDER, 2, 0.5).rename(tmp_path / FOLDER / "seed-2.partial")
    found = collect(tmp_path)
    assert (list(found.configurations[0].runs), found.notes) == ([1], [])


@pytest.mark.parametrize("weights", [None, [0.5], ["a", "b"], [float("nan"), 0.5]])
def test_odd_fusion_weights_are_no_weights(tmp_path: Path, weights: list[float] | None) -> None:
    make_run(tmp_path, "piqa/kr2-x-22222222", 1, 0.5, method="kr2", fusion="fuse", weights=weights)
    assert collect(tmp_path).runs[0].weights is None


def test_a_sweep_is_read_and_covers_its_folders(tmp_path: Path) -> None:
    other = "piqa/kr2-x-22222222"
    for seed in (1, 2, 3):
        make_run(tmp_path, FOLDER, seed, 0.5)
        make_run(tmp_path, other, seed, 0.5, method="kr2", fusion="all")
    make_sweep(tmp_path, [cell("KReader", "PIQA", FOLDER, [1, 2, 4]), cell("KR2", "PIQA", None, error="full")])
    found = collect(tmp_path)
    (sweep,) = found.sweeps
    assert (sweep.name, sweep.rows, sweep.columns) == ("small", ("KReader", "KR2"), ("PIQA",))
    assert [one.done for one in sweep.column("PIQA")] == [(1, 2), ()]
    assert [one.folder for one in found.uncovered] == [other]
    assert found.notes == [f"{FOLDER}: no sweep asks for seed 3, so no table shows it."]


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "broken.json cannot be read"), ("{}", "it has no rows or no columns")],
)
def test_a_broken_manifest_becomes_a_note(tmp_path: Path, content: str, why: str) -> None:
    make_run(tmp_path, FOLDER, 1, 0.5)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "broken.json").write_text(content, "utf-8")
    found = collect(tmp_path)
    assert found.sweeps == []
    assert found.notes[0].startswith(f"sweeps/broken.json: {why}")


def test_a_cell_outside_the_table_becomes_a_note(tmp_path: Path) -> None:
    make_run(tmp_path, FOLDER, 1, 0.5)
    path = make_sweep(tmp_path, [cell("KReader", "PIQA", FOLDER, [1])])
    content = json.loads(path.read_text("utf-8"))
    content["cells"].append(cell("KReader", "SNLI", FOLDER, [1]))
    write(path, content)
    assert "the cell 'KReader', 'SNLI' is in none of its rows and columns" in collect(tmp_path).notes[0]


def test_nothing_to_report_says_why(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="There is no run folder"):
        collect(tmp_path / "nowhere")
    with pytest.raises(CacheError, match="holds no finished run") as caught:
        collect(tmp_path)
    assert "kr2cache train" in caught.value.remedy
    make_run(tmp_path, FOLDER, 1, 0.5)
    (tmp_path / FOLDER / "seed-1" / "config.json").unlink()
    make_sweep(tmp_path, [cell("KR2", "PIQA", None, error="the disk is full")])
    with pytest.raises(CacheError, match="no finished run") as caught:
        collect(tmp_path)
    assert "there is no config.json" in caught.value.message
    assert "KR2, PIQA failed: the disk is full" in caught.value.message
