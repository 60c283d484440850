"""A large split is read and tokenised once: caches record what their index was made from, and later plans take it.

Processes that start together share a plan too: the first one tokenises, the others wait for it. Until a cache holds the
index, it lies in ``CACHE_DIR/TASK/SPLIT/plan-KEY.npz``.

The key is a digest of everything that decides the index: the bytes and names of the data files, the task with its
settings, the tokenizer as it was loaded, and the code that reads and tokenises. A cache with an equal key holds the
same index, whatever its layers and dtype. Before it is taken, its first sequences are tokenised again and compared.

There is no key, and the split is read and tokenised as always, for

- data files below ``LARGE`` bytes, which take a second or two,
- data sets of the hub,
- a task whose files are not all known (``Task.source_files``), or whose class is not in this package,
- tokenizers that are not the library's own fast classes: code or a dictionary outside the model's files may decide,
- models that run with segment ids, which caches do not store.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import platform
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kr2cache.cache.format import SequenceIndex, canonical_json
from kr2cache.cache.reader import FeatureCache
from kr2cache.cache.shard import readable_headers
from kr2cache.errors import CacheError, ConfigError, DiskSpaceError
from kr2cache.models.encode import MissingWords
from kr2cache.models.tokenise import Tokenised
from kr2cache.store import folders, provenance
from kr2cache.system.claims import Claim, wait_for_claim
from kr2cache.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGE = 16 * 2**20
"""Bytes of data files from which on a plan is shared. 16 MB of CoNLL-U are 20,000 sentences: 2 s."""
FIELD = "plan"
"""Among the recorded fields of a cache's provenance: the key, and the words that get no states."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data files of a split, and the key of the index that is made from them."""

    key: str
    stamps: tuple[tuple[Any, ...], ...]
    """Of the files before they were read."""
    files: tuple[Path, ...]

    @property
    def unchanged(self) -> bool:
        """Whether no file was changed since the key was computed."""
        try:
            return _stamps(self.files) == self.stamps
        except OSError:
            return False

    def recorded(self, made: Tokenised) -> dict[str, Any]:
        """The recorded fields of a cache with the index ``made``. Empty if a data file changed after the key was
        computed, or if there are segment ids, which a cache does not store.
        """
        if made.index.segment_id is not None or not self.unchanged:
            return {}
        missing = made.missing_words
        return {FIELD: {"key": self.key, "cut_off_words": missing.cut_off, "words_without_token": missing.no_token}}


def source_of(
    task: Task,
    split: str,
    data: str | None,
    *,
    limit: int | None,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Source | None:
    """The source of an index, before the data is read. None if a plan of it is not shared (see above)."""
    files = task.source_files(split, data)
    state = _tokenizer_state(tokenizer)
    if files is None or state is None or not _is_ours(type(task)):
        return None
    stamps = _stamps(files.values())
    if sum(size for _, size, *_ in stamps) < LARGE:
        return None
    decides = {
        "files": [[name, _file_xxh3(path)] for name, path in files.items()],
        "task": task.name,
        "template": task.template,
        "words": task.words,
        "split": split,
        "limit": limit,
        "max_length": max_length,
        "tokenizer": state,
        "code": _code_digest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers")},
        "python": platform.python_version(),
    }
    key = hashlib.sha256(canonical_json(decides).encode()).hexdigest()
    return Source(key=key, stamps=stamps, files=tuple(files.values()))


@dataclass(frozen=True, kw_only=True)
class Plans:
    """The plans of one source in one cache directory."""

    cache_dir: Path
    task: str
    split: str
    source: Source

    def find_or_make(
        self, first: Callable[[], Tokenised], make: Callable[[], Tokenised]
    ) -> tuple[Tokenised, dict[str, Any]]:
        """The index of the source; and the fields that a new cache records of it.

        Args:
            first: Tokenises the first sequences now. A stored index whose first sequences are others is not taken.
            make: Reads and tokenises all. Not called if another process did so.
        """
        found = self._find(first)
        if found is None:
            with self._alone() as claim:
                found = self._find(first)
                if found is None:
                    found = make()
                    if claim is not None and self.source.recorded(found):
                        self._save(found, claim)
        return found, self.source.recorded(found)

    def _find(self, first: Callable[[], Tokenised]) -> Tokenised | None:
        found = stored_index(self.cache_dir, self.task, self.split, self.source.key)
        if found is not None:
            forget(self.cache_dir, self.task, self.split, self.source.key)
        else:
            found = _load(plan_file(self.cache_dir, self.task, self.split, self.source.key))
        return found if found is not None and _begins_with(found.index, first().index) else None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Claim | None]:
        """No other process plans from this source inside the block. None where nothing can be written."""
        claim = None
        with contextlib.suppress(OSError, ConfigError, DiskSpaceError):
            claim = wait_for_claim(plan_file(self.cache_dir, self.task, self.split, self.source.key), "plan")
            claim.fenced()  # a plan is published by a rename out of the claim's folder
        try:
            yield claim
        finally:
            if claim is not None:
                claim.release()

    def _save(self, made: Tokenised, claim: Claim) -> None:
        """Keep the index for the other processes. A disk without space for it is no failure."""
        index = made.index
        unfinished = claim.folder / "plan.npz"
        try:
            np.savez(
                unfinished,
                **{name: getattr(index, name) for name in _STORED},
                missing_words=np.array(made.missing_words, dtype=np.int64),
                digest=np.array(_digest(index)),
            )
            unfinished.rename(plan_file(self.cache_dir, self.task, self.split, self.source.key))
        except OSError:
            unfinished.unlink(missing_ok=True)


_STORED = ("ids", "n_tokens", "text_xxh3", "input_id", "word_index")
"""The arrays of an index that are kept. Segment ids are not: such an index is not shared."""


def plan_file(cache_dir: Path, task: str, split: str, key: str) -> Path:
    """Where the index lies until a cache holds it."""
    return folders.split_folder(cache_dir, task, split) / f"plan-{key[:16]}.npz"


def forget(cache_dir: Path, task: str, split: str, key: str) -> None:
    """Remove the plan of a source: a cache holds its index now."""
    with contextlib.suppress(OSError):
        plan_file(cache_dir, task, split, key).unlink(missing_ok=True)


def _load(path: Path) -> Tokenised | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            index = SequenceIndex(**{name: stored[name] for name in _STORED})
            cut_off, no_token = stored["missing_words"].tolist()
            is_intact = str(stored["digest"]) == _digest(index)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # there is none, or it is damaged
        return None
    return Tokenised(index=index, missing_words=MissingWords(cut_off, no_token)) if is_intact else None


def _digest(index: SequenceIndex) -> str:
    return provenance.texts_digest(index) + provenance.tokens_digest(index)


def stored_index(cache_dir: Path, task: str, split: str, key: str) -> Tokenised | None:
    """The index of a cache that was planned from the same source; None if there is none.

    Args:
        cache_dir: Where to look.
        task: The task's name.
        split: The split.
        key: ``Source.key``
    """
    for folder in folders.matching(cache_dir, task=task, split=split):
        shard = min(folder.glob("*.h5"), default=None)
        headers = readable_headers(shard) if shard is not None else []
        if not any(_missing_words(header.provenance, key) for header in headers):
            continue
        try:
            cache = FeatureCache.open(folder)
            missing = _missing_words(cache.provenance, key)
            made = provenance.found_of(cache.provenance, folder)
            index = cache.tokens()
        except (CacheError, OSError):  # not all shards are made yet, or one is damaged
            continue
        whole = (provenance.texts_digest(index), provenance.tokens_digest(index), len(index))
        is_whole = not made.segments and whole == (made.texts, made.tokens, made.sequences)
        if missing is not None and is_whole:
            return Tokenised(index=index, missing_words=missing)
    return None


def _missing_words(provenance: Mapping[str, Any], key: str) -> MissingWords | None:
    """The recorded counts, if the key is recorded. A file of another program may hold anything."""
    recorded = provenance.get("recorded")
    stored = recorded.get(FIELD) if isinstance(recorded, dict) else None
    if not isinstance(stored, dict) or stored.get("key") != key:
        return None
    counts = stored.get("cut_off_words"), stored.get("words_without_token")
    return MissingWords(*counts) if all(isinstance(count, int) for count in counts) else None  # type: ignore[arg-type]


def _begins_with(index: SequenceIndex, first: SequenceIndex) -> bool:
    if len(first) > len(index) or first.segment_id is not None:
        return False
    part = index.part(0, len(first))
    return all(np.array_equal(getattr(part, name), getattr(first, name)) for name in _STORED)


def _stamps(files: Iterable[Path]) -> tuple[tuple[Any, ...], ...]:
    stats = [(path, path.stat()) for path in files]
    return tuple((os.fspath(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats)


def _file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Everything that decides the tokens of a fast tokenizer of the library itself; None for another one."""
    kind = type(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_library = kind.__module__ in _GENERIC or kind.__module__.startswith("transformers.models.")
    if not (tokenizer.is_fast and backend is not None and of_library):
        return None
    try:
        content = json.loads(backend.to_str())
    except Exception:  # a component written in Python cannot be told
        return None
    for setting in ("truncation", "padding"):  # left by the latest call
        content.pop(setting, None)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "backend": xxhash.xxh3_128_hexdigest(canonical_json(content).encode("utf-8", "surrogatepass")),
        "inputs": list(tokenizer.model_input_names),
        "special": sorted(tokenizer.all_special_ids),
        "unknown": tokenizer.unk_token_id,
        "side": tokenizer.truncation_side,
        "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
    }


_GENERIC = ("transformers.tokenization_utils_tokenizers", "transformers.tokenization_utils_fast")
"""The modules of the class of a tokenizer that is nothing but its ``tokenizer.json``."""


def _is_ours(kind: type[Task]) -> bool:
    """Whether the code of a class is part of ``_code_digest``."""
    try:
        return _package() in Path(inspect.getfile(kind)).resolve().parents
    except (TypeError, OSError):  # a class that was typed in
        return False


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


@functools.cache
def _code_digest() -> str:
    """SHA-256 of this package's source: a change of any line that reads or tokenises may change an index."""
    digest = hashlib.sha256()
    for path in sorted(_package().rglob("*.py")):
        digest.update(f"{path.relative_to(_package()).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
