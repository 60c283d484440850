"""The digest of a configuration: what commit 0485b90 recorded, and the same with a later transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from transformers import BertConfig, BertModel, PreTrainedConfig
from world import World, count_resource_batches

from kr2cache.models import digests
from kr2cache.models.digests import config_digest, weights_digest
from kr2cache.prediction.predict import Predictor
from kr2cache.training.runs import RunFolder

RECORDED = {
    "bert": ("b6483f85387d1a8d36db5c6217a29a94", "ac29402982069628f50bb4893581335f"),
    "roberta": ("82ab6f8aeff4981f154a36f0a5a28910", "facd800534c94f3d2453e96da89bf2a3"),
    "xlm-roberta": ("caa61d067f4fe41aace097f10d5e0688", "0a2e4a21edffd80fcd0b387a7d66abc6"),
    "camembert": ("74ae19b62594da493eeabcfdc0a450c7", "88ae8542ebcdfc7207327c5e7a4701b0"),
    "distilbert": ("1dc7e5f1aff135cb07cb08b2be76b6ee", "8bccea47be5a0717ddcd9218cf478862"),
    "ernie": ("b87010ee5d69a1b3ed000448747669de", "fae036ce82b5cc594ab36e0a30dc6c5f"),
    "megatron-bert": ("83168e209841f35de69da406ba38b017", "ef47addcc17410501b4e01625d0fc7a3"),
    "electra": ("403a4c1100bddd32ed7c08ddc0af2705", "95c313d7b3a11fc6bad2f703ecb3051b"),
    "albert": ("e66628ae3c680655a8ece8d54ef49b07", "1144ea6411ef40db733b43603b5eb314"),
    "mpnet": ("509c03feaa7880e18ec072bd48cd58d1", "799e47c443446b0d5726f76c314689f1"),
    "deberta": ("9a15f07d5e56ddeea575cf44c5dbc889", "855eb2daba7ed02389083a61c2966a9a"),
    "deberta-v2": ("531de599f23297e814dc3623f6169352", "dd0fde8b2398ca4cfa198bf13a9df8a0"),
    "roformer": ("757bb5c6c1aaab4a12a1c3207f7c75fd", "80bf107bc603fd2b9b2fa1e81fbf931c"),
    "esm": ("8f00f0c7414edd1aaab40dc5c2360bab", "e7220053445f2ede4a48f61160b0fb10"),
    "modernbert": ("25f32ed2b9e2c00614c13cb999fff4b8", "2e0923e329298a721ee535190d6af54c"),
    "gpt2": ("394009907c4ccc79c3543414c0aa4b3a", "59a3e9172300f6b88eb36292f56796a4"),
    "big_bird": ("ca476a4ee4255cb392bf82c8264a9854", "2ea2eaa2829751016e4b6d216bd20fac"),
}
"""Of ``tiny.config``, for a resource and for a reader, by the code of commit 0485b90 and transformers 5.23.0: of every
field that the configuration had."""


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A later transformers: two more fields with defaults in every configuration, one of them follows from others."""
    of_today = PreTrainedConfig.__post_init__

    def with_more(self: Any, **given: Any) -> None:
        of_today(self, **given)
        for name, value in (
            ("later_flag", False),
            ("later_width", getattr(self, "hidden_size", 8) // getattr(self, "num_attention_heads", 1)),
        ):
            if not hasattr(self, name):
                setattr(self, name, value)

    monkeypatch.setattr(PreTrainedConfig, "__post_init__", with_more)
    digests._base_defaults.cache_clear()
    monkeypatch.setattr(digests, "_digests", {})
    assert tiny.config("bert").to_dict()["later_width"] == 8
    yield
    digests._base_defaults.cache_clear()


@pytest.mark.parametrize("model_type", RECORDED)
def test_the_digest_is_the_one_that_caches_and_runs_recorded(model_type: str) -> None:
    config = tiny.config(model_type)
    assert (config_digest(config), config_digest(config, training=True)) == RECORDED[model_type]


@pytest.mark.parametrize("model_type", RECORDED)
def test_a_field_that_a_later_transformers_adds_changes_no_digest(model_type: str, later: None) -> None:
    config = tiny.config(model_type)
    assert "later_flag" in config.to_dict()
    assert (config_digest(config), config_digest(config, training=True)) == RECORDED[model_type]
    # Spelt out in a file it is the same; what is no default is something else.
    spelt_out = tiny.config(model_type, later_flag=False)
    assert config_digest(spelt_out) == RECORDED[model_type][0]
    assert config_digest(tiny.config(model_type, later_flag=True)) != RECORDED[model_type][0]


def test_every_field_that_decides_counts() -> None:
    plain = RECORDED["bert"][0]
    for change in (
        {"layer_norm_eps": 1e-6},
        {"hidden_act": "relu"},
        {"num_attention_heads": 4},
        {"position_embedding_type": "relative_key"},  # no field of BertConfig, but files have it
        {"is_decoder": True},
    ):
        assert config_digest(tiny.config("bert", **change)) != plain, change
    for change in ({"hidden_dropout_prob": 0.3}, {"problem_type": "regression"}, {"num_labels": 7}):
        assert config_digest(tiny.config("bert", **change)) == plain, change
    assert config_digest(tiny.config("bert", hidden_dropout_prob=0.3), training=True) != RECORDED["bert"][1]


class OwnConfig(PreTrainedConfig):
    """As code that comes with a model has it."""

    model_type = "own"

    def __init__(self, own_field: int = 3, **more: Any) -> None:
        super().__init__(**more)
        self.own_field = own_field


def test_a_class_that_comes_with_a_model_keeps_its_fields(request: pytest.FixtureRequest) -> None:
    before, other = config_digest(OwnConfig()), config_digest(OwnConfig(own_field=4))
    assert before != other
    assert before == "f652742950ca395fc0fbbef5278f80fa", "as commit 0485b90 has it"
    request.getfixturevalue("later")
    assert OwnConfig().to_dict()["later_flag"] is False
    assert (config_digest(OwnConfig()), config_digest(OwnConfig(own_field=4))) == (before, other)


def test_caches_and_runs_serve_with_a_later_transformers(world: World, request: pytest.FixtureRequest) -> None:
    run = world.train(epochs=1.0).runs[0]
    before = RunFolder(run.folder).read_config()["config"]
    request.getfixturevalue("later")
    assert "later_flag" in BertConfig().to_dict()
    with count_resource_batches() as sizes:
        again = world.train(epochs=1.0, extract=False).runs[0]
        other = world.train(epochs=1.0, extract=False, fusion="last2").runs[0]
    assert sizes == [], "caches fit"
    assert (again.folder, again.seconds) == (run.folder, None), "the run is there already"
    assert RunFolder(other.folder).read_config()["config"]["reader"]["config"] == before["reader"]["config"]
    assert Predictor.load(run.folder, device="cpu").resources
    assert world.extract("train").computed == 0, "and an extraction finds its cache"


def test_small_floats_are_hashed_as_float32() -> None:
    """Such weights of a quantised checkpoint stay in float8 on a GPU; NumPy does not know the type."""
    model = BertModel(tiny.config("bert"))
    weight = model.embeddings.word_embeddings.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    small = weights_digest(model)
    weight.data = weight.data.float()
    assert weights_digest(model) == small
