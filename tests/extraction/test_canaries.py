"""A cache that other versions made is compared with its model before it is used, and any cache on demand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertEncoder, BertModel
from world import World, count_resource_batches, world_of_pairs

from kr2cache import FeatureCache
from kr2cache.cache.shard import open_shard
from kr2cache.cache.writer import unmark
from kr2cache.cli import run
from kr2cache.errors import CacheMismatchError
from kr2cache.extraction import canaries
from kr2cache.extraction.canaries import LONGEST, choose
from kr2cache.extraction.repair import repair
from kr2cache.extraction.rerun import RerunConfig, open_same, plan_again
from kr2cache.models.registry import find_model
from kr2cache.store import provenance
from kr2cache.store.derive import derive, plan_fusion, plan_slice

SPLITS = ("train", "dev", "test")


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "_agreed", set())


@contextmanager
def versions(torch: str = "1.2.3", transformers: str = "2.0.0") -> Iterator[None]:
    """Caches that are made inside record these versions."""
    real = provenance.library_versions()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "library_versions", lambda: {**real, "torch": torch, "transformers": transformers})
        yield


@contextmanager
def other_states(share: float = 0.1) -> Iterator[None]:
    """Inside, every BERT computes otherwise: of its embeddings, each second number is larger by this share."""

    def change(module: torch.nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not isinstance(module, BertEncoder):
            return None
        embeddings, *rest = inputs
        factors = torch.ones(embeddings.shape[-1])
        factors[::2] += share
        return (embeddings * factors, *rest)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(change)
    try:
        yield
    finally:
        handle.remove()


def never_written(path: Path, sequences: Sequence[int]) -> None:
    """Leave these sequences of a shard without a checksum."""
    start = open_shard(path).array_offset("examples/xxh3")
    with path.open("r+b") as file:
        for sequence in sequences:
            file.seek(start + 8 * sequence)
            file.write(bytes(8))


# Which sequences -----------------------------------------------------------------------------------------------------


def test_the_shortest_a_middle_and_a_long_sequence_are_chosen() -> None:
    lengths = np.array([9, 4, LONGEST, 7, LONGEST + 1, 3, 8])
    everything = np.ones(len(lengths), dtype=bool)
    assert choose(lengths, everything).tolist() == [5, 3, 2]
    assert choose(lengths, lengths > 3).tolist() == [1, 6, 2]
    assert choose(lengths, lengths == 7).tolist() == [3]
    assert choose(lengths, lengths > LONGEST).tolist() == [4], "however long"


# Before a cache is used -----------------------------------------------------------------------------------------------


def test_training_compares_caches_of_other_versions_once(world: World) -> None:
    with versions():
        for split in SPLITS:
            world.extract(split)
    with other_states(), pytest.raises(CacheMismatchError) as refused:
        world.train(epochs=1.0)
    real = provenance.library_versions()
    assert "was made with torch 1.2.3 and transformers 2.0.0." in refused.value.message
    assert f"torch {real['torch']} and transformers {real['transformers']}, which run now" in refused.value.message
    assert "sequence 'train-s" in refused.value.message
    assert "Install torch 1.2.3 and transformers 2.0.0 again" in refused.value.remedy
    assert "kr2cache cache remove" in refused.value.remedy
    with count_resource_batches() as sizes:
        world.train(epochs=1.0)
        assert sizes == [3, 1, 1, 1] * len(SPLITS)
        world.train(epochs=1.0, fusion="all")
        assert len(sizes) == 4 * len(SPLITS), "once in a process"


def test_another_build_of_a_version_is_the_same_version() -> None:
    real = provenance.library_versions()
    public = real["torch"].partition("+")[0]
    same = {"torch": f"{public}+cu999", "transformers": real["transformers"]}
    assert not canaries.made_with_others({"recorded": {"versions": same}})
    assert canaries.made_with_others({"recorded": {"versions": {**same, "transformers": "2.0.0"}}})
    assert canaries.made_with_others({"recorded": {"versions": {**same, "torch": f"{public}.1"}}})
    assert not canaries.made_with_others({}), "unknown"


def test_without_the_weights_a_note_says_that_nothing_was_compared(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    with versions():
        for split in SPLITS:
            world.extract(split)
    shutil.rmtree(world.resource)
    world.train(resource="res", epochs=1.0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "was made with torch 1.2.3 and transformers 2.0.0. Without the weights of res it is not known" in shown


def test_an_extraction_does_not_continue_a_cache_of_other_states(world: World) -> None:
    with versions():
        folder = world.extract().cache
    (path,) = folder.glob("*.h5")
    whole = path.read_bytes()
    unmark(open_shard(path), [2, 5])
    with other_states(), pytest.raises(CacheMismatchError, match="give other states: sequence 'train-s"):
        world.extract()
    assert int((~FeatureCache.open(folder).complete).sum()) == 2
    world.extract()
    assert path.read_bytes() == whole


def test_states_of_other_versions_are_compared_before_they_are_copied(world: World) -> None:
    with versions():
        world.extract()
    assert world.extract(layers="last2").taken_over == 12


def test_states_that_were_written_and_not_marked_are_compared_before_more_are_added(world: World) -> None:
    """A killed process leaves them: nothing is complete, so there is nothing to compare before."""
    with versions():
        folder = world.extract().cache
    (path,) = folder.glob("*.h5")
    whole = path.read_bytes()
    unmark(open_shard(path), list(range(12)))
    never_written(path, [2, 5])
    with other_states(), pytest.raises(CacheMismatchError, match="give other states: sequence 'train-s"):
        world.extract()
    assert int((~FeatureCache.open(folder).complete).sum()) == 2
    assert world.extract().computed > 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("fault", ["other states", "damaged"])
def test_an_older_cache_that_disagrees_or_is_damaged_is_left_out(
    world: World, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    with versions():
        older = FeatureCache.open(world.extract().cache)
    if fault == "damaged":  # the shortest is compared
        (path,) = older.folder.glob("*.h5")
        shard, raw = open_shard(path), bytearray(path.read_bytes())
        row = int(shard.first_row[np.argmin(older.n_tokens)])
        raw[shard.array_offset("hidden") + row * older.width * 2] ^= 1
        path.write_bytes(raw)
    with other_states() if fault == "other states" else nullcontext():
        result = world.extract(layers="last2")
    assert (result.computed, result.taken_over) == (12, 0)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"No states are copied from {older.folder.name}: " in shown
    assert ("give other states" if fault == "other states" else "damaged") in shown


def test_it_is_left_out_of_an_extraction_that_continues(world: World) -> None:
    older = world.extract().cache
    begun = world.extract(layers="last2")
    assert (begun.computed, begun.taken_over) == (0, 12)
    (path,) = begun.cache.glob("*.h5")
    unmark(open_shard(path), [2, 5])
    never_written(path, [2, 5])
    shutil.rmtree(older)
    with versions(), other_states():
        assert world.extract().cache == older
    again = world.extract(layers="last2")
    assert (again.computed, again.taken_over) == (2, 0)


def test_a_repair_does_not_mix_states_of_other_versions(world: World) -> None:
    with versions():
        folder = world.extract().cache
    (path,) = folder.glob("*.h5")
    whole = path.read_bytes()
    position = open_shard(path).offset("hidden")
    assert position is not None
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    damaged = path.read_bytes()
    config = RerunConfig(folder=folder, resource=str(world.resource), device="cpu")
    with other_states(), pytest.raises(CacheMismatchError, match="give other states"):
        repair(config)
    assert path.read_bytes() == damaged
    repair(config)
    assert path.read_bytes() == whole


def test_a_repair_of_a_damaged_index_does_not_mix_them_either(world: World) -> None:
    with versions():
        folder = world.extract().cache
    (path,) = folder.glob("*.h5")
    whole = path.read_bytes()
    unmark(open_shard(path), [2, 5])
    never_written(path, [2, 5])
    raw, place = bytearray(path.read_bytes()), open_shard(path).array_offset("tokens/word_index")
    raw[place + 4 * 3] ^= 1
    path.write_bytes(raw)
    config = RerunConfig(folder=folder, resource=str(world.resource), data=str(world.data), device="cpu")
    with other_states(), pytest.raises(CacheMismatchError, match="give other states"):
        repair(config)
    assert int((~FeatureCache.open(folder).complete).sum()) == 2, "nothing was added"
    assert repair(config).computed > 0
    assert path.read_bytes() == whole


# On demand ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bert: Path, corpus: Path) -> World:
    folder = tmp_path_factory.mktemp("canaries")
    shutil.copytree(bert, folder / "models" / "res")
    shutil.copytree(corpus, folder / "corpus")
    return World(folder)


CACHES: dict[str, tuple[dict[str, Any], dict[str, Any] | str | None, float]] = {
    "float32": ({"dtype": "float32"}, None, 1e-3),
    "float16": ({}, None, 1e-2),
    "bfloat16": ({"dtype": "bfloat16"}, None, 0.05),
    "int8": ({"dtype": "int8"}, None, 0.05),
    "layers": ({}, {"layers": "2,4"}, 0.05),
    "sequences": ({}, {"limit": 3}, 1e-2),
    "rounded again": ({}, {"dtype": "int8"}, 0.05),
    "fused": ({}, "last4", 0.05),
    "fused and rounded": ({"dtype": "float32"}, "all", 0.05),
    "computed in bfloat16": ({"compute_dtype": "bfloat16"}, None, 0.3),
}
"""Settings of an extraction, what is derived from it, and a change of the model that is more than rounding."""


@pytest.mark.parametrize("name", CACHES)
def test_verify_compares_any_cache_with_its_model(
    place: World, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, derived, change = CACHES[name]
    folder = place.extract(tokens_per_batch=60, cache_dir=tmp_path, **settings).cache
    if isinstance(derived, str):
        dtype = "int8" if name == "fused and rounded" else None
        folder = derive(plan_fusion(FeatureCache.open(folder), derived, dtype=dtype)).cache
    elif derived is not None:
        folder = derive(plan_slice(FeatureCache.open(folder), **derived)).cache
    line = ["cache", "verify", str(folder), "--against-model", "--resource", str(place.resource), "--device", "cpu"]
    capsys.readouterr()
    assert run([*line, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"]
    assert shown["caches"][0]["model"]["agrees"]
    assert len(shown["caches"][0]["model"]["sequences"]) == 3
    assert all(0 <= one["difference"] <= one["allowed"] for one in shown["caches"][0]["model"]["sequences"])
    with other_states(change):
        assert run([*line, "--json"]) == 1
        shown = json.loads(capsys.readouterr().out)
        assert not shown["ok"]
        wrong = [one for one in shown["caches"][0]["model"]["sequences"] if not one["agrees"]]
        assert all(one["difference"] > one["allowed"] for one in wrong)
        assert run(line) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"sequence '{wrong[0]['id']}' ({wrong[0]['tokens']} tokens) differs by {wrong[0]['difference']:.3g}" in text
    assert f"torch {torch.__version__}" in text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_form_of_an_activation_is_found(place: World, tmp_path: Path, dtype: str) -> None:
    """GELU by the hyperbolic tangent instead of the error function, as another version could compute it."""
    model = tiny.save_model(tmp_path / "model", layers=4, initializer_range=0.4)
    folder = place.extract(resource=str(model), cache_dir=tmp_path, dtype=dtype).cache
    config = RerunConfig(folder=folder, resource=str(model), device="cpu")
    assert all(one.agrees for one in canaries.canaries(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GELUActivation, "forward", lambda self, x: torch.nn.functional.gelu(x, approximate="tanh"))
        assert not any(one.agrees for one in canaries.canaries(config))


def test_one_number_that_moves_is_found_as_well_as_all(place: World, tmp_path: Path) -> None:
    cache = FeatureCache.open(place.extract(cache_dir=tmp_path).cache)
    plan = plan_again(
        cache,
        cache.folder,
        cache.tokens().select(np.array([0])),
        find_model(str(place.resource), {}),
        tiny.tokenizer(),
        device="cpu",
        device_map=None,
        models={},
    )
    encoder = open_same(plan, provenance.found_of(cache.provenance, cache.folder), cache.folder).encoder
    stored = cache.states(0)
    for places, by, measure in ((np.s_[2, 1, 3], 0.02, "largest"), (np.s_[2], 0.001, "root mean square")):
        changed = stored.copy()
        changed[places] += np.float16(by)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureCache, "states", lambda self, position, changed=changed: changed)
            (one,) = canaries.compare(cache, np.array([0]), plan, encoder)
        assert (one.agrees, one.layer, one.measure) == (False, 2, measure)


def test_verify_reads_the_segments_of_pairs_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = world_of_pairs(tmp_path)
    whole = FeatureCache.open(pairs.extract(task="snli").cache)
    folder = derive(plan_slice(whole, ids=["p3", "p8", "p15", "p19"])).cache
    line = ["cache", "verify", str(folder), "--against-model", "--resource", str(pairs.resource), "--device", "cpu"]
    assert run([*line, "--data", str(pairs.data)]) == 0
    rows = (pairs.data / "train.jsonl").read_text("utf-8").replace("das", "haus")
    (pairs.data / "train.jsonl").write_text(rows, "utf-8")
    capsys.readouterr()
    assert run([*line, "--data", str(pairs.data), "--json"]) == 1
    assert "made from data with other texts" in json.loads(capsys.readouterr().out)["caches"][0]["model"]["why"]


def test_what_padding_moves_counts_for_the_longest_canary_too(
    place: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding may move float32 states by up to a thousandth. The longest canary was padded in its batch: that had a
    sequence that is too long to be one."""

    whole, layers, padded = BertModel.forward, BertEncoder.forward, list[torch.Tensor]()

    def noting(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> Any:
        padded[:] = [(attention_mask == 0).any(dim=1)[:, None, None]]
        return whole(self, input_ids, attention_mask=attention_mask, **more)

    def moved(self: Any, states: torch.Tensor, *others: Any, **more: Any) -> Any:
        return layers(self, states * (1 + 5e-4 * padded[0]), *others, **more)

    monkeypatch.setattr(canaries, "LONGEST", 9)
    monkeypatch.setattr(BertModel, "forward", noting)
    monkeypatch.setattr(BertEncoder, "forward", moved)
    folder = place.extract(cache_dir=tmp_path, dtype="float32").cache
    assert FeatureCache.open(folder).batch_plan["padded"]
    config = RerunConfig(folder=folder, resource=str(place.resource), device="cpu")
    assert [one.agrees for one in canaries.canaries(config)] == [True] * 3


def test_too_little_memory_for_the_comparison_is_explained(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.extract().cache

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(BertEncoder, "forward", full)
    capsys.readouterr()
    line = ["cache", "verify", str(folder), "--against-model", "--resource", str(world.resource), "--device", "cpu"]
    assert run([*line, "--json"]) == 1
    why = json.loads(capsys.readouterr().out)["caches"][0]["model"]["why"]
    assert "tokens, does not fit into the memory of cpu together with res." in why


def test_a_disk_that_cannot_be_read_is_no_fault_of_the_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.extract().cache

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr(FeatureCache, "states", failing)
    with pytest.raises(OSError, match="Input/output error"):
        canaries.canaries(RerunConfig(folder=folder, resource=str(world.resource), device="cpu"))


def test_verify_says_why_it_cannot_compare(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world.extract().cache
    capsys.readouterr()
    assert run(["cache", "verify", str(folder), "--against-model", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["caches"][0]["model"]["agrees"] is None
    assert "made with the model 'res', which is not registered. Give --resource" in " ".join(captured.err.split())
    assert run(["cache", "verify", str(folder), "--resource", str(world.resource)]) == 1
    assert "Give --against-model too" in capsys.readouterr().err
