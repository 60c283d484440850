"""The parts of the benchmark run: programs that keep cores busy, and a timed training."""

from __future__ import annotations

from pathlib import Path

import busy
import pytest


def test_programs_keep_cores_busy_and_end() -> None:
    with busy.spinning(2) as programs:
        assert [one.poll() for one in programs] == [None, None]
    assert all(one.poll() is not None for one in programs)


@pytest.mark.long
def test_a_training_is_timed(reader_model: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--reader", str(reader_model), "--task", "udpos", "--data", str(corpus), "--epochs", "1"]
    busy.main([*options, "--repeats", "1", "--spinners", "0", "--settings", "one thread"])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("one thread"))
    assert float(row.split()[-2]) > 0
