"""A trained reader's tokenizer: saved and loaded again before the training starts."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedTokenizerBase
from world import World, predictions

from kr2cache.errors import CacheError, DiskSpaceError, KR2CacheError, UnsupportedModelError
from kr2cache.experiment.shared import read_splits
from kr2cache.models.load import load_config
from kr2cache.models.registry import ModelSpec, trained_spec
from kr2cache.models.tokenizer_files import proven_files
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.prediction.predict import Predictor
from kr2cache.tasks import find_task
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder
from kr2cache.training.trainer import ReaderTrainer

OWN = "letters"
"""The name of a reader whose tokenizer is code."""


def trusted(folder: Path) -> dict[str, dict[str, Any]]:
    return {OWN: {"path": str(folder), "trust_remote_code": True}}


def files_of(folder: Path) -> dict[str, bytes]:
    spec = ModelSpec(name=OWN, path=folder, trust_remote_code=True)
    tokenizer = load_tokenizer(spec, words=True)

    def same(other: PreTrainedTokenizerBase) -> bool:
        return bool(other("das haus ?")["input_ids"] == tokenizer("das haus ?")["input_ids"])

    return proven_files(tokenizer, load_config(spec), spec, trusted(folder), words=True, same=same)


def tokens_from(files: Mapping[str, bytes], model: Path, folder: Path) -> list[int]:
    """Of a tokenizer that is loaded from a folder that holds these files and the model's configuration."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    tokenizer = load_tokenizer(trained_spec(OWN, folder, trusted(model)), words=True)
    numbers: list[int] = tokenizer("das haus ?")["input_ids"]
    return numbers


@pytest.mark.parametrize(
    "code",
    [
        {},
        {"prefix": ""},  # KoBERT's: transformers gives filename_prefix
        {"reference": "letters.Letters"},  # transformers writes its auto_map as one string, which it cannot read
        {"auto_map": ["tokenization_letters.LettersTokenizer", None]},  # as old models have it: it cannot be saved
        {"saved": "reversed(self.letters)"},  # what is saved can be loaded and gives other tokens
    ],
)
def test_a_tokenizer_that_is_code_is_kept_so_that_it_loads_again(tmp_path: Path, code: dict[str, Any]) -> None:
    model = tiny.use_code_tokenizer(tiny.save_model(tmp_path / "model"), **code)
    files = files_of(model)
    assert not [name for name in files if name.endswith((".safetensors", "config.json")) and "token" not in name]
    expected = [tiny.VOCABULARY.index(letter) for letter in "dashaus?"]
    # PreTrainedTokenizer puts no special tokens around a text, and a space is no letter of this vocabulary.
    assert [number for number in tokens_from(files, model, tmp_path / "again") if number != 3] == expected


def test_a_folder_that_transformers_saved_with_a_tokenizer_that_is_code_is_a_model(tmp_path: Path) -> None:
    model = tiny.use_code_tokenizer(tiny.save_model(tmp_path / "model"), reference="letters.Letters")
    saved = tiny.save_model(tmp_path / "saved")
    for path in saved.glob("*token*"):
        path.unlink()
    load_tokenizer(ModelSpec(name=OWN, path=model, trust_remote_code=True), words=True).save_pretrained(saved)
    settings = json.loads((saved / "tokenizer_config.json").read_text("utf-8"))
    assert isinstance(settings["auto_map"]["AutoTokenizer"], str)
    tokenizer = load_tokenizer(ModelSpec(name=OWN, path=saved, trust_remote_code=True), words=True)
    expected = [tiny.VOCABULARY.index(letter) for letter in "dashaus?"]
    assert [number for number in tokenizer("das haus ?")["input_ids"] if number != 3] == expected
    with pytest.raises(KR2CacheError, match="cannot be loaded"):  # its code runs only where the user trusts it
        load_tokenizer(ModelSpec(name=OWN, path=saved), words=True)


def test_a_tokenizer_that_cannot_be_kept_is_refused_before_the_training(world: World) -> None:
    model = tiny.use_code_tokenizer(world.folder / "models" / "reader", prefix="")
    path = model / "tokenization_letters.py"
    broken = 'if "kr2cache-" in vocab_file:\n            raise ValueError("not from here")\n        '
    path.write_text(path.read_text("utf-8").replace("with open(vocab_file", f"{broken}with open(vocab_file"), "utf-8")
    with pytest.raises(UnsupportedModelError, match=r"'letters' cannot be saved and loaded.*not from here"):
        world.train(method="kreader", reader=OWN, models=trusted(model))
    assert not (world.folder / "runs").exists()
    result = world.train(method="kreader", reader=OWN, models=trusted(model), keep_readers=False, epochs=1.0)
    assert not (result.runs[0].folder / "reader").exists()


def test_a_reader_with_koberts_kind_of_tokenizer_trains_and_predicts(world: World) -> None:
    model = tiny.use_code_tokenizer(world.folder / "models" / "reader", prefix="")
    run = world.train(method="kreader", reader=OWN, models=trusted(model), epochs=1.0).runs[0].folder
    predictor = Predictor.load(run, models=trusted(model), device="cpu")
    test = read_splits(find_task("udpos"), world.config())[0]["test"]
    assert [one.predicted for one in predictor(test)] == [row["predicted"] for row in predictions(run, "test")]


def test_scores_outlive_a_reader_that_cannot_be_saved(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = world.train(method="kreader", epochs=1.0).runs[0].folder
    kept = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    whole.rename(world.folder / "whole")
    save = KReader.save

    def full(reader: KReader, folder: Path) -> None:
        save(reader, folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(KReader, "save", full)
    run = world.train(method="kreader", epochs=1.0).runs[0].folder
    assert run == whole
    for name in ("metrics.json", "predictions-dev.jsonl", "predictions-test.jsonl", "history.json"):
        assert (run / name).read_bytes() == kept[name]
    assert sorted(path.name for path in run.iterdir()) == sorted(kept)
    assert RunFolder(run).read_config()["config"] == json.loads(kept["config.json"])["config"]
    said = capsys.readouterr().out
    assert "The trained reader of seed 1 could not be saved and is lost" in said
    assert "No space left on device" in said
    with pytest.raises(CacheError) as caught:
        Predictor.load(run, device="cpu")
    assert "could not be saved when the run was trained: [Errno 28] No space left on device" in caught.value.remedy


def test_scores_that_cannot_be_written_are_shown(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(run: RunFolder, split: str, rows: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_predictions", full)
        with pytest.raises(OSError, match="No space"):
            world.train(method="kreader", epochs=1.0)
    (folder,) = (world.folder / "runs" / "udpos").iterdir()
    assert list(folder.iterdir()) == []
    said = capsys.readouterr().out
    metrics = world.train(method="kreader", epochs=1.0).runs[0].metrics
    assert f"accuracy {metrics['dev']['accuracy']:.4g}" in said
    assert f"accuracy {metrics['test']['accuracy']:.4g}" in said


def test_room_for_the_reader_is_looked_for_before_the_first_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.train(method="kreader", epochs=1.0).runs[0].folder
    weights = (run / "reader" / "model.safetensors").stat().st_size
    steps: list[int] = []
    step = ReaderTrainer.training_step
    monkeypatch.setattr(ReaderTrainer, "training_step", lambda *given: steps.append(1) or step(*given))
    usage = shutil.disk_usage(world.folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=weights // 2))
        with pytest.raises(DiskSpaceError, match=f"trained reader needs .* {weights // 2:,} are free"):
            world.train(method="kreader", epochs=1.0, seeds=(2,))
    assert not steps
    world.train(method="kreader", epochs=1.0, seeds=(2,))
    assert steps


def test_a_reader_that_is_code_loads_again(world: World) -> None:
    model = world.folder / "models" / "reader"
    code = "from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification, XLMRobertaModel\n\n\n"
    code += 'class OwnConfig(XLMRobertaConfig):\n    model_type = "own-xlmr"\n\n\n'
    code += "class OwnModel(XLMRobertaModel):\n    config_class = OwnConfig\n\n\n"
    code += "class OwnTagger(XLMRobertaForTokenClassification):\n    config_class = OwnConfig\n"
    (model / "own_model.py").write_text(code, "utf-8")
    config = json.loads((model / "config.json").read_text("utf-8"))
    classes = {"Config": "OwnConfig", "Model": "OwnModel", "ModelForTokenClassification": "OwnTagger"}
    auto_map = {f"Auto{auto}": f"own_model.{own}" for auto, own in classes.items()}
    config |= {"model_type": "own-xlmr", "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    run = world.train(method="kreader", reader=OWN, models=trusted(model), epochs=1.0).runs[0].folder
    predictor = Predictor.load(run, models=trusted(model), device="cpu")
    assert type(predictor.reader.model).__name__ == "OwnTagger"
    test = read_splits(find_task("udpos"), world.config())[0]["test"]
    assert [one.predicted for one in predictor(test)] == [row["predicted"] for row in predictions(run, "test")]
    with pytest.raises(KR2CacheError):  # code runs only where kr2cache.toml says so
        Predictor.load(run, device="cpu")
