"""Both stages from Python: texts in memory, the options by name, and what a call leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from world import World, count_resource_batches

import kr2cache
from kr2cache import KR2CacheError
from kr2cache.calls import in_python
from kr2cache.cli import run
from kr2cache.errors import ConfigError, DataError, UnknownNameError
from kr2cache.experiment import pipeline
from kr2cache.extraction import trial
from kr2cache.store.inventory import entries
from kr2cache.system.console import WorkProgress, console
from kr2cache.tasks.udpos import UdPos

TEXTS = ["Das Haus, schön!", "ich", "здравствуй мир", "한국어 문장", "das " * 30, " ein  hund\n"]
"""With punctuation, one token, other scripts, a text that is cut, and blanks."""


@pytest.fixture
def place(workdir: Path, bert: Path) -> Path:
    """A working folder with a model and no kr2cache.toml."""
    (workdir / "res").symlink_to(bert)
    return workdir


def hidden_states(model: Path, text: str, max_length: int) -> NDArray[np.float32]:
    """(L, T, D), from transformers itself."""
    encoded = AutoTokenizer.from_pretrained(model)(text, truncation=True, max_length=max_length, return_tensors="pt")
    encoder = AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        states = encoder(encoded["input_ids"], output_hidden_states=True).hidden_states
    return torch.stack(states)[:, 0].numpy()


# Texts in memory -----------------------------------------------------------------------------------------------------


def test_states_are_those_of_transformers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = kr2cache.extract("res", TEXTS, max_length=20, dtype="float32")
    assert cache.ids == [f"train-{number}" for number in range(6)]
    assert cache.folder.parent == Path(".kr2cache/text/train")
    for name, text in zip(cache.ids, TEXTS, strict=True):
        np.testing.assert_allclose(cache[name], hidden_states(place / "res", text, 20), atol=1e-5)
    assert "1 sequence of 20 tokens (max_length): longer texts are cut." in capsys.readouterr().out


def test_the_same_texts_are_found_and_others_stand_beside(place: Path) -> None:
    first = kr2cache.extract("res", TEXTS)
    with count_resource_batches() as batches:
        assert kr2cache.extract("res", (text for text in TEXTS)).folder == first.folder
    assert not batches
    other = kr2cache.extract("res", TEXTS[:3])
    by_id = kr2cache.extract("res", dict(zip("abc", TEXTS, strict=False)))
    different = kr2cache.extract("res", ["das dog"])
    assert len({first.folder, other.folder, by_id.folder, different.folder}) == 4
    assert {first.folder.parent, other.folder.parent, by_id.folder.parent} == {Path(".kr2cache/text/train")}
    assert by_id.ids == ["a", "b", "c"]
    assert np.array_equal(by_id["b"], first["train-1"])
    assert not any(one.stale for one in entries(Path(".kr2cache"))), "they are other texts"
    assert kr2cache.extract("res", TEXTS[:3], split="validation").folder.parent == Path(".kr2cache/text/dev")


def test_the_command_line_finds_what_python_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = kr2cache.extract("res", ["das haus", "ich"], cache_dir=Path("caches"), layers=[0, 3])
    (place / "texts.txt").write_text("das haus\nich\n")
    line = "extract --resource res --task text --data texts.txt --cache-dir caches --layers 0,3"
    capsys.readouterr()
    assert run(line.split()) == 0
    assert f"Already complete: {made.folder}" in capsys.readouterr().out
    assert (
        kr2cache.extract("res", task="text", data="texts.txt", cache_dir="caches", layers="0,3").folder == made.folder
    )


def test_words_get_the_mean_of_their_tokens(place: Path) -> None:
    texts = [["Das", "Haus", "schön"], ["ich"]]
    cache = kr2cache.extract("res", texts, dtype="float32")
    assert cache.folder.parent == Path(".kr2cache/words/train")
    tokenizer = AutoTokenizer.from_pretrained(place / "res")
    for name, words in zip(cache.ids, texts, strict=True):
        states = hidden_states(place / "res", " ".join(words), 128)
        numbers = tokenizer(words, is_split_into_words=True).word_ids()
        expected = [
            states[:, [i for i, word in enumerate(numbers) if word == w]].mean(axis=1) for w in range(len(words))
        ]
        np.testing.assert_allclose(cache.words(name), np.stack(expected, axis=1), atol=1e-5)


def test_pooled_caches_give_the_same_means(place: Path) -> None:
    texts = [["Das", "Haus", "schön"], ["ich"]]
    whole = kr2cache.extract("res", texts, dtype="float32")
    words = kr2cache.extract("res", texts, dtype="float32", pool="word")
    sequences = kr2cache.extract("res", texts, dtype="float32", pool="sequence")
    assert [one.pool for one in (whole, words, sequences)] == ["none", "word", "sequence"]
    for name in whole.ids:
        assert words[name].shape[1] < whole[name].shape[1]
        np.testing.assert_allclose(words.words(name), whole.words(name), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sequences.mean(name), whole.mean(name), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="one state for each sequence"):
        sequences.words(whole.ids[0])
    with pytest.raises(ConfigError, match="one state for each sequence"):
        sequences.dataset(pool="word")


def test_a_data_set_of_datasets_gives_texts_and_ids(place: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"review": ["das haus", "ich"], "nr": [7, 8]})
    cache = kr2cache.extract("res", data, column="review", id_column="nr")
    assert cache.ids == ["7", "8"]
    assert cache.to_dataset(pool="sequence")["id"] == ["7", "8"]


@pytest.mark.parametrize("texts", [[], ["das", " "], ["das", None], "das"])
def test_what_is_no_text_is_refused_before_anything_is_made(texts: Any, place: Path) -> None:
    with pytest.raises(DataError):
        kr2cache.extract("res", texts)
    assert not (place / ".kr2cache").exists()


# Options -------------------------------------------------------------------------------------------------------------


def test_toml_of_the_working_folder_counts_but_names_no_other_texts(place: Path, corpus: Path) -> None:
    (place / "corpus").symlink_to(corpus)
    (place / "kr2cache.toml").write_text(
        '[defaults]\nresource = "mine"\ntask = "udpos"\ndata = "corpus"\nsplit = "dev"\nlimit = 1\nlayers = "last2"\n'
        '[models.mine]\npath = "res"\n'
    )
    cache = kr2cache.extract(texts=["das haus", "ich"])
    assert (cache.layers, cache.ids) == ((3, 4), ["train-0", "train-1"])
    named = kr2cache.extract(limit=2)
    assert named.folder.parent == Path(".kr2cache/udpos/dev")
    assert len(named) == 2


def test_a_task_may_be_an_object(place: Path, corpus: Path) -> None:
    class Mine(UdPos):
        def __init__(self) -> None:
            super().__init__(None)
            self.name = "mine"

    cache = kr2cache.extract("res", task=Mine(), data=corpus, split="dev")
    assert cache.folder.parent == Path(".kr2cache/mine/dev")
    assert len(cache) == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_lenght": 9}, UnknownNameError, "Unknown option of kr2cache.extract(): 'max_lenght'. Did you mean"),
        ({"shard_gb": "x"}, ConfigError, "shard_gb = 'x' in kr2cache.extract() should be a number"),
        ({"layers": 3}, ConfigError, "layers = 3 in kr2cache.extract() should be text in quotes, or a list such as"),
        ({"max_length": 700}, ConfigError, "Give max_length 600 or less."),
        ({"task": "snli"}, ConfigError, "task would name other data than texts"),
        ({"task": "text", "data": "x"}, ConfigError, "task and data would name other data than texts"),
        ({"resource": "other"}, ConfigError, "Two models are given"),
        ({"split": "trian"}, UnknownNameError, "Unknown split 'trian'"),
        ({"column": "x"}, ConfigError, "column and id_column are of a datasets.Dataset"),
    ],
)
def test_an_option_that_cannot_work_is_refused(
    options: dict[str, Any], error: type[KR2CacheError], message: str, place: Path
) -> None:
    with pytest.raises(error) as caught:
        kr2cache.extract("res", ["das"], **options)
    assert message in str(caught.value)
    assert str(caught.value) == "\n".join(caught.value.args)


def test_advice_names_options_as_python_does() -> None:
    assert in_python("Give --max-length 512 or --no-extract.") == "Give max_length 512 or extract=False."
    command = "Make one that fits:  kr2cache extract --resource res --max-length 9"
    assert in_python(command) == command
    assert in_python("--unknown-option") == "--unknown-option"


@pytest.mark.parametrize("function", [kr2cache.extract, kr2cache.train])
def test_a_notebook_can_show_and_complete_the_options(function: Callable[..., Any]) -> None:
    shown = inspect.signature(function).parameters
    assert shown["max_length"].default == 128
    assert {"task", "data", "cache_dir", "device", "limit"} <= set(shown)
    assert "options" not in shown


# What a call leaves behind -------------------------------------------------------------------------------------------


def test_a_call_leaves_the_process_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))

    def state() -> tuple[Any, ...]:
        folders = list((place / "tmp").iterdir())
        numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return dict(os.environ), torch.get_num_threads(), threading.active_count(), Path.cwd(), folders, numbers

    before = state()
    kr2cache.extract("res", TEXTS)
    with pytest.raises(ConfigError):
        kr2cache.extract("res", TEXTS, max_length=700)
    assert state() == before


def test_ctrl_c_is_what_python_programs_expect(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """``except Exception`` in a loop over models must not go on with the next one."""
    monkeypatch.chdir(world.folder)
    ran: list[Any] = []
    layers = trial.layers_of

    def interrupted(plan: Any, encoder: Any, batch: Any, **more: Any) -> Any:
        if list(world.caches.rglob("*.h5")):
            ran.append(batch)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return layers(plan, encoder, batch, **more)

    texts = [" ".join(tiny.WORDS[:count]) for count in range(1, 7)]
    call: dict[str, Any] = {"tokens_per_batch": 1, "cache_dir": world.caches}
    with monkeypatch.context() as patch:
        patch.setattr(trial, "layers_of", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"2 of 6 sequences are complete, kept in .* same call again"):
            kr2cache.extract("models/res", texts, **call)
    assert kr2cache.extract("models/res", texts, **call).complete.all()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_seed", stop)
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted in seed 1\. Caches and 0 finished runs"):
        kr2cache.train(reader="models/reader", task="udpos", data="corpus", method="kreader", seeds=[1])


def test_a_call_works_in_a_thread(place: Path) -> None:
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(kr2cache.extract("res", TEXTS)))
    thread.start()
    thread.join()
    assert len(made[0]) == 6


def test_progress_changes_in_place_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython is not among our dependencies: this is what a kernel was seen to get."""
    shown: list[Any] = []
    notebook: Any = ModuleType("IPython.display")

    class Handle:
        update = shown.append

    notebook.display = lambda table, display_id: (shown.append(table), Handle)[1]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setattr(console, "is_jupyter", True)
    with WorkProgress("minilm on text/train", "sequences", total=100) as progress:
        for _ in range(100):
            progress.advance(1)
    assert 2 <= len(shown) <= 4, "a hundred changes within a quarter of a second are few outputs"
    assert all(hasattr(table, "_repr_mimebundle_") for table in shown)


# Training ------------------------------------------------------------------------------------------------------------


def test_train_takes_options_by_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    options: dict[str, Any] = {
        "reader": "models/reader",
        "resource": Path("models/res"),
        "task": "udpos",
        "data": Path("corpus"),
        "fusion": "last2",
        "epochs": 1,
        "learning_rate": 1e-3,
    }
    result = kr2cache.train(**options, seeds=[1, 2])
    assert [run.seed for run in result.runs] == [1, 2]
    scores = [run.metrics["test"]["accuracy"] for run in result.runs]
    assert result.mean["test"]["accuracy"] == pytest.approx(np.mean(scores))
    assert result.std["test"]["accuracy"] == pytest.approx(np.std(scores, ddof=1))
    assert result.runs[0].folder.parent.parent == Path("runs/udpos")
    lines = repr(result).splitlines()
    assert lines[0] == "kr2 (models/reader + models/res, last2) on udpos"
    assert [line.split()[0] for line in lines[2:6]] == ["seed", "seed", "mean", "std"]
    assert f"{np.mean(scores):.4f}" in lines[4]
    again = kr2cache.train(**options, seeds=(1,), extract=False)
    assert again.runs[0].seconds is None
    assert again.std["test"]["accuracy"] is None
    assert "std" not in repr(again)
    with pytest.raises(KR2CacheError, match=r"and extract=False was given"):
        kr2cache.train(**(options | {"fusion": "last3", "limit": 3, "cache_dir": "none"}), extract=False)


def test_training_arguments_are_added_to_those_of_the_toml_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    toml = '[training]\nlr_scheduler_type = "linear"\nweight_decay = 0.25\n'
    (world.folder / "kr2cache.toml").write_text(toml, "utf-8")
    options: dict[str, Any] = {
        "reader": "models/reader",
        "task": "udpos",
        "data": "corpus",
        "method": "kreader",
        "epochs": 2,
        "seeds": [1],
        "learning_rate": 1e-3,
    }
    given = {"lr_scheduler_type": "constant", "max_grad_norm": np.float64(0.5), "logging_steps": np.int64(2)}
    rates = []
    for training in (None, given):
        (run_of,) = kr2cache.train(**options, training=training).runs
        decided = json.loads((run_of.folder / "config.json").read_text("utf-8"))["config"]["training"]
        expected = {"lr_scheduler_type": "linear", "weight_decay": 0.25} | (training or {})
        assert decided == {name: value for name, value in expected.items() if name != "logging_steps"}
        history = json.loads((run_of.folder / "history.json").read_text("utf-8"))["epochs"]
        rates.append([one["learning_rate"] for one in history if "learning_rate" in one])
    assert rates[0][-1] == 5e-4, "linear: half of it in the second of two steps"
    assert set(rates[1]) == {1e-3}
    faults: list[tuple[Any, str]] = [
        (["bf16"], r"training is \['bf16'\], not a dictionary"),
        ({"optim": object()}, "training has 'optim' = <object .*, which cannot be written into a run"),
        ({"weight_decay": np.nan}, "which cannot be written into a run"),
        ({"seed": 3}, r"^training sets seed, which has an option of its own\.\nUse seeds instead"),
        ({"warmup": 3}, "Unknown argument in training: 'warmup'"),
        ({"optim": "adamw_9bit"}, "^training has settings that do not work. optim = 'adamw_9bit'"),
    ]
    for wrong, message in faults:
        with pytest.raises(KR2CacheError, match=message):
            kr2cache.train(**options, training=wrong)


def test_nothing_is_trained_on_plain_text(place: Path) -> None:
    (place / "a.txt").write_text("das\n")
    with pytest.raises(ConfigError, match="kind text: it has no labels"):
        kr2cache.train(resource="res", reader="res", task="text", data="a.txt")


@pytest.mark.long
def test_the_states_of_a_real_model(workdir: Path) -> None:
    folder = tiny.minilm()
    texts = ["The quick brown fox.", "Der schnelle Fuchs springt.", "狐狸", "a " * 100]
    cache = kr2cache.extract(folder, texts, max_length=64, dtype="float32")
    for name, text in zip(cache.ids, texts, strict=True):
        np.testing.assert_allclose(cache[name], hidden_states(folder, text, 64), atol=2e-4)
