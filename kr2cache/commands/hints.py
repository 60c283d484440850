"""Advice for the running command. A stage serves several commands, so its error may name an option they do not have."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from kr2cache.commands.settings import OPTIONS, TRAIN_OPTIONS
from kr2cache.toml import TOML

OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
OTHER_COMMAND = re.compile(r"(?:\bkr2cache [a-z]|\b[Ee]xtract again|\btorchrun)[^.;\n]*")
"""A command inside the advice. Its options belong to that command."""

OF_EXTRACT = {name for name in OPTIONS if name not in TRAIN_OPTIONS} | {"dtype", "compute-dtype"}
ELSEWHERE: dict[str, tuple[Collection[str], str]] = {
    "train": (OF_EXTRACT, "{} of kr2cache extract: run it first, then train reads its cache."),
    "sweep": (TRAIN_OPTIONS, "{} of a grid: write the name without dashes under [settings], in a row or in a column."),
    "demo": ({"cache-dir", "run-dir"}, "{} of other commands: the demo puts both below --folder."),
    "bench": ({"cache-dir", "run-dir"}, "{} of other commands: bench works in --folder."),
}
"""By command: options that it lacks, and the sentence about them."""


def more_advice(command: str, own: Collection[str], text: str) -> list[str]:
    """Sentences to add to an error.

    Args:
        command: The running command.
        own: Its options, without dashes.
        text: The error's message and remedy.
    """
    named = dict.fromkeys(OPTION.findall(OTHER_COMMAND.sub("", text)))
    others, sentence = ELSEWHERE.get(command, ((), ""))
    lacking = [f"--{name}" for name in named if name in others and name not in own]
    more = []
    if lacking:
        are = "is an option" if len(lacking) == 1 else "are options"
        more.append(sentence.format(f"{' and '.join(lacking)} {are}"))
    if TOML in text and (above := _toml_above()) is not None:
        more.append(
            f"{above} is not in the working folder, so it is not read: run the command there (cd {above.parent})."
        )
    return more


def _toml_above() -> Path | None:
    """The nearest ``kr2cache.toml`` in a folder above; None if the working folder has one."""
    here = Path.cwd()
    if (here / TOML).is_file():
        return None
    return next((folder / TOML for folder in here.parents if (folder / TOML).is_file()), None)
