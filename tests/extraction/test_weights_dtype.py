"""Weights in bfloat16, and spread over devices: what runs, which cache fits, and what is recorded."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer
from world import World

from kr2cache.cache.reader import FeatureCache
from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.errors import ConfigError, UnknownNameError
from kr2cache.experiment.checks import check_names
from kr2cache.experiment.resource import Resource
from kr2cache.experiment.shared import Shared
from kr2cache.extraction.checks import check_extraction
from kr2cache.extraction.planning import plan_extraction
from kr2cache.extraction.repair import repair
from kr2cache.extraction.rerun import RerunConfig
from kr2cache.models import stack
from kr2cache.models.digests import open_model, weights_digest
from kr2cache.models.registry import ModelSpec
from kr2cache.models.repeatable import as_loaded
from kr2cache.models.stack import load_encoder, open_encoder
from kr2cache.models.states import device_of
from kr2cache.prediction.predict import Predictor
from kr2cache.prediction.texts import read_lines
from kr2cache.store import provenance
from kr2cache.tasks import find_task


def in_bfloat16(model: Path) -> None:
    """Store the weights of a folder in bfloat16."""
    weights = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_states_are_those_of_a_model_in_bfloat16(world: World) -> None:
    cache = FeatureCache.open(world.extract(dtype="float32", weights_dtype="bfloat16").cache)
    model = AutoModel.from_pretrained(world.resource, dtype=torch.bfloat16).eval()
    exact = AutoModel.from_pretrained(world.resource, dtype=torch.float32).eval()
    away = []
    for name in cache.ids:
        position = int(cache.find([name])[0])
        tokens = cache.tokens()
        ids = tokens.input_id[tokens.first_token[position] : tokens.first_token[position + 1]]
        with torch.no_grad():
            theirs, precise = (
                torch.cat(
                    one(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
                )
                .float()
                .numpy()
                for one in (model, exact)
            )
        # A batch of another shape rounds otherwise, but far less than bfloat16 weights differ from float32 ones.
        np.testing.assert_allclose(cache[name], theirs, atol=3e-2 * float(np.abs(theirs).max()))
        away.append((np.abs(cache[name] - theirs).mean(), np.abs(cache[name] - precise).mean()))
    assert np.mean([one for one, _ in away]) < 0.5 * np.mean([other for _, other in away])


def test_a_bfloat16_checkpoint_is_the_same_model_in_both_dtypes(world: World) -> None:
    in_bfloat16(world.resource)
    spec = ModelSpec(name="res", path=world.resource)
    small, large = open_model(spec, "bfloat16"), open_model(spec)
    assert {weight.dtype for weight in small.encoder.parameters()} == {torch.bfloat16}
    assert small.digests == large.digests
    results = [world.extract(**more) for more in ({}, {"weights_dtype": "bfloat16"})]
    assert [result.computed for result in results] == [12, 12], "states are not copied from one to the other"
    made = [FeatureCache.open(result.cache) for result in results]
    assert made[0].provenance["found"] == made[1].provenance["found"]
    assert made[0].fingerprint != made[1].fingerprint
    assert "weights_dtype" not in made[0].provenance["chosen"], "as older versions have it"
    assert made[1].provenance["chosen"]["weights_dtype"] == "bfloat16"
    for cache in made:
        assert provenance.contradictions(cache) == []


def test_a_cache_of_the_other_dtype_is_another_cache(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the checkpoint is float32, so that both have other digests."""
    float32 = world.train(epochs=1.0).runs[0]
    folders = set(world.cache_folders())
    bfloat16 = world.train(epochs=1.0, weights_dtype="bfloat16").runs[0]
    assert folders < set(world.cache_folders())
    assert bfloat16.folder.parent != float32.folder.parent
    assert world.train(epochs=1.0, weights_dtype="float32").runs[0].seconds is None, "it is there already"
    assert world.train(epochs=1.0).runs[0].folder == float32.folder, "float32 is the default where both exist"
    assert world.train(epochs=1.0, weights_dtype="bfloat16", extract=False).runs[0].folder == bfloat16.folder
    capsys.readouterr()
    assert run(["cache", "list", "--cache-dir", str(world.caches)]) == 0
    assert "stale" not in capsys.readouterr().out


def test_a_training_takes_the_dtype_of_the_caches_and_so_does_predict(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "dev", "test"):
        world.extract(split, weights_dtype="bfloat16")
    trained = world.train(epochs=1.0, extract=False).runs[0]
    predictor = Predictor.load(trained.folder, device="cpu")
    assert predictor.resources[0].encoder.dtype == torch.bfloat16
    predictor(read_lines(predictor.task, ["das haus und ich"]))
    capsys.readouterr()
    assert run(["cache", "info", str(world.cache_folders()[0])]) == 0
    assert "in bfloat16, the dtype of its weights" in " ".join(capsys.readouterr().out.split())


def test_caches_of_other_data_decide_the_dtype_only_if_there_are_no_others(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tiny.save_corpus(tmp_path / "other", train=4, dev=2, test=2))
    spec, task = ModelSpec(name="res", path=world.resource), find_task("udpos")

    def dtype(data: str) -> str:
        return Resource(world.config(data=data), spec, task, Shared()).weights_dtype

    world.extract(weights_dtype="bfloat16")
    capsys.readouterr()
    assert dtype(other) == "bfloat16"
    shown = " ".join(capsys.readouterr().out.split())
    assert "res runs with --weights-dtype bfloat16, as in its caches of other data of udpos." in shown
    world.extract(data=other)
    capsys.readouterr()
    assert (dtype(other), dtype(str(world.data))) == ("float32", "bfloat16")
    assert "other data" not in capsys.readouterr().out


def test_a_repair_gives_the_same_bytes(world: World) -> None:
    folder = world.extract(weights_dtype="bfloat16").cache
    (shard,) = folder.glob("*.h5")
    before = shard.read_bytes()
    with h5py.File(shard, "r+") as file:
        file["examples/complete"][3] = 0
    repair(RerunConfig(folder=folder, resource=str(world.resource), device="cpu"))
    assert shard.read_bytes() == before


# Device maps ----------------------------------------------------------------------------------------------------------


def test_a_device_map_on_a_machine_without_a_gpu_gives_the_same_cache(world: World) -> None:
    plain = world.extract().cache
    (shard,) = plain.glob("*.h5")
    before = shard.read_bytes()
    shutil.rmtree(plain)
    mapped = world.extract(device="auto", device_map="auto")
    assert (mapped.cache, mapped.computed) == (plain, 12)
    if not torch.cuda.is_available():
        assert shard.read_bytes() == before


def test_weights_that_are_not_on_their_device_are_hashed_and_run(tmp_path: Path) -> None:
    """As accelerate leaves a layer that does not fit: its weights come when it runs."""
    spec = ModelSpec(name="m", path=tiny.save_model(tmp_path / "m", "t5", d_model=16, d_kv=8, d_ff=32, num_heads=2))
    plain = load_encoder(spec)
    offloaded = cpu_offload(copy.deepcopy(plain), torch.device("cpu"))
    assert {weight.device.type for weight in offloaded.parameters()} == {"meta"}
    assert weights_digest(offloaded) == weights_digest(plain)
    ids = AutoTokenizer.from_pretrained(spec.path)("das haus", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(input_ids=ids).last_hidden_state
        for model in (offloaded, as_loaded(offloaded), offloaded):
            assert torch.equal(model(input_ids=ids).last_hidden_state, expected)


def test_a_part_of_a_model_whose_layers_are_elsewhere_runs(tmp_path: Path) -> None:
    """As --device-map auto places layers for which no device has room; here on the disk."""
    spec = ModelSpec(name="m", path=tiny.save_model(tmp_path / "m", "t5", d_model=16, d_kv=8, d_ff=32, num_heads=2))
    plain = load_encoder(spec)
    here = (
        "shared",
        "decoder",
        "encoder.embed_tokens",
        "encoder.block.0",
        "encoder.final_layer_norm",
        "encoder.dropout",
    )
    places: Any = {**dict.fromkeys(here, "cpu"), "encoder.block.1": "disk"}
    spread = open_encoder(spec, device_map=places).encoder
    assert "meta" in {weight.device.type for weight in spread.parameters()}
    assert device_of(spread) == torch.device("cpu")
    assert weights_digest(spread) == weights_digest(plain)
    ids = AutoTokenizer.from_pretrained(spec.path)("das haus", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(input_ids=ids, output_hidden_states=True).hidden_states
        for model in (spread, as_loaded(spread)):
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))


def test_every_command_that_runs_a_resource_takes_a_device_map(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = world.train(epochs=1.0).runs[0].folder
    folder = next(one for one in world.cache_folders() if "train" in str(one))
    (shard,) = folder.glob("*.h5")
    before = shard.read_bytes()
    with h5py.File(shard, "r+") as file:
        file["examples/complete"][3] = 0
    maps, real = [], stack.from_pretrained

    def noting(*arguments: Any, **options: Any) -> Any:
        maps.append(options.get("device_map"))
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "from_pretrained", noting)
        own = ["--resource", str(world.resource), "--device-map", "auto"]
        assert run(["cache", "repair", str(folder), *own]) == 0
        assert shard.read_bytes() == before or torch.cuda.is_available()
        assert run(["cache", "verify", str(folder), "--against-model", *own]) == 0
        capsys.readouterr()
        assert run(["predict", "--run", str(trained), "das haus", "--device-map", "auto", "--json"]) == 0
        mapped = json.loads(capsys.readouterr().out)
        assert maps == ["auto"] * 3
    assert run(["predict", "--run", str(trained), "das haus", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == mapped
    for line in (
        ["cache", "repair", str(folder)],
        ["cache", "verify", "--against-model"],
        ["predict", "--run", str(trained), "a"],
    ):
        assert run([*line, "--device-map", "auto", "--device", "cpu", "--json"]) == 1
        assert "--device cpu has no meaning" in json.loads(capsys.readouterr().out)["error"]["message"]
        assert run([*line, "--device-map", "autp", "--json"]) == 1
        assert "'autp'" in json.loads(capsys.readouterr().out)["error"]["message"]


def config(world: World, **more: str) -> ExtractConfig:
    return ExtractConfig(resource=str(world.resource), split="train", task="udpos", data=str(world.data), **more)  # type: ignore[arg-type]


def test_settings_that_make_no_sense_are_refused(world: World) -> None:
    for wrong in ({"weights_dtype": "bfloat61"}, {"device_map": "autp"}):
        name = next(iter(wrong.values()))
        with pytest.raises(UnknownNameError, match=name):
            check_extraction(config(world, **wrong))
        with pytest.raises(UnknownNameError, match=name):
            check_names(world.config(device="auto", **wrong))
    with pytest.raises(ConfigError, match="--device cpu has no meaning"):
        plan_extraction(config(world, device_map="auto", device="cpu"))
    with pytest.raises(ConfigError, match="each of --workers 2 takes one GPU of its own"):
        plan_extraction(ExtractConfig(**vars(config(world, device_map="auto")) | {"workers": 2}))
