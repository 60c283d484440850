"""Find the files of a split in a data folder.

Four layouts, tried in this order:

- one file (``dev.conllu``), or what ``save_to_disk`` of the library ``datasets`` writes: a folder with Arrow files;
- a folder of files (``dev/*.conllu``);
- files with the names of official releases (``de_gsd-ud-dev.conllu``). A release may cut a split into parts
  (``de_hdt-ud-train-a-1.conllu``); they are read if the whole (``de_hdt-ud-train.conllu``) is missing;
- the only file whose name has the split's name in it, between other characters than letters (``xnli.dev.tsv``,
  ``dev_2k.tsv``, ``eng.testa``), if the train split has none of the first three: beside ``train.csv``,
  ``test_predictions.csv`` is no split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kr2cache.config import local
from kr2cache.errors import DataError, MissingSplitError
from kr2cache.system.console import note

SPLITS = ("train", "dev", "test")
SPLIT_FILES = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation", "val", "testa"),
    "test": ("test", "tests", "testb"),
}
"""The names that a split's file, folder or hub split may have. CoNLL's shared tasks have testa and testb."""
NAMES_OF_SPLITS = frozenset(name for names in SPLIT_FILES.values() for name in names)
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
DATA_SUFFIXES = (
    ".arrow",
    ".bio",
    ".conll",
    ".conllu",
    ".csv",
    ".iob",
    ".iob2",
    ".json",
    ".jsonl",
    ".parquet",
    ".tsv",
    ".txt",
)
"""What ends so is a file, not the id of a data set on the hub."""
NAMES_SHOWN = 8
"""The most file names in one message."""
SAVED = ("state.json", "dataset_info.json")
"""The files by which a folder is one ``datasets.Dataset`` that was saved to disk."""
OTHER_LANGUAGE = r"(?<![a-z])(?!{language}(?![a-z]))[a-z][a-z](?![a-z])"
"""What is the code of another language in a file's name: ``en`` in ``train-en.tsv``."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a task's files."""

    suffixes: tuple[str, ...]
    """``.conllu``. An empty one stands for files without a suffix."""
    releases: tuple[str, ...] = ()
    """Files of an official release, as patterns with ``{split}``: ``*-ud-{split}.conllu``."""
    parts: tuple[str, ...] = ()
    """The same for parts of such files: ``*-ud-{split}-*.conllu``."""
    language: str = ""
    """The task's, if its data exists in several."""
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    """The names of splits in the task's data set on the hub, where they are not the usual ones of any split: a task may
    take the hub's validation split as its test split, and in a folder this name is that of dev."""

    def looked_for(self, split: str) -> list[str]:
        """All file names of a split, for errors."""
        plain = [f"{name}{self.suffixes[0]}" for name in SPLIT_FILES[split]]
        return plain + [pattern.format(split=split) for pattern in self.releases + self.parts]


def suffixes_text(suffixes: Sequence[str]) -> str:
    """The suffixes of a task's files, for errors."""
    return " or ".join(filter(None, suffixes))


def suffix_of(path: Path) -> str:
    """The suffix that tells the format of a file. Empty if there is none, and if it names a split: ``eng.train``."""
    return "" if path.suffix.removeprefix(".") in NAMES_OF_SPLITS else path.suffix


def is_saved(path: Path) -> bool:
    """Whether a folder is one ``datasets.Dataset`` that was saved to disk."""
    return all((path / name).is_file() for name in SAVED)


def is_folder(path: Path) -> bool:
    """Whether it may hold several splits: it is neither a file nor one saved data set."""
    return path.is_dir() and not is_saved(path)


def kind_text(path: Path) -> str:
    """What data is that is not a folder of splits, for errors."""
    return "one saved data set" if path.is_dir() else "one file"


def contents(path: Path) -> list[Path]:
    """The file itself, or the files of a saved data set."""
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]


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
    """The files of a split, sorted; none if the folder does not have this split.

    A saved data set counts as a file.
    """
    files = _usual_files(folder, split, names)
    if not files and not _usual_files(folder, "train", names):
        files = _only(named_files(folder, split, names), names)
    return files


def _usual_files(folder: Path, split: str, names: Names) -> list[Path]:
    for name in filter(None, (*SPLIT_FILES[split], names.hub_splits.get(split))):
        for suffix in names.suffixes:
            if (folder / f"{name}{suffix}").is_file():
                return [folder / f"{name}{suffix}"]
        inside = folder / name
        if inside.is_dir():
            if is_saved(inside):
                return [inside]
            files = sorted(path for path in inside.iterdir() if path.suffix in names.suffixes and path.suffix)
            if files:
                return files
    whole = _matching(folder, split, names.releases)
    parts = {part for part in _matching(folder, split, names.parts) if whole_of(part, whole) is None}
    found = sorted(whole | parts)
    # A split that two releases have in two formats is read once, in the first format.
    first = next((suffix for suffix in names.suffixes if any(suffix_of(path) == suffix for path in found)), None)
    return [path for path in found if suffix_of(path) == first]


def named_files(folder: Path, split: str, names: Names) -> list[Path]:
    """The files, and saved data sets, that have the name of this split, and of no other, in theirs.

    If the task's data exists in several languages, a file with the code of another one is none of them. If some have
    the code of the task's language, the others are none.
    """
    found = sorted(path for path in folder.iterdir() if _splits_of(path.name) == {split} and _is_own(path, names))
    if not names.language:
        return found
    other = re.compile(OTHER_LANGUAGE.format(language=re.escape(names.language)))
    found = [path for path in found if not other.search(_without_suffix(path))]
    own = re.compile(rf"(?<![a-z]){re.escape(names.language)}(?![a-z])")
    return [path for path in found if own.search(_without_suffix(path))] or found


def _only(found: list[Path], names: Names) -> list[Path]:
    """The only file among those that name a split. One that exists in several formats is read in the first of them."""
    if len({_without_suffix(path) for path in found}) > 1:
        return []
    return sorted(found, key=lambda path: names.suffixes.index(suffix_of(path)) if path.is_file() else -1)[:1]


def names_split(path: Path) -> bool:
    """Whether a split is in the file's own name."""
    return bool(_splits_of(path.name))


def _is_own(path: Path, names: Names) -> bool:
    return suffix_of(path) in names.suffixes if path.is_file() else is_saved(path)


def _has_other_format(path: Path, split: str, names: Names) -> bool:
    suffix = suffix_of(path).lower()
    return _splits_of(path.name) == {split} and suffix not in names.suffixes and suffix not in COMPRESSED


def _without_suffix(path: Path) -> str:
    return path.name.removesuffix(suffix_of(path)).lower()


def missing_split(folder: Path, split: str, names: Names) -> MissingSplitError:
    """The error for a folder without a split. It says where the split may be."""
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:NAMES_SHOWN]) or "nothing"
    message = (
        f"{folder} has no {split} split: looked for {', '.join(names.looked_for(split))}, and a folder of that name; "
        f"found {there}."
    )
    several = named_files(folder, split, names)
    if len(several) == 1:
        return MissingSplitError(
            message, f"If {several[0].name} is this split, call it {split}{suffix_of(several[0])}."
        )
    if several:
        return MissingSplitError(
            f"{folder}: several files may be the {split} split: {names_text(several, folder)}.",
            f"Keep one of them there; or put those that belong together into the folder {folder / split}.",
        )
    inside = sorted(path for path in folder.iterdir() if _has_split(path, split, names))
    inside = [path for path in inside if path.name == names.language] or inside
    if inside:
        other = ", for example" if len(inside) > 1 else ""
        return MissingSplitError(
            message,
            f"Folders in it that have one: {names_text(inside, folder)}. Give the right one: --data {inside[0]}{other}",
        )
    others = sorted(path for path in folder.iterdir() if path.is_file() and _has_other_format(path, split, names))
    if others:
        return MissingSplitError(
            message,
            f"If {names_text(others[:1], folder)} is this split, write it in a format of the task "
            f"({suffixes_text(names.suffixes)}). If it is in such a format, change only the end of its name.",
        )
    return MissingSplitError(message, "Check --data and the names of its files.")


def _has_split(folder: Path, split: str, names: Names) -> bool:
    try:
        return is_folder(folder) and bool(split_files(folder, split, names))
    except OSError:  # it cannot be read
        return False


def say_unusual(folder: Path, split: str, names: Names, files: Sequence[Path]) -> None:
    """Notes about files whose name is not one that is looked for, and about data files that no split reads."""
    usual = (*SPLIT_FILES[split], names.hub_splits.get(split))
    released = _matching(folder, split, (*names.releases, *names.parts))
    for path in files:
        if path.parent == folder and path not in released and path.name.removesuffix(suffix_of(path)) not in usual:
            note(f"{folder}, {split} split: read {path.name}, because its name says so.")
    unread = unread_files(folder, split, names)
    read = {path.with_name(_without_suffix(path)) for path in files}
    if same := [path for path in unread if path.with_name(_without_suffix(path)) in read]:
        note(f"{folder}, {split} split: read {names_text(files, folder)}, not {names_text(same, folder)} of that name.")
    if unread := [path for path in unread if path not in same]:
        note(
            f"{folder}, {split} split: read {names_text(files, folder)}. Did not read {names_text(unread, folder)}. If "
            f"they belong to this split, put all its files into {folder / split}/ itself, unpacked, with names that "
            f"end in {suffixes_text(names.suffixes)}."
        )


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
    suffix = suffix_of(plain).lower()
    return suffix in suffixes and (suffix != "" or names_split(plain)) and (plain == path or not plain.exists())


def _split_of(path: Path, folder: Path) -> str | None:
    """The split in the name of a file or its folder: ``train_full.csv`` gives ``train``."""
    for text in reversed(path.relative_to(folder).parts):
        found = _splits_of(text)
        if found:
            return next(split for split in SPLIT_FILES if split in found)
    return None


def _splits_of(text: str) -> set[str]:
    """All splits that a name names."""
    return {
        split for split, own in SPLIT_FILES.items() if re.search(rf"(?<![a-z])({'|'.join(own)})(?![a-z])", text.lower())
    }
