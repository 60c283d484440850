"""The table of kr2cache/models/README.md: what each architecture of transformers' ``AutoModel`` can serve as.

``python tests/models/table.py [NAME ...]`` prints it in Markdown, in minutes. Models are tiny and random.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from architectures import NAMES, tiny_config, try_resource
from transformers import PretrainedConfig
from transformers.utils import logging

from kr2cache.errors import KR2CacheError
from kr2cache.experiment.suitability import TASKS
from kr2cache.fusion import parse_fusion
from kr2cache.models.registry import ModelSpec
from kr2cache.system.console import console
from kr2cache.tasks import find_task
from kr2cache.tasks.base import Head
from kr2cache.training.admission import ROUNDING, check_appended
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.kreader import KReader, task_class
from kr2cache.training.resource_input import InputSettings

COLUMNS = ("architectures", "extract", "equal", "kr2 token", "kr2 sequence", "kr2 choice", "predict")
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
YES, NOTHING, FAULT = "yes", "–", "FAULT"
TEXT = "über das haus ran there"
LAYERS, STATES, WIDTH = 3, 4, 10
"""Of the resource of the trained reader: layers, states of a text, and their width."""

EXTRACT_WORDS = (
    ("reads no text", "refused: reads no text"),
    (r"requires the \w+ library", "not tried: needs another library"),
    ("No model can be built", "not tried: no tiny model"),
    ("shorten the text", "refused: shortens the text"),
    (r"gives \d+ layers of shapes", "refused: not one state per token and layer"),
    ("adds positions", "refused: adds positions before the text"),
    ("draws random|are random", "refused: random states"),
    (r"has (\w+) .*; it must be", r"refused: no \1 in its configuration"),
    ("The maximal length", "not tried: fewer than 64 positions"),
    ("have to specify|has to be not-None", "refused: needs more than text"),
    ("gives no tuple of hidden states", "refused: gives no hidden states"),
    ("fails on its first text", "not tried: tiny model fails"),
)
"""What an error says, and how the table says it."""
READER_WORDS = (
    ("No model can be built", "not tried"),
    ("reads texts with its", "part of a model"),
    ("reads no text", "reads no text"),
    (r"has (\w+) .*; it must be", r"no \1"),
    ("causal", "causal"),
    ("do not change the logits", "states not seen"),
    ("with all states of the resource masked", "masked states count"),
    ("states that are masked", "masked states seen"),
    ("a sequence alone", "other sequences seen"),
    ("no module of it", "no place"),
    ("did not reach the encoder", "states not seen"),
    ("fails: ", "fails"),
)


class Row(NamedTuple):
    """The cells of an architecture, in words."""

    extract: str
    equal: str
    """Whether the states are transformers' own of each text alone."""
    token: str
    """Whether it can be a KReader of method kr2 with this head, or the check that failed."""
    sequence: str
    choice: str
    predict: str
    """Whether a KReader of it that is saved and loaded gives the same logits on a text, with every head."""


def row_of(name: str, folder: Path) -> Row:
    """Try an architecture in every role.

    Args:
        folder: An empty folder.
    """
    readers = [try_reader(name, head, folder / head) for head in get_args(Head)]
    kept = {kept for _, kept in readers if kept is not None}
    predict = NOTHING if not kept else YES if kept == {True} else "no"
    cells = dict(zip(get_args(Head), (said for said, _ in readers), strict=True))
    extracted, equal = _resource(name, folder)
    return Row(extracted, equal, cells["token"], cells["sequence"], cells["choice"], predict)


def _resource(name: str, folder: Path) -> tuple[str, str]:
    outcome = try_resource(name, folder)
    if outcome.kind in ("equal", "differs"):
        return YES, YES if outcome.kind == "equal" else f"no: {outcome.text}"
    if outcome.kind == "failed":
        return f"{FAULT}: {outcome.text}", NOTHING
    return ("not tried: no tiny model" if outcome.kind == "untried" else _short(outcome.text, EXTRACT_WORDS)), NOTHING


def try_reader(name: str, head: Head, folder: Path) -> tuple[str, bool | None]:
    """Whether the architecture is admitted as a reader with a resource, in words; and whether a KReader of it is the
    same after it was saved and loaded, None if it is not admitted.
    """
    try:
        config = _config(name)
    except Exception:
        return NOTHING, None
    if type(config) not in task_class(head, config)._model_mapping:
        return NOTHING, None
    config.save_pretrained(folder)
    spec, task = ModelSpec(name=name, path=folder, random_seed=0), find_task(TASKS[head])
    torch.manual_seed(0)
    try:
        model = TaskCheckpoint(spec, head, task.labels).task_model().eval()
        check_appended(model, head, 16, name)
        return YES, _is_kept(model, head, folder / "trained")
    except KR2CacheError as error:
        return _short(error.message, READER_WORDS), None
    except Exception as error:
        return f"{FAULT}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None


@lru_cache(maxsize=1)  # of one architecture, for all heads
def _config(name: str) -> PretrainedConfig:
    """With weights larger than usual, so that what a model sees moves its output far beyond rounding. With weights much
    larger still, attention looks at one position alone, and MobileBERT seems blind.
    """
    config = tiny.reader_config(name, positions=64) if name in tiny.READERS else tiny_config(name)
    if hasattr(config, "initializer_range"):
        config.initializer_range = 0.1
    if getattr(config, "pad_token_id", None) is None:  # or a decoder's classifier refuses batches
        config.pad_token_id = tiny.PAD_ID
    return config


def _is_kept(model: Any, head: Head, folder: Path) -> bool:
    settings = InputSettings(fusion=parse_fusion("fuse", LAYERS), projection="mlp", resource_width=WIDTH)
    reader = KReader(model, head, [settings]).eval()
    reader.save(folder)
    tokens = tiny.tokenizer()(TEXT, return_tensors="pt")
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    if head == "choice":
        inputs = {key: one.expand(2, -1)[None] for key, one in inputs.items()}
    sequences = 2 if head == "choice" else 1
    inputs["resource_states"] = torch.randn(sequences, LAYERS, STATES, WIDTH)
    inputs["resource_mask"] = torch.ones(sequences, STATES, dtype=torch.long)
    with torch.no_grad():
        again, before = KReader.load(folder)(**inputs)["logits"], reader(**inputs)["logits"]
    return bool((again - before).abs().max() <= ROUNDING * before.abs().max())


def _short(message: str, words: tuple[tuple[str, str], ...]) -> str:
    for pattern, short in words:
        if found := re.search(pattern, message):
            return found.expand(short)
    return f"refused: {message}"


def markdown(rows: dict[str, Row]) -> str:
    """One line for all architectures of equal cells; the readers first."""
    groups: dict[Row, list[str]] = {}
    for name, row in rows.items():
        groups.setdefault(row, []).append(name)

    def rank(row: Row) -> tuple[Any, ...]:
        return (-row.count(YES), row.extract != YES, row)

    lines = [f"| {', '.join(sorted(groups[row]))} | {' | '.join(row)} |" for row in sorted(groups, key=rank)]
    return "\n".join([HEADER, *lines])


def parsed(page: str) -> dict[str, Row]:
    """The rows of the table in a page."""
    body = page.partition(HEADER)[2].partition("\n\n")[0]
    rows = {}
    for line in body.strip().splitlines():
        names, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows |= dict.fromkeys(names.split(", "), Row(*cells))
    return rows


def main() -> None:
    console.quiet = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = {}
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row_of(name, Path(folder))
        print(name, *rows[name], sep="\t", file=sys.stderr, flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
