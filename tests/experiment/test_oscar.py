"""An OSCAR checkpoint as resource and as reader: the text encoder of a vision-language model, initialised from BERT."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from kr2cache import FeatureCache, cli
from kr2cache.errors import ModelUnavailableError, UnsupportedModelError
from kr2cache.models.load import load_config
from kr2cache.models.registry import find_model
from kr2cache.models.stack import describe_dropped, load_encoder, open_encoder
from kr2cache.training.checkpoint import TaskCheckpoint

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s", "ran", "a", "cat", "slept", "."]
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGE_PARTS = {
    "bert.img_embedding.weight": (16, 2054),
    "bert.img_embedding.bias": (16,),
    "bert.LayerNorm.weight": (16,),
    "bert.LayerNorm.bias": (16,),
    "cls.predictions.bias": (13,),
    "cls.seq_relationship.weight": (2, 16),
}


def text_encoder() -> BertModel:
    torch.manual_seed(3)
    model: BertModel = BertModel(BertConfig(**SHAPE, initializer_range=0.3)).eval()
    for name, tensor in model.named_parameters():
        if "LayerNorm" in name:  # a missing weight would be ones or zeros
            tensor.data.normal_(1.0, 0.2)
    return model


def save_oscar(folder: Path, *, gamma: bool = False, without: str = "no such weight") -> Path:
    """A checkpoint with vocab.txt, pytorch_model.bin, weights for images, and a config.json without model_type."""
    weights = {f"bert.{name}": tensor for name, tensor in text_encoder().state_dict().items()}
    weights |= {name: torch.randn(shape) for name, shape in IMAGE_PARTS.items()}
    weights = {name: tensor for name, tensor in weights.items() if without not in name}
    if gamma:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in names.items():
            weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    folder.mkdir(parents=True)
    torch.save(weights, folder / "pytorch_model.bin")
    fields = {**SHAPE, "img_feature_dim": 2054, "img_feature_type": "faster_r-cnn", "finetuning_task": "gqa"}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder


@pytest.fixture(params=[False, True], ids=["weight and bias", "gamma and beta"])
def oscar(request: pytest.FixtureRequest, workdir: Path) -> Path:
    return save_oscar(workdir / "oscar-base", gamma=request.param)


def test_the_text_encoder_is_whole_by_name_and_by_folder(oscar: Path) -> None:
    expected = text_encoder().state_dict()
    for spec in (find_model("oscar", {"oscar": {"path": str(oscar)}}), find_model(str(oscar), {})):
        assert load_config(spec).model_type == "bert"
        loaded = load_encoder(spec).state_dict()
        assert {name for name in expected if not name.startswith("pooler.")} <= set(loaded)
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected[name]), name
        task_model = TaskCheckpoint(spec, "choice", ("0", "1")).task_model()
        for name, tensor in expected.items():
            assert torch.equal(task_model.base_model.state_dict()[name], tensor), name


def test_what_was_dropped_is_listed(oscar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = find_model(str(oscar), {})
    dropped = open_encoder(spec).dropped
    assert {name for name in dropped if "pooler" not in name} == set(IMAGE_PARTS)
    (oscar.parent / "snli").mkdir()
    rows = [{"gold_label": "neutral", "sentence1": "the dogs ran .", "sentence2": "a cat slept ."}]
    (oscar.parent / "snli" / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    arguments = ["extract", "--resource", str(oscar), "--task", "snli", "--data", "snli", "--json"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr()
    for part in ("bert.img_embedding (2)", "bert.LayerNorm (2)", "cls.predictions", "cls.seq_relationship"):
        assert part in shown.err
    cache = FeatureCache.open(json.loads(shown.out)["cache"])
    assert set(cache.provenance["recorded"]["model"]["dropped"]) == set(dropped)


def test_the_usual_heads_of_pre_training_are_not_worth_a_line() -> None:
    spec = find_model("bert", {})
    assert describe_dropped(spec, ["cls.predictions.bias", "bert.pooler.dense.weight", "lm_head.bias"]) is None
    assert describe_dropped(spec, []) is None
    said = describe_dropped(spec, ["cls.predictions.bias", "bert.code_embeddings.weight"])
    assert said is not None
    assert "bert.code_embeddings" in said


def test_its_states_are_those_of_the_text_encoder_alone(oscar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Segment ids too, although vocab.txt is the only tokenizer file."""
    (oscar.parent / "piqa").mkdir()
    goals = [("the dog ran .", "a cat slept .", "the dogs ."), ("a cat .", "the dog slept .", "ran .")]
    rows = [{"goal": goal, "sol1": one, "sol2": two} for goal, one, two in goals]
    (oscar.parent / "piqa" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (oscar.parent / "piqa" / "train-labels.lst").write_text("0\n1\n")
    arguments = ["extract", "--resource", str(oscar), "--task", "piqa", "--data", "piqa", "--dtype", "float32"]
    assert cli.run([*arguments, "--json"]) == 0
    cache = FeatureCache.open(json.loads(capsys.readouterr().out)["cache"])
    tokenizer, model = BertTokenizer(str(oscar / "vocab.txt")), text_encoder()
    for number, (goal, *solutions) in enumerate(goals):
        for choice, solution in enumerate(solutions):
            batch = tokenizer(goal, solution, return_tensors="pt")
            assert batch["token_type_ids"].any()
            with torch.no_grad():
                expected = torch.stack(model(**batch, output_hidden_states=True).hidden_states)[:, 0]
            np.testing.assert_allclose(cache[f"train-{number}#{choice}"], expected, atol=2e-5)


@pytest.mark.parametrize("method", ["kr2", "kresource", "kreader2"])
def test_it_trains(method: str, workdir: Path) -> None:
    oscar = save_oscar(workdir / "oscar-base", gamma=True)
    (workdir / "snli").mkdir()
    for split in ("train", "test"):
        rows = [
            {"gold_label": ("neutral", "entailment")[n % 2], "sentence1": "the dogs ran .", "sentence2": VOCABULARY[n]}
            for n in range(5, 11)
        ]
        (workdir / "snli" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = str(save_oscar(workdir / "other")) if method == "kr2" else str(oscar)
    arguments = ["train", "--task", "snli", "--data", "snli", "--resource", str(oscar), "--reader", reader]
    arguments += ["--method", method, "--fusion", "all", "--epochs", "1", "--seeds", "1", "--device", "cpu"]
    assert cli.run(arguments) == 0
    assert len(list(workdir.glob("runs/snli/*/seed-1/predictions-test.jsonl"))) == 1


@pytest.mark.parametrize("without", ["layer.1.output.dense.weight", "attention.self.query.bias", "word_embeddings"])
def test_a_checkpoint_that_lacks_encoder_weights_is_refused(workdir: Path, without: str) -> None:
    folder = save_oscar(workdir / "oscar", gamma=True, without=without)
    with pytest.raises(UnsupportedModelError, match=r"lacks \d weights of its encoder") as caught:
        load_encoder(find_model(str(folder), {}))
    assert without in caught.value.message


class Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_code_in_pickled_weights_does_not_run(workdir: Path) -> None:
    folder, mark = save_oscar(workdir / "oscar"), workdir / "it-ran"
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "bert.more": Code(mark)}, folder / "pytorch_model.bin")
    spec = find_model(str(folder), {})
    for load in (load_encoder, lambda one: TaskCheckpoint(one, "sequence", ("a", "b")).task_model()):
        with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
            load(spec)
        assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists(), "the same code would have run"
