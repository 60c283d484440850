"""Both stages together on tiny models: which cache is taken, what a run leaves, and that its numbers are true."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqeval.metrics
import tiny
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score
from transformers import AutoModelForTokenClassification, AutoTokenizer
from transformers.models.bert.modeling_bert import BertEncoder
from world import World

from kr2cache import FeatureCache, cli, provenance
from kr2cache import train as train_module
from kr2cache.config import TrainConfig
from kr2cache.digests import weights_digest
from kr2cache.errors import (
    CacheError,
    CacheMismatchError,
    ConfigError,
    DataError,
    KR2CacheError,
    MissingSplitError,
    TrainingError,
    UnknownNameError,
)
from kr2cache.kreader import KReader
from kr2cache.models import ModelSpec, load_encoder
from kr2cache.pipeline import TrainResult
from kr2cache.prepare import prepare
from kr2cache.runs import mean_and_std
from kr2cache.shared import Shared
from kr2cache.tasks.udpos import UPOS, UdPos

SPLITS = {"train": 12, "dev": 5, "test": 6}


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


@contextmanager
def count_resource_batches() -> Iterator[list[int]]:
    """Batch sizes of every forward pass of the resource (the only BERT here; readers are XLM-R)."""
    sizes: list[int] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, BertEncoder):
            sizes.append(inputs[0].shape[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


def predictions(run: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"predictions-{split}.jsonl").read_text("utf-8").splitlines()]


def change_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_the_tokenizer(model: Path) -> None:
    """Uppercase and lowercase as before, but "haus" is no longer h ##a ##u ##s: two pieces swap their numbers."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    numbers = content["model"]["vocab"]
    numbers["h"], numbers["r"] = numbers["r"], numbers["h"]
    path.write_text(json.dumps(content), "utf-8")


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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                f1 = seqeval.metrics.f1_score(gold, predicted)
            assert metrics[split]["f1"] == pytest.approx(f1)
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


# Runs and caches are reused ------------------------------------------------------------------------------------------


def test_caches_are_made_once_and_runs_are_not_trained_again(world: World) -> None:
    with count_resource_batches() as made:
        first = world.train(seeds=(1,))
    # Every sequence once; beside them, a few go through the model to check its shape.
    assert sum(SPLITS.values()) <= sum(made) < 2 * sum(SPLITS.values())
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
    folder.rename(folder.with_name("seed-1.partial"))
    (folder.with_name("seed-1.partial") / "left-over").write_text("")
    again = world.train()
    assert again.runs[0].seconds is not None
    assert again.runs[0].metrics == result.runs[0].metrics
    assert sorted(path.name for path in folder.parent.iterdir()) == ["seed-1"]
    assert not (folder / "left-over").exists()


def test_a_run_that_cannot_be_written_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KReader.save

    def full(reader: KReader, folder: Path) -> None:
        whole(reader, folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(KReader, "save", full)
        with pytest.raises(OSError, match="No space"):
            world.train(epochs=1.0)
    (folder,) = (world.folder / "runs" / "udpos").iterdir()
    assert list(folder.iterdir()) == []
    assert world.train(epochs=1.0).runs[0].folder.parent == folder


def test_a_cache_with_more_layers_and_examples_serves_a_smaller_need(world: World) -> None:
    for split in SPLITS:
        world.extract(split)
    result = world.train(limit=4, fusion="layer2", extract=False)
    assert result.computed == 0
    assert len(predictions(result.runs[0].folder, "test")) == 4


def test_a_cache_with_too_few_layers_or_examples_does_not_serve(world: World) -> None:
    for split in SPLITS:
        world.extract(split, layers="last1")
    with pytest.raises(
        CacheError, match=r"No cache of res on udpos/train fits.*layers 1, 2, 3 are not stored"
    ) as caught:
        world.train(extract=False)
    assert "kr2cache extract" in caught.value.remedy
    assert world.train(extract=False, fusion="layer4", epochs=1.0).computed == 0
    assert world.train(epochs=1.0).computed == sum(SPLITS.values())
    few = world.folder / "few"
    for split in SPLITS:
        world.extract(split, limit=2, cache_dir=few)
    with pytest.raises(CacheError, match=r"10 of 12 examples are not in it \(train-s3"):
        world.train(extract=False, cache_dir=few)
    assert world.train(extract=False, cache_dir=few, limit=2).computed == 0


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"max_length": 20}, {"resource_max_length": 40}, "max_length is 20 there, 40 was asked for"),
        ({"dtype": "float32"}, {"dtype": "float16"}, "dtype is float32 there, float16 was asked for"),
        (
            {"compute_dtype": "bfloat16"},
            {"compute_dtype": "float32"},
            "compute_dtype is bfloat16 there, float32 was asked for",
        ),
    ],
)
def test_without_extraction_the_field_that_differs_is_named(
    world: World, made: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    world.extract("train", **made)
    with pytest.raises(CacheError, match=message) as caught:
        world.train(extract=False, **asked)
    assert not isinstance(caught.value, CacheMismatchError), "it was made with other settings, nothing went stale"
    assert not (world.folder / "runs").exists()


def test_a_cache_that_lacks_a_layer_still_decides_the_length(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Else one fusion of an ablation would read longer texts than the others."""
    world.extract("train", max_length=7, layers="last2")
    with pytest.raises(CacheError) as caught:
        world.train(extract=False)
    assert "--max-length 7" in caught.value.remedy
    assert "--resource-max-length 7" in " ".join(capsys.readouterr().out.split())
    run = world.train().runs[0]
    decided = json.loads((run.folder / "config.json").read_text())["config"]["resource"]
    assert decided["max_length"] == 7
    assert len(world.cache_folders()) == 4
    assert (
        json.loads((world.train(resource_max_length=9).runs[0].folder / "config.json").read_text())["config"][
            "resource"
        ]["max_length"]
        == 9
    )


def test_what_the_cache_holds_decides_what_was_not_asked_for(world: World) -> None:
    for split in SPLITS:
        world.extract(split, max_length=20, dtype="float32")
    result = world.train(extract=False)
    config = json.loads((result.runs[0].folder / "config.json").read_text())["config"]
    assert (config["resource"]["max_length"], config["resource"]["dtype"]) == (20, "float32")


def test_several_caches_that_fit_are_a_question_unless_one_has_the_default_settings(world: World) -> None:
    for split in SPLITS:
        world.extract(split, dtype="float32")
        world.extract(split, dtype="bfloat16")
    with pytest.raises(CacheError, match=r"Several caches of res fit and differ.*(bfloat16|float32)"):
        world.train()
    assert world.train(dtype="bfloat16").computed == 0
    for split in SPLITS:
        world.extract(split)
    result = world.train()
    config = json.loads((result.runs[0].folder / "config.json").read_text())["config"]
    assert config["resource"]["dtype"] == "float16"


# Stale caches --------------------------------------------------------------------------------------------------------


def edit_a_text(world: World) -> None:
    path = world.data / "train.conllu"
    text = path.read_text("utf-8")
    assert "\tPUNCT\t" in text
    path.write_text(text.replace("\t.\t_\tPUNCT", "\t!\t_\tPUNCT", 2), "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: change_a_weight(world.resource), r"the weights of res changed \(digest \w{8} then, \w{8} now\)"),
        (
            edit_a_text,
            r"the text of 2 of 12 examples changed \(train-s1, train-s2; digest of the first \w{16} then, \w{16} now",
        ),
        (
            lambda world: change_the_tokenizer(world.resource),
            r"the tokenizer of res gives other tokens for \d+ examples",
        ),
    ],
    ids=["weights", "text", "tokenizer"],
)
def test_a_stale_cache_is_refused_and_its_command_mends_it(
    world: World, monkeypatch: pytest.MonkeyPatch, change: Callable[[World], None], message: str
) -> None:
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("KR2CACHE_DIR", str(world.caches))
    before = world.train()
    change(world)
    mended = []
    for _ in SPLITS:
        try:
            after = world.train()
            break
        except CacheMismatchError as error:
            if not mended:
                assert "udpos/train" in error.message
                assert re.search(message, error.message)
            command = shlex.split(error.remedy.partition(":")[2])
            assert command[:2] == ["kr2cache", "extract"]
            assert cli.run(command[1:]) == 0
            mended.append(command)
    else:
        after = world.train()
    assert mended
    assert after.computed == 0
    assert after.runs[0].folder.parent != before.runs[0].folder.parent, "another run: its result may differ"
    assert after.runs[0].seconds is not None


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


def test_a_cache_that_another_version_made_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.train()
    real = provenance.caches_of

    def of_another_version(*arguments: Any) -> list[FeatureCache]:
        caches = real(*arguments)
        for cache in caches:
            del cache.provenance["found"]["config"]
        return caches

    monkeypatch.setattr(provenance, "caches_of", of_another_version)
    with pytest.raises(CacheMismatchError, match="another version of kr2cache made it, without recording config"):
        world.train(fusion="all")


def test_a_stale_cache_is_not_written_over(world: World) -> None:
    world.train()
    before = {path: path.read_bytes() for path in world.caches.rglob("*.h5")}
    change_a_weight(world.resource)
    world.extract("train")
    assert {path: path.read_bytes() for path in before} == before
    assert len(world.cache_folders()) == len(SPLITS) + 1


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


def test_moved_and_renamed_folders_of_the_same_content_still_fit(world: World) -> None:
    world.train()
    data = world.data.rename(world.folder / "renamed-corpus")
    resource = world.resource.rename(world.folder / "moved-resource")
    with count_resource_batches() as sizes:
        result = world.train(data=str(data), resource=str(resource), extract=False, fusion="all")
    assert sizes == []
    assert result.computed == 0


def test_rewritten_model_files_with_the_same_weights_still_fit(world: World) -> None:
    world.train()
    weights = load_file(world.resource / "model.safetensors")
    (world.resource / "model.safetensors").unlink()
    torch.save(weights, world.resource / "pytorch_model.bin")
    assert world.train(extract=False, fusion="all").computed == 0


def test_without_the_resources_weights_the_cache_is_trusted_and_that_is_said(world: World) -> None:
    models = {"far": {"path": str(world.resource)}}
    first = world.train(resource="far", models=models)
    shutil.rmtree(world.resource)
    result = world.train(resource="far", models=models, fusion="all")
    assert result.computed == 0
    assert len(result.notes) == 1
    assert "far" in result.notes[0]
    assert "not on this machine" in result.notes[0]
    assert first.notes == []
    again = world.train(resource="far", models=models)
    assert again.runs[0].seconds is None, "the run that was there is found without the weights"
    edit_a_text(world)
    with pytest.raises(CacheMismatchError, match="the text of 2 of 12 examples changed"):
        world.train(resource="far", models=models)


def test_without_weights_and_without_a_cache_it_is_the_model_that_is_missing(world: World) -> None:
    models = {"far": {"path": str(world.folder / "nowhere")}}
    with pytest.raises(KR2CacheError, match=r"'far'.*config\.json"):
        world.train(resource="far", models=models)


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
    with pytest.raises(DataError, match=r"1 of 13 training examples have no gold label \(first: 'blind'\)"):
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


# Methods and training ------------------------------------------------------------------------------------------------


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
    step = train_module.ReaderTrainer.training_step

    def counting(self: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        parts.append(len(inputs["parts"]))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(train_module.ReaderTrainer, "training_step", counting)
    monkeypatch.setattr(train_module, "PART_OVERHEAD", {"cpu": 2})
    cut = world.train(run_dir=world.folder / "cut", **settings).runs[0]
    assert max(parts) > 2
    parts.clear()
    monkeypatch.setattr(train_module, "PART_OVERHEAD", {})
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


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fusion": "last9"}, ConfigError, "last9"),
        ({"fusion": "layer5"}, ConfigError, "layer5|layer 5"),
        ({"fusion": "lastt4"}, UnknownNameError, "'last4'"),
        ({"projection": "none"}, ConfigError, "resource has 16, the reader 24"),
        ({"projection": "mpl"}, UnknownNameError, "'mlp'"),
        ({"method": "kr3"}, UnknownNameError, "'kr2'"),
        ({"resource": None}, ConfigError, "needs --resource"),
        ({"max_length": 5000}, ConfigError, "5000 is more than 'reader' has positions"),
        ({"resource_max_length": 5000}, ConfigError, "5000 is more than 'res' has positions"),
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


# One run, one resource, one setting ----------------------------------------------------------------------------------


def test_kreader2_reads_the_readers_own_states_whatever_resource_is_named(world: World) -> None:
    world.extract("train")  # of the other model: not what kreader2 is to take
    result = world.train(method="kreader2", fusion="last2")
    recorded = json.loads((result.runs[0].folder / "config.json").read_text("utf-8"))["recorded"]["caches"]
    own = weights_digest(load_encoder(ModelSpec(name="reader", path=world.folder / "models" / "reader")))
    for cache in recorded.values():
        assert FeatureCache.open(cache["folder"]).provenance["found"]["weights"] == own


def test_what_the_train_cache_was_made_with_holds_for_dev_and_test(world: World) -> None:
    world.extract("train", max_length=20, dtype="float32")
    world.train()
    chosen = [FeatureCache.open(folder).provenance["chosen"] for folder in world.cache_folders()]
    assert {one["split"] for one in chosen} == {"train", "dev", "test"}
    assert {(one["max_length"], one["dtype"]) for one in chosen} == {(20, "float32")}


def test_a_changed_configuration_is_noticed_though_the_weights_are_the_same(world: World) -> None:
    world.train()
    path = world.resource / "config.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | {"num_attention_heads": 4}), "utf-8")
    with pytest.raises(CacheMismatchError, match=r"config\.json"):
        world.train()


def test_a_shallower_models_cache_does_not_stand_in_the_way(world: World, tmp_path: Path) -> None:
    shallow = tiny.save_model(tmp_path / "shallow", layers=1)
    world.extract("train", resource=str(shallow))
    assert world.train(fusion="layer4").runs


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


def test_a_training_that_diverges_is_no_run(world: World) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        world.train(method="kreader", learning_rate=1e38)
    assert not list((world.folder / "runs").rglob("seed-*"))


def test_a_cache_that_cannot_be_read_is_named_where_none_may_be_made(world: World) -> None:
    result = world.extract()
    (shard,) = result.cache.glob("*.h5")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CacheError, match=rf"No cache of res .* fits.*{shard} is damaged: cut off") as caught:
        world.train(extract=False)
    assert "kr2cache extract" in caught.value.remedy
    world.train()
    assert len(FeatureCache.open(result.cache)) == 12, "the extraction that training calls makes it again"
