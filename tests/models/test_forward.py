"""Cheaper forward passes: in place the same states bit for bit, prepacked within rounding, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModel, BertModel
from transformers.models.bert.modeling_bert import BertIntermediate, BertSelfOutput

from kr2cache.models import forward
from kr2cache.models.forward import cheaper_forward

ARCHITECTURES = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "ernie", "megatron-bert", "electra", "mpnet", "albert",
    "deberta-v2", "roformer", "mobilebert", "modernbert",
)  # fmt: skip
MANY = forward.WORTHWHILE
packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")


@pytest.fixture(autouse=True)
def _as_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it pays is one question, whether it computes the same another."""
    monkeypatch.setattr(forward, "packing_pays_here", lambda: True)


@pytest.fixture
def as_with_avx2(_as_with_avx512: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "packing_pays_here", lambda: False)


@pytest.mark.usefixtures("as_with_avx2")
def test_where_it_does_not_pay_nothing_is_packed() -> None:
    model = model_of("bert")
    with cheaper_forward(model, MANY):
        assert not packed(model)


def model_of(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    try:
        config = tiny.config(model_type, initializer_range=0.3, **settings)
    except (ValueError, KeyError):
        pytest.skip(f"this transformers has no {model_type}")
    return AutoModel.from_config(config).eval()


def states_of(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(5, 5 + 3 * 11).reshape(3, 11)
    mask = (torch.arange(11) < torch.tensor([[11], [4], [1]])).long()
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return [layer[mask.bool()] for layer in output]


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def packed(model: nn.Module) -> set[str]:
    return {name for name in replaced(model) if isinstance(model.get_submodule(name), nn.Linear)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_states_move_by_rounding_alone(model_type: str) -> None:
    model = model_of(model_type)
    before = states_of(model)
    with cheaper_forward(model, MANY):
        inside = states_of(model)
    assert not replaced(model)
    for plain, cheaper in zip(before, inside, strict=True):
        assert float((plain - cheaper).abs().max()) <= 1e-5 * float(plain.abs().max())
    assert all(torch.equal(one, other) for one, other in zip(before, states_of(model), strict=True))


@packs
@pytest.mark.parametrize(("model_type", "with_gelu"), [("bert", 2), ("distilbert", 0)])
def test_every_product_is_packed_bert_s_with_its_gelu(model_type: str, with_gelu: int) -> None:
    model = model_of(model_type)
    with cheaper_forward(model, MANY):
        fused = {name for name in replaced(model) if name.endswith("intermediate")}
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert packed(model) == linears - {f"{name}.dense" for name in fused}
        assert len(fused) == with_gelu
        assert not any(name.endswith("act_fn") for name in replaced(model))
    assert not replaced(model)


@packs
def test_what_looks_like_bert_s_intermediate_layer_and_is_not_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states)) + 1

    monkeypatch.setattr(BertIntermediate, "forward", other)
    model = model_of("bert")
    before = states_of(model)
    with cheaper_forward(model, MANY):
        assert not any(name.endswith("intermediate") for name in replaced(model))
        assert "encoder.layer.0.intermediate.dense" in packed(model)
        torch.testing.assert_close(states_of(model)[-1], before[-1], rtol=1e-5, atol=1e-5)


@packs
def test_an_intermediate_layer_that_gives_two_things_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert")
    monkeypatch.setattr(BertIntermediate, "forward", lambda self, hidden_states: (hidden_states, hidden_states))
    with cheaper_forward(model, MANY):
        assert not any(name.endswith(("intermediate", "act_fn")) for name in replaced(model))


@pytest.mark.usefixtures("as_with_avx2")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_in_place_the_states_are_the_same_bit_for_bit(model_type: str) -> None:
    model = model_of(model_type)
    before = states_of(model)
    with cheaper_forward(model, MANY):
        inside = states_of(model)
    assert not replaced(model)
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))


@pytest.mark.usefixtures("as_with_avx2")
@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("bert", ("attention.output", "output", "intermediate.intermediate_act_fn")),
        ("deberta-v2", ("attention.output", "output", "intermediate.intermediate_act_fn")),
        ("distilbert", ("ffn.activation",)),
        ("modernbert", ()),
    ],
)
def test_activations_and_residual_sums_are_in_place(model_type: str, names: tuple[str, ...]) -> None:
    model = model_of(model_type, **({"hidden_act": "gelu"} if model_type == "deberta-v2" else {}))
    with cheaper_forward(model, MANY):
        found = replaced(model)
    assert sorted(name.split(".layer.", 1)[1] for name in found) == sorted(
        f"{n}.{name}" for n in "01" for name in names
    )


@pytest.mark.usefixtures("as_with_avx2")
def test_in_place_no_tensor_is_asked_for() -> None:
    """Of the memory that a layer asks for, the activation and both sums are none."""
    model = model_of("bert")

    def asked_for() -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            states_of(model)
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    before = asked_for()
    with cheaper_forward(model, MANY):
        inside = asked_for()
    rows, config = 3 * 11, model.config
    saved = 4 * rows * (config.intermediate_size + 2 * config.hidden_size) * config.num_hidden_layers
    assert before - inside == saved


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_another_activation_stays_where_it_is(activation: str) -> None:
    model = model_of("bert", hidden_act=activation)
    before = states_of(model)
    with cheaper_forward(model, MANY):
        assert not any(name.endswith("act_fn") for name in replaced(model))
        inside = states_of(model)
    torch.testing.assert_close(before[-1], inside[-1], rtol=1e-5, atol=1e-5)


def test_gradients_inside_are_those_outside() -> None:
    model = model_of("bert")

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=torch.arange(5, 16)[None]).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    with cheaper_forward(model, MANY):
        inside = gradients()
    assert len(before) > 20
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))


@pytest.mark.usefixtures("as_with_avx2")
def test_dropout_that_draws_is_left_to_draw() -> None:
    model = model_of("bert", hidden_dropout_prob=0.5).train()
    with torch.inference_mode():
        torch.manual_seed(3)
        before = model(input_ids=torch.arange(5, 16)[None]).last_hidden_state
        model.eval()
        with cheaper_forward(model, MANY):
            model.train()
            torch.manual_seed(3)
            inside = model(input_ids=torch.arange(5, 16)[None]).last_hidden_state
    assert torch.equal(before, inside)


OTHER_SUMS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "added after": lambda self, x, residual: self.LayerNorm(self.dense(x)) + residual,
    "not normalised": lambda self, x, residual: self.dense(x) + residual,  # X-MOD
    "of itself": lambda self, x, residual: self.LayerNorm(self.dense(x) + x),
    "the other way round": lambda self, x, residual: self.LayerNorm(self.dense(residual) + x),
}


@pytest.mark.usefixtures("as_with_avx2")
@pytest.mark.parametrize("how", OTHER_SUMS)
def test_a_module_of_the_same_parts_that_computes_something_else_stays(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(self: Any, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return OTHER_SUMS[how](self, hidden_states, input_tensor)

    monkeypatch.setattr(BertSelfOutput, "forward", other)
    model = model_of("bert")
    before = states_of(model)
    with cheaper_forward(model, MANY):
        assert not any(name.endswith("attention.output") for name in replaced(model))
        assert torch.equal(before[-1], states_of(model)[-1])


@pytest.mark.usefixtures("as_with_avx2")
def test_an_activation_whose_input_is_read_twice_is_not_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile: list[str] = []

    def other(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        product = self.dense(hidden_states)
        meanwhile.extend(replaced(model))
        return self.intermediate_act_fn(product) * product

    monkeypatch.setattr(BertIntermediate, "forward", other)
    model = model_of("bert")
    before = states_of(model)
    with cheaper_forward(model, MANY):
        assert not any(name.endswith("act_fn") for name in replaced(model))
        assert torch.equal(before[-1], states_of(model)[-1])
    assert not replaced(model)
    assert not any(name.endswith("act_fn") for name in meanwhile), "not while it was tried either"


@pytest.mark.usefixtures("as_with_avx2")
def test_an_activation_of_two_modules_is_not_in_place() -> None:
    model = model_of("bert")
    model.encoder.layer[1].intermediate.intermediate_act_fn = model.encoder.layer[0].intermediate.intermediate_act_fn
    with cheaper_forward(model, MANY):
        assert not any(name.endswith("act_fn") for name in replaced(model))


def test_weights_that_change_between_blocks_are_packed_anew() -> None:
    model = model_of("bert")
    with cheaper_forward(model, MANY):
        first = states_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = states_of(model)
    with cheaper_forward(model, MANY):
        second = states_of(model)
    torch.testing.assert_close(second[-1], expected[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first[-1], second[-1])


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = model_of("bert")
    before, keys = states_of(model), list(model.state_dict())
    with pytest.raises(ValueError, match="stop"), cheaper_forward(model, MANY):
        assert list(model.state_dict()) == keys
        raise ValueError("stop")
    assert not replaced(model)
    assert torch.equal(before[-1], states_of(model)[-1])


@packs
def test_an_operator_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward._packed_product

    def off(*arguments: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        product = real(*arguments)
        return lambda x: product(x) * 1.01

    monkeypatch.setattr(forward, "_packed_product", off)
    model = model_of("bert")
    with cheaper_forward(model, MANY):
        assert not packed(model)


@packs
def test_what_has_hooks_or_is_not_float32_runs_as_it_is() -> None:
    model = model_of("bert")
    assert isinstance(model, BertModel)
    seen: list[float] = []
    watched = model.encoder.layer[0].intermediate.dense
    watched.register_forward_hook(lambda module, inputs, output: seen.append(float(output.min())))
    model.encoder.layer[1].double()
    with cheaper_forward(model, MANY):
        assert not any(name.startswith(("encoder.layer.0.intermediate", "encoder.layer.1")) for name in packed(model))
        assert "encoder.layer.0.output.dense" in packed(model)
        names = replaced(model)
    assert "encoder.layer.0.intermediate.intermediate_act_fn" not in names  # the hook may keep what it would overwrite
    assert "encoder.layer.0.attention.output" in names


def test_autocast_computes_as_it_would_without() -> None:
    model = model_of("bert")
    with torch.autocast("cpu", torch.bfloat16):
        before = states_of(model)
    with cheaper_forward(model, MANY), torch.autocast("cpu", torch.bfloat16):
        inside = states_of(model)
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))


def test_nan_weights_run_as_torch_has_them() -> None:
    model = model_of("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with cheaper_forward(model, MANY):
        assert not any(name.startswith("encoder.layer.0.output") for name in replaced(model))
        assert torch.isnan(states_of(model)[-1]).any()


def test_a_few_positions_do_not_pay() -> None:
    model = model_of("bert")
    with cheaper_forward(model, MANY - 1):
        assert not replaced(model)


@packs
def test_threads_do_not_disturb_each_other() -> None:
    """What one has replaced and another one's end takes away computes the same before and after."""
    model = model_of("bert")
    expected, wrong = states_of(model), []

    def work() -> None:
        for _ in range(20):
            with cheaper_forward(model, MANY):
                states = states_of(model)
            if not torch.allclose(states[-1], expected[-1], atol=1e-4):
                wrong.append(states)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not replaced(model)
