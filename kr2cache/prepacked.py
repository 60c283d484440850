"""Cheaper forward passes on a CPU: weights that lie as oneDNN reads them, and the activation inside the product.

torch multiplies float32 matrices through its BLAS, which puts the weights in order again on every call. oneDNN's own
product takes them in order once and applies bias and GELU while the result is in cache. The states move by rounding
alone (about 1e-6 of the largest); a transformer's forward pass took 0.84 of the time with AVX-512 on AMD, 0.95 on
Intel, and as long as before with AVX2.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

PAIRS = (("dense", "intermediate_act_fn"), ("lin1", "activation"))
"""Names that transformers gives a product and the activation that alone reads its result: BERT's intermediate layer and
all that descend from it, DistilBERT's feed-forward layer."""
TOLERANCE = 1e-4
"""Of the largest value, between oneDNN's product and torch's, on random input."""


WORTHWHILE = 4_096
"""Positions that pay for packing: of a model of six layers and width 384 it took as long as 1,400 save."""
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def prepacked_weights(model: nn.Module, positions: int) -> Iterator[None]:
    """Inside the block the float32 linear layers of ``model`` run through oneDNN where that pays, with AVX-512.

    For inference alone: the block has no gradients, and weights must not change inside it. A second copy of the linear
    layers' weights is held meanwhile. Parameters, state dict and modules stay as they are. Of several threads one is
    inside at a time.

    Args:
        positions: How many go through the model inside; for few the block does nothing.
    """
    if positions < WORTHWHILE or not _is_worthwhile(model):
        yield
        return
    with _one_at_a_time:
        replaced: list[nn.Module] = []
        try:
            packed = {module: _packed(module) for module in model.modules() if _is_plain_linear(module)}
            for linear, weight in packed.items():
                plain = linear.forward
                product = _product(linear.bias, weight, "none", plain)
                if _computes_the_same(linear, product, plain):
                    _replace(linear, product, replaced)
            for linear, gelu in _pairs(model, packed):
                both = _one_after_the_other(linear.forward, gelu.forward)
                fused = _product(linear.bias, packed[linear], "gelu", both)
                if _computes_the_same(linear, fused, both):
                    _replace(linear, fused, replaced)
                    _replace(gelu, lambda x: x, replaced)
            yield
        finally:
            for module in replaced:
                module.__dict__.pop("forward", None)


def pays_here() -> bool:
    """With AVX-512 alone: with AVX2 torch's own BLAS is as fast, and what is no x86 takes oneDNN or its like already.
    By what the processor can do, not by a measurement: what goes on after a stop has to compute alike.
    """
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _is_worthwhile(model: nn.Module) -> bool:
    return (
        pays_here()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
    )


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and "forward" not in module.__dict__
        and not _has_hooks(module)
    )


def _pairs(model: nn.Module, packed: Mapping[nn.Linear, Tensor]) -> Iterator[tuple[nn.Linear, nn.Module]]:
    """Products, and the GELU that alone reads each one's result."""
    for parent in model.modules():
        children = dict(parent.named_children())
        for product, activation in PAIRS:
            linear, gelu = children.get(product), children.get(activation)
            if linear is None or gelu is None or linear not in packed or _has_hooks(gelu):
                continue
            assert isinstance(linear, nn.Linear), "only these are packed"
            if type(gelu) is GELUActivation or (isinstance(gelu, nn.GELU) and gelu.approximate == "none"):
                yield linear, gelu


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _packed(linear: nn.Linear) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
    return packed


def _one_after_the_other(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def _product(
    bias: Tensor | None, weight: Tensor, activation: str, plain: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """oneDNN's product, or ``plain`` for what it was not packed for."""
    bias = None if bias is None else bias.detach()
    algorithm = "none" if activation == "gelu" else ""

    def product(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return plain(x)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
        return result

    return product


def _computes_the_same(
    linear: nn.Linear, product: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor]
) -> bool:
    """torch keeps these operators for its own compiler: what they do may change, and then they are left alone."""
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = expected(x)
        try:
            given = product(x)
        except RuntimeError:
            return False
    limit = TOLERANCE * float(wanted.abs().max())
    # Weights that are not finite differ from themselves: their product runs as torch has it.
    return given.shape == wanted.shape and float((given - wanted).abs().max()) <= limit


def _replace(module: nn.Module, forward: Callable[[Tensor], Tensor], replaced: list[nn.Module]) -> None:
    module.__dict__["forward"] = forward
    replaced.append(module)
