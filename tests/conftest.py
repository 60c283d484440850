"""What every test may use."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Before anything of Hugging Face is imported: tests never ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("KR2CACHE_DIR", None)
# Models this small lose time to a second thread; child processes take the same.
os.environ["OMP_NUM_THREADS"] = "1"

import tiny
import torch
from forking import ForkedPython
from world import World

from kr2cache.system.allocator import objects_set_aside

torch.set_num_threads(1)
# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist=loadfile``, one process runs all tests of a file. But each test of the walk over all architectures
    is given to any process. They come last, as files with more tests come first, and keep all busy until the end.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesAndTheWalk(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_table.py" in nodeid else str(super()._split_scope(nodeid))

    return FilesAndTheWalk(config, log)


@pytest.fixture(scope="session", autouse=True)
def set_aside() -> Iterator[ExitStack]:
    """Collecting garbage looks at new objects alone, as inside a sweep: those that torch, transformers and pytest made
    cost 0.2 s each time, and every training collects several times.
    """
    with ExitStack() as blocks:
        blocks.enter_context(objects_set_aside())
        yield blocks


@pytest.fixture
def nothing_set_aside(set_aside: ExitStack) -> Iterator[None]:
    """As in a program of its own: a training sets objects aside itself, and gives them back."""
    set_aside.close()
    yield
    set_aside.enter_context(objects_set_aside())


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: no kr2cache.toml, no caches."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def forked_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python programs that the test starts, and their workers, are forks of it."""
    monkeypatch.setattr(subprocess, "Popen", ForkedPython)


@pytest.fixture(params=["forked", pytest.param("new", marks=pytest.mark.long)])
def programs(request: pytest.FixtureRequest) -> None:
    """Python programs that the test starts, and their workers, are forks of it. In the long tests they are new
    interpreters, as for a user.
    """
    if request.param == "forked":
        request.getfixturevalue("forked_programs")


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts that the test looks up. None is found, as without a network."""
    hosts: list[str] = []

    def look_up(host: str, *more: Any, **named: Any) -> NoReturn:
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return hosts


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, 4 layers of width 16, so 5 stored ones. Read only."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny-bert", layers=4)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 train, 5 dev, 6 test sentences. Read only."""
    return tiny.save_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def reader_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny XLM-R of another width than the resource, so that there is a projection. Read only."""
    return tiny.save_model(tmp_path_factory.mktemp("readers") / "tiny-xlmr", "xlm-roberta", width=24, seed=5)


@pytest.fixture
def make(bert: Path, reader_model: Path, corpus: Path) -> Callable[[Path], World]:
    def build(folder: Path) -> World:
        shutil.copytree(bert, folder / "models" / "res")
        shutil.copytree(reader_model, folder / "models" / "reader")
        shutil.copytree(corpus, folder / "corpus")
        return World(folder)

    return build


@pytest.fixture
def world(tmp_path: Path, make: Callable[[Path], World]) -> World:
    return make(tmp_path)
