"""Tagging from the command line with tokenizers that give a word its space in running text alone."""

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


def call(capsys: pytest.CaptureFixture[str], command: str, *more: object, **options: object) -> dict[str, Any]:
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    code = cli.run([command, *given, "--device", "cpu", "--json", *map(str, more)])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == 0, said
    return said


@pytest.mark.parametrize(("resource", "reader"), [("modernbert", "modernbert"), ("llama3", "eurobert")])
def test_words_are_read_as_running_text(
    workdir: Path, capsys: pytest.CaptureFixture[str], resource: str, reader: str
) -> None:
    folders = {name: trained.save_model(name, workdir / name) for name in {resource, reader}}
    data = {"task": "udpos", "data": trained.EVERYDAY, "limit": SENTENCES, "resource": folders[resource]}
    extracted = call(capsys, "extract", split="train", dtype="float32", **data)
    cache = FeatureCache.open(Path(extracted["cache"]))
    tokenizer = AutoTokenizer.from_pretrained(folders[resource])
    model = AutoModel.from_pretrained(folders[resource]).eval()
    for name, words in zip(cache.ids, trained.everyday("train", "de")[:SENTENCES], strict=True):
        with torch.inference_mode():
            running = model(**tokenizer(" ".join(words), return_tensors="pt"), output_hidden_states=True)
        np.testing.assert_allclose(cache[name], torch.cat(running.hidden_states).numpy(), atol=1e-5)

    call(capsys, "train", reader=folders[reader], fusion="last2", epochs=1, seeds=1, batch_size=4, **data)
    (run,) = Path("runs").rglob("seed-1")
    test = trained.everyday("test", "de")[:SENTENCES]
    found = call(capsys, "predict", *(" ".join(words) for words in test), run=run)["predictions"]
    assert [one["predicted"] for one in found] == [row["predicted"] for row in predictions(run, "test")]
    assert [len(one["predicted"]) for one in found] == [len(words) for words in test]
