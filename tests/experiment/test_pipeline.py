"""Both stages together on tiny models: which cache is taken, what a run leaves, and that its numbers are true."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xtreme
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score
from transformers import AutoModelForTokenClassification, AutoTokenizer
from world import SPLITS, World, change_the_tokenizer, count_resource_batches, predictions

from kr2cache import FeatureCache
from kr2cache.config import TrainConfig
from kr2cache.errors import (
    CacheError,
    ConfigError,
    DataError,
    KR2CacheError,
    MissingSplitError,
    UnknownNameError,
    UnsupportedModelError,
)
from kr2cache.experiment.pipeline import TrainResult
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import Shared
from kr2cache.prediction.predict import Predictor
from kr2cache.report import report
from kr2cache.system.claims import try_claim
from kr2cache.tasks.udpos import UPOS, UdPos
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import mean_and_std


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, reader_model: Path, corpus: Path
) -> tuple[World, TrainResult]:
    """Two seeds of last4, trained once. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(bert, folder / "models" / "res")
    shutil.copytree(reader_model, folder / "models" / "reader")
    shutil.copytree(corpus, folder / "corpus")
    world = World(folder)
    return world, world.train(seeds=(1, 2), learning_rate=2e-2, epochs=4.0)


# What a run leaves ---------------------------------------------------------------------------------------------------


def test_the_run_folder_is_as_agreed(trained: tuple[World, TrainResult]) -> None:
    world, result = trained
    assert [run.seed for run in result.runs] == [1, 2]
    for run in result.runs:
        assert run.folder.parent.parent == world.folder / "runs" / "udpos"
        assert run.folder.parent.name.rpartition("-")[0] == "kr2-reader-res-last4"
        assert len(run.folder.parent.name.rpartition("-")[2]) == 8
        assert run.folder.name == f"seed-{run.seed}"
        agreed = {"config.json", "metrics.json", "fusion.json", "reader"}
        agreed |= {"predictions-dev.jsonl", "predictions-test.jsonl"}
        assert agreed <= {path.name for path in run.folder.iterdir()} <= agreed | {"history.json"}
        config = json.loads((run.folder / "config.json").read_text())
        assert config["config"]["seed"] == run.seed
        assert config["config"]["learning_rate"] == 2e-2
    assert not list(world.folder.rglob("*.partial"))
    assert not list(world.folder.rglob("*.lock"))


def test_predictions_have_a_line_an_example_and_a_tag_a_word(trained: tuple[World, TrainResult]) -> None:
    _, result = trained
    for run in result.runs:
        for seed, (split, count) in enumerate(SPLITS.items()):
            if split == "train":
                continue
            rows = predictions(run.folder, split)
            words = tiny.sentences(count, seed=seed)
            assert [row["id"] for row in rows] == [f"{split}-s{i}" for i in range(1, count + 1)]
            assert [row["gold"] for row in rows] == [[tag for _, tag in sentence] for sentence in words]
            for row in rows:
                assert set(row) == {"id", "gold", "predicted"}
                assert len(row["predicted"]) == len(row["gold"])
                assert set(row["predicted"]) <= set(UPOS)


def test_metrics_follow_from_the_predictions(trained: tuple[World, TrainResult]) -> None:
    _, result = trained
    for run in result.runs:
        metrics = json.loads((run.folder / "metrics.json").read_text())
        assert metrics == run.metrics
        assert set(metrics) == {"dev", "test"}
        for split in metrics:
            rows = predictions(run.folder, split)
            gold, predicted = [row["gold"] for row in rows], [row["predicted"] for row in rows]
            assert metrics[split]["f1"] == pytest.approx(xtreme.f1(gold, predicted))
            assert metrics[split]["accuracy"] == pytest.approx(
                accuracy_score(np.concatenate(gold), np.concatenate(predicted))
            )
            assert metrics[split]["cut_off_words"] == 0
    assert result.runs[0].metrics["test"]["accuracy"] > 1 / 17, "it learned something, so the numbers can differ"


def test_mean_and_standard_deviation_are_numpys(trained: tuple[World, TrainResult]) -> None:
    _, result = trained
    shown = result.json()
    for split in ("dev", "test"):
        for name in ("accuracy", "f1"):
            values = [run["metrics"][split][name] for run in shown["runs"]]
            assert shown["mean"][split][name] == pytest.approx(np.mean(values))
            assert shown["std"][split][name] == pytest.approx(np.std(values, ddof=1))
    _, std = mean_and_std([result.runs[0].metrics])
    assert std["test"]["f1"] is None


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.75], [0.1, 0.4, 0.5]])
def test_the_deviation_is_the_samples_and_none_for_one_seed(values: list[float]) -> None:
    mean, std = mean_and_std([{"test": {"f1": value}} for value in values])
    assert mean["test"]["f1"] == pytest.approx(sum(values) / len(values))
    squares = sum((value - sum(values) / len(values)) ** 2 for value in values)
    assert std["test"]["f1"] == (pytest.approx((squares / (len(values) - 1)) ** 0.5) if len(values) > 1 else None)


def test_a_run_of_an_older_procedure_is_shown_as_older_and_trained_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr("kr2cache.experiment.prepare.PROCEDURE", 2)
        old = world.train(method="kreader", seeds=(1,), epochs=1.0).runs[0]
    new = world.train(method="kreader", seeds=(1,), epochs=1.0).runs[0]
    assert new.folder.parent != old.folder.parent
    assert new.seconds is not None
    made = report(old.folder.parents[2], None)
    (table,) = made.tables
    shown = {row[table.columns.index("procedure")].text: row[table.columns.index("F1")] for row in table.rows}
    assert {name: (cell.remark, cell.bold) for name, cell in shown.items()} == {"2": ("older", False), "4": ("", False)}
    assert any(text.startswith("F1 of 1 configuration is not XTREME") for text in made.notes)


def test_seeds_give_different_readers(trained: tuple[World, TrainResult]) -> None:
    _, result = trained
    one, two = (load_file(run.folder / "reader" / "model.safetensors") for run in result.runs)
    assert not torch.equal(one["classifier.weight"], two["classifier.weight"])


def test_fixed_weights_are_written_as_they_are(trained: tuple[World, TrainResult]) -> None:
    _, result = trained
    fusion = json.loads((result.runs[0].folder / "fusion.json").read_text())
    assert fusion["layers"] == [1, 2, 3, 4]
    assert fusion["weights"] == [0.25] * 4
    assert fusion["trainable"] is False


def test_the_best_epoch_on_dev_is_kept(trained: tuple[World, TrainResult]) -> None:
    """Its dev score is the highest of the history, and the first where several are as high."""
    _, result = trained
    for run in result.runs:
        history = json.loads((run.folder / "history.json").read_text())
        scores = {entry["epoch"]: entry["dev_f1"] for entry in history["epochs"] if "dev_f1" in entry}
        assert list(scores) == [1.0, 2.0, 3.0, 4.0]
        assert history["best_epoch"] == max(scores, key=lambda epoch: scores[epoch])
        assert run.metrics["dev"]["f1"] == scores[history["best_epoch"]]
        assert len(set(scores.values())) > 1, "with equal scores this shows nothing"


def test_a_best_epoch_before_the_last_is_restored(world: World) -> None:
    """At a learning rate that ruins the reader, a later epoch is worse; what was best is what is stored."""
    early = 0
    for run in world.train(seeds=(1, 2, 3, 4, 5, 6), learning_rate=8e-2, epochs=6.0, method="kreader").runs:
        history = json.loads((run.folder / "history.json").read_text())
        scores = {entry["epoch"]: entry["dev_f1"] for entry in history["epochs"] if "dev_f1" in entry}
        assert run.metrics["dev"]["f1"] == max(scores.values())
        early += scores[6.0] < max(scores.values())
    assert early, "no seed had its best epoch before the last: the test shows nothing"


def by_hand(run: Path, cache: FeatureCache, sentences: list[list[str]], ids: list[str]) -> list[list[str]]:
    """Tags of the stored reader: transformers' tokenizer, the mean of the last four layers in NumPy, one sentence a
    time.
    """
    reader = KReader.load(run / "reader")
    tokenizer = AutoTokenizer.from_pretrained(run / "reader")
    tags = []
    for name, words in zip(ids, sentences, strict=True):
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        fused = cache[name].astype(np.float32)[-4:].mean(axis=0)
        with torch.inference_mode():
            logits = reader(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                resource_states=torch.from_numpy(fused)[None, None],
                resource_mask=torch.ones(1, len(fused), dtype=torch.long),
            )["logits"][0]
        seen = encoded.word_ids(0)
        tags.append([UPOS[int(logits[seen.index(i)].argmax())] for i in range(len(words))])
    return tags


def test_the_stored_reader_predicts_what_is_stored(trained: tuple[World, TrainResult]) -> None:
    world, result = trained
    cache = FeatureCache.open(next(path for path in world.cache_folders() if path.parent.name == "test"))
    words = [[form for form, _ in sentence] for sentence in tiny.sentences(SPLITS["test"], seed=2)]
    for run in result.runs:
        rows = predictions(run.folder, "test")
        assert by_hand(run.folder, cache, words, [row["id"] for row in rows]) == [row["predicted"] for row in rows]


# Runs are reused -----------------------------------------------------------------------------------------------------


def test_caches_are_made_once_and_runs_are_not_trained_again(world: World) -> None:
    with count_resource_batches() as made:
        first = world.train(seeds=(1,))
    # Every sequence once; beside them, at most ten a split go through the model to check its states.
    assert sum(SPLITS.values()) <= sum(made) <= sum(SPLITS.values()) + 10 * len(SPLITS)
    assert first.computed == sum(SPLITS.values())
    kept = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*") if path.is_file()}
    with count_resource_batches() as again:
        second = world.train(seeds=(1, 2))
    assert again == []
    assert second.computed == 0
    assert second.runs[0].seconds is None
    assert second.runs[0].metrics == first.runs[0].metrics
    assert second.runs[1].seconds is not None
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_fusion_does_not_run_the_resource_again(world: World) -> None:
    world.train(epochs=1.0)
    for fusion in ("fuse", "all", "layer0"):
        with count_resource_batches() as sizes:
            result = world.train(fusion=fusion, epochs=1.0)
        assert sizes == [], fusion
        assert result.computed == 0
        assert result.read >= sum(SPLITS.values()), "every sequence was read, none computed"
    assert len(world.cache_folders()) == 3
    assert len(list((world.folder / "runs" / "udpos").iterdir())) == 4


def test_an_interrupted_run_is_no_run(world: World) -> None:
    result = world.train()
    folder = result.runs[0].folder
    if (child := os.fork()) == 0:  # a training that is killed before it gives the run its name
        claim = try_claim(folder, "all")
        assert claim is not None
        folder.rename(claim.folder / "run")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    again = world.train()
    assert again.runs[0].seconds is not None
    assert again.runs[0].metrics == result.runs[0].metrics
    assert sorted(path.name for path in folder.parent.iterdir()) == ["seed-1"]
    assert not (folder / "left-over").exists()


# Other settings and data are other runs ------------------------------------------------------------------------------


def test_a_default_that_is_given_is_the_same_run(world: World) -> None:
    settings: dict[str, Any] = {"task": "udpos", "data": str(world.data), "method": "kreader", "device": "cpu"}
    settings |= {"reader": str(world.folder / "models" / "reader"), "run_dir": world.folder / "runs"}
    default = TrainConfig(**settings)
    given = TrainConfig(
        **settings, epochs=10, batch_size=32, learning_rate=2e-5, temperature=1, soft_weight=0.5, max_length=128
    )
    aside = dataclasses.replace(given, training={"report_to": "none", "logging_steps": 3, "dataloader_num_workers": 0})
    other = dataclasses.replace(given, training={"warmup_steps": 3})
    folders = [prepare(config, Shared()).folder for config in (default, given, aside, other)]
    assert len(set(folders[:3])) == 1
    assert folders[3] != folders[0]


DECIDING: dict[str, Any] = {
    "method": "kreader",
    "fusion": "all",
    "projection": "direct",
    "epochs": 3.0,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "fusion_learning_rate": 0.1,
    "max_length": 16,
    "resource_max_length": 16,
    "limit": 5,
    "train_limit": 5,
    "dtype": "float32",
    "compute_dtype": "bfloat16",
    "pool": "word",
    "weights_dtype": "bfloat16",
    "training": {"warmup_steps": 3},
}
"""Fields of ``TrainConfig`` that can change the scores, each with a value that the fixture does not have."""
NOT_DECIDING: dict[str, Any] = {
    "seeds": (7, 8),
    "device": "cpu",
    "device_map": "auto",
    "run_dir": Path("elsewhere"),
    "keep_readers": False,
    "temporary_readers": True,
    "extract": False,
    "check_states": True,
}
CONTENT_DECIDES = {"task", "reader", "resource", "more_resources", "data", "cache_dir", "models", "tasks"}
"""These fields name things whose content decides, wherever it is: other tests change the content."""
HEAD = {"keep_head"}
"""It needs a reader with a head that fits (tests/training/test_checkpoint.py)."""
TEACHES = {"teacher", "temperature", "soft_weight"}
"""These fields count for a distillation alone (``Lesson.given_to``)."""


def test_every_setting_decides_a_run_or_does_not(world: World) -> None:
    """A new field has to be put into one of these lists. If it decides and is not recorded, old runs pass for new."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields == {*DECIDING, *NOT_DECIDING, *CONTENT_DECIDES, *TEACHES, *HEAD}

    shared = Shared()

    def deciding(**changes: Any) -> dict[str, Any]:
        return prepare(world.config(**{"fusion": "fuse", "device": "auto"} | changes), shared).deciding

    base = deciding()
    assert [name for name, value in NOT_DECIDING.items() if deciding(**{name: value}) != base] == []
    assert [name for name, value in DECIDING.items() if deciding(**{name: value}) == base] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"config": {"task": "snli"}}'),
        ("config.json", "{"),
        ("metrics.json", '{"dev": 3}'),
        ("metrics.json", "{}"),
    ],
)
def test_a_run_folder_that_was_tampered_with_is_not_taken(world: World, name: str, content: str) -> None:
    run = world.train(epochs=1.0).runs[0].folder
    (run / name).write_text(content, "utf-8")
    with pytest.raises(CacheError, match=re.escape(str(run))):
        world.train(epochs=1.0)


def test_a_run_of_another_configuration_in_its_place_is_not_taken(world: World) -> None:
    run = world.train(epochs=1.0).runs[0].folder
    path = run / "config.json"
    content = json.loads(path.read_text("utf-8"))
    content["config"]["learning_rate"] = 1.0
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CacheError, match="another configuration: learning_rate differ"):
        world.train(epochs=1.0)


def test_a_changed_reader_tokenizer_is_another_run(world: World) -> None:
    before = world.train()
    change_the_tokenizer(world.folder / "models" / "reader")
    after = world.train()
    assert after.runs[0].folder != before.runs[0].folder


def test_edited_gold_labels_are_another_run_on_the_same_cache(world: World) -> None:
    before = world.train()
    path = world.data / "test.conllu"
    path.write_text(path.read_text("utf-8").replace("\tPUNCT\t", "\tSYM\t", 1), "utf-8")
    after = world.train()
    assert after.computed == 0
    assert after.runs[0].folder != before.runs[0].folder
    assert "SYM" in predictions(after.runs[0].folder, "test")[0]["gold"]


# Splits --------------------------------------------------------------------------------------------------------------


def test_without_dev_the_last_epoch_is_scored_on_test(world: World) -> None:
    (world.data / "dev.conllu").unlink()
    result = world.train()
    assert set(result.runs[0].metrics) == {"test"}
    history = json.loads((result.runs[0].folder / "history.json").read_text())
    assert history["best_epoch"] == 2.0
    assert not any("dev_f1" in entry for entry in history["epochs"])


@pytest.mark.parametrize("how", ["absent", "unlabelled"])
def test_without_labelled_test_the_last_epoch_is_scored_on_dev(world: World, how: str) -> None:
    """design.md, section 6: choosing the epoch on dev and scoring on dev would flatter."""
    path = world.data / "test.conllu"
    if how == "absent":
        path.unlink()
    else:
        words = [[(form, "_") for form, _ in sentence] for sentence in tiny.sentences(6, seed=2)]
        path.write_text(tiny.conllu(words), "utf-8")
    result = world.train(epochs=4.0, seeds=(1, 2), learning_rate=0.2, method="kreader")
    for run in result.runs:
        assert set(run.metrics) == {"dev"}
        history = json.loads((run.folder / "history.json").read_text())
        assert history["best_epoch"] == 4.0


def test_neither_dev_nor_test_is_an_error_before_anything_is_made(world: World) -> None:
    (world.data / "dev.conllu").unlink()
    (world.data / "test.conllu").unlink()
    with pytest.raises(MissingSplitError, match="neither a dev nor a test split with labels"):
        world.train()
    assert not world.caches.exists()
    assert not (world.folder / "runs").exists()


def test_unlabelled_training_data_are_refused(world: World) -> None:
    text = (world.data / "train.conllu").read_text("utf-8")
    (world.data / "train.conllu").write_text(text + "# sent_id = blind\n" + "1\ta" + "\t_" * 8 + "\n\n", "utf-8")
    with pytest.raises(DataError, match=r"1 of 13 examples of the train split have no gold label \(first: 'blind'\)"):
        world.train()


def test_words_cut_off_are_counted_and_wrong(world: World) -> None:
    result = world.train(max_length=10, epochs=1.0)
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "models" / "reader")
    for split in ("dev", "test"):
        rows = predictions(result.runs[0].folder, split)
        expected = []
        for example in UdPos(None).read(split, str(world.data)):
            encoded = tokenizer(list(example.texts[0]), is_split_into_words=True, truncation=True, max_length=10)
            seen = set(encoded.word_ids())
            expected.append([i not in seen for i in range(len(example.texts[0]))])
        assert [[tag is None for tag in row["predicted"]] for row in rows] == expected
        lost = sum(map(sum, expected))
        metrics = result.runs[0].metrics[split]
        assert metrics["cut_off_words"] == lost > 0
        right = sum(a == b for row in rows for a, b in zip(row["gold"], row["predicted"], strict=True))
        assert metrics["accuracy"] == pytest.approx(right / sum(map(len, expected)))


def test_a_split_that_is_labelled_in_part_is_refused(world: World) -> None:
    path = world.data / "test.conllu"
    first, rest = path.read_text("utf-8").split("\n\n", 1)
    blank = "\n".join(
        line if line.startswith("#") else "\t".join([*line.split("\t")[:3], "_", *line.split("\t")[4:]])
        for line in first.splitlines()
    )
    path.write_text(f"{blank}\n\n{rest}", "utf-8")
    with pytest.raises(DataError, match="1 of 6 examples of the test split"):
        world.train()


# What is wrong is said first -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fusion": "last9"}, ConfigError, "last9"),
        ({"fusion": "layer5"}, ConfigError, "layer5|layer 5"),
        ({"fusion": "lastt4"}, UnknownNameError, "'last4'"),
        ({"projection": "none"}, ConfigError, "resource has 16, the reader 24"),
        (
            {"fusion": "mix", "projection": "direct"},
            ConfigError,
            "--fusion mix cannot be used with --projection direct",
        ),
        ({"projection": "mpl"}, UnknownNameError, "'mlp'"),
        ({"method": "kr3"}, UnknownNameError, "'kr2'"),
        ({"resource": None}, ConfigError, "needs --resource"),
        ({"max_length": 5000}, ConfigError, r"5000 is more than the \d+ positions of 'reader'"),
        ({"resource_max_length": 5000}, ConfigError, r"5000 is more than the \d+ positions of 'res'"),
        ({"training": {"warmup_stepz": 3}}, UnknownNameError, "warmup_steps"),
        ({"training": {"lr_scheduler_type": "sideways"}}, ConfigError, "sideways"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    world: World, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        world.train(**changes)
    assert not world.caches.exists()
    assert not (world.folder / "runs").exists()


def edit_config(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


def put_nan(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][2, 3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def reshape(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    weights[name] = weights[name][:, :3].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "error", "message", "remedy"),
    [
        (
            lambda model: edit_config(model, is_decoder=True),
            UnsupportedModelError,
            r"'reader' \(xlm-roberta\) cannot be a KReader of method kr2",
            '"is_decoder": false',
        ),
        (put_nan, UnsupportedModelError, r"'reader' holds numbers that are not finite .*output\.dense\.weight", "copy"),
        (
            reshape,
            UnsupportedModelError,
            r"output\.dense\.weight is \(24, 3\) in the file, \(24, 48\) by the conf",
            "same model",
        ),
        (
            lambda model: edit_config(model, attn_implementation="flash_attention_2"),
            KR2CacheError,
            "FlashAttention2",
            "",
        ),
    ],
    ids=["causal", "nan", "shapes", "package"],
)
def test_a_reader_that_cannot_be_trained_is_refused_before_caches_are_made(
    world: World, spoil: Callable[[Path], None], error: type[Exception], message: str, remedy: str
) -> None:
    spoil(world.folder / "models" / "reader")
    with pytest.raises(error, match=message) as caught:
        world.train()
    assert isinstance(caught.value, KR2CacheError)
    assert remedy in caught.value.remedy
    assert "report" not in caught.value.message, "transformers' own, which nobody sees"
    assert not world.caches.exists()
    assert not (world.folder / "runs").exists()


def test_a_new_training_gets_a_new_head_and_says_so(
    world: World, make: Callable[[Path], World], tmp_path: Path
) -> None:
    """A tagger of these very labels in another order, and one of five: both train as the plain checkpoint does."""
    reader = world.folder / "models" / "reader"
    names = UPOS[::-1]
    torch.manual_seed(0)
    tagger = AutoModelForTokenClassification.from_pretrained(reader, id2label=dict(enumerate(names)))
    tagger.config.label2id = {name: i for i, name in enumerate(names)}
    expected = world.train(epochs=1.0)
    for number, problem_type in enumerate((None, "multi_label_classification")):
        other = make(tmp_path / str(number))
        tagger.config.problem_type = problem_type
        tagger.save_pretrained(other.folder / "models" / "reader")
        found = other.train(epochs=1.0)
        assert found.runs[0].metrics == expected.runs[0].metrics
        assert predictions(found.runs[0].folder, "test") == predictions(expected.runs[0].folder, "test")
        (said,) = set(found.notes) - set(expected.notes)
        labels = "" if number else f", labels {', '.join(names)}"
        assert said.startswith(f"reader has the head of an earlier training (classifier{labels}). It is not used")
        tagger = AutoModelForTokenClassification.from_pretrained(reader, num_labels=5)


def test_tuples_and_a_padding_token_without_embedding_change_no_score(
    world: World, make: Callable[[Path], World], tmp_path: Path
) -> None:
    expected = world.train(epochs=1.0)
    other = make(tmp_path / "other")
    for model in (other.resource, other.folder / "models" / "reader"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_special_tokens({"pad_token": "[ADDED]"})
        tokenizer.save_pretrained(model)
        edit_config(model, return_dict=False)
    found = other.train(epochs=1.0)
    assert found.runs[0].metrics == expected.runs[0].metrics
    assert predictions(found.runs[0].folder, "test") == predictions(expected.runs[0].folder, "test")
    predictor = Predictor.load(found.runs[0].folder, device="cpu")
    rows = predictor(UdPos(None).read("test", str(other.data)))
    assert [row.predicted for row in rows] == [row["predicted"] for row in predictions(found.runs[0].folder, "test")]
