"""The stack of a resource, in every form of checkpoint, against transformers' states in the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import TOLERANCE, difference, settings
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma3Config,
    PreTrainedModel,
    T5EncoderModel,
)

from kr2cache.cli import run
from kr2cache.errors import UnsupportedModelError
from kr2cache.experiment.suitability import READER, RESOURCE, suitability
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import plan_extraction
from kr2cache.models.digests import config_digest, model_digests, open_model
from kr2cache.models.load import load_config
from kr2cache.models.registry import ModelSpec
from kr2cache.models.stack import find_stack, open_encoder, resource_config
from kr2cache.training.checkpoint import TaskCheckpoint

T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
LLAMA = {"num_key_value_heads": 1, "head_dim": 8}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
FUNNEL = {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "bart": BART,
    "mbart": BART,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA,
    "xlnet": XLNET,
    "funnel": FUNNEL,
}


def config_of(model_type: str, **more: Any) -> Any:
    if model_type in ("xlnet", "funnel"):  # fields of BERT are not theirs
        known = {"vocab_size": len(tiny.VOCABULARY), "pad_token_id": tiny.PAD_ID}
        return AutoConfig.for_model(model_type, **(known | SETTINGS[model_type] | more))
    return tiny.config(model_type, **(SETTINGS[model_type] | more))


def saved(folder: Path, auto: Any, config: Any, **options: Any) -> PreTrainedModel:
    """A random model in ``folder``, as ``auto`` saves it."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    for weight in model.parameters():  # lively, also where it is 1 or 0 at first
        weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder, **options)
    tiny.tokenizer().save_pretrained(folder)
    return model


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec(name="m", path=folder)


def extracted_difference(folder: Path, tmp_path: Path, **more: Any) -> float:
    return difference(extract(settings(folder, tmp_path, **more)).cache, folder)


# The first layers of a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3", "gemma3_text", "gpt2", "t5"])
def test_the_first_layers_are_a_smaller_model_that_can_be_saved(model_type: str, tmp_path: Path) -> None:
    """transformers refuses lists with an entry for each layer (``layer_types``) that are longer than the model."""
    small = {"t5": {"num_layers": 3}, "gpt2": {"n_layer": 3}}.get(model_type, {"num_hidden_layers": 3})
    known = tiny.READERS.get(model_type) or SETTINGS[model_type]
    model = saved(tmp_path / "m", AutoModel, tiny.config(model_type, **(known | small))).eval()
    cut = ModelSpec(name="m", path=tmp_path / "m", layers=2)
    load_config(cut).save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").num_hidden_layers == 2
    ids = torch.arange(5)[None] + 5
    with torch.no_grad():
        whole = (model.encoder if model_type == "t5" else model)(input_ids=ids, output_hidden_states=True)
        states = open_encoder(cut).encoder(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    for one, other in zip(states[:2], whole.hidden_states, strict=False):  # the last has the final norm
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("model_type", ["modernbert", "qwen3"])
def test_the_first_layers_keep_the_digest_of_lists_for_all_layers(model_type: str, tmp_path: Path) -> None:
    """Caches from before the lists were cut are found: only ``num_hidden_layers`` decides."""
    known = tiny.READERS.get(model_type) or SETTINGS[model_type]
    saved(tmp_path / "m", AutoModel, tiny.config(model_type, **(known | {"num_hidden_layers": 3})))
    cut = ModelSpec(name="m", path=tmp_path / "m", layers=2)
    uncut = AutoConfig.from_pretrained(tmp_path / "m")
    uncut.num_hidden_layers = 2
    assert len(uncut.layer_types) == 3
    opened = open_model(cut)
    assert len(opened.encoder.config.layer_types) == 2
    assert opened.digests.config == config_digest(uncut)
    assert opened.digests.config_in_training == config_digest(uncut, training=True)


def two_models(folder: Path) -> Any:
    """BERT2BERT: an encoder of three layers and a decoder of two, each with its own configuration."""
    parts = (tiny.config("bert", layers=count) for count in (3, 2))
    torch.manual_seed(0)
    model: Any = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts)).eval()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def test_of_an_encoder_decoder_of_two_models_the_encoder_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = two_models(tmp_path / "m")
    whole, cut = (ModelSpec(name="m", path=tmp_path / "m", layers=layers) for layers in (None, 1))
    config = load_config(cut)
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (1, 2)
    ids = torch.arange(5)[None] + 5
    with torch.no_grad():
        expected = model.encoder(input_ids=ids, output_hidden_states=True).hidden_states
        for spec, layers in ((whole, 4), (cut, 2)):
            opened = open_encoder(spec)
            states = opened.encoder(input_ids=ids, output_hidden_states=True).hidden_states
            assert (opened.part, len(states)) == ("encoder", layers)
            assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=False))
    made = extract(settings(tmp_path / "m", tmp_path))
    assert made.computed > 0
    capsys.readouterr()
    assert run(["cache", "info", str(made.cache)]) == 0
    assert "(its encoder: 4 layers of width 16)" in " ".join(capsys.readouterr().out.split())


# Forms of checkpoints ------------------------------------------------------------------------------------------------


def all_names_in_one_file(folder: Path) -> None:
    """As the first T5 checkpoints have it: three names of one embedding, in a file of torch."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shared = weights["shared.weight"]
    torch.save(
        weights | {"encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": shared},
        folder / "pytorch_model.bin",
    )


def renamed(name: str) -> Callable[[Path], None]:
    """The embedding under this name alone."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name] = weights.pop("shared.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def sharded(folder: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")


def whole_base_model(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def encoder_alone(folder: Path) -> None:
    T5EncoderModel.from_pretrained(folder).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == ["T5EncoderModel"]
    assert not fields["is_encoder_decoder"]


@pytest.mark.parametrize(
    "form",
    [
        all_names_in_one_file,
        renamed("encoder.embed_tokens.weight"),
        renamed("decoder.embed_tokens.weight"),
        sharded,
        whole_base_model,
        encoder_alone,
    ],
    ids=["torch", "encoder's name", "decoder's name", "sharded", "base model", "encoder alone"],
)
def test_every_form_of_a_t5_checkpoint_gives_the_same_encoder(tmp_path: Path, form: Callable[[Path], None]) -> None:
    saved(tmp_path / "plain", AutoModelForSeq2SeqLM, config_of("t5"))
    saved(tmp_path / "m", AutoModelForSeq2SeqLM, config_of("t5"))
    form(tmp_path / "m")
    plain, other = (model_digests(spec_of(tmp_path / name)) for name in ("plain", "m"))
    assert (other.weights, other.config) == (plain.weights, plain.config)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("t5", {}),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),  # version 1.1
        ("mt5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        ("umt5", {"feed_forward_proj": "gated-gelu"}),
        ("bart", {}),
        ("mbart", {"scale_embedding": True}),
    ],
)
def test_the_encoder_of_an_encoder_decoder(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    saved(tmp_path / "m", AutoModelForSeq2SeqLM, config_of(model_type, **fields))
    assert extracted_difference(tmp_path / "m", tmp_path) < TOLERANCE
    opened = open_encoder(spec_of(tmp_path / "m"))
    assert (opened.part, opened.dropped) == ("encoder", ())
    assert not any("decoder" in name for name in opened.encoder.state_dict())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "gemma3_text"])
def test_a_decoder_with_the_head_of_a_language_model(tmp_path: Path, model_type: str) -> None:
    saved(tmp_path / "m", AutoModelForCausalLM, config_of(model_type))
    assert extracted_difference(tmp_path / "m", tmp_path) < TOLERANCE
    assert open_encoder(spec_of(tmp_path / "m")).part == ""


def gemma3() -> Any:
    text = config_of("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=4,
        boi_token_index=4,
        eoi_token_index=4,
    )


def test_the_text_part_of_a_model_that_reads_pictures_too(tmp_path: Path) -> None:
    saved(tmp_path / "m", AutoModelForImageTextToText, gemma3())
    assert extracted_difference(tmp_path / "m", tmp_path) < TOLERANCE
    opened = open_encoder(spec_of(tmp_path / "m"))
    assert (opened.part, opened.dropped) == ("language_model", ())
    assert type(opened.encoder).__name__ == "Gemma3TextModel"


def test_what_the_text_part_can_serve_as_is_said(tmp_path: Path) -> None:
    saved(tmp_path / "m", AutoModelForImageTextToText, gemma3())
    said = suitability(spec_of(tmp_path / "m"))
    assert (said.architecture, said.layers, said.width) == ("gemma3", 3, 16)
    able = {(answer.role, answer.head): answer.able for answer in said.answers}
    assert able[RESOURCE, "token"]
    assert not able[READER, "token"]


def test_an_encoder_without_one_of_its_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m", AutoModelForSeq2SeqLM, config_of("t5"))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name != "encoder.block.1.layer.1.layer_norm.weight"}
    save_file(kept, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 weights .*encoder\.block\.1\.layer\.1\.layer_norm"):
        open_encoder(spec_of(tmp_path / "m"))
    for change in (lambda weight: None, lambda weight: weight[:1].clone()):  # the decoder is not looked at
        others = {name: change(weight) if name.startswith("decoder.") else weight for name, weight in weights.items()}
        kept = {name: weight for name, weight in others.items() if weight is not None}
        save_file(kept, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
        open_encoder(spec_of(tmp_path / "m"))


# Limits and refusals -------------------------------------------------------------------------------------------------


def test_xlnet_has_no_limit_of_positions(tmp_path: Path) -> None:
    saved(tmp_path / "m", AutoModel, config_of("xlnet"))
    assert extracted_difference(tmp_path / "m", tmp_path, max_length=100_000) < TOLERANCE


def test_funnel_is_refused_with_its_reason(tmp_path: Path) -> None:
    saved(tmp_path / "m", AutoModel, config_of("funnel", architectures=["FunnelModel"]))
    with pytest.raises(UnsupportedModelError, match=r"\(funnel\) .*shorten"):
        extract(settings(tmp_path / "m", tmp_path))


@pytest.mark.parametrize("model_type", ["vit", "whisper"])
def test_a_model_that_reads_no_text_is_refused_before_its_weights_are_read(tmp_path: Path, model_type: str) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"'m' \({model_type}\) reads no text"):
        resource_config(spec_of(tmp_path))


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_a_model_with_two_stacks_is_no_reader(tmp_path: Path, model_type: str) -> None:
    """Its digest would be that of its encoder alone, so two runs of different decoders would pass for one."""
    folder = tiny.save_model(tmp_path / "m", model_type)
    with pytest.raises(UnsupportedModelError, match=rf"'m' \({model_type}\) cannot be trained: .* its encoder alone"):
        TaskCheckpoint(ModelSpec(name="m", path=folder), "token", ("A", "B")).task_model()


# Settings of a configuration that do no harm -------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bart", "xlnet"])
def test_what_a_model_says_of_padding_and_outputs_does_no_harm(tmp_path: Path, model_type: str) -> None:
    """Padding on the left, a padding token that the tokenizer alone knows, outputs that nobody asks for."""
    folder = tmp_path / "m"
    saved(folder, AutoModel, config_of(model_type))
    expected = extract(settings(folder, tmp_path)).cache
    assert difference(expected, folder) < TOLERANCE
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[ADDED]"})
    tokenizer.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    changes = {"return_dict": False, "use_cache": True, "output_hidden_states": True}
    for pad in (fields.get("pad_token_id"), len(tiny.VOCABULARY), None):
        (folder / "config.json").write_text(json.dumps(fields | changes | {"pad_token_id": pad}))
        (tmp_path / str(pad)).mkdir()
        cache = extract(settings(folder, tmp_path / str(pad))).cache
        (folder / "config.json").write_text(json.dumps(fields))
        assert difference(cache, folder) < TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("gpt2", "n_layer", None),
        ("llama", "hidden_size", None),
        ("llama", "num_hidden_layers", 0),
        ("llama", "max_position_embeddings", -1),
        ("t5", "num_layers", None),
        ("t5", "vocab_size", None),
        ("bart", "encoder_layers", None),
    ],
)
def test_a_field_that_is_null_or_makes_no_sense_is_named(
    tmp_path: Path, model_type: str, field: str, value: int | None
) -> None:
    saved(tmp_path / "m", AutoModel, config_of(model_type))
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert field in fields
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(UnsupportedModelError, match=rf"\b{field}\b"):
        plan_extraction(settings(tmp_path / "m", tmp_path))


def test_the_stack_is_found_again_in_a_model_with_fewer_layers(tmp_path: Path) -> None:
    saved(tmp_path, AutoModelForSeq2SeqLM, config_of("t5"))
    spec = ModelSpec(name="m", path=tmp_path, layers=1)
    stack = find_stack(spec, load_config(spec))
    assert (stack.path, stack.config.num_hidden_layers) == ("encoder", 1)
    ids = torch.tensor([[5, 6, 7]])
    whole = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours = open_encoder(spec).encoder(input_ids=ids, output_hidden_states=True).hidden_states
        theirs = whole.encoder(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(ours) == 2
    assert torch.equal(ours[0], theirs[0])
