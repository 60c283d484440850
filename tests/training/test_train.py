"""The Trainer's arguments, and what one training does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer
from world import SPLITS, World, predictions

from kr2cache.errors import (
    TrainingError,
)
from kr2cache.experiment.pipeline import describe_training
from kr2cache.tasks.udpos import UdPos
from kr2cache.training import arguments as arguments_module
from kr2cache.training import batches
from kr2cache.training import trainer as trainer_module
from kr2cache.training.arguments import training_arguments


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_neither_loss_nor_copy_of_a_batch_is_waited_for(
    world: World, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments_module, "choose_device", lambda _: torch.device(device))
    arguments = training_arguments(world.config(), tmp_path, 1)
    assert arguments.accelerator_config.non_blocking is (device == "cuda")
    assert arguments.dataloader_pin_memory is (device == "cuda")
    assert not arguments.logging_nan_inf_filter
    assert "fused" in arguments.optim


def test_states_on_the_gpu_are_gathered_by_the_training_process(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments_module, "choose_device", lambda _: torch.device("cuda"))
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    arguments = training_arguments(world.config(training=workers), tmp_path, 1, states_on_gpu=True)
    assert not arguments.accelerator_config.non_blocking
    assert not arguments.dataloader_pin_memory
    assert arguments.dataloader_num_workers == 0
    assert not arguments.dataloader_persistent_workers
    assert arguments.dataloader_prefetch_factor is None
    assert training_arguments(world.config(training=workers), tmp_path, 1).dataloader_num_workers == 2


def test_the_training_section_has_the_last_word(world: World, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"logging_nan_inf_filter": True, "accelerator_config": {"non_blocking": True}}
    arguments = training_arguments(world.config(training=chosen), tmp_path, 1)
    assert arguments.logging_nan_inf_filter
    assert arguments.accelerator_config.non_blocking


def test_a_long_training_gives_freed_memory_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(trainer_module, "return_free_memory", asked.append)
    (run,) = world.train(method="kreader", batch_size=4).runs
    examples = json.loads((run.folder / "config.json").read_text("utf-8"))["recorded"]["examples"]["train"]
    steps = 2 * math.ceil(examples / 4)
    assert asked == [trainer_module.RETURN_MEMORY_EVERY_S] * steps, "after each step, and it looks at its watch"


def test_the_same_seed_gives_the_same_run_wherever_it_is_put(world: World) -> None:
    one = world.train(fusion="fuse", run_dir=world.folder / "one")
    two = world.train(fusion="fuse", run_dir=world.folder / "two")
    assert one.runs[0].folder != two.runs[0].folder
    assert one.runs[0].folder.parent.name == two.runs[0].folder.parent.name
    for name in ("metrics.json", "predictions-dev.jsonl", "predictions-test.jsonl", "fusion.json", "history.json"):
        assert (one.runs[0].folder / name).read_bytes() == (two.runs[0].folder / name).read_bytes(), name
    a, b = (load_file(run.runs[0].folder / "reader" / "model.safetensors") for run in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["kr2", "kreader"])
def test_batches_in_parts_train_as_whole_ones_do(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Without dropout, whose draws go by position. The rounding of sums in another order is all that may differ."""
    reader = {"r": {"path": str(world.folder / "models" / "reader"), "dropout": 0.0}}
    settings: dict[str, Any] = {"reader": "r", "models": reader, "fusion": "fuse", "method": method, "batch_size": 6}
    parts: list[int] = []
    step = trainer_module.ReaderTrainer.training_step

    def counting(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        parts.append(len(inputs["parts"]))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(trainer_module.ReaderTrainer, "training_step", counting)
    monkeypatch.setattr(batches, "PART_OVERHEAD", {"cpu": 2})
    cut = world.train(run_dir=world.folder / "cut", **settings).runs[0]
    assert max(parts) > 2
    parts.clear()
    monkeypatch.setattr(batches, "PART_OVERHEAD", {})
    whole = world.train(run_dir=world.folder / "whole", **settings).runs[0]
    assert set(parts) == {1}
    a, b = (load_file(run.folder / "reader" / "model.safetensors") for run in (cut, whole))
    # Adam divides by the root of the squared gradient, so that rounding of a gradient near zero counts in full.
    assert all(float((a[name] - b[name]).abs().mean()) < 1e-5 for name in a)
    one, other = (json.loads((run.folder / "history.json").read_text())["epochs"][0]["loss"] for run in (cut, whole))
    assert one == pytest.approx(other, abs=1e-4)


def test_the_fusions_own_learning_rate_moves_its_weights(world: World) -> None:
    def weights(**changes: Any) -> list[float]:
        run = world.train(fusion="fuse", learning_rate=1e-5, epochs=3.0, **changes).runs[0]
        fusion = json.loads((run.folder / "fusion.json").read_text())
        assert fusion["trainable"] is True
        assert fusion["layers"] == [0, 1, 2, 3, 4]
        found: list[float] = fusion["weights"]
        return found

    still, moved = weights(), weights(fusion_learning_rate=0.1)
    assert still == pytest.approx([0.2] * 5, abs=1e-3)
    assert still != [0.2] * 5, "trainable weights move a little by themselves"
    assert max(abs(w - 0.2) for w in moved) > 0.02


@pytest.mark.parametrize("name", ["softmax", "mix"])
def test_softmax_and_mix_are_stored_and_shown_as_they_act(
    world: World, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def learned(rate: float | None) -> tuple[dict[str, Any], list[float], float]:
        result = world.train(fusion=name, learning_rate=1e-5, epochs=3.0, fusion_learning_rate=rate)
        describe_training(result)
        folder = result.runs[0].folder
        assert folder.parent.name.startswith(f"kr2-reader-res-{name}-")
        saved = load_file(folder / "reader" / "kr2.safetensors")
        powers = np.exp(saved["fusion_scores"].double().numpy())
        gamma = float(saved["fusion_gamma"]) if name == "mix" else 1.0
        return json.loads((folder / "fusion.json").read_text()), (powers / powers.sum()).tolist(), gamma

    about, weights, gamma = learned(0.1)
    assert about["fusion"] == name
    assert about["layers"] == [0, 1, 2, 3, 4]
    assert about["trainable"] is True
    assert about["weights"] == pytest.approx(weights, abs=1e-6)
    assert about.get("gamma") == (pytest.approx(gamma, abs=1e-6) if name == "mix" else None)
    assert max(abs(w - 0.2) for w in weights) > 0.01
    assert (abs(gamma - 1) > 0.01) == (name == "mix")
    shown = " ".join(capsys.readouterr().out.split())
    assert "0: {:.4f} 1: {:.4f} 2: {:.4f}".format(*weights) in shown
    assert (f"gamma: {gamma:.4f}" in shown) == (name == "mix")
    _, still, unmoved = learned(None)  # the option has both in its hands
    assert still == pytest.approx([0.2] * 5, abs=1e-3)
    assert unmoved == pytest.approx(1.0, abs=1e-3)


def test_the_direct_projection_takes_all_layers(world: World) -> None:
    result = world.train(fusion="all", projection="direct")
    extras = load_file(result.runs[0].folder / "reader" / "kr2.safetensors")
    assert extras["projection.weight"].shape == (24, 5 * 16)
    assert len(predictions(result.runs[0].folder, "test")) == SPLITS["test"]


@pytest.mark.parametrize("method", ["kreader", "kresource", "kreader2"])
def test_the_other_methods(world: World, method: str) -> None:
    result = world.train(method=method, fusion="all")
    run = result.runs[0].folder
    names = {"kreader": "kreader-reader", "kresource": "kresource-res", "kreader2": "kreader2-reader-all"}
    assert run.parent.name.rpartition("-")[0] == names[method]
    about = json.loads((run / "reader" / "config.json").read_text())
    assert about["model_type"] == ("bert" if method == "kresource" else "xlm-roberta")
    assert (run / "fusion.json").exists() == (method == "kreader2")
    assert world.caches.exists() == (method == "kreader2")
    assert set(result.runs[0].metrics) == {"dev", "test"}


def test_a_plain_reader_loads_and_predicts_as_a_hugging_face_model(world: World) -> None:
    run = world.train(method="kreader").runs[0].folder
    model = AutoModelForTokenClassification.from_pretrained(run / "reader").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "reader")
    for row, example in zip(predictions(run, "test"), UdPos(None).read("test", str(world.data)), strict=True):
        encoded = tokenizer(list(example.texts[0]), is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            labels = model(**encoded).logits[0].argmax(dim=-1).tolist()
        words = encoded.word_ids(0)
        tags = [model.config.id2label[labels[words.index(i)]] for i in range(len(row["gold"]))]
        assert tags == row["predicted"]


def test_a_training_that_diverges_is_no_run(world: World) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        world.train(method="kreader", learning_rate=1e38)
    assert not list((world.folder / "runs").rglob("seed-*"))
