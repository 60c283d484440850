"""One table in four forms."""

from __future__ import annotations

import csv
import io

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
