"""Batches that do not fit into the device's memory, in stage two."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaEncoder
from world import World, predictions, scarce_memory

from kr2cache.errors import DeviceMemoryError
from kr2cache.training import batches
from kr2cache.training import trainer as trainer_module
from kr2cache.training.batches import StepBatcher
from kr2cache.training.trial import LongestBatchFirst


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every training tries its longest batch, as on a GPU; positions of what was tried."""
    sizes: list[int] = []
    begin = trainer_module.ReaderTrainer.__init__

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        batcher: StepBatcher = named["data_collator"]

        def try_batch(batch: dict[str, Any]) -> None:
            sizes.append(max(part["input_ids"].shape[1] for part in batch["parts"]))
            self.try_batch(batch)

        self.add_callback(LongestBatchFirst(named["model"], batcher, try_batch))

    monkeypatch.setattr(trainer_module.ReaderTrainer, "__init__", init)
    return sizes


@pytest.mark.parametrize("method", ["kr2", "kd"])
def test_the_trial_leaves_no_trace(method: str, world: World, request: pytest.FixtureRequest) -> None:
    settings: dict[str, Any] = {"method": method, "teacher": str(world.resource) if method == "kd" else None}
    before = world.train(run_dir=world.folder / "before", **settings)
    sizes = request.getfixturevalue("tried")
    after = world.train(run_dir=world.folder / "after", **settings)
    words = [[word for word, _ in sentence] for sentence in tiny.sentences(12, seed=0)]
    lengths = [len(tokens) for tokens in tiny.tokenizer()(words, is_split_into_words=True)["input_ids"]]
    assert sizes[-1] == max(lengths)
    a, b = (load_file(result.runs[0].folder / "reader" / "model.safetensors") for result in (before, after))
    assert all(torch.equal(a[name], b[name]) for name in a), "dropout draws the same numbers"
    first, second = ((result.runs[0].folder / "history.json").read_text() for result in (before, after))
    assert first == second, "losses too, the soft one of the first epoch included"
    if method == "kr2":
        assert before.read == after.read


def test_a_step_that_does_not_fit_says_what_to_change(world: World, tried: list[int]) -> None:
    with (
        scarce_memory(10, encoder=XLMRobertaEncoder),
        pytest.raises(DeviceMemoryError, match="--batch-size 4 does not fit") as refused,
    ):
        world.train(training={"gradient_accumulation_steps": 2})
    assert "--batch-size 2" in refused.value.remedy
    assert "gradient_accumulation_steps = 4" in refused.value.remedy
    assert len(tried) == 1, "before the first step"
    with scarce_memory(10, encoder=XLMRobertaEncoder), pytest.raises(DeviceMemoryError) as refused:
        world.train(batch_size=1)
    assert "--max-length" in refused.value.remedy
    assert "--batch-size 0" not in refused.value.remedy
    assert "--device cpu" not in refused.value.remedy, "it is the CPU's memory that is too small"


def test_an_evaluation_that_does_not_fit_goes_on_in_halves(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PART_OVERHEAD", {})  # one pass a batch, as on a GPU
    whole = world.train(run_dir=world.folder / "whole", epochs=1.0).runs[0]
    steps = 12 // 4
    with scarce_memory(80, after=steps, encoder=XLMRobertaEncoder) as fitted:
        halved = world.train(run_dir=world.folder / "halved", epochs=1.0).runs[0]
    assert max(fitted[steps:]) <= 80
    for split in ("dev", "test"):
        assert predictions(whole.folder, split) == predictions(halved.folder, split)


def test_an_example_that_does_not_fit_alone_is_named(world: World) -> None:
    with (
        scarce_memory(5, after=12, encoder=XLMRobertaEncoder),
        pytest.raises(DeviceMemoryError, match=r"Example '(dev|test)-s"),
    ):
        world.train(epochs=1.0, batch_size=1)


def test_a_reader_that_does_not_fit_by_itself_says_what_to_change(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(trainer_module.ReaderTrainer, "__init__", too_large)
    with pytest.raises(DeviceMemoryError, match="--batch-size 4 does not fit"):
        world.train(method="kreader")
