"""The resource of a trained reader without a cache: it computes its hidden states anew for every batch.

Shape letters: B sequences, T positions of the resource (padded), L layers that reach the reader, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.cache.pooling import check_words, pooled
from kr2cache.config import DEFAULT_POOL, DEFAULT_WEIGHTS_DTYPE, Pool
from kr2cache.errors import CacheMismatchError, ModelUnavailableError, UnknownNameError
from kr2cache.models.configuration import encoder_shape
from kr2cache.models.digests import config_digest, weights_digest
from kr2cache.models.encode import encode, padding_mask
from kr2cache.models.files import local_folder
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.models.repeatable import as_loaded, depends_on_history
from kr2cache.models.stack import open_encoder
from kr2cache.models.states import device_of, hidden_states, means, padding_is_harmless
from kr2cache.models.tokenizers import load_tokenizer, pad_id
from kr2cache.tasks import Task


@dataclass(frozen=True, kw_only=True)
class OnlineResource:
    """A frozen model that runs for every batch."""

    name: str
    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    compute_dtype: str
    weights_dtype: str
    pool: Pool = DEFAULT_POOL
    """As in the cache with which the reader was trained."""
    padded: bool
    """Whether sequences of different lengths may run in one batch."""
    fresh: bool = False
    """Whether each batch runs in the model as it was loaded: its states depend on what ran before."""

    def states(self, index: SequenceIndex, sequences: Sequence[int] | NDArray[np.intp]) -> tuple[Tensor, ...]:
        """Hidden states of these sequences of ``index``, as ``models.states.hidden_states`` returns them."""
        encoder = as_loaded(self.encoder) if self.fresh else self.encoder
        return hidden_states(encoder, index, sequences, pad_id=pad_id(self.tokenizer), compute_dtype=self.compute_dtype)


class OnlineFeatures:
    """Takes the place of ``features.ResourceFeatures``, but computes each batch instead of reading it from a cache.

    It can also apply trained fusion weights, which ``ResourceFeatures`` leaves to the reader. The reader then gets one
    layer instead of all. The direct projection and the fusion ``mix`` need the layers side by side.
    """

    def __init__(
        self, resource: OnlineResource, index: SequenceIndex, layers: tuple[int, ...], weights: Tensor | None
    ) -> None:
        """
        Args:
            index: The sequences, encoded with the resource's tokenizer.
            layers: The layers that the fusion uses.
            weights: (len(layers),) weights of their average; None to keep the layers apart.
        """
        self.resource = resource
        self.index = index
        self.pooling = None if resource.pool == DEFAULT_POOL else pooled(index, resource.pool)
        stored = index if self.pooling is None else self.pooling.stored
        check_words(stored)
        self.n_tokens = stored.n_tokens
        self.device = device_of(resource.encoder)
        self.layers = layers
        self.weights = None if weights is None else weights.to(self.device)
        self.width = encoder_shape(resource.encoder.config)[1]
        self.sequences_read = 0
        """How many sequences went through the resource."""

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """States and mask of some sequences.

        Returns:
            States float32 (B, L, T, D) on the resource's device, zero at padding; L = 1, or all layers if they are kept
            apart. Mask (B, T): 1 for a state, 0 for padding.
        """
        self.sequences_read += len(sequences)
        numbers = np.asarray(sequences)
        lengths = self.n_tokens[numbers]
        mask = padding_mask(lengths)
        layers = len(self.layers) if self.weights is None else 1
        states_BLTD = torch.zeros(len(numbers), layers, mask.shape[1], self.width, device=self.device)
        together = [np.arange(len(numbers))]
        if not self.resource.padded:
            tokens = self.index.n_tokens[numbers]
            together = [np.flatnonzero(tokens == length) for length in np.unique(tokens)]
        for rows in together:
            states_BLTD[torch.from_numpy(rows), :, : int(lengths[rows].max())] = self._states(numbers[rows])
        padding = torch.from_numpy(mask == 0)[:, None, :, None].to(self.device)
        return states_BLTD.masked_fill_(padding, 0), mask

    def _states(self, sequences: NDArray[np.intp]) -> Tensor:
        """(B, L, T, D), padded positions included."""
        states = [self.resource.states(self.index, sequences)[layer].float() for layer in self.layers]
        if self.pooling is not None:
            states = [self._padded(layer, sequences) for layer in means(self.pooling, sequences, states)]
        states_BLTD = torch.stack(states, dim=1)
        if self.weights is None:
            return states_BLTD
        return torch.einsum("l,bltd->btd", self.weights, states_BLTD)[:, None]

    def _padded(self, states: Tensor, sequences: NDArray[np.intp]) -> Tensor:
        """Pooled states of some sequences, one sequence behind the other (P, D), as rows: (B, T, D)."""
        parts = list(torch.split(states, self.n_tokens[sequences].tolist()))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


# The resource of a finished run --------------------------------------------------------------------------------------


def load_resource(
    run: Path,
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    task: Task,
    device: torch.device,
    device_map: str | None,
) -> OnlineResource:
    """Load the resource of a run, and check that it is the model that the reader was trained with.

    Args:
        config: The settings of the resource that decided the run (``config.json``).
        origin: Where the model was during the run, as ``models.origin`` recorded it.
        models: ``[models]`` of ``kr2cache.toml``.
        device: Where the model runs.
        device_map: As in ``ExtractConfig``; then ``device`` has no meaning.

    Raises:
        CacheMismatchError: If the model has other weights or another configuration.
        ModelUnavailableError: If the model is not on this machine and cannot be downloaded.
        UnsupportedModelError: If its states are random.
    """
    name = str(config["name"])
    spec = _find_resource(name, origin, models)
    weights_dtype = str(config.get("weights_dtype", DEFAULT_WEIGHTS_DTYPE))
    encoder = open_encoder(spec, weights_dtype, device_map).encoder
    weights = weights_digest(encoder)
    where = local_folder(spec)
    differs = None
    if weights not in config["weights"]:
        then = ", ".join(digest[:8] for digest in config["weights"])
        differs = f"other weights (digest {then} then, {weights[:8]} now)"
    elif config_digest(encoder.config) not in config["config"]:
        differs = "another configuration (config.json)"
    if differs is not None:
        raise CacheMismatchError(
            f"The run {run} was trained with a resource {name} that had {differs}. This model is in {where}.",
            f'Set path = "..." under [models.{name}] in kr2cache.toml to the folder of the model used for training, or '
            "train again with this model.",
        )
    if device_map is None:
        encoder.to(device)  # type: ignore[arg-type]  # transformers annotates it for itself alone
    resource = OnlineResource(
        name=name,
        encoder=encoder,
        tokenizer=load_tokenizer(spec, words=task.words),
        max_length=int(config["max_length"]),
        compute_dtype=str(config["compute_dtype"]),
        weights_dtype=weights_dtype,
        pool=config.get("pool", DEFAULT_POOL),
        padded=False,
    )
    if _depends_on_history(resource, words=task.words):
        return dataclasses.replace(resource, fresh=True)
    return dataclasses.replace(resource, padded=_may_be_padded(resource, words=task.words))


def _find_resource(name: str, origin: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """Look for the model ``name`` on this machine, then where it was during the run, then on the hub."""
    try:
        named = find_model(name, models)
    except (UnknownNameError, ModelUnavailableError):  # only the run knows this name: a folder's name or a hub id
        named = ModelSpec(name=name)
    path = origin.get("path")
    recorded = dataclasses.replace(
        named,
        hub_id=origin.get("hub_id"),
        revision=origin.get("revision"),
        path=Path(path) if path else None,
        package=origin.get("package"),
        layers=origin.get("layers"),
        model_type=origin.get("model_type"),
        random_seed=origin.get("seed"),
    )
    on_hub = [dataclasses.replace(spec, path=None) for spec in (named, recorded) if spec.hub_id is not None]
    for spec in (named, recorded, *on_hub):
        if local_folder(spec) is not None:
            return spec
    if on_hub:
        return on_hub[0]  # loading it downloads it, or fails with an explanation
    raise ModelUnavailableError(
        f"The run's resource, {name}, is not on this machine{f': it was in {path}' if path else ''}.",
        f'Set path = "..." under [models.{name}] in kr2cache.toml to its folder.',
    )


def _depends_on_history(resource: OnlineResource, *, words: bool) -> bool:
    """Whether the resource's states depend on what ran before, at any length up to its longest."""
    longest = tuple(str(number % 10) for number in range(resource.max_length))
    texts = [longest[:1], longest[: len(longest) // 2], longest]
    if not words:
        texts = [(" ".join(text),) for text in texts]
    index = encode(resource.tokenizer, ["a", "b", "c"], texts, words=words, max_length=resource.max_length)

    def run(model: PreTrainedModel, sequence: int) -> tuple[Tensor, ...]:
        return dataclasses.replace(resource, encoder=model, compute_dtype="float32").states(index, [sequence])

    return depends_on_history(resource.encoder, index.n_tokens, run, repr(resource.name)) is not None


def _may_be_padded(resource: OnlineResource, *, words: bool) -> bool:
    """Whether a short text has the same states alone and in a batch with a long text. In some architectures padding
    changes the states."""
    texts = [("1",), ("1", "2", "3", "4", "5", "6", "7", "8") if words else ("1 2 3 4 5 6 7 8",)]
    index = encode(resource.tokenizer, ["short", "long"], texts, words=words, max_length=resource.max_length)
    short, long = index.n_tokens.tolist()
    if long <= short:
        return False
    return padding_is_harmless(
        resource.states(index, [0]), resource.states(index, [0, 1]), resource.compute_dtype, resource.weights_dtype
    )
