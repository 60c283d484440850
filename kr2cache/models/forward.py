"""Cheaper forward passes on a CPU: no memory between a product and what alone reads it, and weights that lie as oneDNN
reads them.

Activations and residual sums are written over what they are computed from: the same bits, without a tensor that goes
through the caches for nothing. A forward pass of six layers of width 384 took 0.99 of the time with AVX2, 0.98 with
AVX-512.

torch multiplies float32 matrices through its BLAS, which puts the weights in order again on every call. oneDNN's own
product takes them in order once, and computes BERT's GELU while the result is in cache. The states move by rounding
alone (about 1e-6 of the largest). Both together took 0.96 of the time with AVX-512 on Intel, 0.90 on AMD's Zen 4, and
0.51 on Zen 5, whose AVX-512 oneDNN uses and torch's BLAS (MKL) does not. With AVX2 it saves less than its second copy
of the weights is worth, and is not used.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

ACTIVATED = (("dense", "intermediate_act_fn"), ("lin1", "activation"))
"""Names that transformers gives a product and the activation that alone reads its result: BERT's intermediate layer and
all that descend from it, DistilBERT's feed-forward layer."""
INTERMEDIATE = {"dense", "intermediate_act_fn"}
"""What BERT's intermediate layers, and all that descend from them, consist of: activation(dense(x))."""
ADDED = {"dense", "LayerNorm", "dropout"}
"""What BERT's output layers, and all that descend from them, consist of: LayerNorm(dropout(dense(x)) + residual)."""
WORTHWHILE = 4_096
"""Positions that pay for packing, and for trying whether a module computes the same: of a model of six layers and width
384 either took as long as 1,400 save."""
TOLERANCE = 1e-4
"""Of the largest value, between oneDNN's product and torch's, on random input."""


@contextlib.contextmanager
def cheaper_forward(model: nn.Module, positions: int) -> Iterator[None]:
    """Inside the block ``model`` runs cheaper, where it is on a CPU.

    For inference alone: weights must not change inside, nor hooks be added; what needs gradients runs as ever.
    Parameters, state dict and modules stay as they are. Several threads may be inside at once: each module computes
    alike, within rounding, before and after.

    Args:
        positions: How many go through the model inside; for few the block does nothing. With AVX-512 a second copy of
            the linear layers' weights is made.
    """
    replaced: list[nn.Module] = []
    try:
        if positions >= WORTHWHILE and all(parameter.device.type == "cpu" for parameter in model.parameters()):
            if packing_pays_here():
                _pack_weights(model, replaced)
            _compute_in_place(model, replaced)
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def packing_pays_here() -> bool:
    """With AVX-512 alone: with AVX2 torch's own BLAS is as fast, and what is no x86 takes oneDNN or its like already.
    By what the processor can do, not by a measurement: what goes on after a stop has to compute alike.
    """
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


# Weights that are packed ---------------------------------------------------------------------------------------------


def _pack_weights(model: nn.Module, replaced: list[nn.Module]) -> None:
    inside: set[nn.Module] = set()
    for module in model.modules():
        children = dict(module.named_children())
        linear, activation = children.get("dense"), children.get("intermediate_act_fn")
        if children.keys() == INTERMEDIATE and _is_plain_linear(linear) and _takes(module, "hidden_states"):
            product = _packed_product(linear, "gelu", module.forward)
            if _is_gelu(activation) and _agree(
                module.forward, product, [_random(linear.in_features, linear)], _is_close
            ):
                _replace(module, product, replaced)
                inside.add(linear)
    for module in model.modules():
        if _is_plain_linear(module) and module not in inside:
            product = _packed_product(module, "none", module.forward)
            if _agree(module.forward, product, [_random(module.in_features, module)], _is_close):
                _replace(module, product, replaced)


def _is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.weight.dtype == torch.float32 and _is_untouched(module)


def _packed_product(
    linear: nn.Linear, activation: str, plain: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """oneDNN's product and activation, or ``plain`` for what they were not packed for."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
    bias = None if linear.bias is None else linear.bias.detach()
    algorithm = "none" if activation == "gelu" else ""

    def product(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32 or not _is_plain_inference():
            return plain(hidden_states)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, activation, [], algorithm)
        return result

    return product


# What is computed in place -------------------------------------------------------------------------------------------


def _compute_in_place(model: nn.Module, replaced: list[nn.Module]) -> None:
    """Before this the products may have been replaced: their results are new tensors all the same."""
    owners = Counter(child for parent in model.modules() for child in parent.children())
    for parent in model.modules():
        children = dict(parent.named_children())
        for name, activation_name in ACTIVATED:
            linear, activation = children.get(name), children.get(activation_name)
            if not (_is_untouched(parent) and _is_gelu(activation) and owners[activation] == 1):
                continue
            if _gives_new_tensors(linear):
                in_place = _gelu_in_place(activation.forward)
                trial = _with_child(parent, activation_name, in_place)
                if _agree(parent.forward, trial.forward, [_random(linear.in_features, linear)], torch.equal):
                    _replace(activation, in_place, replaced)
        linear = children.get("dense")
        if children.keys() == ADDED and _gives_new_tensors(linear) and _is_output(parent):
            added = _added_in_place(parent)
            x, residual = _random(linear.in_features, linear), _random(linear.out_features, linear, seed=1)
            if _agree(parent.forward, added, [x, residual], torch.equal):
                _replace(parent, added, replaced)


def _gives_new_tensors(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and not _has_hooks(module)


def _is_output(module: Any) -> bool:
    """It takes what BERT's takes, and nobody looks at its dropout, which is not called."""
    return _takes(module, "hidden_states", "input_tensor") and _is_untouched(module.dropout)


def _with_child(parent: nn.Module, name: str, forward: Callable[..., Any]) -> nn.Module:
    """The module with another ``forward`` of one child. The module itself, which other threads may be running, is not
    touched.
    """
    trial, child = copy.copy(parent), copy.copy(parent.get_submodule(name))
    child.__dict__["forward"] = forward
    trial.__dict__["_modules"] = {**parent._modules, name: child}
    return trial


def _is_gelu(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """By the error function, as torch has it in place too."""
    if module is None or not _is_untouched(module):
        return False
    if type(module) is GELUActivation:
        return module.act is nn.functional.gelu
    return type(module) is nn.GELU and module.approximate == "none"


def _gelu_in_place(plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gelu(x: Tensor) -> Tensor:
        if not _is_plain_inference():
            return plain(x)
        result: Tensor = torch.ops.aten.gelu_(x)
        return result

    return gelu


def _added_in_place(output: Any) -> Callable[[Tensor, Tensor], Any]:
    plain = output.forward

    def forward(hidden_states: Tensor, input_tensor: Tensor) -> Any:
        if output.dropout.training or not _is_plain_inference():
            return plain(hidden_states, input_tensor)
        product = output.dense(hidden_states)  # a new tensor, and dropout gives it as it is
        alike = product.shape == input_tensor.shape and product.dtype == input_tensor.dtype
        return output.LayerNorm(product.add_(input_tensor) if alike else product + input_tensor)

    return forward


def _takes(module: nn.Module, *names: str) -> bool:
    """These arguments, which may be given by name too, and nobody looks at them."""
    return _is_untouched(module) and tuple(inspect.signature(module.forward).parameters) == names


# Both ----------------------------------------------------------------------------------------------------------------


def _agree(
    plain: Callable[..., Any],
    other: Callable[..., Any],
    inputs: list[Tensor],
    alike: Callable[[Tensor, Tensor], bool],
) -> bool:
    """Whether both give the same. Names are no promise: another architecture may read twice what is overwritten; and
    torch keeps oneDNN's operators for its own compiler: what they do may change.
    """
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        try:
            return alike(plain(*inputs), other(*inputs))
        except Exception:  # what takes other arguments, or gives something else, is another architecture
            return False


def _is_close(wanted: Tensor, given: Tensor) -> bool:
    """Weights that are not finite differ from themselves: their product runs as torch has it."""
    limit = TOLERANCE * float(wanted.abs().max())
    return given.shape == wanted.shape and float((given - wanted).abs().max()) <= limit


def _is_plain_inference() -> bool:
    """Nothing is kept for a gradient, and no operator chooses its dtype by itself."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _is_untouched(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _random(width: int, like: nn.Linear, seed: int = 0) -> Tensor:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    return x.to(like.weight.dtype)


def _replace(module: nn.Module, forward: Callable[..., Any], replaced: list[nn.Module]) -> None:
    replaced.append(module)  # first: wherever a Ctrl-C falls, it is taken back
    module.__dict__["forward"] = forward
