"""Model names: what is known of each, where it is on this machine, and how it is loaded.

A name is a registered one, a hub id (``owner/model``) or a folder. ``[models.NAME]`` in ``kr2cache.toml`` adds names or
overrides fields of registered ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kr2cache import hub
from kr2cache.errors import ConfigError, KR2CacheError, ModelUnavailableError, UnsupportedModelError, unknown_name

if TYPE_CHECKING:
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
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that this model's tokenizer needs."""
    model_type: str | None = None
    """The architecture, where the checkpoint's config.json does not say it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only ever set by the user, for one model, in ``kr2cache.toml``."""
    needs: str = ""
    """What has to be installed or set for it, in words."""


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
    )
}

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOML_FIELDS = ("path", "hub_id", "revision", "language", "model_type", "trust_remote_code")


def known_models(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, ModelSpec]:
    """The registry with ``[models]`` of ``kr2cache.toml`` laid over it."""
    known = dict(REGISTRY)
    for name, values in overrides.items():
        unknown = sorted(set(values) - set(TOML_FIELDS))
        if unknown:
            raise unknown_name(f"field in [models.{name}] of kr2cache.toml:", unknown[0], TOML_FIELDS)
        for key, value in values.items():
            kind = bool if key == "trust_remote_code" else str
            if not isinstance(value, kind):
                raise ConfigError(
                    f"{key} = {value!r} under [models.{name}] in kr2cache.toml should be {kind.__name__}.",
                    "Correct it.",
                )
        given = dict(values)
        if "path" in given:
            given["path"] = Path(given["path"]).expanduser()
        if "hub_id" in given and "path" not in given:
            given["path"] = None
        known[name] = dataclasses.replace(known.get(name, ModelSpec(name=name)), **given)
        if known[name].path is None and known[name].hub_id is None:
            raise ConfigError(f"[models.{name}] in kr2cache.toml gives neither path nor hub_id.", "Give one of them.")
    return known


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
    raise unknown_name("model", name, known, "A hub id (owner/model) or a folder serves as well.")


def local_folder(spec: ModelSpec) -> Path | None:
    """Where the model lies on this machine: its path, or its snapshot in the hub's cache. None if it does not.

    Never asks the network.
    """
    if spec.path is not None:
        return spec.path if (spec.path / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    for hub_id in (spec.hub_id, *spec.aliases):
        if hub_id is None:
            continue
        config = try_to_load_from_cache(hub_id, "config.json", revision=spec.revision)
        if isinstance(config, str) and _weight_files(Path(config).parent):
            return Path(config).parent
    return None


def _weight_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]


def model_folder(spec: ModelSpec) -> Path:
    """The model's folder on this machine, downloaded from the hub if need be.

    Raises:
        ModelUnavailableError: If it is not here and cannot be had; the message names the hub id and both remedies.
    """
    folder = local_folder(spec)
    if folder is not None:
        return folder
    if spec.path is not None:
        raise ModelUnavailableError(
            f"The folder of model {spec.name!r}, {spec.path}, holds no config.json.",
            "Give the folder that holds config.json, the weights and the tokenizer.",
        )
    if spec.hub_id is None:
        raise ModelUnavailableError(f"Model {spec.name!r} is not on this machine.", f"It needs {spec.needs}.")
    reason = hub.unreachable()
    if reason is None:
        try:
            return _download(spec.hub_id, spec.revision)
        except Exception as error:  # huggingface_hub raises a dozen unrelated classes; all mean "not to be had"
            reason = str(error).strip().splitlines()[0]
    raise ModelUnavailableError(
        f"Model {spec.name!r} (hub id {spec.hub_id}) is not on this machine, and the hub gave no copy: {reason}",
        f"Either run `hf download {spec.hub_id}` where there is a network and copy its folder here, or name a folder "
        f'that you have: path = "..." under [models.{spec.name}] in kr2cache.toml.',
    )


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    names = HfApi().list_repo_files(hub_id, revision=revision)
    safe = any(name.endswith(".safetensors") for name in names)
    wanted = [
        name
        for name in names
        if "/" not in name
        and (
            name.endswith((".json", ".txt", ".model", ".py", ".safetensors"))
            or (not safe and re.fullmatch(r"pytorch_model.*\.bin", name))
        )
    ]
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading without transformers' reports: what matters in them is checked here and said in our own words."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def _explained(spec: ModelSpec, what: str) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except KR2CacheError:
        raise
    except Exception as error:  # a damaged or foreign file makes these libraries raise almost anything
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise ModelUnavailableError(
            f"The {what} of model {spec.name!r} cannot be loaded: {lines[0]}",
            f"It needs {spec.needs}." if spec.needs else "Check that the folder is complete (kr2cache models).",
        ) from error


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The model's configuration; layers and width are known from it before the weights are touched."""
    from transformers import AutoConfig

    folder = model_folder(spec)
    with _explained(spec, "configuration"):
        if spec.model_type is not None:
            fields = json.loads((folder / "config.json").read_text("utf-8"))
            fields.pop("model_type", None)
            return AutoConfig.for_model(spec.model_type, **fields)
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    return config


def encoder_shape(config: PretrainedConfig) -> tuple[int, int]:
    """(L + 1, D): layers with the embedding output, and width."""
    return int(config.num_hidden_layers) + 1, int(config.hidden_size)


ROBERTA_POSITIONS = (
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Architectures that count positions from the padding id + 1 on: that many embeddings are never used by a token."""


def max_positions(config: PretrainedConfig) -> int | None:
    """The most tokens that the model's position embeddings admit, special tokens included; None where unlimited."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return None
    return int(positions) - (int(config.pad_token_id) + 1 if config.model_type in ROBERTA_POSITIONS else 0)


def load_tokenizer(spec: ModelSpec, *, words: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Args:
        words: Whether it will be given texts as lists of words. A byte-level BPE (RoBERTa's) is then told to put a
        space
            before each word: without it every word would silently lose its space prefix.
    """
    from transformers import AutoTokenizer

    folder = model_folder(spec)
    arguments: dict[str, Any] = {**spec.tokenizer, "trust_remote_code": spec.trust_remote_code}
    if spec.model_type is not None:
        arguments["config"] = load_config(spec)
    with _explained(spec, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **arguments)
        if words and _drops_the_space(tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(folder, **arguments, add_prefix_space=True)
            if _drops_the_space(tokenizer):
                raise ValueError("it is a byte-level BPE and does not accept add_prefix_space.")
    return tokenizer


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
        # The pooler is not among the states, and many checkpoints lack it.
        headless = {"add_pooling_layer": False} if _accepts(architecture, "add_pooling_layer") else {}
        model, report = AutoModel.from_pretrained(
            model_folder(spec),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=spec.trust_remote_code,
            **headless,
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UnsupportedModelError(
            f"The checkpoint of {spec.name!r} lacks {len(missing)} weights of its encoder: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. They would be random numbers.",
            "Give a complete checkpoint of this architecture.",
        )
    model.requires_grad_(False)
    encoder: PreTrainedModel = model.eval()
    return encoder


def load_pretrained(spec: ModelSpec, auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """The checkpoint of ``spec`` as ``auto_class`` (a task model), in float32; missing heads are drawn at random."""
    import torch

    with _explained(spec, "weights"):
        model: PreTrainedModel = auto_class.from_pretrained(
            model_folder(spec), config=config, dtype=torch.float32, trust_remote_code=spec.trust_remote_code
        )
    return model


def _architecture(config: PretrainedConfig) -> type | None:
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def _accepts(architecture: type | None, argument: str) -> bool:
    return architecture is not None and argument in inspect.signature(architecture).parameters


NOT_COMPUTED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "use_cache",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "attn_implementation",
        "_attn_implementation",
    ]
)
"""Fields of a configuration that do not decide what an encoder computes."""


def config_digest(config: PretrainedConfig, *, training: bool = False) -> str:
    """SHA-256 of the configuration's fields that decide what the model computes (heads, activation, epsilon, ...): two
    models of equal weights may still differ in them.

    Args:
        training: Whether dropout counts, as it does for a model that is trained.
    """
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in NOT_COMPUTED and (training or "drop" not in name)
    }
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_digest(encoder: PreTrainedModel) -> str:
    """XXH3-128 of the encoder's weights: names, shapes and float32 bytes, by name; the pooler is left out.

    What is hashed is what computes, so hub id, folder, file format and the file's dtype make no difference.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(encoder.state_dict().items()):
        if not name.startswith("pooler."):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
