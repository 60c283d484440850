"""The demo's own parts; the whole of it runs with `make demo`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from kr2cache import demo
from kr2cache.errors import ModelUnavailableError
from kr2cache.tasks import find_task


def test_its_reader_is_the_first_three_layers_of_its_resource(tmp_path: Path) -> None:
    pytest.importorskip(demo.PACKAGE)
    demo._make_reader(demo.minilm(), tmp_path / "reader")
    whole = AutoModel.from_pretrained(demo.minilm(), dtype=torch.float32).eval()
    part = AutoModel.from_pretrained(tmp_path / "reader", dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "reader")("The bakery opens at seven.", return_tensors="pt")
    with torch.no_grad():
        expected = whole(**batch, output_hidden_states=True).hidden_states
        found = part(**batch, output_hidden_states=True).hidden_states
    assert part.config.num_hidden_layers == 3
    for layer in range(4):
        np.testing.assert_allclose(found[layer], expected[layer], atol=1e-6)


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ModelUnavailableError, match=r"kr2cache\[demo\]"):
        demo.minilm()


def test_its_corpus_is_large_enough_and_in_two_languages() -> None:
    task = find_task("udpos")
    splits = {split: task.read(split, str(demo.corpus())) for split in ("train", "dev", "test")}
    ids = [example.id for examples in splits.values() for example in examples]
    assert len(ids) == len(set(ids)) >= 240
    assert {name.partition("/")[0] for name in ids} == {"de.conllu", "en.conllu"}
    for split, examples in splits.items():
        tags = {tag for example in examples for tag in example.label}
        assert tags == set(range(17)), f"{split} does not show every tag"


@pytest.mark.parametrize(
    ("gain", "spread", "said"),
    [(0.01, 0.008, "no evidence either way"), (0.05, 0.008, "helps"), (-0.05, 0.008, "does not help")],
)
def test_a_difference_that_seeds_explain_is_not_called_one(gain: float, spread: float, said: str) -> None:
    rows = [
        {"label": "KReader", "mean": {"accuracy": 0.8}, "std": {"accuracy": spread}},
        {"label": "KR2", "mean": {"accuracy": 0.8 + gain}, "std": {"accuracy": 0.001}},
    ]
    assert said in demo._what_it_says(rows)
