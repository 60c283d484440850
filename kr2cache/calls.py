"""``kr2cache.extract`` and ``kr2cache.train``: both stages as functions, for scripts and notebooks.

They take the options of the commands by their long names, follow the same rules (``kr2cache.toml`` of the working
folder included) and keep to the same folders. So what one of them made, the other finds. Failures are
``KR2CacheError``, which says what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache.cache.reader import FeatureCache
from kr2cache.commands.defaults import extract_config, train_config
from kr2cache.commands.hints import OPTION, OTHER_COMMAND
from kr2cache.commands.settings import EXTRACT, OPTIONS, TRAIN, Setting, kind
from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.errors import ConfigError, InterruptedWorkError, KR2CacheError, unknown_name
from kr2cache.tasks import Task, split_name
from kr2cache.tasks.spool import texts_in_memory
from kr2cache.toml import Toml, read_toml, typed

if TYPE_CHECKING:
    from kr2cache.experiment.pipeline import TrainResult

OF_TEXTS = ("task", "data", "limit")
"""Options that say which texts are meant. Texts that are given in memory need none of them."""


def extract(
    model: str | Path | None = None,
    texts: Any = None,
    *,
    column: str | None = None,
    id_column: str | None = None,
    **options: Any,
) -> FeatureCache:
    """Run a frozen model once over texts, and store the hidden states of its layers. If they are stored already, the
    model does not run.

        cache = extract("minilm", ["The dog ran.", "It sleeps."])      # texts in memory
        cache = extract("minilm", task="udpos-de", data="corpus/de")   # as on the command line
        cache[cache.ids[0]]                                            # (L, T, D)

    Args:
        model: The resource: a name (``kr2cache models``), a hub id or a folder. None for the one in ``kr2cache.toml``.
        texts: An iterable of strings; of lists of words, so that tokens are aligned with your words; a dictionary of
            either by id; or a ``datasets.Dataset``. Ids are the keys, or ``train-0``, ``train-1`` and so on. None for
            the data that ``task``, ``data`` and ``split`` name.
        column: Of a data set: the column of the texts. Default: ``text``, or its only column.
        id_column: Of a data set: the column of the ids.
        options: The options of ``kr2cache extract`` by their long names: ``layers="last4"`` or ``layers=[0, 3]``,
            ``max_length=512``, ``cache_dir="caches"``. ``task`` may be a ``Task``. With texts in memory, ``split``
            names them: ``train`` (the default), ``dev`` or ``test``.

    Returns:
        The cache. Texts in memory are kept as task ``text`` (``words`` for lists of words), for example in
        ``.kr2cache/text/train/minilm-1f3a9c2e``. Ids and texts decide the digits: the same texts find the same cache,
        other texts get one beside it.

    Raises:
        DataError: If there is no text, or one is empty or no text, or an id occurs twice.
        KR2CacheError: One of its kinds, for everything else that is foreseen.
        KeyboardInterrupt: On Ctrl-C. The message says what is kept; the same call goes on from there.
    """
    with _advice_for_python():
        if model is not None and options.setdefault("resource", model) is not model:
            raise ConfigError(f"Two models are given: {model} and resource={options['resource']}.", "Give one.")
        toml, given = _given(ExtractConfig, EXTRACT, options, "kr2cache.extract()")
        if texts is None:
            if column is not None or id_column is not None:
                raise ConfigError("column and id_column are of texts, but there are none.", "Give texts.")
            return _extracted(extract_config(toml, **given))
        if named := [name for name in OF_TEXTS if given[name] is not None]:
            raise ConfigError(
                f"{' and '.join(named)} would name other data than texts.", "Give texts, or task, data and split."
            )
        # A limit under [defaults] is for other data: a part of the texts would come as a surprise.
        toml = dataclasses.replace(toml, defaults={**toml.defaults, "limit": None})
        split = split_name(given["split"] or "train")
        with texts_in_memory(texts, split, column, id_column) as (task, path):
            of_texts = {"task": task.name, "data": str(path), "split": split}
            return _extracted(extract_config(toml, **(given | of_texts)))


def train(*, extract: bool = True, training: Mapping[str, Any] | None = None, **options: Any) -> TrainResult:
    """Train readers on cached states, one run for each seed. Missing caches are made first; a finished run is not
    trained again.

        result = train(reader="xlm-r", resource="gottbert", data="corpus/de", fusion="last4", seeds=[1, 2])
        result.mean["test"]["accuracy"]

    Args:
        extract: Whether missing caches are made.
        training: Arguments of ``transformers.TrainingArguments``, such as ``{"bf16": True, "warmup_steps": 100}``. They
            are added to those under ``[training]`` in ``kr2cache.toml``, and replace them.
        options: The options of ``kr2cache train`` by their long names. ``resource`` may be a list of several, ``task``
            a ``Task``.

    Returns:
        The ``runs`` (seed, folder, metrics), and ``mean`` and ``std`` of their metrics by split.

    Raises:
        KR2CacheError: One of its kinds, for everything that is foreseen; before anything long runs, if possible.
        KeyboardInterrupt: On Ctrl-C. The message says what is kept; the same call goes on from there.
    """
    with _advice_for_python():
        toml, given = _given(TrainConfig, TRAIN, options, "kr2cache.train()")
        toml = dataclasses.replace(toml, training={**toml.training, **_training(training or {})})
        config = train_config(toml, extract=extract, **given)
        from kr2cache.experiment import checks, pipeline
        from kr2cache.models.files import model_folder
        from kr2cache.system.console import note

        model_folder(checks.check_training(config).reader)  # a download shows its own progress
        result = pipeline.train(config)
        for text in result.notes:
            note(text)
        return result


def _extracted(config: ExtractConfig) -> FeatureCache:
    from kr2cache.extraction import checks, planning
    from kr2cache.extraction.extract import describe_result
    from kr2cache.extraction.extract import extract as run
    from kr2cache.models.files import model_folder
    from kr2cache.system.console import waiting

    model_folder(checks.check_extraction(config).spec)
    with waiting(f"Reading and tokenising {config.task}/{config.split}"):
        plan = planning.plan_extraction(config)
    planning.describe(plan, "max_length")
    result = run(plan)
    describe_result(result)
    return FeatureCache.open(result.cache)


# Options --------------------------------------------------------------------------------------------------------------


def _given(
    config: type[ExtractConfig | TrainConfig], settings: Mapping[str, Setting], options: dict[str, Any], where: str
) -> tuple[Toml, dict[str, Any]]:
    """``kr2cache.toml``, and every option: None for one that is not given.

    Raises:
        UnknownNameError: For an option that does not exist.
        ConfigError: For a value of a wrong type.
    """
    toml = read_toml(Path.cwd(), OPTIONS)
    given: dict[str, Any] = dict.fromkeys(settings)
    for name, value in options.items():
        if name not in settings:
            raise unknown_name(f"option of {where}:", name, settings)
        if isinstance(value, Task):
            toml = dataclasses.replace(toml, tasks={**toml.tasks, value.name: value})
            given[name] = value.name
        elif value is not None:
            as_type = kind(config, name)
            given[name] = typed(name, _plain(value, as_type), as_type, where)
    return toml, given


def _training(given: Any) -> dict[str, Any]:
    """The arguments of ``training`` with Python's numbers. A run records them, so they must be what JSON can hold.

    Raises:
        ConfigError: If they are not.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"training is {given!r}, not a dictionary.", 'Give one: training={"bf16": True}')
    values = {name: _plain(value, object) for name, value in given.items()}
    for name, value in values.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"training has {name!r} = {value!r}, which cannot be written into a run.",
                "Give text, numbers, True, False, None, or lists and dictionaries of these.",
            ) from None
    return values


def _plain(value: Any, as_type: type) -> Any:
    """``value`` as ``kr2cache.toml`` could have it: lists for other sequences, text for paths, Python's numbers."""
    if as_type is str and isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | range | list):
        return [_plain(one, as_type) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value  # NumPy's arrays and numbers


def _signature(
    function: Callable[..., Any], config: type[ExtractConfig | TrainConfig], settings: Mapping[str, Setting]
) -> inspect.Signature:
    """The signature with every option by name, so that notebooks can show and complete them."""
    own = inspect.signature(function)
    named = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
    defaults = {one.name: one.default for one in dataclasses.fields(config)}
    for name in settings:
        if name != "resource" or "model" not in own.parameters:
            default = None if defaults[name] is dataclasses.MISSING else defaults[name]
            named.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default))
    return own.replace(parameters=named)


extract.__signature__ = _signature(extract, ExtractConfig, EXTRACT)  # type: ignore[attr-defined]
train.__signature__ = _signature(train, TrainConfig, TRAIN)  # type: ignore[attr-defined]


# Failures -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _advice_for_python() -> Iterator[None]:
    """Inside the block, errors name options as Python does: ``max_length``. Ctrl-C raises KeyboardInterrupt, which
    ``except Exception`` in a loop over models does not catch.
    """
    try:
        yield
    except InterruptedWorkError as error:
        raise KeyboardInterrupt(in_python(str(error)).replace("\n", " ")) from None
    except KR2CacheError as error:
        error.message, error.remedy = in_python(error.message), in_python(error.remedy)
        error.args = (error.message, error.remedy)
        raise


def in_python(text: str) -> str:
    """Advice with options as arguments: ``--max-length 512`` becomes ``max_length 512``. Commands stay as they are."""
    text = text.replace("under [training] in kr2cache.toml", "in training")
    text = text.replace("[training] in kr2cache.toml", "training").replace("Run the same command", "Make the same call")
    parts, at = [], 0
    for command in OTHER_COMMAND.finditer(text):
        parts += [_arguments(text[at : command.start()]), command[0]]
        at = command.end()
    return "".join([*parts, _arguments(text[at:])])


def _arguments(text: str) -> str:
    def argument(option: re.Match[str]) -> str:
        if option[1] == "no-extract":
            return "extract=False"
        return option[1].replace("-", "_") if option[1] in OPTIONS else option[0]

    return OPTION.sub(argument, text)
