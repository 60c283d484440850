"""The order in which a training goes through its examples, and the parts that its batches are computed in."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import Tensor

from kr2cache.fusion import parse_fusion
from kr2cache.models.encode import encode_examples
from kr2cache.tasks import Example, Task
from kr2cache.tasks.base import HEADS as KIND_HEADS
from kr2cache.tasks.base import Kind, Label
from kr2cache.training.batches import WHOLE, Batcher, LengthGroupedSampler, SplitData, StepBatcher, split_by_length
from kr2cache.training.distill import TeacherLogits, soft_loss
from kr2cache.training.kreader import HEADS, PROBLEM_TYPES, KReader
from kr2cache.training.resource_input import InputSettings

WIDTH = 6


def lengths_of(examples: int, seed: int = 0) -> NDArray[np.int64]:
    """Skewed as those of sentences are."""
    return np.random.default_rng(seed).geometric(0.05, examples).astype(np.int64) + 2


def epoch(sampler: LengthGroupedSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


def padded(lengths: NDArray[np.int64], order: list[int], size: int) -> float:
    """Positions of all batches, padding included, per position that is needed."""
    batches = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return sum(int(batch.max()) * len(batch) for batch in batches) / int(lengths.sum())


@pytest.mark.parametrize("examples", [1, 2, 31, 32, 33, 64, 200, 1_000])
def test_every_example_comes_once_in_an_epoch(examples: int) -> None:
    sampler = LengthGroupedSampler(lengths_of(examples), 32, seed=1)
    assert len(sampler) == examples
    for number in range(3):
        assert sorted(epoch(sampler, number)) == list(range(examples))


def test_seed_and_epoch_decide_the_order() -> None:
    lengths = lengths_of(500)
    orders = {
        (seed, number): tuple(epoch(LengthGroupedSampler(lengths, 8, seed), number))
        for seed in (1, 2)
        for number in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert tuple(epoch(LengthGroupedSampler(lengths, 8, 2), 1)) == orders[2, 1]


def test_batches_hold_like_lengths_and_come_in_no_order_of_length() -> None:
    lengths = lengths_of(5_000)
    order = epoch(LengthGroupedSampler(lengths, 32, seed=3), 0)
    shuffled = np.random.default_rng(0).permutation(5_000).tolist()
    assert padded(lengths, shuffled, 32) > 2
    assert padded(lengths, order, 32) < 1.15
    longest = np.array([lengths[order[start : start + 32]].max() for start in range(0, 4_992, 32)])
    falling = np.mean(np.diff(longest) < 0)
    assert 0.35 < falling < 0.65, "sorted batches would fall throughout a pool"


def test_batch_mates_change_from_epoch_to_epoch() -> None:
    """Sorting all examples together would make the same batches for ever."""
    lengths = np.arange(1, 601, dtype=np.int64)
    sampler = LengthGroupedSampler(lengths, 32, seed=1)
    batches = [
        {frozenset(order[start : start + 32]) for start in range(0, 576, 32)}
        for order in (epoch(sampler, number) for number in range(2))
    ]
    assert not batches[0] & batches[1]


@pytest.mark.parametrize("examples", [64, 200, 999])
def test_what_needs_most_memory_comes_first(examples: int) -> None:
    lengths = lengths_of(examples)
    lengths[examples // 2] = 10_000
    for number in range(4):
        order = epoch(LengthGroupedSampler(lengths, 8, seed=1), number)
        assert examples // 2 in order[:8]


def test_what_does_not_fill_a_batch_comes_last() -> None:
    lengths = np.full(10, 7, dtype=np.int64)
    order = epoch(LengthGroupedSampler(lengths, 4, seed=1), 0)
    assert len(order) == 10
    assert sorted(order) == list(range(10))


# Parts of a batch ----------------------------------------------------------------------------------------------------


def all_cuts(lengths: list[int], overhead: int) -> int:
    """The least cost over every way to cut the sorted batch."""
    ordered = sorted(lengths, reverse=True)
    best = 2**62
    for marks in itertools.product((False, True), repeat=len(ordered) - 1):
        bounds = [0, *(i + 1 for i, mark in enumerate(marks) if mark), len(ordered)]
        best = min(best, sum(ordered[a] * (b - a) + overhead for a, b in itertools.pairwise(bounds)))
    return best


@pytest.mark.parametrize("overhead", [0, 1, 7, 40, WHOLE])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_cut_where_that_costs_least(seed: int, overhead: int) -> None:
    lengths = lengths_of(int(np.random.default_rng(seed).integers(1, 11)), seed)
    parts = split_by_length(lengths, overhead)
    cost = sum(int(lengths[part].max()) * len(part) + overhead for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert cost == all_cuts(lengths.tolist(), overhead)
    assert overhead < WHOLE or len(parts) == 1


def test_of_ways_that_cost_alike_the_one_of_fewest_parts_is_taken() -> None:
    """Whole 3 * 4 + 4, in two parts 3 * 2 + 1 * 2 + 8; the order of ties decides the last bits of every result."""
    lengths = np.array([1, 3, 3, 1])
    assert [part.tolist() for part in split_by_length(lengths, 4)] == [[1, 2, 0, 3]]
    assert [part.tolist() for part in split_by_length(lengths, 3)] == [[1, 2], [0, 3]]


class States:
    """States of a resource, drawn."""

    sequences_read = 0

    def __init__(self, sequences: int) -> None:
        draw = np.random.default_rng(3)
        self.n_tokens = draw.integers(1, 30, sequences).astype(np.int32)
        self.states = [draw.standard_normal((4, n, WIDTH), dtype=np.float32) for n in self.n_tokens.tolist()]

    def batch(self, sequences: Sequence[int]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        R = int(self.n_tokens[list(sequences)].max())
        states = np.zeros((len(sequences), 4, R, WIDTH), dtype=np.float32)
        mask = np.zeros((len(sequences), R), dtype=np.int64)
        for row, i in enumerate(sequences):
            states[row, :, : self.n_tokens[i]] = self.states[i]
            mask[row, : self.n_tokens[i]] = 1
        return states, mask


def batcher_of(kind: Kind, examples: int = 9) -> Batcher:
    """Examples of very different lengths, with a resource and a teacher; one has words that no tokenizer keeps."""
    draw, head = random.Random(0), KIND_HEADS[kind]
    task = cast("Task", SimpleNamespace(kind=kind, head=head, words=head == "token", labels=("a", "b", "c")))
    label: dict[Kind, Callable[[], Label]] = {
        "multilabel": lambda: tuple(sorted(draw.sample(range(3), draw.randrange(4)))),
        "regression": lambda: draw.uniform(-5, 5),
    }
    made = []
    for i in range(examples):
        texts = tuple(
            tuple(draw.choices(tiny.WORDS, k=draw.choice([1, 2, 3, 20, 40])))
            for _ in range(3 if head == "choice" else 1)
        )
        if head == "token":
            texts = ((" ",),) if i == 4 else texts
            made.append(Example(f"e{i}", texts, tuple(draw.randrange(3) for _ in texts[0])))
        else:
            gold = label.get(kind, lambda: draw.randrange(3))()
            made.append(Example(f"e{i}", tuple((" ".join(text),) for text in texts), gold))
    index = encode_examples(tiny.tokenizer(), made, task, 30)
    outputs = 1 if kind == "regression" else 3
    logits = [
        np.random.default_rng(i).standard_normal((len(e.texts[0]) if head == "token" else 1, outputs), dtype=np.float32)
        for i, e in enumerate(made)
    ]
    teacher = TeacherLogits(ids=tuple(e.id for e in made), logits=logits)
    data = SplitData(examples=made, index=index, features=States(len(index)), teacher=teacher)
    return Batcher(data, task, tiny.tokenizer())


def gradients(reader: KReader, parts: Sequence[dict[str, Any]]) -> tuple[list[float], dict[str, Tensor]]:
    """Hard and soft loss of a batch that comes in parts, and the gradients of their sum."""
    reader.zero_grad()
    sums = [0.0, 0.0]
    for part in parts:
        inputs = dict(part)
        teacher, share = inputs.pop("teacher_logits"), inputs.pop("labels_share", 1.0)
        soft_share = inputs.pop("teacher_logits_share", 1.0)
        output = reader(**inputs)
        hard = output["loss"] * share if share else torch.zeros(())
        soft = soft_share * soft_loss(output["logits"], teacher, 1.0, reader.problem_type)
        (hard + soft).backward()
        sums = [sums[0] + hard.item(), sums[1] + soft.item()]
    return sums, {name: one.grad.clone() for name, one in reader.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", KIND_HEADS)
def test_the_gradients_of_the_parts_add_up_to_the_batchs_own(kind: Kind) -> None:
    batcher, head = batcher_of(kind), KIND_HEADS[kind]
    torch.manual_seed(1)
    config = tiny.config("bert", num_labels=1 if kind == "regression" else 3, problem_type=PROBLEM_TYPES.get(kind))
    model = HEADS[head].from_config(config)
    reader = KReader(
        model, head, [InputSettings(fusion=parse_fusion("fuse", 4), projection="mlp", resource_width=WIDTH)]
    ).eval()
    examples = [8, 0, 3, 4, 1, 7, 5]
    whole, expected = gradients(reader, [batcher(examples)])
    parts = StepBatcher(batcher, 20)(examples)["parts"]
    assert len(parts) > 2
    widths = [part["attention_mask"].shape[-1] + part["resource_mask"].shape[-1] for part in parts]
    assert widths[0] > widths[-1], "padded to the longest of the part, not of the batch"
    found, summed = gradients(reader, parts)
    assert found == pytest.approx(whole, rel=1e-5)
    assert summed.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_label_is_no_part() -> None:
    batcher = batcher_of("tagging")
    assert len(StepBatcher(batcher, 0)([4, 0])["parts"]) == 1, "example 4 has no token that stands for a word"
    (alone,) = StepBatcher(batcher, 0)([4])["parts"]
    assert alone["labels_share"] == 0, "yet a step has a part"


def test_a_batch_that_is_not_to_be_cut_is_the_plain_one() -> None:
    batcher = batcher_of("classification")
    (part,) = StepBatcher(batcher, WHOLE)([2, 5, 1])["parts"]
    ordered = sorted([2, 5, 1], key=lambda i: -int(batcher.data.positions()[i]))
    plain = batcher(ordered)
    assert part["labels_share"] == part["teacher_logits_share"] == 1.0
    assert all(torch.equal(part[name], plain[name]) for name in plain)
