"""Several resources at once: Concat(H_reader^0, G_1^0, G_2^0), in runs, grids, reports and predictions."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from world import SPLITS, World, predictions

from kr2cache import FeatureCache
from kr2cache.cli import run
from kr2cache.errors import (
    CacheMismatchError,
    ConfigError,
    DiskSpaceError,
    UnknownNameError,
    UnsupportedModelError,
    ValueRangeError,
)
from kr2cache.experiment.pipeline import TrainResult, describe_training
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.resource import Resource
from kr2cache.experiment.shared import Shared
from kr2cache.extraction import trial
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models import digests
from kr2cache.models.registry import ModelSpec
from kr2cache.prediction.predict import Predictor
from kr2cache.report import report
from kr2cache.tasks.udpos import UPOS, UdPos
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import configuration_folder


def other(world: World) -> Path:
    """A second resource: another architecture, width and depth, and a tokenizer of letters."""
    folder = tiny.save_model(world.folder / "models" / "second", "roberta", layers=2, width=24, seed=9)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"] = {
        piece if len(piece.removeprefix("##")) == 1 or piece.startswith("<") else f"[unused{number}]": number
        for piece, number in content["model"]["vocab"].items()
    }
    path.write_text(json.dumps(content), "utf-8")
    return folder


def resources(world: World) -> dict[str, Any]:
    return {"resource": [str(world.resource), str(other(world))]}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, bert: Path, reader_model: Path, corpus: Path
) -> tuple[World, TrainResult, dict[str, Any]]:
    """A run with two resources and learned weights. Read only."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(bert, folder / "models" / "res")
    shutil.copytree(reader_model, folder / "models" / "reader")
    shutil.copytree(corpus, folder / "corpus")
    world = World(folder)
    given = resources(world) | {"fusion": "softmax", "fusion_learning_rate": 0.1, "seeds": (1, 2)}
    return world, world.train(**given), given


def caches(world: World, split: str) -> list[FeatureCache]:
    folders = [path for path in world.cache_folders() if path.parent.name == split]
    return [
        FeatureCache.open(next(path for path in folders if path.name.startswith(name))) for name in ("res", "second")
    ]


def test_the_run_names_every_resource_and_stores_what_each_fused(
    trained: tuple[World, TrainResult, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    world, result, _ = trained
    folder = result.runs[0].folder
    assert folder.parent.name.startswith("kr2-reader-res+second-softmax-")
    assert result.computed == 2 * sum(SPLITS.values())
    config = json.loads((folder / "config.json").read_text())
    first, (second,) = config["config"]["resource"], config["config"]["more_resources"]
    for decided, cache in zip((first, second), caches(world, "train"), strict=True):
        assert cache.provenance["found"]["weights"] in decided["weights"]
    assert (first["name"], second["name"], second["fusion"]["layers"]) == ("res", "second", [0, 1, 2])
    # Each has a fusion and a projection of its own: the second is as wide as the reader.
    assert (config["config"]["projection"], second["projection"]) == ("mlp", "none")
    fused = json.loads((folder / "fusion.json").read_text())["resources"]
    saved = load_file(folder / "reader" / "kr2.safetensors")
    for one, name in zip(fused, ("fusion_scores", "1.fusion_scores"), strict=True):
        assert one["weights"] == pytest.approx(saved[name].softmax(dim=0).tolist(), abs=1e-6)
        assert max(one["weights"]) - min(one["weights"]) > 1e-3, "it learned something"
    assert [one["resource"] for one in fused] == ["res", "second"]
    capsys.readouterr()
    describe_training(result)
    shown = " ".join(capsys.readouterr().out.split())
    assert "learned w by layer of res, seed 1:" in shown
    assert "learned w by layer of second, seed 2:" in shown
    assert "The resources ran on 46 sequences now; their states were read" in shown


def test_a_disk_too_small_for_all_of_them_is_said_before_the_first_is_extracted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[list[int]] = []
    look = Resource.look

    def then_shrink(self: Resource, splits: Any) -> None:
        """The disk has room for the larger of the two, but not for both."""
        look(self, splits)
        looked.append([plan.state_bytes for plan in self.plans])
        if len(looked) == 2:
            free = max(map(sum, looked)) + 1
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=free, used=0, free=free))

    monkeypatch.setattr(Resource, "look", then_shrink)
    with pytest.raises(DiskSpaceError, match=r"The states take .* free"):
        world.train(**resources(world), fusion="all")
    assert [len(sizes) for sizes in looked] == [3, 3]
    assert not list(world.folder.rglob("*.h5"))


def test_a_disk_too_small_for_the_reader_is_said_before_anything_is_extracted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(world.folder / "models" / "reader" / "model.safetensors")
    free = sum(tensor.nbytes for tensor in weights.values()) + 30_000  # the states alone take 65,000 bytes, and fit
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=free, used=0, free=free))
    with pytest.raises(DiskSpaceError, match=rf"The trained reader, with the new caches .* {free:,} are") as refused:
        world.train()
    assert "--run-dir" in refused.value.remedy
    assert not list(world.folder.rglob("*.h5"))
    assert prepare(world.config(keep_readers=False), Shared()).caches


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    """Change a weight of a model."""
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def random_states(world: World) -> Path:
    return tiny.save_model(world.folder / "models" / "second", "reformer", **tiny.REFORMER)


def states_that_are_nan(world: World) -> Path:
    spoil(folder := other(world), "encoder.layer.1.output.dense.bias", lambda weight: weight.fill_(torch.nan))
    return folder


def states_beyond_float16(world: World) -> Path:
    spoil(folder := other(world), "encoder.layer.1.output.LayerNorm.weight", lambda weight: weight.fill_(1e6))
    return folder


def nan_in_a_long_text_of_test(world: World) -> Path:
    """The last position of the longest text, which is one of the last split."""
    spoil(folder := other(world), "embeddings.position_embeddings.weight", lambda weight: weight[90:].fill_(torch.nan))
    (long,) = tiny.sentences(1, seed=3)
    path = world.data / "test.conllu"
    path.write_text(path.read_text("utf-8") + tiny.conllu([long * 9], prefix="long-"), "utf-8")
    return folder


FAULTS = {
    random_states: (UnsupportedModelError, r"'second' \(reformer\) gives other states for the same text each time"),
    states_that_are_nan: (ValueRangeError, "is nan. The checkpoint of 'second' holds numbers that are not finite"),
    states_beyond_float16: (ValueRangeError, r"at layer 2 is not a finite float16 value\."),
    nan_in_a_long_text_of_test: (ValueRangeError, "A state of 'long-1' at layer 0 .* it is nan. The checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_serve_is_refused_before_another_is_extracted(
    fault: Callable[[World], Path], world: World
) -> None:
    kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        world.train(resource=[str(world.resource), str(fault(world))], fusion="all")
    assert not list(world.folder.rglob("*.h5"))


def test_one_model_is_in_memory_and_each_is_tried_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    tried: list[str] = []
    load, check = digests.open_encoder, trial.check_states

    def count(spec: ModelSpec, *more: Any) -> Any:
        gc.collect()
        assert not [one for one in loaded if one() is not None], "another model is still in memory"
        loaded.append(weakref.ref((opened := load(spec, *more)).encoder))
        return opened

    def note(plan: ExtractPlan, encoder: Any) -> Any:
        tried.append(f"{plan.spec.name} {plan.config.split}")
        return check(plan, encoder)

    monkeypatch.setattr(digests, "open_encoder", count)
    monkeypatch.setattr(trial, "check_states", note)
    prepare(world.config(**resources(world), fusion="all"), Shared())
    assert tried == [f"{name} {split}" for name in ("res", "second") for split in SPLITS]
    # Each resource is loaded for its trial and for its extraction; the reader, to be hashed.
    assert len(loaded) == 4, "each for its trial and for its extraction"
    assert len(list(world.folder.rglob("*.h5"))) == 6


def by_hand(
    run_folder: Path, stored: list[FeatureCache], sentences: list[list[str]], ids: list[str]
) -> list[list[str]]:
    """Tags of the stored reader, one sentence at a time: eq. 1 to 3 by hand, the model's own embeddings and encoder."""
    reader = KReader.load(run_folder / "reader")
    saved = load_file(run_folder / "reader" / "kr2.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "reader")
    base = reader.model.base_model
    weights = [saved[name].softmax(dim=0).double().numpy() for name in ("fusion_scores", "1.fusion_scores")]
    tags = []
    for name, words in zip(ids, sentences, strict=True):
        encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        fused = [
            np.einsum("l,ltd->td", w, cache[name].astype(np.float64)) for w, cache in zip(weights, stored, strict=True)
        ]
        hidden = torch.from_numpy(fused[0]).float() @ saved["projection.0.weight"].T + saved["projection.0.bias"]
        first = torch.nn.functional.gelu(hidden) @ saved["projection.2.weight"].T + saved["projection.2.bias"]
        with torch.inference_mode():
            own = base.embeddings(input_ids=encoded["input_ids"])[0]
            whole = torch.cat([own, first, torch.from_numpy(fused[1]).float()])[None]
            logits = reader.model.classifier(base.encoder(whole).last_hidden_state)[0, : len(own)]
            states = [torch.from_numpy(cache[name].copy())[None] for cache in stored]
            mask = torch.ones(1, sum(len(one) for one in fused), dtype=torch.long)
            found = reader(**encoded, resource_states=states, resource_mask=mask)["logits"][0]
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
        seen = encoded.word_ids(0)
        tags.append([UPOS[int(logits[seen.index(i)].argmax())] for i in range(len(words))])
    return tags


def test_the_predictions_are_equation_3_with_two_g(trained: tuple[World, TrainResult, dict[str, Any]]) -> None:
    world, result, _ = trained
    words = [[form for form, _ in sentence] for sentence in tiny.sentences(SPLITS["test"], seed=2)]
    for one in result.runs:
        rows = predictions(one.folder, "test")
        assert by_hand(one.folder, caches(world, "test"), words, [row["id"] for row in rows]) == [
            row["predicted"] for row in rows
        ]


def test_predict_runs_every_resource(trained: tuple[World, TrainResult, dict[str, Any]]) -> None:
    world, result, _ = trained
    folder = result.runs[0].folder
    predictor = Predictor.load(folder, device="cpu")
    assert [one.name for one in predictor.resources] == ["res", "second"]
    examples = UdPos(None).read("test", str(world.data))
    rows = predictions(folder, "test")
    assert [one.predicted for one in predictor(examples)] == [row["predicted"] for row in rows]
    alone = [predictor.logits([example])[0] for example in examples]
    for one, together in zip(alone, predictor.logits(examples), strict=True):
        np.testing.assert_allclose(one, together, atol=1e-4)
    tiny.save_model(world.folder / "another", "roberta", layers=2, width=24, seed=10)
    with pytest.raises(CacheMismatchError, match="a resource second that had other weights"):
        Predictor.load(folder, {"second": {"path": str(world.folder / "another")}}, device="cpu")


def test_the_report_names_every_resource(trained: tuple[World, TrainResult, dict[str, Any]]) -> None:
    world, result, _ = trained
    made = report(world.folder / "runs", None)
    (table,) = made.tables
    assert table.rows[0][table.columns.index("resource or teacher")].text == "res + second"
    svg = {plot.title: plot.svg for plot in made.plots}["Learned fusion weights: udpos"]
    for text in ("KR2 softmax, res<", "KR2 softmax, second<", "uniform over 5 layers", "uniform over 3 layers"):
        assert text in svg
    (one,) = made.json()["configurations"]
    assert [fused["resource"] for fused in one["seeds"][0]["fusions"]] == ["res", "second"]
    assert one["seeds"][0]["fusions"][1]["layers"] == [0, 1, 2]
    assert result.read > 0


def test_order_and_number_of_resources_are_other_runs(world: World) -> None:
    second = str(other(world))
    given = [[str(world.resource)], [str(world.resource), second], [second, str(world.resource)], [second]]
    folders = [prepare(world.config(resource=one, fusion="all"), Shared()).folder.name.rpartition("-") for one in given]
    names = ["res", "res+second", "second+res", "second"]
    assert [name for name, *_ in folders] == [f"kr2-reader-{one}-all" for one in names]
    assert len({digits for *_, digits in folders}) == 4
    alone = prepare(world.config(resource=str(world.resource), fusion="all"), Shared())
    assert alone.folder.name.rpartition("-")[2] == folders[0][2], "a list of one is that one"
    assert "more_resources" not in alone.deciding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kresource"}, "Method kresource trains one resource, but .*res, .*second are given"),
        ({"fusion": "last4"}, "second: Fusion 'last4' asks for 4 layers, but this model has 3"),
        (
            {"fusion": "all", "projection": "none"},
            "res: --projection none needs equal widths; the resource has 16, the reader 24",
        ),
    ],
)
def test_what_several_resources_cannot_do(world: World, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        world.train(**resources(world) | changes)
    assert not world.caches.exists()


def test_words_that_lack_states_of_several_resources_count_once(world: World) -> None:
    result = world.train(**resources(world), fusion="last2", resource_max_length=6, epochs=1.0)
    corpus = [tiny.sentences(count, seed=seed) for seed, count in enumerate(SPLITS.values())]
    for split, sentences in zip(SPLITS, corpus, strict=True):
        tokens = [cache.tokens() for cache in caches(world, split)]
        lacking, of_each = 0, 0
        for number, sentence in enumerate(sentences):
            every = set(range(len(sentence)))
            seen = [
                set(one.word_index[one.first_token[number] : one.first_token[number + 1]].tolist()) for one in tokens
            ]
            lacking += len(every - seen[0] | every - seen[1])
            of_each += len(every - seen[0]) + len(every - seen[1])
        assert result.words_without_states[split] == lacking < of_each


def test_a_run_of_long_names_has_a_folder(tmp_path: Path) -> None:
    """A name may have 255 bytes. The digits at its end tell configurations apart."""
    for name, cut in (("r" * 240, "r" * 240), ("r" * 300, "r" * 242), ("ü" * 300, "ü" * 121)):
        folder = configuration_folder(tmp_path, "udpos", ["kr2", name], {"seed": 1})
        assert folder.name.startswith(f"kr2-{cut}-"), name
        assert len(folder.name.rpartition("-")[2]) == 8
        folder.mkdir(parents=True)


def test_names_in_one_text_are_refused_with_advice(world: World) -> None:
    with pytest.raises(UnknownNameError, match="Unknown model 'minilm,bert'") as caught:
        world.train(resource="minilm,bert")
    assert caught.value.remedy.startswith("Give --resource once for each model")


def test_a_training_from_the_reader_of_a_run_says_what_is_not_used(
    trained: tuple[World, TrainResult, dict[str, Any]],
) -> None:
    world, result, given = trained
    reader = str(result.runs[0].folder / "reader")
    settings = given | {"reader": reader, "run_dir": world.folder / "further", "seeds": (1,), "epochs": 1.0}
    for keep_head, becomes in ((True, "It is kept, as --keep-head asks."), (False, "a new training draws a new head.")):
        notes = prepare(world.config(**settings, keep_head=keep_head), Shared()).notes
        assert any(f"{becomes} Its fusion and projection (kr2.safetensors) are not used." in one for one in notes)


def test_two_resources_of_one_name_are_refused(world: World, tmp_path: Path) -> None:
    again = Path(shutil.copytree(world.resource, tmp_path / "res"))
    with pytest.raises(ConfigError, match="Two resources are called 'res'"):
        world.train(resource=[str(world.resource), str(again)])


def test_from_the_command_line_and_in_a_grid(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"res": world.resource, "second": other(world), "reader": world.folder / "models" / "reader"}
    models = "".join(f"[models.{name}]\npath = '{path}'\n" for name, path in names.items())
    defaults = f"[defaults]\ntask = 'udpos'\ndata = '{world.data}'\nreader = 'reader'\nseeds = [1]\nepochs = 1.0\n"
    (world.folder / "kr2cache.toml").write_text(defaults + "fusion = 'last2'\n" + models, "utf-8")
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("KR2CACHE_DIR", str(world.caches))
    assert run(["train", "--resource", "res", "--resource", "second", "--json"]) == 0
    typed = json.loads(capsys.readouterr().out)["runs"][0]["folder"]
    assert Path(typed).parent.name.startswith("kr2-reader-res+second-last2-")
    grid = 'title = "two"\n[[columns]]\nname = "De"\n[[rows]]\nname = "both"\nresource = ["res", "second"]\n'
    grid += '[[rows]]\nname = "second"\nresource = ["second"]\n'
    (world.folder / "two.toml").write_text(grid, "utf-8")
    assert run(["sweep", "two.toml", "--json"]) == 0
    cells = json.loads((world.folder / "runs" / "sweeps" / "two.json").read_text("utf-8"))["cells"]
    assert [one["resource"] for one in cells] == ["res + second", "second"]
    assert (
        Path(typed).parent == world.folder / "runs" / cells[0]["folder"]
        or Path(typed).parent.name in cells[0]["folder"]
    )
    (world.folder / "kr2cache.toml").write_text(defaults + "resource = ['res', 'second']\n" + models, "utf-8")
    capsys.readouterr()
    assert run(["extract", "--split", "train"]) == 1
    assert "names several: res, second" in " ".join(capsys.readouterr().err.split())
