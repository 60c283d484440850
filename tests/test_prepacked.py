"""Prepacked weights: the same states within rounding, on every architecture, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModel, BertModel

from kr2cache import prepacked
from kr2cache.prepacked import prepacked_weights

ARCHITECTURES = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "ernie", "megatron-bert", "electra", "mpnet", "albert",
    "deberta-v2", "roformer", "mobilebert", "modernbert",
)  # fmt: skip
MANY = prepacked.WORTHWHILE
packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")


@pytest.fixture(autouse=True)
def _as_with_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it pays is one question, whether it computes the same another."""
    monkeypatch.setattr(prepacked, "pays_here", lambda: True)


def test_where_it_does_not_pay_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "pays_here", lambda: False)
    model = model_of("bert")
    with prepacked_weights(model, MANY):
        assert not any("forward" in module.__dict__ for module in model.modules())


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


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_states_move_by_rounding_alone(model_type: str) -> None:
    model = model_of(model_type)
    before = states_of(model)
    with prepacked_weights(model, MANY):
        inside = states_of(model)
    assert not replaced(model)
    for plain, packed in zip(before, inside, strict=True):
        assert float((plain - packed).abs().max()) <= 1e-5 * float(plain.abs().max())
    assert all(torch.equal(one, other) for one, other in zip(before, states_of(model), strict=True))


@packs
@pytest.mark.parametrize(("model_type", "pair"), [("bert", prepacked.PAIRS[0]), ("distilbert", prepacked.PAIRS[1])])
def test_every_product_is_packed_and_gelu_goes_with_its_own(model_type: str, pair: tuple[str, str]) -> None:
    model = model_of(model_type)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with prepacked_weights(model, MANY):
        names = set(replaced(model))
    gelus = names - linears
    assert linears <= names
    assert len(gelus) == 2  # one a layer
    assert all(name.endswith(pair[1]) for name in gelus)


@packs
@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_another_activation_stays_where_it_is(activation: str) -> None:
    model = model_of("bert", hidden_act=activation)
    before = states_of(model)
    with prepacked_weights(model, MANY):
        assert not any(name.endswith("act_fn") for name in replaced(model))
        inside = states_of(model)
    torch.testing.assert_close(before[-1], inside[-1], rtol=1e-5, atol=1e-5)


def test_weights_that_change_between_blocks_are_packed_anew() -> None:
    model = model_of("bert")
    with prepacked_weights(model, MANY):
        first = states_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = states_of(model)
    with prepacked_weights(model, MANY):
        second = states_of(model)
    torch.testing.assert_close(second[-1], expected[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first[-1], second[-1])


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = model_of("bert")
    before, keys = states_of(model), list(model.state_dict())
    with pytest.raises(ValueError, match="stop"), prepacked_weights(model, MANY):
        assert list(model.state_dict()) == keys
        raise ValueError("stop")
    assert not replaced(model)
    assert torch.equal(before[-1], states_of(model)[-1])


@packs
def test_an_operator_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepacked._product

    def off(*arguments: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        product = real(*arguments)
        return lambda x: product(x) * 1.01

    monkeypatch.setattr(prepacked, "_product", off)
    model = model_of("bert")
    with prepacked_weights(model, MANY):
        assert not replaced(model)


@packs
def test_what_has_hooks_or_is_not_float32_runs_as_it_is() -> None:
    model = model_of("bert")
    assert isinstance(model, BertModel)
    seen: list[float] = []
    watched = model.encoder.layer[0].intermediate.dense
    watched.register_forward_hook(lambda module, inputs, output: seen.append(float(output.min())))
    model.encoder.layer[1].double()
    with prepacked_weights(model, MANY):
        names = replaced(model)
    assert not any(name.startswith(("encoder.layer.0.intermediate", "encoder.layer.1")) for name in names)
    assert any(name.startswith("encoder.layer.0.output") for name in names)


def test_autocast_computes_as_it_would_without() -> None:
    model = model_of("bert")
    with torch.autocast("cpu", torch.bfloat16):
        before = states_of(model)
        with prepacked_weights(model, MANY):
            inside = states_of(model)
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))


def test_nan_weights_run_as_torch_has_them() -> None:
    model = model_of("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with prepacked_weights(model, MANY):
        assert not any(name.startswith("encoder.layer.0.output.dense") for name in replaced(model))
        assert torch.isnan(states_of(model)[-1]).any()


def test_a_few_positions_do_not_pay_for_packing() -> None:
    model = model_of("bert")
    with prepacked_weights(model, MANY - 1):
        assert not replaced(model)


@packs
def test_threads_take_turns() -> None:
    """Two that undo each other's replacing would leave a product without its activation, or with two."""
    model = model_of("bert")
    expected, wrong = states_of(model), []

    def work() -> None:
        for _ in range(20):
            with prepacked_weights(model, MANY):
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
