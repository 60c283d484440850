"""Both stages together: prepare a configuration (caches and all), then train its seeds."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from kr2cache.config import TrainConfig
from kr2cache.errors import InterruptedWorkError
from kr2cache.experiment.prepare import Prepared, prepare
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.teacher import SEED, Lesson, Teacher
from kr2cache.methods import METHODS
from kr2cache.models.registry import shown_name
from kr2cache.system.allocator import objects_set_aside, return_free_memory
from kr2cache.system.claims import Claim, claimed
from kr2cache.system.console import console, count_text, done, note, seconds_text
from kr2cache.system.interrupt import cause
from kr2cache.system.process import process_unchanged
from kr2cache.system.terminal import Column, print_table
from kr2cache.tasks import Task
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import Metrics, RunFolder, mean_and_std
from kr2cache.training.train import Job, Trained, train_seed, write_run
from kr2cache.training.trainer import RETURN_MEMORY_EVERY_S


@dataclass(frozen=True, kw_only=True)
class Run:
    """One seed's result."""

    seed: int
    folder: Path
    metrics: Metrics
    seconds: float | None
    """None if the run was trained before."""
    step_seconds: float | None = None
    """The part of ``seconds`` that went into training steps."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainResult:
    """The result of one call of stage two."""

    config: TrainConfig
    task: Task
    runs: list[Run]
    computed: int
    """Sequences that the resource ran on in this call, to make caches."""
    read: int
    """Sequences whose states were read instead of computed."""
    notes: list[str] = field(default_factory=list)
    words_without_states: dict[str, int] = field(default_factory=dict)
    """By split, if there is a resource and the task labels words."""

    @property
    def mean(self) -> Metrics:
        """The mean of each metric over the runs, by split."""
        return mean_and_std([run.metrics for run in self.runs])[0]

    @property
    def std(self) -> dict[str, dict[str, float | None]]:
        """The standard deviation of each metric over the runs, by split; None for a single run."""
        return mean_and_std([run.metrics for run in self.runs])[1]

    def __repr__(self) -> str:
        """A few lines that say the result: a table of runs, their mean and standard deviation, and where they are."""
        names = [(split, name) for split, metrics in self.mean.items() for name in metrics]
        rows = [["", *(f"{split} {name}" for split, name in names)]]
        shown: dict[str, Mapping[str, Mapping[str, float | None]]] = {
            f"seed {run.seed}": run.metrics for run in self.runs
        }
        if len(self.runs) > 1:
            shown |= {"mean": self.mean, "std": self.std}
        for title, metrics in shown.items():
            rows.append([title, *(self._shown(metrics[split][name], name) for split, name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([f"{_title(self.config)} on {self.task.name}", *lines, f"in {self.runs[0].folder.parent}"])

    def _shown(self, value: float | None, name: str) -> str:
        """A metric as text: a fraction, or a count."""
        return "-" if value is None else f"{value:g}" if name in self.task.counts else f"{value:.4f}"

    def json(self) -> dict[str, Any]:
        return {
            "runs": [{"seed": run.seed, "folder": str(run.folder), "metrics": run.metrics} for run in self.runs],
            "mean": self.mean,
            "std": self.std,
            "resource_sequences": {"computed": self.computed, "read": self.read},
            "words_without_states": self.words_without_states,
        }


@process_unchanged()
def train(config: TrainConfig, shared: Shared | None = None) -> TrainResult:
    """Train one method on several seeds. All checks run before any long work starts.

    Args:
        shared: What the trainings of a sweep share.

    Raises:
        KR2CacheError: One of its kinds, for everything foreseen.
    """
    shared = shared or Shared()
    prepared = prepare(config, shared)
    if METHODS[config.method].needs_teacher:
        prepared = _lesson(prepared, shared).given_to(prepared)
    runs = _train_seeds(prepared)
    return TrainResult(
        config=prepared.job.config,
        task=prepared.job.task,
        runs=runs,
        computed=sum(resource.computed for resource in prepared.resources.values()),
        read=_sequences_read(prepared.job),
        notes=prepared.notes,
        words_without_states=prepared.words_without_states,
    )


def _lesson(student: Prepared, shared: Shared) -> Lesson:
    """The teacher's logits: from an earlier call, from a trained teacher, or from a teacher that is trained now."""
    teacher = Teacher(student, shared)
    if (lesson := teacher.kept()) is not None:
        return lesson
    # One process makes the logits; others that need them wait, instead of training the same teacher.
    with _claimed_by_writer(student.job.config.run_dir / student.job.task.name / f"teacher-{teacher.fingerprint[:8]}"):
        return teacher.kept() or teacher.from_reader() or _taught(teacher)


def _taught(teacher: Teacher) -> Lesson:
    """The logits of a teacher that has no trained reader: it is trained now."""
    assert teacher.prepared is not None, "a teacher that is a run has its reader"
    if not any(run.is_finished for run in teacher.runs):
        note(f"Fine-tuning the teacher, {teacher.name}, on {teacher.student.job.task.name} first.")
        if (said := teacher.prepared.job.checkpoint.head_note) is not None:
            note(said)
        trained: list[Trained] = []
        _train_seeds(teacher.prepared, keep=trained.append)
        # If nothing was trained, another process has trained it meanwhile, for its own sake.
        lesson = teacher.from_trained(trained[0].reader) if trained else teacher.from_reader()
        if lesson is not None:
            return lesson
    return teacher.from_trained(_train_again(teacher.prepared))


def _train_again(teacher: Prepared) -> KReader:
    """Train a teacher whose run is finished, but without its reader. The run stays as it is."""
    job = teacher.job
    note(f"The run of the teacher {job.reader.name} is there, but not its reader: fine-tuning it again.")
    run_dir = job.config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    # Not in the folder of the run: another process may be training the same teacher there.
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".teacher-", ignore_cleanup_errors=True) as folder:
        try:
            return train_seed(job, SEED, Path(folder), f"teacher {job.reader.name}").reader
        except KeyboardInterrupt:
            raise InterruptedWorkError(
                f"{cause()} while the teacher {job.reader.name} was fine-tuned again.", "Run the same command again."
            ) from None


def _sequences_read(job: Job) -> int:
    return sum(data.features.sequences_read for data in job.splits.values() if data.features is not None)


def _claimed_by_writer(path: Path) -> contextlib.AbstractContextManager[Claim | None]:
    """Hold ``path``. Under torchrun every process trains and the first one writes, so the others hold nothing."""
    return claimed(path) if int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext()


@objects_set_aside()
def _train_seeds(prepared: Prepared, keep: Callable[[Trained], None] | None = None) -> list[Run]:
    """Train the seeds that have no finished run.

    Args:
        keep: Is called with each reader trained in this call.
    """
    runs: list[Run] = []
    folder = prepared.folder
    for seed in prepared.job.config.seeds:
        target = RunFolder.of_seed(folder, seed)
        with _claimed_by_writer(target.path) as claim:
            if target.is_finished:
                runs.append(_finished_run(prepared, seed, target))
                continue
            try:
                run, trained = _new_run(prepared, seed, target, claim)
            except KeyboardInterrupt:
                kept = f"Caches and {count_text(len(runs), 'finished run')} are kept"
                raise InterruptedWorkError(
                    f"{cause()} in seed {seed}. {kept}: {folder}",
                    "Run the same command again: it trains the seeds that are missing.",
                ) from None
            runs.append(run)
            if keep is not None:
                keep(trained)
            del trained
            gc.collect()
            return_free_memory(RETURN_MEMORY_EVERY_S)
    return runs


def _finished_run(prepared: Prepared, seed: int, target: RunFolder) -> Run:
    """The run of an earlier call, after a check that it has this configuration."""
    target.check(prepared.config_of(seed))
    dropped = "" if target.reader.is_dir() else " (its reader was dropped)"
    done(f"seed {seed} is there already: {target.path}{dropped}")
    return Run(seed=seed, folder=target.path, metrics=target.read_metrics(), seconds=None)


def _new_run(prepared: Prepared, seed: int, target: RunFolder, claim: Claim | None) -> tuple[Run, Trained]:
    """Train one seed and write its run. After an error no part of the run is left.

    Args:
        claim: On ``target``; None if this process does not write the run.
    """
    job, started, read_before = prepared.job, time.monotonic(), _sequences_read(prepared.job)
    with contextlib.ExitStack() as until_done:
        place = Path(until_done.enter_context(tempfile.TemporaryDirectory())) if claim is None else claim.folder
        building = RunFolder(place / "run")
        building.path.mkdir()
        trained = train_seed(job, seed, building.path, f"{target.path.parent.name.rpartition('-')[0]} seed {seed}")
        seconds = time.monotonic() - started
        if claim is not None:
            recorded = prepared.recorded() | {
                "seconds": round(seconds, 1),
                "seconds_in_steps": round(trained.step_seconds, 1),
                "resource_sequences_read": _sequences_read(job) - read_before,
            }
            write_run(job, trained, building, {"config": prepared.config_of(seed), "recorded": recorded})
            building.publish(target)
    run = Run(
        seed=seed, folder=target.path, metrics=trained.metrics, seconds=seconds, step_seconds=trained.step_seconds
    )
    return run, trained


def describe_training(result: TrainResult) -> None:
    """The table of seeds, mean and standard deviation, the learned weights, and what the cache saved."""
    config = result.config
    split = "test" if "test" in result.runs[0].metrics else "dev"
    mean, std = mean_and_std([run.metrics for run in result.runs])
    titles = result.task.counts
    names = [name for name in mean[split] if name not in titles]
    counts = [name for name in mean[split] if name in titles]
    columns = [Column("seed", right=True), *(Column(f"{name} %", right=True) for name in names)]
    columns += [Column(titles[name], right=True, rank=1) for name in counts]
    unread = result.words_without_states.get(split, 0)
    columns += [Column("words without states", right=True, rank=1)] if unread else []
    columns += [Column("time", right=True, breaks=" ", rank=2)]
    rows: list[list[str | Text]] = []
    for run in result.runs:
        cells = [f"{100 * run.metrics[split][name]:.1f}" for name in names]
        cells += [f"{run.metrics[split][name]:.0f}" for name in counts]
        cells += [str(unread)] if unread else []
        rows.append([str(run.seed), *cells, "trained before" if run.seconds is None else seconds_text(run.seconds)])
    none = [""] * (len(columns) - 1 - len(names))
    means = [Text(f"{100 * mean[split][name]:.1f}", style="bold") for name in names]
    deviations = ["-" if (one := std[split][name]) is None else f"{100 * one:.1f}" for name in names]
    rows += [["mean", *means, *none], ["std", *deviations, *none]]
    title = f"{_title(config)} on {config.task}, {split} split"
    print_table(title, columns, rows, sections=[len(result.runs)])
    for run in result.runs:
        for name, fusion in RunFolder(run.folder).read_fusions().items():
            if fusion["trainable"]:
                weights = "  ".join(
                    f"{layer}: {w:.4f}" for layer, w in zip(fusion["layers"], fusion["weights"], strict=True)
                )
                gamma = f"  gamma: {fusion['gamma']:.4f}" if "gamma" in fusion else ""
                of = f" of {name}" if name else ""
                console.print(f"learned w by layer{of}, seed {run.seed}:  {weights}{gamma}")
    for text in result.notes:
        note(text)
    if result.read:
        who, whose = ("The resources", "their") if len(config.frozen_models) > 1 else ("The resource", "its")
        console.print(
            f"{who} ran on {count_text(result.computed, 'sequence')} now; {whose} states were read "
            f"{result.read:,} times from the cache instead of computed."
        )
    console.print(f"Runs: {result.runs[0].folder.parent}", markup=False, soft_wrap=True)


def _title(config: TrainConfig) -> str:
    def shown(*names: str | None) -> str:
        return " + ".join(shown_name(name, config.models) for name in names if name is not None)

    parts = {"reader": shown(config.reader), "resource": shown(*config.resources), "teacher": shown(config.teacher)}
    models = METHODS[config.method].title.format_map(vars(config) | parts)
    return f"{config.method} ({models})"
