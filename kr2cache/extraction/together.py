"""One extraction by several workers. This process, the driver, starts the workers and shows their progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import InterruptedWorkError
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.store.sharing import SharedShards, existing_header
from kr2cache.system.console import WorkProgress, count_text
from kr2cache.system.interrupt import cause
from kr2cache.workers import run_workers


@dataclass(frozen=True)
class Share:
    """What the driver sends to the workers of an extraction. All of them get the same."""

    plan: ExtractPlan
    folder: Path
    """The folder of the cache; the driver's model decides its name."""
    fingerprint: str


class Filled(NamedTuple):
    """What one process did to fill a cache."""

    computed: int = 0
    """Sequences that the model ran on."""
    taken_over: int = 0
    """Sequences that were copied from older caches."""


def fill_with_workers(share: Share, work: Callable[[Share], Filled]) -> Filled:
    """Let workers make the cache or complete it. The first worker that is ready makes the shards.

    Args:
        share: What the workers get.
        work: What each worker does; see ``run_workers``.

    Returns:
        The sums over all workers that came to their end; a worker that died is not counted.

    Raises:
        InterruptedWorkError: On Ctrl-C.
        KR2CacheError: What a worker raised.
    """
    config, progress_on_disk = share.plan.config, _CompleteOnDisk(share)
    complete = progress_on_disk.count()
    with WorkProgress(f"{share.plan.spec.name} on {config.task}/{config.split}", "sequences") as progress:
        progress.total = len(share.plan.index) - complete

        def watch() -> int:
            nonlocal complete
            now = progress_on_disk.count()
            progress.advance(now - complete, count_text(config.workers, "worker"))
            complete = now
            return 0  # a batch that kills its workers is tried by every new worker: count the losses of the whole run

        try:
            parts = run_workers(
                config.engine,
                config.workers,
                work,
                share,
                watch=watch,
                gpus_per_worker=0 if config.device == "cpu" else config.gpus_per_worker,
            )
        except KeyboardInterrupt:
            raise interrupted(share.folder, progress_on_disk.count(), len(share.plan.index)) from None
    FeatureCache.open(share.folder)  # an error if another program put a file there
    return Filled(sum(part.computed for part in parts), sum(part.taken_over for part in parts))


def interrupted(folder: Path, complete: int, sequences: int) -> InterruptedWorkError:
    """The error that is raised on Ctrl-C."""
    return InterruptedWorkError(
        f"{cause()}. {complete:,} of {count_text(sequences, 'sequence')} are complete, kept in {folder}.",
        "Run the same command again to continue.",
    )


class _CompleteOnDisk:
    """Counts the complete sequences on disk. Before the shards exist, the count is 0."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._shards: SharedShards | None = None

    def count(self) -> int:
        if self._shards is None:
            share = self._share
            header = existing_header(share.folder, share.fingerprint)
            if header is None:
                return 0
            self._shards = SharedShards(share.folder, header, share.plan.stored)
        return self._shards.complete_count()
