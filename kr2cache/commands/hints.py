"""Makes advice fit the command at hand: an error may come from a stage that several commands run."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from kr2cache.commands.settings import OPTIONS, TRAIN_OPTIONS
from kr2cache.config import TOML

OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
OTHER_COMMAND = re.compile(r"(?:\bkr2cache [a-z]|\b[Ee]xtract again|\btorchrun)[^.;\n]*")
"""Within a command that the advice spells out, options are that command's."""

OF_EXTRACT = {name for name in OPTIONS if name not in TRAIN_OPTIONS} | {"dtype", "compute-dtype"}
ELSEWHERE: dict[str, tuple[Collection[str], str]] = {
    "train": (OF_EXTRACT, "{} of kr2cache extract: run that first, and train reads its cache."),
    "sweep": (TRAIN_OPTIONS, "{} of a grid: write the name without dashes under [settings], in a row or in a column."),
    "demo": ({"cache-dir", "run-dir"}, "{} of other commands: the demo has both below --folder."),
    "bench": ({"cache-dir", "run-dir"}, "{} of other commands: bench works in --folder."),
}
"""What to say of options that a command lacks: command to their names and the sentence."""


def more_advice(command: str, own: Collection[str], text: str) -> list[str]:
    """Sentences that an error needs where it is shown.

    Args:
        command: The command at hand.
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
        more.append(f"{above} is not read from here: run the command in its folder (cd {above.parent}).")
    return more


def _toml_above() -> Path | None:
    """The nearest ``kr2cache.toml`` of a folder above, where the working folder has none."""
    here = Path.cwd()
    if (here / TOML).is_file():
        return None
    return next((folder / TOML for folder in here.parents if (folder / TOML).is_file()), None)
