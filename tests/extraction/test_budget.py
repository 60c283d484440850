"""Batches that do not fit into the device's memory, in stage one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from world import World, scarce_memory

from kr2cache.cache.reader import FeatureCache
from kr2cache.config import ExtractConfig
from kr2cache.errors import DeviceMemoryError
from kr2cache.extraction import budget, trial
from kr2cache.extraction.planning import ExtractPlan, plan_extraction
from kr2cache.models.stack import load_encoder
from kr2cache.system.device import memory_advice

CPU = torch.device("cpu")


def plan_of(world: World, **settings: object) -> ExtractPlan:
    config = {"resource": str(world.resource), "split": "train", "task": "udpos", "data": str(world.data)}
    return plan_extraction(ExtractConfig(**(config | {"cache_dir": world.caches, "device": "cpu"} | settings)))  # type: ignore[arg-type]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join("".join(capsys.readouterr()).split())


def fitting(plan: ExtractPlan) -> int:
    encoder = load_encoder(plan.spec)
    return budget.that_fits(plan, lambda batch: trial.layers_of(plan, encoder, batch, fresh=False), CPU, padded=True)


def test_a_budget_is_halved_until_the_largest_batches_fit(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(world)
    longest = int(plan.index.n_tokens.max())
    assert fitting(plan) == 1_024, "twelve short sentences are far from it"
    assert "do not fit" not in said(capsys)
    with scarce_memory(longest + 1) as fitted:
        found = fitting(plan)
    assert found < plan.tokens
    assert max(fitted) <= longest + 1
    assert f"now they have {found:,} (--tokens-per-batch)" in said(capsys)
    # Of one sentence a batch at most: every smaller batch fits as well.
    with scarce_memory(longest + 1):
        assert fitting(plan_of(world, tokens_per_batch=found)) == found


def test_what_needs_most_memory_is_tried_not_the_longest_alone(world: World) -> None:
    """A long sentence alone in its batch, and many short ones in the next: those have more positions."""
    words = ["haus"] * 40
    blocks = "\n".join(f"{i}\t{word}\t_\tNOUN\t_\t_\t_\t_\t_\t_" for i, word in enumerate(words, 1)) + "\n\n"
    short = "1\tich\t_\tPRON\t_\t_\t_\t_\t_\t_\n\n" * 200
    (world.data / "train.conllu").write_text(blocks + short, "utf-8")
    plan = plan_of(world, max_length=120, tokens_per_batch=200)
    lengths = np.sort(plan.index.n_tokens)
    assert (int(lengths[-1]) > 100, int(lengths[-2])) == (True, 3)
    with scarce_memory(int(lengths[-1])):
        assert fitting(plan) == 99, "half of the 198 positions of 66 short sentences"


def test_a_sequence_that_does_not_fit_alone_is_named_before_anything_is_written(world: World) -> None:
    with scarce_memory(3), pytest.raises(DeviceMemoryError, match="longest sequence") as refused:
        fitting(plan_of(world))
    assert refused.value.remedy == "Close other programs, or give a smaller --max-length."
    assert "nvidia-smi" in memory_advice(torch.device("cuda"))
    for elsewhere in ("cuda:1", "mps"):
        assert memory_advice(torch.device(elsewhere)).endswith(", or give --device cpu.")
    with scarce_memory(3), pytest.raises(DeviceMemoryError, match="longest sequence"):
        world.extract()
    assert not list(world.caches.rglob("*.h5*"))


def test_two_sequences_that_do_not_fit_beside_each_other_do_not_stop_one_that_does(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a cache is made, a short sequence runs beside a longer one, to see whether padding does harm."""
    longest = int(plan_of(world).index.n_tokens.max())
    with scarce_memory(longest) as fitted:
        result = world.extract(tokens_per_batch=longest)
    assert max(fitted) == longest
    cache = FeatureCache.open(result.cache)
    assert cache.complete.all()
    assert cache.batch_plan["padded"] is True


def test_a_batch_of_one_sequence_cannot_be_made_smaller(world: World) -> None:
    longest = int(plan_of(world).index.n_tokens.max())
    with pytest.raises(DeviceMemoryError, match="batch of 1 sequence of") as refused, scarce_memory(0, after=9):
        world.extract(tokens_per_batch=longest)
    assert refused.value.remedy == "Close other programs and run the same command again."
    assert "--tokens-per-batch" not in refused.value.remedy


def test_later_the_batch_is_named_what_is_complete_stays_and_the_advice_works(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = world.extract(tokens_per_batch=90, cache_dir=world.folder / "whole").cache
    # Nine passes look at the model, one batch is computed, and then another program takes memory.
    with (
        pytest.raises(DeviceMemoryError, match=r"batch of \d+ sequences? of up to \d+ tokens") as refused,
        scarce_memory(0, after=10),
    ):
        world.extract(tokens_per_batch=90)
    folder = world.cache_folders()[0]
    complete = FeatureCache.open(folder).complete
    assert complete.any()
    assert not complete.all()
    less = int(refused.value.remedy.rpartition(" ")[2].rstrip("."))
    assert less < 90
    capsys.readouterr()
    with scarce_memory(less):
        result = world.extract(tokens_per_batch=less)
    assert result.computed == int((~complete).sum())
    assert f"From here on, batches have {less} positions" in said(capsys)
    here, there = FeatureCache.open(folder), FeatureCache.open(whole)
    assert here.complete.all()
    for name in there.ids:
        np.testing.assert_allclose(here[name].astype(np.float32), there[name].astype(np.float32), atol=4e-3)
