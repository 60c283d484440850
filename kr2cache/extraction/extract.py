"""Stage one: run a frozen model once over a split and store the hidden states of its layers.

Texts are tokenised first, so every size is known before the first forward pass. The batch plan depends only on lengths
and a budget, and the cache records it. So an interrupted extraction continues with the same batches and gives the same
bytes.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.create import ShardPart
from kr2cache.cache.format import ShardHeader, ranges
from kr2cache.cache.parts import one_shard
from kr2cache.cache.reader import FeatureCache
from kr2cache.config import ExtractConfig
from kr2cache.errors import CacheError, CacheMismatchError, CacheVersionError, DeviceMemoryError, ValueRangeError
from kr2cache.extraction import budget, canaries, trial
from kr2cache.extraction.batches import BatchRunner
from kr2cache.extraction.planning import ExtractPlan, check_disk, plan_extraction
from kr2cache.extraction.together import Filled, Share, fill_with_workers, interrupted
from kr2cache.models import registry
from kr2cache.models.digests import Digests, OpenedModel
from kr2cache.models.stack import describe_dropped
from kr2cache.models.states import device_of
from kr2cache.store import folders, plans, provenance
from kr2cache.store.sharing import CACHE, SharedShards, existing_header
from kr2cache.store.takeover import Donors, OlderCaches, Usable, as_mask, find_donors
from kr2cache.system.allocator import return_free_memory
from kr2cache.system.claims import claimed
from kr2cache.system.console import WorkProgress, bytes_text, count_text, done, note, seconds_text, waiting
from kr2cache.system.device import device_name, drop_unused_memory
from kr2cache.system.disk import check_writable
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.system.process import process_unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did."""

    cache: Path
    sequences: int
    tokens: int
    bytes: int
    seconds: float
    computed: int
    """Sequences that the model ran on now."""
    taken_over: int
    """Sequences that were copied from older caches."""

    def json(self) -> dict[str, Any]:
        """The fields that the command line shows with ``--json``."""
        fields = {name: value for name, value in asdict(self).items() if name != "taken_over"}
        return {**fields, "cache": str(self.cache)}


@process_unchanged()
def extract(settings: ExtractConfig | ExtractPlan, model: OpenedModel | None = None) -> ExtractResult:
    """Make the cache, or complete it if an extraction was interrupted or a shard is damaged. A complete cache is not
    changed. States that older caches of the same split hold are copied from there.

    Args:
        settings: The settings. Or the plan that ``plan_extraction`` made from them, if the caller has it already.
        model: The opened resource, if the caller has opened it already.

    Raises:
        DiskSpaceError: Before the model is loaded, if the disk cannot hold the cache.
        DeviceMemoryError: If the model or a batch does not fit into the device's memory.
        InterruptedWorkError: On Ctrl-C.
        ValueRangeError: If the stored dtype cannot hold a state. Complete sequences are kept, as with every error.
        WorkerLostError: If too many workers die.
    """
    started = time.monotonic()
    plan = settings if isinstance(settings, ExtractPlan) else plan_extraction(settings)
    check_disk(plan)
    if model is None:
        with waiting(f"Loading {plan.spec.name}"):
            model = trial.open_resource(plan)
    if model.part:
        note(f"{plan.spec.name}: only its {model.part} is used.")
    if dropped := describe_dropped(plan.spec, model.dropped):
        note(f"{dropped}.")
    folder, found, fingerprint = place_of(plan, model.digests)
    config, filled = plan.config, Filled()
    if not _is_finished(folder, fingerprint):
        check_writable(folder.parent, "--cache-dir")
        if config.engine == "local" and config.workers == 1:
            shards, donors = _make_shards(plan, model, folder, found, fingerprint)
            filled = fill_shards(plan, model.encoder, shards, donors)
        else:
            del model  # each worker loads its own, and with a device map it may be on a GPU
            drop_unused_memory()
            return_free_memory(0.0)
            filled = fill_with_workers(Share(plan, folder, fingerprint), _work)
    return ExtractResult(
        cache=folder,
        sequences=len(plan.index),
        tokens=plan.tokens,
        bytes=sum(path.stat().st_size for path in folder.glob("*.h5")),
        seconds=time.monotonic() - started,
        computed=filled.computed,
        taken_over=filled.taken_over,
    )


def place_of(plan: ExtractPlan, digests: Digests) -> tuple[Path, provenance.Found, str]:
    """The folder of the cache, what it is made from, and its fingerprint.

    Args:
        digests: Of the model.
    """
    found = provenance.found(plan.stored, digests.weights, digests.config, plan.template)
    fingerprint, config = provenance.fingerprint(plan.chosen, found), plan.config
    folder = folders.cache_folder(config.cache_dir, config.task, config.split, plan.spec.name, fingerprint)
    return folder, found, fingerprint


def _work(share: Share) -> Filled:
    """What one worker does: fill shards until none is left.

    Raises:
        CacheMismatchError: If this worker's model differs from the driver's.
    """
    plan, folder, fingerprint = share.plan, share.folder, share.fingerprint
    if _is_finished(folder, fingerprint):  # nothing is left for a worker that started late
        return Filled()
    model = trial.open_resource(plan)
    _, found, own = place_of(plan, model.digests)
    if own != fingerprint:
        raise CacheMismatchError(
            f"The model {plan.spec.name} of the worker on {platform.node()} differs from the one on the machine where "
            "the command was started: other weights or another configuration.",
            "Give all machines the same files of the model, and the same version of transformers.",
        )
    shards, donors = _make_shards(plan, model, folder, found, fingerprint)
    return fill_shards(plan, model.encoder, shards, donors)


def _make_shards(
    plan: ExtractPlan, model: OpenedModel, folder: Path, found: provenance.Found, fingerprint: str
) -> tuple[SharedShards, Donors | None]:
    """Look what there is, and make the shards that are missing.

    Returns:
        The shards, and the older caches (None if they were not searched for).
    """
    with claimed(folder, CACHE) as claim:
        header, donors = plan_shards(plan, model, folder, found, fingerprint)
        shards = SharedShards(folder, header, plan.stored)
        for unfinished in folder.glob("*.partial"):  # earlier versions of kr2cache left unfinished shards here
            unfinished.unlink()
        shards.create(claim.folder)
    if plan.recorded:
        plans.forget(plan.config.cache_dir, plan.config.task, plan.config.split, plan.recorded[plans.FIELD]["key"])
    return shards, donors


def plan_shards(
    plan: ExtractPlan, model: OpenedModel, folder: Path, found: provenance.Found, fingerprint: str
) -> tuple[ShardHeader, Donors | None]:
    """Check the model, plan the batches, and find older caches to copy from. If another process has made shards
    already, their batch plan is used. Nothing is written.

    Returns:
        The header of the cache, and the older caches (None if they were not searched for).
    """
    header = existing_header(folder, fingerprint)
    if header is not None:
        _note_shard_size(plan.config.shard_gb, header)
        _check_begun(plan, model.encoder, folder, header)
        return header, None
    tried = plan.trial or trial.check_states(plan, model.encoder)
    batch_plan = budget.plan_batches(
        plan, lambda batch: trial.layers_of(plan, model.encoder, batch, fresh=tried.fresh), padded=tried.padded
    )
    if tried.fresh:
        batch_plan[trial.FRESH] = True
    header = _new_header(plan, model, found, fingerprint, batch_plan, tried.last_is_output)
    donors = find_donors(plan.config.cache_dir, folder, header, plan.stored, _agreeing(plan, model.encoder))
    if donors.covered.any():
        # Record for which sequences the model runs: a continued extraction has to form the same batches.
        computed = ranges(np.flatnonzero(~donors.covered).tolist())
        header = replace(header, batch_plan={**batch_plan, "computed": computed})
    return header, donors


def tried(plan: ExtractPlan, model: OpenedModel) -> ExtractPlan:
    """The plan, after the checks of the model that come before the first batch. They can come long before ``extract``:
    before other models and splits run.

    Raises:
        KR2CacheError: As for ``extract``: a model that cannot serve, or too little memory.
    """
    folder, _, fingerprint = place_of(plan, model.digests)
    header = existing_header(folder, fingerprint)
    if header is None:
        return replace(plan, trial=trial.check_states(plan, model.encoder))
    _check_begun(plan, model.encoder, folder, header)
    return plan


def _check_begun(plan: ExtractPlan, encoder: PreTrainedModel, folder: Path, header: ShardHeader) -> None:
    """Check that the model can continue a cache that was begun earlier. Compare the cache with the model, if other
    versions of the libraries began it.

    Raises:
        UnsupportedModelError: If the cache may hold states that depend on what ran before.
        CacheMismatchError: If the model gives other states now.
    """
    with contextlib.suppress(DeviceMemoryError):  # the missing sequences may be shorter, and fit
        trial.check_history(plan, encoder, header.batch_plan)
    try:
        cache = FeatureCache.open(folder)
    except CacheError:  # a shard is missing or damaged
        return
    positions = np.where(cache.complete, np.arange(len(plan.index)), -1)
    canaries.check_before_more(cache, positions, plan, encoder)


def _check_shard(plan: ExtractPlan, encoder: PreTrainedModel, part: ShardPart) -> None:
    """Compare what a shard holds with the model, before states are added to it. The other shards may be damaged.

    Raises:
        CacheMismatchError: As ``_check_begun``.
    """
    cache = FeatureCache(one_shard(part.path))
    positions = np.full(len(plan.index), -1)
    positions[part.start : part.stop] = np.where(cache.complete, np.arange(len(cache.complete)), -1)
    canaries.check_before_more(cache, positions, plan, encoder)


def _agreeing(plan: ExtractPlan, encoder: PreTrainedModel) -> Usable:
    """Whether an older cache agrees with the model. If it does not, or is damaged, a note says so."""

    def agrees(cache: FeatureCache, positions: NDArray[np.int64]) -> bool:
        try:
            canaries.check_before_more(cache, positions, plan, encoder)
        except CacheError as error:
            note(f"No states are copied from {cache.folder.name}: {error.message}")
            return False
        return True

    return agrees


def _note_shard_size(wanted_gb: float | None, header: ShardHeader) -> None:
    """Say so if the cache was begun with shards of another size than the user wants now."""
    begun_gb = int(header.batch_plan["shard_bytes"]) / 2**30
    if wanted_gb is not None and abs(wanted_gb - begun_gb) > 2**-30:
        note(f"--shard-gb {wanted_gb:g} has no effect: the cache was begun with --shard-gb {begun_gb:.3g}.")


def fill_shards(
    plan: ExtractPlan, encoder: PreTrainedModel, shards: SharedShards, donors: Donors | None = None
) -> Filled:
    """Fill the shards, together with other processes that do the same: copy the sequences that older caches hold, and
    run the model on the others, in whole planned batches.

    Args:
        plan: The extraction.
        encoder: The model of the plan.
        shards: The shards of the cache; their files exist.
        donors: Older caches to copy from; None if they were not searched for. Then they are searched for when a missing
            sequence is found that is not in the batch plan.

    Returns:
        What this process did.

    Raises:
        DeviceMemoryError: If a batch does not fit into the device's memory.
        InterruptedWorkError: On Ctrl-C.
        ValueRangeError: If the stored dtype cannot hold a state. Complete sequences are kept, as with every error.
    """
    trial.move_to_device(plan, encoder)
    header, taken_over = shards.header, 0
    planned = as_mask(header.batch_plan.get("computed"), len(plan.index))
    older = OlderCaches(plan.config.cache_dir, shards, ~planned, donors, _agreeing(plan, encoder))
    with WorkProgress(f"{plan.spec.name} on {plan.config.task}/{plan.config.split}", "sequences") as progress:
        try:
            with (
                interrupt_between_batches() as check_interrupt,
                # The number of threads changes the last bits of a state: use as many as the cache was begun with.
                _threads(header.provenance.get("recorded", {}).get("threads")),
                BatchRunner(plan, encoder, header.batch_plan, planned, progress) as runner,
            ):
                for held in shards.unfinished(check_interrupt, progress):
                    with held:  # what is in it ends if another process takes the shard over
                        if canaries.made_with_others(header.provenance):
                            with held.writer() as writer:  # marks what an earlier process wrote and did not mark
                                progress.advance(writer.kept)
                            _check_shard(plan, encoder, held.part)
                        with held.writer() as writer:
                            progress.advance(writer.kept)
                            taken_over += older.copy_into(writer, progress, held.check)
                            runner.run(writer, held.check)
                        runner.show_written(writer)
        except KeyboardInterrupt:
            raise interrupted(shards.folder, shards.complete_count(), len(shards.index)) from None
        except ValueRangeError as error:
            raise trial.by_weights(error, encoder, plan.spec.name) from None
    FeatureCache.open(shards.folder)  # an error if another program put a file there
    return Filled(runner.computed, taken_over)


def _is_finished(folder: Path, fingerprint: str) -> bool:
    """Whether every sequence is complete. False also if a shard is missing or cannot be read."""
    if not folder.is_dir() or not any(folder.glob("*.h5")):
        return False
    try:
        cache = FeatureCache.open(folder)
    except CacheVersionError:
        raise
    except CacheError:
        return False
    if cache.fingerprint != fingerprint:
        raise CacheError(
            f"{folder} holds another cache (fingerprint {cache.fingerprint[:16]}, not {fingerprint[:16]}).",
            "Move this folder to another place and run the same command again.",
        )
    return bool(cache.complete.all())


def _new_header(
    plan: ExtractPlan,
    model: OpenedModel,
    found: provenance.Found,
    fingerprint: str,
    batch_plan: dict[str, Any],
    last_is_output: bool | None,
) -> ShardHeader:
    import torch

    # No path of this machine is recorded, so that equal content gives equal bytes.
    origin = {
        "hub_id": plan.spec.hub_id,
        "revision": plan.spec.revision,
        "type": model.encoder.config.model_type,
        "dropped": model.dropped,
        "part": model.part,
        "last_is_output": last_is_output,
        **registry.control(plan.spec),
    }
    return ShardHeader(
        dtype=plan.config.dtype,
        layers=plan.layers,
        model_layers=plan.model_layers,
        width=plan.width,
        fingerprint=fingerprint,
        provenance={
            "chosen": plan.chosen.stored(),
            "found": asdict(found),
            "recorded": {
                **provenance.recorded(device_name(device_of(model.encoder)), torch.get_num_threads(), origin),
                **plan.recorded,
            },
        },
        batch_plan=batch_plan,
    )


@contextlib.contextmanager
def _threads(recorded: object) -> Iterator[None]:
    """Use the recorded number of threads if it is valid. It is checked, because another program may have written it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(recorded if isinstance(recorded, int) and recorded > 0 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_result(result: ExtractResult) -> None:
    """Show what was done, and where the cache is."""
    if result.computed == result.taken_over == 0:
        done(f"Already complete: {result.cache} ({bytes_text(result.bytes)})")
        return
    parts = [f"{count_text(result.computed, 'sequence')} computed"]
    if result.taken_over:
        parts.append(f"{result.taken_over:,} copied from other caches")
    if before := max(0, result.sequences - result.computed - result.taken_over):
        parts.append(f"{before:,} by an earlier run or another process")
    done(f"{', '.join(parts)}, {bytes_text(result.bytes)} in {seconds_text(result.seconds)}: {result.cache}")
