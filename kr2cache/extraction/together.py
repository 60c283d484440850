"""One extraction by several workers: a driver that plans, starts them and shows their progress."""

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
from kr2cache.workers import run_workers


@dataclass(frozen=True)
class Share:
    """What every worker of an extraction gets: all of them the same."""

    plan: ExtractPlan
    folder: Path
    """The cache, as the driver's model names it."""
    fingerprint: str


class Filled(NamedTuple):
    """What one process did to fill a cache."""

    computed: int = 0
    """Sequences that the model ran on."""
    taken_over: int = 0
    """Sequences that were copied from older caches."""


def fill_with_workers(share: Share, work: Callable[[Share], Filled]) -> Filled:
    """Let workers make the cache or complete it. The first to come makes the shards.

    Args:
        share: What they work on.
        work: What each of them does; see ``run_workers``.

    Returns:
        What all of them did together, without those that died.

    Raises:
        InterruptedWorkError: On Ctrl-C.
        KR2CacheError: What a worker raised.
    """
    config, marks = share.plan.config, _Marks(share)
    complete = marks.complete_count()
    with WorkProgress(f"{share.plan.spec.name} on {config.task}/{config.split}", "sequences") as progress:
        progress.total = len(share.plan.index) - complete

        def watch() -> None:
            nonlocal complete
            now = marks.complete_count()
            progress.advance(now - complete, count_text(config.workers, "worker"))
            complete = now

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
            raise interrupted(share.folder, marks.complete_count(), len(share.plan.index)) from None
    FeatureCache.open(share.folder)  # another program's file may lie there
    return Filled(sum(part.computed for part in parts), sum(part.taken_over for part in parts))


def interrupted(folder: Path, complete: int, sequences: int) -> InterruptedWorkError:
    """The error on Ctrl-C."""
    return InterruptedWorkError(
        f"Interrupted. {complete:,} of {count_text(sequences, 'sequence')} are complete, kept in {folder}.",
        "Run the same command again to continue.",
    )


class _Marks:
    """How many sequences are complete on disk, also before the shards are made."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._shards: SharedShards | None = None

    def complete_count(self) -> int:
        if self._shards is None:
            share = self._share
            header = existing_header(share.folder, share.fingerprint)
            if header is None:
                return 0
            self._shards = SharedShards(share.folder, header, share.plan.index)
        return self._shards.complete_count()
