"""What a dry run says of the work that is left, against what an extraction then does."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_extract import interrupt_after
from transformers import AutoTokenizer
from transformers.models.bert.modeling_bert import BertEncoder
from world import World, count_resource_batches

from kr2cache import FeatureCache
from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.errors import InterruptedWorkError
from kr2cache.extraction import estimate as estimating
from kr2cache.extraction import trial
from kr2cache.extraction.estimate import MOST_REPEATS, Estimate, describe_estimate, estimate
from kr2cache.extraction.extract import extract, place_of, plan_shards
from kr2cache.extraction.planning import plan_extraction
from kr2cache.extraction.trial import open_resource
from kr2cache.tasks import Example


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def estimated(world: World, **changes: Any) -> Estimate:
    """The estimate for the train split. Nothing may be written for it."""
    settings: dict[str, Any] = {
        "resource": str(world.resource),
        "split": "train",
        "task": "udpos",
        "data": str(world.data),
        "cache_dir": world.caches,
        "device": "cpu",
        "tokens_per_batch": 32,
    }
    before = files(world.folder), sorted(world.folder.rglob("*"))
    found = estimate(plan_extraction(ExtractConfig(**(settings | changes))))
    assert (files(world.folder), sorted(world.folder.rglob("*"))) == before
    return found


def test_the_work_that_is_left_is_what_the_extraction_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = estimated(world)
    assert (fresh.complete, fresh.taken_over, fresh.computed) == (0, 0, 12)
    first = world.extract(limit=7)
    some = estimated(world)
    assert (some.complete, some.taken_over, some.computed) == (0, 7, 5)
    lengths = FeatureCache.open(first.cache).n_tokens
    assert some.tokens == fresh.tokens - lengths.sum()
    assert some.bytes == some.tokens * 5 * 16 * 2
    assert 0 < some.forward_seconds < some.seconds
    assert some.tokens_per_second == some.tokens / some.forward_seconds
    with monkeypatch.context() as patch:
        interrupt_after(6, KeyboardInterrupt(), patch)
        with pytest.raises(InterruptedWorkError):
            world.extract(dtype="float32", tokens_per_batch=32)
    begun = estimated(world, dtype="float32")
    rest = world.extract(dtype="float32", tokens_per_batch=32)
    assert begun.complete > 0
    assert begun.computed == 12 - begun.complete <= rest.computed, "whole batches run again"
    done = estimated(world, dtype="float32")
    assert (done.complete, done.computed, done.seconds, done.tokens_per_second) == (12, 0, 0.0, None)
    pooled = estimated(world, pool="word")
    assert (pooled.taken_over, pooled.computed) == (12, 0), "from the float32 states"


def test_only_three_batches_run(world: World) -> None:
    """The longest, a middle and the shortest, beside those with which each extraction tries the model."""
    shapes: list[tuple[int, int]] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, BertEncoder):
            shapes.append(tuple(inputs[0].shape[:2]))

    plan = plan_extraction(
        ExtractConfig(
            resource=str(world.resource),
            split="train",
            task="udpos",
            data=str(world.data),
            cache_dir=world.caches,
            device="cpu",
            tokens_per_batch=64,
        )
    )
    model = open_resource(plan)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        plan_shards(plan, model, *place_of(plan, model.digests))
        tried = collections.Counter(shapes)
        shapes.clear()
        estimate(plan)
    finally:
        handle.remove()
    batches, lengths = [], sorted(plan.index.n_tokens.tolist(), reverse=True)
    while lengths:
        size = max(1, 64 // lengths[0])
        batches.append((len(lengths[:size]), lengths[0]))
        lengths = lengths[size:]
    assert len(batches) > 4
    last = -1 if 2 * batches[-1][0] * batches[-1][1] > batches[-2][0] * batches[-2][1] else -2
    ran = collections.Counter(shapes) - tried
    assert set(ran) == {batches[0], batches[(len(batches) + last) // 2], batches[last]}
    assert all(4 <= times <= MOST_REPEATS + 2 for times in ran.values())


def test_a_dry_run_shows_it_unless_told_not_to(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world.folder)
    words = [
        "extract",
        "--resource",
        str(world.resource),
        "--task",
        "udpos",
        "--data",
        "corpus",
        "--cache-dir",
        "cache",
    ]
    before = files(world.folder)
    capsys.readouterr()
    assert run([*words, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["complete"], said["taken_over"], said["to_compute"]) == (0, 0, 12)
    assert said["tokens_per_second"] > 0
    assert said["estimated_seconds"] > said["tokens"] / said["tokens_per_second"]
    assert run([*words, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "12 sequences to compute: about" in shown
    assert "tokens a second, so about" in shown
    with count_resource_batches() as sizes:
        assert run([*words, "--dry-run", "--no-measure", "--json"]) == 0
        assert run([*words, "--dry-run", "--no-measure"]) == 0
    assert sizes == []
    assert "tokens a second" not in capsys.readouterr().out
    assert files(world.folder) == before


@pytest.mark.parametrize("fault", ["weights", "memory"])
def test_the_sizes_are_shown_even_if_nothing_can_be_measured(
    world: World, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "weights":
        (weights,) = world.resource.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        monkeypatch.setattr(estimating, "free_memory", lambda: 1000)
        monkeypatch.setattr(trial, "open_resource", lambda plan: pytest.fail("the weights were read"))
    words = ["extract", "--resource", str(world.resource), "--task", "udpos", "--data", str(world.data), "--dry-run"]
    words += ["--cache-dir", str(world.caches)]
    capsys.readouterr()
    assert run([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == said["tokens"] * 5 * 16 * 2
    assert {said[name] for name in ("complete", "taken_over", "to_compute", "estimated_seconds")} == {None}
    assert ("memory are free" if fault == "memory" else "invalid header length. Check") in said["not_measured"]
    assert run(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.index("On disk it would take") < shown.index("The time was not measured: ")


def test_for_a_complete_cache_nothing_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = world.extract()
    monkeypatch.setattr(trial, "open_resource", lambda plan: pytest.fail("the weights were read"))
    done = estimated(world)
    assert (done.complete, done.computed, done.seconds) == (12, 0, 0.0)
    assert f"{made.cache} is complete." in " ".join(capsys.readouterr().out.split())


def test_only_a_pooling_that_the_tokenizer_allows_is_offered(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "train.txt").write_text("one two\nthree\n")
    words = ["extract", "--resource", str(world.resource), "--task", "text", "--data", str(world.folder / "train.txt")]
    words += ["--cache-dir", str(world.caches), "--dry-run", "--no-measure", "--json"]
    for told in (True, False):
        if not told:
            monkeypatch.setattr(type(AutoTokenizer.from_pretrained(world.resource)), "is_fast", False)
        capsys.readouterr()
        assert run(words) == 0
        assert ("word" in json.loads(capsys.readouterr().out)["bytes_by_pool"]) == told


def test_it_is_said_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    describe_estimate(
        Estimate(complete=3, taken_over=9, computed=0, tokens=0, bytes=0, forward_seconds=0.0, seconds=0.4)
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert shown == (
        "Of 12 sequences, 3 are complete in this cache and 9 can be copied from older caches. "
        "The model has to run for none."
    )


@pytest.mark.long
@pytest.mark.parametrize("pool", ["none", "sequence"])
def test_the_estimate_is_within_a_factor_of_two(tmp_path: Path, pool: str) -> None:
    """A model of six layers of width 384, and 400 sentences of 1 to 60 words."""
    model = tiny.save_model(tmp_path / "model", layers=6, width=384, num_attention_heads=12, intermediate_size=4 * 384)
    examples = [
        Example(f"s{i}", (tuple(word for word, _ in sentence),), None)
        for i, sentence in enumerate(tiny.sentences(400, longest=60))
    ]
    config = ExtractConfig(
        resource=str(model), split="train", task="udpos-de", device="cpu", cache_dir=tmp_path / "cache", pool=pool
    )
    found = estimate(plan_extraction(config, examples))
    took = extract(plan_extraction(config, examples)).seconds
    assert 0.5 < found.seconds / took < 2
