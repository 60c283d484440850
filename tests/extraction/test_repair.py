"""A damaged cache becomes, byte for byte, the one it was, and the model runs for nothing but what was damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny
from safetensors.torch import load_file, save_file
from world import World, world_of_pairs

from kr2cache import FeatureCache
from kr2cache.cache.check import check_cache
from kr2cache.cache.dtypes import DTYPES
from kr2cache.cli import run
from kr2cache.errors import BusyError, CacheError, CacheMismatchError, CacheVersionError, ConfigError
from kr2cache.extraction import repair as repairs
from kr2cache.extraction import trial
from kr2cache.extraction.repair import RepairResult, repair
from kr2cache.extraction.rerun import RerunConfig
from kr2cache.models.encode import length_sorted_batches
from kr2cache.store.derive import derive, plan_fusion, plan_slice
from kr2cache.store.provenance import contradictions
from kr2cache.system import claims

Batch = tuple[int, ...]
"""Positions of the sequences that run together, over all shards."""
HIDDEN_STATES = trial.hidden_states
SHARD_BYTES = {"float16": 26_000, "float32": 52_000, "bfloat16": 26_000, "int8": 16_000}
"""Cut the corpus into about four shards."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> World:
    """A resource, and a corpus of 30 sentences. Read only."""
    folder = tmp_path_factory.mktemp("repair")
    shutil.copytree(bert, folder / "models" / "res")
    tiny.save_corpus(folder / "corpus", train=30)
    return World(folder)


Original = Callable[..., Path]


@pytest.fixture(scope="module")
def original(place: World) -> Original:
    """A good cache of these settings, extracted once. Read only: ``copied`` gives one to damage."""
    made: dict[str, Path] = {}

    def find(dtype: str = "float16", *, several: bool = False, **settings: Any) -> Path:
        key = f"{dtype}-{several}-{sorted(settings.items())}"
        if key not in made:
            shard_gb = SHARD_BYTES[dtype] / 2**30 if several else 1.0
            with pytest.MonkeyPatch.context() as patch:  # ``ran`` is of what comes later
                patch.setattr(trial, "hidden_states", HIDDEN_STATES)
                made[key] = place.extract(
                    dtype=dtype,
                    tokens_per_batch=60,
                    shard_gb=shard_gb,
                    cache_dir=place.folder / f"caches-{len(made)}",
                    **settings,
                ).cache
        assert (len(shards(made[key])) >= 3) is several
        return made[key]

    return find


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that went through the model since the test began."""
    batches: list[Batch] = []

    def recording(encoder: Any, index: Any, sequences: Sequence[int], **settings: Any) -> Any:
        batches.append(tuple(int(i) for i in sequences))
        return HIDDEN_STATES(encoder, index, sequences, **settings)

    monkeypatch.setattr(trial, "hidden_states", recording)
    monkeypatch.setattr(trial, "depends_on_history", lambda *_: None)  # its batches are not planned ones
    return batches


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.h5"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def copied(cache: Path, tmp_path: Path) -> Path:
    """A copy to damage, as deep below its own cache folder."""
    return Path(shutil.copytree(cache, tmp_path.joinpath("cache", *cache.parts[-3:])))


def mend(folder: Path, place: World, **changes: Any) -> RepairResult:
    settings: dict[str, Any] = {"resource": str(place.resource), "data": str(place.data), "device": "cpu"}
    return repair(RerunConfig(folder=folder, **(settings | changes)))


def flip(path: Path, *offsets: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= bit
    path.write_bytes(content)


def begins(path: Path, name: str) -> int:
    """Where a data set begins, from HDF5."""
    with h5py.File(path, "r") as file:
        dataset = file[name]
        found: int = dataset.id.get_chunk_info(0).byte_offset if dataset.chunks else dataset.id.get_offset()
    return found


def needed_by(path: Path, first: int = 0) -> dict[int, int]:
    """For every byte without which a sequence is computed again: its position; the shard's begin at ``first``. (Not its
    mark: states that match their checksum are kept.)
    """
    with h5py.File(path, "r") as file:
        rows, tokens = file["examples/first_row"][...], file["examples/n_tokens"][...]
        width = file["hidden"].dtype.itemsize * file["hidden"].shape[1]
        id_bytes, scales = file["examples/id"].dtype.itemsize, "hidden_scale" in file
    token = np.concatenate([[0], np.cumsum(tokens)])
    places = {"hidden": rows * width, "tokens/input_id": 4 * token}
    count = np.arange(len(tokens) + 1)
    places |= {"examples/xxh3": 8 * count, "examples/id": id_bytes * count}
    if scales:
        places["hidden_scale"] = 4 * rows
    needed = {}
    for name, cuts in places.items():
        at = begins(path, name)
        for i, (start, stop) in enumerate(pairwise(cuts.tolist())):
            needed.update(dict.fromkeys(range(at + start, at + stop), first + i))
    return needed


def planned(folder: Path) -> list[Batch]:
    """The batches of the stored plan, from plain h5py."""
    batches: list[Batch] = []
    first = 0
    for path in shards(folder):
        with h5py.File(path, "r") as file:
            plan, tokens = json.loads(file.attrs["batch_plan"]), file["examples/n_tokens"][...]
        ranges = plan.get("computed", [[0, 10**9]])
        members = np.array(
            [i for i in range(len(tokens)) if any(start <= first + i < stop for start, stop in ranges)], dtype=int
        )
        for batch in length_sorted_batches(tokens[members], plan["tokens_per_batch"], padded=plan["padded"]):
            batches.append(tuple((first + members[batch]).tolist()))
        first += len(tokens)
    return batches


def holding(batches: Iterable[Batch], positions: Iterable[int]) -> list[Batch]:
    wanted = set(positions)
    return sorted(batch for batch in batches if wanted & set(batch))


def is_whole(folder: Path) -> bool:
    """As ``kr2cache cache verify`` decides."""
    found = check_cache(folder)
    return found.intact and not found.incomplete_ids and not contradictions(FeatureCache.open(folder))


# Anything, anywhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one-shard", "several-shards"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_damage_is_mended_and_only_its_batches_run(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, dtype: str, several: bool
) -> None:
    good = original(dtype, several=several)
    before, batches = contents(good), planned(good)
    folder = copied(good, tmp_path)
    ids = FeatureCache.open(good).ids
    draw = random.Random(f"{dtype} {several}")
    needed: dict[tuple[str, int], int] = {}
    first = 0
    for path in shards(good):
        needed |= {(path.name, offset): i for offset, i in needed_by(path, first).items()}
        with h5py.File(path, "r") as file:
            first += len(file["examples/id"])
    kinds = {"few": 0, "rebuilt": 0}
    for number in range(9):
        # At most one flip outside what is counted by sequence: two could destroy both copies of the attributes.
        flips = draw.sample(sorted(needed), draw.randint(0, 3))
        if number % 3 or not flips:
            name = draw.choice(sorted(before))
            flips.append((name, draw.randrange(len(before[name]))))
        for name, offset in flips:
            flip(folder / name, offset, bit=1 << draw.randrange(8))
        lost = {needed[place_] for place_ in flips if place_ in needed}
        ran.clear()
        result = mend(folder, place)
        assert contents(folder) == before, flips
        assert sorted(ran) == holding(batches, lost), flips
        assert result.computed == sum(map(len, ran)) < len(ids)
        assert result.taken_over == 0
        assert set(result.damaged) <= {ids[i] for i in lost}
        assert result.rebuilt or set(result.damaged) == {ids[i] for i in lost}
        assert result.rebuilt or result.damaged
        kinds["few"] += 0 < len(ran) < len(batches)
        kinds["rebuilt"] += bool(result.rebuilt)
    assert min(kinds.values()) >= 2, "a test that runs everything again, or rebuilds nothing, proves little"


def test_the_batches_of_one_damaged_sequence_are_few(original: Original) -> None:
    """What the tests of this file count with: many batches, of several sequences."""
    for several in (False, True):
        batches = planned(original(several=several))
        assert sorted(i for batch in batches for i in batch) == list(range(30))
        assert len(batches) >= 5
        assert max(map(len, batches)) >= 3


# Structure and index -------------------------------------------------------------------------------------------------

INDEX = ("examples/id", "examples/first_row", "examples/n_tokens", "examples/text_xxh3", "tokens/input_id")


@pytest.mark.parametrize("name", [*INDEX, "tokens/word_index"])
@pytest.mark.parametrize("several", [False, True], ids=["one-shard", "several-shards"])
def test_a_damaged_index_is_made_again_from_the_data(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, name: str, several: bool
) -> None:
    good = original(several=several)
    folder = copied(good, tmp_path)
    path = shards(folder)[-1]
    needed = needed_by(path)  # positions within the last shard
    flips = [begins(path, name) + 9, begins(path, "hidden") + 5]
    flip(path, *flips)
    result = mend(folder, place)
    assert contents(folder) == contents(good)
    assert result.rebuilt == [path.name]
    with h5py.File(shards(good)[-1], "r") as file:
        first = 30 - len(file["examples/id"])
    assert sorted(ran) == holding(planned(good), {first + needed[at] for at in flips if at in needed})


def test_a_damaged_index_without_the_data_is_refused(original: Original, place: World, tmp_path: Path) -> None:
    folder = copied(original(), tmp_path)
    flip(shards(folder)[0], begins(shards(folder)[0], "tokens/word_index"))
    before = contents(folder)
    tiny.save_corpus(tmp_path / "other", train=29)
    with pytest.raises(CacheMismatchError, match=r"was made from data with other texts") as caught:
        mend(folder, place, data=str(tmp_path / "other"))
    assert "--data" in caught.value.remedy
    assert contents(folder) == before


def test_damaged_states_need_no_data(original: Original, place: World, ran: list[Batch], tmp_path: Path) -> None:
    good = original()
    folder = copied(good, tmp_path)
    flip(shards(folder)[0], begins(shards(folder)[0], "hidden"))
    result = mend(folder, place, data=str(tmp_path / "nowhere"))
    assert contents(folder) == contents(good)
    assert result.damaged == [FeatureCache.open(good).ids[0]]
    assert ran == holding(planned(good), {0})


def test_marks_that_are_no_marks_are_mended(original: Original, place: World, ran: list[Batch], tmp_path: Path) -> None:
    good = original()
    folder = copied(good, tmp_path)
    at = begins(shards(folder)[0], "examples/complete")
    flip(shards(folder)[0], at + 3, bit=1)  # not complete
    flip(shards(folder)[0], at + 4, bit=3)  # 2
    result = mend(folder, place)
    ids = FeatureCache.open(good).ids
    assert sorted(result.damaged) == sorted([ids[3], ids[4]])
    assert contents(folder) == contents(good)
    assert ran == [], "their states are intact"


def test_a_repair_that_was_stopped_removes_no_mark_of_its_successor(
    original: Original, place: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after its check. Meanwhile another process takes the shard over, mends it and completes it."""
    good = original()
    folder = copied(good, tmp_path)
    flip(shards(folder)[0], begins(shards(folder)[0], "hidden"))
    found = check_cache

    def stopped_afterwards(folder: Path) -> Any:
        damaged = found(folder)
        with monkeypatch.context() as later:
            later.setattr(repairs, "check_cache", found)
            later.setattr(claims, "TIMEOUT_S", -1.0)  # the first process is silent
            mend(folder, place)
        return damaged

    monkeypatch.setattr(repairs, "check_cache", stopped_afterwards)
    with pytest.raises(BusyError, match="Another process took over"):
        mend(folder, place)
    assert contents(folder) == contents(good)


HEADERS = {
    "the signature": lambda path: range(8),
    "the superblock": lambda path: range(12, 44),
    "the root": lambda path: range(4096, 4500),
    "the attributes' heap": lambda path: [path.read_bytes().index(b'"chosen"') + 3],
    "the copy of the attributes": lambda path: [path.read_bytes().rindex(b'"provenance"') + 3],
    "the last bytes": lambda path: range(path.stat().st_size - 8, path.stat().st_size),
    "its own checksum": lambda path: range(path.stat().st_size - 16, path.stat().st_size - 8),
    "the first page": lambda path: range(4096),
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("several", [False, True], ids=["one-shard", "several-shards"])
def test_a_damaged_header_is_made_again_without_the_model(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, what: str, several: bool
) -> None:
    good = original(several=several)
    folder = copied(good, tmp_path)
    path = shards(folder)[0]
    flip(path, *HEADERS[what](path), bit=0x15)
    assert not is_whole_or_refused(folder)
    result = mend(folder, place)
    assert contents(folder) == contents(good)
    assert (result.rebuilt, result.computed, ran) == ([path.name], 0, [])


def is_whole_or_refused(folder: Path) -> bool:
    try:
        return is_whole(folder)
    except CacheError:
        return False


@pytest.mark.parametrize("what", HEADERS)
def test_extraction_mends_a_destroyed_header_too(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, what: str
) -> None:
    """What opening refuses, extraction makes again; what only ``verify`` sees, it leaves to ``repair``."""
    good = original()
    folder = copied(good, tmp_path)
    path = shards(folder)[0]
    flip(path, *HEADERS[what](path), bit=0x15)
    damaged = contents(folder)
    try:
        refused = not FeatureCache.open(folder).complete.all()
    except CacheError:
        refused = True
    result = place.extract(tokens_per_batch=60, cache_dir=folder.parent.parent.parent)
    assert result.cache == folder
    assert contents(folder) == (contents(good) if refused else damaged)
    assert (result.computed, ran) == (0, [])
    assert refused or what in ("the copy of the attributes", "its own checksum")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_shard_is_filled_up(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, share: float
) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    path = shards(folder)[1]
    length = int(share * path.stat().st_size)
    needed = needed_by(path, sequences_of(good)[1].start)
    os.truncate(path, length)
    result = mend(folder, place)
    assert contents(folder) == contents(good)
    assert result.rebuilt == [path.name]
    lost = {i for offset, i in needed.items() if offset >= length}
    assert sorted(ran) == holding(planned(good), lost)


def test_a_shard_that_says_nothing_of_itself_is_computed_again(
    original: Original, place: World, ran: list[Batch], tmp_path: Path
) -> None:
    """Both copies of its attributes are damaged: whose states it holds is not known."""
    good = original(several=True)
    folder = copied(good, tmp_path)
    path = shards(folder)[0]
    flip(path, *HEADERS["the root"](path), *HEADERS["the copy of the attributes"](path))
    result = mend(folder, place)
    assert contents(folder) == contents(good)
    assert result.rebuilt == [path.name]
    assert sorted(ran) == holding(planned(good), sequences_of(good)[0])


def sequences_of(folder: Path) -> list[range]:
    """Positions by shard."""
    counts = [0]
    for path in shards(folder):
        with h5py.File(path, "r") as file:
            counts.append(counts[-1] + len(file["examples/id"]))
    return [range(start, stop) for start, stop in pairwise(counts)]


def test_the_only_shard_without_a_header_is_refused_and_extraction_mends_it(
    original: Original, place: World, tmp_path: Path
) -> None:
    good = original()
    folder = copied(good, tmp_path)
    os.truncate(shards(folder)[0], 0)
    with pytest.raises(CacheError, match=r"No shard of .* records what it was made from") as caught:
        mend(folder, place)
    assert "kr2cache extract" in caught.value.remedy
    assert contents(folder) == {shards(folder)[0].name: b""}
    place.extract(tokens_per_batch=60, shard_gb=1.0, cache_dir=folder.parent.parent.parent)
    assert contents(folder) == contents(good)


@pytest.mark.parametrize("missing", [(0,), (1,), (-1,), (0, 1)], ids=str)
def test_a_missing_shard_is_computed_again(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, missing: tuple[int, ...]
) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    for number in missing:
        (folder / shards(good)[number].name).unlink()
    mend(folder, place)
    assert contents(folder) == contents(good)
    lost = {i for number in missing for i in sequences_of(good)[number]}
    assert sorted(ran) == holding(planned(good), lost)


def test_two_damaged_shards(original: Original, place: World, ran: list[Batch], tmp_path: Path) -> None:
    """One with damaged states and one cut off, beside sound ones."""
    good = original(several=True)
    folder = copied(good, tmp_path)
    first, second, *_ = shards(folder)
    needed = needed_by(second, sequences_of(good)[1].start)
    flip(first, begins(first, "hidden") + 7)
    length = begins(second, "hidden") + 50
    os.truncate(second, length)
    untouched = {path: path.stat().st_mtime_ns for path in shards(folder)[2:]}
    result = mend(folder, place)
    assert contents(folder) == contents(good)
    assert result.rebuilt == [second.name]
    lost = {0} | {i for offset, i in needed.items() if offset >= length}
    assert sorted(ran) == holding(planned(good), lost)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_shard_replaced_by_another_of_its_own_cache(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, number: int
) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    shutil.copy(shards(folder)[number - 1], shards(folder)[number])
    assert not is_whole_or_refused(folder)
    mend(folder, place)
    assert contents(folder) == contents(good)
    assert sorted(ran) == holding(planned(good), sequences_of(good)[number])


def test_two_shards_that_changed_places(original: Original, place: World, tmp_path: Path) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    first, second, *_ = shards(folder)
    second.rename(folder / "aside")
    first.rename(second)
    (folder / "aside").rename(first)
    assert not is_whole_or_refused(folder)
    mend(folder, place)
    assert contents(folder) == contents(good)


@pytest.fixture(scope="module")
def foreign(place: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of the same data in as many shards: by a model with other weights, and by the same one. Read only."""
    folder = tmp_path_factory.mktemp("foreign")
    tiny.save_model(folder / "models" / "res", layers=4, seed=9)
    others = {
        "other weights": {"resource": str(folder / "models" / "res"), "dtype": "float16"},
        "other dtype": {"dtype": "float32"},
    }
    return {
        name: place.extract(
            tokens_per_batch=60,
            shard_gb=SHARD_BYTES[str(settings["dtype"])] / 2**30,
            cache_dir=folder / name,
            **settings,
        ).cache
        for name, settings in others.items()
    }


@pytest.mark.parametrize("other", ["other weights", "other dtype"])
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_shard_of_another_cache_is_made_again(
    original: Original,
    place: World,
    foreign: dict[str, Path],
    ran: list[Batch],
    tmp_path: Path,
    number: int,
    other: str,
) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    assert len(shards(foreign[other])) == len(shards(folder))
    shutil.copy(shards(foreign[other])[number], shards(folder)[number])
    mend(folder, place)
    assert contents(folder) == contents(good)
    assert sorted(ran) == holding(planned(good), sequences_of(good)[number])


def test_a_file_too_many_is_refused(original: Original, place: World, tmp_path: Path) -> None:
    folder = copied(original(several=True), tmp_path)
    shutil.copy(shards(folder)[0], folder / "other.h5")
    before = contents(folder)
    with pytest.raises(CacheError, match="should hold"):
        mend(folder, place)
    assert contents(folder) == before


def test_the_index_of_the_first_examples_alone_is_made_again(
    original: Original, place: World, ran: list[Batch], tmp_path: Path
) -> None:
    """The cache is of a ``--limit``, the data holds more."""
    good = original(limit=11)
    folder = copied(good, tmp_path)
    flip(shards(folder)[0], begins(shards(folder)[0], "examples/text_xxh3"))
    mend(folder, place)
    assert (contents(folder), ran) == (contents(good), [])


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize("compression", ["gzip", None])
def test_a_file_that_another_tool_rewrote(
    original: Original, place: World, tmp_path: Path, compression: str | None
) -> None:
    """Where its arrays are plain it is mended in place, else refused as it is."""
    good = original()
    folder = copied(good, tmp_path)
    (path,) = shards(folder)
    with h5py.File(shards(good)[0], "r") as old, h5py.File(path, "w") as new:
        new.attrs.update(old.attrs)
        for group in ("", "examples/", "tokens/"):
            for name, item in old[group or "/"].items():
                if isinstance(item, h5py.Dataset):
                    new.create_dataset(group + name, data=item[...], dtype=item.dtype, compression=compression)
        new["hidden"][0, 0] += 1
    before = contents(folder)
    if compression:
        with pytest.raises(CacheError, match="was rewritten by another tool"):
            mend(folder, place)
        assert contents(folder) == before
        return
    mend(folder, place)
    assert is_whole(folder)
    mended = FeatureCache.open(folder)  # once: each time a process of its own looks at such a file
    for name, states in everything(good).items():
        np.testing.assert_array_equal(mended[name], states)


# Nothing to mend, and what was interrupted ---------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one-shard", "several-shards"])
def test_nothing_to_mend_changes_nothing(
    original: Original, place: World, ran: list[Batch], tmp_path: Path, several: bool
) -> None:
    good = original(several=several)
    folder = copied(good, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shards(folder)}
    result = mend(folder, place, resource=str(tmp_path / "no-model"), data=str(tmp_path / "no-data"))
    assert (result.damaged, result.rebuilt, result.computed, result.taken_over) == ([], [], 0, 0)
    assert {path: path.stat().st_mtime_ns for path in shards(folder)} == before
    assert contents(folder) == contents(good)
    assert ran == []


def test_an_interrupted_extraction_is_completed(
    original: Original, place: World, ran: list[Batch], tmp_path: Path
) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    batches = planned(good)
    lost = [*batches[1], *batches[-1]]
    for path, positions in zip(shards(folder), sequences_of(good), strict=True):
        with h5py.File(path, "r") as file:
            digests, marks = begins(path, "examples/xxh3"), begins(path, "examples/complete")
            assert file["examples/complete"][...].all()
        content = bytearray(path.read_bytes())
        for local, i in enumerate(positions):
            if i in lost:
                content[marks + local] = 0
                content[digests + 8 * local : digests + 8 * local + 8] = bytes(8)
        path.write_bytes(content)
    result = mend(folder, place)
    assert contents(folder) == contents(good)
    assert sorted(ran) == sorted([batches[1], batches[-1]])
    assert (len(result.damaged), result.computed) == (len(lost), len(lost))


# Refused -------------------------------------------------------------------------------------------------------------


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"hidden_act": "relu"}), "utf-8")


@pytest.mark.parametrize(("name", "change"), [("weights", other_weights), ("config", other_config)])
@pytest.mark.parametrize("what", ["states", "header"])
def test_another_model_is_refused_by_name(
    original: Original,
    place: World,
    tmp_path: Path,
    ran: list[Batch],
    name: str,
    change: Callable[[Path], None],
    what: str,
) -> None:
    """What is sound stays as it is; what was damaged is not taken for sound."""
    good = original()
    folder = copied(good, tmp_path)
    model = Path(shutil.copytree(place.resource, tmp_path / "models" / "res"))
    change(model)
    path = shards(folder)[0]
    flip(path, begins(path, "hidden") if what == "states" else 4200)
    before = contents(folder)[path.name]
    with pytest.raises(CacheMismatchError, match=f"was made with other {name} of res") as caught:
        mend(folder, place, resource=str(model))
    assert "--resource" in caught.value.remedy
    after = contents(folder)[path.name]
    mark = begins(shards(good)[0], "examples/complete")
    assert [at for at in range(len(before)) if before[at] != after[at]] in ([], [mark])
    assert ran == []
    if what == "states":
        found = check_cache(folder)
        ids = FeatureCache.open(good).ids
        assert found.damaged_ids + found.incomplete_ids == [ids[0]]
    mend(folder, place)
    assert contents(folder) == contents(good)


def test_a_model_without_a_registered_name_has_to_be_given(original: Original, place: World, tmp_path: Path) -> None:
    folder = copied(original(), tmp_path)
    flip(shards(folder)[0], begins(shards(folder)[0], "hidden"))
    before = contents(folder)
    with pytest.raises(ConfigError, match="was made with the model 'res', which is not registered") as caught:
        mend(folder, place, resource=None)
    assert "--resource" in caught.value.remedy
    assert contents(folder) == before
    mend(folder, place, resource=None, models={"res": {"path": str(place.resource)}})
    assert contents(folder) == contents(original())


@pytest.mark.parametrize("how", ["extract", "repair"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_shard_of_a_later_version_is_never_overwritten(
    original: Original, place: World, tmp_path: Path, how: str, number: int
) -> None:
    good = original(several=True)
    folder = copied(good, tmp_path)
    path = shards(folder)[number]
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = np.int64(2)
    other = shards(folder)[1 - number]
    flip(other, begins(other, "hidden"))
    later = path.read_bytes()
    with pytest.raises(CacheVersionError, match=f"{path} has format version 2; this kr2cache reads version 1"):
        if how == "repair":
            mend(folder, place)
        else:
            place.extract(
                tokens_per_batch=60,
                shard_gb=SHARD_BYTES["float16"] / 2**30,
                cache_dir=folder.parent.parent.parent,
            )
    assert path.read_bytes() == later
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_later_version_beside_a_missing_shard_is_never_overwritten(
    original: Original, place: World, tmp_path: Path, number: int
) -> None:
    folder = copied(original(several=True), tmp_path)
    path = shards(folder)[number]
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = np.int64(2)
    shards(folder)[1 - number].unlink()
    later = path.read_bytes()
    for do in (
        lambda: mend(folder, place),
        lambda: place.extract(
            tokens_per_batch=60, shard_gb=SHARD_BYTES["float16"] / 2**30, cache_dir=folder.parent.parent.parent
        ),
    ):
        with pytest.raises(CacheVersionError):
            do()
        assert path.read_bytes() == later


# Pairs, and caches that took over from others ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A resource that takes segment ids, and pairs of sentences with a label. Read only."""
    return world_of_pairs(tmp_path_factory.mktemp("pairs"))


def test_a_cache_of_pairs_gets_their_segments_from_the_data(pairs: World, ran: list[Batch], tmp_path: Path) -> None:
    good = pairs.extract(task="snli", tokens_per_batch=60).cache
    assert FeatureCache.open(good).provenance["found"]["segments"] is True
    batches = planned(good)
    folder = copied(good, tmp_path)
    path = shards(folder)[0]
    flips = [begins(path, "hidden"), begins(path, "hidden") + 9000]
    needed = needed_by(path)
    for also in ((), (begins(path, "tokens/word_index"),)):
        ran.clear()
        flip(path, *flips, *also)
        mend(folder, pairs)
        assert contents(folder) == contents(good)
        assert sorted(ran) == holding(batches, {needed[at] for at in flips})
        assert len(ran) < len(batches)


def test_a_cache_of_pairs_without_its_data_is_refused(pairs: World, tmp_path: Path) -> None:
    folder = copied(pairs.extract(task="snli", tokens_per_batch=60).cache, tmp_path)
    path = shards(folder)[0]
    flip(path, begins(path, "hidden"))
    before = contents(folder)
    rows = (pairs.data / "train.jsonl").read_text("utf-8").splitlines()
    changed = json.loads(rows[0]) | {"sentence2": "the dog"}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(changed), *rows[1:]]), "utf-8")
    with pytest.raises(CacheMismatchError, match="was made from data with other texts"):
        mend(folder, pairs, data=str(tmp_path))
    assert contents(folder) == before


@pytest.fixture
def taken(place: World, tmp_path: Path) -> tuple[Path, Path]:
    """A cache of 11 sentences, and one of 30 that took those over."""
    settings = {"tokens_per_batch": 60, "cache_dir": tmp_path / "taken"}
    old = place.extract(limit=11, **settings).cache
    result = place.extract(**settings)
    assert (result.taken_over, result.computed) == (11, 19)
    return old, result.cache


def test_what_was_taken_over_is_taken_over_again(place: World, taken: tuple[Path, Path], ran: list[Batch]) -> None:
    old, folder = taken
    good, source = contents(folder), contents(old)
    batches = planned(folder)
    assert sorted(i for batch in batches for i in batch) == list(range(11, 30))
    path = shards(folder)[0]
    needed = needed_by(path)
    hidden = begins(path, "hidden")
    own = next(at for at, i in needed.items() if i == 20 and at >= hidden)
    ran.clear()
    flip(path, hidden)
    result = mend(folder, place)
    assert (result.taken_over, result.computed, ran) == (1, 0, [])
    assert contents(folder) == good
    flip(path, hidden, own)
    result = mend(folder, place)
    assert sorted(ran) == holding(batches, {20})
    assert (result.taken_over, result.computed) == (1, sum(map(len, ran)))
    assert contents(folder) == good
    flip(path, 4200)  # the root's header
    ran.clear()
    result = mend(folder, place)
    assert (contents(folder), ran) == (good, [])
    assert contents(old) == source


def test_what_was_taken_over_from_a_cache_that_is_gone_is_computed(
    place: World, taken: tuple[Path, Path], ran: list[Batch]
) -> None:
    old, folder = taken
    good = {name: states.copy() for name, states in everything(folder).items()}
    path = shards(folder)[0]
    flip(path, begins(path, "hidden"))
    shutil.rmtree(old)
    ran.clear()
    result = mend(folder, place)
    assert (result.taken_over, result.computed, ran) == (0, 1, [(0,)])
    assert is_whole(folder)
    for name, states in everything(folder).items():
        np.testing.assert_allclose(states, good[name], rtol=2**-9, atol=1e-4)
        if name != FeatureCache.open(folder).ids[0]:
            np.testing.assert_array_equal(states, good[name])


def everything(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    cache = FeatureCache.open(folder)
    return {name: np.array(cache[name]) for name in cache.ids}


def test_damage_of_the_older_cache_does_not_spread(place: World, taken: tuple[Path, Path], ran: list[Batch]) -> None:
    old, folder = taken
    for path in (shards(old)[0], shards(folder)[0]):
        flip(path, begins(path, "hidden"))
    ran.clear()
    result = mend(folder, place)
    assert (result.taken_over, ran) == (0, [(0,)])
    assert is_whole(folder)


# Caches made from caches ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["int8", "fused", "fused-int8", "layers"])
def derived(request: pytest.FixtureRequest, original: Original, tmp_path: Path) -> tuple[Path, Path]:
    """A cache with its source beside it, and one made from it."""
    source = copied(original(several=True), tmp_path)
    opened = FeatureCache.open(source)
    plan = {
        "int8": lambda: plan_slice(opened, dtype="int8"),
        "fused": lambda: plan_fusion(opened, "last4"),
        "fused-int8": lambda: plan_fusion(opened, "last4", dtype="int8"),
        "layers": lambda: plan_slice(opened, layers="1,3", limit=12),
    }[request.param]()
    return source, derive(plan).cache


def test_a_derived_cache_is_mended_from_its_source(
    place: World, derived: tuple[Path, Path], ran: list[Batch], tmp_path: Path
) -> None:
    source, folder = derived
    good, path = contents(folder), shards(folder)[0]
    hidden, marks = begins(path, "hidden"), begins(path, "examples/complete")
    for damage in ([hidden], [hidden, hidden + 2000, marks + 2], [begins(path, "examples/xxh3")]):
        needed = needed_by(path)
        lost = {needed[at] for at in damage if at in needed}
        flip(path, *damage)
        nothing = str(tmp_path / "no-data")
        result = mend(folder, place, data=nothing)
        assert contents(folder) == good
        assert (result.taken_over, result.computed, ran) == (len(lost), 0, [])
    assert is_whole(source)


STRUCTURE = {
    "unused space": lambda path: [300],
    "the copy of the attributes": lambda path: [path.read_bytes().rindex(b'"provenance"') + 3],
    "its own checksum": lambda path: [path.stat().st_size - 10],
}


@pytest.mark.parametrize("what", STRUCTURE)
def test_the_structure_of_a_derived_cache_is_mended_or_refused(
    place: World, derived: tuple[Path, Path], what: str
) -> None:
    """Whatever ``repair`` says, it does."""
    _, folder = derived
    good, path = contents(folder), shards(folder)[0]
    flip(path, *STRUCTURE[what](path))
    assert not is_whole(folder)
    try:
        mend(folder, place)
    except CacheError:
        return
    assert contents(folder) == good


@pytest.mark.parametrize("name", ["examples/id", "examples/n_tokens", "tokens/word_index"])
def test_a_damaged_index_of_a_derived_cache_is_mended_or_refused(
    place: World, derived: tuple[Path, Path], name: str
) -> None:
    source, folder = derived
    good, path = contents(folder), shards(folder)[0]
    flip(path, begins(path, name))
    before = contents(folder)
    cache = contents(source)
    try:
        mend(folder, place)
    except CacheError as error:
        assert "kr2cache cache remove" in error.remedy
        assert contents(folder) == before
    else:
        assert contents(folder) == good
    assert contents(source) == cache


def test_a_derived_cache_whose_source_is_gone(place: World, derived: tuple[Path, Path], ran: list[Batch]) -> None:
    """A slice of layers alone is what the model gives; what was rounded or averaged needs the source."""
    source, folder = derived
    path = shards(folder)[0]
    sound = everything(folder)
    flip(path, begins(path, "hidden"))
    shutil.rmtree(source)
    first = FeatureCache.open(folder).all_ids[0]
    if FeatureCache.open(folder).layers == (1, 3):
        mend(folder, place)
        assert is_whole(folder)
        assert ran == [(0,)]
        return
    with pytest.raises(CacheError, match=r"was made from another cache .* which no longer exists") as caught:
        mend(folder, place)
    assert "kr2cache extract" in caught.value.remedy
    found = check_cache(folder)
    assert found.damaged_ids + found.incomplete_ids == [first]
    for name, states in everything(folder).items():
        if name != first:
            np.testing.assert_array_equal(states, sound[name])


def test_damage_of_the_source_does_not_spread(place: World, derived: tuple[Path, Path]) -> None:
    source, folder = derived
    for path in (shards(source)[0], shards(folder)[0]):
        flip(path, begins(path, "hidden"))
    if FeatureCache.open(folder).layers == (1, 3):
        mend(folder, place)  # the model makes what the source cannot give
        assert is_whole(folder)
        return
    with pytest.raises(CacheError, match="do not match their checksum"):
        mend(folder, place)
    assert not is_whole_or_refused(folder)


# The command line ----------------------------------------------------------------------------------------------------


class Answer:
    """One call with --json."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        capsys.readouterr()
        self.code = run([*arguments, "--json"])
        captured = capsys.readouterr()
        self.document: Any = json.loads(captured.out)
        self.people = captured.err


KEYS = {
    "cache",
    "ok",
    "sequences",
    "bytes",
    "seconds",
    "damaged",
    "incomplete",
    "damaged_index",
    "damaged_structure",
    "unreadable",
    "faults",
}


def test_verify_and_repair_from_the_command_line(
    original: Original, place: World, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = original(several=True)
    folder = copied(good, workdir)
    cache = str(folder)
    ids = FeatureCache.open(folder).ids
    model = ["--resource", str(place.resource), "--data", str(place.data), "--device", "cpu"]

    whole = Answer(capsys, "cache", "verify", cache)
    assert (whole.code, whole.document["ok"]) == (0, True)
    (said,) = whole.document["caches"]
    assert set(said) == KEYS
    assert (said["cache"], said["ok"], said["sequences"], said["damaged"], said["incomplete"]) == (
        cache,
        True,
        30,
        [],
        0,
    )
    assert (said["damaged_index"], said["damaged_structure"], said["unreadable"], said["faults"]) == ([], [], {}, [])
    assert said["bytes"] == FeatureCache.open(folder).stored_bytes
    nothing = Answer(capsys, "cache", "repair", cache)
    assert (nothing.code, nothing.document["damaged"], nothing.document["rebuilt"]) == (0, [], [])

    first, second, third, *_ = shards(folder)
    flip(first, begins(first, "hidden"))
    flip(first, begins(first, "examples/complete") + 1)
    flip(second, begins(second, "examples/text_xxh3"))
    flip(third, 300)
    damaged = Answer(capsys, "cache", "verify", cache)
    assert (damaged.code, damaged.document["ok"]) == (1, False)
    (said,) = damaged.document["caches"]
    assert (said["ok"], said["damaged"], said["incomplete"]) == (False, [ids[0]], 1)
    assert (said["damaged_index"], said["damaged_structure"]) == ([second.name], [third.name])
    assert all(text in damaged.people for text in (ids[0], ids[1], second.name, third.name, "kr2cache cache repair"))

    mended = Answer(capsys, "cache", "repair", cache, *model)
    assert mended.code == 0
    assert set(mended.document) == {"cache", "damaged", "rebuilt", "computed", "taken_over", "seconds"}
    assert (mended.document["cache"], sorted(mended.document["damaged"])) == (cache, sorted(ids[:2]))
    assert mended.document["rebuilt"] == [second.name, third.name]
    assert "remove their folders" in mended.people
    assert mended.document["computed"] == sum(map(len, holding(planned(good), {0}))), "states without a mark are kept"
    assert contents(folder) == contents(good)
    assert Answer(capsys, "cache", "verify", cache).code == 0


def test_verify_of_an_incomplete_cache_fails(
    original: Original, place: World, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(original(), workdir)
    flip(shards(folder)[0], begins(shards(folder)[0], "examples/complete"))
    answer = Answer(capsys, "cache", "verify", str(folder))
    (said,) = answer.document["caches"]
    assert (answer.code, answer.document["ok"]) == (1, False)
    assert (said["ok"], said["damaged"], said["incomplete"]) == (False, [], 1)


def test_verify_of_every_cache_names_the_unreadable_one(
    original: Original, place: World, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(original(), workdir / ".kr2cache" / "udpos" / "train" / "good")
    bad = Path(shutil.copytree(original(), workdir / ".kr2cache" / "udpos" / "train" / "bad"))
    shards(bad)[0].write_bytes(b"nothing")
    answer = Answer(capsys, "cache", "verify")
    assert (answer.code, answer.document["ok"]) == (1, False)
    assert [Path(said["cache"]).name for said in answer.document["caches"]] == ["bad", "good"]
    assert [said["ok"] for said in answer.document["caches"]] == [False, True]
    assert list(answer.document["caches"][0]["unreadable"]) == [shards(bad)[0].name]
    refused = Answer(capsys, "cache", "repair", str(bad))
    assert refused.code == 1
    assert "CacheError" in json.dumps(refused.document)


def test_repair_from_the_command_line_refuses_another_model(
    original: Original, place: World, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(original(), workdir)
    flip(shards(folder)[0], begins(shards(folder)[0], "hidden"))
    model = Path(shutil.copytree(place.resource, workdir / "models" / "res"))
    other_weights(model)
    refused = Answer(capsys, "cache", "repair", str(folder), "--resource", str(model), "--device", "cpu")
    assert refused.code == 1
    assert "CacheMismatchError" in json.dumps(refused.document)
    assert Answer(capsys, "cache", "verify", str(folder)).code == 1


def test_verify_of_nothing_is_explained(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(capsys, "cache", "verify")
    assert answer.code == 1
    assert "No cache in" in json.dumps(answer.document)
