"""Both stages together: prepare a configuration (caches and all), then train its seeds."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from kr2cache.config import TrainConfig
from kr2cache.errors import InterruptedWorkError
from kr2cache.experiment.prepare import Prepared, prepare
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.teacher import SEED, Lesson, Teacher
from kr2cache.methods import METHODS
from kr2cache.models import registry
from kr2cache.store import provenance
from kr2cache.system.allocator import objects_set_aside, return_free_memory
from kr2cache.system.console import console, count_text, failed, note, seconds_text
from kr2cache.system.console import done as said
from kr2cache.system.device import choose_device
from kr2cache.system.locks import only_writer
from kr2cache.system.process import process_unchanged
from kr2cache.system.terminal import Column, print_table
from kr2cache.tasks import COUNTS, Task
from kr2cache.training.runs import Metrics, RunFolder, mean_and_std, write_json
from kr2cache.training.train import Job, Trained, train_seed, write_reader, write_trained
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


@dataclass(frozen=True, kw_only=True)
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

    def json(self) -> dict[str, Any]:
        mean, std = mean_and_std([run.metrics for run in self.runs])
        return {
            "runs": [{"seed": run.seed, "folder": str(run.folder), "metrics": run.metrics} for run in self.runs],
            "mean": mean,
            "std": std,
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
    lesson = None
    if METHODS[config.method].needs_teacher:
        lesson = _lesson(prepared, shared)
        prepared = lesson.given_to(prepared)
    done = _train_seeds(prepared, lesson)
    return TrainResult(
        config=prepared.job.config,
        task=prepared.job.task,
        runs=done,
        computed=prepared.resource.computed if prepared.resource else 0,
        read=_sequences_read(prepared.job),
        notes=prepared.notes + (lesson.notes if lesson else []),
        words_without_states=prepared.resource.words_without_states if prepared.resource else {},
    )


def _lesson(student: Prepared, shared: Shared) -> Lesson:
    """The teacher's logits: from the cache, from a trained teacher, or from a teacher that is trained now."""
    teacher = Teacher(student, shared)
    lesson = teacher.kept() or teacher.from_reader()
    if lesson is not None:
        return lesson
    assert teacher.prepared is not None, "a teacher that is a run has its reader"
    if any(run.is_finished for run in teacher.runs):
        note(f"The teacher's run is there, its reader was dropped: fine-tuning {teacher.name} again.")
        run_dir = student.job.config.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        # Not where the run was built: another process may be building its twin there.
        with tempfile.TemporaryDirectory(dir=run_dir, prefix=".teacher-", ignore_cleanup_errors=True) as folder:
            try:
                trained_again = train_seed(teacher.prepared.job, SEED, Path(folder), f"teacher {teacher.name}")
            except KeyboardInterrupt:
                raise InterruptedWorkError(
                    f"Interrupted while the teacher {teacher.name} was fine-tuned again.", "Run the same command again."
                ) from None
        return teacher.from_trained(trained_again.reader)
    note(f"Fine-tuning the teacher, {teacher.name}, on {student.job.task.name} first.")
    trained: list[Trained] = []
    _train_seeds(teacher.prepared, None, keep=trained.append)
    return teacher.from_trained(trained[0].reader)


def _sequences_read(job: Job) -> int:
    return sum(data.features.sequences_read for data in job.splits.values() if data.features is not None)


@objects_set_aside()
def _train_seeds(prepared: Prepared, lesson: Lesson | None, keep: Callable[[Trained], None] | None = None) -> list[Run]:
    """Train the seeds that have no finished run.

    Args:
        keep: Is called with each reader trained in this call.
    """
    done: list[Run] = []
    job, folder = prepared.job, prepared.folder
    # Under torchrun every process trains, and the first one writes.
    writes = int(os.environ.get("RANK", "0")) == 0
    for seed in job.config.seeds:
        target = RunFolder.of_seed(folder, seed)
        with only_writer(target.path) if writes else contextlib.nullcontext():
            config = {**prepared.deciding, "method": job.config.method, "seed": seed}
            if target.is_finished:
                target.check(config)
                dropped = "" if target.reader.is_dir() else " (its reader was dropped)"
                said(f"seed {seed} is there already: {target.path}{dropped}")
                done.append(Run(seed=seed, folder=target.path, metrics=target.read_metrics(), seconds=None))
                continue
            started, read_before = time.monotonic(), _sequences_read(job)
            partial = target.start() if writes else target.partial
            try:
                trained = train_seed(job, seed, partial.path, f"{folder.name.rpartition('-')[0]} seed {seed}")
                seconds = time.monotonic() - started
                if writes:
                    recorded = _recorded(prepared, lesson) | {
                        "seconds": round(seconds, 1),
                        "seconds_in_steps": round(trained.step_seconds, 1),
                        "resource_sequences_read": _sequences_read(job) - read_before,
                    }
                    _write_run(job, trained, partial, {"config": config, "recorded": recorded})
                    target.finish()
            except BaseException as error:
                shutil.rmtree(partial.path, ignore_errors=True)
                if not isinstance(error, KeyboardInterrupt):
                    raise
                kept = f"Caches and {count_text(len(done), 'finished run')} are kept"
                raise InterruptedWorkError(
                    f"Interrupted in seed {seed}. {kept}: {folder}",
                    "Run the same command again: it trains the seeds that are missing.",
                ) from None
            done.append(
                Run(
                    seed=seed,
                    folder=target.path,
                    metrics=trained.metrics,
                    seconds=seconds,
                    step_seconds=trained.step_seconds,
                )
            )
            if keep is not None:
                keep(trained)
            del trained
            gc.collect()
            return_free_memory(RETURN_MEMORY_EVERY_S)
    return done


def _write_run(job: Job, trained: Trained, run: RunFolder, content: dict[str, Any]) -> None:
    """Write the folder of a run, the scores first. If the reader cannot be saved, the scores are kept without it."""
    seed = content["config"]["seed"]
    try:
        write_trained(job, trained, run)
        write_json(run.config_file, content)
    except OSError:
        scores = "; ".join(
            f"{split}: {', '.join(f'{name} {value:.4g}' for name, value in one.items())}"
            for split, one in trained.metrics.items()
        )
        failed(f"The scores of seed {seed} cannot be written. They are: {scores}.")
        raise
    if not job.config.keep_readers:
        return
    try:
        write_reader(job, trained.reader, run.reader)
    except Exception as error:  # a full disk, or code that comes with a model: the scores do not need the reader
        run.drop_reader()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        content["recorded"]["reader_lost"] = reason
        write_json(run.config_file, content)
        failed(
            f"The trained reader of seed {seed} could not be saved and is lost: {reason}. Its "
            "scores and predictions are kept. To have the reader, mend the cause, remove the folder of this seed and "
            "train it again."
        )


def _recorded(prepared: Prepared, lesson: Lesson | None) -> dict[str, Any]:
    """Facts about a run that are recorded with it and do not decide its folder."""
    job = prepared.job
    origin = {"reader": registry.origin(job.reader)}
    if prepared.resource is not None:
        origin["resource"] = registry.origin(prepared.resource.spec)
    recorded = provenance.recorded(str(choose_device(job.config.device)), torch.get_num_threads(), origin)
    recorded["corpus"] = job.task.corpus(job.config.data)
    recorded["limit"] = job.config.limit
    recorded["temporary_reader"] = job.config.temporary_readers
    recorded["examples"] = {split: len(data.examples) for split, data in job.splits.items()}
    recorded["caches"] = {
        split: {
            "folder": str(cache.folder),
            "fingerprint": cache.fingerprint,
            "sequences": len(cache),
        }
        for split, cache in prepared.caches.items()
    }
    if prepared.resource is not None:
        recorded["words_without_states"] = prepared.resource.words_without_states
    recorded["cache_bytes"] = {split: cache.stored_bytes for split, cache in prepared.caches.items()}
    if lesson is not None:
        recorded["distillation"] = lesson.recorded
    return recorded


def describe_training(result: TrainResult) -> None:
    """The table of seeds, mean and standard deviation, the learned weights, and what the cache saved."""
    config = result.config
    split = "test" if "test" in result.runs[0].metrics else "dev"
    mean, std = mean_and_std([run.metrics for run in result.runs])
    names = [name for name in mean[split] if name not in COUNTS]
    counts = [name for name in mean[split] if name in COUNTS]
    columns = [Column("seed", right=True), *(Column(f"{name} %", right=True) for name in names)]
    columns += [Column(COUNTS[name], right=True, rank=1) for name in counts]
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
        fusion = RunFolder(run.folder).read_fusion()
        if fusion and fusion["trainable"]:
            weights = "  ".join(
                f"{layer}: {w:.4f}" for layer, w in zip(fusion["layers"], fusion["weights"], strict=True)
            )
            console.print(f"learned w by layer, seed {run.seed}:  {weights}")
    for text in result.notes:
        note(text)
    if result.read:
        console.print(
            f"The resource ran on {count_text(result.computed, 'sequence')} now; its states were read "
            f"{result.read:,} times from the cache instead of computed."
        )
    console.print(f"Runs: {result.runs[0].folder.parent}", markup=False, soft_wrap=True)


def _title(config: TrainConfig) -> str:
    models = METHODS[config.method].title.format_map(vars(config))
    return f"{config.method} ({models})"
