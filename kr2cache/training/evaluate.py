"""Logits, predictions and scores of a reader, computed in batches of similar lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kr2cache.cache.format import offsets
from kr2cache.errors import DeviceMemoryError, TrainingError
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.forward import cheaper_forward
from kr2cache.system.device import drop_unused_memory, is_out_of_memory, memory_advice
from kr2cache.tasks import Task
from kr2cache.tasks.base import Label, Prediction
from kr2cache.training.batches import Batcher, SplitData, part_overhead, split_by_length
from kr2cache.training.kreader import KReader

POSITIONS_PER_BATCH = {"cpu": 2_048, "cuda": 32_768}
"""Positions in one batch, reader and resource together."""


@dataclass(frozen=True)
class Evaluated:
    """Predictions for the examples of one split, and their scores."""

    predictions: list[Prediction]
    scores: dict[str, float]
    """Metric to fraction."""


def evaluate(reader: KReader, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase) -> Evaluated:
    """Predict and score one split that has gold labels."""
    predictions = predict(reader, data, task, tokenizer)
    return Evaluated(predictions, scores(task, [example.label for example in data.examples], predictions))


def scores(task: Task, gold: Sequence[Label], predicted: Sequence[Prediction]) -> dict[str, float]:
    """The task's metrics. One that is not defined counts as 0: the correlation of constant predictions, for example,
    which tell nothing about the gold values."""
    found = task.score(gold, predicted)
    return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}


def predict(reader: KReader, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Prediction]:
    """The prediction for each example, in order."""
    return predictions(example_logits(reader, data, task, tokenizer), task)


def predictions(logits: Sequence[NDArray[np.float32]], task: Task) -> list[Prediction]:
    """What the logits say, as the task's kind has it: the most likely label (tagging: of each word, None without a
    token); for multilabel all labels with a probability of at least 0.5; for regression the value.

    Args:
        logits: The result of ``example_logits``.
    """
    if not logits:
        return []
    rows = np.concatenate(logits)
    if task.kind == "regression":
        return list(rows[:, 0].astype(np.float64).tolist())
    if task.kind == "multilabel":  # sigmoid(0) = 0.5
        return [tuple(np.flatnonzero(row >= 0).tolist()) for row in rows]
    unknown = np.isnan(rows)
    rows[unknown] = -np.inf  # argmax treats nan as the largest value
    best: list[int] = rows.argmax(axis=1).tolist()
    if task.head != "token":
        return list(best)
    labels: list[int | None] = list(best)
    for word in np.flatnonzero(unknown[:, 0]).tolist():
        labels[word] = None
    return [labels[start:stop] for start, stop in pairwise(offsets(np.array([len(one) for one in logits])).tolist())]


def batches_of(data: SplitData, device: torch.device) -> list[NDArray[np.intp]]:
    """Example numbers of each evaluation batch: similar lengths together, longest first.

    Batches are cut further if that saves more padding than it costs: a small split would be a single batch.
    """
    budget = POSITIONS_PER_BATCH.get(device.type, POSITIONS_PER_BATCH["cpu"])
    overhead = part_overhead(device)
    positions = data.positions()
    whole = length_sorted_batches(positions, budget)
    return [batch[part] for batch in whole for part in split_by_length(positions[batch], overhead)]


def example_logits(
    reader: KReader, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase
) -> list[NDArray[np.float32]]:
    """Logits of each example, in order.

    Batches have similar lengths, longest first. A batch that does not fit into the device's memory is halved, so that a
    training is not lost in its evaluation.

    Returns:
        One array per example: (words, labels) for tagging, from the first subword of each word, nan for a word without
        a token; else (1, labels or choices), (1, 1) for regression.

    Raises:
        TrainingError: If a logit is not a finite number. Otherwise it would count as a word without a token, or as the
            first label.
    """
    device = next(reader.parameters()).device
    batcher = Batcher(data, task, tokenizer)
    is_token = task.head == "token"
    first_row = offsets(
        np.array([len(example.texts[0]) if is_token else 1 for example in data.examples], dtype=np.int64)
    )
    rows: NDArray[np.float32] | None = None
    was_training = reader.training
    reader.eval()
    with torch.inference_mode(), cheaper_forward(reader, int(data.positions().sum())):
        todo = batches_of(data, device)[::-1]
        while todo:
            numbers = todo.pop()
            logits = _logits_if_they_fit(reader, batcher, numbers, device)
            if logits is None:
                drop_unused_memory()
                todo += np.array_split(numbers, 2)[::-1]
                continue
            if rows is None:  # the first batch shows how many labels or choices there are
                rows = np.full((first_row[-1], logits.shape[-1]), np.nan, dtype=np.float32)
            places, targets = np.arange(len(numbers)), first_row[numbers]
            if is_token:
                places, tokens, words = data.first_subwords.of(numbers)
                logits, targets = logits[places, tokens], targets[places] + words
            finite = np.isfinite(logits).all(axis=1)
            if not finite.all():
                raise _not_finite(data.examples[numbers[places[np.argmin(finite)]]].id)
            rows[targets] = logits
    reader.train(was_training)
    assert rows is not None, "every split has an example"
    return [rows[start:stop] for start, stop in pairwise(first_row.tolist())]


def _moved(value: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return [one.to(device) for one in value] if isinstance(value, list) else value.to(device)


def _not_finite(name: str) -> TrainingError:
    return TrainingError(
        f"The reader gives nan or inf for example {name!r}, not a score for each label.",
        "Its training diverged, or its numbers are too large for its compute dtype. Lower --learning-rate, or remove "
        "bf16 and fp16 under [training] in kr2cache.toml.",
    )


def _logits_if_they_fit(
    reader: KReader, batcher: Batcher, numbers: NDArray[np.intp], device: torch.device
) -> NDArray[np.float32] | None:
    """Logits of one batch, on the CPU; None if the batch does not fit into the device's memory and can be halved.

    Raises:
        DeviceMemoryError: If a single example does not fit.
    """
    try:
        inputs = {name: _moved(value, device) for name, value in batcher.inputs(numbers.tolist()).items()}
        logits: NDArray[np.float32] = reader(**inputs)["logits"].float().cpu().numpy()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(numbers) == 1:
            raise DeviceMemoryError(
                f"Example {batcher.data.examples[int(numbers[0])].id!r} does not fit into the memory of {device}.",
                memory_advice(device),
            ) from None
        return None
    return logits
