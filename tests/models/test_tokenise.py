"""The same index by one process and by several; what happens if one of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from kr2cache.cache.format import GrowingIndex, SequenceIndex
from kr2cache.errors import DataError, KR2CacheError
from kr2cache.models import tokenise as module
from kr2cache.models.encode import MissingWords, encode_examples, missing_words
from kr2cache.models.registry import ModelSpec, find_model
from kr2cache.models.tokenise import Tokenised, helpers_allowed, tokenise
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.tasks import Example, find_task

WORDS = ("das", "ich", " ", "haus", "zwölf", "nebenan")


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers from the first part on, though the tests' environment forbids them."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    monkeypatch.setattr(module, "helpers_allowed", lambda: 2)
    monkeypatch.setattr(module, "ALONE_S", 0.0)
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 10)


def examples(task: str, count: int) -> list[Example]:
    draw = np.random.default_rng(0)

    def text() -> list[str]:
        return [WORDS[i] for i in draw.integers(0, len(WORDS), draw.integers(1, 30))]

    if task == "udpos":
        return [Example(f"s{i}", (tuple(text()),), None) for i in range(count)]
    context = [" ".join(["das", *text()]) for _ in range(count)]
    return [
        Example(f"c{i}", tuple((context[i], " ".join(["ich", *text()])) for _ in range(2)), None) for i in range(count)
    ]


def spec_of(bert: Path) -> ModelSpec:
    return find_model(str(bert), {})


def same(a: SequenceIndex, b: SequenceIndex) -> None:
    for name in ("ids", "n_tokens", "text_xxh3", "input_id", "word_index"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
    assert (a.segment_id is None) == (b.segment_id is None)
    if a.segment_id is not None:
        np.testing.assert_array_equal(a.segment_id, b.segment_id, strict=True)


class Sent:
    """Counts the parts that helpers tokenise; the source waits until the first helper is ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts = 0
        self.helpers: list[Any] = []
        send, wait = module._Helpers._send, module._Helpers._wait_for

        def counted(helpers: Any, part: Any) -> Tokenised:
            self.parts += 1
            return send(helpers, part)

        def noted(helpers: Any, helper: Any) -> None:
            wait(helpers, helper)
            self.helpers.append(helper)

        monkeypatch.setattr(module._Helpers, "_send", counted)
        monkeypatch.setattr(module._Helpers, "_wait_for", noted)

    def after_the_start(self, some: list[Example]) -> Iterator[Example]:
        """The examples; after the first 30, those of three parts, they wait for a helper."""
        for i, one in enumerate(some):
            while i == 30 and not self.helpers:
                time.sleep(0.05)
            yield one


@pytest.mark.usefixtures("helped", "programs")
@pytest.mark.parametrize(("task", "segments"), [("udpos", False), ("piqa", False), ("piqa", True)])
def test_helpers_give_the_index_of_one_process(
    task: str, segments: bool, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save_model(tmp_path / "model", type_vocab_size=2 if segments else 1)
    spec, of = spec_of(model), find_task(task)
    tokenizer = load_tokenizer(spec, words=of.words)
    some = examples(task, 300)
    sent = Sent(monkeypatch)
    got = tokenise(spec, tokenizer, sent.after_the_start(some), of, 24)
    expected = encode_examples(tokenizer, some, of, 24)
    assert sent.parts > 0
    assert (expected.segment_id is not None) == segments
    same(got.index, expected)
    if of.words:
        missing = missing_words(expected, [one.texts[0] for one in some], 24, tokenizer)
        assert got.missing_words == missing
        assert missing.cut_off and missing.no_token
    else:
        assert got.missing_words == MissingWords(0, 0)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_one_process_gives_the_same_in_parts(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 7)
    task = find_task("udpos")
    tokenizer = load_tokenizer(spec_of(bert), words=True)
    some = examples("udpos", 100)
    same(tokenise(spec_of(bert), tokenizer, iter(some), task, 24).index, encode_examples(tokenizer, some, task, 24))


@pytest.mark.usefixtures("helped", "programs")
def test_a_fault_in_the_data_ends_all_helpers(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch)
    tokenizer = load_tokenizer(spec_of(bert), words=True)

    def faulty() -> Iterator[Example]:
        yield from sent.after_the_start(examples("udpos", 200))
        raise DataError("file.conllu:7: broken.")

    with pytest.raises(DataError, match=r"file\.conllu:7"):
        tokenise(spec_of(bert), tokenizer, faulty(), find_task("udpos"), 24)
    assert sent.helpers
    assert all(helper._process.returncode is not None for helper in sent.helpers)


@pytest.mark.usefixtures("helped", "programs")
def test_a_helpers_error_is_the_error_of_one_process(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch)
    tokenizer = load_tokenizer(spec_of(bert), words=True)
    some = examples("udpos", 200)
    some[150] = Example("a\0b", some[150].texts, None)
    with pytest.raises(KR2CacheError, match="cannot be the id of a sequence") as caught:
        tokenise(spec_of(bert), tokenizer, sent.after_the_start(some), find_task("udpos"), 24)
    with pytest.raises(KR2CacheError) as alone:
        encode_examples(tokenizer, some, find_task("udpos"), 24)
    assert (type(caught.value), str(caught.value)) == (type(alone.value), str(alone.value))


@pytest.mark.usefixtures("helped", "programs")
def test_a_helper_that_is_killed_is_reported(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = Sent(monkeypatch)
    tokenizer = load_tokenizer(spec_of(bert), words=True)

    def killing() -> Iterator[Example]:
        for i, one in enumerate(sent.after_the_start(examples("udpos", 400))):
            if i == 100:
                sent.helpers[0]._process.kill()
            yield one

    begun = time.monotonic()
    with pytest.raises(KR2CacheError, match="helped to tokenise was ended by signal 9") as caught:
        tokenise(spec_of(bert), tokenizer, killing(), find_task("udpos"), 24)
    assert "TOKENIZERS_PARALLELISM=false" in caught.value.remedy
    assert time.monotonic() - begun < 60


@pytest.mark.usefixtures("helped", "programs")
def test_a_helper_that_cannot_load_the_tokenizer_says_why(bert: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(spec_of(bert), words=True)

    def waiting() -> Iterator[Example]:
        for one in examples("udpos", 4000):
            time.sleep(0.005)
            yield one

    spec = find_model(str(tiny.save_model(tmp_path / "gone")), {})
    (tmp_path / "gone" / "config.json").unlink()
    with pytest.raises(KR2CacheError, match=r"config\.json"):
        tokenise(spec, tokenizer, waiting(), find_task("udpos"), 24)


SCRIPT = """
import sys, time
from kr2cache.models import tokenise as module
from kr2cache.models.registry import find_model
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.tasks import Example, find_task
module.ALONE_S, module.TEXTS_AT_ONCE = 0.0, 10
spec, task = find_model(sys.argv[1], {}), find_task("udpos")
started = []
wait = module._Helpers._wait_for
def noted(helpers, helper):
    wait(helpers, helper)
    started.append(helper)
    print(helper._process.pid, flush=True)
module._Helpers._wait_for = noted
module.helpers_allowed = lambda: 2
def forever():
    for i in range(10**9):
        time.sleep(0.001)
        yield Example(f"s{i}", (("das", "haus"),), None)
try:
    module.tokenise(spec, load_tokenizer(spec, words=True), forever(), task, 24)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_helper_outlives_the_process_that_started_it(number: int, code: int, bert: Path) -> None:
    """A plain script, not guarded by ``__name__``: Ctrl-C ends it at once, and even SIGKILL leaves no helper."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(bert)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    helper = int(process.stdout.readline())
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(30) == code
    process.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{helper}").exists() and _is_running(helper):
        time.sleep(0.05)
    assert not _is_running(helper)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_environment_limits_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for parallelism, threads, expected in (
        (None, None, 7),
        ("true", None, 7),
        ("false", None, 0),
        ("0", "4", 0),
        (None, "3", 2),
        (None, "1", 0),
        (None, "64", 7),
        (None, "4,2", 7),
    ):
        for name, value in (("TOKENIZERS_PARALLELISM", parallelism), ("OMP_NUM_THREADS", threads)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert helpers_allowed() == expected, (parallelism, threads)


def test_a_growing_index_is_its_parts_joined() -> None:
    """Ids grow wider, and segment ids come late: the tokens before them are of segment 0."""
    draw = np.random.default_rng(1)

    def part(name: str, lengths: list[int], segments: bool) -> SequenceIndex:
        tokens = sum(lengths)
        return SequenceIndex(
            ids=np.array([f"{name}{i}".encode() for i in range(len(lengths))]),
            n_tokens=np.array(lengths, dtype=np.int32),
            text_xxh3=draw.integers(0, 2**63, len(lengths), dtype=np.uint64),
            input_id=draw.integers(0, 99, tokens, dtype=np.int32),
            word_index=draw.integers(-1, 9, tokens, dtype=np.int32),
            segment_id=np.ones(tokens, dtype=np.int8) if segments else None,
        )

    parts = [part("a", [2, 3], False), part("long", [1], True), part("b", [4] * 2000, False)]
    growing = GrowingIndex()
    for one in parts:
        growing.add(one)
    whole = growing.finish()
    assert whole.ids.dtype == "S5"
    for name in ("ids", "n_tokens", "text_xxh3", "input_id", "word_index"):
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(one, name) for one in parts]))
    assert whole.segment_id is not None
    assert whole.segment_id.tolist() == [0] * 5 + [1] + [0] * 8000
    growing = GrowingIndex()
    growing.add(parts[0])
    assert growing.finish().segment_id is None
