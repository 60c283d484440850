"""Layer fusion: names to layers and weights (NumPy only).

KR2, eq. 1: ``H^_res = sum_{i=0..L} w_i H_res^i``. The weights ``w`` are trainable (``fuse``; ``softmax`` and ``mix``,
whose weights are positive and sum to 1), uniform over all layers (``all``) or the last N (``lastN``; ``last4`` is Table
2's "average of the last 4", an average, not a concatenation), or one-hot (``layerN``; ``layer0`` is the embedding
output). ``training.resource_input`` computes the trainable ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.errors import ConfigError, UnknownNameError, nearest

TRAINABLE = ("fuse", "softmax", "mix")
"""Fusions of all layers whose weights are learned."""
SOFTMAX = ("softmax", "mix")
"""Those of them whose weights are a softmax of learned scores: positive, and 1 in sum."""
FUSION_FORMS = re.compile(rf"{'|'.join(TRAINABLE)}|all|last[1-9][0-9]*|layer(0|[1-9][0-9]*)")
"""Each fusion has one spelling, because it is part of a run's name."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One way to collapse the layer axis."""

    name: str
    """As on the command line: ``fuse``, ``softmax``, ``mix``, ``all``, ``lastN`` or ``layerN``."""
    layers: tuple[int, ...]
    """Numbers of the layers that the fusion uses; 0 is the embedding output."""
    trainable: bool
    """Whether the weights are learned; they start uniform."""

    @property
    def is_softmax(self) -> bool:
        """Whether the weights are a softmax of learned scores (``SOFTMAX``)."""
        return self.name in SOFTMAX

    @property
    def normalises(self) -> bool:
        """Whether each layer is normalised by its mean and variance over the width before it is weighted."""
        return self.name == "mix"

    @property
    def weights(self) -> NDArray[np.float32]:
        """The fixed weights, or the first values of the trainable weights: uniform. Shape ``(len(layers),)``."""
        return np.full(len(self.layers), 1 / len(self.layers), dtype=np.float32)

    @property
    def stored(self) -> dict[str, Any]:
        """This fusion in the form in which the header of a fused cache records it."""
        return {"layers": list(self.layers), "weights": [float(w) for w in self.weights]}

    def is_stored_as(self, stored: dict[str, Any]) -> bool:
        """Whether ``stored``, from the header of a fused cache, is this fusion."""
        layers, weights = stored.get("layers"), stored.get("weights")
        return (
            not self.trainable
            and layers == list(self.layers)
            and isinstance(weights, list)
            and len(weights) == len(self.weights)
            and all(
                isinstance(w, float | int) and abs(w - own) < 1e-6 for w, own in zip(weights, self.weights, strict=True)
            )
        )

    def apply(self, states_LTD: NDArray[np.floating]) -> NDArray[np.float32]:
        """Eq. 1 on one sequence.

        Args:
            states_LTD: The layers of ``self.layers`` in that order, shape ``(len(layers), T, D)``.

        Returns:
            float32, shape ``(T, D)``.
        """
        fused: NDArray[np.float32] = np.einsum("l,ltd->td", self.weights, states_LTD.astype(np.float32, copy=False))
        return fused


def check_fusion_name(name: str, model_layers: int | None = None) -> None:
    """Raise ``UnknownNameError`` for a name that is not valid for any model. This needs no model, so it can be checked
    first.

    Args:
        model_layers: L + 1 of the resource, if known. The error then lists the fusions of this resource.
    """
    if FUSION_FORMS.fullmatch(name):
        return
    # For an unknown resource, suggest only fusions that every resource has.
    several = range(model_layers or 1)
    known = [*TRAINABLE, "all", *(f"last{n + 1}" for n in several), *(f"layer{n}" for n in several)]
    last, layer = ("", "") if model_layers is None else (f" to {model_layers}", f" to {model_layers - 1}")
    raise UnknownNameError(
        f"Unknown fusion {name!r}.{nearest(name, known)}",
        "Known: fuse (trainable weights), softmax (trainable, their sum is 1), mix (ELMo's scalar mix of normalised "
        f"layers), all (average of all layers), lastN (average of the last N layers, N from 1{last}), "
        f"layerN (layer N alone, N from 0{layer}; layer 0 is the embedding output).",
    )


def parse_fusion(name: str, model_layers: int) -> Fusion:
    """The fusion called ``name`` for a model that has ``model_layers`` = L + 1 layers, embedding output included.

    Raises:
        UnknownNameError: For a name in none of the forms.
        ConfigError: If the model has fewer layers than the name asks for.
    """
    check_fusion_name(name, model_layers)
    if name in (*TRAINABLE, "all"):
        return Fusion(name=name, layers=tuple(range(model_layers)), trainable=name in TRAINABLE)
    number = int(name.removeprefix("last").removeprefix("layer"))
    if name.startswith("last"):
        return Fusion(name=name, layers=last_layers(number, model_layers, f"Fusion {name!r}"), trainable=False)
    if number >= model_layers:
        raise ConfigError(
            f"Fusion {name!r} asks for layer {number}, but this resource has layers 0 to {model_layers - 1}.",
            "Layer 0 is the embedding output.",
        )
    return Fusion(name=name, layers=(number,), trainable=False)


LAYERS_FORMS = re.compile(r"all|last[1-9][0-9]*|[0-9]+(\s*,\s*[0-9]+)*")


def check_layers_form(text: str) -> None:
    """Raise ``ConfigError`` for a ``--layers`` that is not valid for any model."""
    if not LAYERS_FORMS.fullmatch(text):
        raise ConfigError(f"--layers {text!r} is not understood.", "Give all, lastN (last4) or a list such as 0,3,5.")


def parse_layers(text: str, model_layers: int) -> tuple[int, ...]:
    """The layers that ``--layers`` names: ``all``, ``lastN`` or a list such as ``0,3,5``; ascending, without repeats.

    Raises:
        ConfigError: For anything else, or for a layer that the model does not have.
    """
    check_layers_form(text)
    if text == "all":
        return tuple(range(model_layers))
    if text.startswith("last"):
        return last_layers(int(text.removeprefix("last")), model_layers, f"--layers {text}")
    layers = tuple(sorted({int(part) for part in text.split(",")}))
    if layers[-1] >= model_layers:
        raise ConfigError(
            f"--layers {text} asks for layer {layers[-1]}, but this model has layers 0 to {model_layers - 1}.",
            "Layer 0 is the embedding output.",
        )
    return layers


def last_layers(number: int, model_layers: int, who: str) -> tuple[int, ...]:
    """The last ``number`` layers, as layer numbers."""
    if number > model_layers:
        raise ConfigError(
            f"{who} asks for {number} layers, but this model has {model_layers} (embeddings included).",
            f"last{model_layers} averages all of them, the same as all.",
        )
    return tuple(range(model_layers - number, model_layers))
