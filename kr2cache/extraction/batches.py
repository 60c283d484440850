"""Run the model over the planned batches, and hand their states to the writer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.writer import CacheWriter
from kr2cache.errors import DeviceMemoryError, InterruptedWorkError, ValueRangeError
from kr2cache.extraction import budget, trial
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.load import not_finite
from kr2cache.system.allocator import return_free_memory
from kr2cache.system.console import WorkProgress, bytes_text, count_text, note
from kr2cache.system.device import freeing, is_out_of_memory
from kr2cache.system.interrupt import interrupt_between_batches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RETURN_MEMORY_EVERY_S = 10.0
"""Without this, the memory of 5,000 sentences grew from batch to batch."""


def run_batches(
    plan: ExtractPlan,
    encoder: PreTrainedModel,
    folder: Path,
    batch_plan: dict[str, Any],
    planned: NDArray[np.bool_],
) -> int:
    """Compute and write every planned batch that has an incomplete sequence.

    Args:
        plan: The extraction.
        encoder: On its device.
        folder: The cache; its shards exist.
        batch_plan: As its header records it.
        planned: (n,) the sequences that the batch plan is for.

    Returns:
        How many sequences ran.

    Raises:
        DeviceMemoryError: If a batch does not fit into the device's memory.
        InterruptedWorkError: On Ctrl-C.
        ValueRangeError: If the stored dtype cannot hold a state. Complete sequences are kept, as with every error.
    """
    pack = Packer(plan.index, plan.layers, plan.config.dtype, encoder.device)
    most = plan.config.tokens_per_batch
    computed = 0
    with WorkProgress(f"{plan.spec.name} on {plan.config.task}/{plan.config.split}", "sequences") as progress:
        try:
            with (
                interrupt_between_batches() as check_interrupt,
                # The size of the whole plan decides, so that a continued extraction computes in the same way.
                cheaper_forward(encoder, plan.tokens if plan.config.compute_dtype == "float32" else 0),
                CacheWriter(folder) as writer,
            ):
                batches = list(_unfinished_batches(plan.index.n_tokens, writer, batch_plan, planned, most))
                progress.total = sum(map(len, batches))
                started, tokens, speed = time.monotonic(), 0, 0.0
                for batch in batches:
                    with _fitting(plan, batch, encoder.device, folder):
                        for ready in pack(batch, trial.layers_of(plan, encoder, batch)):
                            writer.write(ready)
                    check_interrupt()
                    return_free_memory(RETURN_MEMORY_EVERY_S)
                    computed += len(batch)
                    tokens += int(plan.index.n_tokens[batch].sum())
                    speed = tokens / (time.monotonic() - started)
                    progress.advance(len(batch), f"{speed:,.0f} tokens/s, {bytes_text(writer.bytes_written)} written")
                for ready in pack.flush():
                    writer.write(ready)
            progress.advance(0, f"{speed:,.0f} tokens/s, {bytes_text(writer.bytes_written)} written")
        except KeyboardInterrupt:
            raise _interrupted(folder) from None
        except ValueRangeError as error:
            raise _by_weights(error, encoder, plan.spec.name) from None
    return computed


def _unfinished_batches(
    n_tokens: NDArray[np.int32],
    writer: CacheWriter,
    batch_plan: dict[str, Any],
    planned: NDArray[np.bool_],
    most: int | None,
) -> Iterator[NDArray[np.intp]]:
    """Each planned batch that has an incomplete sequence: (B,) sequences of one shard. The whole batch runs again,
    because the last bits of a state depend on the batch it runs in.

    Args:
        n_tokens: (n,)
        writer: Knows where shards begin and which sequences are incomplete.
        batch_plan: As the header records it.
        planned: (n,) the sequences that the batch plan is for. Other sequences should have come from older caches; if
            they are incomplete all the same, they get batches of their own.
        most: At most this many positions in a batch, as the user asks. Planned batches with more are split.
    """
    positions, padded = int(batch_plan["tokens_per_batch"]), bool(batch_plan["padded"])
    if most is not None and most < positions:
        note(
            f"From here on, batches have {most:,} positions instead of the planned {positions:,}: the last bits of "
            "these states can differ from those of an uninterrupted run."
        )
    for start, stop in pairwise(writer.boundaries.tolist()):
        incomplete, in_plan = writer.unfinished[start:stop], planned[start:stop]
        for members in (np.flatnonzero(in_plan), np.flatnonzero(incomplete & ~in_plan)):
            for batch in length_sorted_batches(n_tokens[start + members], positions, padded=padded):
                whole = members[batch] + start
                for part in budget.split_further(whole, n_tokens, min(positions, most or positions)):
                    if incomplete[part - start].any():
                        yield part


@contextlib.contextmanager
def _fitting(plan: ExtractPlan, batch: NDArray[np.intp], device: torch.device, folder: Path) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the batch and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        longest = int(plan.index.n_tokens[batch].max())
        less = max(longest, len(batch) * longest // 2)
        smaller = f", or continue with smaller batches: --tokens-per-batch {less}" if len(batch) > 1 else ""
        raise DeviceMemoryError(
            f"{device} ran out of memory at a batch of {count_text(len(batch), 'sequence')} of up to {longest:,} "
            f"tokens, the first of them {plan.index.ids[batch[0]].decode('utf-8')!r}. Complete sequences are kept in "
            f"{folder}.",
            f"{freeing(device)} and run the same command again{smaller}.",
        ) from None


def _interrupted(folder: Path) -> InterruptedWorkError:
    cache = FeatureCache.open(folder)
    return InterruptedWorkError(
        f"Interrupted. {len(cache):,} of {count_text(len(cache.n_tokens), 'sequence')} are complete, kept in {folder}.",
        "Run the same command again to continue.",
    )


def _by_weights(error: ValueRangeError, encoder: PreTrainedModel, name: str) -> ValueRangeError:
    """``error``, or one that names the cause if weights of the model are not finite either."""
    damaged = not_finite(encoder)
    if not damaged:
        return error
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return ValueRangeError(
        f"{error.message} The checkpoint of {name!r} holds numbers that are not finite (nan or inf), in {damaged[0]}"
        f"{more}.",
        "Get an undamaged copy of its weights; no --dtype helps. Complete sequences are kept.",
    )
