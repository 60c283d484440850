"""Distillation: the loss against NumPy, words aligned across tokenizers, and the whole path on tiny models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from transformers import AutoModelForTokenClassification, AutoTokenizer
from world import World

from kr2cache.config import TrainConfig
from kr2cache.errors import CacheError, ConfigError, UnknownNameError
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.teacher import Teacher
from kr2cache.models.registry import find_model
from kr2cache.training.batches import Batcher
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.distill import TeacherLogits, soft_loss
from kr2cache.training.evaluate import example_logits
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder


def by_scipy(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """Mean cross entropy between the softened distributions, times t^2."""
    rows = [
        -(softmax(t / temperature) * log_softmax(s / temperature)).sum()
        for s, t in zip(student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), strict=True)
        if not np.isnan(t).any()
    ]
    return float(np.mean(rows)) * temperature**2 if rows else 0.0


# The loss ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 2.0, 7.0]))
def test_the_soft_loss_is_the_cross_entropy_that_scipy_computes(seed: int, temperature: float) -> None:
    draw = np.random.default_rng(seed)
    student, teacher = draw.normal(size=(2, 3, 5, 4)) * 3
    teacher[draw.random((3, 5)) < 0.4] = np.nan
    found = soft_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert float(found) == pytest.approx(by_scipy(student, teacher, temperature), rel=1e-5, abs=1e-7)


def test_a_student_that_agrees_has_the_teachers_entropy_for_its_loss() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 5))
    p = softmax(logits, axis=1)
    entropy = -(p * np.log(p)).sum(axis=1).mean()
    same = torch.from_numpy(logits)
    assert float(soft_loss(same, same, 1.0)) == pytest.approx(entropy, rel=1e-6)
    assert float(soft_loss(same * 0.5, same, 1.0)) > entropy


def test_positions_without_a_teacher_get_no_gradient() -> None:
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4)
    teacher[0, 1] = torch.nan
    soft_loss(student, teacher, 1.0).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[0, 1] == 0).all()
    assert (student.grad[1] != 0).any()


def test_no_teacher_at_all_is_no_loss() -> None:
    loss = soft_loss(torch.randn(2, 4, requires_grad=True), torch.full((2, 4), torch.nan), 1.0)
    loss.backward()
    assert loss.item() == 0.0


# Keeping the logits --------------------------------------------------------------------------------------------------


def test_logits_are_kept_as_they_were(tmp_path: Path) -> None:
    logits = [np.random.default_rng(n).normal(size=(n + 1, 3)).astype(np.float32) for n in range(4)]
    logits[2][1] = np.nan
    kept = TeacherLogits(ids=("a", "ü", "字", "#"), logits=logits)
    kept.save(tmp_path / "deep" / "logits.npz", "finger")
    back = TeacherLogits.load(tmp_path / "deep" / "logits.npz", "finger")
    assert back.ids == kept.ids
    for one, other in zip(back.logits, logits, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["logits.npz"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other"])
def test_damaged_logits_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "logits.npz"
    TeacherLogits(ids=("a",), logits=[np.ones((1, 3), dtype=np.float32)]).save(path, "finger")
    content = path.read_bytes()
    if damage != "other":
        path.write_bytes({"truncated": content[:-40], "garbage": b"no" * 50, "empty": b""}[damage])
    with pytest.raises(CacheError, match=r"logits\.npz"):
        TeacherLogits.load(path, "another" if damage == "other" else "finger")


# Teacher and student -------------------------------------------------------------------------------------------------


@pytest.fixture
def taught(world: World, tmp_path: Path) -> World:
    """A world with a second tokenizer: the teacher (the world's resource) splits words into single letters."""
    backend = tiny.tokenizer()
    letters = json.loads(backend.backend_tokenizer.to_str())
    keep = {
        piece: number
        for piece, number in letters["model"]["vocab"].items()
        if len(piece.removeprefix("##")) == 1 or piece in tiny.SPECIAL
    }
    letters["model"]["vocab"] = {piece: number for number, piece in enumerate(sorted(keep, key=keep.get))}  # type: ignore[arg-type]
    (world.resource / "tokenizer.json").write_text(json.dumps(letters), "utf-8")
    return world


def kd(world: World, **changes: Any) -> TrainConfig:
    return world.config(**({"method": "kd", "teacher": str(world.resource), "resource": None} | changes))


def run_json(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "reader" / "model.safetensors")


def test_the_teachers_logits_are_those_of_its_run(taught: World) -> None:
    """Against transformers' own model on each sentence alone, and at the words' first tokens."""
    train(kd(taught))
    (logits_file,) = taught.caches.rglob("logits.npz")
    assert logits_file.parts[-4:-2] == ("udpos", "train")
    assert logits_file.parent.name.startswith("teacher-res-")
    content = np.load(logits_file)
    (folder,) = (taught.folder / "runs" / "udpos").glob("kresource-res-*/seed-1")
    model = AutoModelForTokenClassification.from_pretrained(folder / "reader").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "reader")
    first = content["first"]
    job = prepare(taught.config(method="kreader"), Shared()).job
    for i, example in enumerate(job.splits["train"].examples):
        batch = tokenizer([list(example.texts[0])], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0].numpy()
        starts = [batch.word_ids(0).index(word) for word in range(len(example.texts[0]))]
        np.testing.assert_allclose(content["logits"][first[i] : first[i + 1]], logits[starts], atol=1e-5)
    assert [name.decode() for name in content["id"]] == [e.id for e in job.splits["train"].examples]


def test_words_are_aligned_across_tokenizers_and_cut_off_ones_left_out(taught: World) -> None:
    """Letters fill the teacher's 16 positions sooner than the student's word pieces do."""
    shared = Shared()
    student = prepare(kd(taught, max_length=16), shared)
    teacher = Teacher(student, shared)
    assert teacher.prepared is not None
    reader = KReader(teacher.prepared.job.checkpoint.task_model(), "token")
    lesson = teacher.from_trained(reader)
    job = lesson.given_to(student).job
    data = job.splits["train"]
    batch = Batcher(data, job.task, job.tokenizer)(list(range(len(data.examples))))
    taught_words = cut_off = 0
    for row, example in enumerate(data.examples):
        words = example.texts[0]
        by_student = job.tokenizer([list(words)], is_split_into_words=True, truncation=True, max_length=16).word_ids(0)
        tokens = teacher.prepared.job.tokenizer([list(words)], is_split_into_words=True, truncation=True, max_length=16)
        by_teacher = tokens.word_ids(0)
        for word in range(len(words)):
            if word in by_student and word in by_teacher:
                taught_words += 1
                found = batch["teacher_logits"][row, by_student.index(word)].numpy()
                np.testing.assert_array_equal(found, lesson.logits.logits[row][word])
                assert np.isfinite(found).all()
            else:
                cut_off += 1
        others = [position for position, word in enumerate(by_student) if word is None]
        assert torch.isnan(batch["teacher_logits"][row, others]).all()
    assert cut_off > 5
    assert lesson.recorded["words_taught"] == taught_words == int(torch.isfinite(batch["teacher_logits"][..., 0]).sum())
    assert lesson.recorded["words_left_out"] == cut_off
    assert f"{cut_off} words of the training split are not taught" in lesson.notes[0]


def test_weight_0_is_plain_fine_tuning_exactly(taught: World) -> None:
    plain = taught.train(method="kreader")
    distilled = train(kd(taught, soft_weight=0.0))
    other = train(kd(taught, soft_weight=0.5))
    assert distilled.runs[0].metrics == plain.runs[0].metrics
    a, b, c = (weights(result.runs[0].folder) for result in (plain, distilled, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    predictions = [(result.runs[0].folder / "predictions-test.jsonl").read_text() for result in (plain, distilled)]
    assert predictions[0] == predictions[1]


def test_temperature_and_weight_name_the_run(taught: World) -> None:
    folders = {
        train(kd(taught, epochs=1.0, **changes)).runs[0].folder
        for changes in ({}, {"temperature": 2.0}, {"soft_weight": 1.0})
    }
    assert len(folders) == 3
    assert all("kd-reader-res-" in str(folder) for folder in folders)


def test_the_loss_is_hard_plus_half_soft(taught: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's loss by NumPy, from the student's own logits before it learned anything."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, states: states)
    result = train(kd(taught, batch_size=12, epochs=1.0))
    logged = json.loads((result.runs[0].folder / "history.json").read_text())["epochs"][0]
    shared = Shared()
    student = prepare(kd(taught, batch_size=12, epochs=1.0), shared)
    lesson = Teacher(student, shared).kept()
    assert lesson is not None
    torch.manual_seed(1)
    spec = find_model(str(taught.folder / "models" / "reader"), {})
    reader = KReader(TaskCheckpoint(spec, "token", student.job.task.labels).task_model(), "token")
    own = example_logits(reader, student.job.splits["train"], student.job.task, student.job.tokenizer)
    hard, soft = [], []
    for example, mine, its in zip(student.job.splits["train"].examples, own, lesson.logits.logits, strict=True):
        assert isinstance(example.label, tuple)
        hard += [-log_softmax(row)[label] for row, label in zip(mine, example.label, strict=True)]
        soft += [-(softmax(t) * log_softmax(s)).sum() for s, t in zip(mine, its, strict=True)]
    assert logged["soft_loss"] == pytest.approx(np.mean(soft), abs=2e-4)
    assert logged["loss"] == pytest.approx(np.mean(hard) + 0.5 * np.mean(soft), abs=2e-4)


def test_a_student_that_is_its_own_teacher_starts_at_the_entropy(taught: World) -> None:
    plain = taught.train(method="kreader", epochs=3.0)
    folder = plain.runs[0].folder
    shared = Shared()
    student = prepare(kd(taught, teacher=str(folder)), shared)
    lesson = Teacher(student, shared).from_reader()
    assert lesson is not None
    job = lesson.given_to(student).job
    reader = KReader.load(folder / "reader")
    batch = Batcher(job.splits["train"], job.task, job.tokenizer)(list(range(12)))
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "teacher_logits")}
    with torch.no_grad():
        start = float(soft_loss(reader(**inputs)["logits"], batch["teacher_logits"], 1.0))
    p = softmax(np.concatenate(lesson.logits.logits), axis=1)
    assert start == pytest.approx(-(p * np.log(p)).sum(axis=1).mean(), rel=1e-4)


def test_the_teacher_is_trained_and_asked_once(taught: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(kd(taught, epochs=1.0))
    (logits,) = taught.caches.rglob("logits.npz")
    before = logits.stat().st_mtime_ns
    monkeypatch.setattr(Teacher, "from_trained", lambda *_: pytest.fail("the teacher was asked again"))
    again = train(kd(taught, epochs=1.0, seeds=(1, 2)))
    train(kd(taught, epochs=1.0, soft_weight=2.0))
    assert logits.stat().st_mtime_ns == before
    assert again.runs[0].folder == first.runs[0].folder
    assert [run.seconds is None for run in again.runs] == [True, False]
    assert len(list((taught.folder / "runs" / "udpos").glob("kresource-*/seed-*"))) == 1


@pytest.mark.parametrize("method", ["kreader", "kresource"])
def test_a_finished_run_of_either_plain_method_teaches(taught: World, method: str) -> None:
    model = {"reader": str(taught.resource)} if method == "kreader" else {"resource": str(taught.resource)}
    taught.train(method=method, epochs=1.0, **model)
    train(kd(taught, epochs=1.0))
    assert len(list((taught.folder / "runs" / "udpos").glob("k*-res-*/seed-*/metrics.json"))) == 2  # it, and kd


def test_a_run_whose_reader_was_dropped_is_trained_again_to_teach(taught: World) -> None:
    kept = train(kd(taught, epochs=1.0)).runs[0].folder
    (logits,) = taught.caches.rglob("logits.npz")
    expected = np.load(logits)["logits"]
    logits.unlink()
    (folder,) = (taught.folder / "runs" / "udpos").glob("kresource-res-*/seed-1")
    RunFolder(folder).drop_reader()
    twin = folder.parent.with_name(folder.parent.name.replace("kresource", "kreader"))
    being_built = [one / "seed-1.partial" / "by another process" for one in (folder.parent, twin)]
    for one in being_built:
        one.mkdir(parents=True)
    train(kd(taught, epochs=1.0, temperature=3.0))
    np.testing.assert_allclose(np.load(logits)["logits"], expected, atol=1e-5)
    assert kept.is_dir()
    assert all(one.is_dir() for one in being_built)
    assert not list((taught.folder / "runs").glob(".teacher-*"))


def test_a_run_folder_teaches(taught: World) -> None:
    teacher = taught.train(method="kresource", epochs=1.0, seeds=(7,)).runs[0].folder
    result = train(kd(taught, teacher=str(teacher), epochs=1.0))
    config = run_json(result.runs[0].folder)
    assert config["config"]["teacher"]["name"] == "res"
    assert config["recorded"]["distillation"]["words_left_out"] == 0
    assert not list((taught.folder / "runs" / "udpos").glob("kresource-*/seed-1"))


def test_a_run_that_cannot_teach_is_refused(taught: World) -> None:
    fused = taught.train(epochs=1.0).runs[0].folder
    with pytest.raises(ConfigError, match="run of method kr2"):
        train(kd(taught, teacher=str(fused)))
    plain = taught.train(method="kreader", epochs=1.0).runs[0].folder
    content = run_json(plain)
    (plain / "config.json").write_text(json.dumps(content | {"config": content["config"] | {"task": "snli"}}))
    with pytest.raises(ConfigError, match="was trained on snli"):
        train(kd(taught, teacher=str(plain)))
    (plain / "config.json").write_text(json.dumps(content))
    RunFolder(plain).drop_reader()
    with pytest.raises(CacheError, match="holds no trained reader"):
        train(kd(taught, teacher=str(plain)))


def test_without_a_teacher_or_with_an_unknown_one_it_says_so(world: World) -> None:
    with pytest.raises(ConfigError, match="needs --teacher"):
        train(kd(world, teacher=None))
    with pytest.raises(UnknownNameError, match="gotbert"):
        train(kd(world, teacher="gotbert"))


@pytest.mark.parametrize(("setting", "value"), [("temperature", 0.0), ("soft_weight", -1.0), ("soft_weight", np.nan)])
def test_settings_that_make_no_sense(world: World, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting.replace("_", "-")):
        kd(world, **{setting: value})


@pytest.mark.parametrize("task", ["snli", "piqa"])
def test_whole_examples_are_distilled_too(world: World, task: str) -> None:
    folder = world.folder / task
    folder.mkdir()
    for split in ("train", "test"):
        rows = [
            {"gold_label": ("entailment", "neutral")[n % 2], "sentence1": f"the dog ran {n}", "sentence2": "ich 7"}
            if task == "snli"
            else {"goal": f"the dog {n}", "sol1": "ran there", "sol2": "ein haus", "label": n % 2}
            for n in range(8)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(kd(world), task=task, data=str(folder))
    result = train(config)
    recorded = run_json(result.runs[0].folder)["recorded"]["distillation"]
    assert recorded["words_taught"] == 8
    content = np.load(next(world.caches.rglob("logits.npz")))
    assert content["logits"].shape == (8, 3 if task == "snli" else 2)
    plain = dataclasses.replace(config, method="kreader", teacher=None)
    zero = train(dataclasses.replace(config, soft_weight=0.0)).runs[0].folder
    own = weights(train(plain).runs[0].folder)
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights(zero).items())
