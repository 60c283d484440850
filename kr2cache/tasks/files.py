"""Find the files of a split in a data folder.

Three layouts, tried in this order: one file (``dev.conllu``), a folder of files (``dev/*.conllu``), and files with
the names of official releases (``de_gsd-ud-dev.conllu``). A release may cut a split into parts
(``de_hdt-ud-train-a-1.conllu``); they are read if the whole (``de_hdt-ud-train.conllu``) is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kr2cache.config import local
from kr2cache.errors import DataError

SPLITS = ("train", "dev", "test")
SPLIT_FILES = {"train": ("train",), "dev": ("dev", "valid", "validation", "val"), "test": ("test", "tests")}
"""The names that a split's file, folder or hub split may have."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
DATA_SUFFIXES = (".bio", ".conll", ".conllu", ".csv", ".iob", ".iob2", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
"""What ends so is a file, not the id of a data set on the hub."""
NAMES_SHOWN = 8
"""The most file names in one message."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a task's files."""

    suffixes: tuple[str, ...]
    """``.conllu``"""
    releases: tuple[str, ...] = ()
    """Files of an official release, as patterns with ``{split}``: ``*-ud-{split}.conllu``."""
    parts: tuple[str, ...] = ()
    """The same for parts of such files: ``*-ud-{split}-*.conllu``."""

    def looked_for(self, split: str) -> list[str]:
        """All file names of a split, for errors."""
        plain = [f"{name}{self.suffixes[0]}" for name in SPLIT_FILES[split]]
        return plain + [pattern.format(split=split) for pattern in self.releases + self.parts]


def data_path(data: str | None) -> Path | None:
    """The folder or file that ``data`` names, or None if it is a hub id (or not given).

    Raises:
        DataError: If it must be a folder or file, but does not exist.
        ConfigError: If it is a URL.
    """
    if data is None:
        return None
    path = local(Path(data), "--data").expanduser()
    if path.exists():
        return path
    # A hub id has at most one slash. With a leading dot, tilde or slash, or a suffix of data files, a path is meant.
    if data.startswith((".", "/", "~")) or data.count("/") > 1 or path.suffix in DATA_SUFFIXES:
        raise DataError(
            f"There is no data folder or file {data}.", "Check --data, or data under [defaults] in kr2cache.toml."
        )
    return None


def split_of(path: Path) -> str:
    """The split that a file by itself is: the one in its name (``dev.jsonl``, ``reviews_test.csv``), else ``train``."""
    return _split_of(path, path.parent) or "train"


def split_files(folder: Path, split: str, names: Names) -> list[Path]:
    """The files of a split, sorted; none if the folder does not have this split."""
    for name in SPLIT_FILES[split]:
        for suffix in names.suffixes:
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
        inside = folder / name
        if inside.is_dir():
            files = sorted(path for path in inside.iterdir() if path.suffix in names.suffixes)
            if files:
                return files
    whole = _matching(folder, split, names.releases)
    parts = {part for part in _matching(folder, split, names.parts) if whole_of(part, whole) is None}
    return sorted(whole | parts)


def whole_of(part: Path, whole: set[Path]) -> Path | None:
    """The file in ``whole`` of which ``part`` is a part, judged by the names."""
    return next((one for one in whole if part.stem.startswith(f"{one.stem}-")), None)


def unread_files(folder: Path, split: str, names: Names) -> list[Path]:
    """Data files that no split reads, and whose names suggest that they belong to this split.

    A file without a split in its name counts for the first split that the folder has. So each file is reported for only
    one split.
    """
    found = {one: split_files(folder, one, names) for one in SPLITS}
    read = {path for files in found.values() for path in files}
    here = [path for path in folder.iterdir() if path.is_file()]
    inside = [
        path
        for name in (name for own in SPLIT_FILES.values() for name in own)
        if (folder / name).is_dir()
        for path in (folder / name).rglob("*")
        if path.is_file()
    ]
    first = next((one for one in SPLITS if found[one]), None)
    return sorted(
        path
        for path in here + inside
        if path not in read and _is_data(path, names.suffixes) and (_split_of(path, folder) or first) == split
    )


def names_text(paths: Sequence[Path], folder: Path) -> str:
    """File names below ``folder``: the first few if there are many, ``nothing`` if there are none."""
    shown = [path.relative_to(folder).as_posix() for path in paths[:NAMES_SHOWN]]
    more = len(paths) - len(shown)
    return (", ".join(shown) or "nothing") + (f" and {more:,} more" if more else "")


def _matching(folder: Path, split: str, patterns: Sequence[str]) -> set[Path]:
    spelled = (pattern.format(split=name) for pattern in patterns for name in SPLIT_FILES[split])
    return {path for pattern in spelled for path in folder.glob(pattern)}


def _is_data(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether it looks like a data file of the task, also if compressed or with another case in its suffix."""
    if path.name.startswith("."):
        return False
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower() in suffixes and (plain == path or not plain.exists())


def _split_of(path: Path, folder: Path) -> str | None:
    """The split in the name of a file or its folder: ``train_full.csv`` gives ``train``."""
    for text in reversed(path.relative_to(folder).parts):
        for split, own in SPLIT_FILES.items():
            if re.search(rf"(?<![a-z])({'|'.join(own)})(?![a-z])", text.lower()):
                return split
    return None
