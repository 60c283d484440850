"""Does a cache still hold the states that its model gives? A few of its sequences, the canaries, run again.

Versions of torch or transformers may compute an architecture in another way. Readers would then train on states that
today's model does not give, and a continued extraction would mix both. So a cache that was made with other versions is
compared with its model before it is used. What rounding explains is no difference: that of the stored dtype, of the
forward pass, and of padding in a batch.

Shape letters: L layers, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.format import SequenceIndex
from kr2cache.cache.pooling import Pooling, pooled
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import DEFAULT_POOL
from kr2cache.errors import CacheError, CacheMismatchError
from kr2cache.extraction import trial
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.extraction.rerun import RerunConfig, from_data, model_of, needs_data, open_same, plan_again
from kr2cache.fusion import Fusion
from kr2cache.models.repeatable import TOLERANCE
from kr2cache.models.states import PADDING_TOLERANCE
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.store import provenance
from kr2cache.system.console import waiting
from kr2cache.tasks import find_task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LIBRARIES = ("torch", "transformers")
"""The libraries that compute states."""
LONGEST = 512
"""Tokens of the longest canary, unless all sequences are longer."""
ROUNDING = {**PADDING_TOLERANCE, "float32": TOLERANCE}
"""Largest difference by another order of sums, relative to the largest state, by the dtype that computes."""
TINY = np.finfo(np.float32).tiny
MEASURES: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "largest": lambda states: np.abs(states).max(axis=(1, 2)),
    "root mean square": lambda states: np.sqrt(np.square(states).mean(axis=(1, 2))),
}
"""Of (L, T, D), one number for each layer. The first finds a change of a few numbers. The second finds a small change
of all numbers: the few large ones that many models have do not hide it."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One sequence: its stored states compared with those that the model gives now."""

    id: str
    tokens: int
    layer: int | None
    """The layer that differs most, compared with what is allowed; None for a stored fusion."""
    measure: str
    """A key of ``MEASURES``: the one that differs most, compared with what is allowed."""
    difference: float
    """By this measure."""
    allowed: float
    """What rounding explains."""

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed  # false for nan

    def text(self) -> str:
        where = "in the stored fusion" if self.layer is None else f"in layer {self.layer}"
        return (
            f"sequence {self.id!r} ({self.tokens} tokens) differs by {self.difference:.3g} ({self.measure}) {where}; "
            f"rounding explains {self.allowed:.3g}"
        )

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "agrees": self.agrees}


# Versions -------------------------------------------------------------------------------------------------------------


def made_with_others(recorded: Mapping[str, Any]) -> bool:
    """Whether other versions of the libraries made a cache. Builds for other hardware (``+cpu``) are one version.

    Args:
        recorded: The cache's provenance.
    """
    now = provenance.library_versions()
    return any(then.partition("+")[0] != now[name].partition("+")[0] for name, then in _versions(recorded).items())


def made_with(recorded: Mapping[str, Any]) -> str:
    """The versions that made a cache, in words: ``torch 2.9.0 and transformers 5.1.0``."""
    return _text(_versions(recorded))


def running() -> str:
    """The versions that run now, in words."""
    return _text({name: provenance.library_versions()[name] for name in LIBRARIES})


def _versions(recorded: Mapping[str, Any]) -> dict[str, str]:
    given = recorded.get("recorded", {}).get("versions", {})
    return {name: str(given[name]) for name in LIBRARIES if name in given}


def _text(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


# Before a cache is used -----------------------------------------------------------------------------------------------

_agreed: set[tuple[str, str]] = set()
"""Fingerprints of caches whose canaries agreed, with the versions that made them. Of this process."""


def check_once(
    cache: FeatureCache,
    index: SequenceIndex,
    positions: NDArray[np.int64],
    load: Callable[[SequenceIndex], tuple[ExtractPlan, PreTrainedModel]],
) -> None:
    """Compare a cache with its model, if other versions made it. Each cache is compared once in a process.

    Args:
        index: Sequences of the cache, with segment ids if the model runs with them.
        positions: (n,) where the cache holds each of them; -1 if it does not, or not yet.
        load: Gives the plan for some of these sequences, and the model.

    Raises:
        CacheMismatchError: If the states differ by more than rounding.
        CacheError: If a canary is damaged.
    """
    then = made_with(cache.provenance)
    key = (cache.fingerprint, then)
    if not made_with_others(cache.provenance) or key in _agreed or not (positions >= 0).any():
        return
    with waiting(f"Comparing {cache.folder.name} with its model: other versions made it"):
        chosen = choose(index.n_tokens, positions >= 0)
        plan, encoder = load(index.select(chosen))
        wrong = [one for one in compare(cache, positions[chosen], plan, encoder) if not one.agrees]
    if wrong:
        raise CacheMismatchError(
            f"{cache.folder} was made with {then}. {running()}, which run now, give other states: {wrong[0].text()}.",
            f"Install {then} again, or make the cache again: kr2cache cache remove {cache.folder}, then extract.",
        )
    _agreed.add(key)


def check_before_more(
    cache: FeatureCache, positions: NDArray[np.int64], plan: ExtractPlan, encoder: PreTrainedModel
) -> None:
    """``check_once`` before the model adds states beside those of a cache.

    Args:
        positions: (n,) where the cache holds the n sequences of the plan; -1 if it does not, or not yet.
    """
    check_once(cache, plan.index, positions, lambda index: (replace(plan, index=index), encoder))


# On demand ------------------------------------------------------------------------------------------------------------


def canaries(config: RerunConfig) -> list[Canary]:
    """Compare a cache with its model, whatever versions made it.

    Raises:
        CacheError: If no sequence is complete, or a canary is damaged.
        CacheMismatchError: If the cache was made from another model or other data.
        ModelUnavailableError: If the model is not on this machine.
    """
    cache = FeatureCache.open(config.folder)
    made, chosen = (
        provenance.found_of(cache.provenance, config.folder),
        provenance.chosen_of(cache.provenance, config.folder),
    )
    if not cache.complete.any():
        raise CacheError(f"No sequence of {config.folder} is complete.", "Run the same kr2cache extract again.")
    positions = choose(cache.n_tokens, cache.complete)
    spec = model_of(config, chosen.resource)
    tokenizer = load_tokenizer(spec, words=find_task(chosen.task, config.tasks).words)
    index = cache.tokens().select(positions)
    if needs_data(chosen, made):
        index = from_data(index, chosen, config, tokenizer)
    plan = plan_again(
        cache,
        config.folder,
        index,
        spec,
        tokenizer,
        device=config.device,
        device_map=config.device_map,
        models=config.models,
    )
    return compare(cache, positions, plan, open_same(plan, made, config.folder).encoder)


# The comparison -------------------------------------------------------------------------------------------------------


def choose(n_tokens: NDArray[np.integer[Any]], usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Up to three sequences: the shortest, the longest of at most ``LONGEST`` tokens, and one between them.

    Args:
        n_tokens: (n,) lengths.
        usable: (n,) whether a sequence may be chosen; true for at least one.
    """
    places = np.flatnonzero(usable)
    places = places[np.argsort(n_tokens[places], kind="stable")]
    short = max(1, int((n_tokens[places] <= LONGEST).sum()))
    return np.array(list(dict.fromkeys(places[[0, (short - 1) // 2, short - 1]].tolist())), dtype=np.int64)


def compare(
    cache: FeatureCache, positions: NDArray[np.int64], plan: ExtractPlan, encoder: PreTrainedModel
) -> list[Canary]:
    """Compare stored states with those that the model gives now.

    Args:
        positions: Where the cache holds the sequences of the plan, all complete.
        plan: Its index has these sequences alone.
        encoder: The model of the plan.

    Raises:
        CacheError: If the stored states of one are damaged.
        DeviceMemoryError: If one does not fit into the device's memory.
        UnsupportedModelError: If the model fails.
    """
    trial.move_to_device(plan, encoder)
    with trial.first_passes(plan, encoder):
        return _compared(cache, positions, plan, encoder)


def _compared(
    cache: FeatureCache, positions: NDArray[np.int64], plan: ExtractPlan, encoder: PreTrainedModel
) -> list[Canary]:
    fresh, count = bool(cache.batch_plan.get(trial.FRESH)), len(plan.index)
    together = None
    if count > 1 and cache.batch_plan.get("padded", True) and not fresh:
        together = trial.layers_of(plan, encoder, range(count), fresh=False)
    pool = provenance.pool_of(cache.provenance)
    pooling = None if pool == DEFAULT_POOL else pooled(plan.index, pool)
    share = max(ROUNDING[plan.config.compute_dtype], ROUNDING[plan.config.weights_dtype])
    measured, by_padding = [], np.zeros(1, dtype=np.float32)
    for i, position in enumerate(positions.tolist()):
        cache.check(position)
        T = int(plan.index.n_tokens[i])
        alone = _Text(sequence=i, row=0, tokens=T, pooling=pooling)
        exact, rounded = _as_stored(cache, trial.layers_of(plan, encoder, [i], fresh=fresh), alone)
        beside = exact if together is None else _as_stored(cache, together, replace(alone, row=i))[0]
        size = _measured(exact)
        # The longest of them has no padding here, but had some in its batch if that had a longer sequence.
        by_padding = np.maximum(by_padding, _measured(beside - exact) / np.maximum(size, TINY))
        moved = _measured(cache.states(position).astype(np.float32) - exact)
        measured.append((T, moved, size, _measured(rounded - exact)))
    result = []
    for i, (T, moved, size, by_dtype) in enumerate(measured):
        allowed = share * size + 2 * by_dtype + 2 * by_padding * size
        shares = moved / np.maximum(allowed, TINY)
        worst = np.unravel_index(np.argmax(shares), shares.shape)  # nan counts as the largest
        result.append(
            Canary(
                id=plan.index.ids[i].decode("utf-8"),
                tokens=T,
                layer=None if cache.fusion is not None else cache.layers[worst[1]],
                measure=list(MEASURES)[worst[0]],
                difference=float(moved[worst]),
                allowed=float(allowed[worst]),
            )
        )
    return result


def _measured(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """(measures, L) of (L, T, D)."""
    return np.array([measure(states) for measure in MEASURES.values()], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """One sequence of a batch."""

    sequence: int
    """Its position in the plan."""
    row: int
    """Its row in the batch."""
    tokens: int
    pooling: Pooling | None
    """How the cache pools the sequences of the plan."""


def _as_stored(
    cache: FeatureCache, layers: tuple[torch.Tensor, ...], text: _Text
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the cache stores of one sequence of a batch, without and with the rounding of its dtypes: (L, T, D) each."""
    fusion = None
    if cache.fusion is not None:
        fusion = Fusion(name="stored", layers=tuple(cache.fusion["layers"]), trainable=False)
    numbers = cache.layers if fusion is None else fusion.layers
    exact = np.stack([layers[number][text.row, : text.tokens].float().cpu().numpy() for number in numbers])
    if text.pooling is not None:
        exact = text.pooling.mean(text.sequence, exact)
    before = cache.provenance.get("recorded", {}).get("converted_from")
    rounded = exact
    if before is not None or fusion is not None:  # it was made from a cache that had rounded each layer
        rounded = _rounded(exact, before or cache.dtype)
    if fusion is not None:
        exact, rounded = fusion.apply(exact)[None], fusion.apply(rounded)[None]
    rounded = _rounded(rounded, cache.dtype)
    return exact, np.where(np.isfinite(rounded), rounded, exact)  # a state beyond the dtype is not stored


def _rounded(states: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """(L, T, D) as this dtype stores them."""
    stored = DTYPES[dtype]
    read = stored.decode(*stored.encode(states.reshape(-1, states.shape[-1])))
    return read.astype(np.float32).reshape(states.shape)
