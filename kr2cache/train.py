"""Stage two: train a KReader, or a plain one, on one seed.

``transformers.Trainer`` runs the loop. Evaluation goes through ``predict`` alone: after each epoch where there is a dev
split (the best epoch is kept), and at the end. Which caches and examples are trained on is the caller's business.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
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

from kr2cache import models, runs
from kr2cache.cache.format import SequenceIndex
from kr2cache.config import Projection, TrainConfig
from kr2cache.console import work_progress
from kr2cache.device import choose_device
from kr2cache.distill import TeacherLogits, soft_loss
from kr2cache.encode import first_subwords, length_sorted_batches, pad
from kr2cache.errors import ConfigError, TrainingError, unknown_name
from kr2cache.features import Features
from kr2cache.fusion import Fusion
from kr2cache.interrupt import interrupt_between_batches
from kr2cache.kreader import IGNORED, KReader, load_task_model
from kr2cache.prepacked import prepacked_weights
from kr2cache.tasks import Example, Task
from kr2cache.tasks.base import Prediction

POSITIONS_PER_BATCH = {"cpu": 2_048, "cuda": 32_768}
"""Of a batch in evaluation, reader's and resource's positions together."""
TARGETS = ("labels", "teacher_logits")
"""Of a batch: what is learned from, not read."""


@dataclass(frozen=True, kw_only=True)
class SplitData:
    """One split, ready for a reader."""

    examples: Sequence[Example]
    index: SequenceIndex
    """Its sequences by the reader's tokenizer."""
    features: Features | None = None
    """The resource's states of the same sequences; None for plain readers."""
    teacher: TeacherLogits | None = None
    """What a teacher says of the same examples; None without distillation."""

    @property
    def sequences_per_example(self) -> int:
        return len(self.index) // len(self.examples)

    def positions(self) -> NDArray[np.int64]:
        """(examples,) how many positions each takes in the encoder, about."""
        lengths = self.index.n_tokens.astype(np.int64)
        if self.features is not None:
            lengths = lengths + self.features.n_tokens
        per_example: NDArray[np.int64] = lengths.reshape(len(self.examples), -1).max(axis=1)
        return per_example * self.sequences_per_example


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the seeds of one configuration share."""

    task: Task
    reader: models.ModelSpec
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, SplitData]
    """``train``, and ``dev`` and ``test`` where they have gold labels."""
    config: TrainConfig
    fusion: Fusion | None = None
    projection: Projection = "none"
    resource_width: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One trained reader and what it scores."""

    reader: KReader
    metrics: runs.Metrics
    predictions: dict[str, list[Prediction]]
    history: list[dict[str, float]]
    best_epoch: float


class Batcher:
    """Example numbers to the tensors of one batch."""

    def __init__(self, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = data
        self.head = task.head
        self.pad_id = models.pad_id(tokenizer)
        self.first = data.index.first_token

    def __call__(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of ``KReader.forward``."""
        per = self.data.sequences_per_example
        sequences = [example * per + choice for example in examples for choice in range(per)]
        tokens = [self.data.index.input_id[self.first[i] : self.first[i + 1]] for i in sequences]
        input_ids = pad(tokens, self.pad_id)
        lengths = self.data.index.n_tokens[sequences]
        mask = (np.arange(input_ids.shape[1])[None, :] < lengths[:, None]).astype(np.int64)
        shape = (len(examples), per, -1) if self.head == "choice" else (len(examples), -1)
        batch = {
            "input_ids": torch.from_numpy(input_ids).reshape(shape),
            "attention_mask": torch.from_numpy(mask).reshape(shape),
        }
        if all(self.data.examples[i].label is not None for i in examples):
            batch["labels"] = self._labels(examples, input_ids.shape[1])
        if self.data.index.segment_id is not None:
            segments = [self.data.index.segment_id[self.first[i] : self.first[i + 1]] for i in sequences]
            batch["token_type_ids"] = torch.from_numpy(pad(segments, 0)).reshape(shape)
        if self.data.features is not None:
            states, resource_mask = self.data.features.batch(sequences)
            batch["resource_states"] = torch.from_numpy(states)
            batch["resource_mask"] = torch.from_numpy(resource_mask)
        if self.data.teacher is not None:
            batch["teacher_logits"] = self._teacher_logits(self.data.teacher, examples, input_ids.shape[1])
        return batch

    def _labels(self, examples: Sequence[int], T: int) -> Tensor:
        if self.head != "token":
            return torch.tensor([self.data.examples[i].label for i in examples])
        labels = np.full((len(examples), T), IGNORED, dtype=np.int64)
        for row, i in zip(labels, examples, strict=True):
            gold = self.data.examples[i].label
            assert isinstance(gold, tuple), "splits without gold labels are not trained on"
            starts, words = self._first_subwords(i)
            row[starts] = np.array(gold, dtype=np.int64)[words]
        return torch.from_numpy(labels)

    def _teacher_logits(self, teacher: TeacherLogits, examples: Sequence[int], T: int) -> Tensor:
        """(B, T, K) for tagging, at each word's first subword and nan elsewhere; else (B, K)."""
        if self.head != "token":
            return torch.from_numpy(np.concatenate([teacher.logits[i] for i in examples]))
        labels = teacher.logits[examples[0]].shape[1]
        logits = np.full((len(examples), T, labels), np.nan, dtype=np.float32)
        for row, i in zip(logits, examples, strict=True):
            starts, words = self._first_subwords(i)
            row[starts] = teacher.logits[i][words]
        return torch.from_numpy(logits)

    def _first_subwords(self, example: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        return first_subwords(self.data.index.word_index[self.first[example] : self.first[example + 1]])


def predict(reader: KReader, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Prediction]:
    """Label numbers for every example, in order; None for a word that was cut off."""
    return [most_likely(logits, task) for logits in example_logits(reader, data, task, tokenizer)]


def most_likely(logits: NDArray[np.float32], task: Task) -> Prediction:
    """The labels that one example's logits say.

    Args:
        logits: As ``example_logits`` gives them.
    """
    best: list[int] = np.nan_to_num(logits, nan=-np.inf).argmax(axis=-1).tolist()
    if task.head != "token":
        return best[0]
    return [None if np.isnan(row[0]) else label for row, label in zip(logits, best, strict=True)]


def example_logits(
    reader: KReader, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase
) -> list[NDArray[np.float32]]:
    """Logits of every example, in order; batches go by length, longest first.

    Returns:
        One array an example: (words, labels) for tagging, at each word's first subword, nan for a word that was cut
        off; else (1, labels or choices).
    """
    device = next(reader.parameters()).device
    batcher = Batcher(data, task, tokenizer)
    budget = POSITIONS_PER_BATCH.get(device.type, POSITIONS_PER_BATCH["cpu"])
    result: list[NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(data.examples)
    was_training = reader.training
    reader.eval()
    with torch.inference_mode(), prepacked_weights(reader):
        for numbers in length_sorted_batches(data.positions(), budget):
            batch = batcher(numbers.tolist())
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in TARGETS}
            logits = reader(**inputs)["logits"].float().cpu().numpy()
            for i, row in zip(numbers.tolist(), logits, strict=True):
                result[i] = _per_word(row, data, i) if task.head == "token" else row[None]
    reader.train(was_training)
    return result


def _per_word(logits: NDArray[np.float32], data: SplitData, example: int) -> NDArray[np.float32]:
    """(T, labels) to (words, labels)."""
    first = data.index.first_token
    starts, words = first_subwords(data.index.word_index[first[example] : first[example + 1]])
    per_word = np.full((len(data.examples[example].texts[0]), logits.shape[1]), np.nan, dtype=np.float32)
    per_word[words] = logits[starts]
    return per_word


def training_arguments(config: TrainConfig, folder: Path, seed: int) -> TrainingArguments:
    """The Trainer's arguments: ours, with ``[training]`` of ``kr2cache.toml`` laid over the defaults.

    Raises:
        UnknownNameError: For a name that TrainingArguments does not have.
        ConfigError: For a value it refuses, or several GPUs in one process.
    """
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    for name in config.training:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=6, cutoff=0.4) or sorted(known)[:6]
            raise unknown_name("argument under [training] in kr2cache.toml:", name, near, "(of many)")
    device = choose_device(config.device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(
            f"Training on --device {config.device}: the Trainer takes the first GPU it sees.",
            f"Set CUDA_VISIBLE_DEVICES={device.index} and give --device cuda.",
        )
    values: dict[str, Any] = {
        "save_strategy": "no",
        "logging_strategy": "epoch",
        "report_to": "none",
        **config.training,
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": device.type == "cuda",
    }
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"The training arguments are refused: {reason}", "Check [training] in kr2cache.toml."
        ) from error
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process; DataParallel would lose the resource's states.",
            "Start through torchrun --nproc-per-node N -m kr2cache.cli train ..., or set CUDA_VISIBLE_DEVICES=0.",
        )
    return arguments


class ReaderTrainer(Trainer):
    """The Trainer, with a learning rate of its own for the fusion weights, lengths for length-grouped batches, and the
    soft loss of distillation where a batch has a teacher's logits."""

    def __init__(self, *arguments: Any, config: TrainConfig, lengths: list[int], **named: Any) -> None:
        self.config = config
        self.lengths = lengths
        self.soft_losses: list[Tensor] = []
        """Since the last log."""
        super().__init__(*arguments, **named)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        teacher = inputs.pop("teacher_logits", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if teacher is not None:
            soft = soft_loss(outputs["logits"], teacher, self.config.temperature)
            self.soft_losses.append(soft.detach())
            loss = loss + self.config.soft_weight * soft
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs and self.soft_losses:
            logs["soft_loss"] = float(torch.stack(self.soft_losses).mean())
            self.soft_losses.clear()
        super().log(logs, *arguments, **named)

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
        from transformers.trainer_pt_utils import LengthGroupedSampler

        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=self.lengths)


@dataclass
class _KeepBest(TrainerCallback):
    """Score dev after each epoch; remember the best epoch's weights."""

    score: Callable[[], dict[str, float]]
    metric: str
    history: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    best_epoch: float = 0.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = self.score()
        epoch = round(state.epoch or 0.0, 4)
        self.history.append({"epoch": epoch, **{f"dev_{name}": value for name, value in metrics.items()}})
        if metrics[self.metric] > self.best:
            self.best, self.best_epoch = metrics[self.metric], epoch
            weights = kwargs["model"].state_dict()
            self.best_weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


@dataclass
class _OnStep(TrainerCallback):
    """Call something after each step."""

    call: Callable[[], None]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
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


def train_seed(job: Job, seed: int, folder: Path, title: str) -> Trained:
    """Train one reader.

    With dev and test the best epoch on dev is kept and scored on both. With one of them alone the last epoch is scored
    on it: a split that chooses the epoch is no measure of it.

    Args:
        folder: Where transformers may leave files ([training] can ask for checkpoints).
        title: Of the progress line.
    """
    arguments = training_arguments(job.config, folder, seed)
    set_seed(seed)
    reader = KReader(
        load_task_model(job.reader, job.task.head, job.task.labels),
        job.task.head,
        fusion=job.fusion,
        projection=job.projection,
        resource_width=job.resource_width,
    )
    train = job.splits["train"]
    trainer = ReaderTrainer(
        model=reader,
        args=arguments,
        data_collator=Batcher(train, job.task, job.tokenizer),
        train_dataset=list(range(len(train.examples))),
        config=job.config,
        lengths=train.positions().tolist(),
    )
    trainer.remove_callback(PrinterCallback)
    progress = _Progress(title)
    trainer.add_callback(progress)

    def score(split: str) -> dict[str, float]:
        return job.task.score(*_gold_and_predicted(job, split, reader))

    choose_epoch = "dev" in job.splits and "test" in job.splits
    keep_best = _KeepBest(score=lambda: score("dev"), metric=job.task.metric) if choose_epoch else None
    if keep_best is not None:
        trainer.add_callback(keep_best)
    try:
        with interrupt_between_batches() as check:
            trainer.add_callback(_OnStep(check))
            trainer.train()
            check()
    finally:
        progress.bar.stop()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in reader.parameters()):
        raise TrainingError(
            f"The training of seed {seed} diverged: the reader's weights are no longer finite numbers.",
            f"Lower the learning rate (now {job.config.learning_rate:g}).",
        )
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    best_epoch = float(job.config.epochs)
    if keep_best is not None:
        reader.load_state_dict(keep_best.best_weights)
        history += keep_best.history
        best_epoch = keep_best.best_epoch
    predictions = {
        split: predict(reader, job.splits[split], job.task, job.tokenizer) for split in job.splits if split != "train"
    }
    metrics = {
        split: job.task.score([example.label for example in job.splits[split].examples], predicted)
        for split, predicted in predictions.items()
    }
    return Trained(reader=reader, metrics=metrics, predictions=predictions, history=history, best_epoch=best_epoch)


def _gold_and_predicted(job: Job, split: str, reader: KReader) -> tuple[list[Any], list[Prediction]]:
    data = job.splits[split]
    return [example.label for example in data.examples], predict(reader, data, job.task, job.tokenizer)


def write_trained(job: Job, trained: Trained, folder: Path) -> None:
    """What a run folder holds beside config.json: metrics, history, predictions, fusion weights, the reader itself."""
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
    if job.config.keep_readers:
        trained.reader.save(folder / runs.READER)
        job.tokenizer.save_pretrained(folder / runs.READER)
    runs.write_json(folder / "metrics.json", trained.metrics)
