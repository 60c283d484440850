"""Which cache of a resource a training takes, when one is made, and what is too stale to be taken."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from world import SPLITS, World, change_a_weight, change_the_tokenizer, count_resource_batches, predictions

from kr2cache import FeatureCache, cli
from kr2cache.errors import (
    CacheError,
    CacheMismatchError,
    ConfigError,
    DiskSpaceError,
    KR2CacheError,
)
from kr2cache.experiment import resource as resource_module
from kr2cache.experiment.pipeline import describe_training
from kr2cache.experiment.resource import Resource
from kr2cache.experiment.shared import Shared
from kr2cache.extraction import planning
from kr2cache.fusion import TRAINABLE
from kr2cache.models import digests, stack
from kr2cache.models.digests import weights_digest
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.models.stack import load_encoder
from kr2cache.store import find
from kr2cache.tasks import find_task


def edit_a_text(world: World) -> None:
    path = world.data / "train.conllu"
    text = path.read_text("utf-8")
    assert "\tPUNCT\t" in text
    path.write_text(text.replace("\t.\t_\tPUNCT", "\t!\t_\tPUNCT", 2), "utf-8")


def test_a_cache_with_more_layers_and_examples_serves_a_smaller_need(world: World) -> None:
    for split in SPLITS:
        world.extract(split)
    result = world.train(limit=4, fusion="layer2", extract=False)
    assert result.computed == 0
    assert len(predictions(result.runs[0].folder, "test")) == 4


def test_with_fewer_training_examples_the_other_splits_stay_whole(world: World) -> None:
    """A curve over the size of the train split: the small cache is copied, and the large one serves the small need."""
    few = world.train(train_limit=4, fusion="layer2")
    more = world.train(train_limit=9, fusion="layer2")
    assert more.computed == 5
    whole = world.train(fusion="layer2")
    assert whole.computed == 3
    assert len({result.runs[0].folder for result in (few, more, whole)}) == 3
    for split in ("dev", "test"):
        assert len({len(predictions(result.runs[0].folder, split)) for result in (few, more, whole)}) == 1
    again = world.train(train_limit=4, fusion="layer2", extract=False, run_dir=world.folder / "again")
    assert again.computed == 0
    assert predictions(again.runs[0].folder, "dev") == predictions(few.runs[0].folder, "dev")


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


@pytest.mark.parametrize("fusion", TRAINABLE)
def test_learned_weights_need_every_layer(world: World, fusion: str) -> None:
    for split in SPLITS:
        world.extract(split, layers="last2")
    with pytest.raises(CacheError, match="layers 0, 1, 2 are not stored there"):
        world.train(extract=False, fusion=fusion)
    assert world.train(fusion=fusion, epochs=1.0).computed == sum(SPLITS.values())
    assert len(world.cache_folders()) == 6
    assert world.train(extract=False, fusion=fusion, epochs=2.0).computed == 0


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
    with pytest.raises(CacheError, match=r"Several caches of res fit and differ.*(bfloat16|float32)") as caught:
        world.train()
    assert caught.value.remedy == "Choose: dtype under [defaults] in kr2cache.toml.", "their lengths are the same"
    assert world.train(dtype="bfloat16").computed == 0
    for split in SPLITS:
        world.extract(split)
    result = world.train()
    config = json.loads((result.runs[0].folder / "config.json").read_text())["config"]
    assert config["resource"]["dtype"] == "float16"


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


def test_a_cache_that_another_version_made_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.train()
    real = find.open_caches

    def of_another_version(*arguments: Any) -> tuple[list[FeatureCache], dict[Path, CacheError]]:
        caches, unreadable = real(*arguments)
        for cache in caches:
            del cache.provenance["found"]["config"]
        return caches, unreadable

    monkeypatch.setattr(find, "open_caches", of_another_version)
    with pytest.raises(CacheMismatchError, match="another version of kr2cache made it, without recording config"):
        world.train(fusion="all")


def test_a_stale_cache_is_not_written_over(world: World) -> None:
    world.train()
    before = {path: path.read_bytes() for path in world.caches.rglob("*.h5")}
    change_a_weight(world.resource)
    world.extract("train")
    assert {path: path.read_bytes() for path in before} == before
    assert len(world.cache_folders()) == len(SPLITS) + 1


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


def test_a_cache_that_cannot_be_read_is_named_where_none_may_be_made(world: World) -> None:
    result = world.extract()
    (shard,) = result.cache.glob("*.h5")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CacheError, match=rf"No cache of res .* fits.*{shard} is damaged: it is cut off") as caught:
        world.train(extract=False)
    assert "kr2cache extract" in caught.value.remedy
    world.train()
    assert len(FeatureCache.open(result.cache)) == 12, "the extraction that training calls makes it again"


def resource_of(world: World, **changes: Any) -> Resource:
    """What a training of these settings finds its caches with."""
    config = world.config(**changes)
    assert config.resource is not None
    return Resource(config, find_model(config.resource, config.models), find_task(config.task), Shared())


@pytest.mark.parametrize("cached", ["dev", "train"])
def test_a_model_that_comes_while_it_is_planned_is_compared_before_it_is_extracted(
    world: World, cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a download does it: the model is not there when caches are looked for, and other weights come."""
    models, away = {"far": {"path": str(world.resource)}}, world.folder / "away"
    world.extract(cached, resource="far", models=models)
    change_a_weight(world.resource)
    world.resource.rename(away)
    config = world.config(resource="far", models=models)
    resource = Resource(config, find_model("far", models), find_task("udpos"), Shared())
    plan = resource_module.plan_extraction

    def download(*given: Any) -> Any:
        if away.exists():
            away.rename(world.resource)
        return plan(*given)

    monkeypatch.setattr(resource_module, "plan_extraction", download)
    with pytest.raises(CacheMismatchError, match="made from"):
        resource.look(["train", "dev"])
    assert len(world.cache_folders()) == 1


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("made", "asked", "lack"),
    [
        ({"layers": "last2"}, {"fusion": "all"}, "layers 0, 1, 2 are not stored there"),
        ({"limit": 2}, {}, "10 of 12 examples are not in it (train-s3, train-s4, train-s5, ...)"),
        ({"max_length": 9}, {"resource_max_length": 20}, "max_length is 9 there, 20 was asked for"),
        ({"dtype": "int8"}, {"dtype": "float32"}, "dtype is int8 there, float32 was asked for"),
    ],
)
def test_what_the_cache_at_hand_lacks_is_said_before_a_new_one_is_made(
    world: World, capsys: pytest.CaptureFixture[str], made: dict[str, Any], asked: dict[str, Any], lack: str
) -> None:
    folder = world.extract("train", **made).cache
    with pytest.raises(CacheError, match="and --no-extract was given") as caught:
        resource_of(world, extract=False, **asked).caches(["train"])
    assert f"{folder}: {lack}." in caught.value.message
    capsys.readouterr()
    resource_of(world, **asked).caches(["train"])
    shown = said(capsys)
    why = f"! No cache of res on udpos/train fits, so a new one is made. {folder}: {lack}."
    assert why in shown
    assert shown.index(why) < shown.index("12 sequences, "), "before the work"
    resource_of(world, **asked).caches(["train"])
    assert "a new one" not in said(capsys)


def test_words_without_states_are_named_with_the_option_that_keeps_them(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.resource)
    lost = {}
    for split in SPLITS:
        lost[split] = 0
        for block in (world.data / f"{split}.conllu").read_text("utf-8").strip().split("\n\n"):
            words = [line.split("\t")[1] for line in block.splitlines() if line.split("\t")[0].isdigit()]
            there = tokenizer(words, is_split_into_words=True, truncation=True, max_length=6).word_ids()
            lost[split] += len(words) - len(set(there) - {None})
    assert min(lost.values()) > 0
    models = {"far": {"path": str(world.resource)}}
    capsys.readouterr()
    first = world.train(resource="far", models=models, resource_max_length=6, epochs=1.0)
    made = said(capsys)
    shutil.rmtree(world.resource)
    again = world.train(resource="far", models=models, max_length=100, epochs=1.0)
    read = said(capsys)
    for split, count in lost.items():
        reasons = f"{count} words: {count} cut off at 6 tokens (--resource-max-length)."
        assert made.count(f"No states for {reasons}") == 1
        assert f"cache of udpos/{split}" not in made, "said once"
        assert f"far's cache of udpos/{split} has no states for {reasons}" in read
    assert "(--max-length)" not in made + read
    shared = Shared()
    for _ in range(2):
        Resource(again.config, find_model("far", models), again.task, shared).caches(["dev"])
    assert said(capsys).count("has no states for") == 1, "once in a sweep"
    for result in (first, again):
        assert result.json()["words_without_states"] == lost
        config = json.loads((result.runs[0].folder / "config.json").read_text("utf-8"))
        assert config["recorded"]["words_without_states"] == lost
        describe_training(result)
        table = said(capsys)
        assert "words without states" in table
        assert f"│ {lost['test']} │" in table


def test_a_cache_of_every_word_has_no_such_column(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    result = world.train(epochs=1.0)
    describe_training(result)
    assert result.words_without_states == dict.fromkeys(SPLITS, 0)
    shown = said(capsys)
    assert "words without a label" in shown
    assert "states for" not in shown
    assert "without states" not in shown


def test_a_training_loads_and_hashes_its_resource_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(spec: ModelSpec, *settings: Any) -> tuple[Any, ...]:
        opened.append(spec.name)
        return stack.open_encoder(spec, *settings)

    monkeypatch.setattr(digests, "open_encoder", counted)
    monkeypatch.setattr(digests, "_digests", {})
    assert world.train(epochs=1.0).computed == sum(SPLITS.values())
    assert opened.count("res") == 1, "for three extractions"
    world.train(epochs=1.0)
    assert opened.count("res") == 1, "its files did not change"


def test_a_cache_that_does_not_fit_is_found_before_others_are_made(world: World) -> None:
    """The train split has no cache yet, and that of dev was made from other texts."""
    world.extract("dev")
    change_a_weight(world.resource)
    with pytest.raises(CacheMismatchError, match=r"on udpos/dev .* weights"):
        world.train()
    assert {folder.parent.name for folder in world.cache_folders()} == {"dev"}


def test_a_second_resource_is_looked_at_before_the_first_runs(world: World) -> None:
    other = tiny.save_model(world.folder / "models" / "other", layers=4, seed=8)
    world.extract("test", resource=str(other))
    change_a_weight(other)
    with pytest.raises(CacheMismatchError, match="cache of other on udpos/test"):
        world.train(more_resources=(str(other),))
    assert {folder.name.partition("-")[0] for folder in world.cache_folders()} == {"other"}


def test_a_projection_that_does_not_fit_a_later_resource_is_refused_before_the_first_runs(world: World) -> None:
    """Only caches tell the width of the later one: its model is not on this machine."""
    wide = tiny.save_model(world.folder / "models" / "wide", layers=4, width=24, seed=8)
    for split in SPLITS:
        world.extract(split)
    shutil.rmtree(world.resource)
    with pytest.raises(ConfigError, match=r"^res: .*16"):
        world.train(resource=str(wide), more_resources=("res",), projection="none")
    assert {folder.name.partition("-")[0] for folder in world.cache_folders()} == {"res"}


def test_the_disk_has_to_hold_the_caches_of_all_splits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = world.extract("train", cache_dir=world.folder / "elsewhere").tokens
    monkeypatch.setattr(planning, "free_bytes", lambda _: tokens * 5 * 16 * 2)  # room for this split alone
    with pytest.raises(DiskSpaceError, match="The states take"):
        world.train()
    assert not world.caches.exists()
