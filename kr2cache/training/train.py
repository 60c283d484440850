"""Stage two: train a KReader, or a plain one, on one seed.

``transformers.Trainer`` runs the loop. Evaluation goes through ``predict`` alone: after each epoch where there is a dev
split (the best epoch is kept), and at the end. Which caches and examples are trained on is the caller's business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from kr2cache.config import Projection, TrainConfig
from kr2cache.errors import ConfigError, KR2CacheError, TrainingError
from kr2cache.fusion import Fusion
from kr2cache.models.registry import ModelSpec
from kr2cache.system.allocator import return_free_memory
from kr2cache.system.console import work_progress
from kr2cache.system.device import is_out_of_memory
from kr2cache.system.disk import check_room
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.tasks import Task
from kr2cache.tasks.base import Prediction
from kr2cache.training import runs
from kr2cache.training.arguments import training_arguments
from kr2cache.training.batches import WHOLE, Batcher, LengthGroupedSampler, SplitData, StepBatcher, part_overhead
from kr2cache.training.distill import soft_loss
from kr2cache.training.evaluate import predict
from kr2cache.training.kreader import KReader, TaskCheckpoint
from kr2cache.training.trial import LongestBatchFirst, out_of_memory

RETURN_MEMORY_EVERY_S = 60.0
"""What is given back has to be asked for again, as long as a step of a small reader takes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the seeds of one configuration share."""

    task: Task
    checkpoint: TaskCheckpoint
    """What every reader starts from."""
    tokenizer: PreTrainedTokenizerBase
    tokenizer_files: Mapping[str, bytes]
    """What a kept reader's tokenizer is loaded from: file name to content. Empty where readers are not kept."""
    splits: dict[str, SplitData]
    """``train``, and ``dev`` and ``test`` where they have gold labels."""
    config: TrainConfig
    fusion: Fusion | None = None
    projection: Projection = "none"
    resource_width: int = 0

    @property
    def reader(self) -> ModelSpec:
        """The model that is trained."""
        return self.checkpoint.spec

    def new_reader(self) -> KReader:
        """A reader to train: the checkpoint, with what is new in it drawn from torch's current random state."""
        return KReader(
            self.checkpoint.task_model(),
            self.task.head,
            fusion=self.fusion,
            projection=self.projection,
            resource_width=self.resource_width,
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained reader and what it scores."""

    reader: KReader
    metrics: runs.Metrics
    predictions: dict[str, list[Prediction]]
    history: list[dict[str, float]]
    best_epoch: float
    step_seconds: float
    """Spent in training steps: forward and backward passes, updates. The rest is batches, evaluation, setting up.
    On a GPU it is the time of issuing them: its work is not waited for."""


def _overhead(arguments: TrainingArguments) -> int:
    # Under torchrun every process has to go through as many backward passes as the others.
    return part_overhead(arguments.device) if arguments.world_size == 1 else WHOLE


class ReaderTrainer(Trainer):
    """The Trainer, for batches in parts (``StepBatcher``), with a learning rate of its own for the fusion weights, and
    distillation's soft loss where a batch has a teacher's logits.
    """

    def __init__(self, *arguments: Any, config: TrainConfig, positions: NDArray[np.int64], **named: Any) -> None:
        """
        Args:
            positions: (examples,) of the train split, ``SplitData.positions``.
        """
        self.config = config
        self.positions = positions
        self.soft_losses: list[Tensor] = []
        """Of the parts since the last log."""
        self.batches = 0
        """Since the last log."""
        super().__init__(*arguments, **named)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.batches += 1
        total = torch.zeros((), device=self.args.device)
        for part in inputs["parts"]:
            total += super().training_step(model, part, num_items_in_batch)
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        teacher, share = inputs.pop("teacher_logits", None), inputs.pop("labels_share")
        soft_share = inputs.pop("teacher_logits_share", 0.0)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # A part without labels has no mean loss, nan; it still has to have a backward pass.
        loss = loss * share if share else 0.0 * outputs["logits"].float().sum()
        if teacher is not None and soft_share:
            soft = soft_share * soft_loss(outputs["logits"], teacher, self.config.temperature)
            self.soft_losses.append(soft.detach())
            loss = loss + self.config.soft_weight * soft
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs and self.soft_losses:
            logs["soft_loss"] = float(torch.stack(self.soft_losses).sum()) / self.batches
            self._forget_losses()
        super().log(logs, *arguments, **named)

    def try_batch(self, batch: dict[str, Any]) -> None:
        """Forward and backward, to see whether it fits into memory; nothing of it is left."""
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # set with the first batch
        self.training_step(self.model_wrapped, batch)
        self.model_wrapped.zero_grad()
        self._forget_losses()

    def _forget_losses(self) -> None:
        self.batches = 0
        self.soft_losses.clear()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        weights = getattr(self.model, "fusion_weights", None)
        learning_rate = self.config.fusion_learning_rate
        if learning_rate is not None and isinstance(weights, torch.nn.Parameter):
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not weights]
            optimizer.add_param_group({"params": [weights], "lr": learning_rate, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(self.positions, step, self.args.seed)


@dataclass
class _KeepBest(TrainerCallback):
    """Score dev after each epoch; remember the best epoch's weights and predictions."""

    predict: Callable[[], list[Prediction]]
    score: Callable[[list[Prediction]], dict[str, float]]
    metric: str
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    best_epoch: float = 0.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Empty where they are those of the last epoch, which the model has at the end."""
    best_predictions: list[Prediction] = field(default_factory=list)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        predictions = self.predict()
        metrics = self.score(predictions)
        epoch = round(state.epoch or 0.0, 4)
        self.history.append({"epoch": epoch, **{f"dev_{name}": value for name, value in metrics.items()}})
        if metrics[self.metric] > self.best:
            self.best, self.best_epoch, self.best_predictions = metrics[self.metric], epoch, predictions
            is_last = state.global_step >= state.max_steps
            weights = {} if is_last else kwargs["model"].state_dict()
            self.best_weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


@dataclass
class _OnStep(TrainerCallback):
    """Call something after each step, add up the time of steps, and give freed memory back now and then."""

    call: Callable[[], None]
    seconds: float = 0.0
    _since: float = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._since
        return_free_memory(RETURN_MEMORY_EVERY_S)
        self.call()


class _Progress(TrainerCallback):
    """One line of progress for one seed."""

    def __init__(self, title: str) -> None:
        self.bar = work_progress("steps")
        self.task = self.bar.add_task(title, total=None, note="")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, total=state.max_steps)
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            self.bar.update(self.task, note=f"loss {loss:.3f}")


def _first_step_error(config: TrainConfig, error: Exception) -> Exception:
    """``error``, which came before the end of the first step; settings under ``[training]`` can be its cause."""
    if not config.training or isinstance(error, KR2CacheError):
        return error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"The training failed before the end of its first step: {reason}",
        f"If a setting under [training] in kr2cache.toml is the cause ({', '.join(config.training)}), change it or "
        "leave it out.",
    )


def train_seed(job: Job, seed: int, folder: Path, title: str) -> Trained:
    """Train one reader.

    With dev and test the best epoch on dev is kept and scored on both. With one of them alone the last epoch is scored
    on it: a split that chooses the epoch is no measure of it.

    Args:
        folder: Where transformers may leave files ([training] can ask for checkpoints).
        title: Of the progress line.
    """
    arguments = training_arguments(job.config, folder, seed)
    features = job.splits["train"].features
    if features is not None and features.device.type != "cpu":
        # States that live on the GPU can be neither pinned nor gathered by another process.
        arguments.dataloader_pin_memory = False
        arguments.dataloader_num_workers = 0
        arguments.dataloader_persistent_workers = False
        arguments.dataloader_prefetch_factor = None
        settings: Any = arguments.accelerator_config  # declared as what may be given, it is what was made of it
        settings.non_blocking = False
    set_seed(seed)
    reader = job.new_reader()
    if job.config.keep_readers:
        check_room(
            folder,
            sum(tensor.nbytes for tensor in reader.state_dict().values()) + sum(map(len, job.tokenizer_files.values())),
            "The trained reader",
            "Make room, or give another --run-dir.",
        )
    train = job.splits["train"]
    batcher = StepBatcher(Batcher(train, job.task, job.tokenizer), _overhead(arguments))
    try:
        trainer = ReaderTrainer(
            model=reader,
            args=arguments,
            data_collator=batcher,
            train_dataset=list(range(len(train.examples))),
            config=job.config,
            positions=train.positions(),
        )
    except Exception as error:  # what the rehearsal leaves out, such as push_to_hub
        if is_out_of_memory(error):
            raise out_of_memory(job.config, arguments.device) from None
        raise _first_step_error(job.config, error) from error
    trainer.remove_callback(PrinterCallback)
    progress = _Progress(title)
    trainer.add_callback(progress)
    if arguments.device.type != "cpu":  # a computer whose memory is short ends the process without an error
        trainer.add_callback(LongestBatchFirst(reader, batcher, trainer.try_batch))

    def predicted(split: str) -> list[Prediction]:
        return predict(reader, job.splits[split], job.task, job.tokenizer)

    def score(split: str, predictions: list[Prediction]) -> dict[str, float]:
        return job.task.score([example.label for example in job.splits[split].examples], predictions)

    keep_best = None
    if "dev" in job.splits and "test" in job.splits:
        keep_best = _KeepBest(
            predict=lambda: predicted("dev"),
            score=lambda predictions: score("dev", predictions),
            metric=job.task.metric,
        )
        trainer.add_callback(keep_best)
    try:
        with interrupt_between_batches() as check:
            on_step = _OnStep(check)
            trainer.add_callback(on_step)
            trainer.train()
            check()
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(job.config, arguments.device) from None
        if trainer.state.global_step == 0:
            raise _first_step_error(job.config, error) from error
        raise
    finally:
        progress.bar.stop()
    if not bool(torch.isfinite(torch.nn.utils.get_total_norm(reader.parameters()))):
        raise TrainingError(
            f"The training of seed {seed} diverged: the reader's weights are no longer finite numbers.",
            f"Lower the learning rate (now {job.config.learning_rate:g}).",
        )
    # JSON has no nan: a step of float16 that overflowed was skipped, and its loss says nothing.
    history = [
        {name: value for name, value in entry.items() if math.isfinite(value)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    best_epoch = float(job.config.epochs)
    predictions: dict[str, list[Prediction]] = {}
    if keep_best is not None:
        predictions["dev"] = keep_best.best_predictions
        if keep_best.best_weights:
            reader.load_state_dict(keep_best.best_weights)
        history += keep_best.history
        best_epoch = keep_best.best_epoch
    for split in job.splits:
        if split != "train" and split not in predictions:
            predictions[split] = predicted(split)
    metrics = {split: score(split, one) for split, one in predictions.items()}
    return Trained(
        reader=reader,
        metrics=metrics,
        predictions=predictions,
        history=history,
        best_epoch=best_epoch,
        step_seconds=on_step.seconds,
    )


def write_trained(job: Job, trained: Trained, folder: Path) -> None:
    """What a run folder holds beside config.json and the reader: metrics, history, predictions, fusion weights."""
    names = job.task.labels

    def named(label: Any) -> Any:
        if isinstance(label, (list, tuple)):
            return [None if one is None else names[one] for one in label]
        return names[label]

    for split, predicted in trained.predictions.items():
        rows = (
            (example.id, named(example.label), named(label))
            for example, label in zip(job.splits[split].examples, predicted, strict=True)
        )
        runs.write_predictions(folder / f"predictions-{split}.jsonl", rows)
    runs.write_json(folder / "history.json", {"best_epoch": trained.best_epoch, "epochs": trained.history})
    if job.fusion is not None:
        direct = job.projection == "direct"
        weights = None if direct else [round(float(w), 7) for w in trained.reader.fusion_weights.detach().cpu()]
        runs.write_json(
            folder / "fusion.json",
            {
                "fusion": job.fusion.name,
                "layers": list(job.fusion.layers),
                "trainable": job.fusion.trainable and not direct,
                "weights": weights,
                "projection": job.projection,
            },
        )
    runs.write_json(folder / "metrics.json", trained.metrics)


def write_reader(job: Job, reader: KReader, folder: Path) -> None:
    """The trained reader with its tokenizer, in a folder of its own."""
    reader.save(folder)
    for name, content in job.tokenizer_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
