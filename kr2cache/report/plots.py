"""Plots: scores by layer, learned fusion weights, training curves, and time and disk space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kr2cache.report.others import labels, sort
from kr2cache.report.records import Collected, Configuration, Run, mean_and_std, number
from kr2cache.report.scores import METRICS
from kr2cache.report.svg import DASHES, GREY, MARKERS, PALETTE, Plot, canvas, draw, named_apart
from kr2cache.system.console import bytes_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Shown = TypeVar("Shown")
Members = list[tuple[Configuration, tuple[int, ...]]]
"""Configurations, each with the seeds to plot."""

MOST_TICKS = 16
BARS = 60
"""Maximum number of bars in one plot, so that it fits on a page."""
LEGEND: Final = "outside lower center"
_LINES = {
    "all": "average of all",
    "last": "average of the last ",
    "fuse": "trainable",
    "softmax": "trainable, sum 1",
    "mix": "ELMo's scalar mix",
}


def plots(found: Collected) -> list[Plot]:
    """All plots that the runs have data for."""
    drawn = [plot for title, members in _layer_members(found) for plot in scores_by_layer(title, members)]
    tasks = sorted({one.task for one in found.configurations})
    rows = _rows(found)
    for draws in (fusion_weights, training_curves, time_and_bytes):
        for task in tasks:
            of_task = sort([one for one in found.configurations if one.task == task])
            drawn += draws(task, of_task, labels(of_task, rows))
    return named_apart(drawn)


def _rows(found: Collected) -> dict[str, str]:
    """Folder to the row that a configuration fills, if the rows of all sweeps that it fills have the same name."""
    rows: dict[str, set[str]] = {}
    for sweep in found.sweeps:
        for cell in sweep.cells.values():
            if cell.configuration is not None:
                rows.setdefault(cell.configuration.folder, set()).add(cell.row)
    return {folder: next(iter(names)) for folder, names in rows.items() if len(names) == 1}


def scores_by_layer(title: str, members: Members) -> list[Plot]:
    """The score of each single layer. Horizontal lines show the reader alone and the other fusions.

    One plot for each method, pair of models and training settings with at least two layers.
    """
    groups: dict[tuple[object, ...], Members] = {}
    for one, seeds in members:
        if one.fusion:
            settings = {name: value for name, value in one.settings.items() if name != "fusion_learning_rate"}
            key = (one.method, one.reader, one.helper, *sorted(settings.items()))
            groups.setdefault(key, []).append((one, seeds))
    layered = [
        group for group in groups.values() if len({one.fusion for one, _ in group if _layer(one) is not None}) > 1
    ]
    drawn: list[Plot] = []
    for group in layered:
        first = group[0][0]
        alone = [(one, seeds) for one, seeds in members if one.method == "kreader" and _same_training(one, first)]
        models = f", {first.helper} → {first.reader}" if len(layered) > 1 else ""
        shown = f"Score by layer: {title}{models}"
        alike = sum(plot.title.startswith(shown) for plot in drawn)  # plots of the same models with other settings
        drawn.append(_draw_layers(f"{shown} ({alike + 1})" if alike else shown, group, alone[:1]))
    return drawn


def _draw_layers(title: str, group: Members, alone: Members) -> Plot:
    metric, split = group[0][0].metric, group[0][0].split
    points = sorted((layer, *_percent(one, seeds)) for one, seeds in group if (layer := _layer(one)) is not None)
    lines = [("KReader alone", _percent(one, seeds)[0]) for one, seeds in alone]
    lines += [(_fusion_label(one.fusion), _percent(one, seeds)[0]) for one, seeds in group if _layer(one) is None]
    with canvas(height=3.6) as figure:
        axes = figure.subplots()
        handles: list[Any] = [
            axes.errorbar(
                [layer for layer, _, _ in points],
                [mean for _, mean, _ in points],
                yerr=[std or 0.0 for _, _, std in points],
                color=PALETTE[0],
                marker=MARKERS[0],
                capsize=3,
                label="one layer",
            )
        ]
        for (label, mean), color, dashes in zip(lines, PALETTE[1:], DASHES[1:], strict=False):
            handles.append(axes.axhline(mean, color=color, linestyle=dashes, label=label))
        _ticks(axes, [layer for layer, _, _ in points])
        axes.set_xlabel("layer of the resource (0: word embeddings)")
        axes.set_ylabel(f"{METRICS.get(metric, metric)} on {split} (%)")
        figure.legend(handles=handles, loc=LEGEND, ncols=2)
        numbers = "; ".join(f"layer {layer}: {mean:.1f}" for layer, mean, _ in points)
        others = "".join(f"; {label}: {mean:.1f}" for label, mean in lines)
        return draw(
            figure, title, "Mean over seeds; bars show one sample standard deviation.", f"{title}. {numbers}{others}."
        )


def fusion_weights(task: str, configurations: Sequence[Configuration], names: dict[str, str]) -> list[Plot]:
    """The learned weights w of equation 1 as they act: mean over seeds, and a band from the smallest to the largest."""
    learned = [line for one in configurations for line in _learned(one, names[one.folder])]
    drawn = []
    for title, chunk in _chunks(f"Learned fusion weights: {task}", learned):
        with canvas(height=3.2 + 0.2 * len(chunk)) as figure:
            axes = figure.subplots()
            for position, (label, layers, weights) in enumerate(chunk):
                by_layer = list(zip(*weights, strict=True))
                means = [mean_and_std(values)[0] for values in by_layer]
                lowest, highest = [min(values) for values in by_layer], [max(values) for values in by_layer]
                color = PALETTE[position]
                axes.fill_between(layers, lowest, highest, color=color, alpha=0.18, linewidth=0)
                axes.plot(layers, means, color=color, marker=MARKERS[position], label=label)
            for depth in sorted({len(layers) for _, layers, _ in chunk}):
                axes.axhline(1 / depth, color=GREY, linestyle="--", label=f"uniform over {depth} layers")
            _ticks(axes, sorted({layer for _, layers, _ in chunk for layer in layers}))
            axes.set_xlabel("layer of the resource (0: word embeddings)")
            axes.set_ylabel("weight")
            figure.legend(loc=LEGEND, ncols=1 if len(chunk) < 3 else 2)
            caption = "Mean over seeds; the band reaches from the smallest to the largest value."
            drawn.append(draw(figure, title, caption, f"{title}: {', '.join(label for label, *_ in chunk)}."))
    return drawn


def training_curves(task: str, configurations: Sequence[Configuration], names: dict[str, str]) -> list[Plot]:
    """Loss by epoch, and below it the score on dev if there is one; means over seeds."""
    trained = [one for one in configurations if _curve(one, "loss")]
    drawn = []
    for title, chunk in _chunks(f"Training curves: {task}", trained):
        metric = chunk[0].metric
        panels = [("loss", "training loss", 1)]
        if any(_curve(one, f"dev_{metric}") for one in chunk):
            panels.append((f"dev_{metric}", f"{METRICS.get(metric, metric)} on dev (%)", 100))
        with canvas(height=0.9 + 2.2 * len(panels) + 0.1 * len(chunk)) as figure:
            stacked: list[Axes] = list(figure.subplots(len(panels), sharex=True, squeeze=False).flat)
            for axes, (name, label, factor) in zip(stacked, panels, strict=True):
                for position, one in enumerate(chunk):
                    curve = _curve(one, name)
                    axes.plot(
                        list(curve),
                        [factor * value for value in curve.values()],
                        color=PALETTE[position],
                        marker=MARKERS[position],
                        label=names[one.folder],
                    )
                axes.set_ylabel(label)
            stacked[-1].set_xlabel("epoch")
            _ticks(stacked[-1], sorted({epoch for one in chunk for epoch in _curve(one, "loss")}))
            figure.legend(handles=stacked[0].get_lines(), loc=LEGEND, ncols=2)
            drawn.append(draw(figure, title, "Means over seeds.", f"{title}: {_listed(chunk, names)}."))
    return drawn


def time_and_bytes(task: str, configurations: Sequence[Configuration], names: dict[str, str]) -> list[Plot]:
    """Seconds per run, and bytes of the caches it read: one bar per configuration."""
    known = [one for one in configurations if any(run.seconds or run.cache_bytes for run in one.runs.values())]
    return [_draw_bars(title, chunk, names) for title, chunk in _chunks(f"Time and disk: {task}", known, BARS)]


def _draw_bars(title: str, shown: Sequence[Configuration], names: dict[str, str]) -> Plot:
    seconds = {one.folder: _mean(one, lambda run: run.seconds) for one in shown}
    sizes = {one.folder: _mean(one, lambda run: run.cache_bytes) for one in shown}
    panels = [
        (values, label, text)
        for values, label, text in ((seconds, "time of a run", seconds_text), (sizes, "its caches", bytes_text))
        if any(values.values())
    ]
    with canvas(height=0.9 + 0.27 * len(shown)) as figure:
        both: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False).flat)
        for axes, (values, label, text) in zip(both, panels, strict=True):
            known = [(position, values[one.folder]) for position, one in enumerate(shown)]
            bars = [(position, value) for position, value in known if value is not None]
            unit, factor = _unit(max(value for _, value in bars), text)
            drawn = axes.barh([position for position, _ in bars], [v / factor for _, v in bars], color=PALETTE[0])
            axes.bar_label(drawn, [text(value) for _, value in bars], padding=3, fontsize=8)
            axes.set_xlim(0, (1.3 if len(panels) == 1 else 1.8) * max(value for _, value in bars) / factor or 1)
            axes.set_xlabel(f"{label} ({unit})")
            axes.grid(visible=False, axis="y")
        both[0].set_yticks(range(len(shown)), [names[one.folder] for one in shown])
        both[0].set_ylim(len(shown) - 0.4, -0.6)
        caption = "Means over seeds. Runs that share a cache show the same size."
        described = "; ".join(
            ": ".join(
                (names[one.folder], ", ".join(text(v) for values, _, text in panels if (v := values[one.folder])))
            )
            for one in shown
        )
        return draw(figure, title, caption, f"{title}. {described}.")


def _ticks(axes: Axes, places: Sequence[float]) -> None:
    """Set ticks of the horizontal axis at ``places``, or at some whole numbers if there are too many places."""
    from matplotlib.ticker import MaxNLocator

    if len(places) > MOST_TICKS:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_xticks(places, [f"{place:g}" for place in places])
    if len(places) == 1:  # by default matplotlib would show 5 % of its value on both sides
        axes.set_xlim(places[0] - 0.5, places[0] + 0.5)


def _layer_members(found: Collected) -> list[tuple[str, Members]]:
    """Candidates for plots by layer: each column of each sweep, and the other runs of each task."""
    groups: list[tuple[str, Members]] = []
    for sweep in found.sweeps:
        for column in sweep.columns:
            cells = [cell for cell in sweep.column(column) if cell.done]
            members = [(cell.configuration, cell.done) for cell in cells if cell.configuration is not None]
            groups.append((f"{sweep.title}, {column}", members))
    for task in sorted({one.task for one in found.uncovered}):
        groups.append((task, [(one, tuple(one.runs)) for one in sort(found.uncovered) if one.task == task]))
    return groups


def _layer(one: Configuration) -> int | None:
    digits = one.fusion.removeprefix("layer")
    return int(digits) if digits != one.fusion and digits.isdigit() else None


def _same_training(one: Configuration, other: Configuration) -> bool:
    shared = one.settings.keys() & other.settings.keys()
    return one.reader == other.reader and all(one.settings[name] == other.settings[name] for name in shared)


def _fusion_label(fusion: str) -> str:
    for start, label in _LINES.items():
        if fusion.startswith(start):
            return label + fusion.removeprefix(start)
    return fusion


def _percent(one: Configuration, seeds: Iterable[int]) -> tuple[float, float | None]:
    return mean_and_std([100 * value for value in one.values(one.metric, seeds)])


def _learned(one: Configuration, name: str) -> list[tuple[str, tuple[int, ...], list[tuple[float, ...]]]]:
    """For each resource whose weights were learned: what to call it, its layers, and the weights of each seed.

    The mean of gamma belongs to the name, if the weighted sum is multiplied by it.
    """
    lines = []
    for resource, fused in one.first.fusions.items():
        alike = [run.fusions[resource] for run in one.runs.values() if resource in run.fusions]
        seeds = [other for other in alike if other.weights and other.layers == fused.layers]
        weights = [other.weights for other in seeds if other.weights]
        gammas = [other.gamma for other in seeds if other.gamma is not None]
        gamma = f"gamma {mean_and_std(gammas)[0]:.3f}" if gammas else ""
        if weights:
            lines.append((", ".join(filter(None, (name, resource, gamma))), fused.layers, weights))
    return lines


def _curve(one: Configuration, name: str) -> dict[float, float]:
    """Epoch to mean over seeds, epochs ascending."""
    by_epoch: dict[float, list[float]] = {}
    for run in one.runs.values():
        for entry in run.history:
            epoch, value = number(entry.get("epoch")), number(entry.get(name))
            if epoch is not None and value is not None:
                by_epoch.setdefault(epoch, []).append(value)
    return {epoch: mean_and_std(values)[0] for epoch, values in sorted(by_epoch.items())}


def _mean(one: Configuration, value_of: Callable[[Run], float | None]) -> float | None:
    values = [value for run in one.runs.values() if (value := value_of(run)) is not None]
    return mean_and_std(values)[0] if values else None


def _unit(largest: float, text: Callable[[float], str]) -> tuple[str, float]:
    """The unit of an axis and its size, as ``text`` would write ``largest``."""
    if text is seconds_text:
        return ("h", 3600) if largest >= 7200 else ("min", 60) if largest >= 120 else ("s", 1)
    powers = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    unit = bytes_text(largest).split(" ")[1]
    return unit, powers[unit]


def _chunks(title: str, lines: list[Shown], size: int = len(PALETTE)) -> list[tuple[str, list[Shown]]]:
    """Split lines over several plots, ``size`` per plot; by default one per colour."""
    chunks = [lines[start : start + size] for start in range(0, len(lines), size)]
    if len(chunks) < 2:
        return [(title, chunk) for chunk in chunks]
    return [(f"{title} ({position} of {len(chunks)})", chunk) for position, chunk in enumerate(chunks, 1)]


def _listed(configurations: Sequence[Configuration], names: dict[str, str]) -> str:
    return ", ".join(names[one.folder] for one in configurations)
