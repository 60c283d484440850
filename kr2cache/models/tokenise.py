"""Tokenise a split of any size. Examples are read one after another; if there are many, several processes tokenise.

This process reads the examples and tokenises them in parts. After ``ALONE_S`` it starts helpers, which are other
processes, and sends parts to them. It starts more helpers while they cannot keep up with it. It tokenises a part itself
whenever enough parts wait for the helpers. A helper returns a part as NumPy arrays, and all parts are joined in their
order. So the index is bit for bit the same for any number of helpers.

Threads would help less. With two threads, a fast tokenizer takes 0.8 of its time with one (two cores, 100,000
sentences). Reading, aligning words and tokenizers written in Python get no faster with threads.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kr2cache.cache.format import GrowingIndex, SequenceIndex
from kr2cache.errors import KR2CacheError
from kr2cache.models.encode import TEXTS_AT_ONCE, MissingWords, encode, missing_words
from kr2cache.models.registry import ModelSpec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALONE_S = 4.0
"""Seconds in which this process tokenises without helpers. A helper takes about as long to start."""
AHEAD = 3
"""How many parts wait for each helper, so that none is idle while this process tokenises a part itself."""
PARALLELISM = "TOKENIZERS_PARALLELISM"
"""The environment variable that tells the library ``tokenizers`` whether to use threads."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive sequences, as plain lists, which are quick to send to another process."""

    ids: list[str]
    texts: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """The tokens of some sequences."""

    index: SequenceIndex
    missing_words: MissingWords
    """For a task on words: how many words get no token."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer with its settings."""

    tokenizer: PreTrainedTokenizerBase
    words: bool
    max_length: int

    def __call__(self, part: Part) -> Tokenised:
        index = encode(self.tokenizer, part.ids, part.texts, words=self.words, max_length=self.max_length)
        missing = MissingWords(0, 0)
        if self.words:
            missing = missing_words(index, part.texts, self.max_length, self.tokenizer)
        return Tokenised(index=index, missing_words=missing)


def tokenise(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], task: Task, max_length: int
) -> Tokenised:
    """The sequences of all examples, in order.

    Args:
        spec: The model, so that other processes can load its tokenizer.
        tokenizer: Its tokenizer, loaded for ``task``.
        examples: Read to their end.
        task: The task of the examples.
        max_length: Tokens kept of each sequence, special tokens included.

    Raises:
        KR2CacheError: The errors of ``encode`` and of reading the examples. Also if a helper ends too early.
    """
    encoder = Encoder(tokenizer=tokenizer, words=task.words, max_length=max_length)
    index = GrowingIndex()
    cut_off = no_token = 0
    with _Helpers(spec, encoder, helpers_allowed()) as helpers:
        for done in helpers.share(_parts(examples)):
            index.add(done.index)
            cut_off += done.missing_words.cut_off
            no_token += done.missing_words.no_token
    return Tokenised(index=index.finish(), missing_words=MissingWords(cut_off, no_token))


def tokenise_first(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], task: Task, max_length: int
) -> Tokenised:
    """The sequences of the first ``TEXTS_AT_ONCE`` examples; no more are read."""
    encoder = Encoder(tokenizer=tokenizer, words=task.words, max_length=max_length)
    return encoder(next(_parts(examples), Part(ids=[], texts=[])))


def _parts(examples: Iterable[Example]) -> Iterator[Part]:
    """Parts of ``TEXTS_AT_ONCE`` examples; the last one may be smaller."""
    iterator = iter(examples)
    while some := list(itertools.islice(iterator, TEXTS_AT_ONCE)):
        yield Part(
            ids=[name for one in some for name in one.sequence_ids], texts=[text for one in some for text in one.texts]
        )


def helpers_allowed() -> int:
    """How many helpers may be started: one for each core that this process may use, except the core for itself.

    ``OMP_NUM_THREADS`` limits the cores. ``TOKENIZERS_PARALLELISM=false`` forbids helpers.
    """
    if os.environ.get(PARALLELISM, "").lower() in ("false", "off", "no", "n", "0", "f"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(ValueError):
        cores = min(cores, int(os.environ.get("OMP_NUM_THREADS", "")))
    return max(0, cores - 1)


class _Helpers:
    """The helpers of one split. For few examples, none is started."""

    def __init__(self, spec: ModelSpec, encoder: Encoder, allowed: int) -> None:
        self._setup = (spec, encoder.words, encoder.max_length)
        self._encoder = encoder
        self._allowed = allowed
        self._threads = ThreadPoolExecutor(max_workers=2 * allowed + 1, thread_name_prefix="tokenise")
        self._starting: list[Future[None]] = []
        self._processes: list[_Helper] = []
        self._idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
        self._ready = 0
        self._environment = os.environ.get(PARALLELISM)

    def __enter__(self) -> _Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.end()
        self._threads.shutdown(wait=True)
        if self._environment is None:
            os.environ.pop(PARALLELISM, None)

    def share(self, parts: Iterable[Part]) -> Iterator[Tokenised]:
        """Every part tokenised, in order, by this process or a helper."""
        begun = time.monotonic()
        results: deque[tuple[Part, Future[Tokenised] | Tokenised]] = deque()
        sent: deque[Future[Tokenised]] = deque()
        for part in parts:
            sent = deque(future for future in sent if not future.done())
            if len(sent) >= AHEAD * self._ready and self._allowed and time.monotonic() - begun >= ALONE_S:
                self._start_more()
            if len(sent) < AHEAD * self._ready:
                sent.append(self._threads.submit(self._send, part))
                results.append((part, sent[-1]))
            else:
                results.append((part, self._encoder(part)))
            while results and (isinstance(results[0][1], Tokenised) or results[0][1].done()):
                yield self._result(*results.popleft())
        while results:
            yield self._result(*results.popleft())

    def _result(self, part: Part, result: Future[Tokenised] | Tokenised) -> Tokenised:
        if isinstance(result, Tokenised):
            return result
        # At the end, this process takes over parts that still wait for a helper.
        return self._encoder(part) if result.cancel() else result.result()

    def _start_more(self) -> None:
        """Start a helper, or as many as are ready by now; do nothing while one is starting."""
        for future in [future for future in self._starting if future.done()]:
            self._starting.remove(future)
            future.result()
            self._ready += 1
            os.environ[PARALLELISM] = "false"  # from now on the helpers use the other cores
        if not self._starting:
            for _ in range(min(self._allowed - self._ready, max(1, self._ready))):
                self._processes.append(_Helper(self._setup))
                self._starting.append(self._threads.submit(self._wait_for, self._processes[-1]))

    def _wait_for(self, helper: _Helper) -> None:
        helper.receive()
        self._idle.put(helper)

    def _send(self, part: Part) -> Tokenised:
        helper = self._idle.get()
        try:
            helper.send(part)
            result: Tokenised = helper.receive()
        finally:
            self._idle.put(helper)  # even if it died: then the next thread gets an error and does not wait forever
        return result


class _Helper:
    """A process that receives parts and tokenises them, one at a time.

    It is a new Python interpreter that runs ``main``. ``multiprocessing`` is not used, because it would run the user's
    script again, and the script would need a guard (``if __name__ == "__main__"``). The helper is in a process group of
    its own, so Ctrl-C does not reach it. It ends when its input ends.
    """

    def __init__(self, setup: tuple[Any, ...]) -> None:
        # -P and this process's search path: Python imports nothing from the current folder.
        path = os.pathsep.join(str(Path(place).absolute()) for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from kr2cache.models import tokenise; tokenise.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
            env={**os.environ, "PYTHONPATH": path, PARALLELISM: "false", "OMP_NUM_THREADS": "1"},
        )
        self.send(setup)

    def send(self, value: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> Any:
        """The answer to what was sent.

        Raises:
            Exception: What the helper raised.
            KR2CacheError: If it ended.
        """
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _ended(self) -> KR2CacheError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return KR2CacheError(
            f"A process that helped to tokenise {how}.",
            "The system may have been short of memory. Run the same command again; with TOKENIZERS_PARALLELISM=false "
            "one process tokenises alone.",
        )

    def end(self) -> None:
        """End the process at once: it holds nothing that would be lost."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def main() -> None:
    """What a helper runs: load the tokenizer, then tokenise parts until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            spec, words, max_length = pickle.load(sys.stdin.buffer)
            tokenizer = load_tokenizer(spec, words=words)
            encoder = Encoder(tokenizer=tokenizer, words=words, max_length=max_length)
        except Exception as error:
            _answer(answers, error)
            return
        _answer(answers, None)
        while True:
            part = pickle.load(sys.stdin.buffer)
            try:
                result: object = encoder(part)
            except Exception as error:  # a tokenizer with code of its own may raise anything
                result = error
            _answer(answers, result)


def _answer(answers: IO[bytes], value: object) -> None:
    try:
        raw = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        pickle.loads(raw) if isinstance(value, Exception) else None
    except Exception:  # not every exception can be pickled
        raw = pickle.dumps(RuntimeError(f"{type(value).__name__}: {value}"))
    answers.write(raw)
    answers.flush()
