"""``kr2cache cache``: look at caches, check and repair them, make smaller ones. Only ``repair`` needs the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kr2cache.cache.dtypes import DTYPES
from kr2cache.commands.defaults import merge
from kr2cache.commands.loading import loading
from kr2cache.commands.options import App, CacheDir, Data, Device, DeviceMap, Json, print_json
from kr2cache.commands.settings import OPTIONS
from kr2cache.commands.verify import verify
from kr2cache.config import default_cache_dir
from kr2cache.errors import CacheError, ConfigError
from kr2cache.models.registry import label
from kr2cache.system.console import bytes_text, console, count_text, done, note, ranges_text, seconds_text
from kr2cache.system.device import check_device_map, check_device_name
from kr2cache.system.utf8 import file_lines
from kr2cache.toml import Toml, read_toml

if TYPE_CHECKING:
    from kr2cache.store.inventory import Entry

app = App(
    no_args_is_help=True,
    help="Show, check, repair and remove caches, and make smaller caches from them.",
)

Cache = Annotated[str, typer.Argument(help="A cache's folder, or its name below --cache-dir.", metavar="CACHE")]
Caches = Annotated[
    list[str] | None,
    typer.Argument(help="Folders, or names below --cache-dir. Default: every cache.", metavar="CACHE"),
]
Resource = Annotated[str | None, typer.Option(help="The model, if this machine does not know the name in the cache.")]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"Dtype of the new cache, not a larger one: {', '.join(DTYPES)}.", show_default="the same"),
]


def _cache_dir(given: Path | None) -> Path:
    where: Path = merge(read_toml(Path.cwd(), OPTIONS), cache_dir=given).get("cache_dir", default_cache_dir())
    return where


def _folder(name: str, cache_dir: Path | None) -> Path:
    from kr2cache.store.inventory import find_cache

    return find_cache(name, _cache_dir(cache_dir))


def _where_it_runs(toml: Toml, **given: Any) -> dict[str, Any]:
    """The options of a command that runs the model of a cache again."""
    values = merge(toml, **given)
    device = values.get("device", "auto")
    check_device_name(device)
    check_device_map(values.get("device_map"), device)
    return values


@app.command("list")
def list_cli(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """List every cache: size, when it was written, whether it is complete or stale."""
    from kr2cache.store.inventory import entries
    from kr2cache.system.terminal import Column, print_table

    where = _cache_dir(cache_dir)
    found = entries(where)
    if as_json:
        print_json([one.json() for one in found])
        return
    if not found:
        console.print(f"No cache in {where}.", markup=False, soft_wrap=True)
        return
    columns = (
        Column("cache", breaks="/"),
        Column("corpus", rank=5),
        Column("layers", breaks=" ", rank=4),
        Column("dtype", rank=6),
        Column("sequences", right=True, rank=3),
        Column("on disk", right=True, rank=1),
        Column("written", rank=2),
        Column("state", breaks=" "),
    )
    rows: list[list[str | Text]] = []
    for one in found:
        name = str(one.folder.relative_to(where))
        if one.problem is not None:
            rows.append([name, "", "", "", "", bytes_text(one.bytes), "", Text("cannot be read", style="red")])
            continue
        state = Text("complete", style="green")
        if one.complete < one.sequences:
            state = Text(f"{one.complete:,} of {one.sequences:,} complete", style="yellow")
        if one.stale:
            state = Text.assemble(("stale", "yellow"), f", {state.plain}" if one.complete < one.sequences else "")
        layers = _layers(one)
        sizes = [f"{one.sequences:,}", bytes_text(one.bytes), one.written_text]
        rows.append([name, one.corpus, layers, one.dtype, *sizes, state])
    print_table(f"Caches in {where}", columns, rows)
    console.print(f"{count_text(len(found), 'cache')}, {bytes_text(sum(one.bytes for one in found))}")
    for one in found:
        if one.problem is not None:
            note(one.problem)
        if one.stale:
            note(
                f"{one.folder.name} is stale: {one.stale}. train uses it only if you restore the data or the model. "
                f"To free {bytes_text(one.bytes)}: kr2cache cache remove {one.folder.name}"
            )


def _last_layer(is_output: bool | None, last: int) -> str:
    """Whether the last layer is normalised as the model's output is."""
    if is_output is None:
        return f"layer {last}; whether it is the model's output was not recorded"
    if is_output:
        return f"layer {last} is the model's output, after its final norm if it has one"
    return f"layer {last} is not the model's output: the model changes it further, usually by a final norm"


def _part(recorded: Mapping[str, Any]) -> str:
    """Which part of the model gave the states, such as the encoder of T5; empty if it is the whole model."""
    part = (recorded.get("model") or {}).get("part")
    return f"its {part}: " if part else ""


def _dtypes(chosen: dict[str, Any]) -> str:
    """The dtypes of the forward pass and, if they were not float32, of the weights."""
    compute, weights = chosen["compute_dtype"], chosen.get("weights_dtype")
    if weights is None:
        return str(compute)
    return f"{weights}, the dtype of its weights," if compute == "float32" else f"{compute} with weights in {weights}"


def _positions(about: Entry, max_length: int) -> str:
    """How many positions a cache stores, in words."""
    if about.pool == "none":
        return f"{about.tokens:,} tokens, at most {max_length} each"
    states = f"{about.tokens:,} words" if about.pool == "word" else "one state each"
    return f"{states}, from texts of at most {max_length} tokens"


def _layers(cache: Entry) -> str:
    """What is stored for a token, word or sequence."""
    layers = ranges_text(cache.layers) if cache.fusion is None else f"average of {ranges_text(cache.fusion['layers'])}"
    return layers if cache.pool == "none" else f"{layers}, by {cache.pool}"


@app.command("info")
def info_cli(cache: Cache, cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Show one cache: what it was made from, sizes, lengths, norms by layer."""
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.store.inventory import entry, portrait

    folder = _folder(cache, cache_dir)
    opened = FeatureCache.open(folder)
    about, seen = entry(folder), portrait(opened)
    if as_json:
        lengths = {"edges": seen.lengths[0], "counts": seen.lengths[1]}
        numbers = {"lengths": lengths, "norms": seen.norms, "largest": seen.largest, "sampled": seen.sampled}
        print_json({**about.json(), "provenance": opened.provenance, "batch_plan": opened.batch_plan, **numbers})
        return
    if about.problem is not None:
        raise CacheError(about.problem, "")
    chosen, recorded = opened.provenance["chosen"], opened.provenance.get("recorded", {})
    versions = recorded.get("versions", {})
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "cache": str(folder),
        "resource": f"{label(about.resource, recorded.get('model') or {})}  "
        f"({_part(recorded)}{opened.model_layers} layers of width {opened.width})",
        "data": f"{about.corpus}, {about.task}/{about.split}",
        "sequences": f"{about.complete:,} of {about.sequences:,} complete, {_positions(about, chosen['max_length'])}",
        "states": f"layers {_layers(about)} as {about.dtype}, {bytes_text(about.bytes)} on disk "
        f"in {count_text(len(list(folder.glob('*.h5'))), 'shard')}, "
        f"{'mapped' if opened.mapped else 'read through HDF5 (rewritten by another tool)'}",
        "computed": f"in {_dtypes(chosen)} on {recorded.get('device', '?')}, torch {versions.get('torch', '?')}"
        f", transformers {versions.get('transformers', '?')}",
        "last layer": _last_layer((recorded.get("model") or {}).get("last_is_output"), opened.model_layers - 1),
        "weights": f"digest {opened.provenance['found'].get('weights', '?')}",
        "fingerprint": about.fingerprint,
    }
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text))
    console.print(table)
    console.print()
    edges, counts = seen.lengths
    names = [f"{a}" if b - a == 1 else f"{a}-{b - 1}" for a, b in pairwise(edges)]
    what = "tokens" if about.pool == "none" else "states of a layer"
    _bars(f"{what} per sequence", names, [float(count) for count in counts], lambda value: f"{value:,.0f}")
    if seen.sampled:
        titles = [str(layer) for layer in about.layers] if about.fusion is None else ["fused"]
        console.print()
        _bars(f"mean norm of a state by layer ({seen.sampled} sequences)", titles, seen.norms, lambda v: f"{v:.2f}")
        peak = max(seen.largest)
        where = "" if about.fusion is not None else f", at layer {titles[seen.largest.index(peak)]}"
        console.print(f"largest value {peak:,.1f}{where} (float16 ends at 65,504)")


def _bars(title: str, names: Sequence[str], values: Sequence[float], text: Any) -> None:
    """Print a bar for each value, in steps of an eighth of a character."""
    console.print(Text(title, style="bold"))
    longest, peak = max(map(len, names), default=0), max(values, default=0.0) or 1.0
    for name, value in zip(names, values, strict=True):
        eighths = round(48 * 8 * value / peak)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        console.print(Text.assemble(f"{name:>{longest}}  ", (bar, "cyan"), f" {text(value)}"))


@app.command("verify")
def verify_cli(
    caches: Caches = None,
    against_model: Annotated[
        bool, typer.Option("--against-model", help="Also run a few sequences through the model, and compare.")
    ] = False,
    resource: Resource = None,
    data: Data = None,
    device: Device = None,
    device_map: DeviceMap = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compare every byte of caches with its checksum, and name damaged sequences.

    With --against-model, the shortest, a middle and a long sequence of each cache run through the model again.
    Their states must agree within rounding.

    The exit code is 1 unless every cache is intact and agrees with its model.
    """
    from kr2cache.store.inventory import cache_folders

    toml = read_toml(Path.cwd(), OPTIONS)
    model = None
    if against_model:
        given = _where_it_runs(toml, data=data, device=device, device_map=device_map)
        model = {"resource": resource, "models": toml.models, "tasks": toml.tasks, **given}
    elif (unused := resource or data or device or device_map) is not None:
        raise ConfigError(f"{unused!r} is for the comparison with the model.", "Give --against-model too.")
    where = _cache_dir(cache_dir)
    folders = [_folder(name, cache_dir) for name in caches] if caches else cache_folders(where)
    if not folders:
        raise ConfigError(f"No cache in {where}.", "Give --cache-dir, or the folder of a cache.")
    if model is not None:
        with loading(as_json):
            import kr2cache.extraction.canaries  # noqa: F401
    results = [verify(folder, model) for folder in folders]
    if as_json:
        print_json({"caches": results, "ok": all(result["ok"] for result in results)})
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


@app.command("repair")
def repair_cli(
    cache: Cache,
    resource: Resource = None,
    data: Data = None,
    device: Device = None,
    device_map: DeviceMap = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compute damaged or missing sequences again. Only batches that hold such a sequence run.

    On the device that made the cache, the repaired files are byte for byte the same as before.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    folder = _folder(cache, cache_dir)
    given = _where_it_runs(toml, data=data, device=device, device_map=device_map)
    with loading(as_json):
        from kr2cache.extraction.repair import describe_repair, repair
        from kr2cache.extraction.rerun import RerunConfig

    result = repair(RerunConfig(folder=folder, resource=resource, models=toml.models, tasks=toml.tasks, **given))
    describe_repair(result)
    if as_json:
        print_json(result.json())


@app.command("slice")
def slice_cli(
    cache: Cache,
    layers: Annotated[
        str | None, typer.Option(help="all, lastN or a list: 0,3,5.", show_default="all it holds")
    ] = None,
    dtype: Dtype = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N sequences.", show_default="all")] = None,
    ids: Annotated[
        Path | None, typer.Option(help="File with the ids of examples or sequences to keep, one per line.")
    ] = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Make a smaller cache without the model: fewer layers, fewer sequences or a smaller dtype."""
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.store.derive import plan_slice

    names = None
    if ids is not None:
        try:
            names = [name for line in file_lines(ids) if (name := line.rstrip("\r\n"))]
        except OSError as error:
            raise ConfigError(
                f"--ids {ids} cannot be read: {error}.", "Give a text file with one id per line."
            ) from error
    source = FeatureCache.open(_folder(cache, cache_dir))
    plan = plan_slice(source, layers=layers, dtype=dtype, limit=limit, ids=names, cache_dir=cache_dir)
    _derive(plan, as_json)


@app.command("fuse")
def fuse_cli(
    cache: Cache,
    fusion: Annotated[str, typer.Option(help="A fixed fusion: all or lastN (last4).")] = "last4",
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Store one fixed fusion of a cache as a new cache. train reads it for the same fusion."""
    from kr2cache.cache.reader import FeatureCache
    from kr2cache.store.derive import plan_fusion

    source = FeatureCache.open(_folder(cache, cache_dir))
    _derive(plan_fusion(source, fusion, dtype=dtype, cache_dir=cache_dir), as_json)


def _derive(plan: Any, as_json: bool) -> None:
    from kr2cache.store.derive import derive

    result = derive(plan)
    share = f"{100 * plan.state_bytes / plan.source.stored_bytes:.0f} % of {bytes_text(plan.source.stored_bytes)}"
    if result.made:
        done(
            f"{count_text(result.sequences, 'sequence')}, {bytes_text(plan.state_bytes)} of states ({share}) in "
            f"{seconds_text(result.seconds)}: {result.cache}"
        )
    else:
        done(f"Already complete: {result.cache} ({bytes_text(result.bytes)})")
    if as_json:
        print_json(result.json())


@app.command("remove")
def remove_cli(
    caches: Annotated[list[str], typer.Argument(help="Folders, or names below --cache-dir.", metavar="CACHE")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Delete caches. It shows how many bytes this frees, and asks first."""
    from kr2cache.store.inventory import removable, remove

    named = [_folder(name, cache_dir) for name in caches]
    folders = list({folder.resolve(): folder for folder in named}.values())  # two names may mean the same folder
    seen = [removable(folder) for folder in folders]
    for one in seen:
        console.print(f"{one.folder}: {bytes_text(one.bytes)}", markup=False, soft_wrap=True)
    total = sum(one.bytes for one in seen)
    if not yes:
        question = f"Remove {count_text(len(folders), 'cache')} and free {bytes_text(total)}?"
        if as_json:
            raise ConfigError("Nothing was removed: with --json there is no question to answer.", "Give --yes.")
        try:
            agreed = typer.confirm(question)
        except typer.Abort as error:
            if not isinstance(error.__context__, EOFError):  # Ctrl-C
                raise
            raise ConfigError("Nothing was removed: the question got no answer.", "Give --yes.") from None
        if not agreed:
            console.print("Nothing was removed.")
            raise typer.Exit(1)
    for one in seen:
        done(remove(one))
    if as_json:
        print_json({"removed": [str(folder) for folder in folders], "bytes": total})
