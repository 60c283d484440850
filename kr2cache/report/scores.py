"""The table of a sweep, as in the paper: mean ± standard deviation, the paper's number, and what is noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kr2cache.errors import CacheError
from kr2cache.report import paper
from kr2cache.report.records import OLDER, Sweep, SweepCell, mean_and_std
from kr2cache.report.significance import LEVEL, RESAMPLES, Comparer, Comparison, judge
from kr2cache.report.tables import Cell, Record, Table
from kr2cache.system.console import count_text

METRICS = {
    "f1": "F1",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
NOISE = "≈"
OPEN = "?"
P_VALUES = ("p over examples", "p over seeds", "p corrected")
VERDICTS = {True: "could be noise", False: "more than noise", None: "no verdict"}
_DECIMALS = 6


@dataclass(frozen=True)
class Score:
    """The result of a cell; ``mean`` and ``std`` in percent."""

    mean: float
    std: float | None
    seeds: int
    older: bool = False
    """An older version computed it differently."""

    @property
    def shown(self) -> str:
        return percent(self.mean, self.std)


def percent(mean: float, std: float | None) -> str:
    """``84.3 ± 0.4``"""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def sweep_tables(sweep: Sweep, comparer: Comparer, notes: list[str]) -> list[Table]:
    """The table of a sweep and the table of its differences, if any cells could be compared.

    Args:
        notes: A sentence is appended for each pair of cells that cannot be compared.
    """
    scores = {place: score for place, cell in sweep.cells.items() if (score := _score(cell)) is not None}
    columns = list(sweep.columns)
    if sweep.paper == "table2" and paper.MEAN not in columns:
        columns.append(paper.MEAN)
        scores |= {(row, paper.MEAN): score for row in sweep.rows if (score := _row_mean(sweep, row, scores))}
    comparisons = judge(_compare(sweep, scores, comparer, notes))
    best = {column: _best(scores.get((row, column)) for row in sweep.rows) for column in columns}

    def cell(row: str, column: str) -> Cell:
        number = paper.paper_number(sweep.paper, row, column)
        under = "" if number is None else f"{number:.1f}"
        planned = sweep.cells.get((row, column))
        score = scores.get((row, column))
        if score is None:
            return Cell("failed" if planned and planned.error else "–", under=under)
        comparison = comparisons.get((row, column))
        return Cell(
            score.shown,
            bold=f"{score.mean:.1f}" == best[column] and not score.older,
            mark=_mark(sweep, row, comparison),
            remark=_remark(score, planned),
            under=under,
        )

    def record(row: str, column: str) -> Record:
        score, planned = scores.get((row, column)), sweep.cells.get((row, column))
        comparison = comparisons.get((row, column))
        return {
            "row": row,
            "column": column,
            "mean": _rounded(score.mean) if score else None,
            "std": _rounded(score.std) if score else None,
            "seeds": score.seeds if score else 0,
            "older": score.older if score else False,
            "paper": paper.paper_number(sweep.paper, row, column),
            "p_examples": comparison.p_examples if comparison else None,
            "p_seeds": comparison.p_seeds if comparison else None,
            "p": comparison.p if comparison else None,
            "noise": comparison.noise if comparison else None,
            "folder": planned.folder if planned else None,
        }

    table = Table(
        name=sweep.name,
        title=sweep.title,
        columns=("", *columns),
        rows=tuple((Cell(row), *(cell(row, column) for column in columns)) for row in sweep.rows),
        legend=(
            " ".join(_legend(sweep, scores)),
            *([" ".join(marks)] if (marks := _marks_legend(sweep, scores, comparisons)) else []),
        ),
        records=tuple(record(row, column) for row in sweep.rows for column in columns),
    )
    return [table, _differences(sweep, comparisons)] if comparisons else [table]


def baseline_row(sweep: Sweep, row: str) -> str | None:
    """The row that ``row`` is compared with; None for a baseline.

    Table 3 has two experiments. If A helps B, the baseline is B alone.
    """
    alone = "KResource (B)"
    baseline = sweep.baseline
    if sweep.paper == "table3" and alone in sweep.rows and (row.endswith("(A-B)") or row == alone):
        baseline = alone
    baseline = sweep.baselines.get(row, baseline or "")
    return None if baseline in ("", row) else baseline


def _mark(sweep: Sweep, row: str, comparison: Comparison | None) -> str:
    """Empty if the difference is more than noise, or if the row has no baseline."""
    if comparison is None:
        return OPEN if baseline_row(sweep, row) is not None else ""
    return {True: NOISE, False: "", None: OPEN}[comparison.noise]


def _score(cell: SweepCell) -> Score | None:
    if cell.configuration is None or not cell.done:
        return None
    values = [100 * value for value in cell.configuration.values(cell.configuration.metric, cell.done)]
    older = cell.configuration.older(cell.configuration.metric)
    return Score(*mean_and_std(values), seeds=len(values), older=older) if values else None


def _remark(score: Score, planned: SweepCell | None) -> str:
    seeds = f"{score.seeds}/{len(planned.seeds)}" if planned and score.seeds < len(planned.seeds) else ""
    return ", ".join(filter(None, (seeds, OLDER if score.older else "")))


def _row_mean(sweep: Sweep, row: str, scores: dict[tuple[str, str], Score]) -> Score | None:
    """Mean over the columns, if the row has all of them. The deviation is over the means of each seed, so it needs the
    same seeds in every column."""
    cells = [sweep.cells[row, column] for column in sweep.columns if (row, column) in scores]
    if len(cells) < len(sweep.columns):
        return None
    mean = sum(scores[row, column].mean for column in sweep.columns) / len(cells)
    values = [one.configuration.values(one.configuration.metric, one.done) for one in cells if one.configuration]
    same = len({cell.done for cell in cells}) == 1
    std = mean_and_std([100 * sum(of_seed) / len(cells) for of_seed in zip(*values, strict=True)])[1] if same else None
    older = any(scores[row, column].older for column in sweep.columns)
    return Score(mean, std, seeds=min(len(cell.done) for cell in cells), older=older)


def _best(scores: Iterable[Score | None]) -> str:
    """The highest mean as text, so that means with the same text are all bold; empty for fewer than two means."""
    means = [score.mean for score in scores if score is not None and not score.older]
    return f"{max(means):.1f}" if len(means) > 1 else ""


def _compare(
    sweep: Sweep, scores: dict[tuple[str, str], Score], comparer: Comparer, notes: list[str]
) -> dict[tuple[str, str], Comparison]:
    comparisons = {}
    for row, column in scores:
        other_row = baseline_row(sweep, row)
        if other_row is None or (other_row, column) not in scores:
            continue
        columns = (column,) if column in sweep.columns else sweep.columns  # the column "mean" is over all columns
        cells = [(sweep.cells[row, one], sweep.cells[other_row, one]) for one in columns]
        done = [set(cell.done) for pair in cells for cell in pair]
        pairs = [(a.configuration, b.configuration) for a, b in cells if a.configuration and b.configuration]
        try:
            comparisons[row, column] = comparer.compare(pairs, sorted(set.intersection(*done)), other_row)
        except CacheError as error:
            notes.append(f"{sweep.title}: {row} and {other_row} are not compared on {column}: {error.message}.")
    return comparisons


def _differences(sweep: Sweep, comparisons: dict[tuple[str, str], Comparison]) -> Table:
    def row(place: tuple[str, str], one: Comparison) -> tuple[Cell, ...]:
        seeds = " ".join(map(str, one.seeds))
        points = round(100 * one.difference, 1)
        difference = f"{points:+.1f}".replace("-", "−") if points else "0.0"
        tests = (p_text(p) for p in (one.p_examples, one.p_seeds, one.p))
        return tuple(map(Cell, (*place, one.baseline, difference, *tests, seeds, VERDICTS[one.noise])))

    tested = sum(one.p is not None for one in comparisons.values())
    corrected = "none, because no comparison has a verdict"
    if tested:
        corrected = f"the larger of both, by Holm's method for {count_text(tested, 'comparison')}"
    return Table(
        name=f"{sweep.name}-differences",
        title=f"{sweep.title}: differences",
        columns=(
            "",
            "column",
            "against",
            "points",
            *P_VALUES,
            "seeds",
            "verdict",
        ),
        rows=tuple(row(place, one) for place, one in comparisons.items()),
        legend=(f"Points: difference of the means over the seeds that both rows have. p corrected: {corrected}.",),
        records=tuple(
            {
                "row": place[0],
                "column": place[1],
                "baseline": one.baseline,
                "points": _rounded(100 * one.difference),
                "p_examples": one.p_examples,
                "p_seeds": one.p_seeds,
                "p": one.p,
                "noise": one.noise,
                "reason": one.reason,
                "seeds": " ".join(map(str, one.seeds)),
            }
            for place, one in comparisons.items()
        ),
        labels=3,
        details=True,
    )


def p_text(p: float | None) -> str:
    """``0.013``, ``< 0.001``, ``–``"""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _legend(sweep: Sweep, scores: dict[tuple[str, str], Score]) -> list[str]:
    """Sentences: how to read the table, and which scores it shows."""
    sentences = [
        "Mean ± sample standard deviation over seeds, in percent; bold: the best of its column.",
        f"Scores: {_by_column(sweep, _metric_and_split)}.",
    ]
    if sizes := _by_column(sweep, _sizes):
        sentences.append(f"Examples: {sizes}.")
    if any(len(cell.done) < len(cell.seeds) for place, cell in sweep.cells.items() if place in scores):
        sentences.append("2/3: two of three seeds are finished.")
    if any(score.older for score in scores.values()):
        sentences.append(f"{OLDER}: an older version computed this F1 and counted CCONJ and SCONJ as one tag.")
    columns = [*sweep.columns, paper.MEAN]
    if any(paper.paper_number(sweep.paper, row, column) is not None for row in sweep.rows for column in columns):
        sentence = "Paper: the number that the paper prints, with its models and data."
        if sweep.paper == "table2" and list(sweep.columns) != paper.paper_columns("table2"):
            sentence += f" Its mean is over {', '.join(paper.paper_columns('table2'))}."
        sentences.append(sentence)
    return sentences


def _marks_legend(
    sweep: Sweep, scores: dict[tuple[str, str], Score], comparisons: dict[tuple[str, str], Comparison]
) -> list[str]:
    """Sentences: what is tested, and the meaning of each mark."""
    sentences = []
    if comparisons:
        baselines = " or ".join(dict.fromkeys(one.baseline for one in comparisons.values()))
        done = [one.configuration for one in sweep.cells.values() if one.configuration]
        tagging = any(one.kind in ("", "tagging") and one.metric.endswith("f1") for one in done)
        sentences = [
            f"The difference to {baselines} is tested over examples (paired permutation test, {RESAMPLES:,} swaps"
            f"{'; for tagging on word accuracy, while the table shows F1' if tagging else ''}) and over seeds (paired "
            "t-test); the larger p is corrected for the number of comparisons (Holm).",
            f"No mark: p < {LEVEL}.",
        ]
    if any(one.noise for one in comparisons.values()):
        sentences.append(f"{NOISE}: it could be noise.")
    reasons = dict.fromkeys(one.reason for one in comparisons.values() if one.reason)
    if any(_mark(sweep, row, comparisons.get((row, column))) == OPEN for row, column in scores):
        if any(baseline_row(sweep, row) is not None and (row, column) not in comparisons for row, column in scores):
            reasons["the difference could not be tested"] = None
        sentences.append(f"{OPEN}: no verdict: {'; or '.join(reasons)}.")
    return sentences


def _by_column(sweep: Sweep, describe: Callable[[SweepCell], str]) -> str:
    """``F1 on test (De, Zh); accuracy on dev (PIQA)``, from the first finished cell of each column."""
    columns: dict[str, list[str]] = {}
    for column in sweep.columns:
        finished = [cell for cell in sweep.column(column) if cell.configuration is not None and cell.done]
        if finished and (text := describe(finished[0])):
            columns.setdefault(text, []).append(column)
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in columns.items())


def _metric_and_split(cell: SweepCell) -> str:
    assert cell.configuration is not None
    return f"{METRICS.get(cell.configuration.metric, cell.configuration.metric)} on {cell.configuration.split}"


def _sizes(cell: SweepCell) -> str:
    assert cell.configuration is not None
    sizes = cell.configuration.first.recorded.get("examples")
    if not isinstance(sizes, dict):
        return ""
    return ", ".join(f"{split} {size:,}" for split, size in sizes.items() if isinstance(size, int))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DECIMALS)
