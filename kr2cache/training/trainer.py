"""The loop of one training: ``transformers.Trainer`` for batches in parts, and its callbacks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError, KR2CacheError, error_text
from kr2cache.system.allocator import return_free_memory
from kr2cache.system.console import WorkProgress
from kr2cache.system.device import is_out_of_memory
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.training.batches import WHOLE, Batcher, LengthGroupedSampler, StepBatcher, part_overhead
from kr2cache.training.distill import soft_loss
from kr2cache.training.evaluate import Evaluated
from kr2cache.training.kreader import KReader
from kr2cache.training.trial import LongestBatchFirst, out_of_memory

RETURN_MEMORY_EVERY_S = 60.0
"""Seconds. Memory that is returned must be requested again, which takes as long as one step of a small reader."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the loop reports of one training. The trained weights are in the reader."""

    history: list[dict[str, float]]
    """What the Trainer logged: loss, learning rate and so on, by default once per epoch."""
    step_seconds: float
    """Time in training steps: forward and backward passes, updates. On a GPU it is the time to issue them, because
    the loop does not wait for the GPU."""


def fit(
    reader: KReader,
    batcher: Batcher,
    arguments: TrainingArguments,
    config: TrainConfig,
    *,
    title: str,
    keep_best: KeepBest | None,
) -> Fit:
    """Train ``reader`` in place on all examples of the batcher's split.

    Args:
        title: Shown beside the progress bar.
        keep_best: Called after each epoch, if the best epoch is kept.

    Raises:
        ConfigError: If training fails before the end of its first step and ``[training]`` has settings.
        DeviceMemoryError: If a step does not fit into memory.
    """
    progress = _Progress(title)
    callbacks: list[TrainerCallback] = [progress] if keep_best is None else [progress, keep_best]
    trainer: ReaderTrainer | None = None
    try:
        trainer = _make_trainer(reader, batcher, arguments, config, callbacks)
        with interrupt_between_batches() as check:
            on_step = _OnStep(check)
            trainer.add_callback(on_step)
            trainer.train()
            check()
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, arguments.device) from None
        in_first_step = trainer is None or trainer.state.global_step == 0
        if in_first_step and config.training and not isinstance(error, KR2CacheError):
            raise _first_step_error(config, error) from error
        raise
    finally:
        progress.shown.stop()
    # JSON has no nan. If a step of float16 overflows, it is skipped and its loss has no meaning.
    history = [
        {name: value for name, value in entry.items() if math.isfinite(value)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return Fit(history=history, step_seconds=on_step.seconds)


def _make_trainer(
    reader: KReader,
    batcher: Batcher,
    arguments: TrainingArguments,
    config: TrainConfig,
    callbacks: list[TrainerCallback],
) -> ReaderTrainer:
    # Under torchrun all processes must run the same number of backward passes, so batches stay whole.
    overhead = part_overhead(arguments.device) if arguments.world_size == 1 else WHOLE
    step_batcher = StepBatcher(batcher, overhead)
    trainer = ReaderTrainer(
        model=reader,
        args=arguments,
        data_collator=step_batcher,
        train_dataset=list(range(len(batcher.data.examples))),
        config=config,
        positions=step_batcher.positions,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if arguments.device.type != "cpu":  # without a GPU, the system kills a process that needs too much memory: no error
        trainer.add_callback(LongestBatchFirst(reader, step_batcher, trainer.try_batch))
    return trainer


def _first_step_error(config: TrainConfig, error: Exception) -> ConfigError:
    reason = error_text(error)
    return ConfigError(
        f"The training failed before the end of its first step: {reason}",
        f"If a setting under [training] in kr2cache.toml is the cause ({', '.join(config.training)}), change it or "
        "leave it out.",
    )


class ReaderTrainer(Trainer):
    """The Trainer for batches in parts (``StepBatcher``).

    It adds the soft loss of distillation to batches that have a teacher's logits. The fusion weights can have their own
    learning rate.
    """

    def __init__(self, *arguments: Any, config: TrainConfig, positions: NDArray[np.int64], **named: Any) -> None:
        """
        Args:
            positions: (examples,) of the train split, ``SplitData.positions``.
        """
        self.config = config
        self.positions = positions
        self.soft_losses: list[Tensor] = []
        """One per part since the last log."""
        self.batches = 0
        """How many since the last log."""
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
        # The mean loss of a part without labels is nan. The part still needs a backward pass.
        loss = loss * share if share else 0.0 * outputs["logits"].float().sum()
        if teacher is not None and soft_share:
            assert isinstance(self.model, KReader), "the Trainer keeps its wrapped copy apart"
            temperature, problem_type = self.config.temperature, self.model.problem_type
            soft = soft_share * soft_loss(outputs["logits"], teacher, temperature, problem_type)
            self.soft_losses.append(soft.detach())
            loss = loss + self.config.soft_weight * soft
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        if "loss" in logs and self.soft_losses:
            logs["soft_loss"] = float(torch.stack(self.soft_losses).sum()) / self.batches
            self._forget_losses()
        super().log(logs, *arguments, **named)

    def try_batch(self, batch: dict[str, Any]) -> None:
        """Run one batch forward and backward to see if it fits into memory. Gradients and losses are dropped."""
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # set with the first batch
        self.training_step(self.model_wrapped, batch)
        self.model_wrapped.zero_grad()
        self._forget_losses()

    def _forget_losses(self) -> None:
        self.batches = 0
        self.soft_losses.clear()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        assert isinstance(self.model, KReader), "the Trainer keeps its wrapped copy apart"
        weights = self.model.fusion_parameters()
        learning_rate = self.config.fusion_learning_rate
        if learning_rate is not None and weights:
            own = set(weights)
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in own]
            optimizer.add_param_group({"params": weights, "lr": learning_rate, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(self.positions, step, self.args.seed)


@dataclass
class KeepBest(TrainerCallback):
    """Evaluate dev after each epoch and keep the weights and predictions of the best epoch."""

    evaluate: Callable[[], Evaluated]
    metric: str
    """Decides which epoch is best."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per epoch: its number and the scores of dev."""
    best: Evaluated | None = None
    best_epoch: float = 0.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    """Empty if the last epoch is the best: the reader has these weights at the end."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = self.evaluate()
        epoch = round(state.epoch or 0.0, 4)
        self.history.append({"epoch": epoch, **{f"dev_{name}": value for name, value in now.scores.items()}})
        if self.best is None or now.scores[self.metric] > self.best.scores[self.metric]:
            self.best, self.best_epoch = now, epoch
            is_last = state.global_step >= state.max_steps
            weights = {} if is_last else kwargs["model"].state_dict()
            self.best_weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def restore(self, reader: KReader) -> Evaluated:
        """Give the reader the weights of the best epoch; returns what they scored."""
        assert self.best is not None, "every training has an epoch"
        if self.best_weights:
            reader.load_state_dict(self.best_weights)
        return self.best


@dataclass
class _OnStep(TrainerCallback):
    """After each step: add up the time of steps, return freed memory from time to time, check for an interrupt."""

    check: Callable[[], None]
    seconds: float = 0.0
    _since: float = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._since
        return_free_memory(RETURN_MEMORY_EVERY_S)
        self.check()


class _Progress(TrainerCallback):
    """The progress bar of one training."""

    def __init__(self, title: str) -> None:
        self.shown = WorkProgress(title, "steps")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.shown.total = state.max_steps
        self.shown.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.shown.advance(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            self.shown.advance(0, f"loss {loss:.3f}")
