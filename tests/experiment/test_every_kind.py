"""Tasks of a user's own from the command line alone: trained, predicted in another folder, reported. The scores are
those of scikit-learn, SciPy and seqeval on the written predictions."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from world import predictions

from kr2cache.cli import run

SPLITS = {"train": 18, "dev": 6, "test": 9}
MOODS = ("anger", "joy", "fear")


def words(draw: random.Random) -> list[str]:
    return draw.choices(tiny.WORDS, k=draw.randint(2, 6))


def reviews(number: int, draw: random.Random) -> list[Any]:
    return [" ".join(words(draw)), ("good", "bad")[number % 2]]


def alike(number: int, draw: random.Random) -> list[Any]:
    one, two = words(draw), words(draw)
    return [" ".join(one), " ".join(two), len({*one} & {*two}) + draw.choice((0, 0.25))]


def moods(number: int, draw: random.Random) -> list[Any]:
    own = words(draw)
    return [" ".join(own), *(int(word in own) for word in tiny.WORDS[: len(MOODS)])]


def entities(draw: random.Random) -> str:
    """A sentence with a word a line, as CoNLL-2003 has it."""
    lines = []
    for word in words(draw):
        kind = draw.choice(("O", "PER", "LOC"))
        lines += [f"{word} X X {'O' if kind == 'O' else f'B-{kind}'}"]
        lines += [f"und X X I-{kind}"] * (kind != "O" and draw.random() < 0.5)
    return "\n".join(lines) + "\n\n"


@dataclass(frozen=True)
class Case:
    """A task of one kind: how it is declared, one row of its data, its scores by others."""

    declared: str
    suffix: str
    header: Sequence[str]
    row: Callable[[int, random.Random], list[Any]] | None
    scores: Callable[[list[Any], list[Any]], dict[str, float]]


def _sets(rows: list[Any]) -> list[list[int]]:
    return [[int(mood in own) for mood in MOODS] for own in rows]


CASES = {
    "reviews": Case(
        'kind = "classification"\ntext = "review"\nlabel = "stars"\nmetric = "matthews"',
        ".csv",
        ("review", "stars"),
        reviews,
        lambda gold, own: {
            "accuracy": accuracy_score(gold, own),
            "macro_f1": f1_score(gold, own, average="macro"),
            "matthews": matthews_corrcoef(gold, own),
            "f1": f1_score(gold, own, pos_label="good"),
        },
    ),
    "alike": Case(
        'kind = "regression"\ntext = ["one", "two"]\nlabel = "value"',
        ".tsv",
        ("one", "two", "value"),
        alike,
        lambda gold, own: {"pearson": pearsonr(gold, own).statistic, "spearman": spearmanr(gold, own).statistic},
    ),
    "moods": Case(
        f'kind = "multilabel"\ntext = "text"\nlabel = {json.dumps(MOODS)}',
        ".csv",
        ("text", *MOODS),
        moods,
        lambda gold, own: {
            "micro_f1": f1_score(_sets(gold), _sets(own), average="micro", zero_division=0),
            "macro_f1": f1_score(_sets(gold), _sets(own), average="macro", zero_division=0),
            "accuracy": accuracy_score(_sets(gold), _sets(own)),
        },
    ),
    "entities": Case(
        'kind = "tagging"\ncolumns = [0, 3]\nscheme = "BIO"',
        ".conll",
        (),
        None,
        lambda gold, own: {
            "f1": entity_f1(gold, own),
            "accuracy": accuracy_score([*chain(*gold)], [tag or "cut off" for tag in chain(*own)]),
        },
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A resource and a reader, with weights so large that predictions differ from text to text."""
    folder = tmp_path_factory.mktemp("models")
    for name, model_type in (("res", "bert"), ("reader", "xlm-roberta")):
        tiny.save_model(folder / name, model_type, layers=4, initializer_range=0.3)
    return folder


def save(folder: Path, case: Case) -> None:
    folder.mkdir()
    for seed, (split, count) in enumerate(SPLITS.items()):
        draw, path = random.Random(seed), folder / f"{split}{case.suffix}"
        if case.row is None:
            path.write_text("".join(entities(draw) for _ in range(count)), "utf-8")
            continue
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if case.suffix == ".tsv" else ",")
            writer.writerows([case.header, *(case.row(number, draw) for number in range(count))])


@pytest.mark.parametrize("task", CASES)
def test_a_task_is_trained_predicted_and_reported(
    task: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[task]

    def command(*arguments: object) -> Any:
        capsys.readouterr()
        code = run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        assert code == 0, said
        return json.loads(said.out)

    (home := tmp_path / "home").mkdir()
    save(home / "data", case)
    (home / "kr2cache.toml").write_text(f'[tasks.{task}]\n{case.declared}\ndata = "data"\n', "utf-8")
    monkeypatch.chdir(home)
    settings = ("--task", task, "--reader", models / "reader", "--resource", models / "res", "--device", "cpu")
    trained = command("train", *settings, "--seeds", 1, "--epochs", 1, "--batch-size", 6, "--learning-rate", 1e-3)
    (one,) = trained["runs"]
    folder = home / one["folder"]
    for split in ("dev", "test"):
        rows = predictions(folder, split)
        assert len(rows) == SPLITS[split]
        expected = case.scores([row["gold"] for row in rows], [row["predicted"] for row in rows])
        found = {name: value for name, value in one["metrics"][split].items() if name in expected}
        assert found == pytest.approx(expected)
    assert len({json.dumps(row["predicted"]) for row in rows}) > 1, "or this shows little"

    (away := tmp_path / "away").mkdir()
    monkeypatch.chdir(away)
    labelled = command("predict", "--run", folder, "--file", home / "data" / f"test{case.suffix}", "--device", "cpu")
    for own, row in zip(labelled["predictions"], rows, strict=True):
        alike = pytest.approx(row["predicted"], abs=0.02) if task == "alike" else row["predicted"]
        assert own["predicted"] == alike, "the cache holds float16"
    assert labelled["metrics"] == pytest.approx(one["metrics"]["test"], abs=0.02)

    (table,) = command("report", home / "runs")["tables"]
    (record,) = table["records"]
    assert {name: record[f"{name}_mean"] for name in expected} == pytest.approx(expected)


FAULTS: dict[str, tuple[str, str, str, str, str]] = {
    "a label that train lacks": ("reviews", "dev", "bad", "so-so", "dev.csv:3: stars is 'so-so'"),
    "one label": ("reviews", "train", "bad", "good", "All labels of the train split of data are 'good'"),
    "a value that is no number": ("alike", "test", "\t1", "\tone", "test.tsv:.*: value is 'one.*', not a number"),
    "a mark that is not 0 or 1": ("moods", "train", ",0,1,", ",0,2,", "train.csv:.*: joy is '2', not 0 or 1"),
    "a label of another scheme": (
        "entities",
        "train",
        "B-PER",
        "S-PER",
        "'S-PER' of task entities is not of scheme BIO",
    ),
    "no labels": ("reviews", "toml", "classification", "text", "'reviews' is of kind text: it has no labels"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_data_is_found_before_anything_is_made(
    fault: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, where, old, new, message = FAULTS[fault]
    case = CASES[task]
    save(tmp_path / "data", case)
    declared = f'[tasks.{task}]\n{case.declared}\ndata = "data"\n'
    if where == "toml":
        kept = [line for line in declared.splitlines() if not line.startswith(("label", "metric"))]
        declared = "\n".join(kept).replace(old, new)
    else:
        path = tmp_path / "data" / f"{where}{case.suffix}"
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")
    (tmp_path / "kr2cache.toml").write_text(declared, "utf-8")
    monkeypatch.chdir(tmp_path)
    line = ["train", "--task", task, "--reader", models / "reader", "--resource", models / "res", "--device", "cpu"]
    assert run([*map(str, line), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert re.search(message, error["message"])
    assert error["remedy"]
    assert not (tmp_path / ".kr2cache").exists()
