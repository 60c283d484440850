"""A new cache takes over states that older caches hold, and the model runs for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny_cache
from test_derive import LOOKS, assert_sound, slice_of, states_of
from world import World, change_a_weight, change_the_tokenizer, count_resource_batches

from kr2cache import FeatureCache
from kr2cache.cache.format import ranges
from kr2cache.store import takeover


def edit(world: World, number: int, word: str = "anders") -> None:
    """Replace the first word of one training sentence."""
    path = world.data / "train.conllu"
    sentences = path.read_text("utf-8").split("\n\n")
    lines = sentences[number].split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("1\t"))
    columns = lines[first].split("\t")
    columns[1] = word
    lines[first] = "\t".join(columns)
    sentences[number] = "\n".join(lines)
    path.write_text("\n\n".join(sentences), "utf-8")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_edited_text_is_all_that_runs_again(world: World, dtype: str) -> None:
    old = world.extract(dtype=dtype)
    before = states_of(FeatureCache.open(old.cache))
    files = tiny_cache.folder_bytes(old.cache)
    edit(world, 3)
    with count_resource_batches() as batches:
        new = world.extract(dtype=dtype)
    assert new.cache != old.cache
    assert (new.computed, new.taken_over) == (1, 11)
    assert batches[LOOKS:] == [1]
    after = states_of(FeatureCache.open(new.cache))
    changed = [
        name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()
    ]
    assert changed == ["train-s4"]
    alone = world.extract(dtype=dtype, cache_dir=world.folder / "other")
    expected = states_of(FeatureCache.open(alone.cache))
    tolerance = {"float16": 2e-3, "int8": 2e-2}[dtype]
    for name, states in expected.items():
        np.testing.assert_allclose(after[name], states, rtol=0, atol=tolerance * np.abs(states).max())
    assert tiny_cache.folder_bytes(old.cache) == files, "the old cache is not touched"
    assert_sound(FeatureCache.open(new.cache))
    assert world.extract(dtype=dtype).computed == 0


def test_added_examples_are_all_that_runs(world: World) -> None:
    world.extract(limit=7)
    new = world.extract()
    assert (new.computed, new.taken_over) == (5, 7)
    assert FeatureCache.open(new.cache).batch_plan["computed"] == [[7, 12]]


def test_fewer_layers_run_nothing_and_missing_layers_run_everything(world: World) -> None:
    world.extract(layers="last2")
    grown = world.extract(layers="all")
    assert (grown.computed, grown.taken_over) == (12, 0), "a forward pass gives every layer, or none"
    cut = world.extract(layers="1,4")
    assert (cut.computed, cut.taken_over) == (0, 12)
    whole, part = FeatureCache.open(grown.cache), FeatureCache.open(cut.cache)
    for name in whole.ids:
        np.testing.assert_array_equal(part[name], whole[name][[1, 4]])


def test_layers_come_together_from_several_caches(world: World) -> None:
    low, high = world.extract(layers="0,1,2"), world.extract(layers="last2")
    with count_resource_batches() as batches:
        joined = world.extract(layers="all")
    assert (joined.computed, joined.taken_over) == (0, 12)
    assert len(batches) <= LOOKS
    whole = FeatureCache.open(joined.cache)
    for name in whole.ids:
        parts = [FeatureCache.open(low.cache)[name], FeatureCache.open(high.cache)[name]]
        np.testing.assert_array_equal(whole[name], np.concatenate(parts))


def test_ids_that_moved_do_not_matter(world: World) -> None:
    """Without sent_id the number is the id: a sentence put in front shifts every one."""
    path = world.data / "train.conllu"
    lines = [line for line in path.read_text("utf-8").split("\n") if not line.startswith("# sent_id")]
    path.write_text("\n".join(lines), "utf-8")
    old = FeatureCache.open(world.extract().cache)
    path.write_text("1\tneu\tneu\tADJ\t_\t_\t0\troot\t_\t_\n\n" + "\n".join(lines), "utf-8")
    new = world.extract()
    assert (new.computed, new.taken_over) == (1, 12)
    cache = FeatureCache.open(new.cache)
    np.testing.assert_array_equal(cache["train-1"], old["train-0"])
    np.testing.assert_array_equal(cache["train-12"], old["train-11"])


def test_only_what_was_cut_off_differently_runs(world: World) -> None:
    long = FeatureCache.open(world.extract().cache)
    limit = int(np.sort(long.n_tokens)[-3])  # two sequences are longer than the third longest, unless equal
    shorter = world.extract(max_length=limit)
    assert shorter.computed == int((long.n_tokens > limit).sum()) > 0
    assert shorter.taken_over == 12 - shorter.computed


@pytest.mark.parametrize("change", [change_a_weight, change_the_tokenizer], ids=["weights", "tokenizer"])
def test_nothing_is_taken_from_another_model(world: World, change: Callable[[Path], None]) -> None:
    world.extract()
    change(world.resource)
    new = world.extract()
    if change is change_a_weight:
        assert (new.computed, new.taken_over) == (12, 0)
    else:  # equal tokens have equal states, whatever tokenizer gave them
        assert 0 < new.computed <= 12
    alone = FeatureCache.open(world.extract(cache_dir=world.folder / "other").cache)
    cache = FeatureCache.open(new.cache)
    for name in cache.ids:
        np.testing.assert_allclose(cache[name], alone[name], rtol=0, atol=2e-3 * np.abs(alone[name]).max())


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"compute_dtype": "bfloat16"}], ids=str)
def test_nothing_is_taken_from_states_of_another_precision(world: World, changes: dict[str, str]) -> None:
    world.extract()
    assert world.extract(**changes).taken_over == 0


def test_rounded_slices_and_damaged_sequences_are_not_taken_over(world: World) -> None:
    old = world.extract()
    slice_of(old, dtype="int8")
    assert world.extract(dtype="int8").taken_over == 0
    (shard,) = old.cache.glob("*.h5")
    content = bytearray(shard.read_bytes())
    content[tiny_cache.byte_offset(shard, "hidden")] ^= 64
    shard.write_bytes(content)
    edit(world, 5)
    new = world.extract()
    assert (new.computed, new.taken_over) == (2, 10)
    assert_sound(FeatureCache.open(new.cache))


def test_an_unfinished_cache_gives_what_it_has(world: World) -> None:
    old = world.extract()
    (shard,) = old.cache.glob("*.h5")
    with h5py.File(shard, "r+") as file:
        file["examples/complete"][:4] = 0
    edit(world, 11)
    new = world.extract()
    assert (new.computed, new.taken_over) == (5, 7)


def test_ranges_say_a_mask_and_back() -> None:
    for mask in ([], [True], [False], [True, False, True, True], [False, True, True, False, False, True]):
        array = np.array(mask, dtype=bool)
        assert takeover.as_mask(ranges(np.flatnonzero(array).tolist()), len(mask)).tolist() == mask
    assert ranges([4, 1, 2, 1]) == [[1, 3], [4, 5]]
    assert takeover.as_mask(None, 3).all()
