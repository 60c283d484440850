"""The command line as people and scripts meet it: what it prints, where, with which exit code, and what it leaves."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from tokenizers import normalizers
from transformers import AutoTokenizer

from kr2cache import FeatureCache, __version__
from kr2cache.cli import run
from kr2cache.config import TrainConfig
from kr2cache.errors import ConfigError, KR2CacheError

TOML = """
[defaults]
data = "corpus"
{defaults}

[models.gottbert]
path = "models/gottbert"

[models.xlm-r]
path = "models/xlm-r"
"""
QUICK = "epochs = 1\nseeds = [1, 2]\nbatch-size = 6"


@pytest.fixture(scope="session")
def xlmr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("cli-models") / "xlm-r", "xlm-roberta", seed=3)


@pytest.fixture
def place(workdir: Path, bert: Path, xlmr: Path, corpus: Path) -> Path:
    """A working folder as a new user has it: two models, a corpus, and a kr2cache.toml that says where they are."""
    shutil.copytree(bert, workdir / "models" / "gottbert")
    shutil.copytree(xlmr, workdir / "models" / "xlm-r")
    shutil.copytree(corpus, workdir / "corpus")
    (workdir / "kr2cache.toml").write_text(TOML.format(defaults=QUICK))
    return workdir


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def command(line: str) -> int:
    return run(shlex.split(line))


class Answer:
    """One call with --json: the document on standard output, and what people see."""

    def __init__(self, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        self.code = command(f"{line} --json")
        captured = capsys.readouterr()
        self.document: Any = json.loads(captured.out)
        self.people = captured.err


# The two commands ----------------------------------------------------------------------------------------------------


def test_the_two_commands_word_for_word(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("kr2cache extract --resource gottbert --split train".removeprefix("kr2cache ")) == 0
    shown = capsys.readouterr().out
    folder = next((place / ".kr2cache" / "udpos-de" / "train").iterdir())
    assert folder.name.startswith("gottbert-")
    assert len(FeatureCache.open(folder)) == 12
    assert "12 sequences" in shown
    assert folder.name in shown
    assert command("train --fusion last4") == 0
    shown = capsys.readouterr().out
    (runs,) = (place / "runs" / "udpos-de").iterdir()
    assert runs.name.startswith("kr2-xlm-r-gottbert-last4-")
    assert {path.name for path in runs.iterdir()} == {"seed-1", "seed-2"}
    for seed in (1, 2):
        metrics = json.loads((runs / f"seed-{seed}" / "metrics.json").read_text())
        assert f"{100 * metrics['test']['accuracy']:.1f}" in shown
    assert "mean" in shown
    assert "11 sequences now" in shown, "dev and test were extracted by train"


def test_extract_prints_one_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Answer("extract --resource gottbert --split validation", capsys)
    assert first.code == 0
    assert set(first.document) == {"cache", "sequences", "tokens", "bytes", "seconds", "computed"}
    cache = FeatureCache.open(first.document["cache"])
    assert first.document["sequences"] == first.document["computed"] == len(cache) == 5
    assert first.document["tokens"] == int(cache.n_tokens.sum())
    assert first.document["bytes"] == sum(path.stat().st_size for path in Path(first.document["cache"]).glob("*.h5"))
    assert cache.provenance["chosen"]["split"] == "dev"
    assert "gottbert" in first.people
    again = Answer("extract --resource gottbert --split dev", capsys)
    assert again.document["computed"] == 0
    assert again.document["cache"] == first.document["cache"]
    assert "Already complete" in again.people


def test_train_prints_one_document(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer("train --resource gottbert --fusion fuse --seeds 3", capsys)
    assert answer.code == 0
    assert {"runs", "mean", "std"} <= set(answer.document)
    (one,) = answer.document["runs"]
    assert set(one) == {"seed", "folder", "metrics"}
    assert one["seed"] == 3
    assert one["metrics"] == json.loads((Path(one["folder"]) / "metrics.json").read_text())
    assert answer.document["mean"]["test"]["f1"] == one["metrics"]["test"]["f1"]
    assert answer.document["std"]["test"]["f1"] is None
    assert "learned w by layer" in answer.people


def test_people_get_their_text_on_standard_output_again_after_json(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Answer("extract --resource gottbert --split dev", capsys)
    assert command("extract --resource gottbert --split dev") == 0
    captured = capsys.readouterr()
    assert "Already complete" in captured.out
    assert captured.err == ""


def test_extract_says_how_many_words_get_no_states(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "models" / "gottbert")
    lost = 0
    for block in (place / "corpus" / "train.conllu").read_text("utf-8").strip().split("\n\n"):
        words = [line.split("\t")[1] for line in block.splitlines() if line.split("\t")[0].isdigit()]
        there = tokenizer(words, is_split_into_words=True, truncation=True, max_length=6).word_ids()
        lost += len(words) - len(set(there) - {None})
    assert lost > 0
    assert command("extract --resource gottbert --split train --max-length 6") == 0
    expected = f"No states for {lost} words: {lost} cut off at 6 tokens (--max-length)."
    assert expected in capsys.readouterr().out
    assert command("extract --resource gottbert --split train --max-length 100") == 0
    assert "No states" not in capsys.readouterr().out


def test_extract_says_how_many_texts_are_as_long_as_they_may_be(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "pairs").mkdir()
    rows = [
        {"sentence1": "das " * n, "sentence2": "haus", "gold_label": "neutral", "pairID": str(n)} for n in (1, 9, 20)
    ]
    (place / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    line = "extract --resource gottbert --task snli --data pairs --split train"
    assert command(f"{line} --max-length 12") == 0
    assert "2 sequences of 12 tokens (--max-length): longer texts are cut." in capsys.readouterr().out
    assert command(f"{line} --max-length 100") == 0
    assert "(--max-length)" not in capsys.readouterr().out


def test_the_states_of_plain_text_by_file_and_by_standard_input(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["das haus", "", "ein hund"]
    (place / "sentences.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    first = Answer("extract --resource gottbert --task text --data sentences.txt", capsys)
    assert (first.document["sequences"], first.document["computed"]) == (2, 2)
    assert "gottbert on text/train (sentences.txt)" in first.people
    assert "1 line of 3 blank" in first.people
    cache = FeatureCache.open(first.document["cache"])
    assert cache.folder.parent == Path(".kr2cache/text/train")
    assert cache.ids == ["train-0", "train-2"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(lines).encode())))
    again = Answer("extract --resource gottbert --task text --data -", capsys)
    assert (again.document["cache"], again.document["computed"]) == (first.document["cache"], 0)
    (place / "dev.txt").write_text("das haus", "utf-8")
    assert Answer("extract --resource gottbert --task text --data dev.txt", capsys).code == 0
    assert [path.name for path in (place / ".kr2cache" / "text").iterdir() if path.name != "train"] == ["dev"]
    before = files(place)
    refused = Answer("train --resource gottbert --task text --data sentences.txt", capsys)
    assert refused.code == 1
    assert "Task 'text' is of kind text: it has no labels" in refused.document["error"]["message"]
    assert files(place) == before


def test_predict_says_how_many_words_it_did_not_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Answer("train --resource gottbert --fusion last2 --seeds 1 --max-length 8", capsys).document
    run_folder = trained["runs"][0]["folder"]
    assert command(f"predict --run {run_folder} '{'das ' * 20}'") == 0
    captured = capsys.readouterr()
    count = captured.out.split().count("das/_")
    assert 0 < count < 20
    assert f"{count} words without a label, shown as _" in captured.err
    assert f"shown as _: {count} cut off at 8 tokens (--max-length of train)." in captured.err
    assert command(f"predict --run {run_folder} das") == 0
    assert "without a label" not in capsys.readouterr().err


def test_words_without_a_token_are_told_apart_from_words_cut_off(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that cut texts at their beginning, and whose tokenizer drops a zero-width space and a soft hyphen."""
    for model in (place / "models").iterdir():
        for name, change in (
            ("tokenizer.json", {"normalizer": json.loads(normalizers.BertNormalizer().__getstate__())}),
            ("tokenizer_config.json", {"truncation_side": "left"}),
        ):
            path = model / name
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    forms = {"train": ["das"] * 20 + ["\u200b"], "dev": ["das", "\u00ad", "haus", "\u200b"], "test": ["das"] * 20}
    for split, words in forms.items():
        text = tiny.conllu([[(word, "NOUN") for word in words]])
        (place / "corpus" / f"{split}.conllu").write_text(text, "utf-8")
    assert command("extract --resource gottbert --split train --max-length 12 --dry-run") == 0
    beyond = 20 - 10 // len(tiny.tokenizer().tokenize("das"))
    dropped = "that becomes no token (such as a zero-width space)"
    assert f"No states for {beyond + 1} words: {beyond} cut off at 12 tokens (--max-length), 1 {dropped}." in said(
        capsys
    )
    line = "train --resource gottbert --fusion last2 --seeds 1 --epochs 1 --max-length 12"
    assert command(line) == 0
    shown = said(capsys)
    assert f"does not see {beyond + 1} words of the train split: {beyond} cut off at 12 tokens" in shown
    assert "does not see 2 words of the dev split; they count as wrong: 2 that become no token" in shown
    assert f"does not see {beyond} words of the test split; they count as wrong: {beyond} cut off" in shown
    assert "words without a label" in shown
    run = next((place / "runs").glob("*/*/seed-1"))
    assert json.loads((run / "metrics.json").read_text())["dev"]["cut_off_words"] == 2
    assert command(f"predict --run {run} 'das \u200b'") == 0
    assert f"1 word without a label, shown as _: 1 {dropped}." in capsys.readouterr().err


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_options_go_before_toml_and_toml_before_what_is_written_down(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "kr2cache.toml").write_text(
        TOML.format(defaults='resource = "gottbert"\nsplit = "dev"\nmax-length = 20\nlayers = [0, 3]\nlimit = 3')
    )
    cache = FeatureCache.open(Answer("extract", capsys).document["cache"])
    assert (cache.layers, len(cache)) == ((0, 3), 3)
    assert cache.provenance["chosen"]["max_length"] == 20
    assert cache.dtype == "float16"
    answer = Answer("extract --max-length 30 --layers all --limit 2 --dtype int8", capsys)
    cache = FeatureCache.open(answer.document["cache"])
    assert (cache.layers, len(cache), cache.dtype) == ((0, 1, 2, 3, 4), 2, "int8")
    assert cache.provenance["chosen"]["max_length"] == 30


def test_the_cache_folder_comes_from_the_environment(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KR2CACHE_DIR", str(place / "elsewhere"))
    assert Path(Answer("extract --resource gottbert --split dev", capsys).document["cache"]).is_relative_to(
        place / "elsewhere"
    )
    assert not (place / ".kr2cache").exists()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing_and_tells_sizes(
    place: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    before = files(place)
    line = "extract --resource gottbert --split train --dry-run"
    if as_json:
        document = Answer(line, capsys).document
        tokens = document["tokens"]
        assert document["bytes_by_choice"]["float16"] == {
            "all": tokens * 5 * 16 * 2,
            "last4": tokens * 4 * 16 * 2,
            "one layer": tokens * 16 * 2,
        }
        assert document["bytes_by_choice"]["int8"]["all"] == tokens * 5 * (16 + 4)
        assert document["computed"] == 0
    else:
        assert command(line) == 0
        shown = capsys.readouterr().out
        assert all(dtype in shown for dtype in ("float16", "float32", "bfloat16", "int8"))
    assert files(place) == before


def test_models_and_tasks_are_listed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {entry["name"]: entry for entry in Answer("models", capsys).document}
    assert models["gottbert"]["folder"] == "models/gottbert"
    assert models["gottbert"]["language"] == "de"
    assert models["beto"]["folder"] is None
    assert "sentencepiece" in models["kobert"]["needs"]
    tasks = {entry["name"]: entry for entry in Answer("tasks", capsys).document}
    assert tasks["udpos-de"]["data"] == "google/xtreme"
    assert len(tasks["udpos-de"]["labels"]) == 17
    assert command("models") == 0
    shown = capsys.readouterr().out
    assert "gottbert" in shown
    assert "models/gottbert" in shown
    assert command("tasks") == 0
    assert "de (German)" in " ".join(capsys.readouterr().out.split())


def test_version_and_help(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out.strip() == __version__
    assert command("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("extract", "train", "models", "tasks", "demo"))
    for name, options in {
        "extract": "resource split task data max-length layers dtype compute-dtype device tokens-per-batch shard-gb "
        "limit cache-dir dry-run json debug",
        "train": "reader resource task data fusion method projection seeds epochs batch-size learning-rate "
        "fusion-learning-rate max-length resource-max-length limit train-limit device run-dir cache-dir no-extract "
        "json debug",
    }.items():
        assert command(f"{name} --help") == 0
        shown = capsys.readouterr().out
        for option in options.split():
            assert f"--{option}" in shown, option


def test_no_arguments_is_wrong_usage_and_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    captured = capsys.readouterr()
    assert "extract" in captured.err + captured.out


def test_the_module_runs_as_a_program(workdir: Path) -> None:
    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kr2cache.cli", *arguments], capture_output=True, text=True, check=False
        )

    done = program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    wrong = program("extract", "--no-such-option", "--json")
    assert wrong.returncode == 2
    assert json.loads(wrong.stdout)["error"]["type"] == "UsageError"
    failed = program("extract")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "Which resource?" in failed.stderr
    assert "Traceback" not in failed.stderr


# What goes wrong -----------------------------------------------------------------------------------------------------


def write_train(text: str) -> Callable[[Path], object]:
    return lambda place: (place / "corpus" / "train.conllu").write_text(text, "utf-8")


def write_toml(text: str) -> Callable[[Path], object]:
    return lambda place: (place / "kr2cache.toml").write_text(text)


def toml_with(section: str) -> Callable[[Path], object]:
    return write_toml(TOML.format(defaults=QUICK) + section)


def remove(name: str) -> Callable[[Path], object]:
    return lambda place: (place / name).unlink()


def too_wide(place: Path) -> None:
    """A model whose states no disk can hold; its weights are never looked at."""
    path = place / "models" / "gottbert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 10**9}))


def nothing(place: Path) -> None:
    pass


WORD = "1\ta\t_\tNOUN" + "\t_" * 6 + "\n\n"
EXTRACT = "extract --resource gottbert --split train"
TRAIN = "train --resource gottbert"
WRONG: dict[str, tuple[Callable[[Path], object], str, int, tuple[str, ...]]] = {
    "model": (nothing, "extract --resource gotbert", 1, ("'gotbert'", "'gottbert'", "beto")),
    "reader": (nothing, f"{TRAIN} --reader xlmr", 1, ("'xlmr'", "'xlm-r'")),
    "task": (nothing, f"{EXTRACT} --task udpos-dee", 1, ("'udpos-dee'", "'udpos-de'")),
    "fusion": (nothing, f"{TRAIN} --fusion lst4", 1, ("'lst4'", "'last4'", "layerN")),
    "split": (nothing, "extract --resource gottbert --split tarin", 1, ("'tarin'", "'train'")),
    "option": (nothing, f"{EXTRACT} --resourc x", 2, ("--resourc", "--resource")),
    "command": (nothing, "extrct", 2, ("extrct", "extract")),
    "value of an option": (nothing, f"{EXTRACT} --max-length ten", 2, ("--max-length", "integer")),
    "method": (nothing, f"{TRAIN} --method kr22", 1, ("'kr22'", "'kr2'", "kreader2")),
    "projection": (nothing, f"{TRAIN} --projection mpl", 1, ("'mpl'", "'mlp'", "direct")),
    "dtype": (nothing, f"{EXTRACT} --dtype float61", 1, ("'float61'", "'float16'", "bfloat16")),
    "compute dtype": (nothing, f"{EXTRACT} --compute-dtype float61", 1, ("'float61'", "'float16'")),
    "device": (nothing, f"{EXTRACT} --device cdua", 1, ("cdua", "auto")),
    "device of train": (nothing, f"{TRAIN} --device cdua", 1, ("cdua", "auto")),
    "layers": (nothing, f"{EXTRACT} --layers some", 1, ("some",)),
    "layer it lacks": (nothing, f"{EXTRACT} --layers 0,9", 1, ("9", "0 to 4")),
    "layer of a fusion": (nothing, f"{TRAIN} --fusion layer9", 1, ("9",)),
    "missing split": (
        remove("corpus/train.conllu"), EXTRACT, 1, ("no train split", "train.conllu", "dev.conllu, test.conllu")
    ),
    "missing split of train": (remove("corpus/train.conllu"), TRAIN, 1, ("no train split", "train.conllu")),
    "data folder": (nothing, f"{EXTRACT} --data ./nowhere", 1, ("./nowhere",)),
    "columns": (write_train("1\ta\tNOUN\n\n"), EXTRACT, 1, ("train.conllu:1", "3 columns")),
    "tag": (write_train(WORD.replace("NOUN", "NUON")), EXTRACT, 1, ("train.conllu", "'NUON'", "NOUN")),
    "duplicate id": (
        write_train(f"# sent_id = s\n{WORD}# sent_id = s\n{WORD}"), EXTRACT, 1,
        ("'s'", "train.conllu:2", "train.conllu:5"),
    ),
    "empty split": (write_train(""), EXTRACT, 1, ("train", "no example")),
    "no dev, no test": (
        lambda place: [(place / "corpus" / f"{name}.conllu").unlink() for name in ("dev", "test")], TRAIN, 1,
        ("neither a dev nor a test",),
    ),
    "one file": (nothing, f"{TRAIN} --data corpus/train.conllu", 1, ("is one file", "train.conllu and dev.conllu")),
    "disk": (too_wide, EXTRACT, 1, ("free", "--layers last4", "--dtype int8")),
    "max length": (nothing, f"{EXTRACT} --max-length 9999", 1, ("9999", "--max-length 600")),
    "tiny max length": (nothing, f"{EXTRACT} --max-length 2", 1, ("--max-length 3",)),
    "limit 0": (nothing, f"{EXTRACT} --limit 0", 1, ("--limit 0",)),
    "limit 0 of train": (nothing, f"{TRAIN} --limit 0", 1, ("--limit 0",)),
    "equal seeds": (nothing, f"{TRAIN} --seeds 1,1", 1, ("--seeds 1,1", "different")),
    "a seed below 0": (nothing, f"{TRAIN} --seeds 1,-1", 1, ("--seeds 1,-1: -1 is not a seed", "from 0 to 4294967295")),
    "a large seed": (nothing, f"{TRAIN} --seeds 4294967296", 1, ("4294967296 is not a seed", "from 0 to 4294967295")),
    "capitals": (nothing, f"{TRAIN} --method KR2", 1, ("Unknown method 'KR2'", "Did you mean 'kr2'?")),
    "seeds": (nothing, f"{TRAIN} --seeds x", 1, ("'x'", "--seeds 1,2,3")),
    "no seeds": (nothing, f"{TRAIN} --seeds ''", 1, ("--seeds",)),
    "epochs": (nothing, f"{TRAIN} --epochs 0", 1, ("--epochs 0",)),
    "no-extract": (
        nothing, f"{TRAIN} --no-extract", 1, ("No cache of gottbert", "kr2cache extract --resource gottbert")
    ),
    "no resource": (nothing, "extract", 1, ("Which resource?", "gottbert")),
    "no cache to choose": (nothing, "train", 1, ("Which resource?", "gottbert")),
    "no cache of the task": (nothing, "train --task snli", 1, ("Which resource?", "no cache of snli yet", "gottbert")),
    "task without a resource": (nothing, "train --task udpos-dee", 1, ("'udpos-dee'", "'udpos-de'")),
    "no task": (nothing, "extract --resource xlm-r", 1, ("Which task?", "--task")),
    "model not here": (
        nothing, "extract --resource beto", 1, ("dccuchile/bert-base-spanish-wwm-cased", "hf download", "path =")
    ),
    "toml syntax": (write_toml("[defaults\n"), EXTRACT, 1, ("kr2cache.toml", "not valid TOML", "line 1")),
    "toml bytes": (lambda place: (place / "kr2cache.toml").write_bytes(b"\xff"), EXTRACT, 1, ("kr2cache.toml",)),
    "toml section": (toml_with("[defalts]\n"), EXTRACT, 1, ("'defalts'", "'defaults'")),
    "toml no section": (write_toml("training = 3\n"), EXTRACT, 1, ("training", "[training]")),
    "toml option": (write_toml(TOML.format(defaults="fuson = 'all'")), EXTRACT, 1, ("'fuson'", "'fusion'")),
    "toml type": (write_toml(TOML.format(defaults="epochs = 'ten'")), TRAIN, 1, ("epochs", "'ten'", "a number")),
    "toml true for a number": (write_toml(TOML.format(defaults="limit = true")), TRAIN, 1, ("limit", "a whole number")),
    "toml model": (toml_with("[models.x]\npaht = 'y'\n"), EXTRACT, 1, ("models.x", "'paht'", "'path'")),
    "toml model layers": (toml_with("[models.x]\npath = 'y'\nlayers = 0\n"), EXTRACT, 1, ("layers = 0", "at least 1")),
    "run dir": (nothing, f"{TRAIN} --run-dir kr2cache.toml", 1, ("--run-dir", "kr2cache.toml is a file")),
    "run dir in no file system": (nothing, f"{TRAIN} --run-dir /proc/runs", 1, ("--run-dir", "is not writable")),
    "toml model type": (toml_with("[models.x]\npath = 3\n"), EXTRACT, 1, ("models.x", "path", "3")),
    "training argument": (toml_with("[training]\nwarmup_step = 3\n"), TRAIN, 1, ("'warmup_step'", "warmup_steps")),
    "training value": (toml_with("[training]\nlr_scheduler_type = 'up'\n"), TRAIN, 1, ("up", "[training]")),
    "training seed": (toml_with("[training]\nseed = 3\n"), TRAIN, 1, ("seed", "--seeds")),
    "training rate": (toml_with("[training]\nlearning_rate = 3\n"), TRAIN, 1, ("learning_rate", "--learning-rate")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_clear_message_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    prepare, line, code, parts = WRONG[case]
    prepare(place)
    before = files(place)
    assert command(line) == code
    captured = capsys.readouterr()
    shown = " ".join(captured.err.split())
    for part in parts:
        assert part in shown
    assert "Traceback" not in shown
    assert "not expected" not in shown
    assert files(place) == before
    assert captured.out == "" or "gottbert" in captured.out, "at most what it was about to do"


URLS = {
    "extract --resource gottbert --split train --cache-dir s3://bucket/caches": "--cache-dir s3://bucket/caches",
    "train --resource gottbert --run-dir gs://bucket/runs": "--run-dir gs://bucket/runs",
    "train --resource gottbert --cache-dir file:///tmp/caches": "--cache-dir file://tmp/caches",
    "sweep grid.toml --cache-dir s3:/bucket": "--cache-dir s3://bucket",
    "extract --resource gottbert --split train --data https://example.org/a/b": "--data https://example.org/a/b",
    "cache list --cache-dir S3://bucket": "--cache-dir S3://bucket",
    "cache slice s3://bucket/x --layers 1": "The cache s3://bucket/x",
    "cache slice x --layers 1 --cache-dir abfs+x.y-z://bucket/x": "--cache-dir abfs+x.y-z://bucket/x",
    "report s3://bucket/runs": "RUN_DIR s3://bucket/runs",
    "report runs --out s3://bucket/report": "--out s3://bucket/report",
    "predict --run s3://bucket/run/seed-1 Hallo": "--run s3://bucket/run/seed-1",
    "demo --folder s3://bucket": "--folder s3://bucket",
    "bench --folder s3://bucket": "--folder s3://bucket",
}


def test_a_url_is_no_folder(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path it would be a folder ``s3:`` here, which is made without a word."""
    before = files(place)
    for line, said in URLS.items():
        answer = Answer(line, capsys)
        error = answer.document["error"]
        assert (answer.code, error["type"]) == (1, "ConfigError"), line
        assert f"{said} is a URL." in error["message"]
        assert "Give a folder" in error["remedy"]
    with pytest.raises(ConfigError, match="--run-dir s3://bucket is a URL"):
        TrainConfig(task="udpos", run_dir=Path("s3://bucket"))
    write_toml(TOML.format(defaults="cache-dir = 's3://bucket/x'"))(place)
    for line in (EXTRACT, TRAIN, "cache list"):
        message = Answer(line, capsys).document["error"]["message"]
        assert "cache-dir in [defaults] in kr2cache.toml: s3://bucket/x is a URL" in message
    write_toml(TOML.format(defaults=""))(place)
    monkeypatch.setenv("KR2CACHE_DIR", "s3://bucket")
    for line in (EXTRACT, TRAIN, "cache list"):
        assert "$KR2CACHE_DIR s3://bucket is a URL" in Answer(line, capsys).document["error"]["message"], line
    assert files(place) == before


@pytest.mark.parametrize("case", ["model", "option", "tag", "disk", "seeds", "toml syntax"])
def test_failures_under_json(place: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    prepare, line, code, parts = WRONG[case]
    prepare(place)
    answer = Answer(line, capsys)
    assert answer.code == code
    assert set(answer.document) == {"error"}
    error = answer.document["error"]
    assert set(error) == {"type", "message", "remedy"}
    said = " ".join(f"{error['message']} {error['remedy']}".split())
    assert all(part in said for part in parts)
    names = {kind.__name__ for kind in KR2CacheError.__subclasses__()} | {"UsageError"}
    assert error["type"] in names


def test_debug_shows_the_traceback(place: Path) -> None:
    with pytest.raises(KR2CacheError, match="gotbert"):
        command("extract --resource gotbert --debug")


def test_other_settings_with_no_extract_name_the_field(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(f"{EXTRACT} --max-length 20") == 0
    capsys.readouterr()
    assert command(f"{TRAIN} --no-extract --resource-max-length 30") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "max_length is 20 there, 30 was asked for" in shown
    assert "kr2cache extract --resource gottbert --split train" in shown
    assert "--max-length 30" in shown
    assert not (place / "runs").exists()


def test_several_resources_in_the_cache_are_a_question(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "kr2cache.toml").write_text(TOML.format(defaults=QUICK) + "[models.beto]\npath = 'models/gottbert'\n")
    assert command("extract --resource gottbert --split dev") == 0
    assert command("extract --resource beto --split dev --task udpos-de") == 0
    capsys.readouterr()
    assert command("train") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "holds beto, gottbert" in shown
    assert "--resource" in shown


def test_the_readers_own_caches_leave_no_question(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``kreader2`` makes caches of the reader; the README's next line names no resource."""
    assert command("extract --resource gottbert --split train") == 0
    assert command("train --method kreader2 --fusion last2 --seeds 1") == 0
    capsys.readouterr()
    assert command("train --fusion last4 --seeds 1") == 0
    assert "kr2 (xlm-r + gottbert, last4)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ("--method kd --teacher gottbert --fusion last2", "Method kd does not use --fusion."),
        ("--method kreader --temperature 2 --resource-max-length 9", "use --resource-max-length, --temperature."),
        ("--fusion all --soft-weight 1", "Method kr2 does not use --soft-weight."),
        ("--method kreader2 --fusion last2 --projection mlp", None),
        ("--method kreader --resource xlm-r", "Method kreader does not use --resource."),
        ("--method kreader2 --resource xlm-r --fusion last2", "Method kreader2 does not use --resource."),
        ("--method kd --teacher gottbert --task udpos-de", "Method kd does not use --resource."),
    ],
)
def test_options_that_a_method_has_no_use_for_are_named(
    place: Path, capsys: pytest.CaptureFixture[str], options: str, unused: str | None
) -> None:
    assert command(f"train --resource gottbert --seeds 1 {options}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (unused in shown) if unused else ("does not use" not in shown)


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def interrupt(arguments: str, ready: Callable[[], bool]) -> tuple[int, str, str]:
    """Run a real process, send it SIGINT once it is ``ready``; its exit code, output and errors."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "kr2cache.cli", *shlex.split(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.communicate()
            if time.monotonic() > deadline:
                process.kill()
                pytest.fail("it never came so far")
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler then shows where every thread is
            pytest.fail(f"Ctrl-C did not end it within 60 s:\n{process.communicate()[1]}")
    return process.returncode, out, err


@pytest.mark.usefixtures("programs")
def test_ctrl_c_in_extraction_keeps_what_is_complete_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 1_500
    (place / "corpus" / "train.conllu").write_text(tiny.conllu(tiny.sentences(count, longest=3)), "utf-8")
    root = place / ".kr2cache" / "udpos-de" / "train"

    def some_written() -> bool:
        shards = list(root.glob("*/shard-*.h5"))
        if not shards:
            return False
        cache = FeatureCache.open(shards[0].parent)
        return bool(cache.states(int(cache.n_tokens.argmax())).any())  # the longest sequence runs first

    code, out, err = interrupt(f"{EXTRACT} --tokens-per-batch 24 --json", some_written)
    assert code == 130, (out, err)
    error = json.loads(out)["error"]
    assert error["type"] == "InterruptedWorkError"
    assert "Traceback" not in err
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    cache = FeatureCache.open(folder)
    kept = len(cache)
    assert 0 < kept < count
    assert f"{kept:,} of {count:,} sequences are complete" in error["message"]
    assert folder.name in error["message"]
    assert "same command again" in error["remedy"]
    assert not list(place.rglob("*.partial"))
    rest = Answer(f"{EXTRACT} --tokens-per-batch 24", capsys)
    assert rest.code == 0
    assert rest.document["cache"].endswith(folder.name)
    # Batches that hold something incomplete run whole.
    assert count - kept <= rest.document["computed"] < count
    assert FeatureCache.open(folder).complete.all()


@pytest.mark.usefixtures("programs")
def test_ctrl_c_in_training_keeps_the_caches_and_no_half_run(place: Path) -> None:
    runs = place / "runs" / "udpos-de"
    code, out, err = interrupt(
        f"{TRAIN} --seeds 1,2 --epochs 100000 --limit 2 --json",
        lambda: any(time.time() - path.stat().st_mtime > 1 for path in runs.glob("*/.seed-1.claims/*/run")),
    )
    assert code == 130, (out, err)
    error = json.loads(out)["error"]
    assert error["type"] == "InterruptedWorkError"
    assert "Interrupted in seed 1" in error["message"]
    assert "same command again" in error["remedy"]
    assert "Traceback" not in err
    assert not list(runs.glob("*/seed-?"))
    assert not list(place.rglob("*.partial")), "nothing half-written is left"
    assert {path.name for path in (place / ".kr2cache" / "udpos-de").iterdir()} == {"train", "dev", "test"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("line", ["models --json", "models", "cache list --json"])
def test_a_full_standard_output_is_one_line_of_error(workdir: Path, line: str) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "kr2cache.cli", *line.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
