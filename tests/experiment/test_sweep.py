"""Sweeps on tiny models: which cells run, which are skipped, and what happens after a failure or an interruption."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from world import SPLITS, World, count_resource_batches

from kr2cache import FeatureCache, cli
from kr2cache.commands.settings import TRAIN_OPTIONS
from kr2cache.config import TrainConfig
from kr2cache.errors import (
    CacheError,
    ConfigError,
    InterruptedWorkError,
    KR2CacheError,
    MissingSplitError,
    ModelUnavailableError,
    TrainingError,
    UnknownNameError,
    UnsupportedModelError,
)
from kr2cache.experiment import pipeline, sweep
from kr2cache.experiment.cells import cells_of
from kr2cache.experiment.checks import Training
from kr2cache.experiment.grid import Grid, Line, read_grid
from kr2cache.experiment.resource import Resource
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.sweep import Sweep, SweepResult
from kr2cache.extraction import trial
from kr2cache.prediction.predict import Predictor
from kr2cache.tasks import udpos
from kr2cache.tasks.udpos import UPOS

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "pipelines").glob("*.toml"))

GRID = """
title = "A small table"
paper = "table1"
baseline = "KReader"

[settings]
epochs = 1
batch-size = 4
learning-rate = 1e-3
seeds = [1, 2]

[[columns]]
name = "X"
task = "udpos"
reader = "reader"
resource = "res"

[[rows]]
name = "KReader"
method = "kreader"

[[rows]]
name = "KR2"
fusion = "last4"
"""
KD = GRID.replace('fusion = "last4"', 'method = "kd"') + '\n[[rows]]\nname = "KResource"\nmethod = "kresource"\n'


def grid_of(folder: Path, text: str = GRID) -> Grid:
    path = folder / "small.toml"
    path.write_text(text, "utf-8")
    return read_grid(path, TRAIN_OPTIONS)


def planned(world: World, text: str = GRID, *, keep_readers: bool = False, **overrides: Any) -> Sweep:
    grid = grid_of(world.folder, text)
    named = {name: {"path": str(world.folder / "models" / name)} for name in ("res", "reader")}
    defaults = {
        "data": str(world.data),
        "run_dir": world.folder / "runs",
        "cache_dir": world.caches,
        "device": "cpu",
    }
    cells = cells_of(
        grid,
        lambda row, column: grid.config(row, column, defaults=defaults, overrides=overrides, models=named, training={}),
    )
    return Sweep(grid, cells, keep_readers=keep_readers)


def manifest(result: SweepResult) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(result.manifest.read_text("utf-8"))
    return content


def readers(world: World) -> list[Path]:
    return sorted((world.folder / "runs").rglob("reader/model.safetensors"))


# Grids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_of_the_project_makes_sense(path: Path) -> None:
    grid = read_grid(path, TRAIN_OPTIONS)

    def cell_config(row: Line, column: Line) -> TrainConfig:
        oscar = {"oscar": {"path": "somewhere"}}
        return grid.config(row, column, defaults={}, overrides={}, models=oscar, training={})

    cells = cells_of(grid, cell_config)
    assert len(cells) == len(grid.rows) * len(grid.columns)
    assert all(cell.config.seeds == (1, 2, 3) for cell in cells)
    assert grid.paper == path.stem[:6]


def test_the_papers_grids_have_the_papers_settings() -> None:
    for path in GRIDS:
        if path.stem.endswith("-small"):
            continue
        settings = tomllib.loads(path.read_text("utf-8"))["settings"]
        assert (settings["epochs"], settings["batch-size"], settings["learning-rate"]) == (10, 32, 2e-5)
        assert settings["seeds"] == [1, 2, 3]


def test_the_papers_grids_have_its_rows_and_columns() -> None:
    table2 = read_grid(ROOT / "pipelines" / "table2.toml", TRAIN_OPTIONS)
    assert [row.settings.get("fusion") for row in table2.rows] == [
        None, *(f"layer{i}" for i in (0, 1, 3, 5, 7, 9, 11)), "all", "last4", "fuse",
    ]  # fmt: skip
    assert [column.name for column in table2.columns] == ["De", "Zh", "Ar", "Es"]
    multilingual = read_grid(ROOT / "pipelines" / "table1-multilingual.toml", TRAIN_OPTIONS)
    assert [column.settings["task"] for column in multilingual.columns] == [
        f"udpos-{language}" for language in ("de", "ko", "ja", "zh", "ar", "es")
    ]
    commonsense = read_grid(ROOT / "pipelines" / "table1-commonsense.toml", TRAIN_OPTIONS)
    assert [column.settings["task"] for column in commonsense.columns] == ["snli", "swag", "piqa", "hellaswag"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('method = "kreader"', 'methood = "kreader"', "Did you mean 'method'"),
        ("epochs = 1", 'epochs = "one"', r"epochs = 'one' in \[settings\] .* should be a number\."),
        ("seeds = [1, 2]", "seeds = 3", r"seeds = 3 in .* should be a list of whole numbers"),
        ('paper = "table1"', 'paper = "table9"', "table9"),
        ('baseline = "KReader"', 'baseline = "KReadr"', "Did you mean 'KReader'"),
        ('name = "KR2"', 'name = "KReader"', "two rows are called 'KReader'"),
        ('name = "KR2"\n', "", "one of its rows has no name"),
        ("[settings]", "[setings]", "Did you mean 'settings'"),
        ("epochs = 1", "epochs = ", "not valid TOML"),
        ('fusion = "last4"', "swap = 1", "should be true or false"),
        ("[[columns]]", "[columns]", "has no columns"),
    ],
)
def test_an_invalid_grid_is_refused(tmp_path: Path, before: str, after: str, said: str) -> None:
    assert before in GRID
    with pytest.raises(KR2CacheError, match=said):
        grid_of(tmp_path, GRID.replace(before, after))


def test_the_error_for_a_missing_grid_names_existing_grids(workdir: Path) -> None:
    (workdir / "pipelines").mkdir()
    shutil.copy(GRIDS[0], workdir / "pipelines")
    with pytest.raises(ConfigError) as caught:
        read_grid(Path("tabel1.toml"), TRAIN_OPTIONS)
    assert GRIDS[0].name in caught.value.remedy


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('fusion = "last4"', 'fusion = "lst4"', "Unknown fusion 'lst4'"),
        ('method = "kreader"', 'method = "kreadr"', "1 of 2 cells cannot run.*X · KReader: Unknown method 'kreadr'"),
        ('task = "udpos"', 'task = "udps"', "Unknown task"),
        ('task = "udpos"\n', "", "has no task"),
        ('resource = "res"', 'resource = "ress"', "Unknown model 'ress'"),
        ('resource = "res"\n', "", "X · KR2: Method kr2 needs --resource"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "--seeds 1,1 has 1 more than once"),
        ("epochs = 1", "epochs = 0", "--epochs"),
    ],
)
def test_a_cell_that_could_never_run_is_refused_before_any_is_run(
    world: World, before: str, after: str, said: str
) -> None:
    assert before in GRID
    with pytest.raises(KR2CacheError, match=said):
        planned(world, GRID.replace(before, after))
    assert not (world.folder / "runs").exists()


def test_two_languages_in_one_folder_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    german = GRID.replace('task = "udpos"', 'task = "udpos-de"')
    korean = '\n[[columns]]\nname = "Ko"\ntask = "udpos-ko"\nreader = "reader"\nresource = "res"\n'
    with pytest.raises(ConfigError, match=r"/ X \(udpos-de\) and .*/ Ko \(udpos-ko\) would read the same"):
        planned(world, german + korean)
    monkeypatch.setenv("HOME", str(world.data.parent))
    with pytest.raises(ConfigError, match="would read the same sentences"):
        planned(world, german + korean + f"data = '~/{world.data.name}'\n")
    other = world.folder / "korean"
    shutil.copytree(world.data, other)
    assert len(planned(world, german + korean + f"data = '{other}'\n").cells) == 4
    assert len(planned(world, german + korean.replace("udpos-ko", "udpos")).cells) == 4, (
        "the task udpos has no language"
    )
    assert len(planned(world, german + korean + "data = '/nowhere'\n").cells) == 4, (
        "missing data is reported later, by the checks of the cells"
    )


CHINESE = """
[[columns]]
name = "Zh"
task = "udpos-zh"
reader = "reader"
resource = "res"
data = "{data}"

[[columns]]
name = "Ko"
task = "udpos-ko"
reader = "reader"
resource = "gone"

[models.gone]
path = "{gone}"
"""


def test_faults_of_data_and_models_are_reported_once_before_any_training(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("trained"))
    chinese = world.folder / "zh"
    shutil.copytree(world.data, chinese)
    path = chinese / "dev.conllu"
    path.write_text(path.read_text("utf-8").replace("\tPUNCT\t", "\tPU\t", 1), "utf-8")
    text = GRID.replace('task = "udpos"', 'task = "udpos-es"') + "".join(
        f'\n[[rows]]\nname = "{fusion}"\nfusion = "{fusion}"\n' for fusion in ("all", "layer1", "fuse")
    )
    text += CHINESE.format(data=chinese, gone=world.folder / "gone")
    korean = shutil.copytree(world.data, world.folder / "ko")
    text = text.replace('resource = "gone"', f'resource = "gone"\ndata = "{korean}"')
    reads = []
    real = udpos.read_conllu
    monkeypatch.setattr(udpos, "read_conllu", lambda path: reads.append(path) or real(path))
    with pytest.raises(ConfigError) as caught:
        planned(world, text).run()
    said = str(caught.value)
    assert len(reads) == len(set(reads)) == 8, "each split of each column is read once, up to the fault"
    assert "9 of 15 cells cannot run; nothing was trained." in said
    assert said.count("unknown tag 'PU'") == 1
    assert f"- Zh (every row): {path}, sentence at line " in said
    assert said.count(" ".join(UPOS)) == 1, "the message lists the valid tags"
    assert said.count("holds no config.json") == 1
    assert "- Ko · KR2, Ko · all, Ko · layer1, Ko · fuse: The folder of model 'gone'" in said
    assert "Give the folder that holds config.json" in said
    (world.folder / "ko" / "train.conllu").unlink()
    with pytest.raises(ConfigError) as caught:
        planned(world, text).run()
    said = str(caught.value)
    assert "10 of 15 cells cannot run" in said, "KReader needs no resource, so its model is not missing"
    assert "- Ko (every row): " in said and "- Ko · KR2, Ko · all, Ko · layer1, Ko · fuse: The folder" in said
    assert not (world.folder / "runs").exists()


def test_weights_that_are_missing_are_found_before_any_training(world: World) -> None:
    (world.resource / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match=r"1 of 2 cells.*X · KR2: .*holds no weights"):
        planned(world).run()


def test_a_resource_that_cannot_serve_is_found_before_any_cache(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tiny.save_model(world.folder / "models" / "bad", "reformer", **tiny.REFORMER)
    text = GRID + "".join(f'\n[[rows]]\nname = "{fusion}"\nfusion = "{fusion}"\n' for fusion in ("all", "fuse"))
    text = text.replace('"last4"', '"last2"')
    text += '\n[[columns]]\nname = "Y"\ntask = "udpos"\nreader = "reader"\nresource = "bad"\n'
    text += f'[models.bad]\npath = "{bad}"\n'
    tried, check = [], trial.check_states
    monkeypatch.setattr(trial, "check_states", lambda plan, model: tried.append(plan.spec.name) or check(plan, model))
    with pytest.raises(UnsupportedModelError, match=r"3 of 8 cells .* Y · KR2, Y · all, Y · fuse: 'bad' .*random"):
        planned(world, text).run()
    assert tried.count("res") == 3, "once on each split, for the cells of all fusions"
    assert not list(world.folder.rglob("*.h5"))
    assert not (world.folder / "runs").exists()


def test_a_cache_that_fits_one_fusion_serves_its_cell(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the cell of another fusion was checked first, and no cache fits it."""
    look = sweep.look_for_resources

    def looked(training: Training, shared: Shared) -> dict[str, Resource]:
        if training.config.fusion == "layer2":
            raise CacheError("No cache of layer 2 fits.", "Extract it.")
        return look(training, shared)

    monkeypatch.setattr(sweep, "look_for_resources", looked)
    text = GRID.replace('"last4"', '"layer2"') + '\n[[rows]]\nname = "layer 1"\nfusion = "layer1"\n'
    result = planned(world, text, seeds=(1,)).run(keep_going=True)
    assert [cell.name for cell in result.failed] == ["X · KR2"]
    assert result.mean(result.cells[2]) is not None


def test_a_row_of_pooled_states(world: World) -> None:
    """In one table with a row of all states: each has its caches, and both are found again."""
    text = GRID.replace("seeds = [1, 2]", "seeds = [1]").replace('name = "KR2"', 'name = "KR2"\npool = "none"')
    text += '\n[[rows]]\nname = "Words"\nfusion = "last4"\npool = "word"\n'
    result = planned(world, text).run()
    assert not result.failed
    pools = {}
    for cell in result.cells:
        config = json.loads((result.run_dir / str(cell.folder) / "seed-1" / "config.json").read_text("utf-8"))["config"]
        pools[cell.row.name] = config.get("resource", {}).get("pool")
    assert pools == {"KReader": None, "KR2": None, "Words": "word"}
    caches = [FeatureCache.open(folder) for folder in world.cache_folders()]
    stored = sorted((cache.provenance["chosen"].get("pool", "none"), len(cache.tokens().input_id)) for cache in caches)
    words = [sum(map(len, tiny.sentences(count, seed=seed))) for seed, count in enumerate(SPLITS.values())]
    assert stored[3:] == sorted(("word", count) for count in words)
    assert all(pool == "none" for pool, _ in stored[:3])
    with count_resource_batches() as batches:
        again = planned(world, text).run()
    assert [cell.folder for cell in again.cells] == [cell.folder for cell in result.cells]
    assert batches == []


def test_a_fault_of_every_cell_is_reported_once(world: World) -> None:
    (world.data / "train.conllu").unlink()
    with pytest.raises(
        MissingSplitError, match=r"2 of 2 cells cannot run; nothing was trained\. every cell: "
    ) as caught:
        planned(world).run()
    assert "--keep-going" not in caught.value.remedy


def test_later_places_override_earlier_ones(tmp_path: Path) -> None:
    text = GRID.replace('fusion = "last4"', 'fusion = "last4"\nlearning-rate = 3e-3\nswap = true')
    grid = grid_of(tmp_path, text.replace('task = "udpos"', 'task = "udpos"\nbatch-size = 7'))
    (column,), (plain, kr2) = grid.columns, grid.rows
    defaults = {"epochs": 9.0, "max_length": 33, "learning_rate": 1.0}
    one = grid.config(
        plain, column, defaults=defaults, overrides={"seeds": "5"}, models={}, training={"warmup_steps": 1}
    )
    other = grid.config(kr2, column, defaults=defaults, overrides={}, models={}, training={})
    assert (one.epochs, one.batch_size, one.learning_rate, one.seeds) == (1.0, 7, 1e-3, (5,))
    assert (one.max_length, one.resource_max_length, one.training) == (33, 33, {"warmup_steps": 1})
    assert (one.reader, one.resource) == ("reader", "res")
    assert (other.learning_rate, other.reader, other.resource) == (3e-3, "res", "reader")


# Running -------------------------------------------------------------------------------------------------------------


def test_every_cell_is_run_once_and_the_manifest_says_where(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    result = planned(world).run()
    written = manifest(result)
    assert (written["name"], written["title"], written["paper"]) == ("small", "A small table", "table1")
    assert (written["rows"], written["columns"], written["baseline"]) == (["KReader", "KR2"], ["X"], "KReader")
    for cell in written["cells"]:
        for seed in (1, 2):
            metrics = json.loads((result.run_dir / cell["folder"] / f"seed-{seed}" / "metrics.json").read_text())
            assert set(metrics) == {"dev", "test"}
        assert cell["error"] is None
    assert [cell["method"] for cell in written["cells"]] == ["kreader", "kr2"]
    assert not result.failed
    monkeypatch.setattr(pipeline, "train_seed", lambda *_: pytest.fail("trained again"))
    before = result.manifest.read_bytes()
    assert planned(world).run().manifest.read_bytes() == before


def test_one_cell_that_fails_does_not_stop_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.train_seed

    def failing(job: Any, seed: int, *rest: Any) -> Any:
        if job.config.method == "kreader":
            raise TrainingError("It diverged.", "Lower it.")
        return real(job, seed, *rest)

    monkeypatch.setattr(pipeline, "train_seed", failing)
    result = planned(world).run()
    assert [cell.row.name for cell in result.failed] == ["KReader"]
    cells = {cell["row"]: cell for cell in manifest(result)["cells"]}
    assert cells["KReader"]["error"] == "It diverged."
    assert cells["KR2"]["folder"] is not None
    monkeypatch.undo()
    mended = planned(world).run()
    assert not mended.failed
    assert {cell["error"] for cell in manifest(mended)["cells"]} == {None}


def test_an_unexpected_failure_does_not_stop_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sweep.train

    def failing(config: TrainConfig, *shared: Any) -> Any:
        if config.method == "kreader":
            raise RuntimeError("CUDA is tired")
        return real(config, *shared)

    monkeypatch.setattr(sweep, "train", failing)
    result = planned(world).run()
    assert [cell.error and cell.error.message for cell in result.cells] == ["RuntimeError: CUDA is tired", None]


def test_a_cell_that_fails_does_not_show_an_earlier_score(here: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sweep", "grid.toml", "--seeds", "1"]) == 0
    edit_a_sentence(here)  # the caches are stale now, so KR2 fails
    capsys.readouterr()
    assert cli.run(["sweep", "grid.toml", "--seeds", "1", "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)["error"]
    assert "1 of 2 cells cannot run; nothing was trained." in refused["message"]
    assert "was made from something else" in refused["message"]
    assert cli.run(["sweep", "grid.toml", "--seeds", "1", "--keep-going"]) == 1
    capsys.readouterr()
    assert cli.run(["report", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    (record,) = [one for one in tables[0]["records"] if one["row"] == "KR2"]
    assert (record["mean"], record["folder"]) == (None, None)
    assert "failed" in (here.folder / "runs" / "report" / "grid.md").read_text("utf-8")


def edit_a_sentence(world: World) -> None:
    path = world.data / "train.conllu"
    path.write_text(path.read_text("utf-8").replace("\tdog\t", "\tcat\t").replace("\tthe\t", "\tThe\t"), "utf-8")


def test_an_edited_grid_does_not_take_over_another_cells_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(world, seeds="1").run()
    monkeypatch.setattr(sweep, "train", lambda *_: (_ for _ in ()).throw(InterruptedWorkError("Stopped", "")))
    with pytest.raises(InterruptedWorkError, match=r"Stopped\. The sweep small stopped at cell 1 of 2"):
        planned(world, GRID.replace('"last4"', '"layer1"'), seeds="1").run()
    cells = json.loads((world.folder / "runs" / "sweeps" / "small.json").read_text("utf-8"))["cells"]
    folders = {cell["row"]: cell["folder"] for cell in cells}
    assert folders["KReader"] is not None
    assert folders["KR2"] is None


def test_names_with_brackets_are_shown_as_they_are(here: World, capsys: pytest.CaptureFixture[str]) -> None:
    text = GRID.replace('name = "X"', 'name = "c [/b]"').replace('"A small table"', '"All [methods]"')
    (here.folder / "grid.toml").write_text(text.replace('name = "KR2"', 'name = "r [bold]"'), "utf-8")
    assert cli.run(["sweep", "grid.toml", "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "c [/b] · r [bold]: f1" in shown
    assert "All [methods]" in shown


def test_settings_that_no_cell_could_run_with_are_refused_at_once(world: World) -> None:
    with pytest.raises(KR2CacheError, match="Unknown projection"):
        planned(world, GRID.replace('fusion = "last4"', 'fusion = "last4"\nprojection = "foo"'))
    with pytest.raises(KR2CacheError, match="Unknown model 'nope'"):
        planned(world, GRID.replace('fusion = "last4"', 'method = "kd"\nteacher = "nope"'))
    with pytest.raises(ConfigError, match=r"'layer9' asks for layer 9.* 0 to 4"):
        planned(world, GRID.replace('"last4"', '"layer9"')).run()
    with pytest.raises(ConfigError, match="a teacher is given too"):
        planned(world, GRID.replace('fusion = "last4"', 'method = "kd"\nteacher = "res"\nswap = true'))


def test_stopping_anywhere_and_starting_again_gives_the_same(
    world: World, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = World(tmp_path_factory.mktemp("uninterrupted"))
    shutil.copytree(world.folder, other.folder, dirs_exist_ok=True)
    whole = planned(other, KD).run()
    real = pipeline.train_seed
    stops = 0
    for allowed in range(20):
        trained = 0

        def interrupted(*arguments: Any, allowed: int = allowed) -> Any:
            nonlocal trained
            if trained == min(1, allowed):
                raise KeyboardInterrupt
            trained += 1
            return real(*arguments)

        monkeypatch.setattr(pipeline, "train_seed", interrupted)
        try:
            result = planned(world, KD).run()
            break
        except InterruptedWorkError as error:
            stops += 1
            assert "it skips finished runs" in error.remedy
    assert stops == 6, "before the first run, and after each of the six runs except the last"
    mine, expected = manifest(result), manifest(whole)
    for cell in (*mine["cells"], *expected["cells"]):
        del cell["settings"]  # this digest contains the folder of the data
    assert mine == expected
    for cell in expected["cells"]:
        for seed in (1, 2):
            for name in ("metrics.json", "predictions-test.jsonl", "history.json"):
                a, b = (one / "runs" / cell["folder"] / f"seed-{seed}" / name for one in (world.folder, other.folder))
                assert a.read_bytes() == b.read_bytes()
    assert readers(world) == readers(other) == []


def test_readers_are_dropped_unless_asked_for(world: World) -> None:
    result = planned(world, seeds="1").run()
    assert readers(world) == []
    assert all(cell.result is not None for cell in result.cells)
    assert result.cells[0].result is not None
    with pytest.raises(CacheError, match=r"kr2cache sweep --keep-readers"):
        Predictor.load(result.cells[0].result.runs[0].folder, device="cpu")
    planned(world, keep_readers=True, seeds="1,2").run()
    assert {path.parts[-3] for path in readers(world)} == {"seed-2"}


def test_a_reader_that_someone_trained_by_hand_is_not_dropped(world: World) -> None:
    run = world.train(method="kreader", epochs=1.0, seeds=(1,), reader=str(world.folder / "models" / "reader"))
    planned(world).run()
    assert [path.parents[1] for path in readers(world)] == [run.runs[0].folder]


def test_a_distillation_learns_from_the_tables_own_rows(world: World) -> None:
    """Six trainings, two for each row: the teacher is seed 1 of KResource and is not fine-tuned again."""
    result = planned(world, KD).run()
    folders = sorted(path.parent.name for path in (world.folder / "runs" / "udpos").glob("*/seed-*"))
    assert len(folders) == 6
    assert sum(name.startswith("kresource-res-") for name in folders) == 2
    assert len(list(world.caches.rglob("logits.npz"))) == 1
    assert readers(world) == []
    assert [cell["teacher"] for cell in manifest(result)["cells"]] == [None, "res", None]


TEACHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no reader": (
        lambda run: shutil.rmtree(run / "reader"),
        r"holds no trained reader\. It was removed",
    ),
    "a damaged reader": (
        lambda run: (run / "reader" / "model.safetensors").write_bytes(b"damaged"),
        r"The reader in \S+ cannot be loaded: .*\n.* train it again",
    ),
    "another task": (
        lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace('"udpos"', '"snli"')),
        "was trained on snli, the student learns udpos",
    ),
}


@pytest.mark.parametrize("fault", TEACHERS)
def test_a_run_that_cannot_teach_is_found_before_any_training(
    fault: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.train(method="kreader", epochs=1.0).runs[0].folder.rename(world.folder / "teacher")
    text = GRID.replace('fusion = "last4"', f'method = "kd"\nteacher = "{run}"').replace("[1, 2]", "[1]")
    change, message = TEACHERS[fault]
    change(run)
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(KR2CacheError, match=rf"(?s)1 of 2 cells cannot run.*X · KR2: .*{message}"):
        planned(world, text).run()


def test_both_directions_of_a_pair(world: World) -> None:
    text = GRID + '\n[[rows]]\nname = "A-B"\nmethod = "kr2"\nfusion = "layer0"\nswap = true\nbaseline = "KR2"\n'
    result = planned(world, text, seeds="1").run()
    cells = {cell["row"]: cell for cell in manifest(result)["cells"]}
    assert (cells["KR2"]["reader"], cells["KR2"]["resource"]) == ("reader", "res")
    assert (cells["A-B"]["reader"], cells["A-B"]["resource"]) == ("res", "reader")
    assert manifest(result)["baselines"] == {"A-B": "KR2"}
    assert not result.failed


def test_every_cache_is_made_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GRID + "".join(f'\n[[rows]]\nname = "{f}"\nfusion = "{f}"\n' for f in ("layer1", "all", "fuse"))
    result = planned(world, text, seeds="1").run()
    computed = [cell.result.computed for cell in result.cells if cell.result is not None]
    assert computed == [0, 12 + 5 + 6, 0, 0, 0]


# The command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(world.folder)
    (world.folder / "grid.toml").write_text(GRID, "utf-8")
    (world.folder / "kr2cache.toml").write_text(
        '[defaults]\ndata = "corpus"\ncache-dir = "cache"\n'
        '[models.res]\npath = "models/res"\n[models.reader]\npath = "models/reader"\n'
    )
    return world


def test_sweep_and_report_from_the_command_line(here: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sweep", "grid.toml", "--seeds", "1", "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["failed"] == 0
    assert {cell["row"] for cell in document["cells"]} == {"KReader", "KR2"}
    assert all(0 <= cell["mean"]["test"]["f1"] <= 1 for cell in document["cells"])
    assert "A small table" in shown.err
    assert cli.run(["report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (table,) = [table for table in report["tables"] if table["title"].startswith("A small table")][:1]
    by_row = {record["row"]: record for record in table["records"]}
    for cell in document["cells"]:
        assert by_row[cell["row"]]["mean"] == pytest.approx(100 * cell["mean"]["test"]["f1"], abs=0.051)
    assert (here.folder / "runs" / "report" / "report.html").is_file()


def test_cells_without_their_model_stop_the_sweep_or_are_left_out(
    here: World, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(here.resource)
    assert cli.run(["sweep", "grid.toml", "--seeds", "1"]) == 1
    shown = capsys.readouterr()
    assert "1 of 2 cells cannot run; nothing was trained. X · KR2: The folder of model 'res'" in shown.err
    assert "--keep-going trains the other cells." in shown.err
    assert not (here.folder / "runs").exists()
    assert cli.run(["sweep", "grid.toml", "--seeds", "1", "--keep-going"]) == 1
    shown = capsys.readouterr()
    assert "1 of 2 cells filled" in shown.out
    assert shown.out.count("✗ X · KR2: The folder of model 'res'") == 2, "before the first training, and at the end"
    assert shown.out.count("holds no config.json") == 2
    assert "Traceback" not in shown.out + shown.err


def test_a_grid_that_is_wrong_is_one_line(here: World, capsys: pytest.CaptureFixture[str]) -> None:
    (here.folder / "grid.toml").write_text(GRID.replace("last4", "last9x"), "utf-8")
    assert cli.run(["sweep", "grid.toml"]) == 1
    assert "Unknown fusion 'last9x'" in capsys.readouterr().err
    assert cli.run(["sweep", "none.toml"]) == 1
    assert "There is no grid none.toml" in capsys.readouterr().err
    assert cli.run(["report"]) == 1
    assert "There is no run folder runs" in capsys.readouterr().err


def test_unknown_names_keep_their_class(world: World) -> None:
    with pytest.raises(UnknownNameError):
        planned(world, GRID.replace("last4", "nonsense"))
