"""From run folders to files: numbers against NumPy, what is bold, what is noise, one page that needs nothing else."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from made_runs import cell, make_run, make_sweep
from matplotlib.image import imread

from kr2cache.errors import CacheError
from kr2cache.report import describe, report, saved_sentence
from kr2cache.report.collect import collect
from kr2cache.report.tables import Cell, Table
from kr2cache.system.console import console

KREADER, KR2, LAYER = "udpos-de/kreader-x-11111111", "udpos-de/kr2-x-last4-22222222", "udpos-de/kr2-x-layer{}-3333333{}"
SCORES = {KREADER: (0.801, 0.805, 0.797), KR2: (0.812, 0.819, 0.811)}
SEEDS = (1, 2, 3)


def two_rows(run_dir: Path, **sweep: Any) -> None:
    """KReader and KR2 on German, three seeds; KR2 is right on 12 of 20 sentences more."""
    for seed, score in zip(SEEDS, SCORES[KREADER], strict=True):
        make_run(run_dir, KREADER, seed, score, right=[False] * 12 + [True] * 8)
    for seed, score in zip(SEEDS, SCORES[KR2], strict=True):
        make_run(run_dir, KR2, seed, score, method="kr2", fusion="last4", right=[True] * 20)
    cells = [cell("KReader", "De", KREADER), cell("KR2", "De", KR2)]
    make_sweep(run_dir, cells, **({"baseline": "KReader", "paper": "table1"} | sweep))


def table_of(run_dir: Path, name: str = "small") -> Table:
    return next(table for table in report(run_dir, None).tables if table.name == name)


def column(table: Table, position: int = 1) -> list[Cell]:
    return [row[position] for row in table.rows]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_mean_and_std_are_numpys(tmp_path: Path) -> None:
    two_rows(tmp_path)
    made = report(tmp_path, None)
    rows = read_csv(made.folder / "small.csv")
    for row, folder in zip(rows, (KREADER, KR2), strict=True):
        assert float(row["mean"]) == pytest.approx(100 * np.mean(SCORES[folder]), abs=1e-6)
        assert float(row["std"]) == pytest.approx(100 * np.std(SCORES[folder], ddof=1), abs=1e-6)
        assert (row["seeds"], row["folder"]) == ("3", folder)
    assert list(rows[0]) == [
        "row",
        "column",
        "mean",
        "std",
        "seeds",
        "older",
        "paper",
        "p_examples",
        "p_seeds",
        "p",
        "noise",
        "folder",
    ]
    assert [cell.text for cell in column(made.tables[0])] == ["80.1 ± 0.4", "81.4 ± 0.4"]


def test_the_best_of_a_column_is_bold_in_every_form(tmp_path: Path) -> None:
    two_rows(tmp_path)
    made = report(tmp_path, None)
    assert [cell.bold for cell in column(made.tables[0])] == [False, True]
    assert "| KR2 | **81.4 ± 0.4** |" in (made.folder / "small.md").read_text("utf-8")
    assert r"\textbf{81.4 $\pm$ 0.4}" in (made.folder / "small.tex").read_text("utf-8")
    assert "<strong>81.4 ± 0.4</strong>" in (made.folder / "report.html").read_text("utf-8")


def test_what_reads_as_equal_is_bold_together_and_one_alone_is_not(tmp_path: Path) -> None:
    for folder, score in (("a-11111111", 0.80001), ("b-22222222", 0.80004), ("c-33333333", 0.7)):
        make_run(tmp_path, f"piqa/{folder}", 1, score)
    make_run(tmp_path, "swag/a-44444444", 1, 0.5)
    cells = [cell(folder[:1], "PIQA", f"piqa/{folder}", [1]) for folder in ("a-11111111", "b-22222222", "c-33333333")]
    make_sweep(tmp_path, [*cells, cell("a", "SWAG", "swag/a-44444444", [1])])
    table = table_of(tmp_path)
    assert [cell.bold for cell in column(table)] == [True, True, False]
    assert [cell.bold for cell in column(table, 2)] == [False] * 3


def test_a_difference_that_both_tests_see_has_no_mark(tmp_path: Path) -> None:
    two_rows(tmp_path)
    made = report(tmp_path, None)
    baseline, kr2 = read_csv(made.folder / "small.csv")
    assert (baseline["p_examples"], baseline["p_seeds"], baseline["noise"]) == ("", "", "")
    assert float(kr2["p_examples"]) < 0.05
    assert float(kr2["p_seeds"]) < 0.05
    assert float(kr2["p"]) == max(float(kr2["p_examples"]), float(kr2["p_seeds"]))
    assert kr2["noise"] == "false"
    assert [cell.mark for cell in column(made.tables[0])] == ["", ""]
    (difference,) = read_csv(made.folder / "small-differences.csv")
    assert float(difference["points"]) == pytest.approx(1.3)
    assert difference["baseline"] == "KReader"
    assert [cell.text for cell in made.tables[1].rows[0]][3] == "+1.3"
    assert made.tables[1].legend[0].endswith("the larger of both, by Holm's method for 1 comparison.")


@pytest.mark.parametrize(("score", "shown"), [(0.8, "0.0"), (0.79996, "0.0"), (0.79, "−1.0")])
def test_points_have_a_sign_unless_they_are_zero(tmp_path: Path, score: float, shown: str) -> None:
    make_run(tmp_path, "piqa/a-11111111", 1, 0.8)
    make_run(tmp_path, "piqa/b-22222222", 1, score)
    cells = [cell("a", "PIQA", "piqa/a-11111111", [1]), cell("b", "PIQA", "piqa/b-22222222", [1])]
    make_sweep(tmp_path, cells, baseline="a")
    assert table_of(tmp_path, "small-differences").rows[0][3].text == shown


def test_a_difference_that_could_be_noise_is_marked_and_the_legend_says_what_that_means(tmp_path: Path) -> None:
    two_rows(tmp_path)
    for seed in SEEDS:
        make_run(tmp_path, KR2, seed, SCORES[KR2][seed - 1], method="kr2", fusion="last4", right=[True, False] * 10)
        make_run(tmp_path, KREADER, seed, SCORES[KREADER][seed - 1], right=[False, True] * 10)
    table = table_of(tmp_path)
    assert [cell.mark for cell in column(table)] == ["", "≈"]
    legend = table.legend[-1]
    for part in (
        "could be noise",
        "KReader",
        "p < 0.05",
        "corrected for the number of comparisons (Holm)",
        "word accuracy, while the table shows F1",
    ):
        assert part in legend


def test_one_seed_has_no_deviation_and_no_verdict(tmp_path: Path) -> None:
    make_run(tmp_path, KREADER, 1, 0.5, right=[False] * 20)
    make_run(tmp_path, KR2, 1, 0.9, method="kr2", right=[True] * 20)
    make_sweep(tmp_path, [cell("KReader", "De", KREADER, [1]), cell("KR2", "De", KR2, [1])], baseline="KReader")
    made = report(tmp_path, None)
    kr2 = read_csv(made.folder / "small.csv")[1]
    assert (kr2["std"], kr2["p_seeds"], kr2["p"], kr2["noise"]) == ("", "", "", "")
    assert [(cell.text, cell.remark, cell.mark) for cell in column(made.tables[0])] == [
        ("50.0", "", ""),
        ("90.0", "", "?"),
    ]
    assert "?: no verdict: both rows need 3 or more seeds in common." in made.tables[0].legend[1]
    assert made.tables[1].legend[0].endswith("p corrected: none, because no comparison has a verdict.")


@pytest.mark.parametrize(("folder", "remarks"), [(KR2, ["", "2/3"]), (KREADER, ["2/3", ""])])
def test_missing_seeds_are_said_and_only_common_seeds_are_compared(
    tmp_path: Path, folder: str, remarks: list[str]
) -> None:
    two_rows(tmp_path)
    (tmp_path / folder / "seed-2").rename(tmp_path / folder / "seed-2.partial")
    made = report(tmp_path, None)
    assert [cell.remark for cell in column(made.tables[0])] == remarks
    assert "2/3: two of three seeds are finished." in made.tables[0].legend[0]
    (difference,) = read_csv(made.folder / "small-differences.csv")
    assert difference["seeds"] == "1 3"
    assert float(difference["points"]) == pytest.approx(100 * ((0.812 + 0.811) - (0.801 + 0.797)) / 2)


def test_unequal_examples_are_not_compared_and_a_note_says_so(tmp_path: Path) -> None:
    two_rows(tmp_path)
    path = tmp_path / KR2 / "seed-3" / "predictions-test.jsonl"
    path.write_text(path.read_text("utf-8").replace("test-7", "test-99"), "utf-8")
    made = report(tmp_path, None)
    assert [table.name for table in made.tables] == ["small"]
    assert read_csv(made.folder / "small.csv")[1]["noise"] == ""
    assert [cell.mark for cell in column(made.tables[0])] == ["", "?"]
    assert any("?: no verdict: the difference could not be tested." in sentence for sentence in made.tables[0].legend)
    (note,) = made.notes
    assert note.startswith("Sweep small: KR2 and KReader are not compared on De: the example ids of")


def test_an_older_f1_is_marked_and_compared_with_no_other(tmp_path: Path) -> None:
    two_rows(tmp_path)
    for seed, score in zip(SEEDS, SCORES[KR2], strict=True):
        before = {"procedure": 2}
        make_run(tmp_path, KR2, seed, score, method="kr2", fusion="last4", right=[True] * 20, settings=before)
    made = report(tmp_path, None)
    (table,) = made.tables
    assert [(one.plain, one.bold, one.mark) for one in column(table)] == [
        ("80.1 ± 0.4", False, ""),
        ("81.4 ± 0.4 (older)", False, "?"),
    ]
    assert "older: an older version computed this F1" in table.legend[0]
    assert [row["older"] for row in read_csv(made.folder / "small.csv")] == ["false", "true"]
    said = " ".join(made.notes)
    assert "KR2 and KReader are not compared on De: an older version computed the F1" in said
    assert f"Train them again to compare them. First: {KR2}." in said


def test_a_failed_cell_says_so_and_the_reason_is_in_the_page(tmp_path: Path) -> None:
    two_rows(tmp_path)
    cells = [cell("KReader", "De", KREADER), cell("KR2", "De", None, error="<disk> full"), cell("KD", "De", None)]
    make_sweep(tmp_path, cells, paper="table1")
    made = report(tmp_path, None)
    assert [cell.text for cell in column(made.tables[0])] == ["80.1 ± 0.4", "failed", "–"]
    assert made.failures == ["Sweep small: KR2, De failed: <disk> full"]
    assert "&lt;disk&gt; full" in (made.folder / "report.html").read_text("utf-8")
    assert made.json()["failed"] == made.failures


def table2(run_dir: Path, missing: str | None = None, **sweep: Any) -> None:
    cells = []
    for column_name, shift in (("De", 0.0), ("Zh", -0.2)):
        for row, score in (("KReader", 0.8), ("trainable", 0.82)):
            folder = f"udpos-{column_name.lower()}/{row.lower()}-11111111"
            for seed in (1, 2):
                make_run(run_dir, folder, seed, score + shift + seed * (0.01 if column_name == "De" else 0.03))
            cells.append(cell(row, column_name, None if f"{row} {column_name}" == missing else folder, [1, 2]))
    make_sweep(run_dir, cells, paper="table2", **sweep)


def test_with_two_seeds_no_difference_gets_a_verdict(tmp_path: Path) -> None:
    """One difference of seeds happens to have hardly any spread: it alone would look like more than noise."""
    scores = {"KReader": (0.80, 0.81), "layer 0": (0.795, 0.8051), "layer 1": (0.78, 0.804), "fuse": (0.81, 0.85)}
    cells = []
    for row, of_seed in scores.items():
        folder = f"piqa/{row.replace(' ', '')}-11111111"
        for seed, score in enumerate(of_seed, 1):
            make_run(tmp_path, folder, seed, score, right=[row == "KReader"] * 20)
        cells.append(cell(row, "PIQA", folder, [1, 2]))
    make_sweep(tmp_path, cells, baseline="KReader")
    made = report(tmp_path, None)
    assert [one.mark for one in column(made.tables[0])] == ["", "?", "?", "?"]
    assert {row[-1].text for row in made.tables[1].rows} == {"no verdict"}
    assert "both rows need 3 or more seeds in common" in made.tables[0].legend[1]


def test_table_2_has_the_mean_over_its_columns(tmp_path: Path) -> None:
    table2(tmp_path, baseline="KReader")
    table = table_of(tmp_path)
    assert table.columns == ("", "De", "Zh", "mean")
    mean = next(r for r in table.records if (r["row"], r["column"]) == ("trainable", "mean"))
    of_seeds = [np.mean([82 + seed, 62 + 3 * seed]) for seed in (1, 2)]
    assert mean["mean"] == pytest.approx(np.mean(of_seeds))
    assert mean["std"] == pytest.approx(np.std(of_seeds, ddof=1))
    assert (mean["paper"], mean["noise"]) == (73.1, None)
    assert [one.mark for one in column(table, 3)] == ["", "?"], "two seeds: no verdict, of the mean neither"
    assert [cell.under for cell in column(table, 3)] == ["72.5", "73.1"]
    assert "Its mean is over De, Zh, Ar, Es." in table.legend[0]


def test_a_row_that_is_not_complete_has_no_mean(tmp_path: Path) -> None:
    table2(tmp_path, missing="trainable Zh")
    assert [cell.text for cell in column(table_of(tmp_path), 3)] == ["73.0 ± 1.4", "–"]


@pytest.mark.parametrize(
    ("sweep", "against"),
    [
        (
            {"paper": "table3", "baseline": "KReader (A)"},
            {"KR2 (B-A)": "KReader (A)", "KR2 (A-B)": "KResource (B)"},
        ),
        (
            {"baseline": "KReader (A)", "baselines": {"KR2 (A-B)": "KR2 (B-A)"}},
            {"KR2 (B-A)": "KReader (A)", "KR2 (A-B)": "KR2 (B-A)", "KResource (B)": "KReader (A)"},
        ),
        ({"baseline": None}, {}),
    ],
)
def test_rows_are_compared_with_their_baseline(tmp_path: Path, sweep: dict[str, Any], against: dict[str, str]) -> None:
    cells = []
    for position, row in enumerate(("KReader (A)", "KR2 (B-A)", "KResource (B)", "KR2 (A-B)")):
        make_run(tmp_path, f"piqa/x-{position}", 1, 0.5, right=[True, False])
        cells.append(cell(row, "PIQA", f"piqa/x-{position}", [1]))
    make_sweep(tmp_path, cells, **sweep)
    made = report(tmp_path, None)
    found = {r["row"]: r["baseline"] for table in made.tables if table.details for r in table.records}
    assert found == against


def test_other_runs_show_every_metric_and_the_settings_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path, KREADER, 1, 0.80, right=[True] * 4)
    make_run(tmp_path, KREADER.replace("1" * 8, "9" * 8), 1, 0.75, settings={"learning_rate": 3e-4})
    for seed, score in ((1, 0.81), (4, 0.83)):
        make_run(tmp_path, KR2, seed, score, method="kr2", fusion="last4", right=[True] * 4)
    table = table_of(tmp_path, "other-runs-udpos-de")
    assert table.title == "Other runs on udpos-de"
    assert table.columns == (
        *("method", "reader", "resource or teacher", "fusion", "learning_rate", "run"),
        *("accuracy", "F1", "words without a label", "seeds"),
    )
    shown = [[cell.text for cell in row] for row in table.rows]
    assert shown[0] == ["KReader", "xlm-r", "", "", "2e-05", "11111111", "85.0", "80.0", "4", "1"]
    assert shown[1][4:8] == ["0.0003", "99999999", "80.0", "75.0"]
    assert shown[2] == [
        "KR2",
        "xlm-r",
        "gottbert",
        "last4",
        "2e-05",
        "22222222",
        "87.0 ± 1.4",
        "82.0 ± 1.4",
        "4",
        "1 4",
    ]
    assert [row[7].bold for row in table.rows] == [False, False, True]
    record = read_csv(tmp_path / "report" / "other-runs-udpos-de.csv")[2]
    assert float(record["f1_mean"]) == pytest.approx(0.82)
    assert float(record["f1_std"]) == pytest.approx(np.std([0.81, 0.83], ddof=1))


def test_of_rows_that_differ_in_an_id_alone_the_older_is_stale(tmp_path: Path) -> None:
    other, newest = KREADER.replace("1" * 8, "9" * 8), KREADER.replace("1" * 8, "8" * 8)
    recorded = {"corpus": "de", "examples": {"train": 1270}}
    for age, folder in enumerate((newest, KREADER)):
        data = {"data": {"train": f"{age}" * 32, "dev": "3" * 32}}
        path = make_run(tmp_path, folder, 1, 0.8 + age / 100, settings=data, recorded=recorded)
        at = 1_700_000_000 - 86_400 * age
        os.utime(path / "metrics.json", (at, at))
    make_run(tmp_path, other, 1, 0.75, settings={"learning_rate": 3e-4}, recorded=recorded)
    made = report(tmp_path, None)
    (table,) = made.tables
    data, trained, state, run = (table.columns.index(name) for name in ("data", "trained", "state", "run"))
    shown = {row[run].text: (row[data].text, row[trained].text[:9], row[state].text) for row in table.rows}
    assert shown["1" * 8] == ("de, train 1,270", "2023-11-1", "stale")
    assert shown["8" * 8] == ("de, train 1,270", "2023-11-1", "")
    assert shown["9" * 8][2] == ""
    assert f"{KREADER} is stale: {newest} is newer and was trained on other data (train)." in made.notes
    assert "stale: a newer run with the same settings" in table.legend[0]


def everything(run_dir: Path) -> None:
    """A sweep with layers, learned weights, curves, time and bytes, a failed cell, other runs and a broken one."""
    history = [{"loss": 1.0, "epoch": 1.0}, {"epoch": 1.0, "dev_f1": 0.5}, {"loss": 0.5, "epoch": 2.0}]
    two_rows(run_dir)
    cells = [cell("KReader", "De", KREADER), cell("average of the last 4", "De", KR2)]
    for layer in (0, 1, 11):
        folder = LAYER.format(layer, layer)
        for seed in SEEDS:
            more: dict[str, Any] = {"right": [True] * 20, "history": history, "recorded": RECORDED}
            make_run(run_dir, folder, seed, 0.8 + seed / 100, method="kr2", fusion=f"layer{layer}", **more)
        cells.append(cell(f"layer {layer}", "De", folder))
    for seed in SEEDS:
        weights = [0.4 + seed / 50, 0.6 - seed / 50]
        make_run(run_dir, "udpos-de/kr2-x-fuse-44444444", seed, 0.8, method="kr2", fusion="fuse", weights=weights)
    make_sweep(run_dir, [*cells, cell("trainable", "De", None, error="no <room>")], name="layers", paper="table2")
    make_run(run_dir, "piqa/kreader-x-55555555", 1, 0.5)
    (run_dir / "piqa" / "kreader-x-55555555" / "seed-2").mkdir()


RECORDED = {
    "seconds": 100.0,
    "cache_bytes": {"train": 2_000_000, "test": 500_000},
    "resource_sequences_read": 300,
    "caches": {"train": {"fingerprint": "f1", "sequences": 90}, "test": {"fingerprint": "f2", "sequences": 30}},
}


class Reader(HTMLParser):
    """Checks that every element is closed, and collects ids, references and text."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_table_too_wide_for_the_window_says_that_it_scrolls(tmp_path: Path) -> None:
    cells = []
    for column_name in ("De", "Ko", "Ja", "Zh", "Ar", "Es"):
        make_run(tmp_path, f"piqa/x-{column_name}", 1, 0.5)
        cells.append(cell("KReader", column_name, f"piqa/x-{column_name}", [1]))
    make_sweep(tmp_path, cells, name="wide")
    make_sweep(tmp_path, cells[:1], name="narrow")
    page = (report(tmp_path, None).folder / "report.html").read_text("utf-8")
    until = {name: int(rem) for rem, name in re.findall(r"max-width: (\d+)rem\) { #hint-(\w+) { display: block", page)}
    assert until["narrow"] < 390 / 16 < until["wide"]
    assert page.count("scroll it sideways") == 2


def test_the_page_parses_and_needs_nothing_else(tmp_path: Path) -> None:
    everything(tmp_path)
    made = report(tmp_path, None)
    html = (made.folder / "report.html").read_text("utf-8")
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {reference[1:] for reference in reader.references} <= set(reader.ids)
    assert all(reference.startswith("#") for reference in reader.references)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert re.findall(r"@import|url\((?!#)", html) == []
    assert reader.tags.count("svg") == len(made.plots)
    assert reader.tags.count("style") == 1, "a plot's own rules would be the whole page's"
    assert html.count('role="img" aria-label="') == len(made.plots)
    for part in ("Failed cells", "no <room>", "Notes", "there is no metrics.json", "Other runs on piqa"):
        assert part in reader.text


def test_plots_are_drawn_where_there_is_data(tmp_path: Path) -> None:
    everything(tmp_path)
    made = report(tmp_path, None)
    plots = {plot.title: plot for plot in made.plots}
    assert list(plots) == [
        "Score by layer: Sweep layers, De",
        "Learned fusion weights: udpos-de",
        "Training curves: udpos-de",
        "Time and disk: udpos-de",
    ]
    layers = plots["Score by layer: Sweep layers, De"]
    assert "layer 0: 82.0; layer 1: 82.0; layer 11: 82.0; KReader alone: 80.1; average of the last 4: 81.4" in (
        layers.described
    )
    for text in ("F1 on test (%)", "layer of the resource (0: word embeddings)", "KReader alone", ">11<"):
        assert text in layers.svg
    assert "uniform over 2 layers" in plots["Learned fusion weights: udpos-de"].svg
    for text in ("training loss", "F1 on dev (%)", "epoch", ">layer 11<"):
        assert text in plots["Training curves: udpos-de"].svg
    for text in ("time of a run (s)", "its caches (MB)", "2.5 MB", "1 min 40 s"):
        assert text in plots["Time and disk: udpos-de"].svg


def test_plots_name_configurations_as_the_rows_do_and_in_one_order(tmp_path: Path) -> None:
    cells = []
    for task, digits in (("a", "12"), ("b", "21")):
        for pool, digit in zip(("none", "word"), digits, strict=True):
            folder = f"{task}/kr2-x-last4-{digit * 8}"
            settings = {"resource": {"name": "x", "pool": pool}}
            make_run(tmp_path, folder, 1, 0.5, method="kr2", fusion="last4", settings=settings, recorded=RECORDED)
            cells.append(cell({"none": "KR2", "word": "KR2 words"}[pool], task, folder))
    make_sweep(tmp_path, cells)
    made = {plot.title: plot.described for plot in report(tmp_path, None).plots}
    for task in "ab":
        bars = "KR2: 1 min 40 s, 2.5 MB; KR2 words: 1 min 40 s, 2.5 MB."
        assert made[f"Time and disk: {task}"] == f"Time and disk: {task}. {bars}"
    make_sweep(tmp_path, [cell("Pooled", "a", "a/kr2-x-last4-22222222")], name="other")
    made = {plot.title: plot.described for plot in report(tmp_path, None).plots}
    assert "KR2 last4: 1 min 40 s" in made["Time and disk: a"], "it has two names: neither is shown"


def test_learned_weights_have_the_names_of_their_fusions(tmp_path: Path) -> None:
    for place, (fusion, gamma) in enumerate({"fuse": None, "softmax": None, "mix": 1.2}.items()):
        for seed in SEEDS:
            more: dict[str, Any] = {"weights": [0.25, 0.75], "gamma": gamma and gamma + (seed - 2) / 10}
            folder = f"udpos-de/kr2-x-{fusion}-{place}4444444"
            make_run(tmp_path, folder, seed, 0.8, method="kr2", fusion=fusion, **more)
    for layer in (0, 1):
        make_run(tmp_path, LAYER.format(layer, layer), 1, 0.8, method="kr2", fusion=f"layer{layer}")
    made = report(tmp_path, None)
    plots = {plot.title: plot.svg for plot in made.plots}
    for text in ("KR2 fuse<", "KR2 softmax<", "KR2 mix, gamma 1.200<"):
        assert text in plots["Learned fusion weights: udpos-de"]
    for text in (">trainable<", ">trainable, sum 1<", ">ELMo's scalar mix<"):
        assert text in plots["Score by layer: udpos-de"]
    (table,) = made.tables
    assert [row[table.columns.index("fusion")].text for row in table.rows][2:] == ["fuse", "mix", "softmax"]
    found = {one["fusion"]: one["seeds"] for one in made.json()["configurations"]}
    assert [one["fusions"][0]["gamma"] for one in found["mix"]] == pytest.approx([1.1, 1.2, 1.3])
    assert found["softmax"][0]["fusions"][0]["gamma"] is None
    assert found["softmax"][0]["weights"] == found["softmax"][0]["fusions"][0]["weights"] == [0.25, 0.75]


def test_a_kept_head_is_a_setting_that_older_runs_did_not_have(tmp_path: Path) -> None:
    for digits, settings in (("1", {}), ("2", {"keep_head": True})):
        make_run(tmp_path, f"piqa/kreader-x-{digits * 8}", 1, 0.5, settings=settings)
    (table,) = report(tmp_path, None).tables
    assert [row[table.columns.index("keep_head")].text for row in table.rows] == ["False", "True"]


@pytest.mark.parametrize(
    ("before", "now", "shown"),
    [
        ({}, {"weights_dtype": "bfloat16"}, {"resource.weights_dtype": ["bfloat16", "float32"]}),
        ({"second": {"max_length": 64}}, {"second": {"max_length": 128}}, {"resource e5.max_length": ["64", "128"]}),
        (
            {"second": {"projection": "none"}},
            {"second": {"projection": "mlp", "weights_dtype": "bfloat16"}},
            {"resource e5.projection": ["mlp", "none"], "resource e5.weights_dtype": ["bfloat16", "float32"]},
        ),
    ],
)
def test_settings_of_every_resource_are_settings(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], shown: dict[str, list[str]]
) -> None:
    for digits, changes in (("1", dict(before)), ("2", dict(now))):
        second = {
            "name": "e5",
            "weights": ["3"],
            "fusion": {"name": "all", "layers": [0, 1]},
            "tokens": {"train": digits},
        }
        more = {"more_resources": [second | changes.pop("second")]} if "second" in changes else {}
        first = {"name": "gottbert", "weights": ["2" * 32], "dtype": "float16", **changes}
        settings = {"resource": first, **more}
        make_run(tmp_path, f"piqa/kr2-x-{digits * 8}", 1, 0.5, method="kr2", fusion="all", settings=settings)
    (table,) = report(tmp_path, None).tables
    own = table.columns[table.columns.index("fusion") + 1 : table.columns.index("run")]
    found = {name: [row[table.columns.index(name)].text for row in table.rows] for name in own}
    assert {name: values for name, values in found.items() if name not in ("data", "trained", "state")} == shown


def test_each_plot_is_a_file_of_its_own_as_svg_and_png(tmp_path: Path) -> None:
    everything(tmp_path)
    made = report(tmp_path, None)
    assert {"training-curves-udpos-de.svg", "score-by-layer-sweep-layers-de.png"} <= set(made.files)
    for plot in made.plots:
        root = ElementTree.parse(made.folder / f"{plot.name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        width, height = (float(root.attrib[side].removesuffix("pt")) for side in ("width", "height"))
        pixels = imread(made.folder / f"{plot.name}.png")
        assert pixels.shape[:2] == pytest.approx((height * 200 / 72, width * 200 / 72), abs=1)
        assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5, "something is drawn on white"


def test_plots_of_alike_titles_are_files_of_their_own(tmp_path: Path) -> None:
    """Titles in another script have no letter for a file name; other settings of the same models are one plot more."""
    for column_name, first in (("德语", 0), ("中文", 4)):
        cells = []
        for layer in range(4):
            folder = f"udpos/x-{first + layer}"
            settings = {"learning_rate": 1e-4} if layer > 1 else {}
            make_run(tmp_path, folder, 1, 0.8, method="kr2", fusion=f"layer{layer % 2}", settings=settings)
            cells.append(cell(f"{layer}", column_name, folder, [1]))
        make_sweep(tmp_path, cells, name=f"sweep{first}", title=column_name)
    made = report(tmp_path, None)
    assert len(made.plots) == 4
    assert len({plot.title for plot in made.plots}) == 4
    names = [name for name in made.files if name.endswith(".png")]
    assert len(set(names)) == 4
    assert all((made.folder / name).is_file() for name in names)


@pytest.mark.parametrize(
    ("epochs", "ticks"),
    [
        ([1.0], ["1"]),
        ([0.5], ["0.5"]),
        ([1.0, 2.0, 3.0], ["1", "2", "3"]),
        (range(1, 41), [str(epoch) for epoch in range(0, 41, 5)]),
    ],
)
def test_ticks_of_training_curves_are_epochs(tmp_path: Path, epochs: Sequence[float], ticks: list[str]) -> None:
    make_run(tmp_path, "piqa/kreader-1", 1, 0.5, history=[{"loss": 1 / epoch, "epoch": epoch} for epoch in epochs])
    (plot,) = report(tmp_path, None).plots
    root = ElementTree.fromstring(plot.svg)
    axis = next(one for one in root.iter() if one.attrib.get("id", "").endswith("matplotlib.axis_1"))
    shown = ["".join(one.itertext()).strip() for one in axis.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in shown if text != "epoch"] == ticks


def test_many_bars_are_several_plots(tmp_path: Path) -> None:
    for number in range(61):
        recorded = {"seconds": 1.0 + number} if number < 60 else {"cache_bytes": {"train": 7}}
        make_run(tmp_path, f"piqa/x-{number:02}", 1, 0.5, recorded=recorded)
    first, second = report(tmp_path, None).plots
    assert (first.title, second.title) == ("Time and disk: piqa (1 of 2)", "Time and disk: piqa (2 of 2)")
    assert "its caches" not in first.svg
    assert "time of a run" not in second.svg


def test_names_are_drawn_as_they_are_and_the_palette_may_run_out(tmp_path: Path) -> None:
    history = [{"loss": 1.0, "epoch": 1.0}]
    for position in range(9):
        settings = {"reader": {"name": f"a${position}$<b>"}}
        make_run(tmp_path, f"piqa/kreader-{position}", 1, 0.5, settings=settings, history=history)
    plots = report(tmp_path, None).plots
    assert [plot.title for plot in plots] == ["Training curves: piqa (1 of 2)", "Training curves: piqa (2 of 2)"]
    assert ">KReader, a$0$&lt;b&gt;<" in plots[0].svg
    assert ">KReader, a$8$&lt;b&gt;<" in plots[1].svg


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    everything(tmp_path / "runs")
    first, second = (report(tmp_path / "runs", tmp_path / name) for name in ("first", "second"))
    assert first.files == second.files
    for name in first.files:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    left, right = first.json(), second.json()
    assert left.pop("folder") != right.pop("folder")
    assert json.dumps(left, allow_nan=False) == json.dumps(right, allow_nan=False)
    assert sorted(path.name for path in first.folder.iterdir()) == sorted(first.files)


def test_a_report_in_the_run_folder_is_no_run(tmp_path: Path) -> None:
    everything(tmp_path)
    assert report(tmp_path, None).json() == report(tmp_path, None).json()


@pytest.mark.parametrize(
    ("recorded", "sentence"),
    [
        ([RECORDED, RECORDED], "read the states of 600 sequences. The resources ran on 120: 480 forward passes saved."),
        (
            [RECORDED, RECORDED | {"caches": {"train": {"fingerprint": "f1", "sequences": 900}}}],
            "600 sequences. The resources ran on 930: 0 forward passes saved.",
        ),
        (
            [RECORDED, RECORDED | {"resource_sequences_read": None}],
            "120: 180 forward passes saved. 1 run did not record this and is left out.",
        ),
        ([{}, {"caches": {}}], ""),
        ([{"caches": {"train": {"folder": "x"}}}], ""),
    ],
)
def test_what_the_cache_saved(tmp_path: Path, recorded: list[dict[str, Any]], sentence: str) -> None:
    for seed, one in enumerate(recorded):
        make_run(tmp_path, KR2, seed, 0.5, method="kr2", recorded=one)
    assert saved_sentence(collect(tmp_path).runs).endswith(sentence)
    assert bool(saved_sentence(collect(tmp_path).runs)) == bool(sentence)


def test_describe_shows_tables_notes_and_where_it_was_written(tmp_path: Path) -> None:
    everything(tmp_path)
    with console.capture() as capture:
        describe(report(tmp_path, tmp_path / "out"))
    text = capture.get()
    for part in (
        "Sweep small",
        "81.4 ± 0.4",
        "is tested over examples",
        "no <room>",
        "there is no metrics.json",
        "forward passes",
    ):
        assert part in text
    assert str(tmp_path / "out" / "report.html") in text
    assert "differences" not in text


def test_an_empty_folder_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds no finished run"):
        report(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_importing_it_is_light() -> None:
    code = "import sys, kr2cache.report; print({'torch', 'matplotlib', 'scipy', 'jinja2'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
