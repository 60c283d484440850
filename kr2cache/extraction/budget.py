"""How many positions run through the model at once: a number for the device, halved until the largest batches fit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.errors import DeviceMemoryError
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.encode import length_sorted_batches
from kr2cache.system.console import note
from kr2cache.system.device import choose_device, drop_unused_memory, is_out_of_memory, memory_advice

if TYPE_CHECKING:
    import torch

TOKENS_PER_BATCH = {"cpu": 1_024, "cuda": 16_384, "mps": 4_096}
"""Positions in one forward pass, by device. On 2 CPU cores 1,024 ran 8 to 15 % faster than 4,096 to 8,192."""

MOST_SHARD_BYTES = 16 * 2**30
LEAST_SHARD_BYTES = 32 * 2**20
BATCHES_IN_SHARD = 4
SHARDS_EACH = 8
"""So many shards for each process: at the end, one waits for an eighth of its own work at most."""

Run = Callable[[NDArray[np.intp]], "tuple[torch.Tensor, ...]"]
"""Sequence numbers to the layers of their batch, each (B, T, D)."""


def suiting(plan: ExtractPlan, device: torch.device) -> int:
    """Positions per batch: as the user asks, or the number for the device."""
    return plan.config.tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cpu"])


def too_long(plan: ExtractPlan, device: torch.device, *advice: str) -> DeviceMemoryError:
    """The error if not even the longest sequence fits into the device's memory.

    Args:
        advice: As for ``memory_advice``.
    """
    return DeviceMemoryError(
        f"The longest sequence, {int(plan.index.n_tokens.max()):,} tokens, does not fit into the memory of {device} "
        f"together with {plan.spec.name}.",
        memory_advice(device, *advice),
    )


def plan_batches(plan: ExtractPlan, run: Run, *, padded: bool) -> dict[str, Any]:
    """The batch plan of a new cache, as its header records it.

    Args:
        plan: The extraction.
        run: Runs the model on a batch.
        padded: Whether batches may be padded.
    """
    device = choose_device(plan.config.device)
    # No trial on a CPU: its batches are small, and a lack of memory would kill the process instead of raising an error.
    positions = suiting(plan, device) if device.type == "cpu" else that_fits(plan, run, device, padded=padded)
    return {
        "order": "longest first",
        "padded": padded,
        "tokens_per_batch": positions,
        "shard_bytes": shard_bytes(plan, positions),
    }


def shard_bytes(plan: ExtractPlan, positions: int) -> int:
    """The largest size of a shard's states: as the user asks, or 16 GiB, or less so that every process that is expected
    gets several shards, and none waits long for the last one.

    Args:
        plan: The extraction.
        positions: In one batch. A shard has room for several batches.
    """
    if plan.config.shard_gb is not None:
        return int(plan.config.shard_gb * 2**30)
    processes = plan.config.workers if plan.config.workers > 1 else started_by_slurm()
    if processes == 1:
        return MOST_SHARD_BYTES
    least = max(LEAST_SHARD_BYTES, BATCHES_IN_SHARD * positions * plan.token_bytes)
    share = -(-plan.state_bytes // (processes * SHARDS_EACH))
    return min(MOST_SHARD_BYTES, max(least, share))


def started_by_slurm() -> int:
    """How many processes of a SLURM job or job array run this command: ``srun`` starts one for each task."""
    counts = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_ARRAY_TASK_COUNT")]
    return math.prod(max(1, int(count)) for count in counts if count.isdecimal())


def that_fits(plan: ExtractPlan, run: Run, device: torch.device, *, padded: bool) -> int:
    """The largest number of positions that fits into the device's memory: ``suiting``, halved as often as necessary.

    It runs the two batches that need most memory, as an extraction does: the one with the longest sequences (attention
    grows with the square of their length), and the one with most positions.

    Raises:
        DeviceMemoryError: If not even the longest sequence alone fits.
    """
    wanted = budget = suiting(plan, device)
    longest = int(plan.index.n_tokens.max())
    while True:
        batches = length_sorted_batches(plan.index.n_tokens, budget, padded=padded)
        positions = [len(batch) * int(plan.index.n_tokens[batch[0]]) for batch in batches]
        largest = {0, int(np.argmax(positions))}
        if all(_fits(plan, run, device, batches[number]) for number in sorted(largest)):
            break
        if len(batches[0]) == 1 and max(positions) <= longest:
            raise too_long(plan, device, "give a smaller --max-length")
        budget = min(budget, max(positions)) // 2
    if budget < wanted:
        note(
            f"Batches of {wanted:,} positions do not fit into the memory of {device}: now they have {budget:,} "
            "(--tokens-per-batch)."
        )
    return budget


def _fits(plan: ExtractPlan, run: Run, device: torch.device, batch: NDArray[np.intp]) -> bool:
    pack = Packer(plan.index, plan.layers, plan.config.dtype, device, plan.pooling)
    try:
        for _ in range(2):  # one batch is copied out while the next one computes
            for _ready in pack(batch, run(batch)):
                pass
        for _ready in pack.flush():
            pass
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    drop_unused_memory()
    return False


def split_further(batch: NDArray[np.intp], n_tokens: NDArray[np.int32], most: int) -> list[NDArray[np.intp]]:
    """Split a planned batch into batches of at most ``most`` positions, padding included."""
    size = max(1, most // int(n_tokens[batch].max()))
    return [batch[start : start + size] for start in range(0, len(batch), size)]
