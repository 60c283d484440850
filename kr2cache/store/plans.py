"""Tokenise a large split only once: a later extraction from the same data uses the index of an earlier cache again.

Processes that start together also tokenise once: the first one does the work, and the others wait for it. Until a cache
holds the index, the file ``CACHE_DIR/TASK/SPLIT/plan-KEY.npz`` holds it.

The key is a digest of everything that decides the index: the bytes and names of the data files, the task with its
settings, the tokenizer as it was loaded, and the code that reads and tokenises. Caches record the key. Caches with the
same key hold the same index, whatever their layers and dtype. Before an index is used again, its first sequences are
tokenised again and compared.

In the following cases there is no key, and every process reads and tokenises the split itself:

- The data files have fewer than ``LARGE`` bytes. They take a second or two.
- The data set comes from the hub.
- The task does not know all its files (``Task.source_files``), or its class is not in this package.
- The tokenizer is not one of the library's own fast classes. Then code or a dictionary outside the model's files may
  change the tokens.
- The model needs segment ids, which caches do not store.
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
"""A plan is shared if the data files have at least this many bytes. 16 MB of CoNLL-U are 20,000 sentences: 2 s."""
FIELD = "plan"
"""The recorded field of a cache's provenance with the key and the numbers of words that get no states."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data files of a split, and the key of the index that is made from them."""

    key: str
    stamps: tuple[tuple[Any, ...], ...]
    """Path, size, times and inode of each file, from before the files were read."""
    files: tuple[Path, ...]

    @property
    def unchanged(self) -> bool:
        """Whether all files are as they were before the key was computed."""
        try:
            return _stamps(self.files) == self.stamps
        except OSError:
            return False

    def recorded(self, made: Tokenised) -> dict[str, Any]:
        """What a cache with the index ``made`` records about it. Empty if a data file changed after the key was
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
    """The source of an index. None if its plan is not shared; the top of this file lists these cases."""
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
        **({} if (words := task.declaration()) is None else {"declaration": words}),
        "versions": {name: version(name) for name in ("transformers", "tokenizers")},
        "python": platform.python_version(),
    }
    key = hashlib.sha256(canonical_json(decides).encode()).hexdigest()
    return Source(key=key, stamps=stamps, files=tuple(files.values()))


@dataclass(frozen=True, kw_only=True)
class Plans:
    """Finds or makes the index of one source, in one cache directory."""

    cache_dir: Path
    task: str
    split: str
    source: Source

    def find_or_make(
        self, first: Callable[[], Tokenised], make: Callable[[], Tokenised]
    ) -> tuple[Tokenised, dict[str, Any]]:
        """The index of the source, and what a new cache records about it.

        Args:
            first: Tokenises the first sequences. A stored index is used only if it begins with the same sequences.
            make: Reads and tokenises everything. It is not called if a stored index can be used.
        """
        found = self._find(first)
        if found is None:
            with self._only_process() as claim:
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
    def _only_process(self) -> Iterator[Claim | None]:
        """Inside the block, no other process tokenises this source. Yields None if no claim can be written to disk."""
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
        """Keep the index for the other processes. If it cannot be written, nothing is kept and nothing is raised."""
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
"""The arrays of an index that are kept. An index with segment ids is not shared."""


def plan_file(cache_dir: Path, task: str, split: str, key: str) -> Path:
    """The file that holds the index until a cache holds it."""
    return folders.split_folder(cache_dir, task, split) / f"plan-{key[:16]}.npz"


def forget(cache_dir: Path, task: str, split: str, key: str) -> None:
    """Remove the file of an index that a cache holds now."""
    with contextlib.suppress(OSError):
        plan_file(cache_dir, task, split, key).unlink(missing_ok=True)


def _load(path: Path) -> Tokenised | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            index = SequenceIndex(**{name: stored[name] for name in _STORED})
            cut_off, no_token = stored["missing_words"].tolist()
            is_intact = str(stored["digest"]) == _digest(index)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # the file is missing or damaged
        return None
    return Tokenised(index=index, missing_words=MissingWords(cut_off, no_token)) if is_intact else None


def _digest(index: SequenceIndex) -> str:
    return provenance.texts_digest(index) + provenance.tokens_digest(index)


def stored_index(cache_dir: Path, task: str, split: str, key: str) -> Tokenised | None:
    """The index of a cache that was made from the same source; None if there is no such cache.

    Args:
        cache_dir: The folder of all caches.
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
    """How many words get no states, as recorded; None if this key is not recorded. Every type is checked, because
    another program may have written the file.
    """
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
    """Everything that decides the tokens, if this is one of the library's own fast tokenizers; otherwise None."""
    kind = type(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_library = kind.__module__ in _GENERIC or kind.__module__.startswith("transformers.models.")
    if not (tokenizer.is_fast and backend is not None and of_library):
        return None
    try:
        content = json.loads(backend.to_str())
    except Exception:  # a component that is written in Python has no JSON
        return None
    for setting in ("truncation", "padding"):  # what the last call set
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
"""Modules of the library's generic classes. Such a tokenizer consists only of its ``tokenizer.json``."""


def _is_ours(kind: type[Task]) -> bool:
    """Whether the code of a class is part of ``_code_digest``."""
    try:
        return _package() in Path(inspect.getfile(kind)).resolve().parents
    except (TypeError, OSError):  # a class that was defined in an interactive session
        return False


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


@functools.cache
def _code_digest() -> str:
    """SHA-256 of this package's source code: any change of it may change how data is read or tokenised."""
    digest = hashlib.sha256()
    for path in sorted(_package().rglob("*.py")):
        digest.update(f"{path.relative_to(_package()).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
