"""Controls: the architecture of a model without what it learned, the same on every machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from transformers import AutoModel
from world import World

from kr2cache import FeatureCache
from kr2cache.cli import run
from kr2cache.errors import CacheMismatchError, ConfigError, KR2CacheError
from kr2cache.experiment.pipeline import describe_training
from kr2cache.models.control import drawn_by
from kr2cache.models.digests import known_digests, open_model
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.models.stack import load_encoder
from kr2cache.prediction.predict import Predictor
from kr2cache.report import report
from kr2cache.tasks.udpos import UdPos
from kr2cache.training.checkpoint import TaskCheckpoint

DIGEST = "b0ab990a96aa87439e2585ef90637814"
"""Of the weights of ``tiny.config("bert")`` by seed 3. It is the same on every machine."""


def control(path: Path, seed: int = 3) -> dict[str, dict[str, Any]]:
    return {"control": {"path": str(path), "weights": "random", "seed": seed}}


def spec(path: Path, seed: int = 3) -> ModelSpec:
    return find_model("control", control(path, seed))


# Numbers -------------------------------------------------------------------------------------------------------------


def test_numbers_are_sums_of_random_bits() -> None:
    """Recomputed with Python's whole numbers: nothing in it can round."""
    with drawn_by(7):
        normal, uniform = torch.empty(5).normal_(0.5, 0.02), torch.empty(2, 2).uniform_(-3, 5)
    bits = np.random.PCG64(7)
    words = [int(raw) >> shift & 0xFFFF for raw in bits.random_raw(15) for shift in (0, 16, 32, 48)]
    sums = [sum(words[i::5]) for i in range(5)]
    expected = [np.float32((total - 6 * 65535) / 65536) * np.float32(0.02) + np.float32(0.5) for total in sums]
    assert normal.tolist() == expected
    raws = [int(raw) >> 40 for raw in bits.random_raw(4)]
    assert uniform.flatten().tolist() == [float(np.float32(raw / 2**24) * np.float32(8)) - 3 for raw in raws]


def test_numbers_are_normal_and_uniform() -> None:
    with drawn_by(0):
        normal, uniform = torch.empty(1000, 1000).normal_(), torch.empty(300_000).uniform_()
    assert stats.kstest(normal.flatten()[:20_000].numpy(), "norm").pvalue > 0.01
    assert float(normal.mean()) == pytest.approx(0, abs=0.005)
    assert float(normal.std()) == pytest.approx(1, abs=0.005)
    assert abs(float(np.corrcoef(normal[:-1].flatten(), normal[1:].flatten())[0, 1])) < 0.005
    assert stats.kstest(uniform[:20_000].numpy(), "uniform").pvalue > 0.01


def test_every_other_random_number_stays_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with drawn_by(1):
        inside = torch.randn(100)
    assert torch.equal(torch.randn(3), expected)
    with drawn_by(1):
        assert torch.equal(torch.randn(100), inside)
    with drawn_by(2):
        assert not torch.equal(torch.randn(100), inside)


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert", "mpnet"]
)
def test_a_control_is_as_its_architecture_starts(tmp_path: Path, model_type: str) -> None:
    tiny.save_model(tmp_path, model_type)
    first, again, other = (load_encoder(spec(tmp_path, seed)).state_dict() for seed in (3, 3, 4))
    learned = AutoModel.from_pretrained(tmp_path).state_dict()
    config = tiny.config(model_type)
    assert first.keys() <= learned.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        if tensor.unique().numel() < 3:  # zeros and ones, as ever
            assert torch.equal(tensor, learned[name]), name
        elif tensor.is_floating_point() and tensor.numel() > 500:
            assert not torch.equal(tensor, other[name]), name
            assert not torch.equal(tensor, learned[name]), name
            assert float(tensor.std()) == pytest.approx(float(learned[name].std()), rel=0.15), name
    assert any(tensor.numel() > 500 for tensor in first.values()), config


def test_the_weights_are_the_same_on_every_machine(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    assert open_model(spec(tmp_path)).digests.weights == DIGEST
    assert open_model(spec(tmp_path, 4)).digests.weights != DIGEST


@pytest.mark.long
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_weights_are_the_same_with_any_processor(tmp_path: Path, capability: str) -> None:
    """torch's own normal numbers are not, so this shows something."""
    tiny.save_model(tmp_path)
    code = (
        "import sys, torch; from pathlib import Path; from kr2cache.models.registry import ModelSpec; "
        "from kr2cache.models.digests import open_model; "
        "print(open_model(ModelSpec(name='c', path=Path(sys.argv[1]), random_seed=3)).digests.weights, "
        "torch.backends.cpu.get_cpu_capability())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[:2] == [DIGEST, capability.upper()]


def test_a_control_needs_no_weights(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    expected = open_model(spec(tmp_path)).digests
    (tmp_path / "model.safetensors").unlink()
    assert open_model(spec(tmp_path)).digests == expected
    with pytest.raises(KR2CacheError, match="holds no weights"):
        load_encoder(ModelSpec(name="x", path=tmp_path))


def test_a_control_can_be_trained(tmp_path: Path) -> None:
    """As a reader it starts from the weights that it gives states with."""
    tiny.save_model(tmp_path)
    checkpoint = TaskCheckpoint(spec(tmp_path), "token", ("a", "b", "c"))
    torch.manual_seed(1)
    model = checkpoint.task_model()
    drawn = load_encoder(spec(tmp_path)).state_dict()
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, drawn[name]), name
    assert checkpoint.earlier_head == ()
    digests = known_digests(spec(tmp_path))
    assert digests is not None
    assert digests.weights == DIGEST


def test_a_control_is_not_found_by_the_hub_id_of_its_model() -> None:
    models = {"control": {"hub_id": "some/model", "weights": "random"}}
    assert find_model("some/model", models).random_seed is None
    assert find_model("control", models).random_seed == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "trained"}, "weights = 'trained' under .* should be \"random\", or be left out"),
        ({"weights": True}, "weights = True under"),
        ({"weights": "random", "seed": -1}, "seed = -1 under .* should be a whole number from 0 to"),
        ({"weights": "random", "seed": "3"}, "seed = '3' under"),
        ({"seed": 3}, "gives a seed, but its weights are not random"),
    ],
)
def test_what_a_control_may_not_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_model("control", {"control": {"hub_id": "some/model", **fields}})


# Both stages ---------------------------------------------------------------------------------------------------------


def test_a_control_goes_through_both_stages_under_its_name(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"resource": "control", "models": control(world.resource), "epochs": 1.0}
    (world.resource / "model.safetensors").unlink()
    result = world.train(**given)
    folder = result.runs[0].folder
    assert folder.parent.name.startswith("kr2-reader-control-last4-")
    cache = FeatureCache.open(next(path for path in world.cache_folders() if path.parent.name == "test"))
    assert cache.provenance["found"]["weights"] == open_model(spec(world.resource)).digests.weights
    recorded = cache.provenance["recorded"]["model"]
    assert (recorded["weights"], recorded["seed"]) == ("random", 3)
    # What it stores is what transformers gives with these weights.
    model = AutoModel.from_config(tiny.config("bert", layers=4)).eval()
    model.load_state_dict(load_encoder(spec(world.resource)).state_dict(), strict=False)
    name = cache.ids[0]
    tokens = torch.from_numpy(cache.tokens().select(np.array([0])).input_id.astype(np.int64))[None]
    with torch.inference_mode():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    np.testing.assert_allclose(cache[name], torch.stack(states)[:, 0].numpy(), atol=5e-3)
    shown = "control (random weights, seed 3)"
    describe_training(result)
    assert f"kr2 ({world.config().reader} + {shown}, last4)".replace(" ", "") in "".join(
        capsys.readouterr().out.split()
    )
    (table,) = report(world.folder / "runs", None).tables
    assert table.rows[0][table.columns.index("resource or teacher")].text == shown
    monkeypatch.chdir(world.folder)
    assert run(["cache", "info", str(cache.folder)]) == 0
    assert f"{shown} (5 layers" in " ".join(capsys.readouterr().out.split())
    rows = [json.loads(line) for line in (folder / "predictions-test.jsonl").read_text("utf-8").splitlines()]
    # The run knows where its model was, and that its weights were drawn.
    for models in ({}, given["models"]):
        predicted = Predictor.load(folder, models, device="cpu")(UdPos(None).read("test", str(world.data)))
        assert [one.predicted for one in predicted] == [row["predicted"] for row in rows]
    with pytest.raises(CacheMismatchError, match="other weights"):
        Predictor.load(folder, control(world.resource, 4), device="cpu")
    with pytest.raises(CacheMismatchError, match="the weights of control changed"):
        world.train(**given | {"models": control(world.resource, 4)})


def test_models_lists_controls(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.resource / "model.safetensors").unlink()
    lines = (
        f"[models.{name}]\npath = '{world.resource}'\n{more}" for name, more in (("c", 'weights = "random"'), ("d", ""))
    )
    (world.folder / "kr2cache.toml").write_text("\n".join(lines), "utf-8")
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["models"]) == 0
    text = capsys.readouterr().out
    assert "c (random weights, seed 0)" in text
    assert run(["models", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert (found["c"]["weights"], found["c"]["seed"], found["c"]["fault"]) == ("random", 0, None)
    assert "weights" not in found["gottbert"]
    assert "holds no weights" in found["d"]["fault"]
