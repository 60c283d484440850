"""One table in four forms."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from kr2cache.report.tables import Cell, Table, to_csv, to_latex, to_markdown, to_rich

TABLE = Table(
    name="odd",
    title="50 % of a_b",
    columns=("", "a|b"),
    rows=(
        (Cell("R&D [red]"), Cell("84.3 ± 0.4", bold=True, mark="≈", remark="2/3", under="84.0")),
        (Cell("x_1"), Cell("–")),
    ),
    legend=("p < 0.05 | *", "more"),
    records=({"row": "R&D, x", "mean": 84.25, "noise": True}, {"row": "x_1", "mean": None, "noise": False}),
)


def test_markdown_escapes_pipes_and_keeps_its_columns() -> None:
    lines = to_markdown(TABLE).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "|  | a\\|b |",
        "| --- | --: |",
        "| R&D [red] | **84.3 ± 0.4 (2/3)** ≈ |",
        "| *paper* | 84.0 |",
        "| x_1 | – |",
    ]
    assert lines[-3:] == ["p \\< 0.05 \\| \\*", "", "more"]


def test_latex_escapes_what_tex_would_read() -> None:
    text = to_latex(TABLE)
    assert r"R\&D [red] & \textbf{84.3 $\pm$ 0.4 (2/3)} $\approx$ \\" in text
    assert r"\quad\footnotesize paper & \footnotesize 84.0 \\" in text
    assert r"x\_1 & -- \\" in text
    assert r"\caption{50 \% of a\_b}" in text
    assert r"p \textless{} 0.05 \textbar{} *" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert text.count(r"\begin{") == text.count(r"\end{")


def wide(columns: int) -> Table:
    row = (Cell("average of the last 4"), *(Cell("84.3 ± 0.4", mark="≈", under="84.0") for _ in range(columns)))
    names = ("", *(f"column {number}" for number in range(columns)))
    return Table("wide", "Wide", names, (row, row), ("A legend.",), ())


def test_latex_of_a_wide_table_is_made_smaller_or_turned() -> None:
    assert r"\begin{table}" in to_latex(wide(5))
    for columns in (5, 10, 20):
        text = to_latex(wide(columns))
        begin = text.index(r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%")
        assert begin < text.index(r"\begin{tabular}") < text.index(r"\end{tabular}}")
    assert r"\begin{sidewaystable}" in text
    assert r"\usepackage{booktabs,graphicx,rotating}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_sets_every_table_within_the_text(tmp_path: Path) -> None:
    for number, table in enumerate((TABLE, wide(5), wide(10), wide(20))):
        (tmp_path / f"{number}.tex").write_text(to_latex(table), "utf-8")
    inputs = r"\clearpage ".join(rf"\input{{{number}}}" for number in range(4))
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx,rotating}"
    (tmp_path / "all.tex").write_text(head + r"\begin{document}" + inputs + r"\end{document}", "utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stdout
    assert "Overfull" not in made.stdout
    assert "too large" not in made.stdout


def test_csv_is_read_back() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert rows == [{"row": "R&D, x", "mean": "84.25", "noise": "true"}, {"row": "x_1", "mean": "", "noise": "false"}]


def test_rich_shows_the_same_and_reads_no_markup() -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(*to_rich(TABLE, 100))
    text = console.export_text()
    assert "R&D [red]" in text
    assert "84.3 ± 0.4 (2/3) ≈" in text
    assert "paper 84.0" in text
