"""Check one cache for ``kr2cache cache verify``, and show what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kr2cache.cache.check import CacheCheck
from kr2cache.cache.shard import readable_headers
from kr2cache.commands.settings import OPTIONS
from kr2cache.errors import CacheError, KR2CacheError
from kr2cache.models.registry import known_models
from kr2cache.system.console import bytes_text, console, count_text, done, failed, note, seconds_text
from kr2cache.toml import read_toml


def verify(folder: Path, model: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check one cache and print the faults; returns what ``--json`` prints of it.

    Args:
        model: What else ``RerunConfig`` needs, to compare the cache with its model; None to check its bytes alone.
    """
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.store import provenance

    found = _check_with_progress(folder)
    faults = list(found.faults)
    if found.intact:
        try:
            faults += provenance.contradictions(FeatureCache.open(folder))
        except CacheError as error:
            faults.append(error.message)
    ok = found.intact and not faults and not found.incomplete_ids
    if ok:
        speed = f"{bytes_text(found.bytes)} in {seconds_text(found.seconds)}"
        done(f"{folder}: {count_text(found.sequences, 'sequence')} intact ({speed})")
    else:
        _show_faults(found, faults)
    compared = {} if model is None else {"model": _compare(folder, model, sound=found.intact and not faults)}
    return {
        "cache": str(folder),
        "ok": ok and all(one["agrees"] for one in compared.values()),
        "sequences": found.sequences,
        "bytes": found.bytes,
        "seconds": found.seconds,
        "damaged": found.damaged_ids,
        "incomplete": len(found.incomplete_ids),
        "damaged_index": [shard.path.name for shard in found.shards if shard.index_damaged],
        "damaged_structure": [shard.path.name for shard in found.shards if shard.structure_damaged],
        "unreadable": {shard.path.name: shard.unreadable for shard in found.shards if shard.unreadable},
        "faults": faults,
        **compared,
    }


def _compare(folder: Path, model: Mapping[str, Any], *, sound: bool) -> dict[str, Any]:
    """Compare one cache with its model and print the result; returns what ``--json`` prints of it.

    Args:
        model: As for ``verify``.
        sound: Whether its bytes are intact.
    """
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.extraction import canaries
    from kr2cache.extraction.rerun import RerunConfig

    if not sound:
        return {"agrees": None, "why": "the cache is damaged", "sequences": []}
    try:
        found = canaries.canaries(RerunConfig(folder=folder, **model))
    except KR2CacheError as error:
        failed(f"{folder} cannot be compared with its model: {error.message} {error.remedy}")
        return {"agrees": None, "why": error.message, "sequences": []}
    then = canaries.made_with(FeatureCache.open(folder).provenance) or "unknown versions"
    wrong = [one for one in found if not one.agrees]
    for one in wrong:
        failed(f"{folder}: {one.text()}")
    if wrong:
        console.print(
            f"Made with {then}; compared with {canaries.running()}. Install the versions that made it, or make it "
            f"again: kr2cache cache remove {folder}, then extract.",
            style="cyan",
            soft_wrap=True,
            markup=False,
        )
    else:
        done(f"{folder}: {count_text(len(found), 'sequence')} run through the model again, within rounding")
    return {
        "agrees": not wrong,
        "made_with": then,
        "compared_with": canaries.running(),
        "sequences": [one.json() for one in found],
    }


def _check_with_progress(folder: Path) -> CacheCheck:
    from kr2cache.cache.check import check_cache
    from kr2cache.system.console import WorkProgress

    size = sum(path.stat().st_size for path in folder.glob("*.h5") if path.is_file())
    total, read = max(1, size // 10**6), 0
    with WorkProgress(folder.name, "MB", total) as progress:

        def advance(count: int) -> None:
            nonlocal read
            progress.advance((read + count) // 10**6 - read // 10**6)
            read += count

        found = check_cache(folder, advance)
        progress.advance(total - read // 10**6)  # unreadable parts were not counted
    return found


def _show_faults(found: CacheCheck, faults: Sequence[str]) -> None:
    """Print what is wrong with a cache and the command that repairs it."""
    for shard in found.shards:
        if shard.unreadable:
            failed(shard.unreadable)
        if shard.index_damaged:
            failed(f"{shard.path}: the index (ids, lengths, tokens or text digests) does not match its checksum")
        if shard.structure_damaged:
            failed(f"{shard.path}: bytes outside states and index (attributes, HDF5's own) have changed")
    for fault in faults:
        failed(f"{found.folder}: {fault}")
    if found.damaged_ids:
        failed(
            f"{found.folder}: {count_text(len(found.damaged_ids), 'sequence')} of {found.sequences:,} damaged: "
            f"{_names(found.damaged_ids)}"
        )
    if found.incomplete_ids:
        note(
            f"{found.folder}: {len(found.incomplete_ids):,} of {count_text(found.sequences, 'sequence')} not complete: "
            f"{_names(found.incomplete_ids)}"
        )
    console.print(_what_to_do(found), style="cyan", soft_wrap=True, markup=False)


def _what_to_do(found: CacheCheck) -> str:
    """The command that repairs or completes a cache."""
    headers = [header for shard in found.shards for header in readable_headers(shard.path)]
    if not headers or (found.intact and found.incomplete_ids):
        return "Run the kr2cache extract command that made it again: it continues where it stopped."
    chosen = headers[0].provenance.get("chosen", {})
    resource = chosen.get("resource", "") if isinstance(chosen, dict) else ""
    known = resource in known_models(read_toml(Path.cwd(), OPTIONS).models) or "--" in str(resource)
    return f"Repair it:  kr2cache cache repair {found.folder}" + ("" if known else f" --resource FOLDER_OF_{resource}")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
