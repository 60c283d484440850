"""Run the model over the planned batches of a shard, and hand their states to the writer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.writer import ShardWriter
from kr2cache.errors import DeviceMemoryError
from kr2cache.extraction import budget, trial
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.states import device_of
from kr2cache.system.allocator import return_free_memory
from kr2cache.system.console import WorkProgress, bytes_text, count_text, note
from kr2cache.system.device import freeing, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RETURN_MEMORY_EVERY_S = 10.0
"""Without this, the memory of 5,000 sentences grew from batch to batch."""


class BatchRunner:
    """Runs the model over the planned batches of one shard after the other. ``with`` prepares the model."""

    def __init__(
        self,
        plan: ExtractPlan,
        encoder: PreTrainedModel,
        batch_plan: dict[str, Any],
        planned: NDArray[np.bool_],
        progress: WorkProgress,
    ) -> None:
        """
        Args:
            plan: The extraction.
            encoder: On its device.
            batch_plan: As the header of the cache records it.
            planned: (n,) the sequences that the batch plan is for.
            progress: Advances by every sequence that runs.
        """
        self.plan = plan
        self.encoder = encoder
        self.batch_plan = batch_plan
        self.planned = planned
        self.progress = progress
        self._pack = Packer(plan.index, plan.layers, plan.config.dtype, device_of(encoder), plan.pooling)
        self.computed = 0
        """How many sequences ran, in all shards; also those of a shard that another process took over."""
        self._tokens, self._seconds, self._bytes = 0, 0.0, 0
        # The size of the whole plan decides, so that a continued extraction computes in the same way.
        positions = plan.tokens if plan.config.compute_dtype == "float32" else 0
        self._cheaper = cheaper_forward(encoder, positions)

    def __enter__(self) -> Self:
        self._cheaper.__enter__()
        most, positions = self.plan.config.tokens_per_batch, int(self.batch_plan["tokens_per_batch"])
        if most is not None and most < positions:
            note(
                f"From here on, batches have {most:,} positions instead of the planned {positions:,}: the last bits of "
                "these states can differ from those of an uninterrupted run."
            )
        return self

    def __exit__(self, *error: Any) -> None:
        self._cheaper.__exit__(*error)

    def run(self, writer: ShardWriter, check: Callable[[], None]) -> None:
        """Compute and write every planned batch of a shard that has an incomplete sequence.

        Args:
            writer: Of the shard.
            check: Called after every batch; it may raise.

        Raises:
            DeviceMemoryError: If a batch does not fit into the device's memory.
        """
        plan, started = self.plan, time.monotonic()
        fresh = bool(self.batch_plan.get(trial.FRESH))
        try:
            for batch in self._unfinished_batches(writer):
                with fitting(plan, batch, device_of(self.encoder), writer.shard.path.parent):
                    for ready in self._pack(batch, trial.layers_of(plan, self.encoder, batch, fresh=fresh)):
                        writer.write(ready)
                self.computed += len(batch)
                check()
                return_free_memory(RETURN_MEMORY_EVERY_S)
                self._tokens += int(plan.index.n_tokens[batch].sum())
                seconds = time.monotonic() - started
                self.progress.advance(len(batch), self._speed(seconds, writer.bytes_written))
            for ready in self._pack.flush():
                writer.write(ready)
        finally:
            for _ in self._pack.flush():  # after an error: the next shard must not get a batch of this one
                pass
            self._seconds += time.monotonic() - started

    def show_written(self, writer: ShardWriter) -> None:
        """Show what the shard took, once its writer is done."""
        self._bytes += writer.bytes_written
        self.progress.advance(0, self._speed())

    def _speed(self, seconds: float = 0.0, written: int = 0) -> str:
        """The speed over all shards so far. ``seconds`` and ``written`` are what the current shard has taken."""
        speed = self._tokens / max(1e-9, self._seconds + seconds)
        return f"{speed:,.0f} tokens/s, {bytes_text(self._bytes + written)} written"

    def _unfinished_batches(self, writer: ShardWriter) -> Iterator[NDArray[np.intp]]:
        """Each planned batch of the shard that has an incomplete sequence: (B,) positions in the cache. The whole batch
        runs again, because the last bits of a state depend on the batch it runs in.

        Sequences that the batch plan is not for should have come from older caches. If they are incomplete all the
        same, they get batches of their own. Planned batches larger than the user now allows are split.
        """
        n_tokens, start = self.plan.index.n_tokens, writer.first
        positions, padded = int(self.batch_plan["tokens_per_batch"]), bool(self.batch_plan["padded"])
        most = min(positions, self.plan.config.tokens_per_batch or positions)
        in_plan = self.planned[start : start + len(writer.unfinished)]
        for members in (np.flatnonzero(in_plan), np.flatnonzero(writer.unfinished & ~in_plan)):
            for batch in length_sorted_batches(n_tokens[start + members], positions, padded=padded):
                for part in budget.split_further(members[batch] + start, n_tokens, most):
                    if writer.unfinished[part - start].any():
                        yield part


@contextlib.contextmanager
def fitting(plan: ExtractPlan, batch: NDArray[np.intp], device: torch.device, folder: Path) -> Iterator[None]:
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
