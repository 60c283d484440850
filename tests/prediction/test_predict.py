"""Prediction from a run folder: what a reader says online is what it says from the cache."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conllu as conllu_package
import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kr2cache.cli import run
from kr2cache.config import TrainConfig
from kr2cache.errors import (
    CacheError,
    CacheMismatchError,
    ConfigError,
    DataError,
    KR2CacheError,
    ModelUnavailableError,
    UnknownNameError,
)
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import Shared
from kr2cache.models.digests import weights_digest
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import load_encoder
from kr2cache.prediction.predict import Predicted, Predictor
from kr2cache.prediction.texts import as_text, conllu, read_file, read_lines, score
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.udpos import UPOS
from kr2cache.training.evaluate import example_logits
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder

LIVELY = {"initializer_range": 0.3}
"""Random weights so large that a wrong layer or mask shows in the logits, not in the sixth digit."""
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "int8": 5e-3}
"""How far logits may be off, relative to the largest, where the cache holds the states in that dtype: 2^-11 of each
state for float16, 1/254 of a row's largest for int8, and for float32 nothing but last bits."""
BFLOAT16 = 1e-2
"""The same where bfloat16 computes: last bits that batches change are 2^-8 there."""

SPLITS = {"train": 12, "dev": 5, "test": 6}


# Worlds --------------------------------------------------------------------------------------------------------------


def text(draw: random.Random, longest: int = 9) -> str:
    return " ".join(draw.choices(tiny.WORDS, k=draw.randint(1, longest)))


def snli_row(number: int, draw: random.Random) -> dict[str, Any]:
    label = ("entailment", "neutral", "contradiction")[number % 3]
    return {"pairID": f"p{number}", "gold_label": label, "sentence1": text(draw, 20), "sentence2": text(draw)}


def piqa_row(number: int, draw: random.Random) -> dict[str, Any]:
    return {"goal": text(draw), "sol1": text(draw, 20), "sol2": text(draw), "label": number % 2}


def swag_row(number: int, draw: random.Random) -> dict[str, Any]:
    endings = {f"ending{i}": text(draw) for i in range(4)}
    return {"": number + 3, "sent1": text(draw, 20), "sent2": text(draw, 2), **endings, "label": number % 4}


def hellaswag_row(number: int, draw: random.Random) -> dict[str, Any]:
    ctx, start = text(draw, 20), text(draw, 2) if number % 2 else ""
    row = {"ind": number + 5, "ctx_a": ctx, "ctx_b": start, "ctx": f"{ctx} {start}".strip(), "label": number % 4}
    return row | {"endings": [text(draw) for _ in range(4)]}


ROWS: dict[str, Callable[[int, random.Random], dict[str, Any]]] = {
    "snli": snli_row,
    "piqa": piqa_row,
    "swag": swag_row,
    "hellaswag": hellaswag_row,
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def save_data(folder: Path, task: Task) -> Path:
    if task.words:
        return tiny.save_corpus(folder, **SPLITS)
    folder.mkdir()
    for seed, (split, count) in enumerate(SPLITS.items()):
        draw = random.Random(seed)
        write_rows(folder / f"{split}{task.suffixes[0]}", [ROWS[task.name](i, draw) for i in range(count)])
    return folder


def save_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """A model whose tokenizer gives the segments of pairs, as BERT's own does."""
    tiny.save_model(folder, model_type, **LIVELY, **settings)
    path = folder / "tokenizer_config.json"
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_input_names": inputs}), "utf-8")
    return folder


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with models, a corpus and one trained run."""

    folder: Path
    config: TrainConfig

    @property
    def task(self) -> Task:
        return find_task(self.config.task)

    @property
    def run(self) -> Path:
        return next((self.folder / "runs").glob(f"*/{self.config.method}-*/seed-1"))

    @property
    def resource(self) -> Path:
        return self.folder / "models" / "res"

    @property
    def examples(self) -> list[Example]:
        return self.task.read("test", self.config.data)

    def predictor(self) -> Predictor:
        return Predictor.load(self.run, device="cpu")


def make(
    folder: Path, task: str = "udpos", resource: str = "bert", reader: str = "xlm-roberta", **changes: Any
) -> World:
    """Train one run on tiny models of these architectures; the reader is one of ``tiny.READERS``."""
    save_model(folder / "models" / "res", resource, layers=4)
    save_model(folder / "models" / "reader", **({"model_type": reader} | tiny.READERS[reader]), width=24, seed=5)
    settings: dict[str, Any] = {
        "task": task,
        "reader": str(folder / "models" / "reader"),
        "resource": str(folder / "models" / "res"),
        "data": str(save_data(folder / "corpus", find_task(task))),
        "fusion": "last4",
        "seeds": (1,),
        "epochs": 1.0,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "run_dir": folder / "runs",
        "cache_dir": folder / "cache",
        "device": "cpu",
    }
    if changes.get("method") == "kd":
        changes["teacher"] = settings["resource"]
    config = TrainConfig(**(settings | changes))
    train(config)
    return World(folder, config)


CASES: dict[str, dict[str, Any]] = {
    "last4": {},
    "last4 without rounding": {"dtype": "float32"},
    "last4 from int8": {"dtype": "int8"},
    "computed in bfloat16": {"compute_dtype": "bfloat16"},
    "trainable": {"fusion": "fuse", "fusion_learning_rate": 0.2, "dtype": "float32"},
    "softmax": {"fusion": "softmax", "fusion_learning_rate": 0.5, "dtype": "float32"},
    "scalar mix": {"fusion": "mix", "fusion_learning_rate": 0.5, "dtype": "float32"},
    "one layer": {"fusion": "layer2"},
    "embeddings": {"fusion": "layer0"},
    "side by side": {"projection": "direct", "fusion": "last2"},
    "all side by side": {"projection": "direct", "fusion": "fuse"},
    "cut off": {"max_length": 9, "resource_max_length": 13},
    "kreader2": {"method": "kreader2", "fusion": "last2"},
    "kreader": {"method": "kreader"},
    "kresource": {"method": "kresource"},
    "kd": {"method": "kd"},
    "a reader of rotary positions": {"reader": "modernbert"},
    "a reader of narrow embeddings": {"task": "snli", "reader": "albert", "dtype": "float32"},
    "a reader that scores choices": {"task": "piqa", "reader": "deberta"},
    "padding leaks (fnet)": {"resource": "fnet"},
    "padding leaks (convbert)": {"resource": "convbert"},
    "snli last4": {"task": "snli"},
    "snli cut off": {"task": "snli", "max_length": 16, "resource_max_length": 20, "dtype": "float32"},
    "snli kresource, segments": {"task": "snli", "method": "kresource"},
    "snli kd": {"task": "snli", "method": "kd"},
    "piqa trainable": {"task": "piqa", "fusion": "fuse"},
    "piqa kreader": {"task": "piqa", "method": "kreader"},
    "swag one layer": {"task": "swag", "fusion": "layer3"},
    "swag kreader2": {"task": "swag", "method": "kreader2", "fusion": "all"},
    "hellaswag side by side": {"task": "hellaswag", "projection": "direct"},
    "hellaswag last4": {"task": "hellaswag", "dtype": "float32"},
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """One run of every kind. Read only."""
    return make(tmp_path_factory.mktemp("case"), **CASES[request.param])


@pytest.fixture(scope="module")
def predictor(case: World) -> Predictor:
    """Of that run. Read only."""
    return case.predictor()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """kr2 on tags. Read only."""
    return make(tmp_path_factory.mktemp("world"), epochs=3.0)


@pytest.fixture(scope="module")
def snli(tmp_path_factory: pytest.TempPathFactory) -> World:
    """kr2 on pairs. Read only."""
    return make(tmp_path_factory.mktemp("snli"), task="snli", epochs=2.0)


@pytest.fixture(scope="module")
def piqa(tmp_path_factory: pytest.TempPathFactory) -> World:
    """kr2 on choices. Read only."""
    return make(tmp_path_factory.mktemp("piqa"), task="piqa", epochs=2.0)


@pytest.fixture
def own(world: World, tmp_path: Path) -> Iterator[World]:
    """A copy of ``world`` that a test may change; its run still names the folders of the original."""
    shutil.copytree(world.folder, tmp_path / "own")
    yield dataclasses.replace(world, folder=tmp_path / "own")


def differ(ours: list[NDArray[np.float32]], theirs: list[NDArray[np.float32]], *, absolute: bool = False) -> float:
    """The largest difference, relative to the largest value; words without logits have to be the same."""
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    a, b = np.concatenate([one.ravel() for one in ours]), np.concatenate([one.ravel() for one in theirs])
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    return float(np.nanmax(np.abs(a - b))) / (1.0 if absolute else float(np.nanmax(np.abs(b))))


def names(predictions: list[Predicted]) -> list[Any]:
    return [one.predicted for one in predictions]


def edit_config(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((run / "config.json").read_text("utf-8"))
    change(content)
    (run / "config.json").write_text(json.dumps(content), "utf-8")


# Online as from the cache --------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_cached_path(case: World, predictor: Predictor) -> None:
    job = prepare(dataclasses.replace(case.config, extract=False), Shared()).job
    cached = example_logits(KReader.load(case.run / "reader"), job.splits["test"], job.task, job.tokenizer)
    online = predictor.logits(case.examples)
    assert max(float(np.nanmax(one) - np.nanmin(one)) for one in cached) > 0.1, "all alike: this would show nothing"
    plain = job.splits["test"].features is None
    rounding = ROUNDING["float32" if plain else case.config.dtype or "float16"]
    assert differ(online, cached) <= (BFLOAT16 if case.config.compute_dtype == "bfloat16" else rounding)


def test_predictions_are_those_of_the_run(case: World, predictor: Predictor) -> None:
    lines = (case.run / "predictions-test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    predicted = predictor(case.examples)
    assert [(one.id, one.predicted) for one in predicted] == [(row["id"], row["predicted"]) for row in rows]
    assert score(case.task, case.examples, predicted) == pytest.approx(RunFolder(case.run).read_metrics()["test"])


def test_batch_mates_change_nothing(case: World, predictor: Predictor) -> None:
    together = predictor.logits(case.examples)
    alone = [predictor.logits([example])[0] for example in case.examples]
    assert differ(together, alone, absolute=True) <= (BFLOAT16 if case.config.compute_dtype == "bfloat16" else 1e-4)


def test_scores_are_probabilities(case: World, predictor: Predictor) -> None:
    for one, logits in zip(predictor(case.examples), predictor.logits(case.examples), strict=True):
        if case.task.head == "token":
            assert one.scores is None
            continue
        assert one.scores is not None
        assert list(one.scores) == list(case.task.labels)
        expected = torch.softmax(torch.from_numpy(logits[0]).double(), dim=0).tolist()
        assert list(one.scores.values()) == pytest.approx(expected)
        assert one.predicted == max(one.scores, key=one.scores.__getitem__)


def test_the_cases_are_what_they_are_called(case: World, predictor: Predictor) -> None:
    """FNet and ConvBERT do let padding in: else those cases would show nothing."""
    for resource in predictor.resources:
        assert resource.padded is (resource.encoder.config.model_type not in ("fnet", "convbert"))


def test_segments_reach_a_bert(tmp_path: Path) -> None:
    """Else the cases of pairs would show nothing."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "bert", "bert"))
    assert "token_type_ids" in tokenizer("ich", "ein")


# The same states, layer by layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["last3", "layer1", "fuse"])
@pytest.mark.parametrize("projection", ["auto", "direct"])
def test_online_features_are_those_of_the_cache(tmp_path: Path, fusion: str, projection: str) -> None:
    world = make(tmp_path / "world", fusion=fusion, projection=projection, dtype="float32")
    features = prepare(dataclasses.replace(world.config, extract=False), Shared()).job.splits["test"].features
    assert features is not None
    predictor = world.predictor()
    (resource,) = predictor.resources
    (online,) = predictor.online_features([predictor._resource_index(resource, world.examples)])
    np.testing.assert_array_equal(online.n_tokens, features.n_tokens)
    for numbers in ([4, 0, 3], [2], [1, 5]):
        (states, mask), (expected, expected_mask) = online.batch(numbers), features.batch(numbers)
        np.testing.assert_array_equal(mask, expected_mask)
        if expected.shape[1] > 1 and projection != "direct":
            weights = predictor.reader.resources[0].weights.detach().numpy()
            expected = np.einsum("l,bltd->btd", weights, expected)[:, None]
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-4)
        assert (states.numpy()[np.broadcast_to(mask[:, None, :, None] == 0, states.shape)] == 0).all()
    assert online.sequences_read == 6


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_run_is_usable_wherever_it_lies_and_without_its_cache(world: World, own: World, tmp_path: Path) -> None:
    expected = world.predictor().logits(world.examples)
    moved = Path(shutil.move(own.run, tmp_path / "elsewhere"))
    shutil.rmtree(own.folder / "cache")
    shutil.rmtree(own.folder / "corpus")
    assert differ(Predictor.load(str(moved), device="cpu").logits(world.examples), expected) == 0


def test_a_resource_that_moved_is_named_in_the_toml(world: World, own: World) -> None:
    edit_config(own.run, lambda content: content["recorded"]["model"]["resource"].update(path="/nowhere/res"))
    with pytest.raises(ModelUnavailableError, match=r"res, is not on this machine: it was in /nowhere/res") as caught:
        own.predictor()
    assert "[models.res]" in caught.value.remedy
    predictor = Predictor.load(own.run, models={"res": {"path": str(own.resource)}}, device="cpu")
    assert differ(predictor.logits(world.examples), world.predictor().logits(world.examples)) == 0


def test_a_path_in_the_toml_that_is_gone_leaves_the_recorded_one(own: World) -> None:
    Predictor.load(own.run, models={"res": {"path": "/nowhere/res"}}, device="cpu")


def test_a_resource_of_the_hub_that_is_not_here_is_asked_for_there(own: World) -> None:
    edit_config(
        own.run,
        lambda content: content["recorded"]["model"]["resource"].update(path=None, hub_id="nobody/has-this-model"),
    )
    with pytest.raises(ModelUnavailableError, match="nobody/has-this-model"):
        own.predictor()


def other_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def other_configuration(model: Path) -> None:
    content = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(content | {"num_attention_heads": 4}), "utf-8")


def test_other_weights_of_the_same_name_are_refused(world: World, own: World) -> None:
    then = weights_digest(load_encoder(ModelSpec(name="res", path=own.resource)))
    other_weights(own.resource)
    now = weights_digest(load_encoder(ModelSpec(name="res", path=own.resource)))
    with pytest.raises(CacheMismatchError, match=f"digest {then[:8]} then, {now[:8]} now") as caught:
        Predictor.load(own.run, models={"res": {"path": str(own.resource)}}, device="cpu")
    assert str(own.resource) in caught.value.message
    assert "[models.res]" in caught.value.remedy
    assert "train again with this model" in caught.value.remedy


def test_weights_that_changed_in_place_are_refused(own: World) -> None:
    edit_config(own.run, lambda content: content["recorded"]["model"]["resource"].update(path=str(own.resource)))
    own.predictor()
    other_weights(own.resource)
    with pytest.raises(CacheMismatchError, match="other weights"):
        own.predictor()


def test_another_configuration_of_the_same_weights_is_refused(own: World) -> None:
    other_configuration(own.resource)
    with pytest.raises(CacheMismatchError, match=r"another configuration \(config\.json\)"):
        Predictor.load(own.run, models={"res": {"path": str(own.resource)}}, device="cpu")


def test_a_resource_whose_states_depend_on_what_ran_before_gives_them_as_alone(own: World) -> None:
    """No text of the corpus is long enough to switch it; one that is to be labelled may be."""
    shutil.rmtree(own.resource)
    tiny.save_model(own.resource, "big_bird", layers=4, block_size=4, num_random_blocks=1, initializer_range=0.4)
    places = {"run_dir": own.folder / "runs-2", "cache_dir": own.folder / "caches-2"}
    run = train(dataclasses.replace(own.config, resource=str(own.resource), **places)).runs[0].folder
    predictor = Predictor.load(run, device="cpu")
    long, short = (" ".join(["das", "haus", "und"] * count) for count in (12, 1))
    texts = read_lines(predictor.task, [long, short, long])
    beside = predictor.logits(texts)
    alone = [Predictor.load(run, device="cpu").logits([text])[0] for text in texts]
    assert differ(beside, alone) < 1e-5
    assert differ(beside[:1], beside[2:]) == 0


def test_a_dropped_reader_is_said(own: World) -> None:
    RunFolder(own.run).drop_reader()
    with pytest.raises(CacheError, match="holds no trained reader") as caught:
        own.predictor()
    assert f"remove {own.run} and train again" in caught.value.remedy


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file"])
def test_what_is_no_run_folder_is_said(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "run"
    if there == "a folder":
        folder.mkdir()
    elif there == "a file":
        folder.write_text("")
    with pytest.raises(CacheError, match=r"holds no readable config\.json") as caught:
        Predictor.load(folder)
    assert caught.value.remedy == "Give the folder of a run."


def test_the_folder_above_the_seeds_names_them(own: World) -> None:
    shutil.copytree(own.run, own.run.with_name("seed-7"))
    with pytest.raises(CacheError, match="one per seed") as caught:
        Predictor.load(own.run.parent)
    assert "seed-1, seed-7" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["config"].pop("method"), "lacks method"),
        (lambda content: content["config"]["reader"].pop("max_length"), "its reader lacks max_length"),
        (lambda content: content["config"]["resource"].pop("weights"), "its resource lacks weights"),
        (lambda content: content["config"].pop("resource"), "they have 1 and 0 resources"),
    ],
)
def test_a_run_of_another_version_is_refused(
    own: World, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_config(own.run, change)
    with pytest.raises(CacheError, match=message) as caught:
        own.predictor()
    assert re.search("rain the run (again|anew)", caught.value.remedy)


def test_a_task_that_is_gone_is_said(own: World) -> None:
    edit_config(own.run, lambda content: content["config"].update(task="udposs"))
    with pytest.raises(UnknownNameError, match="udpos"):
        own.predictor()


def test_a_reader_of_another_task_is_refused(own: World) -> None:
    edit_config(own.run, lambda content: content["config"].update(task="snli"))
    with pytest.raises(CacheError, match="does not fit task 'snli'"):
        own.predictor()


@pytest.mark.parametrize("name", ["model.safetensors", "kr2.safetensors", "kr2.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_reader_is_explained(own: World, name: str, damage: str) -> None:
    path = own.run / "reader" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(KR2CacheError) as caught:
        own.predictor()
    assert caught.value.remedy


def test_a_device_that_is_not_there_is_said(world: World) -> None:
    with pytest.raises(ConfigError, match="is not a device"):
        Predictor.load(world.run, device="gpu")


# Examples ------------------------------------------------------------------------------------------------------------


def test_no_examples_are_no_predictions(world: World, snli: World) -> None:
    assert world.predictor()([]) == []
    assert snli.predictor()([]) == []


def test_one_word(world: World) -> None:
    (one,) = world.predictor()(read_lines(world.task, ["haus"]))
    assert one.id == "line-1"
    assert isinstance(one.predicted, list)
    assert len(one.predicted) == 1
    assert one.predicted[0] in UPOS


def test_words_beyond_the_maximal_length_have_no_label(world: World) -> None:
    assert world.config.max_length == 128
    (one,) = world.predictor()(read_lines(world.task, [" ".join(["a"] * 512)]))
    assert isinstance(one.predicted, list)
    assert len(one.predicted) == 512
    assert all(tag in UPOS for tag in one.predicted[:126]), "126 words of one token each, beside <s> and </s>"
    assert one.predicted[126:] == [None] * 386


@pytest.mark.parametrize(
    "line", ["東京 は 日本 の 首都 です 。", "Привет , мир", "مرحبا بالعالم", "नमस्ते 😀 e\u0301 \u200b"]
)
def test_any_script_has_a_label_a_word(world: World, line: str) -> None:
    (example,) = read_lines(world.task, [line])
    (one,) = world.predictor()([example])
    assert isinstance(one.predicted, list)
    assert len(one.predicted) == len(line.split())
    parsed = conllu_package.parse(conllu(world.task, [example], [one]))
    assert [token["form"] for token in parsed[0]] == line.split()


def test_results_come_in_the_order_of_the_examples(world: World) -> None:
    draw = random.Random(3)
    lines = [text(draw, longest) for longest in (1, 40, 2, 90, 1, 15, 60, 3, 1, 30)] * 3
    examples = read_lines(world.task, lines)
    predictor = world.predictor()
    predicted = predictor(examples)
    assert [one.id for one in predicted] == [f"line-{number}" for number in range(1, 31)]
    assert names(predicted) == [predictor([example])[0].predicted for example in examples]
    assert len({str(one) for one in names(predicted)}) > 5, "all alike: no order would show"


def test_gold_labels_are_not_looked_at(world: World, snli: World) -> None:
    for one in (world, snli):
        blind = [Example(example.id, example.texts, None) for example in one.examples]
        predictor = one.predictor()
        assert names(predictor(blind)) == names(predictor(one.examples))
        assert score(one.task, blind, predictor(blind)) is None
        assert score(one.task, [blind[0], *one.examples[1:]], predictor(blind)) is None
        assert score(one.task, one.examples, predictor(blind)) is not None
    assert score(world.task, [], []) is None


@pytest.mark.parametrize("texts", [(), (("das",), ("haus",)), ((),)], ids=["none", "two", "empty"])
def test_an_example_of_another_task_is_refused(world: World, texts: tuple[tuple[str, ...], ...]) -> None:
    with pytest.raises(DataError, match="'odd' has"):
        world.predictor()([Example("odd", texts, None)])


def test_a_choice_too_few_is_refused(piqa: World) -> None:
    examples = [Example("odd", (("goal", "one"),), None), Example("even", (("a", "b"), ("a", "c"), ("a", "d")), None)]
    with pytest.raises(DataError, match="piqa takes 2"):
        piqa.predictor()(examples)


def test_predictions_are_json(world: World, snli: World) -> None:
    for one in (world, snli):
        for predicted in one.predictor()(one.examples):
            assert Predicted(**json.loads(json.dumps(predicted.json(), allow_nan=False))) == predicted


# What goes in --------------------------------------------------------------------------------------------------------


def test_lines_are_numbered_as_they_stand(world: World) -> None:
    examples = read_lines(world.task, ["das haus\r\n", " \n", "\n", "ein  dog ."])
    assert examples == [
        Example("line-1", (("das", "haus"),), None),
        Example("line-4", (("ein", "dog", "."),), None),
    ]
    assert read_lines(world.task, ["a"], name="typed")[0].id == "typed-1"


@pytest.mark.parametrize("lines", [[], ["", " \n", "\t"]])
def test_no_text_is_said(world: World, lines: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        read_lines(world.task, lines)


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("snli", "ein haus\tdas haus", "ein haus"),
        ("piqa", "goal\tone\ttwo", "goal\tone\ttwo\tthree"),
        ("swag", "ctx\tshe\ta\tb\tc\td", "ctx\ta\tb\tc\td"),
        ("hellaswag", "ctx\ta\tb\tc\td", "ctx\ta\tb\tc"),
    ],
)
def test_lines_have_as_many_texts_as_the_task(task: str, good: str, bad: str) -> None:
    (example,) = read_lines(find_task(task), [good + "\r\n"])
    assert example.id == "line-1"
    assert not any("\r" in segment for text in example.texts for segment in text)
    with pytest.raises(DataError, match=rf"line-2: {len(bad.split(chr(9)))} fields, but {task} needs"):
        read_lines(find_task(task), [good, bad])
    with pytest.raises(DataError, match="line-1"):
        read_lines(find_task(task), [good.rpartition("\t")[0] + "\t "])


def test_a_file_of_the_tasks_format_keeps_ids_and_gold(world: World, snli: World) -> None:
    for one in (world, snli):
        suffix = one.task.suffixes[0]
        assert read_file(one.task, one.folder / "corpus" / f"test{suffix}") == one.examples


def test_a_blind_file_is_predicted(world: World, tmp_path: Path) -> None:
    path = tmp_path / "blind.conllu"
    path.write_text(tiny.conllu([[("das", "_"), ("haus", "_")]], prefix=None), "utf-8")
    examples = read_file(world.task, path)
    assert examples == [Example("blind-0", (("das", "haus"),), None)]
    assert len(world.predictor()(examples)) == 1
    no_majority = {"pairID": "p", "gold_label": "-", "sentence1": "ein haus", "sentence2": "das haus"}
    write_rows(tmp_path / "partly.jsonl", [no_majority, {**no_majority, "pairID": "q", "gold_label": "neutral"}])
    partly = read_file(find_task("snli"), tmp_path / "partly.jsonl")
    assert [(one.id, one.label) for one in partly] == [("p", None), ("q", 1)], "a row without gold is labelled too"
    rows = [{"sentence1": "ein haus", "sentence2": "das haus"}]
    write_rows(tmp_path / "blind.jsonl", rows)
    assert read_file(find_task("snli"), tmp_path / "blind.jsonl") == [
        Example("blind-0", (("ein haus", "das haus"),), None)
    ]


def test_conllu_under_another_name_is_not_taken_for_text(world: World, tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    path.write_text("# sent_id = s\n1\tdas\t_\t_\t_\t_\t_\t_\t_\t_\n\n")
    with pytest.raises(DataError, match=r"line-2 has ten columns.*CoNLL-U") as caught:
        read_file(world.predictor().task, path)
    assert ".conllu" in caught.value.remedy


def test_any_other_file_is_lines_of_text(world: World, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffüber das\r\n\r\nein\u2028haus\n".encode())
    assert read_file(world.task, path) == [
        Example("line-1", (("über", "das"),), None),
        Example("line-3", (("ein", "haus"),), None),
    ]


@pytest.mark.parametrize("name", ["x.conllu", "x.txt"])
def test_files_that_cannot_be_read_are_named(world: World, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match=name):
        read_file(world.task, path)
    path.mkdir()
    with pytest.raises(DataError, match=name):
        read_file(world.task, path)
    path.rmdir()
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=f"{name}.*UTF-8"):
        read_file(world.task, path)
    path.write_bytes(b"")
    with pytest.raises(DataError):
        read_file(world.task, path)


LATIN_1 = "größe".encode("latin-1")


def stdin_of(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize("content", ["\ufeffüber das\nein haus\n", "über das\r\nein haus", "über das\rein haus\r"])
def test_text_is_the_same_through_every_door(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "new.txt").write_bytes(content.encode("utf-8"))
    first, second = re.findall(r"[^\r\n]+", content)
    answers = []
    for given in (["--file", str(tmp_path / "new.txt")], ["--file", "-"], [first, second]):
        monkeypatch.setattr(sys, "stdin", stdin_of(content.encode("utf-8")))
        assert run(["predict", "--run", str(world.run), "--json", *given]) == 0
        answers.append([one["predicted"] for one in json.loads(capsys.readouterr().out)["predictions"]])
    assert [len(tags) for tags in answers[0]] == [2, 2]
    assert answers[0] == answers[1] == answers[2]


def test_text_that_is_not_utf_8_is_refused_at_every_door(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.txt").write_bytes(b"das\n" + LATIN_1)
    argument = LATIN_1.decode("utf-8", "surrogateescape")  # as Python hands it on
    for given, place in (
        (["--file", str(tmp_path / "new.txt")], f"{tmp_path / 'new.txt'}:2: not UTF-8"),
        (["--file", "-"], "standard input:2: not UTF-8"),
        (["das", argument], "text-2: not UTF-8: gr\\udcf6\\udcdfe"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin_of(b"das\n" + LATIN_1))
        assert run(["predict", "--run", str(world.run), "--json", *given]) == 1
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["type"] == "DataError"
        assert place in error["message"]
        assert "UTF-8" in error["remedy"]


# What comes out ------------------------------------------------------------------------------------------------------


def test_tagged_words_in_one_line(world: World) -> None:
    example = Example("x", (("Das", "ist", "lang"),), None)
    predicted = Predicted(id="x", predicted=["DET", "AUX", None], scores=None)
    assert as_text(world.task, example, predicted) == "Das/DET ist/AUX lang/_"


def test_a_label_with_its_probability_and_text() -> None:
    pair = Example("x", (("ein\nhaus", "das haus"),), None)
    scores = {"entailment": 0.034, "neutral": 0.926, "contradiction": 0.04}
    predicted = Predicted(id="x", predicted="neutral", scores=scores)
    assert as_text(find_task("snli"), pair, predicted) == "neutral  0.93  ein haus | das haus"
    choices = Example("x", (("goal", "one"), ("goal", "two")), None)
    predicted = Predicted(id="x", predicted="1", scores={"0": 0.25, "1": 0.75})
    assert as_text(find_task("piqa"), choices, predicted) == "1  0.75  goal | two"


def test_conllu_parses_to_the_predictions(world: World) -> None:
    examples = [
        *world.examples,
        Example("odd", (("10 000", "a\tb", "c\nd", "e  f", "g\u00a0h", "#", "_", "'"),), None),
        *read_lines(world.task, ["das " * 130]),
    ]
    predicted = world.predictor()(examples)
    assert None in names(predicted)[-1]
    written = conllu(world.task, examples, predicted)
    assert written.endswith("\n\n")
    for line in written.split("\n"):
        assert not line or line.startswith("# ") or line.count("\t") == 9
    parsed = conllu_package.parse(written)
    assert [sentence.metadata["sent_id"] for sentence in parsed] == [example.id for example in examples]
    for sentence, example, one in zip(parsed, examples, predicted, strict=True):
        assert [token["id"] for token in sentence] == list(range(1, len(example.texts[0]) + 1))
        assert [None if token["upos"] == "_" else token["upos"] for token in sentence] == one.predicted
        assert sentence.metadata["text"] == " ".join(token["form"] for token in sentence)
        assert {token[column] for token in sentence for column in ("head", "feats", "deps", "misc", "xpos")} == {None}
        assert {token[column] for token in sentence for column in ("lemma", "deprel")} == {"_"}
    forms = [token["form"] for token in parsed[-2]]
    assert forms == ["10 000", "a b", "c d", "e f", "g\u00a0h", "#", "_", "'"]
    assert [[token["form"] for token in sentence] for sentence in parsed[:-2]] == [
        list(example.texts[0]) for example in world.examples
    ]


def test_conllu_is_read_back_by_the_task(world: World, tmp_path: Path) -> None:
    predicted = world.predictor()(world.examples)
    (tmp_path / "out.conllu").write_text(conllu(world.task, world.examples, predicted), "utf-8")
    back = read_file(world.task, tmp_path / "out.conllu")
    assert [(one.id, one.texts) for one in back] == [(one.id, one.texts) for one in world.examples]
    assert score(world.task, back, predicted) == {"accuracy": 1.0, "f1": 1.0, "cut_off_words": 0}


def test_conllu_is_for_tags(snli: World) -> None:
    with pytest.raises(ConfigError, match="CoNLL-U holds tagged words"):
        conllu(snli.task, snli.examples, snli.predictor()(snli.examples))
    assert conllu(snli.task, [], []) == ""
