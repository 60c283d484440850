"""What a reader gets of a resource: its states, fused and projected, ready to be appended to the embeddings.

KR2, eq. 1 and 2: ``H^_res = sum_i w_i H_res^i``, ``G^0 = f_{h2:h1}(H^_res)``. The weights w of the fusions ``softmax``
and ``mix`` are the softmax of learned scores s. ``mix`` is ELMo's scalar mix (Peters et al. 2018, arXiv:1802.05365,
eq. 1): ``gamma * sum_i softmax(s)_i LayerNorm(H_i)``.

Shape letters: B sequences, R positions of the resource (l2), L layers, D and H widths h2 and h1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kr2cache.config import Projection
from kr2cache.errors import ConfigError
from kr2cache.fusion import Fusion


def projection_kind(projection: Projection, resource_width: int, reader_width: int) -> Projection:
    """Replace ``auto``: ``none`` if h2 = h1, else ``mlp``.

    Raises:
        ConfigError: For ``none`` between different widths.
    """
    if projection == "auto":
        return "none" if resource_width == reader_width else "mlp"
    if projection == "none" and resource_width != reader_width:
        raise ConfigError(
            f"--projection none needs equal widths; the resource has {resource_width}, the reader {reader_width}.",
            "Use --projection auto (an MLP here).",
        )
    return projection


def make_projection(kind: Projection, layers: int, resource_width: int, reader_width: int) -> nn.Module:
    """f_{h2:h1} of eq. 2: the identity, an MLP of two layers, or one matrix over all layers (``direct``)."""
    if kind == "none":
        return nn.Identity()
    if kind == "direct":
        return nn.Linear(layers * resource_width, reader_width)
    return nn.Sequential(nn.Linear(resource_width, reader_width), nn.GELU(), nn.Linear(reader_width, reader_width))


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """How the states of one resource enter a reader."""

    fusion: Fusion
    projection: Projection = "none"
    """``none``, ``mlp`` or ``direct``; ``projection_kind`` replaces ``auto``."""
    resource_width: int
    """h2."""

    @property
    def learns_weights(self) -> bool:
        """Whether the fusion has weights that are learned. The matrix of ``direct`` has them already."""
        return self.fusion.trainable and self.projection != "direct"

    def json(self) -> dict[str, Any]:
        """As a trained reader stores them (``kr2.json``)."""
        return asdict(self)

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> InputSettings:
        """From what ``json`` gives, among other fields."""
        fusion = Fusion(**{**stored["fusion"], "layers": tuple(stored["fusion"]["layers"])})
        return cls(fusion=fusion, projection=stored["projection"], resource_width=stored["resource_width"])


class ResourceInput(nn.Module):
    """The fusion and the projection of one resource: from its states to G^0."""

    def __init__(self, settings: InputSettings, reader_width: int) -> None:
        """
        Args:
            reader_width: h1.
        """
        super().__init__()
        self.settings = settings
        fusion = settings.fusion
        self.fusion_scores: nn.Parameter | None = None
        """(L,) s, whose softmax is w; None if w itself is learned or fixed."""
        self.fusion_gamma: nn.Parameter | None = None
        """(1,) gamma; only of ``mix``."""
        weights = torch.from_numpy(fusion.weights)
        if not settings.learns_weights:
            self.register_buffer("fusion_weights", weights)
        elif fusion.is_softmax:
            self.fusion_scores = nn.Parameter(torch.zeros_like(weights))
            if fusion.normalises:
                self.fusion_gamma = nn.Parameter(torch.ones(1))
        else:
            self.fusion_weights = nn.Parameter(weights)
        self.projection = make_projection(
            settings.projection, len(fusion.layers), settings.resource_width, reader_width
        )

    @property
    def weights(self) -> Tensor:
        """(L,) the weights w of eq. 1 as they act: after the softmax, if there is one."""
        scores: Tensor | None = self.fusion_scores
        weights: Tensor = self.fusion_weights if scores is None else scores.softmax(dim=0)
        return weights

    @property
    def is_weighted_sum(self) -> bool:
        """Whether ``weights`` alone make one layer of several. The caller may then fuse before ``forward``."""
        return self.settings.projection != "direct" and not self.settings.fusion.normalises

    def fusion_parameters(self) -> list[nn.Parameter]:
        """The learned parameters of the fusion: every parameter outside the projection. Empty if it is fixed."""
        return [one for name, one in self.named_parameters() if not name.startswith("projection.")]

    def forward(self, states: Tensor) -> Tensor:
        """G^0.

        Args:
            states: (B, L, R, D) of any floating dtype: the layers of the fusion, or L = 1 if they are already fused.

        Returns:
            float32 (B, R, H).
        """
        states = states.float()
        if self.settings.projection == "direct":
            fused = states.transpose(1, 2).flatten(2)
        elif states.shape[1] == 1:
            fused = states[:, 0]
        elif self.fusion_gamma is not None:
            normal = functional.layer_norm(states, states.shape[-1:])
            fused = self.fusion_gamma * torch.einsum("l,blrd->brd", self.weights, normal)
        else:
            fused = torch.einsum("l,blrd->brd", self.weights, states)
        projected: Tensor = self.projection(fused)
        return projected

    def described(self) -> dict[str, Any]:
        """What a run stores of it (``fusion.json``), JSON values. The weights are those that act (``weights``)."""
        weights = None if self.settings.projection == "direct" else _rounded(self.weights)
        gamma = {} if self.fusion_gamma is None else {"gamma": _rounded(self.fusion_gamma)[0]}
        return {
            "fusion": self.settings.fusion.name,
            "layers": list(self.settings.fusion.layers),
            "trainable": bool(self.fusion_parameters()),
            "weights": weights,
            **gamma,
            "projection": self.settings.projection,
        }


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 7) for value in values.detach().cpu()]
