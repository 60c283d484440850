"""Model names, where models lie, and that what is loaded is what transformers loads."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    CanineConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
)

from kr2cache.cli import run
from kr2cache.config import ExtractConfig
from kr2cache.errors import (
    ConfigError,
    DeviceMemoryError,
    KR2CacheError,
    ModelUnavailableError,
    UnknownNameError,
    UnsupportedModelError,
)
from kr2cache.extraction.planning import plan_extraction
from kr2cache.models.configuration import encoder_shape, max_positions, vocabulary
from kr2cache.models.contents import fault
from kr2cache.models.digests import model_digests, weights_digest
from kr2cache.models.encode import pad
from kr2cache.models.files import check_complete, check_obtainable, local_folder, model_folder
from kr2cache.models.load import WEIGHTS, explained, load_config, load_pretrained
from kr2cache.models.registry import REGISTRY, ModelSpec, find_model, known_models
from kr2cache.models.stack import load_encoder
from kr2cache.models.tokenizers import load_tokenizer, pad_id

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put_in_hub(hub: Path, hub_id: str, model: Path, revision: str = REVISION, ref: str = "main") -> Path:
    """The layout that a download leaves: refs/main names a snapshot."""
    repository = hub / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(revision)
    return Path(shutil.copytree(model, repository / "snapshots" / revision))


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "language", "hub_id"),
    [
        ("gottbert", "de", "uklfr/gottbert-base"),
        ("beto", "es", "dccuchile/bert-base-spanish-wwm-cased"),
        ("ernie-1.0", "zh", "nghuyong/ernie-1.0-base-zh"),
        ("arabic-bert", "ar", "asafaya/bert-base-arabic"),
        ("kobert", "ko", "monologg/kobert"),
        ("bert-japanese-wwm", "ja", "tohoku-nlp/bert-base-japanese-whole-word-masking"),
        ("oscar", "en", None),
        ("bert", "en", "google-bert/bert-base-uncased"),
        ("xlm-r", None, "FacebookAI/xlm-roberta-base"),
    ],
)
def test_registered_models(workdir: Path, name: str, language: str | None, hub_id: str | None) -> None:
    spec = find_model(name, {})
    assert (spec.name, spec.language, spec.hub_id) == (name, language, hub_id)
    if hub_id is not None:
        assert find_model(hub_id, {}) == spec


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("TUM/GottBERT_base_last", "gottbert"),
        ("nghuyong/ernie-1.0", "ernie-1.0"),
        ("cl-tohoku/bert-base-japanese-whole-word-masking", "bert-japanese-wwm"),
        ("xlm-roberta-base", "xlm-r"),
        ("bert-base-uncased", "bert"),
    ],
)
def test_aliases_resolve_to_the_registered_model(workdir: Path, alias: str, name: str) -> None:
    assert find_model(alias, {}) == REGISTRY[name]


@pytest.mark.parametrize(("name", "near"), [("gotbert", "gottbert"), ("xlmr", "xlm-r"), ("ernie", "ernie-1.0")])
def test_an_unknown_name_gives_the_nearest(workdir: Path, name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"Unknown model '{name}'\. Did you mean '{near}'\?") as caught:
        find_model(name, {})
    assert "arabic-bert" in caught.value.remedy
    assert "hub id" in caught.value.remedy


def test_any_hub_id_is_a_model(workdir: Path) -> None:
    spec = find_model("dbmdz/bert-base-german-cased", {})
    assert spec == ModelSpec(name="dbmdz--bert-base-german-cased", hub_id="dbmdz/bert-base-german-cased")


def test_any_folder_is_a_model(bert: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(bert), {}) == ModelSpec(name="tiny-bert", path=bert)
    monkeypatch.chdir(bert.parent)
    spec = find_model("tiny-bert", {})
    assert spec.name == "tiny-bert"
    assert model_folder(spec).resolve() == bert


@pytest.mark.parametrize("name", ["./nothing", "/no/such/model", "~/no-such-kr2cache-model", "../x"])
def test_a_folder_that_is_not_there(workdir: Path, name: str) -> None:
    with pytest.raises(ModelUnavailableError, match="There is no model folder"):
        find_model(name, {})


def test_a_folder_that_holds_no_model(workdir: Path) -> None:
    (workdir / "empty").mkdir()
    with pytest.raises(ModelUnavailableError, match=r"empty.* holds no config\.json"):
        load_config(find_model("./empty", {}))


# kr2cache.toml -------------------------------------------------------------------------------------------------------


def test_toml_adds_models_and_overrides_fields_of_registered_ones(bert: Path, workdir: Path) -> None:
    overrides = {
        "mine": {"path": str(bert), "language": "fi"},
        "gottbert": {"path": str(bert)},
        "beto": {"revision": "v2"},
        "xlm-r": {"hub_id": "me/xlm-r"},
    }
    assert find_model("mine", overrides) == ModelSpec(name="mine", path=bert, language="fi")
    assert find_model("gottbert", overrides) == dataclasses.replace(REGISTRY["gottbert"], path=bert)
    assert find_model("beto", overrides) == dataclasses.replace(REGISTRY["beto"], revision="v2")
    assert find_model("xlm-r", overrides).hub_id == "me/xlm-r"
    assert find_model("kobert", overrides) == REGISTRY["kobert"]
    assert set(known_models(overrides)) == {*REGISTRY, "mine"}
    assert local_folder(find_model("gottbert", overrides)) == bert


def test_a_url_where_toml_gives_the_folder_of_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"path in \[models\.mine\] in kr2cache\.toml: s3://bucket/m is a URL"):
        known_models({"mine": {"path": "s3://bucket/m"}})


def test_toml_with_a_wrong_field_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"\[models\.gottbert\].*'pth'.*Did you mean 'path'"):
        known_models({"gottbert": {"pth": "x"}})


@pytest.mark.parametrize("values", [{}, {"language": "de"}, {"revision": "v1"}])
def test_toml_with_a_new_model_that_is_nowhere(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"\[models\.mine\].*neither path nor hub_id"):
        known_models({"mine": values})


@pytest.mark.parametrize(
    "values", [{"path": 3}, {"path": "x", "language": 3}, {"hub_id": ["a"]}, {"path": "x", "trust_remote_code": "yes"}]
)
def test_toml_with_a_value_of_another_type_is_explained(workdir: Path, values: dict[str, object]) -> None:
    with pytest.raises(KR2CacheError, match=r"models\.mine"):
        known_models({"mine": values})


# On this machine or not ----------------------------------------------------------------------------------------------


def test_a_model_in_the_hubs_cache_is_found_and_loads_as_transformers_loads_it(bert: Path, hub: Path) -> None:
    snapshot = put_in_hub(hub, "uklfr/gottbert-base", bert)
    spec = find_model("gottbert", {})
    assert local_folder(spec) == snapshot
    assert model_folder(spec) == snapshot
    assert encoder_shape(load_config(spec)) == (5, 16)
    encoder = load_encoder(spec)
    reference = AutoModel.from_pretrained(snapshot).eval()
    ids = load_tokenizer(spec, words=True)(["das", "haus"], is_split_into_words=True, return_tensors="pt")["input_ids"]
    assert (
        ids.tolist() == AutoTokenizer.from_pretrained(snapshot)("das haus", return_tensors="pt")["input_ids"].tolist()
    )
    with torch.inference_mode():
        ours = encoder(input_ids=ids, output_hidden_states=True).hidden_states
        theirs = reference(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_an_alias_in_the_hubs_cache_serves(bert: Path, hub: Path) -> None:
    snapshot = put_in_hub(hub, "TUM/GottBERT_base_last", bert)
    assert local_folder(find_model("gottbert", {})) == snapshot


def test_a_revision_is_not_taken_for_another(bert: Path, hub: Path) -> None:
    put_in_hub(hub, "me/model", bert)
    other = "f" * 40
    snapshot = put_in_hub(hub, "me/model", bert, other, ref="v2")
    overrides = {"old": {"hub_id": "me/model", "revision": "v2"}, "none": {"hub_id": "me/model", "revision": "v3"}}
    assert local_folder(find_model("old", overrides)) == snapshot
    assert local_folder(find_model("none", overrides)) is None


def test_a_download_without_weights_is_not_a_model(bert: Path, hub: Path) -> None:
    snapshot = put_in_hub(hub, "me/model", bert)
    (snapshot / "model.safetensors").unlink()
    assert local_folder(find_model("me/model", {})) is None


CONTROL = {"drawn": {"hub_id": "me/model", "weights": "random"}}


def test_a_download_without_weights_is_enough_for_a_control(bert: Path, hub: Path) -> None:
    snapshot = put_in_hub(hub, "me/model", bert)
    (snapshot / "model.safetensors").unlink()
    assert local_folder(find_model("drawn", CONTROL)) == snapshot
    for path in snapshot.glob("*token*"):
        path.unlink()
    assert local_folder(find_model("drawn", CONTROL)) is None, "without a tokenizer it can run no text"


def test_a_control_takes_a_clone_without_the_weights(bert: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(bert, tmp_path / "model"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (model / "model.safetensors").write_text(pointer)
    drawn = find_model("drawn", {"drawn": {"path": str(model), "weights": "random"}})
    check_complete(drawn)
    with pytest.raises(ModelUnavailableError, match="only a pointer"):
        check_complete(find_model(str(model), {}))
    (model / "tokenizer.json").write_text(pointer)
    with pytest.raises(ModelUnavailableError, match=r"tokenizer\.json is only a pointer"):
        check_complete(drawn)


@pytest.mark.parametrize("name", ["gottbert", "kobert", "nobody/has-this"])
def test_absent_and_offline_names_the_hub_id_and_both_remedies_without_a_look_at_the_network(
    hub: Path, workdir: Path, looked_up: list[str], name: str
) -> None:
    spec = find_model(name, {})
    with pytest.raises(ModelUnavailableError) as caught:
        load_encoder(spec)
    assert looked_up == []
    assert spec.hub_id is not None
    assert spec.hub_id in caught.value.message
    assert f"hf download {spec.hub_id}" in caught.value.remedy
    if name == spec.name:
        assert f'path = "..." under [models.{name}]' in caught.value.remedy
    else:  # under [models] its own name would not be looked for
        assert caught.value.remedy.endswith(f"or give a folder that you have in place of {name}.")


def test_without_a_network_the_hub_is_looked_up_once(
    hub: Path, workdir: Path, looked_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not told to be offline, the hub's host cannot be found: no half minute of retries."""
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(ModelUnavailableError, match=r"no network \(cannot find hub\.invalid\)") as caught:
        model_folder(find_model("gottbert", {}))
    assert "uklfr/gottbert-base" in caught.value.message
    assert looked_up == ["hub.invalid"]


def test_a_model_that_is_on_no_hub_says_what_it_needs(workdir: Path) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        model_folder(find_model("oscar", {}))
    assert "[models.oscar]" in caught.value.remedy


# Loading -------------------------------------------------------------------------------------------------------------


def test_an_oscar_checkpoint_loads_by_its_path(tmp_path: Path) -> None:
    """config.json without model_type, a BERT text encoder beside image parts, vocab.txt, pytorch_model.bin."""
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(1)
    text = BertModel(config).eval()
    weights = {f"bert.{name}": tensor for name, tensor in text.state_dict().items()}
    weights |= {"bert.img_embedding.weight": torch.zeros(16, 3), "bert.LayerNorm.weight": torch.ones(16)}
    weights |= {"cls.predictions.bias": torch.zeros(8)}
    folder = tmp_path / "oscar"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    fields = {
        **{
            name: getattr(config, name)
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        },
        "img_feature_dim": 2054,
        "finetuning_task": "image_caption",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s"]))
    spec = find_model("oscar", {"oscar": {"path": str(folder)}})
    assert load_config(spec).model_type == "bert"
    assert encoder_shape(load_config(spec)) == (3, 16)
    tokenizer = load_tokenizer(spec, words=True)
    ids = tokenizer(["the", "dogs"], is_split_into_words=True)["input_ids"]
    assert ids == BertTokenizer(str(folder / "vocab.txt"))("the dogs")["input_ids"] == [2, 5, 6, 7, 3]
    encoder = load_encoder(spec)
    with torch.inference_mode():
        ours = encoder(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        theirs = text(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json", "special_tokens_map.json")])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "deberta-v2"])
def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path, model_type: str, left: tuple[str, ...]) -> None:
    """transformers makes one of special tokens alone, to which every word is unknown."""
    folder = tiny.save_model(tmp_path / "partial-copy", model_type)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    own = "DebertaV2Tokenizer" if model_type == "deberta-v2" else "BertTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"tokenizer_class": own}))
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", *left):
            path.unlink()
    with pytest.raises(ModelUnavailableError, match=r"partial-copy.*tokeni[sz]er"):
        load_tokenizer(find_model(str(folder), {}), words=True)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_what_reads_a_sentencepiece_file_is_named(tmp_path: Path) -> None:
    """DeBERTa-v3's folder on the hub has no tokenizer.json; without the package, transformers asks for another one."""
    folder = tiny.save_model(tmp_path / "deberta-v3", "deberta-v2")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    (folder / "spm.model").write_bytes(b"\n\x0e\n\x05[PAD]\x15\0\0\0\0\x18\x03")
    with pytest.raises(
        ModelUnavailableError, match=r"deberta-v3.* reading spm\.model .* needs sentencepiece"
    ) as caught:
        load_tokenizer(find_model(str(folder), {}), words=True)
    assert "pip install sentencepiece" in caught.value.message
    assert caught.value.remedy.startswith("Install what is missing")


def test_remote_code_runs_only_for_the_model_that_asks_for_it() -> None:
    assert not any(spec.trust_remote_code for spec in REGISTRY.values())
    known = known_models({"kobert": {"trust_remote_code": True}})
    assert [name for name, spec in known.items() if spec.trust_remote_code] == ["kobert"]


def test_code_that_comes_with_a_model_does_not_run_by_itself(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "with-code"))
    mark = tmp_path / "it-ran"
    (folder / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass OwnConfig: pass\n")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelUnavailableError, match="with-code"):
        load_config(find_model(str(folder), {}))
    assert not mark.exists()


def test_the_encoder_is_frozen_float32_and_without_dropout(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "half")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "float16"}))
    encoder = load_encoder(find_model(str(folder), {}))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.training


def test_a_checkpoint_that_lacks_encoder_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "partly")
    weights = load_file(folder / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if "layer.1.output" not in name}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedModelError, match=rf"'partly' lacks {len(weights) - len(left)} weights.*layer\.1\.output"
    ):
        load_encoder(find_model(str(folder), {}))


def test_a_checkpoint_without_a_pooler_is_complete(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "no-pooler")
    weights = load_file(folder / "model.safetensors")
    whole = weights_digest(load_encoder(find_model(str(folder), {})))
    left = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(left) < len(weights)
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(load_encoder(find_model(str(folder), {}))) == whole


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 40, 0.5], ids=["empty", "start", "half"])
def test_damaged_files_are_explained(bert: Path, tmp_path: Path, name: str, kept: float) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "damaged"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(KR2CacheError, match=r"of model 'damaged' cannot be loaded"):
        load_encoder(find_model(str(folder), {}))


def test_a_damaged_pickle_is_explained(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "damaged"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(KR2CacheError, match=r"weights of model 'damaged' cannot be loaded"):
        load_encoder(find_model(str(folder), {}))


def test_positions_that_roberta_never_uses_are_not_counted() -> None:
    assert max_positions(BertConfig(max_position_embeddings=512)) == 512
    assert max_positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512


# Digest of the weights -----------------------------------------------------------------------------------------------


def digest_of(folder: Path) -> str:
    return weights_digest(load_encoder(find_model(str(folder), {})))


def test_the_digest_is_of_the_weights_not_of_the_files(bert: Path, tmp_path: Path) -> None:
    original = digest_of(bert)
    renamed = Path(shutil.copytree(bert, tmp_path / "another-name"))
    assert digest_of(renamed) == original
    weights = load_file(renamed / "model.safetensors")
    (renamed / "model.safetensors").unlink()
    torch.save(weights, renamed / "pytorch_model.bin")
    assert digest_of(renamed) == original


def test_the_digest_sees_one_changed_weight(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "changed"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layer.2" in name and name.endswith("weight"))
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert digest_of(folder) != digest_of(bert)


# Dropout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "xlm-roberta", "electra"])
def test_dropout_can_be_set_for_training_alone(tmp_path: Path, model_type: str) -> None:
    spec = ModelSpec(name="m", path=tiny.save_model(tmp_path / "m", model_type))
    without = dataclasses.replace(spec, dropout=0.0)

    def probabilities(of: ModelSpec) -> set[float]:
        model, *_ = load_pretrained(of, AutoModelForTokenClassification, load_config(of))
        return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}

    assert max(probabilities(spec)) > 0, "as its config.json says"
    assert probabilities(without) == {0.0}
    assert probabilities(dataclasses.replace(spec, dropout=0.3)) == {0.3}
    as_is, changed = model_digests(spec), model_digests(without)
    assert (as_is.weights, as_is.config) == (changed.weights, changed.config), "caches do not depend on it"
    assert as_is.config_in_training != changed.config_in_training, "runs do"


@pytest.mark.parametrize("value", [1, 1.0, -0.1, "0", True, float("nan")])
def test_a_dropout_that_makes_no_sense_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"dropout = .* should be at least 0 and less than 1"):
        known_models({"minilm": {"dropout": value}})
    assert known_models({"minilm": {"dropout": 0}})["minilm"].dropout == 0


# A configuration's fields --------------------------------------------------------------------------------------------


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | fields), "utf-8")


def states_of(folder: Path) -> list[torch.Tensor]:
    """By our loading, of two sequences of different lengths."""
    spec = find_model(str(folder), {})
    tokenizer, encoder = load_tokenizer(spec, words=True), load_encoder(spec)
    ids = [[0, 20, 21, 22, 2], [0, 30, 2]]
    rows = torch.from_numpy(pad([np.array(one) for one in ids], pad_id(tokenizer)))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.inference_mode():
        states = encoder(input_ids=rows, attention_mask=mask, output_hidden_states=True).hidden_states
    return [torch.stack(states)[:, i, : len(one)] for i, one in enumerate(ids)]


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "modernbert", "albert"])
def test_a_padding_token_outside_the_embeddings_does_no_harm(tmp_path: Path, model_type: str) -> None:
    """Of the tokenizer, as where [PAD] was added to it alone, or of the configuration as well."""
    folder = tiny.save_model(tmp_path / "m", model_type)
    expected = states_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[ADDED]"})
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == len(tiny.VOCABULARY)
    for change in ({}, {"pad_token_id": len(tiny.VOCABULARY)}):
        edit_config(folder, **change)
        for one, other in zip(states_of(folder), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_what_a_configuration_wants_as_output_does_no_harm(tmp_path: Path, model_type: str) -> None:
    folder = tiny.save_model(tmp_path / "m", model_type)
    expected, digest = states_of(folder), model_digests(find_model(str(folder), {})).config
    edit_config(folder, return_dict=False, output_attentions=True, output_hidden_states=True)
    assert all(torch.equal(one, other) for one, other in zip(states_of(folder), expected, strict=True))
    assert model_digests(find_model(str(folder), {})).config == digest
    spec = find_model(str(folder), {})
    reader, *_ = load_pretrained(spec, AutoModelForTokenClassification, load_config(spec))
    reader.save_pretrained(tmp_path / "trained")  # transformers refuses to save a configuration that wants attentions
    _, missing, other = load_pretrained(find_model(str(tmp_path / "trained"), {}), type(reader), reader.config)
    assert not missing | other


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("bert", "hidden_size", None),
        ("bert", "num_hidden_layers", None),
        ("bert", "num_hidden_layers", 0),
        ("bert", "vocab_size", None),
        ("bert", "vocab_size", 0),
        ("bert", "max_position_embeddings", -1),
        ("bert", "max_position_embeddings", None),
        ("roberta", "pad_token_id", None),
        ("roberta", "pad_token_id", 900),
        ("roberta", "max_position_embeddings", -1),
        ("roberta", "max_position_embeddings", 2),
    ],
)
def test_a_field_that_is_null_or_makes_no_sense_is_named(
    tmp_path: Path, model_type: str, field: str, value: object
) -> None:
    folder = tiny.save_model(tmp_path / "m", model_type)
    tiny.save_corpus(tmp_path / "corpus", train=2, dev=0, test=0)
    edit_config(folder, **{field: value})
    config = ExtractConfig(
        resource=str(folder), split="train", task="udpos", data=str(tmp_path / "corpus"), cache_dir=tmp_path / "cache"
    )
    with pytest.raises(UnsupportedModelError, match=rf"\b{field}\b"):
        plan_extraction(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "nosuch"}, "KeyError: 'nosuch'"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
    ],
)
def test_a_configuration_that_no_model_can_be_built_from_is_not_blamed_on_the_weights(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    folder = tiny.save_model(tmp_path / "m")
    edit_config(folder, **fields)
    spec = find_model(str(folder), {})
    for load in (
        lambda: load_encoder(spec),
        lambda: load_pretrained(spec, AutoModelForTokenClassification, load_config(spec)),
        lambda: load_pretrained(spec, BertForTokenClassification, load_config(spec), {}),
    ):
        with pytest.raises(UnsupportedModelError, match=f"No model can be built .* 'm' .*{message}") as refused:
            load()
        assert "config.json" in refused.value.remedy


def test_weights_that_are_damaged_are_not_blamed_on_the_configuration(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2_000])
    with pytest.raises(ModelUnavailableError, match="The weights of model 'm' cannot be loaded") as refused:
        load_encoder(find_model(str(folder), {}))
    assert "is complete" in refused.value.remedy


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b""),
        ("config.json", b'\xef\xbb\xbf{"model_type": "bert"}'),
        ("tokenizer_config.json", b'{"a": "\xff"}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = tiny.save_model(tmp_path / "m")
    (folder / name).write_bytes(content)
    for spec in (find_model(str(folder), {}), find_model("minilm", {"minilm": {"path": str(folder)}})):
        with pytest.raises(ModelUnavailableError, match=f"{name} is not JSON in UTF-8") as refused:
            load_tokenizer(spec, words=True)
        assert refused.value.remedy == f"Copy {name} again from the model.", "also where the name needs an extra"


def test_weights_without_room_in_memory_are_not_blamed_on_the_model(tmp_path: Path) -> None:
    spec = find_model("minilm", {"minilm": {"path": str(tiny.save_model(tmp_path / "m"))}})
    for said in (
        "unable to mmap 9 bytes from file </m>: Cannot allocate memory (12)",
        "Cannot allocate memory (os error 12)",
    ):
        with (
            pytest.raises(DeviceMemoryError, match=r"weights .* too little free memory") as refused,
            explained(spec, WEIGHTS),
        ):
            raise OSError(said)  # as torch and safetensors said it where the address space was limited
        assert refused.value.remedy == "Close other programs."


def test_an_architecture_that_is_not_known_and_a_package_that_is_missing_get_their_own_advice(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "m")
    spec = find_model(str(folder), {})
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelUnavailableError, match="bitsandbytes") as refused:
        load_encoder(spec)
    assert refused.value.remedy.startswith("Install what is missing")
    edit_config(folder, model_type="nosuch")
    with pytest.raises(ModelUnavailableError, match="nosuch") as refused:
        load_config(spec)
    assert "model_type" in refused.value.remedy
    assert "transformers" in refused.value.remedy


def test_a_folder_that_a_package_lacks_is_named() -> None:
    spec = find_model("mine", {"mine": {"package": "transformers/models"}})
    with pytest.raises(
        ModelUnavailableError, match=r"no installed package has transformers/models/config\.json"
    ) as caught:
        check_obtainable(spec)
    assert 'package = "PACKAGE/FOLDER" under [models.mine]' in caught.value.remedy


def test_what_an_architecture_has_not_cannot_be_corrected() -> None:
    """CANINE reads characters, without a vocabulary; a BERT of 0 layers has a mistake in its file."""
    with pytest.raises(UnsupportedModelError, match=r"\(canine\) has vocab_size absent") as refused:
        vocabulary(CanineConfig())
    assert refused.value.remedy == "Choose another model."
    with pytest.raises(UnsupportedModelError, match="has num_hidden_layers 0") as refused:
        encoder_shape(BertConfig(num_hidden_layers=0))
    assert refused.value.remedy == "Correct num_hidden_layers in its config.json, or choose another model."


def test_no_limit_of_positions_is_no_limit() -> None:
    assert max_positions(XLNetConfig()) is None, "a property that is -1"
    assert max_positions(PreTrainedConfig()) is None, "absent"


# A model's files -----------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 438007537\n".format("4" * 64)


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def clone_without_lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)


def lose_a_shard(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    lose_weights(folder)
    model.save_pretrained(folder, max_shard_size="5KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


@pytest.mark.parametrize(
    ("spoil", "message", "remedy"),
    [
        (lose_weights, r"mine holds no weights \(model\.safetensors or pytorch_model\.bin\)", "Copy the weights"),
        (clone_without_lfs, r"without git-lfs: model\.safetensors is only a pointer", "git lfs pull"),
        (lose_a_shard, r"lacks 1 of the files of its weights: model-00002-of-\d+\.safetensors", "Copy them"),
    ],
)
def test_a_folder_without_its_weights_is_no_model(
    bert: Path,
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
    remedy: str,
) -> None:
    folder = Path(shutil.copytree(bert, workdir / "mine"))
    (workdir / "kr2cache.toml").write_text('[models.mine]\npath = "mine"\n')
    overrides = {"mine": {"path": "mine"}}

    def listed() -> dict[str, str | None]:
        assert run(["models", "--json"]) == 0
        return next(one for one in json.loads(capsys.readouterr().out) if one["name"] == "mine")

    assert (listed()["folder"], listed()["fault"]) == ("mine", None)
    spoil(folder)
    assert listed()["folder"] is None
    assert re.search(message, listed()["fault"] or "")
    assert run(["models"]) == 0
    assert remedy in capsys.readouterr().out
    for check in (check_obtainable, load_encoder):
        with pytest.raises(ModelUnavailableError, match=message) as caught:
            check(find_model("mine", overrides))
        assert remedy in caught.value.remedy


def test_a_tokenizer_that_is_a_pointer_is_seen(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "m"))
    assert fault(folder) is None
    (folder / "tokenizer.json").write_text(POINTER)
    found = fault(folder)
    assert found is not None
    assert "tokenizer.json is only a pointer" in found[0]


# Downloading ---------------------------------------------------------------------------------------------------------

PHOBERT = ("config.json", "tokenizer_config.json", "vocab.txt", "bpe.codes", "pytorch_model.bin")
OTHERS = (
    "tf_model.h5",
    "flax_model.msgpack",
    "README.md",
    ".gitattributes",
    "onnx/model.onnx",
    "logo.png",
    "emoji.dic",
)


@pytest.mark.parametrize(
    ("fields", "tokenizer_fields", "more", "left"),
    [
        ({"model_type": "roberta"}, {"tokenizer_class": "PhobertTokenizer"}, (), ()),
        ({"model_type": "phobert"}, {}, (), ()),
        ({"model_type": "roberta"}, {"tokenizer_class": "PhobertTokenizer"}, ("model.safetensors",), PHOBERT[-1:]),
        # A class that comes with the model: what it reads is not known.
        ({"model_type": "bert"}, {"tokenizer_class": "OwnTokenizer"}, ("emoji.dic", "own_tokenizer.py"), ()),
    ],
)
def test_a_download_takes_what_the_tokenizers_class_reads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, str],
    tokenizer_fields: dict[str, str],
    more: tuple[str, ...],
    left: tuple[str, ...],
) -> None:
    """The hub is made up: its listing, and the two small files that say which tokenizer it is."""
    wanted = {*PHOBERT, *more} - set(left)
    repository, asked = tmp_path / "repository", []
    repository.mkdir()
    (repository / "config.json").write_text(json.dumps(fields))
    (repository / "tokenizer_config.json").write_text(json.dumps(tokenizer_fields))

    def snapshot(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(repository)

    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: [*dict.fromkeys((*PHOBERT, *OTHERS, *more))])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name, **__: str(repository / name))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("kr2cache.system.hub.unreachable", lambda: None)
    assert model_folder(find_model("me/phobert", {})) == repository
    assert set(asked) == wanted
    asked.clear()
    control = {"drawn": {"hub_id": "me/phobert", "weights": "random"}}
    assert model_folder(find_model("drawn", control)) == repository
    assert set(asked) == {name for name in wanted if not name.endswith((".safetensors", "pytorch_model.bin"))}
