"""Who may import whom: the contracts of pyproject.toml, and what ``from kr2cache import FeatureCache`` loads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from importlinter import cli as import_linter

import kr2cache
from kr2cache.config import ExtractConfig
from kr2cache.extraction.extract import extract
from kr2cache.extraction.planning import plan_extraction

ROOT = Path(__file__).parents[1]


def test_the_contracts_of_pyproject_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    kept = import_linter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    shown = capsys.readouterr().out
    assert kept == import_linter.EXIT_STATUS_SUCCESS, shown
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in shown
    assert len(contracts) >= 4


def test_a_broken_contract_would_be_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same machinery finds the import that pipeline really makes."""
    (tmp_path / "lint.toml").write_text(
        '[tool.importlinter]\nroot_package = "kr2cache"\n[[tool.importlinter.contracts]]\nname = "no"\n'
        'type = "forbidden"\nsource_modules = ["kr2cache.experiment.pipeline"]\n'
        'forbidden_modules = ["kr2cache.extraction.extract"]\n'
    )
    kept = import_linter.lint_imports(config_filename=str(tmp_path / "lint.toml"), no_cache=True)
    assert kept == import_linter.EXIT_STATUS_ERROR
    shown = capsys.readouterr().out
    assert "-   kr2cache.experiment.pipeline ->" in shown
    assert "-> kr2cache.extraction.extract" in shown


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code + "\nimport json, sys; print(json.dumps(sorted(sys.modules)))", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


HEAVY = {"torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "seqeval", "sklearn", "pandas"}


def test_reading_a_cache_loads_neither_torch_nor_transformers(bert: Path, corpus: Path, tmp_path: Path) -> None:
    config = ExtractConfig(resource=str(bert), split="dev", task="udpos", data=str(corpus), cache_dir=tmp_path)
    folder = extract(plan_extraction(config)).cache
    code = (
        "import sys\nfrom kr2cache import FeatureCache\ncache = FeatureCache.open(sys.argv[1])\n"
        "assert len(cache.ids) == 5 and cache[cache.ids[0]].shape[0] == 5 and cache.provenance['chosen']\n"
        "assert cache.batch(cache.ids[:2])[1].shape[2] == 16"
    )
    loaded = loaded_by(code, str(folder))
    assert {"h5py", "numpy", "kr2cache"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("module", ["kr2cache.cache", "kr2cache.experiment.checks", "kr2cache.commands.app"])
def test_modules_that_the_command_line_starts_with_are_light(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_the_first_modules_import_next_to_nothing() -> None:
    """So that Ctrl-C is explained from early on."""
    assert not loaded_by("import kr2cache.cli") & (HEAVY | {"typer", "rich", "numpy", "h5py", "typing", "dataclasses"})


def test_the_public_names_are_found_when_they_are_used() -> None:
    wanted = {"FeatureCache", "KR2CacheError", "Predictor", "extract", "train"}
    assert set(kr2cache.__all__) == wanted | {"__version__"}
    assert set(kr2cache.__all__) <= set(dir(kr2cache))
    for name in wanted:
        assert getattr(kr2cache, name).__name__ == name
        assert importlib.util.find_spec(f"kr2cache.{name}") is None, "a module of that name would take its place"
    with pytest.raises(AttributeError, match="no attribute 'Extract'"):
        kr2cache.Extract  # noqa: B018
    names = "FeatureCache, KR2CacheError, extract, train"
    assert not loaded_by(f"from kr2cache import {names}") & HEAVY


def test_importing_the_package_is_quick() -> None:
    code = "import time; start = time.process_time(); import kr2cache; print(time.process_time() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.3


def test_no_two_modules_of_the_tests_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []
