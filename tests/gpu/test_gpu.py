"""The checks and measurements for a GPU run on the CPU in small sizes, and each check can fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device_checks as checks
import numpy as np
import pytest
import run
import torch
from device_scene import SMALL, Scene

from kr2cache.prediction.predict import Predictor


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_all_of_it_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--disk", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert {entry["check"] for entry in report["checks"]} == {checks._title(check) for check in checks.CHECKS}
    seen = {entry["what"]: entry["passed"] for entry in report["checks"]}
    assert False not in seen.values()
    assert {what for what, passed in seen.items() if passed is None} <= {
        "a GPU's memory", "efficient_attention in float32", "efficient_attention in bfloat16",
    }  # fmt: skip
    assert [one["title"].partition(",")[0] for one in report["measured"]] == [
        "stage one in float32", "stage one in tf32", "stage one in bfloat16", "reading", "training", "training",
    ]  # fmt: skip
    assert all(one["medians"] and all(rate > 0 for rate in one["rates"].values()) for one in report["measured"])
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["hardware"]) >= {"device", "cores", "threads"}
    page = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert page in capsys.readouterr().out
    assert page.count("| ok |") == sum(passed is True for passed in seen.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the rest is removed"


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "LIBRARIES", ("torch", "no-such-library"))
    assert run.main(["--check-only"]) == 2
    assert "no-such-library" in capsys.readouterr().out


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"), torch.device("cpu"), SMALL)


def _off_by_one_layer(*arguments: Any, **named: Any) -> Any:
    layers = HIDDEN_STATES(*arguments, **named)
    return (*layers[1:], layers[0])


def _one_value_off(self: Any, layers_BTD: Any, lengths: Any) -> Any:
    packed, stored = COPY_OUT(self, layers_BTD, lengths)
    packed[-1, 0] += 1
    return packed, stored


def _neighbours(self: Any, sequences: list[int]) -> Any:
    return BATCH(self, [sequences[1], sequences[0], *sequences[2:]])


def _swapped(parts: list[Any]) -> Any:
    return JOINED(parts[::-1])


def _other_states(self: Any, examples: Any) -> Any:
    return [logits + np.float32(0.1) for logits in LOGITS(self, examples)]


HIDDEN_STATES, COPY_OUT = checks.hidden_states, checks.Packer._copy_out
BATCH, JOINED, LOGITS = checks.DeviceFeatures.batch, checks.joined, Predictor.logits
SABOTAGE: tuple[tuple[Callable[[Scene], Iterator[checks.Seen]], Any, str, Any], ...] = (
    (checks.states, checks, "hidden_states", _off_by_one_layer),
    (checks.backends, checks, "hidden_states", _off_by_one_layer),
    (checks.packing, checks.Packer, "_copy_out", _one_value_off),
    (checks.features, checks.DeviceFeatures, "batch", _neighbours),
    (checks.features, checks, "joined", _swapped),
    (checks.prediction, Predictor, "logits", _other_states),
)


@pytest.mark.parametrize(
    ("check", "place", "name", "wrong"), SABOTAGE, ids=[f"{check.__name__}-{name}" for check, _, name, _ in SABOTAGE]
)
def test_a_check_fails_where_something_is_wrong(
    check: Any, place: Any, name: str, wrong: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, wrong)
    assert any(seen.passed is False for seen in check(scene))


def test_a_check_that_breaks_has_failed_and_the_others_are_seen(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(scene: Scene) -> Iterator[checks.Seen]:
        """It breaks."""
        yield from ()
        raise ValueError("a wrong shape")

    monkeypatch.setattr(checks, "CHECKS", (breaks, checks.given_back))
    found = list(checks.run_checks(scene))
    assert [seen.passed for _, seen, _ in found] == [False, None]
    assert "ValueError: a wrong shape" in found[0][1].seen
    assert "Traceback" in capsys.readouterr().err
