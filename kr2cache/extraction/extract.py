"""Stage one: run a frozen model once over a split and store the hidden states of its layers.

Texts are tokenised first, so every size is known before the first forward pass. Batches go by a stored plan that
depends on lengths and a budget alone, so an interrupted extraction goes on with the same batches and gives the same
bytes.

Shape letters: B sequences, T positions (padded), L stored layers, D width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.create import create_shards, shard_cuts
from kr2cache.cache.format import ShardHeader
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import headers_left
from kr2cache.cache.writer import CacheWriter
from kr2cache.config import ExtractConfig
from kr2cache.errors import (
    CacheError,
    CacheVersionError,
    DeviceMemoryError,
    InterruptedWorkError,
    UnsupportedModelError,
    ValueRangeError,
)
from kr2cache.extraction import budget
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan, check_disk, plan_extraction
from kr2cache.models.digests import config_digest, weights_digest
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.load import describe_dropped, not_finite, open_encoder
from kr2cache.models.repeatable import check_repeatable
from kr2cache.models.states import hidden_states, padding_is_harmless
from kr2cache.store import folders, provenance
from kr2cache.store.takeover import as_mask, as_ranges, find_donors
from kr2cache.system.allocator import return_free_memory
from kr2cache.system.console import WorkProgress, bytes_text, count_text, done, note, seconds_text, waiting
from kr2cache.system.device import (
    choose_device,
    device_name,
    drop_unused_memory,
    freeing,
    is_out_of_memory,
    memory_advice,
)
from kr2cache.system.interrupt import interrupt_between_batches
from kr2cache.system.locks import check_writable, only_writer
from kr2cache.system.process import process_unchanged

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

RETURN_MEMORY_EVERY_S = 10.0
"""Without it the memory of 5,000 sentences rose from batch to batch."""


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did."""

    cache: Path
    sequences: int
    tokens: int
    bytes: int
    seconds: float
    computed: int
    """Sequences that went through the model now."""
    taken_over: int
    """Sequences that other caches held already."""

    def json(self) -> dict[str, Any]:
        """As the command line's contract has it."""
        fields = {name: value for name, value in asdict(self).items() if name != "taken_over"}
        return {**fields, "cache": str(self.cache)}


@process_unchanged()
def extract(settings: ExtractConfig | ExtractPlan) -> ExtractResult:
    """Make the cache, or find it finished, or go on with an interrupted or damaged one. What other caches of the same
    split hold, computed alike, is taken over from them.

    Args:
        settings: The settings, or the plan that ``plan_extraction`` made of them, if the caller has it already.

    Raises:
        DiskSpaceError: Before the model is loaded, if the disk cannot hold the cache.
        DeviceMemoryError: If model or batch do not fit into the device's memory; what is complete is kept.
        InterruptedWorkError: On Ctrl-C; what is complete is kept.
        ValueRangeError: For a state that the stored dtype cannot hold; what is complete is kept.
    """
    started = time.monotonic()
    plan = settings if isinstance(settings, ExtractPlan) else plan_extraction(settings)
    check_disk(plan)
    with waiting(f"Loading {plan.spec.name}"):
        encoder, dropped = open_encoder(plan.spec)
        what = provenance.found(plan.index, weights_digest(encoder), config_digest(encoder.config), plan.template)
    if said := describe_dropped(plan.spec, dropped):
        note(f"{said}.")
    digest = provenance.fingerprint(plan.chosen, what)
    folder = folders.cache_folder(plan.config.cache_dir, plan.config.task, plan.config.split, plan.spec.name, digest)
    computed = taken = 0
    if not _is_finished(folder, digest):
        check_writable(folder.parent, "--cache-dir")
        with only_writer(folder):
            if not _is_finished(folder, digest):
                header = _existing_header(folder, digest)
                if header is None:
                    header = _new_header(plan, encoder, folder, digest, what, dropped)
                else:
                    with contextlib.suppress(DeviceMemoryError):  # what is left to compute may be shorter and fit
                        check_history(plan, encoder)
                computed, taken = fill(plan, encoder, folder, header)
    return ExtractResult(
        cache=folder,
        sequences=len(plan.index),
        tokens=plan.tokens,
        bytes=sum(path.stat().st_size for path in folder.glob("*.h5")),
        seconds=time.monotonic() - started,
        computed=computed,
        taken_over=taken,
    )


def _is_finished(folder: Path, digest: str) -> bool:
    """Whether every sequence is complete; False too where a shard is missing or cannot be read."""
    if not folder.is_dir() or not any(folder.glob("*.h5")):
        return False
    try:
        cache = FeatureCache.open(folder)
    except CacheVersionError:
        raise
    except CacheError:
        return False
    if cache.fingerprint != digest:
        raise CacheError(
            f"{folder} holds another cache (fingerprint {cache.fingerprint[:16]}, not {digest[:16]}).", "Move it away."
        )
    return bool(cache.complete.all())


def _existing_header(folder: Path, digest: str) -> ShardHeader | None:
    """What the shards that are there say, damaged ones too."""
    for path in sorted(folder.glob("*.h5")):
        for header in headers_left(path):
            if header.fingerprint == digest:
                return header
    return None


def _new_header(
    plan: ExtractPlan,
    encoder: PreTrainedModel,
    folder: Path,
    digest: str,
    what: provenance.Found,
    dropped: Sequence[str],
) -> ShardHeader:
    """The header of a new cache, its batch plan included."""
    import torch

    device = choose_device(plan.config.device)
    _move(encoder, device, plan)
    padded = _check_states(plan, encoder)
    # A CPU's batches are small, and a computer whose memory is short ends the process without an error.
    fits = device.type == "cpu"
    batch_plan: dict[str, Any] = {
        "order": "longest first",
        "padded": padded,
        "tokens_per_batch": budget.suiting(plan, device)
        if fits
        else budget.that_fits(plan, lambda batch: _run(encoder, plan, batch), device, padded=padded),
        "shard_bytes": int(plan.config.shard_gb * 2**30),
    }
    # No folder of this machine: equal content is equal bytes.
    origin = {
        "hub_id": plan.spec.hub_id,
        "revision": plan.spec.revision,
        "type": encoder.config.model_type,
        "dropped": dropped,
    }
    header = ShardHeader(
        dtype=plan.config.dtype,
        layers=plan.layers,
        model_layers=plan.model_layers,
        width=plan.width,
        fingerprint=digest,
        provenance={
            "chosen": asdict(plan.chosen),
            "found": asdict(what),
            "recorded": provenance.recorded(device_name(device), torch.get_num_threads(), origin),
        },
        batch_plan=batch_plan,
    )
    covered = find_donors(plan.config.cache_dir, folder, header, plan.index).covered
    if not covered.any():
        return header
    # Which sequences the model runs on is part of the plan: going on after a stop has to form the same batches.
    return replace(header, batch_plan={**batch_plan, "computed": as_ranges(~covered)})


def fill(plan: ExtractPlan, encoder: PreTrainedModel, folder: Path, header: ShardHeader) -> tuple[int, int]:
    """Make what is missing of a cache: shards, sequences that other caches hold, and with the model the planned batches
    that hold something incomplete. The caller holds its lock.

    Returns:
        Sequences that went through the model, and sequences that were taken over.
    """
    device = choose_device(plan.config.device)
    _move(encoder, device, plan)
    for stale in folder.glob("*.partial"):
        stale.unlink()
    for path in create_shards(folder, header, plan.index, int(header.batch_plan["shard_bytes"])):
        note(f"{path.name} was damaged: it is made again from what is left of it.")
    planned = as_mask(header.batch_plan.get("computed"), len(plan.index))
    taken = 0
    if not planned.all() and not FeatureCache.open(folder).complete[~planned].all():
        taken = find_donors(plan.config.cache_dir, folder, header, plan.index).fill(folder, header, ~planned)
    if FeatureCache.open(folder).complete.all():
        return 0, taken
    # The number of threads changes last bits: an interrupted cache is finished with as many as it was begun with.
    with _threads(header.provenance.get("recorded", {}).get("threads")):
        computed = _compute(plan, encoder, device, folder, header.batch_plan, planned)
    return computed, taken


def _move(encoder: PreTrainedModel, device: torch.device, plan: ExtractPlan) -> None:
    """Bring the model to the device."""
    try:
        encoder.to(device)  # type: ignore[arg-type]  # transformers annotates it for itself alone
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = sum(parameter.nbytes for parameter in encoder.parameters())
        raise DeviceMemoryError(
            f"{plan.spec.name} takes {bytes_text(size)}; the memory of {device} has no room for it.",
            memory_advice(device),
        ) from None


@contextlib.contextmanager
def _threads(number: object) -> Iterator[None]:
    """With so many threads, where another program's file does not say something else."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number if isinstance(number, int) and number > 0 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_history(plan: ExtractPlan, encoder: PreTrainedModel) -> None:
    """See that the model takes these sequences, and that their states do not depend on what ran before.

    Raises:
        UnsupportedModelError: If it fails on them, or they do.
        DeviceMemoryError: If the longest sequence does not fit.
    """
    device = choose_device(plan.config.device)
    _move(encoder, device, plan)

    def run(model: PreTrainedModel, sequence: int) -> tuple[torch.Tensor, ...]:
        return hidden_states(model, plan.index, [sequence], pad_id=plan.pad_id, compute_dtype="float32")

    try:
        check_repeatable(encoder, plan.index.n_tokens, run, repr(plan.spec.name))
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's first pass, and its code may raise anything
        if is_out_of_memory(error):
            raise budget.too_long(plan, device) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) fails on its first text: {reason}",
            "Check its config.json, or choose another model.",
        ) from error


def _check_states(plan: ExtractPlan, encoder: PreTrainedModel) -> bool:
    """Does the model emit L + 1 layers of T x D, as its configuration says; and may its batches be padded?

    Raises:
        UnsupportedModelError: If layers or shapes are not what the configuration says, or states depend on what ran
            before.
    """
    check_history(plan, encoder)
    shortest = int(np.argmin(plan.index.n_tokens))
    expected = (1, int(plan.index.n_tokens[shortest]), plan.width)
    alone = _run(encoder, plan, [shortest])
    shapes = {tuple(layer.shape) for layer in alone}
    if len(alone) != plan.model_layers or shapes != {expected}:
        raise UnsupportedModelError(
            f"{plan.spec.name!r} ({encoder.config.model_type}) gives {len(alone)} layers of shapes "
            f"{sorted(shapes)} where {plan.model_layers} of {expected} were expected.",
            "A resource has one state of the same width per token in every layer.",
        )
    longest, beside = _beside_the_longest(plan, encoder, shortest)
    if beside[0].shape[1] < longest:
        return False
    return padding_is_harmless(alone, beside, plan.config.compute_dtype)


def _beside_the_longest(
    plan: ExtractPlan, encoder: PreTrainedModel, sequence: int
) -> tuple[int, tuple[torch.Tensor, ...]]:
    """The length of the longest sequence that fits into the device's memory beside ``sequence``, nearly, and the layers
    of both.

    Raises:
        DeviceMemoryError: If none fits.
    """
    order = np.argsort(plan.index.n_tokens, kind="stable")
    place = len(order) - 1
    while True:
        try:
            return int(plan.index.n_tokens[order[place]]), _run(encoder, plan, [sequence, int(order[place])])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if place == 0:
                raise budget.too_long(plan, encoder.device) from None
        drop_unused_memory()
        place //= 2


def _run(
    encoder: PreTrainedModel, plan: ExtractPlan, sequences: Sequence[int] | NDArray[np.intp]
) -> tuple[torch.Tensor, ...]:
    return hidden_states(encoder, plan.index, sequences, pad_id=plan.pad_id, compute_dtype=plan.config.compute_dtype)


def _compute(
    plan: ExtractPlan,
    encoder: PreTrainedModel,
    device: torch.device,
    folder: Path,
    batch_plan: dict[str, Any],
    planned: NDArray[np.bool_],
) -> int:
    pack = Packer(plan.index, plan.layers, plan.config.dtype, device)
    cuts = shard_cuts(plan.index.n_tokens, plan.token_bytes, int(batch_plan["shard_bytes"]))
    computed = 0
    with WorkProgress(f"{plan.spec.name} on {plan.config.task}/{plan.config.split}", "sequences") as progress:
        try:
            with (
                interrupt_between_batches() as check_interrupt,
                # By the whole plan, so that what goes on after a stop computes alike.
                cheaper_forward(encoder, plan.tokens if plan.config.compute_dtype == "float32" else 0),
                CacheWriter(folder) as writer,
            ):
                batches = list(
                    _unfinished_batches(
                        plan.index.n_tokens,
                        cuts,
                        writer.unfinished,
                        batch_plan,
                        planned,
                        plan.config.tokens_per_batch,
                    )
                )
                progress.total = sum(len(batch) for _, batch in batches)
                started, tokens, speed = time.monotonic(), 0, 0.0
                for shard, batch in batches:
                    with _fitting(plan, batch, device, folder):
                        for ready in pack(shard, batch, cuts[shard], _run(encoder, plan, batch)):
                            writer.write(ready)
                    check_interrupt()
                    return_free_memory(RETURN_MEMORY_EVERY_S)
                    computed += len(batch)
                    tokens += int(plan.index.n_tokens[batch].sum())
                    speed = tokens / (time.monotonic() - started)
                    progress.advance(len(batch), f"{speed:,.0f} tokens/s, {bytes_text(writer.bytes_written)} written")
                for ready in pack.rest():
                    writer.write(ready)
            progress.advance(0, f"{speed:,.0f} tokens/s, {bytes_text(writer.bytes_written)} written")
        except KeyboardInterrupt:
            raise _interrupted(folder) from None
        except ValueRangeError as error:
            raise _by_weights(error, encoder, plan.spec.name) from None
    return computed


def _by_weights(error: ValueRangeError, encoder: PreTrainedModel, name: str) -> ValueRangeError:
    """``error`` about a state, or one that says so where weights of the model are not finite either."""
    damaged = not_finite(encoder)
    if not damaged:
        return error
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return ValueRangeError(
        f"{error.message} The checkpoint of {name!r} holds numbers that are not finite (nan or inf), in {damaged[0]}"
        f"{more}.",
        "Get an undamaged copy of its weights; no --dtype helps. What is complete is kept.",
    )


@contextlib.contextmanager
def _fitting(plan: ExtractPlan, batch: NDArray[np.intp], device: torch.device, folder: Path) -> Iterator[None]:
    """Say which batch did not fit into the device's memory, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        longest = int(plan.index.n_tokens[batch].max())
        less = max(longest, len(batch) * longest // 2)
        smaller = f", or go on with smaller batches: --tokens-per-batch {less}" if len(batch) > 1 else ""
        raise DeviceMemoryError(
            f"{device} ran out of memory at a batch of {count_text(len(batch), 'sequence')} of up to {longest:,} "
            f"tokens, the first of them {plan.index.ids[batch[0]].decode('utf-8')!r}. What is complete is kept in "
            f"{folder}.",
            f"{freeing(device)} and run the same command again{smaller}.",
        ) from None


def _interrupted(folder: Path) -> InterruptedWorkError:
    cache = FeatureCache.open(folder)
    return InterruptedWorkError(
        f"Interrupted. {len(cache):,} of {count_text(len(cache.n_tokens), 'sequence')} are complete, kept in {folder}.",
        "Run the same command again: it goes on where it stopped.",
    )


def _unfinished_batches(
    n_tokens: NDArray[np.int32],
    cuts: Sequence[int],
    unfinished: Callable[[int], NDArray[np.bool_]],
    batch_plan: dict[str, Any],
    planned: NDArray[np.bool_],
    most: int | None,
) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """(shard, sequences) of the planned batches that hold something incomplete, whole: a sequence's last bits depend on
    the batch it runs in.

    Args:
        planned: (n,) for which sequences the model was planned. What should have been taken over, but is nowhere any
            more, gets batches of its own.
        most: Positions that the user wants in a batch; where it is less than was planned, batches are cut further.
    """
    positions, padded = int(batch_plan["tokens_per_batch"]), bool(batch_plan["padded"])
    if most is not None and most < positions:
        note(
            f"Batches of {most:,} positions from here on, where {positions:,} were planned: the last bits of these "
            "states can differ from those of an uninterrupted run."
        )
    for shard, (start, stop) in enumerate(pairwise(cuts)):
        todo, here = unfinished(shard), planned[start:stop]
        for members in (np.flatnonzero(here), np.flatnonzero(todo & ~here)):
            for batch in length_sorted_batches(n_tokens[start + members], positions, padded=padded):
                whole = members[batch] + start
                for part in budget.split_further(whole, n_tokens, min(positions, most or positions)):
                    if todo[part - start].any():
                        yield shard, part


def describe_result(result: ExtractResult) -> None:
    """Say what was done, and where the cache is."""
    if result.computed == result.taken_over == 0:
        done(f"Already complete: {result.cache} ({bytes_text(result.bytes)})")
        return
    parts = [f"{count_text(result.computed, 'sequence')} computed"]
    if result.taken_over:
        parts.append(f"{result.taken_over:,} taken over from other caches")
    if there := max(0, result.sequences - result.computed - result.taken_over):
        parts.append(f"{there:,} were there already")
    done(f"{', '.join(parts)}, {bytes_text(result.bytes)} in {seconds_text(result.seconds)}: {result.cache}")
