"""Data sets of the library ``datasets``: on the hub, in its cache on this machine, or saved to disk."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kr2cache.errors import DataError, MissingSplitError, error_text
from kr2cache.system import hub

HUB_SPLITS: Mapping[str, str] = {"train": "train", "dev": "validation", "test": "test"}


def load_hub(
    hub_id: str,
    configuration: str | None,
    split: str,
    *,
    suffix: str,
    name: str | None = None,
    revision: str | None = None,
) -> tuple[Any, str]:
    """Load a split from the hub, or from the hub's cache on this machine.

    Args:
        name: The split's name there; None for the usual one.
        suffix: Suffix of the files that a data folder would hold, for the error.

    Returns:
        The split as a ``datasets.Dataset``, and its name for errors.

    Raises:
        MissingSplitError: If the data set has no such split.
        DataError: If it cannot be loaded.
    """
    import datasets

    name = name or HUB_SPLITS[split]
    what = ", ".join([hub_id, *([f"configuration {configuration}"] if configuration else []), f"split {name}"])
    try:
        with contextlib.ExitStack() as inside:
            if hub.unreachable() is not None:
                inside.enter_context(hub.offline())
            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                inside.callback(datasets.enable_progress_bars)
            return datasets.load_dataset(hub_id, configuration, split=name, revision=revision), what
    except Exception as error:  # datasets and the hub's client raise many unrelated classes
        reason = error_text(error)
        if reason.startswith("Unknown split"):
            raise MissingSplitError(f"{hub_id} has no {split} split: {reason}", "Check --split.") from error
        if reason.startswith("Config name is missing"):
            raise DataError(
                f"The hub data set {hub_id} has several configurations: {' '.join(str(error).splitlines()[1:2])}",
                'Choose one: configuration = "..." in [tasks.NAME] of kr2cache.toml.',
            ) from error
        raise DataError(
            f"There is no folder {hub_id}, and the hub data set {what} cannot be loaded: {reason}",
            "Without a network: load it once on a machine with a network and copy the cache ($HF_HOME) here, or give "
            f"--data a folder with train{suffix}, dev{suffix} and test{suffix}.",
        ) from error


def load_saved(folder: Path) -> Any:
    """The ``datasets.Dataset`` that ``save_to_disk`` wrote into a folder.

    Raises:
        DataError: If it is damaged.
    """
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow raise many unrelated classes
        raise DataError(
            f"The saved data set {folder} cannot be loaded: {error_text(error)}", "Save it again: save_to_disk."
        ) from error
