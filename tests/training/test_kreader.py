"""The KReader: equations 1 to 3 recomputed in NumPy, the loss, and what is kept of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForTokenClassification

from kr2cache.errors import CacheError, ConfigError, KR2CacheError, UnsupportedModelError
from kr2cache.fusion import Fusion, parse_fusion
from kr2cache.models.digests import known_digests, open_model
from kr2cache.models.registry import find_model
from kr2cache.tasks.base import Head
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.kreader import (
    EXTRAS,
    EXTRAS_CONFIG,
    HEADS,
    IGNORED,
    KReader,
)
from kr2cache.training.resource_input import InputSettings, ResourceInput, make_projection, projection_kind

WIDTH = 16
"""h1, of the reader."""
BATCH, CHOICES, TOKENS, POSITIONS = 2, 3, 5, 4
HEAD_NAMES = get_args(Head)


def kreader(
    head: Head = "token",
    fusion: Fusion | None = None,
    projection: Any = "none",
    resource_width: int = WIDTH,
    *,
    model_type: str = "bert",
) -> KReader:
    torch.manual_seed(0)
    config = tiny.config(model_type, width=WIDTH, initializer_range=0.4, num_labels=4)
    model = HEADS[head].from_config(config)
    inputs = [] if fusion is None else [settings(fusion, projection, resource_width)]
    return KReader(model, head, inputs).eval()


def settings(fusion: Fusion, projection: Any = "none", resource_width: int = WIDTH) -> InputSettings:
    return InputSettings(fusion=fusion, projection=projection, resource_width=resource_width)


def resource_of(reader: KReader) -> ResourceInput:
    (found,) = reader.resources
    return found


def inputs_of(
    head: Head = "token", *, layers: int = 3, resource_width: int = WIDTH, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    shape = (BATCH, CHOICES, TOKENS) if head == "choice" else (BATCH, TOKENS)
    sequences = math.prod(shape[:-1])
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., -1] = 0
    resource_mask = torch.ones(sequences, POSITIONS, dtype=torch.long)
    resource_mask[0, -2:] = 0
    return {
        "input_ids": torch.randint(5, len(tiny.VOCABULARY), shape, generator=draw),
        "attention_mask": mask,
        "resource_states": torch.randn(sequences, layers, POSITIONS, resource_width, generator=draw).to(dtype),
        "resource_mask": resource_mask,
    }


def plain(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("resource")}


def entering_the_encoder(reader: KReader, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
    """What the first layer of the reader's encoder is given, (S, positions, h1)."""
    seen: list[Tensor] = []
    base = reader.model.base_model
    layers = base.transformer.layer if base.config.model_type == "distilbert" else base.encoder.layer
    handle = layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        reader(**inputs)
    handle.remove()
    (entered,) = seen
    return entered.numpy()


def embeddings(reader: KReader, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
    """H_reader^0: transformers' own hidden_states[0], without a resource."""
    base = copy.deepcopy(reader.model.base_model)
    base.embeddings._forward_hooks.clear()
    base._forward_hooks.clear()
    with torch.no_grad():
        output = base(
            input_ids=inputs["input_ids"].flatten(0, -2),
            attention_mask=inputs["attention_mask"].flatten(0, -2),
            output_hidden_states=True,
        )
    return output.hidden_states[0].numpy()


def parts_of(
    entered: NDArray[np.float32], inputs: dict[str, Tensor]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """For each sequence, the positions of its tokens, and those right behind them: its states."""
    l1, l2 = inputs["attention_mask"].flatten(0, -2).sum(dim=1).tolist(), inputs["resource_mask"].sum(dim=1).tolist()
    assert entered.shape[:2] == (len(l1), max(map(sum, zip(l1, l2, strict=True))))
    return [(row[:own], row[own : own + states]) for row, own, states in zip(entered, l1, l2, strict=True)]


def assert_entered(
    reader: KReader,
    inputs: dict[str, Tensor],
    states: NDArray[np.floating[Any]],
    own: NDArray[np.floating[Any]] | None = None,
) -> None:
    """The encoder is given ``own`` tokens (S, T, h1), and the ``states`` (S, R, h1) right behind them."""
    for i, (tokens, behind) in enumerate(parts_of(entering_the_encoder(reader, inputs), inputs)):
        np.testing.assert_allclose(behind, states[i, : len(behind)], rtol=1e-5, atol=1e-5)
        if own is not None:
            np.testing.assert_allclose(tokens, own[i, : len(tokens)], atol=1e-5)


def weights_of(module: nn.Module) -> dict[str, NDArray[np.float64]]:
    return {name: tensor.detach().numpy().astype(np.float64) for name, tensor in module.state_dict().items()}


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(module: nn.Module, x: NDArray[np.float64]) -> NDArray[np.float64]:
    w = weights_of(module)
    return gelu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]


# Equations 1 to 3 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize(
    ("name", "layers", "weights"),
    [
        ("fuse", 3, [1 / 3, 1 / 3, 1 / 3]),
        ("all", 3, [1 / 3, 1 / 3, 1 / 3]),
        ("last2", 2, [0.5, 0.5]),
        ("layer1", 1, [1.0]),
    ],
)
def test_what_enters_the_encoder_is_equations_1_to_3(
    name: str, layers: int, weights: list[float], model_type: str
) -> None:
    reader = kreader(fusion=parse_fusion(name, 3), model_type=model_type)
    inputs = inputs_of(layers=layers)
    states = inputs["resource_states"].numpy().astype(np.float64)
    fused = sum(weight * states[:, i] for i, weight in enumerate(weights))  # eq. 1; eq. 2 is left out, h2 = h1
    assert_entered(reader, inputs, fused, embeddings(reader, inputs))  # eq. 3


def test_trained_weights_are_used_as_they_are() -> None:
    reader = kreader(fusion=parse_fusion("fuse", 3))
    w = np.array([0.5, -1.25, 2.0])
    with torch.no_grad():
        resource_of(reader).fusion_weights.copy_(torch.from_numpy(w))
    inputs = inputs_of()
    assert_entered(reader, inputs, np.einsum("l,blrd->brd", w, inputs["resource_states"].numpy().astype(np.float64)))


def softmax(s: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(s)
    return powers / powers.sum()


def normal(states: NDArray[np.float64]) -> NDArray[np.float64]:
    """Layer norm without weights, over the width."""
    centred = states - states.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


S, GAMMA = np.array([0.5, -1.25, 2.0]), 1.7


def learn(reader: KReader) -> None:
    """As after a training: scores S, and GAMMA if there is one."""
    with torch.no_grad():
        for parameter, value in zip(reader.fusion_parameters(), (S, GAMMA), strict=False):
            parameter.copy_(torch.as_tensor(value))


@pytest.mark.parametrize("learned", [False, True], ids=["first", "learned"])
@pytest.mark.parametrize("name", ["softmax", "mix"])
def test_softmax_and_mix_are_their_formulas(name: str, learned: bool) -> None:
    reader = kreader(fusion=parse_fusion(name, 3), projection="mlp", resource_width=10)
    if learned:
        learn(reader)
    inputs = inputs_of(resource_width=10)
    inputs["resource_states"] *= torch.tensor([0.1, 1.0, 5.7])[:, None, None]  # layers of different norms
    inputs["resource_states"][0, :, -1] = 0  # padding
    states = inputs["resource_states"].numpy().astype(np.float64)
    w, gamma = softmax(S) if learned else np.full(3, 1 / 3), GAMMA if learned and name == "mix" else 1.0
    fused = gamma * np.einsum("l,blrd->brd", w, normal(states) if name == "mix" else states)
    assert_entered(reader, inputs, mlp(resource_of(reader).projection, fused))
    described = resource_of(reader).described()
    assert described["weights"] == pytest.approx(w.tolist(), abs=1e-6)
    assert sum(described["weights"]) == pytest.approx(1)
    assert described.get("gamma") == (pytest.approx(gamma) if name == "mix" else None)


@pytest.mark.parametrize("name", ["softmax", "mix"])
def test_every_score_learns_and_the_weights_keep_their_sum(name: str) -> None:
    """Gradients by finite differences, in the whole reader."""
    reader = kreader("sequence", fusion=parse_fusion(name, 3))
    inputs = inputs_of("sequence")
    labels = torch.tensor([1, 2])

    def loss() -> Tensor:
        logits = reader(**inputs)["logits"]
        return nn.functional.cross_entropy(logits, labels)

    learn(reader)
    reader.zero_grad()
    loss().backward()
    step = 1e-2
    for parameter in reader.fusion_parameters():
        assert parameter.grad is not None
        for i in range(len(parameter)):
            with torch.no_grad():
                parameter[i] += step
                above = loss()
                parameter[i] -= 2 * step
                below = loss()
                parameter[i] += step
            assert float(parameter.grad[i]) == pytest.approx(float(above - below) / (2 * step), rel=0.02, abs=1e-4)
            assert float(parameter.grad[i]) != 0
    torch.optim.SGD(reader.fusion_parameters(), lr=5.0).step()
    weights = resource_of(reader).weights.detach()
    assert float(weights.sum()) == pytest.approx(1)
    assert np.abs(weights.numpy() - softmax(S)).max() > 1e-3


def test_every_choice_gets_its_own_states() -> None:
    reader = kreader("choice", parse_fusion("layer0", 3))
    inputs = inputs_of("choice", layers=1)
    assert_entered(reader, inputs, inputs["resource_states"][:, 0].float().numpy(), embeddings(reader, inputs))


def test_mlp_between_widths() -> None:
    reader = kreader(fusion=parse_fusion("fuse", 3), projection="mlp", resource_width=10)
    inputs = inputs_of(resource_width=10)
    fused = inputs["resource_states"].numpy().astype(np.float64).mean(axis=1)
    projection = resource_of(reader).projection
    assert_entered(reader, inputs, mlp(projection, fused))
    assert weights_of(projection)["0.weight"].shape == (WIDTH, 10)


@pytest.mark.parametrize("name", ["fuse", "all", "last2"])
def test_direct_projection_is_one_matrix_product_of_all_layers(name: str) -> None:
    layers = 2 if name == "last2" else 3
    reader = kreader(fusion=parse_fusion(name, 3), projection="direct", resource_width=10)
    inputs = inputs_of(layers=layers, resource_width=10)
    states = inputs["resource_states"].numpy().astype(np.float64)
    w = weights_of(resource_of(reader).projection)
    assert w["weight"].shape == (WIDTH, layers * 10)
    side_by_side = np.concatenate([states[:, i] for i in range(layers)], axis=-1)
    assert_entered(reader, inputs, side_by_side @ w["weight"].T + w["bias"])
    assert reader.fusion_parameters() == [], "the matrix has the weights already"


@pytest.mark.parametrize("name", ["all", "last2", "last1"])
def test_a_fixed_fusion_of_fused_and_of_unfused_states_is_the_same(name: str) -> None:
    fusion = parse_fusion(name, 3)
    reader = kreader(fusion=fusion, projection="mlp", resource_width=10)
    inputs = inputs_of(layers=len(fusion.layers), resource_width=10, dtype=torch.float32)
    fused = np.stack([fusion.apply(states.numpy()) for states in inputs["resource_states"]])
    with torch.no_grad():
        separate = reader(**inputs)["logits"]
        together = reader(**{**inputs, "resource_states": torch.from_numpy(fused)[:, None]})["logits"]
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-5)


def test_the_fusion_knows_its_trainable_weights_whatever_their_name() -> None:
    trainable = kreader(fusion=parse_fusion("fuse", 7), projection="mlp", resource_width=10)
    (found,) = trainable.fusion_parameters()
    assert found is resource_of(trainable).fusion_weights
    for name, count in (("softmax", 1), ("mix", 2)):
        learned = kreader(fusion=parse_fusion(name, 7), projection="mlp", resource_width=10)
        assert [len(one) for one in learned.fusion_parameters()] == [7, 1][:count]
    direct = kreader(fusion=parse_fusion("fuse", 7), projection="direct", resource_width=10)
    for fixed in (kreader(), kreader(fusion=parse_fusion("all", 7)), direct):
        assert fixed.fusion_parameters() == []


def test_trainable_weights_start_uniform_and_fixed_ones_do_not_train() -> None:
    trainable = kreader(fusion=parse_fusion("fuse", 7))
    (weights,) = trainable.fusion_parameters()
    np.testing.assert_allclose(weights.detach().numpy(), np.full(7, 1 / 7), rtol=1e-6)
    assert kreader(fusion=parse_fusion("all", 7)).fusion_parameters() == []


def test_projection_kinds() -> None:
    assert projection_kind("auto", 16, 16) == "none"
    assert projection_kind("auto", 10, 16) == "mlp"
    assert projection_kind("mlp", 16, 16) == "mlp"
    assert projection_kind("direct", 10, 16) == "direct"
    assert projection_kind("none", 16, 16) == "none"
    with pytest.raises(ConfigError, match="resource has 10, the reader 16"):
        projection_kind("none", 10, 16)
    assert not list(make_projection("none", 3, 16, 16).parameters())


# Outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", [None, "fuse"])
def test_logits_of_tagging_are_cut_to_the_readers_tokens(fusion: str | None) -> None:
    reader = kreader(fusion=None if fusion is None else parse_fusion(fusion, 3))
    inputs = inputs_of()
    given = plain(inputs) if fusion is None else inputs
    whole: list[Tensor] = []
    handle = reader.model.register_forward_hook(lambda module, args, output: whole.append(output.logits))
    with torch.no_grad():
        found = reader(**given)["logits"]
    handle.remove()
    assert found.shape == (BATCH, TOKENS, 4)
    assert whole[0].shape == (BATCH, TOKENS + (POSITIONS if fusion else 0), 4)
    torch.testing.assert_close(found, whole[0][:, :TOKENS], rtol=0, atol=0)


@pytest.mark.parametrize("head", HEAD_NAMES)
@pytest.mark.parametrize("fusion", [None, "fuse"])
def test_loss_is_cross_entropy_of_labels_that_count(head: Head, fusion: str | None) -> None:
    reader = kreader(head, None if fusion is None else parse_fusion(fusion, 3))
    inputs = inputs_of(head) if fusion else plain(inputs_of(head))
    labels = (
        torch.tensor([[1, IGNORED, 3, 0, IGNORED], [2, 2, IGNORED, 1, 0]]) if head == "token" else torch.tensor([1, 2])
    )
    with torch.no_grad():
        output = reader(**inputs, labels=labels)
    values = output["logits"].double().numpy().reshape(-1, output["logits"].shape[-1])
    log_probabilities = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    flat = labels.numpy().ravel()
    counted = np.flatnonzero(flat != -100)
    expected = -log_probabilities[counted, flat[counted]].mean()
    assert float(output["loss"]) == pytest.approx(expected, rel=1e-5)
    if fusion is None:  # and it is what its users know
        with torch.no_grad():
            known = reader.model(**inputs, labels=labels)
        assert float(output["loss"]) == pytest.approx(float(known.loss), rel=1e-5)
        torch.testing.assert_close(output["logits"], known.logits)
    assert set(reader(**inputs)) == {"logits"}


def test_a_resource_without_states_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no states of it"):
        kreader(fusion=parse_fusion("fuse", 3))(**plain(inputs_of()))


def test_states_of_one_batch_do_not_stay_for_the_next() -> None:
    reader = kreader(fusion=parse_fusion("fuse", 3))
    inputs = inputs_of()
    with torch.no_grad():
        reader(**inputs)
        after = reader.model(**plain(inputs)).logits
    assert after.shape[1] == TOKENS
    other = KReader(copy.deepcopy(reader.model), "token")
    other.model.base_model.embeddings._forward_hooks.clear()
    with torch.no_grad():
        torch.testing.assert_close(after, other(**plain(inputs))["logits"])


def full_masks(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Nothing padded: transformers then leaves the mask out, and a lost G would pass without any error of its own."""
    return {name: torch.ones_like(tensor) if name.endswith("mask") else tensor for name, tensor in inputs.items()}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_lost_hook_is_an_error(head: Head, padded: bool) -> None:
    reader = kreader(head, parse_fusion("fuse", 3))
    inputs = inputs_of(head) if padded else full_masks(inputs_of(head))
    reader(**inputs)
    reader.model.base_model.embeddings._forward_hooks.clear()
    seen = "the model fails before" if padded else f"it saw {TOKENS} positions instead of {TOKENS + POSITIONS}"
    with pytest.raises(UnsupportedModelError, match=f"did not reach the encoder: {seen}") as caught:
        reader(**inputs)
    assert caught.value.remedy == "Choose another reader."


def test_what_fails_before_states_are_appended_is_named() -> None:
    reader = kreader(fusion=parse_fusion("fuse", 3))
    inputs = inputs_of()
    inputs["input_ids"][0, 0] = 10**6
    with pytest.raises(UnsupportedModelError, match="before they are appended: index out of range") as caught:
        reader(**inputs)
    assert "DataParallel" not in str(caught.value)


def replica_of(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes them for DataParallel, on the CPU."""
    modules = list(module.modules())
    numbers = {one: number for number, one in enumerate(modules)}
    replicas = [one._replicate_for_data_parallel() for one in modules]
    for one, replica in zip(modules, replicas, strict=True):
        for name, child in one._modules.items():
            if child is not None:
                replica._modules[name] = replicas[numbers[child]]
        for name, weight in one._parameters.items():
            if weight is not None:
                setattr(replica, name, weight.detach())
    return replicas[0]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_replica_of_data_parallel_is_an_error(padded: bool) -> None:
    reader = kreader(fusion=parse_fusion("fuse", 3))
    inputs = inputs_of() if padded else full_masks(inputs_of())
    baseline = kreader()
    with torch.no_grad():  # the plain reader's replicas work, so the emulation does
        torch.testing.assert_close(replica_of(baseline)(**plain(inputs))["logits"], baseline(**plain(inputs))["logits"])
        with pytest.raises(UnsupportedModelError, match="DataParallel"):
            replica_of(reader)(**inputs)


def test_a_copy_of_a_reader_is_a_reader_of_its_own() -> None:
    reader = kreader(fusion=parse_fusion("fuse", 3))
    inputs = inputs_of()
    twin = copy.deepcopy(reader)
    with torch.no_grad():
        before = reader(**inputs)["logits"]
        resource_of(twin).fusion_weights.mul_(3)
        changed = twin(**inputs)["logits"]
        torch.testing.assert_close(reader(**inputs)["logits"], before, rtol=0, atol=0)
    assert (changed - before).abs().max() > 1e-3


# Keeping it ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str | None, str]] = {
    "plain": (None, "none"),
    "fuse": ("fuse", "none"),
    "fuse-mlp": ("fuse", "mlp"),
    "softmax": ("softmax", "none"),
    "mix-mlp": ("mix", "mlp"),
    "last2-mlp": ("last2", "mlp"),
    "direct": ("all", "direct"),
}


@pytest.mark.parametrize("head", HEAD_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_reader_loads_with_equal_logits(kind: str, head: Head, tmp_path: Path) -> None:
    name, projection = KINDS[kind]
    fusion = None if name is None else parse_fusion(name, 3)
    width = WIDTH if projection == "none" else 10
    reader = kreader(head, fusion, projection, width)
    learn(reader)
    inputs = inputs_of(head, layers=len(fusion.layers) if fusion else 1, resource_width=width)
    inputs = plain(inputs) if fusion is None else inputs
    with torch.no_grad():
        expected = reader(**inputs)["logits"]
    reader.train()
    reader.save(tmp_path)
    torch.manual_seed(99)
    loaded = KReader.load(tmp_path)
    assert not loaded.training
    weights = loaded.state_dict()
    assert weights.keys() == reader.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in reader.state_dict().items())
    with torch.no_grad():
        # A product with one row of weights rounds by where these lie in memory, with some processors.
        torch.testing.assert_close(loaded(**inputs)["logits"], expected, rtol=0, atol=1e-6)
    assert len(loaded.fusion_parameters()) == len(reader.fusion_parameters())
    # The task model beside it is transformers' own.
    assert type(HEADS[head].from_pretrained(tmp_path)) is type(reader.model)


def test_a_folder_that_is_no_reader_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a trained KReader"):
        KReader.load(bert)
    kreader(fusion=parse_fusion("fuse", 3)).save(tmp_path)
    (tmp_path / EXTRAS_CONFIG).write_text("{", "utf-8")
    with pytest.raises(CacheError, match=r"kr2\.json cannot be read"):
        KReader.load(tmp_path)


def test_a_reader_whose_projection_is_incomplete_is_refused(tmp_path: Path) -> None:
    kreader(fusion=parse_fusion("fuse", 3), projection="mlp", resource_width=10).save(tmp_path)
    extras = load_file(tmp_path / EXTRAS)
    del extras["projection.2.weight"]
    save_file(extras, tmp_path / EXTRAS)
    with pytest.raises((KR2CacheError, RuntimeError)):  # not random numbers in its place
        KReader.load(tmp_path)


def test_what_is_kept_beside_the_model(tmp_path: Path) -> None:
    kreader("sequence", parse_fusion("last2", 3), "mlp", 10).save(tmp_path)
    assert json.loads((tmp_path / EXTRAS_CONFIG).read_text("utf-8")) == {
        "head": "sequence",
        "fusion": {"name": "last2", "layers": [1, 2], "trainable": False},
        "projection": "mlp",
        "resource_width": 10,
    }
    assert set(load_file(tmp_path / EXTRAS)) == {
        "fusion_weights",
        *(f"projection.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    }


# Loading task models -------------------------------------------------------------------------------------------------


def test_a_task_model_has_the_checkpoints_weights_in_float32_and_a_head_by_seed(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model")
    AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    spec = find_model(str(folder), {})
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(TaskCheckpoint(spec, "token", ("NOUN", "VERB", "X")).task_model())
    first, again, other = drawn
    assert {weight.dtype for weight in first.parameters()} == {torch.float32}
    assert first.config.id2label == {0: "NOUN", 1: "VERB", 2: "X"}
    assert first.classifier.weight.shape == (3, WIDTH)
    assert isinstance(first, type(AutoModelForTokenClassification.from_config(first.config)))
    torch.testing.assert_close(first.classifier.weight, again.classifier.weight, rtol=0, atol=0)
    assert (first.classifier.weight != other.classifier.weight).any()
    stored = load_file(folder / "model.safetensors")
    for name, tensor in first.base_model.state_dict().items():
        torch.testing.assert_close(tensor, stored[name].float(), rtol=0, atol=0)


@pytest.mark.parametrize("head", HEAD_NAMES)
def test_heads(head: Head, bert: Path) -> None:
    model = TaskCheckpoint(find_model(str(bert), {}), head, ("a", "b", "c", "d", "e")).task_model()
    with torch.no_grad():
        found = KReader(model.eval(), head)(**plain(inputs_of(head)))["logits"]
    assert found.shape == {"token": (BATCH, TOKENS, 5), "sequence": (BATCH, 5), "choice": (BATCH, CHOICES)}[head]


@pytest.mark.parametrize("name", ["deberta", "nomic_bert", "roformer"])
def test_an_architecture_without_a_model_for_choices_scores_each(name: str, tmp_path: Path) -> None:
    """From the checkpoint to the stored reader."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny.reader_config(name, initializer_range=0.4)).save_pretrained(tmp_path / "model")
    spec = find_model(str(tmp_path / "model"), {})
    model = TaskCheckpoint(spec, "choice", ("a", "b", "c")).task_model()
    assert type(model).__name__.endswith("ForSequenceClassification")
    fusion = parse_fusion("fuse", 3)
    reader = KReader(model, "choice", [settings(fusion, "mlp", 10)]).eval()
    inputs = inputs_of("choice", resource_width=10)
    with torch.no_grad():
        expected = reader(**inputs)["logits"]
    assert expected.shape == (BATCH, CHOICES)
    reader.save(tmp_path / "reader")
    with torch.no_grad():
        torch.testing.assert_close(KReader.load(tmp_path / "reader")(**inputs)["logits"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", HEAD_NAMES)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_the_head_of_an_earlier_training_is_not_used(tmp_path: Path, model_type: str, head: Head) -> None:
    """As many labels, in another order; or another number of them: what is drawn is drawn as without that head."""
    model = HEADS[head].from_config(tiny.config(model_type, num_labels=3))
    model.base_model.save_pretrained(tmp_path / "plain")
    labels = ("entailment", "neutral", "contradiction", "other", "none")
    for folder, count in (("same", 3), ("fewer", 2)):
        model.config.num_labels = count
        trained = HEADS[head].from_config(model.config)
        trained.base_model.load_state_dict(model.base_model.state_dict())
        trained.config.problem_type = "regression"
        trained.save_pretrained(tmp_path / folder)
    for folder, wanted in (("same", 3), ("fewer", 5)):
        drawn = []
        for name in ("plain", folder):
            checkpoint = TaskCheckpoint(find_model(str(tmp_path / name), {}), head, labels[:wanted])
            torch.manual_seed(4)
            drawn.append((checkpoint.task_model(), torch.rand(2), checkpoint.earlier_head))
        (expected, next_expected, none), (found, next_found, left_out) = drawn
        assert torch.equal(next_found, next_expected), "and so is what comes after"
        theirs = expected.state_dict()
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
        assert none == ()
        assert set(left_out) == {name for name in theirs if not name.startswith(f"{found.base_model_prefix}.")}
        assert found.config.problem_type is None


def test_what_pre_training_made_outside_the_base_model_is_kept(tmp_path: Path) -> None:
    """ModernBERT's task models go on with a layer of its masked language model."""
    config = tiny.config("modernbert")
    masked = AutoModelForMaskedLM.from_config(config)
    masked.save_pretrained(tmp_path / "pretrained")
    checkpoint = TaskCheckpoint(find_model(str(tmp_path / "pretrained"), {}), "token", ("a", "b", "c"))
    found = checkpoint.task_model().state_dict()
    assert torch.equal(found["head.dense.weight"], masked.state_dict()["head.dense.weight"])
    assert checkpoint.earlier_head == ()
    # A tagger's head holds that layer as well, further trained; its classifier alone is new.
    AutoModelForTokenClassification.from_pretrained(tmp_path / "pretrained").save_pretrained(tmp_path / "tagger")
    tagger = TaskCheckpoint(find_model(str(tmp_path / "tagger"), {}), "token", ("a", "b"))
    assert torch.equal(tagger.task_model().state_dict()["head.dense.weight"], masked.state_dict()["head.dense.weight"])
    assert tagger.earlier_head == ("classifier.bias", "classifier.weight")


@pytest.mark.parametrize("head", HEAD_NAMES)
@pytest.mark.parametrize(
    "model_type",
    [
        *("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "ernie", "megatron-bert", "electra"),
        *("albert", "deberta-v2", "longformer", "modernbert"),
    ],
)
def test_a_checkpoint_is_hashed_as_an_opened_model(tmp_path: Path, model_type: str, head: Head) -> None:
    """Runs record the digests, so both ways to load a model have to give the same."""
    config = tiny.config(model_type)
    for name, auto in (("base", AutoModel), ("pretrained", AutoModelForMaskedLM), ("trained", HEADS[head])):
        auto.from_config(config).save_pretrained(tmp_path / name)
        spec = find_model(str(tmp_path / name), {})
        assert known_digests(spec) is None
        TaskCheckpoint(spec, head, ("a", "b", "c")).task_model()
        assert known_digests(spec) is not None, "the weights are read once"
        assert known_digests(spec) == open_model(spec).digests


@pytest.mark.parametrize(("model_type", "lost"), [("funnel", ""), ("bert", "encoder.layer.1.output.dense.bias")])
def test_a_checkpoint_that_may_differ_from_the_opened_model_is_not_hashed(
    tmp_path: Path, model_type: str, lost: str
) -> None:
    """Funnel's classifier has another base model than AutoModel gives. An incomplete encoder is refused when opened."""
    sizes = {"d_model": 16, "d_inner": 32, "n_head": 2, "d_head": 8, "vocab_size": 50, "block_sizes": [1]}
    sizes["pad_token_id"] = 0  # without it, the tokenizer is asked, and there is none
    funnel = AutoConfig.for_model("funnel", architectures=["FunnelModel"], **sizes)
    AutoModel.from_config(funnel if model_type == "funnel" else tiny.config(model_type)).save_pretrained(tmp_path)
    if lost:
        weights = load_file(tmp_path / "model.safetensors")
        del weights[lost]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spec = find_model(str(tmp_path), {})
    TaskCheckpoint(spec, "sequence", ("a", "b")).task_model()
    assert known_digests(spec) is None


@pytest.mark.parametrize("change", ["lost", "reshaped"])
def test_a_saved_reader_without_some_weights_is_refused(tmp_path: Path, change: str) -> None:
    kreader("token").save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "lost":
        del weights["classifier.weight"]
    else:
        weights["classifier.weight"] = weights["classifier.weight"][:2].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CacheError, match=r"lacks 1 of its weights, or has them in other shapes: classifier\.weight"):
        KReader.load(tmp_path)


def test_a_saved_reader_of_another_class_is_refused_by_its_class(tmp_path: Path) -> None:
    """As choices by RoFormer's own model for them, which an earlier version trained."""
    old = kreader("choice", model_type="roformer").model
    assert type(old).__name__ == "RoFormerForMultipleChoice"
    old.save_pretrained(tmp_path)
    (tmp_path / "kr2.json").write_text('{"head": "choice"}')
    with pytest.raises(CacheError, match=r"is a RoFormerForMultipleChoice; .* are a RoFormerForSequenceClassification"):
        KReader.load(tmp_path)
