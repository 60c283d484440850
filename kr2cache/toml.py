"""``kr2cache.toml`` of the working folder, and what all TOML files have in common."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kr2cache.config import local
from kr2cache.errors import ConfigError, DataError, unknown_name
from kr2cache.system import utf8

TOML = "kr2cache.toml"


@dataclass(frozen=True, kw_only=True)
class Toml:
    """``kr2cache.toml`` of the working folder; empty if there is no such file."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Options by their long names, with underscores for dashes."""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """Declarations by name; from Python also ``Task`` objects."""
    training: Mapping[str, Any] = field(default_factory=dict)


def load_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: If it is not TOML.
        OSError: If it cannot be read.
    """
    try:
        return tomllib.loads("".join(utf8.file_lines(path)))
    except DataError as error:
        raise ConfigError(error.message, error.remedy) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", "Correct the file.") from error


SECTIONS = ("defaults", "models", "tasks", "training")


def read_toml(folder: Path, options: Mapping[str, type]) -> Toml:
    """Read ``kr2cache.toml``. The file only sets values; it cannot run code.

    Args:
        folder: Where to look.
        options: The long option names that ``[defaults]`` may give, without dashes in front, and their types.

    Raises:
        ConfigError: If it is not TOML, or a section or value has the wrong type.
        UnknownNameError: For a section or option that does not exist.
    """
    path = folder / TOML
    if not path.is_file():
        return Toml()
    content = load_toml(path)
    for section, value in content.items():
        if section not in SECTIONS:
            raise unknown_name(f"section in {TOML}:", section, SECTIONS)
        if not isinstance(value, dict):
            raise ConfigError(f"{section} in {TOML} is not a section.", f"Write [{section}].")
    defaults = {}
    for name, value in content.get("defaults", {}).items():
        key = name.replace("_", "-")
        if key not in options:
            raise unknown_name(f"option under [defaults] in {TOML}:", name, options)
        defaults[key.replace("-", "_")] = typed(key, value, options[key], f"[defaults] in {TOML}")
    models = content.get("models", {})
    for name, value in models.items():
        if not isinstance(value, dict):
            raise ConfigError(f"models.{name} in {TOML} is not a section.", f'Write [models.{name}] and path = "..."')
    tasks = content.get("tasks", {})
    for name, value in tasks.items():
        if not isinstance(value, dict):
            raise ConfigError(
                f"tasks.{name} in {TOML} is not a section.", f'Write [tasks.{name}] and kind = "classification".'
            )
    return Toml(defaults=defaults, models=models, tasks=tasks, training=content.get("training", {}))


KIND_NAMES: dict[type, str] = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path in quotes",
}
"""Names of the types of options, for messages."""
LIST_OF = {
    "resource": "text in quotes, or a list of such",
    "seeds": "a list of whole numbers, such as [1, 2]",
    "layers": "text in quotes, or a list such as [0, 3]",
}
"""Options that take a list, and the name of their type for messages."""


def typed(key: str, value: Any, kind: type, where: str) -> Any:
    """``value`` in the type of the option ``key``: a list becomes text, a whole number a float, text a path.

    Args:
        where: Where the value was read, for the error.

    Raises:
        ConfigError: If it has another type, or is a URL instead of a path.
    """
    if key == "resource" and isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value) if len(value) > 1 else value[0]
    if key in LIST_OF and isinstance(value, list):
        value = ",".join(map(str, value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is Path and isinstance(value, str):
        value = local(Path(value), f"{key} in {where}:").expanduser()
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = LIST_OF.get(key) or KIND_NAMES[kind]
        raise ConfigError(f"{key} = {value!r} in {where} should be {wanted}.", "Correct it.")
    return value
