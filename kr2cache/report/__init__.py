"""The results of trainings: tables in the layout of the paper, significance tests, plots, and one page.

``collect`` reads run folders and sweep manifests, ``scores`` and ``others`` make tables, ``plots`` draws, and ``page``
writes ``report.html``. matplotlib, SciPy and Jinja are imported only when a report is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kr2cache.report.collect import collect, failures
from kr2cache.report.others import other_tables, stale
from kr2cache.report.page import page
from kr2cache.report.plots import plots
from kr2cache.report.records import Collected, Configuration, Fused, Run, mapping, number
from kr2cache.report.scores import sweep_tables
from kr2cache.report.significance import Comparer
from kr2cache.report.svg import Plot
from kr2cache.report.tables import FORMS, Table, to_rich
from kr2cache.system.console import console, count_text
from kr2cache.system.disk import check_writable

TITLE = "kr2cache report"
PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """A report and its files."""

    summary: list[str]
    """Sentences: which runs were found, and how many forward passes the caches saved."""
    tables: list[Table]
    plots: list[Plot]
    failures: list[str]
    notes: list[str]
    found: Collected
    folder: Path
    files: list[str]
    """Names in ``folder``."""

    def json(self) -> dict[str, Any]:
        """The whole report as one JSON document."""
        return {
            "summary": self.summary,
            "tables": [
                {
                    "name": table.name,
                    "title": table.title,
                    "legend": list(table.legend),
                    "records": [dict(record) for record in table.records],
                }
                for table in self.tables
            ],
            "plots": [
                {"name": plot.name, "title": plot.title, "caption": plot.caption, "described": plot.described}
                for plot in self.plots
            ],
            "configurations": [_configuration_json(one) for one in self.found.configurations],
            "failed": self.failures,
            "notes": self.notes,
            "folder": str(self.folder),
            "files": self.files,
        }


def report(run_dir: Path, out: Path | None) -> Report:
    """Read the runs and write the report.

    Args:
        run_dir: The folder of runs and sweep manifests.
        out: Folder for ``report.html``, each table as Markdown, LaTeX and CSV, and each plot as SVG and PNG; by
            default ``report`` in ``run_dir``.

    Raises:
        CacheError: If ``run_dir`` holds no finished run.
        ConfigError: If the report's folder cannot be written.
    """
    found = collect(run_dir)
    folder = run_dir / "report" if out is None else out
    check_writable(folder, "--out")
    notes, comparer = list(found.notes), Comparer()
    tables = [table for sweep in found.sweeps for table in sweep_tables(sweep, comparer, notes)]
    outdated = stale(found.configurations)
    notes += [f"{folder} is stale: {reason}." for folder, reason in outdated.items()]
    tables += other_tables(found.uncovered, outdated)
    drawn = plots(found)
    made = Report(
        summary=_summary(found),
        tables=tables,
        plots=drawn,
        failures=[sentence for sweep in found.sweeps for sentence in failures(sweep)],
        notes=list(dict.fromkeys(notes)),
        found=found,
        folder=folder,
        files=[
            PAGE,
            *(f"{table.name}.{ending}" for table in tables for ending in FORMS),
            *(f"{plot.name}.{ending}" for plot in drawn for ending in ("svg", "png")),
        ],
    )
    made.folder.mkdir(parents=True, exist_ok=True)
    text = page(TITLE, made.summary, made.tables, made.plots, made.failures, made.notes)
    (made.folder / PAGE).write_text(text, "utf-8")
    for table in tables:
        for ending, form in FORMS.items():
            (made.folder / f"{table.name}.{ending}").write_text(form(table), "utf-8")
    for plot in drawn:
        (made.folder / f"{plot.name}.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{plot.svg}', "utf-8")
        (made.folder / f"{plot.name}.png").write_bytes(plot.png)
    return made


def describe(made: Report) -> None:
    """Print the tables, failed cells, notes, and where the report was written."""
    for table in made.tables:
        if not table.details:
            for part in to_rich(table, console.width):
                console.print(part)
            for sentence in table.legend:
                console.print(sentence, style="dim", markup=False)
            console.print()
    for sentence in made.failures:
        console.print(sentence, style="red", markup=False)
    for sentence in (*made.notes, *made.summary):
        console.print(sentence, markup=False)
    files = count_text(len(made.files) - 1, "file")
    written = f"{made.folder / PAGE} and {files} beside it: tables as Markdown, LaTeX, CSV; plots as SVG, PNG"
    console.print(written, style="green", markup=False, soft_wrap=True)


def _summary(found: Collected) -> list[str]:
    tasks = len({one.task for one in found.configurations})
    runs = (
        f"{count_text(len(found.runs), 'finished run')} of {count_text(len(found.configurations), 'configuration')} "
        f"on {count_text(tasks, 'task')}."
    )
    return [runs, *([saved] if (saved := saved_sentence(found.runs)) else [])]


def saved_sentence(runs: Sequence[Run]) -> str:
    """How many forward passes of frozen models the caches saved; empty if no run recorded what it read."""
    read = 0
    computed: dict[str, int] = {}
    silent = 0
    for run in runs:
        caches = [mapping(cache) for cache in mapping(run.recorded.get("caches")).values()]
        sequences = number(run.recorded.get("resource_sequences_read"))
        sizes = {str(cache.get("fingerprint")): number(cache.get("sequences")) for cache in caches}
        if not caches:
            continue
        if sequences is None or "None" in sizes or None in sizes.values():
            silent += 1
            continue
        read += int(sequences)
        for fingerprint, size in sizes.items():
            computed[fingerprint] = max(computed.get(fingerprint, 0), int(size or 0))
    if not computed:
        return ""
    once = sum(computed.values())
    left_out = f" {count_text(silent, 'run')} did not record this and {'is' if silent == 1 else 'are'} left out."
    return (
        f"Saved by the cache: training read the states of {count_text(read, 'sequence')}. The resources ran on "
        f"{once:,}: {max(0, read - once):,} forward passes saved.{left_out if silent else ''}"
    )


def _configuration_json(one: Configuration) -> dict[str, Any]:
    return {
        "folder": one.folder,
        "task": one.task,
        "method": one.method,
        "reader": one.reader,
        "resource_or_teacher": one.helper or None,
        "fusion": one.fusion or None,
        "layers": list(one.layers),
        "metric": one.metric,
        "split": one.split,
        "settings": one.settings,
        "seeds": [
            {
                "seed": run.seed,
                "scores": dict(run.scores),
                "seconds": run.seconds,
                "cache_bytes": run.cache_bytes,
                "weights": list(run.weights) if run.weights else None,
                "fusions": [_fused_json(name, fused) for name, fused in run.fusions.items()],
            }
            for run in one.runs.values()
        ],
    }


def _fused_json(resource: str, fused: Fused) -> dict[str, Any]:
    return {
        "resource": resource or None,
        "layers": list(fused.layers),
        "weights": list(fused.weights) if fused.weights else None,
        "gamma": fused.gamma,
    }
