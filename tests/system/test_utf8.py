"""Text from outside is UTF-8, and a byte order mark is no part of it: kr2cache.toml, grids, lists of ids, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from world import World

from kr2cache.cli import run
from kr2cache.config import ExtractConfig, TrainConfig
from kr2cache.errors import ConfigError, KR2CacheError
from kr2cache.experiment.grid import read_grid
from kr2cache.toml import read_toml

MARK = b"\xef\xbb\xbf"
TOML = b'[models.x]\npath = "m"\n'
GRID = b'[[rows]]\nname = "r"\n[[columns]]\nname = "c"\n'


def test_a_byte_order_mark_in_toml_is_dropped(workdir: Path) -> None:
    (workdir / "kr2cache.toml").write_bytes(MARK + TOML.replace(b"\n", b"\r\n"))
    assert read_toml(workdir, {}).models == {"x": {"path": "m"}}
    (workdir / "grid.toml").write_bytes(MARK + GRID)
    assert [row.name for row in read_grid(workdir / "grid.toml", {}).rows] == ["r"]


def test_toml_that_is_not_utf_8_is_named_with_its_line(workdir: Path) -> None:
    bad = "# größe\n".encode("latin-1")
    (workdir / "kr2cache.toml").write_bytes(TOML + bad)
    (workdir / "grid.toml").write_bytes(bad + GRID)
    with pytest.raises(ConfigError, match=r"kr2cache\.toml:3: not UTF-8"):
        read_toml(workdir, {})
    with pytest.raises(ConfigError, match=r"grid\.toml:1: not UTF-8"):
        read_grid(workdir / "grid.toml", {})


BAD = "gr\udcf6\udcdfe"
"""What Python makes of an argument in Latin-1."""


@pytest.mark.parametrize(
    ("settings", "option"),
    [({"resource": BAD}, "--resource"), ({"data": BAD}, "--data"), ({"cache_dir": Path(BAD)}, "--cache-dir")],
)
def test_settings_that_are_not_utf_8_are_named(settings: dict[str, Any], option: str) -> None:
    for make in (
        lambda: ExtractConfig(**({"resource": "r", "task": "udpos", "split": "train"} | settings)),
        lambda: TrainConfig(**({"task": "udpos"} | settings)),
    ):
        with pytest.raises(KR2CacheError, match=f"{option}: not UTF-8: gr.udcf6.udcdfe"):
            make()


def test_an_argument_that_is_not_utf_8_fits_into_json(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["extract", "--resource", "minilm", "--split", "train", "--task", BAD, "--json"]) == 1
    assert BAD.encode("utf-8", "backslashreplace").decode() in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_list_of_ids_may_begin_with_a_byte_order_mark(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = world.extract().cache
    line = ["cache", "slice", str(cache), "--layers", "last2", "--ids", str(tmp_path / "ids"), "--json"]
    capsys.readouterr()
    (tmp_path / "ids").write_bytes(MARK + b"train-s1\r\ntrain-s3\n")
    assert run(line) == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == 2
    (tmp_path / "ids").write_bytes(b"train-s1\n\xff\n")
    assert run(line) == 1
    assert "ids:2: not UTF-8" in json.loads(capsys.readouterr().out)["error"]["message"]
