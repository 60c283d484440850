"""Trainings that share what they read, tokenise and load have the same results as separate trainings."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from world import World

from kr2cache.experiment import shared
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.shared import MAX_CHECKPOINTS, Shared
from kr2cache.models import encode, load, tokenizers
from kr2cache.models.registry import ModelSpec
from kr2cache.tasks import find_task
from kr2cache.tasks.base import Task
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.kreader import HEADS

SPLITS = {"train": 12, "dev": 5, "test": 6}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    tiny.save_model(world.resource, "bert", layers=3, width=16)
    tiny.save_model(tmp_path / "models" / "reader", "bert", seed=5, width=16)
    tiny.save_corpus(world.data, **SPLITS)
    return world


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a split is read or tokenised, and how often a model is read from its files."""
    counts: Counter[str] = Counter()

    def count(holder: Any, name: str, what: Any) -> None:
        real = getattr(holder, name)

        def counting(*arguments: Any, **named: Any) -> Any:
            counts[what(*arguments, **named)] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(holder, name, counting)

    count(Task, "read", lambda task, split, *_: f"read {split}")
    for holder in (shared, encode):
        count(holder, "encode_examples", lambda *_, **__: "tokenised")
    for loading in (load, tokenizers):
        count(loading, "model_folder", lambda *_: "looked up")
    count(shared, "resource_config", lambda spec: f"configured {spec.name}")
    count(TaskCheckpoint, "_read", lambda one, *_: f"loaded {one.spec.name}")
    return counts


def test_trainings_of_a_sweep_read_tokenise_and_load_once(world: World, counted: Counter[str]) -> None:
    common = Shared()
    world.train(epochs=1.0)  # extracts, which tokenises for itself
    counted.clear()
    train(world.config(epochs=1.0, fusion="last2"), common)
    once = {counted["loaded reader"], counted["configured res"]}
    assert {counted[f"read {split}"] for split in SPLITS} == once == {1}
    # Three splits, by the reader and by the resource; a sample by the reader's tokenizer before and after it is saved.
    assert counted["tokenised"] == 6 + 2
    counted.clear()
    for fusion in ("fuse", "all", "layer0"):
        train(world.config(epochs=1.0, fusion=fusion, seeds=(1, 2)), common)
    assert not [name for name in counted if name.startswith(("read", "tokenised", "loaded", "configured"))]


def test_a_training_by_itself_loads_its_reader_once_for_all_seeds(world: World, counted: Counter[str]) -> None:
    world.train(epochs=1.0, seeds=(1, 2, 3))
    assert counted["loaded reader"] == 1
    assert {counted[f"read {split}"] for split in SPLITS} == {1}


def test_shared_trainings_give_the_results_of_separate_trainings(world: World) -> None:
    common = Shared()
    configs = [
        world.config(epochs=1.0, fusion="fuse", seeds=(1, 2)),
        world.config(epochs=1.0, method="kreader", seeds=(2,)),
        world.config(epochs=1.0, method="kreader2", fusion="last2"),
        world.config(epochs=1.0, limit=4),
        world.config(epochs=1.0, method="kresource"),
    ]
    for config in configs:
        together = train(dataclasses.replace(config, run_dir=world.folder / "together"), common)
        apart = train(dataclasses.replace(config, run_dir=world.folder / "apart"))
        for one, other in zip(together.runs, apart.runs, strict=True):
            assert one.folder.relative_to(world.folder / "together") == other.folder.relative_to(world.folder / "apart")
            for name in ("metrics.json", "predictions-dev.jsonl", "predictions-test.jsonl", "history.json"):
                assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_another_limit_gives_another_corpus(world: World) -> None:
    common, task = Shared(), find_task("udpos")
    whole = common.corpus(task, world.config())
    assert common.corpus(task, world.config()) is whole

    def sizes(**limits: int) -> list[int]:
        return [len(split.examples) for split in common.corpus(task, world.config(**limits)).splits.values()]

    train, dev, test = sizes()
    assert sizes(limit=3) == [3, 3, 3]
    assert sizes(train_limit=3) == [3, dev, test]
    assert sizes(train_limit=5, limit=2) == [2, 2, 2]
    assert sizes(train_limit=100) == sizes() == [12, dev, test] == [train, dev, test]


@pytest.mark.parametrize("head", ["token", "sequence", "choice"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_a_reader_from_memory_is_the_one_from_the_files(tmp_path: Path, model_type: str, head: Any) -> None:
    """Randomly drawn weights equal those of from_pretrained too, even if earlier readers were changed."""
    spec = ModelSpec(name="m", path=tiny.save_model(tmp_path / "m", model_type))
    common = TaskCheckpoint(spec, head, ("a", "b", "c"))

    def weights(checkpoint: TaskCheckpoint, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = checkpoint.task_model()
        found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        assert all(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)  # training changes a reader; this must not change the checkpoint
        return found | {"next": torch.rand(3)}

    def drawn_by_transformers(seed: int) -> dict[str, Tensor]:
        labels = {} if head == "choice" else {"num_labels": 3}
        torch.manual_seed(seed)
        model = HEADS[head].from_pretrained(spec.path, dtype=torch.float32, **labels)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} | {"next": torch.rand(3)}

    for seed in (1, 2, 1):
        mine, own = weights(common, seed), drawn_by_transformers(seed)
        assert mine.keys() == own.keys()
        assert all(torch.equal(mine[name], own[name]) for name in mine)
    assert common.earlier_head == ()


def test_the_note_on_an_earlier_head_outlives_the_checkpoint(tmp_path: Path) -> None:
    """A checkpoint that leaves the memory is not tried again, so its weights may never be read again."""
    common, task = Shared(), find_task("udpos")
    HEADS["token"].from_config(tiny.config("bert")).save_pretrained(tmp_path / "tuned")
    tiny.save_model(tmp_path / "model")
    tuned = ModelSpec(name="tuned", path=tmp_path / "tuned")
    notes = []
    for _ in range(2):
        checkpoint = common.checkpoint(tuned, task)
        common.check_reader(checkpoint, None, positions=9)
        notes.append(checkpoint.head_note)
        for i in range(MAX_CHECKPOINTS):
            common.checkpoint(ModelSpec(name=f"m{i}", path=tmp_path / "model"), task)
    assert checkpoint is not common.checkpoint(tuned, task)
    assert notes[0] is not None
    assert notes == [notes[0]] * 2


def test_few_checkpoints_stay_in_memory(tmp_path: Path) -> None:
    common, task = Shared(), find_task("udpos")
    folder = tiny.save_model(tmp_path / "model")
    specs = [ModelSpec(name=f"m{i}", path=folder) for i in range(MAX_CHECKPOINTS + 1)]
    first = common.checkpoint(specs[0], task)
    for spec in specs[1:-1]:
        common.checkpoint(spec, task)
    assert common.checkpoint(specs[0], task) is first, "it was used again, so it is kept"
    common.checkpoint(specs[-1], task)
    assert common.checkpoint(specs[0], task) is first
    assert len(common._checkpoints) == MAX_CHECKPOINTS
