"""``kr2cache predict``: label new text with a trained reader."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kr2cache.commands.defaults import merge
from kr2cache.commands.loading import loading
from kr2cache.commands.options import Device, DeviceMap, Json, checked, print_json
from kr2cache.commands.settings import OPTIONS
from kr2cache.errors import ConfigError
from kr2cache.system.console import console, count_text, note, to_stderr
from kr2cache.system.device import check_device_map, check_device_name
from kr2cache.toml import read_toml
from kr2cache.training.runs import RunFolder

if TYPE_CHECKING:
    from kr2cache.prediction.predict import Predicted, Predictor
    from kr2cache.tasks import Example


def predict_cli(
    run: Annotated[Path, typer.Option(help="The folder of a run: runs/TASK/.../seed-1.", callback=checked)],
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="Each is one example: words separated by spaces, or texts separated by tabs. Or give --file.",
            metavar="TEXT",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A file in the task's format, labels optional, or with one example per line. - is standard input."
        ),
    ] = None,
    conllu: Annotated[bool, typer.Option("--conllu", help="For tagging: print CoNLL-U.")] = False,
    device: Device = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Label new text. Resource and reader run on it; no cache is needed."""
    if bool(text) == (file is not None):
        raise ConfigError(
            "No text to label." if not text else "Both texts and --file were given.",
            "Give texts as arguments, or --file PATH, or --file - for standard input.",
        )
    if conllu and as_json:
        raise ConfigError("--conllu and --json cannot be combined.", "Give only one of them.")
    to_stderr()  # standard output is for predictions only
    toml = read_toml(Path.cwd(), OPTIONS)
    where = merge(toml, device=device, device_map=device_map)
    check_device_name(where.get("device", "auto"))
    check_device_map(where.get("device_map"), where.get("device", "auto"))
    RunFolder(run).read_config()
    with loading(as_json):
        from kr2cache.prediction.predict import Predictor
        from kr2cache.prediction.texts import as_text, read_file, read_lines, score, typed_lines
        from kr2cache.prediction.texts import conllu as to_conllu

    predictor = Predictor.load(run, toml.models, tasks=toml.tasks, **where)
    task = predictor.task
    if file is None:
        examples = read_lines(task, text or (), name="text")
    elif str(file) == "-":
        examples = read_lines(task, typed_lines(sys.stdin.buffer, "standard input"))
    else:
        examples = read_file(task, file)
    predicted = predictor(examples)
    metrics = score(task, examples, predicted)
    _note_missing_words(predictor, examples, predicted)
    if as_json:
        print_json({"task": task.name, "predictions": [one.json() for one in predicted], "metrics": metrics})
        return
    if conllu:
        sys.stdout.write(to_conllu(task, examples, predicted))
        return
    for example, one in zip(examples, predicted, strict=True):
        sys.stdout.write(as_text(task, example, one) + "\n")
    if metrics is not None:
        console.print(
            "compared with the gold labels: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        )


def _note_missing_words(predictor: Predictor, examples: Sequence[Example], predicted: Sequence[Predicted]) -> None:
    without = [isinstance(one.predicted, list) and None in one.predicted for one in predicted]
    if partly := list(compress(examples, without)):
        missing = predictor.missing_words(partly)
        reasons = missing.reasons(predictor.max_length, "--max-length of train")
        note(f"{count_text(missing.total, 'word')} without a label, shown as _: {reasons}.")
