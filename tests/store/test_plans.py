"""A plan is taken from a cache only if nothing that decides its index changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xxhash
from world import World, change_the_tokenizer, read_only

from kr2cache.cache.format import SequenceIndex
from kr2cache.cache.reader import FeatureCache
from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.extraction import planning
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import ExtractPlan, plan_extraction
from kr2cache.models.registry import find_model
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.store import plans, provenance
from kr2cache.tasks import base, find_task
from kr2cache.tasks.piqa import Piqa
from kr2cache.tasks.udpos import UdPos


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LARGE", 1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each whole split that is tokenised."""
    calls: list[str] = []
    real = planning.tokenise

    def tokenise(*arguments: Any) -> Any:
        calls.append(arguments[3].name)
        return real(*arguments)

    monkeypatch.setattr(planning, "tokenise", tokenise)
    return calls


def settings(world: World, **changes: Any) -> ExtractConfig:
    own = {"resource": str(world.resource), "split": "train", "task": "udpos", "data": str(world.data)}
    return ExtractConfig(**(own | {"cache_dir": world.caches, "device": "cpu", "max_length": 24} | changes))  # type: ignore[arg-type]


def same_index(a: ExtractPlan, b: ExtractPlan) -> None:
    for field in dataclasses.fields(a.index):
        one, other = getattr(a.index, field.name), getattr(b.index, field.name)
        if one is None or other is None:
            assert one is other, field.name
        else:
            np.testing.assert_array_equal(one, other, strict=True)
    assert a.missing_words == b.missing_words


def test_the_same_extraction_does_not_tokenise_again(world: World, counted: list[str]) -> None:
    first = plan_extraction(settings(world))
    assert counted == ["udpos"]
    assert first.missing_words.total > 0, "some words have no states"
    cache = extract(first).cache
    again = plan_extraction(settings(world))
    assert counted == ["udpos"]
    same_index(again, first)
    result = extract(again)
    assert (result.cache, result.computed) == (cache, 0)


def test_a_cache_of_other_layers_and_dtype_has_the_same_plan(world: World, counted: list[str]) -> None:
    first = plan_extraction(settings(world))
    extract(first)
    other = plan_extraction(settings(world, layers="last4", dtype="float32"))
    assert len(counted) == 1
    same_index(other, first)
    folder = extract(other).cache
    shutil.rmtree(next(path for path in folder.parent.iterdir() if path != folder))
    same_index(plan_extraction(settings(world)), first)
    assert len(counted) == 1, "the second cache records the key too"


def test_several_shards_and_an_unfinished_cache_serve(world: World, counted: list[str]) -> None:
    config = settings(world, shard_gb=0.000002)
    first = plan_extraction(config)
    folder = extract(first).cache
    shards = sorted(folder.glob("*.h5"))
    assert len(shards) > 1
    same_index(plan_extraction(config), first)
    assert len(counted) == 1
    shards[-1].unlink()
    same_index(plan_extraction(config), first)
    assert len(counted) == 2, "a shard is missing"


def plan_files(world: World) -> list[Path]:
    return sorted(world.caches.rglob("plan-*"))


def test_before_there_is_a_cache_the_plan_is_in_a_file(world: World, counted: list[str]) -> None:
    first = plan_extraction(settings(world))
    assert len(plan_files(world)) == 1
    second = plan_extraction(settings(world, layers="last4"))
    assert len(counted) == 1
    same_index(second, first)
    assert second.recorded == first.recorded
    extract(second)
    assert plan_files(world) == [], "a cache holds it now"
    same_index(plan_extraction(settings(world)), first)
    assert len(counted) == 1
    assert [path.name for path in (world.caches / "udpos" / "train").iterdir() if "claims" in path.name] == []


def test_a_plan_that_a_cache_holds_is_removed(world: World, counted: list[str]) -> None:
    plan = plan_extraction(settings(world))
    (path,) = plan_files(world)
    kept = path.read_bytes()
    extract(plan)
    path.write_bytes(kept)
    plan_extraction(settings(world))
    assert plan_files(world) == []


def test_processes_that_start_together_tokenise_once(
    world: World, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = planning.tokenise

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(planning, "tokenise", slowly)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: plan_extraction(settings(world)), range(4)))
    assert len(counted) == 1
    for one in made[1:]:
        same_index(one, made[0])


@pytest.mark.parametrize("damage", ["cut", "changed", "other first"])
def test_a_damaged_plan_is_made_again(
    damage: str, world: World, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "changed":  # behind the first sequences
        monkeypatch.setattr(plans, "_begins_with", lambda *_: True)
    first = plan_extraction(settings(world))
    (path,) = plan_files(world)
    raw = path.read_bytes()
    if damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        arrays["input_id"][-1 if damage == "changed" else 1] += 1
        if damage == "other first":
            index = dataclasses.replace(first.index, input_id=arrays["input_id"])
            arrays["digest"] = np.array(plans._digest(index))
        np.savez(path, **arrays)
    same_index(plan_extraction(settings(world)), first)
    assert len(counted) == 2


def test_where_nothing_can_be_written_the_plan_is_not_shared(world: World, counted: list[str]) -> None:
    world.caches.mkdir()
    with read_only(world.caches):
        plan = plan_extraction(settings(world))
    assert len(plan.index) == 12
    assert list(world.caches.iterdir()) == []


def test_a_dry_run_writes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    options = ["--resource", str(world.resource), "--task", "udpos", "--data", str(world.data)]
    assert run(["extract", *options, "--cache-dir", str(world.caches), "--dry-run", "--json"]) == 0
    assert not world.caches.exists()


def test_the_digest_of_ids_and_texts_is_that_of_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    index = SequenceIndex(
        ids=np.array([b"a", b"longer", b"c"]),
        n_tokens=np.ones(3, dtype=np.int32),
        text_xxh3=np.array([1, 2**64 - 1, 3], dtype=np.uint64),
        input_id=np.ones(3, dtype=np.int32),
        word_index=np.ones(3, dtype=np.int32),
    )
    expected = xxhash.xxh3_128()
    for name, text in ((b"a", 1), (b"longer", 2**64 - 1), (b"c", 3)):
        expected.update(name + b"\0" + text.to_bytes(8, "little"))
    monkeypatch.setattr(provenance, "AT_ONCE", 2)
    assert provenance.texts_digest(index) == expected.hexdigest()


def touch_text(world: World) -> None:
    path = world.data / "train.conllu"
    text = path.read_text("utf-8")
    path.write_text(text[:-200] + text[-200:].replace("\t.\t", "\t!\t", 1), "utf-8")


def tokenizer_changes(world: World) -> None:
    change_the_tokenizer(world.resource)


def truncation_side_changes(world: World) -> None:
    path = world.resource / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "truncation_side": "left"}), "utf-8")


def segments_come(world: World) -> None:
    path = world.resource / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "type_vocab_size": 1}), "utf-8")


def a_file_is_renamed(world: World) -> None:
    (world.data / "train").mkdir()
    (world.data / "train.conllu").rename(world.data / "train" / "a.conllu")


def a_file_is_added(world: World) -> None:
    a_file_is_renamed(world)
    shutil.copy(world.data / "dev.conllu", world.data / "train" / "b.conllu")


CHANGES: list[Callable[[World], None]] = [
    touch_text,
    tokenizer_changes,
    truncation_side_changes,
    segments_come,
    a_file_is_renamed,
    a_file_is_added,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_data_or_tokenizer_is_seen(
    change: Callable[[World], None], world: World, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(plan_extraction(settings(world)))
    change(world)
    # The first sequences are not what finds it: the key is another.
    monkeypatch.setattr(plans, "_begins_with", lambda *_: True)
    assert plan_extraction(settings(world)).recorded
    assert len(counted) == 2


@pytest.mark.parametrize("changes", [{"limit": 11}, {"max_length": 23}, {"split": "dev"}, {"task": "udpos-de"}])
def test_another_setting_is_another_plan(changes: dict[str, Any], world: World, counted: list[str]) -> None:
    key = plan_extraction(settings(world)).recorded["plan"]["key"]
    assert plan_extraction(settings(world, **changes)).recorded["plan"]["key"] != key


def key_of(world: World, task: base.Task | None = None) -> str:
    task = task or find_task("udpos")
    tokenizer = load_tokenizer(find_model(str(world.resource), {}), words=task.words)
    source = plans.source_of(task, "train", str(world.data), limit=None, max_length=24, tokenizer=tokenizer)
    assert source is not None
    return source.key


def test_the_split_is_in_the_key_whatever_its_file_is_called(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences without an id are called SPLIT-N."""
    monkeypatch.setattr(UdPos, "source_files", lambda *_: {"file": world.data / "train.conllu"})
    task, tokenizer = find_task("udpos"), load_tokenizer(find_model(str(world.resource), {}), words=True)
    sources = [
        plans.source_of(task, split, str(world.data), limit=None, max_length=24, tokenizer=tokenizer)
        for split in ("train", "dev")
    ]
    assert len({source.key for source in sources if source is not None}) == 2


def test_code_versions_and_template_are_in_the_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(world)
    assert key_of(world) == key
    task = find_task("udpos")
    task.template = "words, backwards"
    keys = {key, key_of(world, task)}
    with monkeypatch.context() as patch:
        patch.setattr(plans, "version", lambda name: "0")
        keys.add(key_of(world))
    with monkeypatch.context() as patch:
        patch.setattr(plans.platform, "python_version", lambda: "3.99")
        keys.add(key_of(world))
    with monkeypatch.context() as patch:
        patch.setattr(plans, "_code_digest", lambda: "another line")
        keys.add(key_of(world))
    assert len(keys) == 5


def test_the_code_that_counts_is_all_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = plans._code_digest.__wrapped__
    copy = shutil.copytree(plans._package(), tmp_path / "kr2cache")
    monkeypatch.setattr(plans, "_package", lambda: copy)
    before = digest()
    assert before == plans._code_digest()
    path = copy / "tasks" / "udpos.py"
    path.write_text(path.read_text("utf-8") + "\n", "utf-8")
    assert digest() != before


def test_a_used_tokenizer_has_the_key_of_a_new_one(world: World) -> None:
    """Calling a fast tokenizer leaves the truncation in it."""
    task = find_task("udpos")
    tokenizer = load_tokenizer(find_model(str(world.resource), {}), words=True)
    state = plans._tokenizer_state(tokenizer)
    assert state is not None
    tokenizer([["das"]], is_split_into_words=True, truncation=True, max_length=7, padding=True)
    assert plans._tokenizer_state(tokenizer) == state
    assert task.words


def test_the_place_of_the_data_does_not_matter(world: World) -> None:
    key = key_of(world)
    world.data.rename(world.folder / "corpus2")
    moved = dataclasses.replace(world)
    (world.folder / "corpus2").rename(world.folder / "elsewhere")
    shutil.copytree(world.folder / "elsewhere", world.data)
    assert key_of(moved) == key


def test_data_that_changes_while_it_is_read_gets_no_key(
    world: World, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = UdPos.file_examples

    def changing(task: UdPos, path: Path, split: str) -> Iterator[base.Example]:
        yield from real(task, path, split)
        path.write_text(path.read_text("utf-8").replace("das", "dog"), "utf-8")

    with monkeypatch.context() as patch:
        patch.setattr(UdPos, "file_examples", changing)
        plan = plan_extraction(settings(world))
    assert plan.recorded == {}
    assert "plan" not in FeatureCache.open(extract(plan).cache).provenance["recorded"]


def test_a_cache_with_other_first_sequences_is_not_taken(
    world: World, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the key ever miss a cause: the first sequences are tokenised and compared."""
    monkeypatch.setattr(plans, "_tokenizer_state", lambda _: {"class": "the same"})
    extract(plan_extraction(settings(world)))
    change_the_tokenizer(world.resource)
    changed = plan_extraction(settings(world))
    assert len(counted) == 2
    monkeypatch.setattr(plans, "LARGE", 2**60)
    same_index(plan_extraction(settings(world)), changed)


def test_an_index_that_does_not_match_its_digest_is_not_taken(
    world: World, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan_extraction(settings(world))
    extract(first)
    real = FeatureCache.tokens

    def damaged(cache: FeatureCache) -> Any:
        index = real(cache)
        index.input_id[-1] ^= 1
        return index

    monkeypatch.setattr(FeatureCache, "tokens", damaged)
    monkeypatch.setattr(plans, "_begins_with", lambda *_: True)
    same_index(plan_extraction(settings(world)), first)
    assert len(counted) == 2


def test_small_data_gives_no_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LARGE", (world.data / "train.conllu").stat().st_size + 1)
    assert plan_extraction(settings(world)).recorded == {}
    monkeypatch.setattr(plans, "LARGE", (world.data / "train.conllu").stat().st_size)
    assert plan_extraction(settings(world)).recorded


def test_examples_of_the_caller_give_no_key(world: World) -> None:
    examples = find_task("udpos").read("train", str(world.data))
    assert plan_extraction(settings(world), examples).recorded == {}


class Elsewhere(UdPos):
    """A task whose class is not in the package: a change of its code would not be seen."""


def test_a_task_from_elsewhere_gives_no_key(world: World) -> None:
    tokenizer = load_tokenizer(find_model(str(world.resource), {}), words=True)
    for task, is_shared in ((UdPos(None), True), (Elsewhere(None), False)):
        source = plans.source_of(task, "train", str(world.data), limit=None, max_length=24, tokenizer=tokenizer)
        assert (source is not None) == is_shared


class OwnFiles(Piqa):
    def file_rows(self, path: Path, split: str) -> Any:
        return super().file_rows(path, split)

    beside = base.Task.beside


def test_the_files_of_a_split_are_all_or_unknown(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train-labels.lst", "dev.jsonl"):
        (tmp_path / name).write_text("", "utf-8")
    assert list(find_task("piqa").source_files("train", str(tmp_path)) or ()) == ["train.jsonl", "train-labels.lst"]
    assert list(find_task("piqa").source_files("dev", str(tmp_path)) or ()) == ["dev.jsonl"]
    assert list(find_task("snli").source_files("dev", str(tmp_path)) or ()) == ["dev.jsonl"]
    assert OwnFiles().source_files("train", str(tmp_path)) is None
    assert find_task("snli").source_files("train", None) is None, "the hub"
    assert plans._is_ours(Piqa)
    assert not plans._is_ours(OwnFiles)


def test_tokenizers_that_come_as_code_give_no_key(world: World) -> None:
    class Mine(type(tiny.tokenizer())):  # type: ignore[misc]
        pass

    tokenizer = tiny.tokenizer()
    assert plans._tokenizer_state(tokenizer) is not None
    tokenizer.__class__ = Mine
    assert plans._tokenizer_state(tokenizer) is None


@pytest.mark.parametrize(
    "stored", [None, 3, {}, {"plan": 3}, {"plan": {"key": "k"}}, {"plan": {"key": "k", "cut_off_words": "x"}}]
)
def test_what_another_program_recorded_is_no_plan(stored: Any) -> None:
    assert plans._missing_words({"recorded": stored}, "k") is None
