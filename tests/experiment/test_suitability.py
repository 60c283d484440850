"""What ``kr2cache models NAME`` says of a model: the same as extract and train say when they refuse it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from transformers import AutoModel
from world import World

from kr2cache.cli import run
from kr2cache.errors import UnsupportedModelError
from kr2cache.experiment import suitability as suitability_module
from kr2cache.experiment.suitability import PLAIN, READER, RESOURCE, Suitability, suitability
from kr2cache.models import load, stack
from kr2cache.models.registry import find_model
from kr2cache.system import hub
from kr2cache.system.console import bytes_text

HEADS = ("token", "sequence", "choice")


def of(folder: Path) -> Suitability:
    return suitability(find_model(str(folder), {}))


def able(found: Suitability, role: str) -> dict[str, bool | None]:
    return {one.head: one.able for one in found.answers if one.role == role}


def test_an_encoder_serves_as_everything(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", str(bert), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["architecture"], shown["layers"], shown["width"], shown["positions"]) == ("bert", 5, 16, 600)
    assert shown["bytes_per_token"] == {"float16": 160, "bfloat16": 160, "float32": 320, "int8": 5 * (16 + 4)}
    assert (shown["folder"], shown["tokenizer"]["aligns_words"]) == (str(bert), True)
    assert {(one["role"], one["head"]) for one in shown["serves"] if one["able"]} == {
        (role, head) for role in (RESOURCE, READER, PLAIN) for head in HEADS
    }
    assert run(["models", str(bert)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in ("5 of width 16", "600", "float16 160", str(bert), "words are aligned"))
    assert "no" not in [cell.strip() for line in text.splitlines() for cell in line.split("│")]


def test_a_decoder_is_refused_as_train_refuses_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt = tiny.save_model(tmp_path / "gpt", "gpt2")
    found = of(gpt)
    assert able(found, RESOURCE) == dict.fromkeys(HEADS, True)
    assert able(found, READER) == dict.fromkeys(HEADS, False)
    assert able(found, PLAIN)["token"]
    (said,) = (one for one in found.answers if (one.role, one.head) == (READER, "token"))
    with pytest.raises(UnsupportedModelError) as refused:
        world.train(reader=str(gpt))
    assert (said.why, said.remedy) == (refused.value.message, refused.value.remedy)
    assert run(["models", str(gpt)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{READER} for tagging: {said.why} {said.remedy}" in text or f"{READER}: {said.why}" in text


def test_without_weights_the_configuration_still_tells_the_sizes(bert: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    found = of(model)
    assert (found.layers, found.width, found.token_bytes["float16"]) == (5, 16, 160)
    assert found.tokenizer["aligns_words"]
    assert {one.able for one in found.answers} == {None}
    assert all("holds no weights" in str(one.why) for one in found.answers)


def test_without_weights_it_is_still_known_what_no_weights_can_make_possible(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "t5", "t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    (model / "model.safetensors").unlink()
    found = of(model)
    assert able(found, RESOURCE) == dict.fromkeys(HEADS)
    assert able(found, READER) == able(found, PLAIN) == dict.fromkeys(HEADS, False)


def test_nan_in_the_weights_is_no_model_for_anything(bert: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = of(model)
    assert {one.able for one in found.answers} == {False}
    assert all("embeddings.LayerNorm.weight" in str(one.why) for one in found.answers)


def test_a_tokenizer_that_loses_words_serves_for_texts(bert: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    backend: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.normalizer = normalizers.Replace(".", "")
    backend.save(str(model / "tokenizer.json"))
    found = of(model)
    assert (found.tokenizer["aligns_words"], found.tokenizer["fast"]) == (False, True)
    for role in (RESOURCE, READER, PLAIN):
        assert able(found, role) == {"token": False, "sequence": True, "choice": True}


def test_a_model_that_is_not_here_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> str:
        assert run(["models", name, "--json"]) == 1
        said = json.loads(capsys.readouterr().out)["error"]
        return f"{said['message']} {said['remedy']}"

    assert "is not on this machine, and the hub gave no copy: HF_HUB_OFFLINE is set" in refused("beto")
    assert "Did you mean 'beto'" in refused("betoo")
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    assert "This command downloads nothing. Run `hf download owner/model` first." in refused("owner/model")


# Memory ---------------------------------------------------------------------------------------------------------------


@contextmanager
def files_read() -> Iterator[list[Path]]:
    """The folders from which weights are read inside."""
    real, folders = load.from_pretrained, list[Path]()

    def noting(spec: Any, model_class: Any, folder: Path | None, *others: Any, **options: Any) -> Any:
        folders.extend([] if folder is None else [folder])
        return real(spec, model_class, folder, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (load, stack):
            patch.setattr(module, "from_pretrained", noting)
        yield folders


def test_the_weights_are_read_once_for_all_roles(bert: Path) -> None:
    with files_read() as folders:
        found = of(bert)
    assert {one.able for one in found.answers} == {True}
    assert folders == [bert]
    with files_read() as folders:
        found = suitability(find_model(str(bert), {}), "bfloat16")
    assert {one.able for one in found.answers} == {True}
    assert folders == [bert, bert], "as resource in bfloat16, as reader in float32"


def test_a_model_that_is_too_large_for_memory_is_not_tried(
    bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(one.numel() for one in AutoModel.from_pretrained(bert).parameters())
    monkeypatch.setattr(suitability_module, "free_memory", lambda: 3 * numbers)
    with files_read() as folders:
        assert run(["models", str(bert), "--json"]) == 0
        assert not folders
        shown = json.loads(capsys.readouterr().out)
        assert (shown["parameters"], shown["weight_bytes"]["bfloat16"]) == (numbers, 2 * numbers)
        assert {one["able"] for one in shown["serves"]} == {None}
        assert run(["models", str(bert)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        size, double, half = map(bytes_text, (4 * numbers, 8 * numbers, 2 * numbers))
        assert f"{numbers:,} numbers: {size} in float32, {half} in bfloat16" in text
        assert f"needs {size} for its weights in float32." in text
        assert f"Give --weights-dtype bfloat16 ({half})" in text
        assert f"needs {double} for its weights in float32, twice" in text
        assert not folders
    assert run(["models", str(bert), "--weights-dtype", "bfloat16", "--json"]) == 0
    tried = {(one["role"], one["able"]) for one in json.loads(capsys.readouterr().out)["serves"]}
    assert tried == {(RESOURCE, True), (READER, None), (PLAIN, None)}
    assert run(["models", "--weights-dtype", "bfloat16", "--json"]) == 1
    assert "Name it" in json.loads(capsys.readouterr().out)["error"]["remedy"]


def test_what_no_weights_can_make_possible_is_said_before_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suitability_module, "free_memory", lambda: 1)
    model = tiny.save_model(tmp_path / "t5", "t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    found = of(model)
    assert able(found, RESOURCE) == dict.fromkeys(HEADS)
    assert able(found, READER) == able(found, PLAIN) == dict.fromkeys(HEADS, False)


def test_positions_that_a_configuration_does_not_give_are_not_without_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save_model(tmp_path / "roberta", "roberta")
    fields = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**fields, "pad_token_id": None}), "utf-8")
    assert run(["models", str(model)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "no limit" not in text
    assert "pad_token_id None; this architecture counts positions from it" in text
