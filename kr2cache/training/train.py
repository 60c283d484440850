"""Stage two: train one reader with one seed, from the arguments to the scores.

The caller chooses the caches and examples (``Job``) and writes the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from kr2cache.config import TrainConfig
from kr2cache.errors import TrainingError
from kr2cache.models.registry import ModelSpec
from kr2cache.system.console import failed
from kr2cache.system.disk import check_room
from kr2cache.tasks import Task
from kr2cache.tasks.base import Prediction
from kr2cache.training.arguments import training_arguments
from kr2cache.training.batches import Batcher, SplitData
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.evaluate import Evaluated, evaluate
from kr2cache.training.kreader import KReader
from kr2cache.training.resource_input import InputSettings
from kr2cache.training.runs import Metrics, RunFolder, write_json
from kr2cache.training.trainer import KeepBest, fit


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the seeds of one configuration share."""

    task: Task
    checkpoint: TaskCheckpoint
    """What every reader starts from."""
    tokenizer: PreTrainedTokenizerBase
    tokenizer_files: Mapping[str, bytes]
    """File name to content of the reader's tokenizer, saved with the reader. Empty if readers are not kept."""
    splits: dict[str, SplitData]
    """``train``, and ``dev`` and ``test`` if they have gold labels."""
    config: TrainConfig
    inputs: Mapping[str, InputSettings] = field(default_factory=dict)
    """Of each resource by its name, in the order in which states are appended; empty for a plain reader."""

    @property
    def reader(self) -> ModelSpec:
        """The model that is trained."""
        return self.checkpoint.spec

    def new_reader(self) -> KReader:
        """A reader to train: the checkpoint's weights; new weights are drawn from torch's current random state."""
        return KReader(self.checkpoint.task_model(), self.task.head, tuple(self.inputs.values()))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained reader and its scores."""

    reader: KReader
    metrics: Metrics
    predictions: dict[str, list[Prediction]]
    history: list[dict[str, float]]
    best_epoch: float
    step_seconds: float
    """Time in training steps (``Fit.step_seconds``). The rest of a training is setup, batches and evaluation."""


def train_seed(job: Job, seed: int, folder: Path, title: str) -> Trained:
    """Train one reader and evaluate it.

    With dev and test, dev chooses the best epoch and both splits are scored with its weights. With only one of them, it
    is scored after the last epoch: the split that chooses the epoch does not measure it.

    Args:
        folder: Where transformers may leave files ([training] can ask for checkpoints).
        title: Shown beside the progress bar.
    """
    train = job.splits["train"]
    arguments = training_arguments(job.config, folder, seed, states_on_gpu=train.states_on_gpu)
    set_seed(seed)
    reader = job.new_reader()
    if job.config.keep_readers:
        _check_room(job, reader, folder)

    def evaluated(split: str) -> Evaluated:
        return evaluate(reader, job.splits[split], job.task, job.tokenizer)

    dev_chooses = "dev" in job.splits and "test" in job.splits
    best = KeepBest(lambda: evaluated("dev"), job.task.metric) if dev_chooses else None
    batcher = Batcher(train, job.task, job.tokenizer)
    fitted = fit(reader, batcher, arguments, job.config, title=title, keep_best=best)
    _check_finite(reader, seed, job.config)
    results = {} if best is None else {"dev": best.restore(reader)}
    results |= {split: evaluated(split) for split in job.splits if split not in ("train", *results)}
    return Trained(
        reader=reader,
        metrics={split: result.scores for split, result in results.items()},
        predictions={split: result.predictions for split, result in results.items()},
        history=fitted.history if best is None else fitted.history + best.history,
        best_epoch=float(job.config.epochs) if best is None else best.best_epoch,
        step_seconds=fitted.step_seconds,
    )


def _check_room(job: Job, reader: KReader, folder: Path) -> None:
    weights = sum(tensor.nbytes for tensor in reader.state_dict().values())
    tokenizer = sum(map(len, job.tokenizer_files.values()))
    check_room(folder, weights + tokenizer, "The trained reader", "Make room, or give another --run-dir.")


def _check_finite(reader: KReader, seed: int, config: TrainConfig) -> None:
    if not bool(torch.isfinite(torch.nn.utils.get_total_norm(reader.parameters()))):
        raise TrainingError(
            f"The training of seed {seed} diverged: the reader's weights are no longer finite numbers.",
            f"Lower the learning rate (now {config.learning_rate:g}).",
        )


def write_run(job: Job, trained: Trained, run: RunFolder, content: dict[str, Any]) -> None:
    """Write the folder of a run, the scores first. If the reader cannot be saved, the scores are kept without it.

    Args:
        run: An empty folder.
        content: Of config.json: ``config``, which decides the scores, and ``recorded``.

    Raises:
        OSError: If the scores cannot be written. They are shown first.
    """
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


def write_trained(job: Job, trained: Trained, run: RunFolder) -> None:
    """Write predictions, history, fusion weights and metrics, but not the configuration and the reader."""
    named = job.task.named
    for split, predicted in trained.predictions.items():
        rows = (
            (example.id, named(example.label), named(label))
            for example, label in zip(job.splits[split].examples, predicted, strict=True)
        )
        run.write_predictions(split, rows)
    write_json(run.history_file, {"best_epoch": trained.best_epoch, "epochs": trained.history})
    if job.inputs:
        described = zip(job.inputs, trained.reader.resources, strict=True)
        run.write_fusions({name: one.described() for name, one in described})
    write_json(run.metrics_file, trained.metrics)


def write_reader(job: Job, reader: KReader, folder: Path) -> None:
    """Write the trained reader and its tokenizer into one folder."""
    reader.save(folder)
    for name, content in job.tokenizer_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
