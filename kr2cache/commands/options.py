"""What the commands share: how options are declared, filled in from ``kr2cache.toml`` and printed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import CallbackParam
from typer.core import TyperArgument, TyperCommand, TyperOption
from typer.models import CommandFunctionType

from kr2cache.commands.hints import more_advice
from kr2cache.commands.settings import (
    CACHE_DIR,
    DATA,
    DEVICE,
    DEVICE_MAP,
    LIMIT,
    OPTIONS,
    WEIGHTS_DTYPE,
    Setting,
    default_text,
    kind,
)
from kr2cache.config import ExtractConfig, TrainConfig, local
from kr2cache.errors import KR2CacheError, UsageError
from kr2cache.models.registry import known_models
from kr2cache.system.console import console
from kr2cache.tasks import task_names
from kr2cache.toml import read_toml

REPEATED = ((TrainConfig, "resource"),)
"""Options that may be given more than once."""
MODELS = ("resource", "reader", "teacher")
"""Options that the shell completes with names of models."""


def model_names() -> list[str]:
    with contextlib.suppress(KR2CacheError):
        return list(known_models(read_toml(Path.cwd(), OPTIONS).models))
    return []


def task_completions() -> list[str]:
    with contextlib.suppress(KR2CacheError):
        return [*task_names(), *read_toml(Path.cwd(), OPTIONS).tasks]
    return []


def checked(value: Path | None, param: CallbackParam) -> Path | None:
    """The value of an option or argument that names a folder or file.

    Raises:
        ConfigError: For a URL.
    """
    name = param.opts[0]
    return None if value is None else local(value, name if name.startswith("-") else name.upper())


def option(config: type[ExtractConfig | TrainConfig], name: str, setting: Setting) -> Any:
    """The typer option that sets the field ``name`` of ``config``."""
    as_type = kind(config, name)
    return typer.Option(
        # Without a name of its own, typer would add --no-NAME to a flag.
        *([f"--{name.replace('_', '-')}"] if as_type is bool else []),
        help=setting.help,
        show_default=setting.default or default_text(config, name) or True,
        autocompletion=model_names if name in MODELS else None,
        callback=checked if as_type is Path else None,
    )


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document; text for people goes to standard error.")]
Data = Annotated[str | None, option(ExtractConfig, "data", DATA)]
Limit = Annotated[int | None, option(ExtractConfig, "limit", LIMIT)]
Device = Annotated[str | None, option(ExtractConfig, "device", DEVICE)]
DeviceMap = Annotated[str | None, option(ExtractConfig, "device_map", DEVICE_MAP)]
WeightsDtype = Annotated[str | None, option(ExtractConfig, "weights_dtype", WEIGHTS_DTYPE)]
CacheDir = Annotated[Path | None, option(ExtractConfig, "cache_dir", CACHE_DIR)]
DEBUG = Parameter(
    "debug",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")],
)


def takes(
    config: type[ExtractConfig | TrainConfig], settings: Mapping[str, Setting]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of ``settings``.

    The command gets what the user typed as its first argument: a dictionary of ``settings``, None for an option that
    was not given.
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            typed = {name: _one_or_several(values.pop(name)) for name in settings}
            command(typed, **values)

        first = [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    (list[str] if (config, name) in REPEATED else kind(config, name)) | None,
                    option(config, name, setting),
                ],
            )
            for name, setting in settings.items()
        ]
        _sign(run, [*first, *_parameters(command)[1:]])
        return run

    return with_options


def _one_or_several(value: Any) -> Any:
    """The values of an option that may be repeated: one by itself, several as a tuple, None for none."""
    if not isinstance(value, list):
        return value
    return tuple(value) if len(value) > 1 else next(iter(value), None)


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())


def _sign(function: Any, parameters: Iterable[Parameter]) -> None:
    """Make typer see these parameters of ``function``."""
    named = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in parameters]
    function.__signature__ = inspect.Signature(named)
    function.__annotations__ = {one.name: one.annotation for one in named}


SEVERAL = {
    "seeds": "Give them in one list: --seeds 1,2",
    "layers": "Give them in one list: --layers 0,3,5",
    "resource": "Run the command once for each of them.",
}
"""What to do instead of giving an option twice, if the user may have meant a list."""


class Command(TyperCommand):
    """A command that refuses an option given twice (typer would use the last value), and whose errors advise only
    options that it has.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for one in self.params:
            # Typer itself would put a default in words in a second pair of brackets: [default: (all)].
            if isinstance(one, (TyperArgument, TyperOption)) and isinstance(one.show_default, str):
                one.help = rf"{one.help} [dim]\[default: {one.show_default}][/]"
                one.show_default = False

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
        """Run the command. If it fails, add to the error what helps with this command."""
        try:
            return super().invoke(ctx)
        except KR2CacheError as error:
            own = {name.lstrip("-") for option in self.params for name in option.opts}
            more = more_advice(str(ctx.info_name), own, f"{error.message} {error.remedy}")
            error.remedy = " ".join([error.remedy, *more]).strip()
            raise


class App(typer.Typer):
    """A group of commands. Each is a ``Command`` and accepts ``--debug``, which ``cli.run`` handles."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        register = super().command(name, cls=Command, **settings)

        def add(function: CommandFunctionType) -> CommandFunctionType:
            @functools.wraps(function)
            def run(debug: bool, **values: Any) -> Any:
                return function(**values)

            _sign(run, [*_parameters(function), DEBUG])
            register(run)
            return function

        return add


def print_json(document: Any) -> None:
    if console.quiet:
        return
    text = json.dumps(document, ensure_ascii=False, indent=2)
    # An error may quote an argument that is not UTF-8: JSON writes such a byte as \udce4.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()
