"""``kr2cache extract``: stage one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from kr2cache.commands.defaults import extract_config
from kr2cache.commands.loading import loading
from kr2cache.commands.options import Json, print_json, takes
from kr2cache.commands.settings import EXTRACT, OPTIONS
from kr2cache.config import ExtractConfig
from kr2cache.errors import InterruptedWorkError, KR2CacheError, UnsupportedModelError
from kr2cache.extraction.checks import check_extraction
from kr2cache.models.files import model_folder
from kr2cache.system.console import waiting
from kr2cache.tasks import find_task
from kr2cache.tasks.spool import STANDARD_INPUT, standard_input
from kr2cache.toml import read_toml


@takes(ExtractConfig, EXTRACT)
def extract_cli(
    typed: dict[str, Any],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show how much disk and about how much time this takes.")
    ] = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="With --dry-run: do not load the model to measure the time.")
    ] = False,
    as_json: Json = False,
) -> None:
    """[bold]Stage one[/]: run a frozen model once over a split and store its hidden states.

    A complete cache is never written again. An interrupted extraction continues where it stopped.
    """
    config = extract_config(read_toml(Path.cwd(), OPTIONS), **typed)
    if config.data != STANDARD_INPUT:
        _extract(config, dry_run, no_measure, as_json)
        return
    with standard_input(find_task(config.task, config.tasks), config.split) as path:
        _extract(dataclasses.replace(config, data=str(path)), dry_run, no_measure, as_json)


def _extract(config: ExtractConfig, dry_run: bool, no_measure: bool, as_json: bool) -> None:
    model_folder(check_extraction(config).spec)  # a download shows its own progress
    with loading(as_json):
        from kr2cache.extraction.extract import describe_result, extract
        from kr2cache.extraction.planning import describe, plan_extraction
    with waiting(f"Reading and tokenising {config.task}/{config.split}"):
        # A dry run writes nothing, not even a plan for other processes.
        task = find_task(config.task, config.tasks)
        unshared = task.examples(config.split, config.data, config.limit) if dry_run else None
        plan = plan_extraction(config, unshared)
    describe(plan)
    if dry_run:
        _show_dry_run(plan, no_measure, as_json)
        return
    result = extract(plan)
    describe_result(result)
    if as_json:
        print_json(result.json())


def _show_dry_run(plan: Any, no_measure: bool, as_json: bool) -> None:
    from kr2cache.extraction.estimate import describe_estimate
    from kr2cache.system.console import bytes_text, console, note, ranges_text
    from kr2cache.system.disk import free_bytes
    from kr2cache.system.terminal import Column, print_table

    choices, pools = plan.bytes_by_choice(), _pools(plan)
    if as_json:
        found, why = (None, None) if no_measure else _measured(plan)
        print_json(
            {
                "cache": None,
                "sequences": len(plan.index),
                "tokens": plan.tokens,
                "bytes": plan.state_bytes,
                "seconds": 0.0,
                "computed": 0,
                "dry_run": True,
                "free_bytes": free_bytes(plan.config.cache_dir),
                "bytes_by_choice": choices,
                "bytes_by_pool": pools,
                **({} if found is None else found.json()),
                **({} if why is None else {**dict.fromkeys(MEASURED), "not_measured": why}),
            }
        )
        return
    names = list(next(iter(choices.values())))
    columns = [Column("dtype"), *(Column("all layers" if name == "all" else name, right=True) for name in names)]
    rows = [[name, *(bytes_text(size) for size in sizes.values())] for name, sizes in choices.items()]
    print_table("On disk it would take (nothing was written)", columns, rows)
    others = [f"{bytes_text(size)} with --pool {pool}" for pool, size in pools.items()]
    console.print(f"Layers {ranges_text(plan.layers)} as {plan.config.dtype}: {', '.join(others)}.", soft_wrap=True)
    if no_measure:
        return
    found, why = _measured(plan)
    if found is not None:
        describe_estimate(found)
    else:
        note(f"The time was not measured: {why}")


MEASURED = ("complete", "taken_over", "to_compute", "tokens_per_second", "estimated_seconds")
"""The fields of ``Estimate.json``; null if nothing could be measured."""


def _measured(plan: Any) -> tuple[Any, str | None]:
    """The estimate, and None; or None, and why there is none."""
    from kr2cache.extraction.estimate import estimate

    try:
        return estimate(plan), None
    except InterruptedWorkError:
        raise
    except KR2CacheError as error:
        return None, f"{error.message.rstrip('.')}. {error.remedy}".strip()


def _pools(plan: Any) -> dict[str, int]:
    """Bytes on disk for every pooling that the tokenizer allows."""
    from kr2cache.models.tokenizers import load_tokenizer
    from kr2cache.models.words import check_tells_words

    pools: dict[str, int] = plan.bytes_by_pool()
    if not find_task(plan.config.task, plan.config.tasks).words:
        try:
            check_tells_words(load_tokenizer(plan.spec, words=False), plan.spec.name)
        except UnsupportedModelError:
            del pools["word"]
    return pools
