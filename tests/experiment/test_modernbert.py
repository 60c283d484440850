"""Tagging with a ModernBERT and its tokenizer, a byte-level BPE of the generic class, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trained
from transformers import AutoModel, AutoTokenizer
from world import predictions

from kr2cache import FeatureCache, cli

SENTENCES = 12


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ModernBERT. Read only."""
    return trained.save_model("modernbert", tmp_path_factory.mktemp("models") / "modernbert")


def call(capsys: pytest.CaptureFixture[str], command: str, *more: object, **options: object) -> dict[str, Any]:
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    code = cli.run([command, *given, "--device", "cpu", "--json", *map(str, more)])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == 0, said
    return said


def test_a_modernbert_as_resource_and_as_reader(
    modern: Path, reader_model: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"task": "udpos", "data": trained.EVERYDAY, "limit": SENTENCES}
    extracted = call(capsys, "extract", resource=modern, split="train", dtype="float32", **data)
    cache = FeatureCache.open(Path(extracted["cache"]))
    tokenizer, model = AutoTokenizer.from_pretrained(modern), AutoModel.from_pretrained(modern).eval()
    texts = trained.everyday("train", "de")[:SENTENCES]
    assert len(cache.ids) == SENTENCES
    for name, words in zip(cache.ids, texts, strict=True):
        with torch.inference_mode():
            running = model(**tokenizer(" ".join(words), return_tensors="pt"), output_hidden_states=True)
        np.testing.assert_allclose(cache[name], torch.cat(running.hidden_states).numpy(), atol=1e-5)

    settings = {**data, "epochs": 1, "seeds": 1, "batch_size": 4}
    call(capsys, "train", resource=modern, reader=reader_model, fusion="last2", **settings)
    call(capsys, "train", method="kreader", reader=modern, **settings)
    runs = sorted(Path("runs").rglob("seed-1"))
    assert len(runs) == 2
    test = trained.everyday("test", "de")[:SENTENCES]
    for run in runs:
        found = call(capsys, "predict", *(" ".join(words) for words in test), run=run)["predictions"]
        assert [one["predicted"] for one in found] == [row["predicted"] for row in predictions(run, "test")]
        assert [len(one["predicted"]) for one in found] == [len(words) for words in test]
