"""How long would an extraction take? A few of its batches run; nothing is written.

The time of a position depends on the length of its sequence: attention looks at all pairs of tokens. So the longest, a
middle and the shortest batch run. What a position takes in the other batches lies between.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import CacheError
from kr2cache.extraction import trial
from kr2cache.extraction.batches import fitting
from kr2cache.extraction.extract import place_of, plan_shards
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.load import load_config
from kr2cache.models.stack import check_room, find_stack
from kr2cache.models.states import device_of
from kr2cache.store import folders, provenance
from kr2cache.store.takeover import as_mask
from kr2cache.system.console import bytes_text, console, count_text, note, seconds_text, waiting
from kr2cache.system.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEAT_S = 0.3
"""A batch runs again and again for about so many seconds, but at least twice and at most ``MOST_REPEATS`` times."""
MOST_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an extraction still has to do, and how long this takes in one process."""

    complete: int
    """Sequences that the cache holds already."""
    taken_over: int
    """Sequences that older caches hold."""
    computed: int
    """Sequences that the model has to run for."""
    tokens: int
    """Tokens of these sequences."""
    bytes: int
    """Bytes of the states of these sequences."""
    forward_seconds: float
    """Time of the forward passes, their states packed."""
    seconds: float
    """Time in all: also loading the model and trying it. Copying states and a slow disk are not counted."""

    @property
    def tokens_per_second(self) -> float | None:
        """None if nothing is to run."""
        return self.tokens / self.forward_seconds if self.tokens else None

    def json(self) -> dict[str, Any]:
        """The fields that ``--dry-run --json`` adds."""
        return {
            "complete": self.complete,
            "taken_over": self.taken_over,
            "to_compute": self.computed,
            "tokens_per_second": self.tokens_per_second,
            "estimated_seconds": self.seconds,
        }


def estimate(plan: ExtractPlan) -> Estimate:
    """Load the model, find older caches, and run three batches. Nothing is loaded if the cache is complete.

    Raises:
        KR2CacheError: The errors of an extraction that come before its first batch: a model that cannot serve, too
            little memory, a begun cache that does not agree with its model.
    """
    if (complete := _complete_cache(plan)) is not None:
        note(f"{complete} is complete. The weights of {plan.spec.name} were not read to compare them.")
        return Estimate(
            complete=len(plan.index), taken_over=0, computed=0, tokens=0, bytes=0, forward_seconds=0.0, seconds=0.0
        )
    if plan.config.device_map is None:  # else the weights may lie on GPUs
        check_room(plan.spec, find_stack(plan.spec, load_config(plan.spec)), plan.config.weights_dtype, free_memory())
    started = time.monotonic()
    with waiting(f"Loading {plan.spec.name}"):
        model = trial.open_resource(plan)
    folder, found, fingerprint = place_of(plan, model.digests)
    with waiting(f"Trying {plan.spec.name}"):
        header, donors = plan_shards(plan, model, folder, found, fingerprint)
    prepared = time.monotonic() - started
    there = np.zeros(len(plan.index), dtype=bool)
    with contextlib.suppress(CacheError):  # there is none, or a shard is missing
        there = FeatureCache.open(folder).complete
    planned = as_mask(header.batch_plan.get("computed"), len(plan.index))
    copied = ~planned & ~there if donors is None else donors.covered
    members = np.flatnonzero(planned & ~there)
    positions, padded = int(header.batch_plan["tokens_per_batch"]), bool(header.batch_plan["padded"])
    positions = min(positions, plan.config.tokens_per_batch or positions)
    batches = [members[one] for one in length_sorted_batches(plan.index.n_tokens[members], positions, padded=padded)]
    seconds = 0.0
    if batches:
        with waiting("Measuring three batches"):
            seconds = _forward_seconds(plan, model.encoder, batches, fresh=bool(header.batch_plan.get(trial.FRESH)))
    return Estimate(
        complete=int(there.sum()),
        taken_over=int(copied.sum()),
        computed=len(members),
        tokens=int(plan.index.n_tokens[members].sum()),
        bytes=int(plan.stored.n_tokens[members].sum(dtype=np.int64)) * plan.token_bytes,
        forward_seconds=seconds,
        seconds=prepared + seconds if batches or copied.any() else 0.0,
    )


def _complete_cache(plan: ExtractPlan) -> Path | None:
    """A complete cache of these settings and sequences, of a model of this name; None if there is none."""
    config = plan.config
    for folder in folders.matching(config.cache_dir, task=config.task, split=config.split, name=plan.spec.name):
        with contextlib.suppress(CacheError):
            cache = FeatureCache.open(folder)
            made = provenance.found_of(cache.provenance, folder)
            found = provenance.found(plan.stored, made.weights, made.config, plan.template)
            if cache.complete.all() and cache.fingerprint == provenance.fingerprint(plan.chosen, found):
                return folder
    return None


def _forward_seconds(
    plan: ExtractPlan, encoder: PreTrainedModel, batches: list[NDArray[np.intp]], *, fresh: bool
) -> float:
    """Seconds for all batches, from those that ran.

    Args:
        batches: Longest sequences first.
        fresh: Whether each batch runs in the model as it was loaded.
    """
    device = trial.move_to_device(plan, encoder)
    pack = Packer(plan.index, plan.layers, plan.config.dtype, device_of(encoder), plan.pooling)

    def seconds(batch: NDArray[np.intp], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):  # on a GPU, one batch is copied while the next one computes
            for _ready in pack(batch, trial.layers_of(plan, encoder, batch, fresh=fresh)):
                pass
        for _ready in pack.flush():
            pass
        return time.perf_counter() - started

    lengths = np.array([int(plan.index.n_tokens[batch[0]]) for batch in batches])
    sizes = lengths * np.array([len(batch) for batch in batches])
    # The last batch may be small, and then says little about the others.
    last = len(batches) - 1 if len(batches) == 1 or 2 * sizes[-1] > sizes[-2] else len(batches) - 2
    rates = {}
    with cheaper_forward(encoder, plan.tokens if plan.config.compute_dtype == "float32" else 0):
        for number in sorted({0, last // 2, last}):
            with fitting(plan, batches[number], device, plan.config.cache_dir):
                seconds(batches[number], 1)  # the first run of a shape allocates memory
                once = seconds(batches[number], 1)
                times = min(MOST_REPEATS, max(2, int(REPEAT_S / max(once, 1e-9))))
                rates[int(lengths[number])] = seconds(batches[number], times) / times / sizes[number]
    known = sorted(rates)
    return float((sizes * np.interp(lengths, known, [rates[length] for length in known])).sum())


def describe_estimate(found: Estimate) -> None:
    """Show what is there, and how long the rest takes."""
    total = found.complete + found.taken_over + found.computed
    held = [f"{found.complete:,} are complete in this cache"] if found.complete else []
    held += [f"{found.taken_over:,} can be copied from older caches"] if found.taken_over else []
    if held:
        console.print(f"Of {count_text(total, 'sequence')}, {' and '.join(held)}.", soft_wrap=True)
    if (speed := found.tokens_per_second) is None:
        console.print("The model has to run for none.")
        return
    console.print(
        f"{count_text(found.computed, 'sequence')} to compute: about {speed:,.0f} tokens a second, so about "
        f"{seconds_text(found.seconds)} in one process, if the disk takes "
        f"{bytes_text(found.bytes / max(found.forward_seconds, 1e-9))} a second.",
        soft_wrap=True,
    )
