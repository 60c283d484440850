"""What a reader says of examples: logits and predictions, in batches of like lengths."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from kr2cache.batches import Batcher, SplitData, part_overhead, split_by_length
from kr2cache.encode import first_subwords, length_sorted_batches
from kr2cache.kreader import KReader
from kr2cache.prepacked import prepacked_weights
from kr2cache.tasks import Task
from kr2cache.tasks.base import Prediction

POSITIONS_PER_BATCH = {"cpu": 2_048, "cuda": 32_768}
"""Of one batch, reader's and resource's positions together."""


def predict(reader: KReader, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Prediction]:
    """Label numbers for every example, in order; None for a word that was cut off."""
    return [most_likely(logits, task) for logits in example_logits(reader, data, task, tokenizer)]


def most_likely(logits: NDArray[np.float32], task: Task) -> Prediction:
    """The labels that one example's logits say.

    Args:
        logits: As ``example_logits`` gives them.
    """
    unknown = np.isnan(logits)
    best: list[int] = np.where(unknown, -np.inf, logits).argmax(axis=-1).tolist()
    if task.head != "token":
        return best[0]
    return [None if cut_off else label for cut_off, label in zip(unknown[:, 0].tolist(), best, strict=True)]


def batches_of(data: SplitData, device: torch.device) -> list[NDArray[np.intp]]:
    """Example numbers of each batch of an evaluation: like lengths together, longest first. What is left to pad is cut
    where that costs less: of a small split all would be one batch.
    """
    budget = POSITIONS_PER_BATCH.get(device.type, POSITIONS_PER_BATCH["cpu"])
    overhead = part_overhead(device)
    positions = data.positions()
    whole = length_sorted_batches(positions, budget)
    return [batch[part] for batch in whole for part in split_by_length(positions[batch], overhead)]


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
    result: list[NDArray[np.float32]] = [np.empty((0, 0), dtype=np.float32)] * len(data.examples)
    was_training = reader.training
    reader.eval()
    with torch.inference_mode(), prepacked_weights(reader, int(data.positions().sum())):
        for numbers in batches_of(data, device):
            inputs = {name: tensor.to(device) for name, tensor in batcher.inputs(numbers.tolist()).items()}
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
