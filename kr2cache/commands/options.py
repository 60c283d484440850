"""What several commands share: options by their long names, and how they are filled in and printed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import CallbackParam
from typer.core import TyperCommand, TyperOption
from typer.models import CommandFunctionType

from kr2cache.commands.defaults import OPTIONS
from kr2cache.commands.hints import more_advice
from kr2cache.config import Toml, local, read_toml
from kr2cache.errors import KR2CacheError, UsageError
from kr2cache.models.registry import known_models
from kr2cache.system.console import console


def model_names() -> list[str]:
    with contextlib.suppress(KR2CacheError):
        return list(known_models(read_toml(Path.cwd(), OPTIONS).models))
    return []


def checked(value: Path | None, param: CallbackParam) -> Path | None:
    """The value of an option or argument that names a folder or file, unless it is a URL."""
    name = param.opts[0]
    return None if value is None else local(value, name if name.startswith("-") else name.upper())


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document; people's output goes to standard error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Task = Annotated[
    str | None,
    typer.Option(help="udpos-LANG, snli, swag, piqa, hellaswag (kr2cache tasks). Default: of the resource's language."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder with train, dev and test in the task's format, or a hub data set. Default: the task's own."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first N examples of each split.", show_default="all")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", show_default="auto")]
RunDir = Annotated[Path | None, typer.Option(help="Where runs go.", show_default="runs", callback=checked)]
Seeds = Annotated[str | None, typer.Option(help="One run each.", show_default="1,2,3")]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Where caches are.", show_default="$KR2CACHE_DIR, else .kr2cache", callback=checked),
]


SEVERAL = {
    "seeds": "Give them in one list: --seeds 1,2",
    "layers": "Give them in one list: --layers 0,3,5",
    "resource": "Several resources are not supported yet: run the command once for each.",
}
"""What to do instead of giving an option twice, where the reader may have meant a list."""


class Command(TyperCommand):
    """A command that refuses an option given twice (the last value would silently win), and whose errors advise only
    what it has.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of one command.

        Raises:
            UsageError: For an option with a value that is given more than once. Flags may be repeated.
        """
        if not ctx.resilient_parsing:  # completion looks at half-typed lines
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for option in order:
                if not isinstance(option, TyperOption) or option.is_flag or option.multiple or option.count:
                    continue
                if (times := order.count(option)) > 1:
                    raise UsageError(
                        f"{option.opts[0]} is given {times} times, but takes one value.",
                        SEVERAL.get(option.name, "Give it once."),
                    )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error that it ends with advises what this command has."""
        try:
            return super().invoke(ctx)
        except KR2CacheError as error:
            own = {name.lstrip("-") for option in self.params for name in option.opts}
            more = more_advice(str(ctx.info_name), own, f"{error.message} {error.remedy}")
            error.remedy = " ".join([error.remedy, *more]).strip()
            raise


class App(typer.Typer):
    """A group of commands, each a ``Command``."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, cls=Command, **settings)


def merge(toml: Toml, **given: Any) -> dict[str, Any]:
    """What was given on the command line, over ``[defaults]``; what neither gives is left out."""
    values = {name: toml.defaults[name] for name in given if name in toml.defaults}
    return values | {name: value for name, value in given.items() if value is not None}


def print_json(document: Any) -> None:
    if console.quiet:
        return
    text = json.dumps(document, ensure_ascii=False, indent=2)
    # An error may quote an argument that is not UTF-8; \udce4 is how JSON writes such a byte.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()
