"""Regression and multilabel: head, loss and predictions of a reader, against transformers and SciPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
import tiny
import torch
from scipy.special import expit, xlogy
from scipy.stats import pearsonr
from sklearn.metrics import log_loss
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from kr2cache.errors import CacheError, ConfigError
from kr2cache.models.registry import ModelSpec
from kr2cache.tasks.base import Kind
from kr2cache.training import evaluate
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.distill import soft_loss
from kr2cache.training.kreader import HEADS, PROBLEM_TYPES, KReader

LABELS: dict[Kind, tuple[str, ...]] = {"multilabel": ("a", "b", "c", "d"), "regression": ()}
"""Of readers of each kind."""


def reader_of(kind: Kind, folder: Path) -> KReader:
    spec = ModelSpec(name="m", path=tiny.save_model(folder / "model", initializer_range=0.4))
    torch.manual_seed(2)
    checkpoint = TaskCheckpoint(spec, "sequence", LABELS[kind], problem_type=PROBLEM_TYPES[kind])
    return KReader(checkpoint.task_model(), "sequence").eval()


def batch(kind: Kind, rows: int = 6) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, len(tiny.VOCABULARY), (rows, 7), generator=draw)
    labels = 4 * torch.rand(rows, 1, generator=draw) - 2
    if kind == "multilabel":
        labels = torch.randint(0, 2, (rows, len(LABELS[kind])), generator=draw).float()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("kind", LABELS)
def test_transformers_reads_the_saved_reader_and_computes_the_same_loss(kind: Kind, rows: int, tmp_path: Path) -> None:
    reader = reader_of(kind, tmp_path)
    reader.save(tmp_path / "reader")
    inputs, labels = batch(kind, rows)
    ours = reader(**inputs, labels=labels)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reader").eval()
    theirs = model(**inputs, labels=labels[:, 0] if kind == "regression" else labels)
    assert model.config.num_labels == ours["logits"].shape[1] == max(1, len(LABELS[kind]))
    torch.testing.assert_close(ours["logits"], theirs.logits)
    torch.testing.assert_close(ours["loss"], theirs.loss)
    gradients = [
        torch.autograd.grad(one, model_.classifier.weight)[0]
        for one, model_ in ((ours["loss"], reader.model), (theirs.loss, model))
    ]
    torch.testing.assert_close(*gradients)
    again = KReader.load(tmp_path / "reader")
    torch.testing.assert_close(again(**inputs, labels=labels)["loss"], ours["loss"])


def test_the_losses_are_those_of_the_textbooks(tmp_path: Path) -> None:
    inputs, labels = batch("regression")
    found = reader_of("regression", tmp_path)(**inputs, labels=labels)
    error = found["logits"].detach().double().numpy() - labels.double().numpy()
    assert found["loss"].item() == pytest.approx((error**2).mean(), rel=1e-5)
    inputs, labels = batch("multilabel")
    found = reader_of("multilabel", tmp_path)(**inputs, labels=labels)
    probabilities = expit(found["logits"].detach().double().numpy())
    assert found["loss"].item() == pytest.approx(log_loss(labels.numpy().ravel(), probabilities.ravel()), rel=1e-5)


def test_what_logits_say() -> None:
    moods, ratings = kinds.Moods(), kinds.Ratings()
    rows = [np.array([row], dtype=np.float32) for row in ([-1, 0, 2], [-0.1, -3, -2], [4, 5, 6])]
    assert evaluate.predictions(rows, moods) == [(1, 2), (), (0, 1, 2)]
    assert evaluate.predictions([row[:, 1:2] / 4 for row in rows], ratings) == [0.0, -0.75, 1.25]
    assert evaluate.predictions([], moods) == evaluate.predictions([], ratings) == []


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_the_correlation_of_equal_predictions_counts_as_zero() -> None:
    assert np.isnan(pearsonr([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).statistic)
    assert evaluate.scores(kinds.Ratings(), [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == {"pearson": 0.0}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_losses_of_a_teacher(temperature: float) -> None:
    draw = np.random.default_rng(0)
    student, teacher = 3 * draw.normal(size=(2, 8, 4))
    p, q = expit(teacher / temperature), expit(student / temperature)
    entropy = -(xlogy(p, q) + xlogy(1 - p, 1 - q)).mean() * temperature**2
    tensors = torch.from_numpy(student), torch.from_numpy(teacher)
    assert soft_loss(*tensors, temperature, PROBLEM_TYPES["multilabel"]).item() == pytest.approx(entropy, rel=1e-5)
    values = [one[:, :1] for one in tensors]
    squared = ((student - teacher)[:, 0] ** 2).mean()
    assert soft_loss(*values, temperature, PROBLEM_TYPES["regression"]).item() == pytest.approx(squared, rel=1e-5)


# Heads that are kept -------------------------------------------------------------------------------------------------


def checkpoint_with_head(folder: Path, labels: dict[int, str]) -> ModelSpec:
    config = tiny.config("bert", id2label=labels, label2id={name: i for i, name in labels.items()})
    HEADS["sequence"].from_config(config).save_pretrained(folder)
    return ModelSpec(name="m", path=folder)


def test_a_kept_head_of_values_needs_one_number(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"problem_type": PROBLEM_TYPES["regression"], "keep_head": True}
    spec = checkpoint_with_head(tmp_path / "one", {0: "score"})
    model = TaskCheckpoint(spec, "sequence", (), **settings).task_model()
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert torch.equal(model.classifier.weight, stored.classifier.weight)
    spec = checkpoint_with_head(tmp_path / "three", {0: "a", 1: "b", 2: "c"})
    with pytest.raises(ConfigError, match="cannot keep the head of 'm': it gives 3 numbers, a regression has one"):
        TaskCheckpoint(spec, "sequence", (), **settings)


def test_a_kept_head_of_several_labels_is_put_in_order(tmp_path: Path) -> None:
    spec = checkpoint_with_head(tmp_path, {0: "fear", 1: "anger", 2: "joy"})
    settings: dict[str, Any] = {"problem_type": PROBLEM_TYPES["multilabel"], "keep_head": True}
    model = TaskCheckpoint(spec, "sequence", kinds.MOODS, **settings).task_model()
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model.classifier.weight, stored.classifier.weight[[1, 2, 0]])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_reader_of_another_kind_does_not_fit(kind: Kind, tmp_path: Path) -> None:
    reader = reader_of("multilabel", tmp_path)
    task = kinds.Moods()
    task.labels = LABELS["multilabel"]
    reader.check_task(task, tmp_path)
    task.kind = kind
    with pytest.raises(CacheError, match=f"multi_label_classification.* does not fit task 'moods' .*{kind}"):
        reader.check_task(task, tmp_path)
