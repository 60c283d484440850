"""Which architectures may have a resource's states appended: three rules, the same for readers of every task."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, get_args

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoConfig

from kr2cache.errors import UnsupportedModelError
from kr2cache.fusion import parse_fusion
from kr2cache.tasks.base import Head
from kr2cache.training import kreader
from kr2cache.training.admission import check_appended
from kr2cache.training.kreader import ADMITTED, HEADS, KReader, check_admitted

LAYERS, RESOURCE_WIDTH = 3, 10
BATCH, CHOICES = 3, 2
TOKENS, POSITIONS = 7, 6
"""l1 and l2."""

pytestmark = pytest.mark.parametrize("head", get_args(Head))


@cache
def models_of(model_type: str, head: Head, attention: str | None = None) -> tuple[Any, KReader]:
    """The plain task model and a KReader over an untouched copy of it, in evaluation mode.

    The weights are large, so that a position wrongly seen, or not seen, moves the output far beyond rounding.
    """
    torch.manual_seed(1)
    config = tiny.config(model_type, initializer_range=0.4, num_labels=4, positions=40)
    plain = HEADS[head].from_config(config, attn_implementation=attention).eval()
    reader = KReader(
        copy.deepcopy(plain),
        head,
        fusion=parse_fusion("fuse", LAYERS),
        projection="mlp",
        resource_width=RESOURCE_WIDTH,
    )
    return plain, reader.eval()


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
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "resource_states": torch.randn(BATCH * choices, LAYERS, POSITIONS, RESOURCE_WIDTH, generator=draw),
        "resource_mask": (torch.arange(POSITIONS) < l2[:, None]).long(),
    }


def logits(reader: KReader, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return reader(**inputs)["logits"]


def real(head: Head, inputs: dict[str, Tensor], values: Tensor) -> Tensor:
    """The logits that count: for tagging those of real tokens."""
    return values[inputs["attention_mask"] == 1] if head == "token" else values


ATTENTION = (None, "eager")
"""None: as the architecture does by itself, SDPA where it can."""


@pytest.mark.parametrize("attention", ATTENTION, ids=("default", "eager"))
@pytest.mark.parametrize("model_type", ADMITTED)
def test_with_all_of_g_masked_the_output_is_the_plain_readers(
    model_type: str, attention: str | None, head: Head
) -> None:
    plain, reader = models_of(model_type, head, attention)
    inputs = inputs_of(head)
    with torch.no_grad():
        expected = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    masked = {**inputs, "resource_mask": torch.zeros_like(inputs["resource_mask"])}
    found = logits(reader, masked)
    assert found.shape == expected.shape
    torch.testing.assert_close(real(head, inputs, found), real(head, inputs, expected), rtol=1e-5, atol=1e-5)
    # And where it is not masked, it is seen: by every sequence that has states.
    difference = (logits(reader, inputs) - expected).abs().flatten(1).amax(dim=1)
    assert (difference > 1e-2).all()


@pytest.mark.parametrize("attention", ATTENTION, ids=("default", "eager"))
@pytest.mark.parametrize("model_type", ADMITTED)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_masked_position_of_g_changes_nothing(
    model_type: str, attention: str | None, scale: float, head: Head
) -> None:
    _, reader = models_of(model_type, head, attention)
    inputs = inputs_of(head)
    noise = scale * torch.randn(inputs["resource_states"].shape, generator=torch.Generator().manual_seed(9))
    seen = inputs["resource_mask"][:, None, :, None] == 1
    other = {**inputs, "resource_states": torch.where(seen, inputs["resource_states"], noise)}
    expected = real(head, inputs, logits(reader, inputs))
    torch.testing.assert_close(real(head, inputs, logits(reader, other)), expected, rtol=1e-5, atol=1e-5)
    # A position that is not masked does change something.
    last = {**inputs, "resource_states": torch.where(seen, noise, inputs["resource_states"])}
    assert (real(head, inputs, logits(reader, last)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ADMITTED)
@pytest.mark.parametrize("attention", ATTENTION, ids=("default", "eager"))
def test_a_sequence_alone_equals_itself_beside_longer_ones(model_type: str, attention: str | None, head: Head) -> None:
    _, reader = models_of(model_type, head, attention)
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
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ADMITTED)
def test_every_trainable_weight_of_fusion_and_projection_gets_a_gradient(model_type: str, head: Head) -> None:
    _, reader = models_of(model_type, head)
    inputs = inputs_of(head)
    labels = torch.ones(BATCH, TOKENS, dtype=torch.long) if head == "token" else torch.ones(BATCH, dtype=torch.long)
    reader.zero_grad()
    reader(**inputs, labels=labels)["loss"].backward()
    added = {name: weight for name, weight in reader.named_parameters() if not name.startswith("model.")}
    assert len(added) == 5, "fusion weights, two matrices and their biases"
    for name, weight in added.items():
        assert weight.grad is not None and (weight.grad != 0).any(), name
    first = next(weight for name, weight in reader.named_parameters() if "word_embeddings" in name)
    assert first.grad is not None and (first.grad != 0).any(), "the reader itself trains as well"
    reader.zero_grad()


@pytest.mark.parametrize("model_type", ADMITTED)
def test_the_resource_may_be_longer_than_the_reader_has_positions(model_type: str, head: Head) -> None:
    _, reader = models_of(model_type, head)  # 40 positions
    inputs = inputs_of(head)
    sequences = inputs["resource_states"].shape[0]
    states = torch.randn(sequences, LAYERS, 90, RESOURCE_WIDTH, generator=torch.Generator().manual_seed(2))
    found = logits(reader, {**inputs, "resource_states": states, "resource_mask": torch.ones(sequences, 90).long()})
    # G has no positions: any order of it is the same.
    shuffled = states[:, :, torch.randperm(90, generator=torch.Generator().manual_seed(3))]
    other = {**inputs, "resource_states": shuffled, "resource_mask": torch.ones(sequences, 90).long()}
    torch.testing.assert_close(
        real(head, inputs, logits(reader, other)), real(head, inputs, found), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("model_type", [name for name in ADMITTED if name != "distilbert"])
def test_token_types_reach_the_reader(model_type: str, head: Head) -> None:
    plain, reader = models_of(model_type, head)
    inputs = inputs_of(head)
    types = 2 if model_type in ("bert", "ernie", "megatron-bert", "electra") else 1
    token_type_ids = torch.arange(TOKENS).expand(inputs["input_ids"].shape) % types
    masked = {**inputs, "resource_mask": torch.zeros_like(inputs["resource_mask"])}
    with torch.no_grad():
        expected = plain(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], token_type_ids=token_type_ids
        ).logits
    found = logits(reader, {**masked, "token_type_ids": token_type_ids})
    torch.testing.assert_close(real(head, inputs, found), real(head, inputs, expected), rtol=1e-5, atol=1e-5)
    assert types == 1 or (found - logits(reader, masked)).abs().max() > 1e-3


REFUSED = ("deberta", "deberta-v2", "nomic_bert", "esm", "longformer", "fnet", "nystromformer", "mpnet", "roformer")


@pytest.mark.parametrize("model_type", [*REFUSED, "albert", "modernbert"])
def test_other_architectures_are_refused_by_name(model_type: str, head: Head) -> None:
    config = tiny.config(model_type)
    with pytest.raises(UnsupportedModelError, match=f"my reader is a {model_type} model") as caught:
        check_admitted(config, "my reader")
    assert all(name in caught.value.remedy for name in ADMITTED)
    if type(config) in HEADS[head]._model_mapping:
        model = HEADS[head].from_config(config)
        with pytest.raises(UnsupportedModelError, match=f"is a {model_type} model"):
            KReader(model, head, fusion=parse_fusion("last4", 13), projection="none", resource_width=16)
        assert KReader(model, head).model is model, "as the plain baseline it serves"


def test_an_electra_whose_embeddings_are_narrower_is_refused(head: Head) -> None:
    model = HEADS[head].from_config(tiny.config("electra", width=16, embedding_size=8))
    with pytest.raises(UnsupportedModelError, match="embeddings of width 8 and an encoder of width 16"):
        KReader(model, head, fusion=parse_fusion("last1", 3), projection="none", resource_width=16)


def test_the_admitted_ones_are_those_of_the_design(head: Head) -> None:
    designed = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "ernie", "megatron-bert", "electra")
    assert designed == ADMITTED
    for model_type in ADMITTED:
        assert type(AutoConfig.for_model(model_type)) in HEADS[head]._model_mapping


# What is asked of the loaded model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ADMITTED)
def test_every_admitted_architecture_passes_the_checks(model_type: str, head: Head) -> None:
    plain, _ = models_of(model_type, head)
    before = torch.get_rng_state()
    check_appended(copy.deepcopy(plain), head, "my reader")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "xlm-roberta", "camembert", "ernie", "megatron-bert", "electra"]
)
def test_a_causal_reader_is_refused(model_type: str, head: Head) -> None:
    """What stands behind a token does not reach it, and states are appended behind."""
    torch.manual_seed(1)
    config = tiny.config(model_type, initializer_range=0.4, num_labels=4, positions=40, is_decoder=True)
    model = HEADS[head].from_config(config).eval()
    reader = KReader(
        copy.deepcopy(model), head, fusion=parse_fusion("fuse", LAYERS), projection="mlp", resource_width=RESOURCE_WIDTH
    ).eval()
    inputs = inputs_of(head)
    moved = logits(reader, inputs) - logits(reader, {**inputs, "resource_states": -inputs["resource_states"]})
    assert (real(head, inputs, moved) == 0).all(), "it is as blind as it is said to be"
    with pytest.raises(
        UnsupportedModelError, match=r"of method kr2: other states .* do not change .* (\d) of \1"
    ) as caught:
        check_appended(model, head, "my reader")
    assert '"is_decoder": true' in caught.value.message
    assert '"is_decoder": false' in caught.value.remedy
    assert "--method kreader" in caught.value.remedy


@pytest.mark.parametrize("model_type", ["fnet", "yoso"])
def test_a_reader_that_sees_masked_states_is_refused(
    model_type: str, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were its architecture admitted by name, the check on the model would still find it."""
    monkeypatch.setattr(kreader, "ADMITTED", (*ADMITTED, model_type))
    torch.manual_seed(1)
    model = HEADS[head].from_config(tiny.config(model_type, initializer_range=0.4)).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"states that are masked change its logits by up to [\d.]+\d\."
    ) as caught:
        check_appended(model, head, "my reader")
    assert "is_decoder" not in str(caught.value)
