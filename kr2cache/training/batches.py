"""Make the tensors of a batch from examples of one split, and choose the order of examples in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.models.encode import FirstSubwords, pad, padding_mask
from kr2cache.models.tokenizers import pad_id
from kr2cache.tasks import Example, Task
from kr2cache.training.appending import packed_order
from kr2cache.training.distill import TeacherLogits
from kr2cache.training.features import Features, States
from kr2cache.training.kreader import IGNORED

TARGETS = ("labels", "teacher_logits")
"""Tensors of a batch that the loss uses. The model does not read them."""
WHOLE = 2**40
PART_OVERHEAD = {"cpu": 128}
"""See ``part_overhead``."""
POOL_BATCHES = 50
"""How many batches are sorted by length together; at most a quarter of the split."""


@dataclass(frozen=True, kw_only=True)
class SplitData:
    """One split, ready for a reader."""

    examples: Sequence[Example]
    index: SequenceIndex
    """Token ids of its sequences by the reader's tokenizer."""
    features: Features | None = None
    """The resource's states of the same sequences; None for plain readers."""
    teacher: TeacherLogits | None = None
    """The teacher's logits for the same examples; None without distillation."""

    @property
    def sequences_per_example(self) -> int:
        return len(self.index) // len(self.examples)

    @property
    def states_on_gpu(self) -> bool:
        return self.features is not None and self.features.device.type != "cpu"

    @cached_property
    def first_subwords(self) -> FirstSubwords:
        """Where each word begins. Only for tasks that label words."""
        return FirstSubwords(self.index)

    def positions(self) -> NDArray[np.int64]:
        """(examples,) about how many positions of the encoder each example takes."""
        lengths = self.index.n_tokens.astype(np.int64)
        if self.features is not None:
            lengths = lengths + self.features.n_tokens
        per_example: NDArray[np.int64] = lengths.reshape(len(self.examples), -1).max(axis=1)
        return per_example * self.sequences_per_example


class Batcher:
    """Makes the tensors of one batch from example numbers."""

    def __init__(self, data: SplitData, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = data
        self.head = task.head
        self.kind = task.kind
        self.labels = len(task.labels)
        self.pad_id = pad_id(tokenizer)
        self.first = data.index.first_token

    def __call__(self, examples: Sequence[int]) -> dict[str, Any]:
        """The inputs of ``KReader.forward`` with labels, and with the teacher's logits if there are any."""
        batch = self.inputs(examples)
        T = batch["input_ids"].shape[-1]
        if all(self.data.examples[i].label is not None for i in examples):
            batch["labels"] = self._labels(examples, T)
        if self.data.teacher is not None:
            batch["teacher_logits"] = self._teacher_logits(self.data.teacher, examples, T)
        return batch

    def inputs(self, examples: Sequence[int]) -> dict[str, Any]:
        """The inputs of ``KReader.forward`` without labels."""
        per = self.data.sequences_per_example
        sequences = [example * per + choice for example in examples for choice in range(per)]
        tokens = [self.data.index.input_id[self.first[i] : self.first[i + 1]] for i in sequences]
        input_ids = pad(tokens, self.pad_id)
        mask = padding_mask(self.data.index.n_tokens[sequences])
        shape = (len(examples), per, -1) if self.head == "choice" else (len(examples), -1)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids).reshape(shape),
            "attention_mask": torch.from_numpy(mask).reshape(shape),
        }
        if self.data.index.segment_id is not None:
            segments = [self.data.index.segment_id[self.first[i] : self.first[i + 1]] for i in sequences]
            batch["token_type_ids"] = torch.from_numpy(pad(segments, 0)).reshape(shape)
        if self.data.features is not None:
            states, resource_mask = self.data.features.batch(sequences)
            batch["resource_states"] = [*map(_tensor, states)] if isinstance(states, list) else _tensor(states)
            batch["resource_mask"] = torch.from_numpy(resource_mask)
            # Here, once per batch: on a GPU, the model would have to wait for the longest length.
            batch["order"] = packed_order(torch.from_numpy(mask), batch["resource_mask"])
        return batch

    def _labels(self, examples: Sequence[int], T: int) -> Tensor:
        if self.kind == "regression":
            return torch.tensor([[self.data.examples[i].label] for i in examples], dtype=torch.float32)
        if self.kind == "multilabel":
            return self._indicators(examples)
        if self.head != "token":
            return torch.tensor([self.data.examples[i].label for i in examples])
        labels = np.full((len(examples), T), IGNORED, dtype=np.int64)
        for row, i in zip(labels, examples, strict=True):
            gold = self.data.examples[i].label
            assert isinstance(gold, tuple), "training splits have gold labels"
            starts, words = self.data.first_subwords[i]
            row[starts] = np.array(gold, dtype=np.int64)[words]
        return torch.from_numpy(labels)

    def _indicators(self, examples: Sequence[int]) -> Tensor:
        """(B, labels) of 0 and 1: the labels that each example has."""
        indicators = torch.zeros(len(examples), self.labels)
        for row, i in zip(indicators, examples, strict=True):
            gold = self.data.examples[i].label
            assert isinstance(gold, tuple), "training splits have gold labels"
            row[list(gold)] = 1.0
        return indicators

    def _teacher_logits(self, teacher: TeacherLogits, examples: Sequence[int], T: int) -> Tensor:
        """(B, T, K) for tagging, nan except at the first subword of each word; else (B, K)."""
        if self.head != "token":
            return torch.from_numpy(np.concatenate([teacher.logits[i] for i in examples]))
        labels = teacher.logits[examples[0]].shape[1]
        logits = np.full((len(examples), T, labels), np.nan, dtype=np.float32)
        for row, i in zip(logits, examples, strict=True):
            starts, words = self.data.first_subwords[i]
            row[starts] = teacher.logits[i][words]
        return torch.from_numpy(logits)


def _tensor(states: States) -> Tensor:
    return states if isinstance(states, Tensor) else torch.from_numpy(states)


def part_overhead(device: torch.device) -> int:
    """What one more part of a batch costs, in positions. On a GPU batches stay whole: small parts leave it idle."""
    return PART_OVERHEAD.get(device.type, WHOLE)


def split_by_length(lengths: NDArray[np.int64], overhead: int) -> list[NDArray[np.intp]]:
    """Cut a batch into parts of similar lengths, so that padding and parts together cost least.

    Args:
        lengths: (B,) positions that each example takes.
        overhead: What one more part costs, in positions.

    Returns:
        For each part, the places of its examples in the batch; longest first.
    """
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order]
    starts = np.flatnonzero(np.diff(longest_first, prepend=-1))  # a cut between equal lengths saves nothing
    longest, cuts = longest_first[starts], np.append(starts, len(order))
    cost, begins = np.zeros(len(cuts), dtype=np.int64), np.zeros(len(cuts), dtype=np.intp)
    for stop in range(1, len(cuts)):  # the cheapest cuts of everything before ``stop``
        candidates = cost[:stop] + longest[:stop] * (cuts[stop] - cuts[:stop]) + overhead
        begins[stop] = candidates.argmin()
        cost[stop] = candidates[begins[stop]]
    parts = []
    stop = len(starts)
    while stop:
        begin = int(begins[stop])
        parts.append(order[cuts[begin] : cuts[stop]])
        stop = begin
    return parts[::-1]


class StepBatcher:
    """Makes the input of one training step from example numbers: ``parts``, the batch cut by length.

    Parts have little padding. Each part has its share of the batch's loss, so that the gradients of the parts add up to
    that of the whole batch.
    """

    def __init__(self, batcher: Batcher, overhead: int) -> None:
        """
        Args:
            overhead: See ``split_by_length``.
        """
        self.batcher = batcher
        self.overhead = overhead
        self.positions = batcher.data.positions()

    def __call__(self, examples: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
        numbers = np.asarray(examples)
        cuts = split_by_length(self.positions[numbers], self.overhead)
        parts: list[dict[str, Any]] = [dict(self.batcher(numbers[cut].tolist())) for cut in cuts]
        for target in TARGETS:
            if target in parts[0]:
                counts = [_targets(part[target]) for part in parts]
                for part, count in zip(parts, counts, strict=True):
                    part[f"{target}_share"] = count / max(1, sum(counts))
        # Keep at least one part: under torchrun, other processes would wait forever for a missing backward pass.
        return {
            "parts": [part for part in parts if any(part.get(f"{target}_share") for target in TARGETS)] or parts[:1]
        }


def _targets(tensor: Tensor) -> int:
    """How many labels, or predictions of the teacher, the mean loss counts. Floats (B, ..., K) are of one answer in
    their last axis: K logits, K labels that are right or not, or one value.
    """
    if tensor.is_floating_point():
        return int((~tensor[..., 0].isnan()).sum())
    return int((tensor != IGNORED).sum())


class LengthGroupedSampler(Sampler[int]):
    """Random batches of similar lengths. Examples are shuffled and sorted by length within pools; pools are cut into
    batches, and batches are shuffled. This changes which examples share a batch, unlike the parts of ``StepBatcher``.

    The batch with the longest example comes first: if the memory of the device is too small, training fails at once.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int) -> None:
        """
        Args:
            lengths: (examples,) positions that each takes.
            batch_size: Examples per step.
            seed: The seed and the epoch decide the order.
        """
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        order = draw.permutation(len(self.lengths))
        pool = self.batch_size * max(1, min(POOL_BATCHES, len(order) // (4 * self.batch_size)))
        # The last pool takes the rest, so that an incomplete batch has the shortest examples of many.
        starts = list(range(0, max(1, len(order) - pool + 1), pool))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            part = order[start:stop]
            order[start:stop] = part[np.argsort(-self.lengths[part], kind="stable")]
        whole = len(order) // self.batch_size
        batches = order[: whole * self.batch_size].reshape(whole, self.batch_size)
        draw.shuffle(batches, axis=0)
        if whole:
            longest = int(self.lengths[batches].max(axis=1).argmax())
            batches[[0, longest]] = batches[[longest, 0]]
        yield from batches.ravel().tolist()
        yield from order[whole * self.batch_size :].tolist()
