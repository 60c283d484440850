"""What the code of commit 0485b90 wrote is still found, whole, read and trained from (``old_cache/README.md``)."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from world import predictions, unpack_old_world

from kr2cache import FeatureCache
from kr2cache.cache.format import FORMAT_VERSION, ShardHeader, header_copy
from kr2cache.cache.shard import open_shard, readable_headers, shard_paths
from kr2cache.cli import run
from kr2cache.report.collect import collect
from kr2cache.tasks import find_task

CACHES = {
    "--split train": "train/res-949d8033",
    "--split dev": "dev/res-48a41ba1",
    "--split test": "test/res-014d9356",
    "--split train --dtype float32": "train/res-2cec4688",
    "--split train --dtype bfloat16": "train/res-1979574a",
    "--split train --dtype int8": "train/res-24139203",
    "--split train --max-length 16 --shard-gb 0.000002": "train/res-989c99af",
}
"""Options of extract, and the folder that they made then."""
DERIVED = {"slice --layers 1": "test/res-d364acc9", "fuse --fusion all": "test/res-55ed32a3"}
RUN = "udpos/kr2-reader-res-last2-1ea417a2/seed-1"
ROUNDING = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-8, "int8": 2**-7}
"""Of a state, relative to the largest of its row."""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_old_world(tmp_path_factory.mktemp("then"))


@pytest.fixture
def then(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of then. Read only: who writes gives folders of its own."""
    monkeypatch.chdir(unpacked)
    return unpacked


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    code = run([*shlex.split(line), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == 0, said
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.h5")}


def test_extract_finds_every_cache_finished(then: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, folder in CACHES.items():
        before = files(then / "caches" / "udpos" / folder)
        assert before, folder
        said = answer(f"extract {options} --cache-dir caches", capsys)
        assert (said["cache"], said["computed"]) == (f"caches/udpos/{folder}", 0), options
        assert files(then / "caches" / "udpos" / folder) == before


def test_every_byte_of_them_is_whole(then: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = answer("cache verify --cache-dir caches", capsys)
    assert said["ok"]
    assert {one["cache"].removeprefix("caches/udpos/") for one in said["caches"]} == {
        *CACHES.values(),
        *DERIVED.values(),
    }


def test_they_are_whole_once_another_version_is_written(
    then: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their version is in their checksums: it is that of the file, not that of what is written today."""
    assert ShardHeader.__init__.__kwdefaults__["format_version"] == FORMAT_VERSION == 1
    monkeypatch.setitem(ShardHeader.__init__.__kwdefaults__, "format_version", 2)
    assert answer("cache verify --cache-dir caches", capsys)["ok"]
    (shard,) = shard_paths(then / "caches" / "udpos" / CACHES["--split dev"])
    assert [header.format_version for header in readable_headers(shard)] == [1, 1]


def test_their_states_are_those_of_the_model(then: Path) -> None:
    """As transformers computes them today, a sentence at a time."""
    model = AutoModel.from_pretrained("models/res").eval()
    tokenizer = AutoTokenizer.from_pretrained("models/res")
    for options, folder in CACHES.items():
        cache = FeatureCache.open(then / "caches" / "udpos" / folder)
        examples = {one.id: one for one in find_task("udpos").read(cache.provenance["chosen"]["split"], "corpus", None)}
        assert cache.ids == list(examples)
        for name, example in examples.items():
            encoded = tokenizer(
                list(example.texts[0]),
                is_split_into_words=True,
                truncation=True,
                max_length=cache.provenance["chosen"]["max_length"],
                return_tensors="pt",
                return_token_type_ids=False,
            )
            with torch.inference_mode():
                layers = model(**encoded, output_hidden_states=True).hidden_states
            expected = torch.stack(layers)[:, 0].numpy()
            largest = np.abs(expected).max(axis=2, keepdims=True)
            assert cache[name].shape == expected.shape
            assert (np.abs(cache[name] - expected) / largest).max() < ROUNDING[cache.dtype], options
    assert (
        len(shard_paths(then / "caches" / "udpos" / CACHES["--split train --max-length 16 --shard-gb 0.000002"])) == 2
    )


def test_slices_and_fusions_are_found_and_made_alike(then: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found where they are; made anew elsewhere, each data set and each attribute is the same."""
    source = f"caches/udpos/{CACHES['--split test']}"
    for command, folder in DERIVED.items():
        verb, _, options = command.partition(" ")
        there = answer(f"cache {verb} {source} {options} --cache-dir caches", capsys)
        assert (there["cache"], there["made"]) == (f"caches/udpos/{folder}", False)
        again = answer(f"cache {verb} {source} {options} --cache-dir made", capsys)
        assert (again["cache"], again["made"]) == (f"made/udpos/{folder}", True)
        old, new = (FeatureCache.open(Path(root) / "udpos" / folder) for root in ("caches", "made"))
        assert new.provenance == old.provenance
        (was,), (now,) = shard_paths(old.folder), shard_paths(new.folder)
        assert header_copy(open_shard(now).header) == header_copy(open_shard(was).header)
        assert header_copy(open_shard(was).header)[:-16] in was.read_bytes(), "the same bytes"
        for name in old.ids:
            np.testing.assert_array_equal(new[name], old[name], strict=True)
    shutil.rmtree("made")


def test_they_are_trained_from(then: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fixed and a trainable fusion; nothing is extracted."""
    for options in ("--fusion last2", "--fusion fuse --max-length 64"):
        said = answer(
            f"train {options} --seeds 1 --epochs 1 --batch-size 2 --cache-dir caches --no-extract --run-dir {tmp_path}",
            capsys,
        )
        assert said["resource_sequences"]["computed"] == 0
        assert said["resource_sequences"]["read"] > 0
        recorded = json.loads((Path(said["runs"][0]["folder"]) / "config.json").read_text("utf-8"))["recorded"]
        read = {split: cache["folder"].removeprefix("caches/udpos/") for split, cache in recorded["caches"].items()}
        assert read == {split: CACHES[f"--split {split}"] for split in ("train", "dev", "test")}


def test_the_run_is_reported_and_predicts_what_it_predicted(then: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = collect(then / "runs")
    (configuration,) = found.configurations
    assert any(note.startswith("F1 of 1 configuration is not XTREME's") for note in found.notes)
    assert (configuration.task, list(configuration.runs)) == ("udpos", [1])
    stored = json.loads((then / "runs" / RUN / "metrics.json").read_text("utf-8"))
    assert configuration.runs[1].scores["accuracy"] == stored["test"]["accuracy"] == 0.9
    said = answer(f"predict --run runs/{RUN} --file corpus/test.conllu", capsys)
    assert {one["id"]: one["predicted"] for one in said["predictions"]} == {
        row["id"]: row["predicted"] for row in predictions(then / "runs" / RUN, "test")
    }
