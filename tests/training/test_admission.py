"""Which models may have a resource's states appended: three rules, the same for readers of every task."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput

from kr2cache.errors import UnsupportedModelError
from kr2cache.fusion import parse_fusion
from kr2cache.models.encode import padding_mask
from kr2cache.tasks.base import Head
from kr2cache.training import admission, appending
from kr2cache.training.admission import check_appended
from kr2cache.training.appending import packed_order, place_of
from kr2cache.training.kreader import KReader, task_class
from kr2cache.training.resource_input import InputSettings

LAYERS, RESOURCE_WIDTH = 3, 10
INPUT = InputSettings(fusion=parse_fusion("fuse", LAYERS), projection="mlp", resource_width=RESOURCE_WIDTH)
BATCH, CHOICES = 3, 2
TOKENS, POSITIONS = 7, 6
"""l1 and l2."""

every_head = pytest.mark.parametrize("head", get_args(Head))
every_reader = pytest.mark.parametrize(
    ("name", "attention"),
    # None: as the architecture does by itself, SDPA where it can.
    [*((name, None) for name in tiny.READERS), *((name, "eager") for name in ("bert", "modernbert", "nomic_bert"))],
)


def model_of(name: str, head: Head, attention: str | None = None, **settings: Any) -> Any:
    """A task model in evaluation mode. Its weights are large, so that a position wrongly seen, or not seen, moves the
    output far beyond rounding.
    """
    torch.manual_seed(1)
    config = (tiny.reader_config if name in tiny.READERS else tiny.config)(
        name, initializer_range=0.4, num_labels=1 if head == "choice" else 4, positions=40, **settings
    )
    return task_class(head, config).from_config(config, attn_implementation=attention).eval()


@cache
def models_of(name: str, head: Head, attention: str | None = None) -> tuple[Any, KReader]:
    """The plain task model and a KReader over an untouched copy of it, in evaluation mode."""
    plain = model_of(name, head, attention)
    return plain, KReader(copy.deepcopy(plain), head, [INPUT]).eval()


def inputs_of(head: Head, seed: int = 0) -> dict[str, Tensor]:
    """A batch whose sequences have l1 = 7, 3, 5 and l2 = 6, 6, 2; for choices, every choice has its own lengths."""
    draw = torch.Generator().manual_seed(seed)
    choices = CHOICES if head == "choice" else 1
    l1 = torch.tensor([7, 3, 5, 6, 7, 4])[: BATCH * choices]
    l2 = torch.tensor([6, 6, 2, 1, 5, 6])[: BATCH * choices]
    mask = (torch.arange(TOKENS) < l1[:, None]).long()
    input_ids = torch.randint(5, len(tiny.VOCABULARY), mask.shape, generator=draw)
    input_ids = torch.where(mask == 1, input_ids, tiny.PAD_ID)
    if head == "choice":
        input_ids, mask = input_ids.view(BATCH, CHOICES, TOKENS), mask.view(BATCH, CHOICES, TOKENS)
    resource_mask = (torch.arange(POSITIONS) < l2[:, None]).long()
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "resource_states": torch.randn(BATCH * choices, LAYERS, POSITIONS, RESOURCE_WIDTH, generator=draw),
        "resource_mask": resource_mask,
        "order": packed_order(mask.flatten(0, -2), resource_mask),
    }


def logits(reader: KReader, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return reader(**inputs)["logits"]


def plain_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the task model; for choices of an architecture without a model for them, of each choice as a sequence."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}
    apart = given["input_ids"].dim() == 3 and not type(model).__name__.endswith("ForMultipleChoice")
    with torch.no_grad():
        if apart:
            return model(**{name: values.flatten(0, 1) for name, values in given.items()}).logits.view(BATCH, CHOICES)
        return model(**given).logits


def real(head: Head, inputs: dict[str, Tensor], values: Tensor) -> Tensor:
    """The logits that count: for tagging those of real tokens."""
    return values[inputs["attention_mask"] == 1] if head == "token" else values


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """But for rounding, as a share of the largest logit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@every_head
@every_reader
def test_with_all_of_g_masked_the_output_is_the_plain_readers(name: str, attention: str | None, head: Head) -> None:
    plain, reader = models_of(name, head, attention)
    inputs = inputs_of(head)
    expected = plain_logits(plain, inputs)
    masked = {**inputs, "resource_mask": torch.zeros_like(inputs["resource_mask"])}  # in its order, so G is there
    found = logits(reader, masked)
    assert found.shape == expected.shape
    assert_equal(real(head, inputs, found), real(head, inputs, expected))
    # And where it is not masked, it is seen: by every sequence that has states.
    difference = (logits(reader, inputs) - expected).abs().flatten(1).amax(dim=1)
    assert (difference > 1e-3 * expected.abs().max()).all()


@every_head
@every_reader
def test_a_masked_position_of_g_changes_nothing(name: str, attention: str | None, head: Head) -> None:
    _, reader = models_of(name, head, attention)
    inputs = inputs_of(head)
    noise = 1e4 * torch.randn(inputs["resource_states"].shape, generator=torch.Generator().manual_seed(9))
    seen = inputs["resource_mask"][:, None, :, None] == 1
    other = {**inputs, "resource_states": torch.where(seen, inputs["resource_states"], noise)}
    expected = real(head, inputs, logits(reader, inputs))
    assert_equal(real(head, inputs, logits(reader, other)), expected)
    # A position that is not masked does change something.
    last = {**inputs, "resource_states": torch.where(seen, noise, inputs["resource_states"])}
    assert (real(head, inputs, logits(reader, last)) - expected).abs().max() > 1e-3 * expected.abs().max()


@every_head
@every_reader
def test_a_sequence_alone_equals_itself_beside_longer_ones(name: str, attention: str | None, head: Head) -> None:
    _, reader = models_of(name, head, attention)
    inputs = inputs_of(head)
    together = logits(reader, inputs)
    for i in range(BATCH):
        rows = slice(i * CHOICES, (i + 1) * CHOICES) if head == "choice" else slice(i, i + 1)
        mask, resource_mask = inputs["attention_mask"][i : i + 1], inputs["resource_mask"][rows]
        l1, l2 = int(mask.sum(-1).max()), int(resource_mask.sum(-1).max())
        alone = {
            "input_ids": inputs["input_ids"][i : i + 1, ..., :l1],
            "attention_mask": mask[..., :l1],
            "resource_states": inputs["resource_states"][rows, :, :l2],
            "resource_mask": resource_mask[:, :l2],
        }
        found = logits(reader, alone)
        expected = together[i : i + 1, :l1] if head == "token" else together[i : i + 1]
        assert_equal(found, expected)


@every_head
@pytest.mark.parametrize("name", tiny.READERS)
def test_every_trainable_weight_of_fusion_and_projection_gets_a_gradient(name: str, head: Head) -> None:
    _, reader = models_of(name, head)
    inputs = inputs_of(head)
    labels = torch.ones(BATCH, TOKENS, dtype=torch.long) if head == "token" else torch.ones(BATCH, dtype=torch.long)
    reader.zero_grad()
    reader(**inputs, labels=labels)["loss"].backward()
    added = {name: weight for name, weight in reader.named_parameters() if not name.startswith("model.")}
    assert len(added) == 5, "fusion weights, two matrices and their biases"
    for added_name, weight in added.items():
        assert weight.grad is not None and (weight.grad != 0).any(), added_name
    first = reader.get_input_embeddings().weight
    assert first.grad is not None and (first.grad != 0).any(), "the reader itself trains as well"
    reader.zero_grad()


WITHOUT_POSITIONS_OF_G = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "ernie",
    "megatron-bert",
    "electra",
)
"""Architectures that add positions to embeddings of tokens."""


@pytest.mark.parametrize("name", [name for name in tiny.READERS if name != "roformer"])
def test_the_resource_may_be_longer_than_the_reader_has_positions(name: str) -> None:
    _, reader = models_of(name, "token")  # 40 positions
    inputs = {key: values for key, values in inputs_of("token").items() if key != "order"}
    states = torch.randn(BATCH, LAYERS, 90, RESOURCE_WIDTH, generator=torch.Generator().manual_seed(2))
    found = logits(reader, {**inputs, "resource_states": states, "resource_mask": torch.ones(BATCH, 90).long()})
    assert torch.isfinite(found).all()
    if name in WITHOUT_POSITIONS_OF_G:  # any order of it is the same
        shuffled = states[:, :, torch.randperm(90, generator=torch.Generator().manual_seed(3))]
        other = {**inputs, "resource_states": shuffled, "resource_mask": torch.ones(BATCH, 90).long()}
        assert_equal(real("token", inputs, logits(reader, other)), real("token", inputs, found))


TYPED = ("bert", "ernie", "megatron-bert", "electra", "electra-narrow", "albert", "rembert", "roformer", "nomic_bert")
"""Architectures that tell two segments apart."""


@every_head
@pytest.mark.parametrize("name", [*TYPED, "roberta", "xmod"])
def test_token_types_reach_the_reader(name: str, head: Head) -> None:
    plain, reader = models_of(name, head)
    inputs = inputs_of(head)
    typed = inputs | {
        "token_type_ids": torch.arange(TOKENS).expand(inputs["input_ids"].shape) % (2 if name in TYPED else 1)
    }
    masked = {"resource_mask": torch.zeros_like(inputs["resource_mask"])}
    found = logits(reader, typed | masked)
    assert_equal(real(head, inputs, found), real(head, inputs, plain_logits(plain, typed)))
    assert name not in TYPED or (found - logits(reader, inputs | masked)).abs().max() > 1e-3


def test_where_states_of_choices_go_without_a_model_for_choices() -> None:
    """One score for each choice; the choices of an example are its own."""
    for name in ("deberta", "nomic_bert", "eurobert", "jina_embeddings_v3", "esm", "roformer"):
        plain, reader = models_of(name, "choice")
        assert type(plain).__name__.endswith("ForSequenceClassification")
        inputs = inputs_of("choice")
        before = logits(reader, inputs)
        states = inputs["resource_states"].clone()
        states[3] += 1  # of the second choice of the second example
        moved = (logits(reader, inputs | {"resource_states": states}) - before).abs() > 1e-4
        assert moved.tolist() == [[False, False], [False, True], [False, False]]


def test_sparse_attention_is_full_with_states_appended() -> None:
    """At most 28 positions switch this model for good, so the order of batches would decide."""
    settings = {"block_size": 4, "num_random_blocks": 1}
    sparse, full = model_of("big_bird", "token", **settings), model_of("big_bird", "token", **settings)
    full.load_state_dict(sparse.state_dict())
    full.base_model.set_attention_type("original_full")
    KReader(copy.deepcopy(sparse), "token", [INPUT])  # the first one also looks for the place, with a few tokens
    reader = KReader(copy.deepcopy(sparse), "token", [INPUT]).eval()
    long = inputs_of("token") | {"input_ids": torch.arange(90).view(BATCH, 30) % 40 + 5}
    long["attention_mask"] = torch.ones_like(long["input_ids"])
    del long["order"]
    before = logits(reader, long)
    masked = long | {"resource_mask": torch.zeros_like(long["resource_mask"])}
    assert_equal(logits(reader, masked), plain_logits(full, long))
    assert (plain_logits(sparse, long) - plain_logits(full, long)).abs().max() > 1e-3, "sparse is something else"
    logits(reader, inputs_of("token"))
    assert torch.equal(logits(reader, long), before)


# What is asked of the loaded model -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_outcomes", {})


@every_head
@every_reader
def test_the_checks_pass(name: str, attention: str | None, head: Head) -> None:
    plain, _ = models_of(name, head, attention)
    before = torch.get_rng_state()
    check_appended(copy.deepcopy(plain), head, 9, "my reader")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_outcome_is_kept() -> None:
    """For readers of one class and configuration, whatever their weights are; good or bad."""
    calls: list[str] = []
    for name, refused in (("bert", False), ("fnet", True)):
        for time in ("first", "again"):
            model = model_of(name, "token")
            model.base_model.register_forward_pre_hook(lambda *_, time=time: calls.append(time))
            if refused:
                with pytest.raises(UnsupportedModelError, match=f"reader {time} .* of method kr2"):
                    check_appended(model, "token", 9, f"reader {time}")
            else:
                check_appended(model, "token", 9, f"reader {time}")
    assert set(calls) == {"first"}
    assert len(calls) <= 2 * 8, "some passes over a few tokens each"


@every_head
@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "xlm-roberta", "camembert", "ernie", "megatron-bert", "electra", "rembert"]
)
def test_a_causal_reader_is_refused(model_type: str, head: Head) -> None:
    """What stands behind a token does not reach it, and states are appended behind."""
    model = model_of(model_type, head, is_decoder=True)
    reader = KReader(copy.deepcopy(model), head, [INPUT]).eval()
    inputs = inputs_of(head)
    moved = logits(reader, inputs) - logits(reader, {**inputs, "resource_states": -inputs["resource_states"]})
    assert (real(head, inputs, moved) == 0).all(), "it is as blind as it is said to be"
    with pytest.raises(
        UnsupportedModelError, match=r"of method kr2: other states .* do not change .* (\d) of \1 .* is causal: "
    ) as caught:
        check_appended(model, head, 9, "my reader")
    assert '"is_decoder": true' in caught.value.message
    assert '"is_decoder": false' in caught.value.remedy
    assert "--method kreader" in caught.value.remedy


@pytest.mark.parametrize("head", ["token", "sequence"])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gpt2", {}), ("llama", {}), ("qwen3", {"head_dim": 8, "num_key_value_heads": 1}), ("biogpt", {})],
    ids=["gpt2", "llama", "qwen3", "biogpt"],
)
def test_an_architecture_that_is_causal_is_refused(model_type: str, settings: dict[str, Any], head: Head) -> None:
    model = model_of(model_type, head, **settings)
    with pytest.raises(UnsupportedModelError, match="ts attention is causal: no token sees what stands") as caught:
        check_appended(model, head, 9, "my reader")
    assert f"my reader ({model_type})" in caught.value.message
    assert "is_decoder" not in str(caught.value)


def test_a_head_that_gives_logits_near_zero_is_no_reason() -> None:
    """Rounding is a share of the largest logit, and a new head can be blind for the few texts of the trial."""
    model = model_of("bert", "choice", width=64)
    seen: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    check_appended(copy.deepcopy(model), "choice", 9, "my reader")
    handle.remove()
    directions = torch.linalg.svd(torch.cat(seen), full_matrices=False).Vh
    with torch.no_grad():
        weight = model.classifier.weight.double()
        model.classifier.weight.copy_(weight - weight @ directions.T @ directions)
        model.classifier.bias.zero_()
    before = model.classifier.weight.clone()
    admission._outcomes.clear()
    check_appended(model, "choice", 9, "my reader")
    assert torch.equal(model.classifier.weight, before)


REFUSED = {
    "fnet": "with all states of the resource masked, its logits differ from the plain reader's by up to ",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_reader_that_fails_a_check_is_refused_with_it(model_type: str) -> None:
    model = model_of(model_type, "token")
    with pytest.raises(UnsupportedModelError) as caught:
        check_appended(model, "token", 9, "my reader")
    assert caught.value.message.startswith(
        f"my reader ({model_type}) cannot be a KReader of method kr2: {REFUSED[model_type]}"
    )
    assert "Choose another reader. To train it without a resource: --method kreader." in str(caught.value)


def test_positions_that_an_encoder_has_not_are_refused() -> None:
    """Most add positions to the embeddings of tokens, so that states need none."""
    for name in (*tiny.READERS, "big_bird"):
        model, _ = models_of(name, "token")  # 40 positions
        check_appended(copy.deepcopy(model), "token", 40, "my reader")
        if name not in ("roformer", "big_bird"):
            check_appended(copy.deepcopy(model), "token", 41, "my reader")
            continue
        with pytest.raises(
            UnsupportedModelError, match=rf"my reader \({name}\) has 40 positions .* may be 41"
        ) as caught:
            check_appended(copy.deepcopy(model), "token", 41, "my reader")
        assert "--resource-max-length" in caught.value.remedy


# Models nobody has heard of -------------------------------------------------------------------------------------------


class OwnConfig(PretrainedConfig):
    model_type = "own"


class Own(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"
    masks, scale = True, 1.0

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.lookup, self.wide = nn.Embedding(60, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        states = [self.scale * self.wide(self.lookup(input_ids))]
        for block in self.blocks:
            states.append(block(states[-1], src_key_padding_mask=attention_mask == 0 if self.masks else None))
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


class OwnTagger(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.body, self.tags = Own(config), nn.Linear(16, 4)
        self.post_init()

    def forward(self, **inputs: Tensor) -> TokenClassifierOutput:
        return TokenClassifierOutput(logits=self.tags(self.body(**inputs).last_hidden_state))


def own_tagger() -> OwnTagger:
    torch.manual_seed(1)
    return OwnTagger(OwnConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2)).eval()


def test_a_model_nobody_has_heard_of_is_admitted() -> None:
    model = own_tagger()
    check_appended(model, "token", 9, "my reader")
    assert place_of(model, "my reader") == ("lookup", "wide")


def test_a_model_nobody_has_heard_of_is_refused_with_the_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "masks", False)
    with pytest.raises(
        UnsupportedModelError, match=r"my reader \(own\) .* with all states of the resource masked, its logits differ"
    ):
        check_appended(own_tagger(), "token", 9, "my reader")


def test_a_model_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "scale", 2.0)
    monkeypatch.setattr(appending, "_places", {})
    with pytest.raises(UnsupportedModelError, match=r"my reader \(own\) .* no module of it gives hidden_states\[0\]"):
        check_appended(own_tagger(), "token", 9, "my reader")


def test_a_reason_that_is_a_sentence_ends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("It needs boxes.")

    monkeypatch.setattr(appending, "_places", {})
    working = Own.forward
    monkeypatch.setattr(Own, "forward", fails)
    with pytest.raises(UnsupportedModelError) as caught:
        check_appended(own_tagger(), "token", 9, "my reader")
    assert caught.value.message.endswith("its forward pass fails: It needs boxes.")
    monkeypatch.setattr(Own, "forward", working)
    model = own_tagger()
    place_of(model, "my reader")
    monkeypatch.setattr(OwnTagger, "forward", fails)
    with pytest.raises(UnsupportedModelError) as caught:
        check_appended(model, "token", 9, "my reader")
    assert caught.value.message.endswith("its trial with appended states fails: It needs boxes.")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("bert", ("embeddings", "embeddings")),
        ("eurobert", ("embed_tokens", "embed_tokens")),
        ("modernbert", ("embeddings", "embeddings")),
        ("electra-narrow", ("embeddings", "embeddings_project")),
        ("albert", ("embeddings", "encoder.embedding_hidden_mapping_in")),
    ],
)
def test_places(name: str, place: tuple[str, str]) -> None:
    model = model_of(name, "token").train()
    assert place_of(model, "my reader") == place
    assert model.training
    assert not any(module._forward_hooks for key, module in model.named_modules() if key.endswith("embeddings"))


def test_the_order_of_positions() -> None:
    draw = random.Random(0)
    for _ in range(20):
        lengths = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.randint(1, 5))]
        of_tokens, of_states = zip(*lengths, strict=True)
        order = packed_order(*(torch.from_numpy(padding_mask(np.array(one))) for one in (of_tokens, of_states)))
        T = max(of_tokens)
        assert order.shape == (len(lengths), max(map(sum, lengths)))
        for row, (l1, l2) in zip(order.tolist(), lengths, strict=True):
            assert row[: l1 + l2] == [*range(l1), *range(T, T + l2)]
            assert len(set(row)) == len(row)


def test_full_attention_of_big_bird_draws_no_number_of_the_training() -> None:
    """Its new modules are made with weights of their own, which the old ones replace."""
    config = tiny.config("big_bird", attention_type="block_sparse")
    model: Any = task_class("sequence", config).from_config(config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    appending.Appender(model.eval(), "big")
    assert model.base_model.attention_type == "original_full"
    assert torch.equal(torch.rand(3), expected)


def test_padding_is_advised_only_if_it_is_missing() -> None:
    class Broken(nn.Module):
        config = tiny.config("gpt2", pad_token_id=None)

        def forward(self, **inputs: Tensor) -> Tensor:
            raise RuntimeError("the tables have other sizes")

    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    broken: Any = Broken()
    with pytest.raises(UnsupportedModelError, match="the tables have other sizes") as caught:
        admission.check_plain(broken, "sequence", inputs, 2, "broken")
    assert caught.value.remedy == "Choose another reader."
