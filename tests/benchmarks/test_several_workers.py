"""The benchmark runs, and sees other bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from workers import measure, same_files

from kr2cache import demo


@pytest.mark.long
@pytest.mark.usefixtures("forked_programs")
def test_one_and_two_workers_are_measured(tmp_path: Path) -> None:
    arguments = ["--resource", str(tiny.minilm()), "--data", str(demo.corpus()), "--task", "udpos", "--split", "train"]
    results = measure([*arguments, "--limit", "40", "--shard-gb", "0.001"], tmp_path, [1, 2], 1, 1)
    assert [[one.sequences for one in made] for made in results.values()] == [[40], [40]]
    assert results[2][0].cpu_seconds > results[1][0].cpu_seconds > 0, "each worker loads the model"


def test_other_bytes_and_other_names_are_seen(tmp_path: Path) -> None:
    for name in ("one", "same", "bytes", "names"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_bytes(b"bytes" if name == "bytes" else b"right")
    (tmp_path / "names" / "more").touch()
    same = [same_files(tmp_path / "one", tmp_path / name) for name in ("same", "bytes", "names")]
    assert same == [True, False, False]
