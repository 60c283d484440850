"""What a cache says about itself: folders, layers, dtype, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kr2cache.cache.parts import Parts
from kr2cache.config import DEFAULT_POOL
from kr2cache.errors import ConfigError
from kr2cache.fusion import parse_layers

Layers = str | Sequence[int] | None
"""Layers of the model: ``last4``, numbers in any order, or all that are stored (None, ``all``)."""


class CacheFacts:
    """The facts of one cache, or of several parts of a corpus that are read as one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._header = parts.header

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that were opened as this cache."""
        return self._parts.folders

    @property
    def folder(self) -> Path:
        """The only folder.

        Raises:
            ConfigError: If several folders were opened as one.
        """
        return self.folders[self._parts.only("folder")]

    @property
    def layers(self) -> tuple[int, ...]:
        """The stored layer numbers; 0 = embedding output."""
        return self._header.layers

    @property
    def model_layers(self) -> int:
        """The number of the model's layers, embeddings included, whether stored or not."""
        return self._header.model_layers

    @property
    def width(self) -> int:
        """D, the width of the states."""
        return self._header.width

    @property
    def dtype(self) -> str:
        """The stored dtype: float16, float32, bfloat16 or int8."""
        return self._header.dtype

    @property
    def fusion(self) -> dict[str, Any] | None:
        """``{"layers", "weights"}`` if one fused layer is stored, else None."""
        return self._header.fusion

    @property
    def fingerprint(self) -> str:
        """The hash of everything that decides the states; of several folders, the hash of their fingerprints."""
        return self._parts.fingerprint

    @property
    def provenance(self) -> dict[str, Any]:
        """The record of how the cache was made: chosen, found and recorded fields; of several folders, those that are
        equal in all."""
        return self._parts.provenance

    @property
    def batch_plan(self) -> dict[str, Any]:
        """How the sequences were grouped into batches for the forward passes.

        Raises:
            ConfigError: If several folders were opened as one.
        """
        return self._parts.headers[self._parts.only("batch plan")].batch_plan

    @property
    def pool(self) -> str:
        """What one state is the mean of: ``word`` or ``sequence``; ``none`` if each token has its own state."""
        chosen = self.provenance.get("chosen")
        return str(chosen.get("pool", DEFAULT_POOL)) if isinstance(chosen, dict) else DEFAULT_POOL

    def check_has_words(self) -> None:
        """Raise ``ConfigError`` if there is one state for each sequence."""
        if self.pool == "sequence":
            raise ConfigError(
                f"{self._parts.name} holds one state for each sequence (--pool sequence), none for its words.",
                "Extract again with --pool word or without --pool.",
            )

    def layer_numbers(self, layers: Layers) -> tuple[int, ...] | None:
        """The numbers of layers that are given by name or number; None for all that are stored.

        Raises:
            ConfigError: For a layer that the model does not have, or that is not stored.
        """
        if layers is None or layers == "all":
            return None
        numbers = parse_layers(layers, self.model_layers) if isinstance(layers, str) else tuple(layers)
        self._parts.places(numbers)
        return numbers
