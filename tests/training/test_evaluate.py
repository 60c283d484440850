"""What a reader says of examples, by transformers' own forward pass of each example alone."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from tokenizers import normalizers
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast

from kr2cache.errors import TrainingError
from kr2cache.models.encode import encode_examples
from kr2cache.tasks import Example, find_task
from kr2cache.training import evaluate
from kr2cache.training.batches import SplitData
from kr2cache.training.evaluate import example_logits, predict, predictions
from kr2cache.training.kreader import HEADS, KReader

TASK = find_task("udpos")
MAX_LENGTH = 12
SENTENCES = (
    ("das", "haus"),
    ("das", "\u200b", "haus", "\ufeff"),  # words without a token, in the middle and at the end
    ("ein",),
    ("ein", "haus") * 20,  # cut off
    ("\u200b",),  # no word at all
    ("ist", "\u200b", "das") * 20,
    ("das", "haus", "ist"),
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    return made


def test_labels_are_those_of_each_words_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example(f"s{i}", (words,), None) for i, words in enumerate(SENTENCES)]
    data = SplitData(examples=examples, index=encode_examples(tokenizer, examples, TASK, MAX_LENGTH))
    torch.manual_seed(0)
    config = tiny.config("bert", num_labels=len(TASK.labels), initializer_range=0.5)
    model = AutoModelForTokenClassification.from_config(config).eval()
    reader = KReader(model, "token")
    expected_logits = []
    for words in SENTENCES:
        encoded = tokenizer(
            list(words), is_split_into_words=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**encoded).logits[0].numpy()
        word_ids = encoded.word_ids(0)
        nothing = np.full(len(TASK.labels), np.nan, dtype=np.float32)
        expected_logits.append(
            np.stack([logits[word_ids.index(w)] if w in word_ids else nothing for w in range(len(words))])
        )
    given = example_logits(reader, data, TASK, tokenizer)
    for one, other in zip(given, expected_logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    labels = [[None if np.isnan(row).any() else int(np.argmax(row)) for row in rows] for rows in expected_logits]
    assert predict(reader, data, TASK, tokenizer) == labels
    assert labels[4] == [None]
    assert None in labels[3]
    assert len({label for row in labels for label in row}) > 3, "all alike: this would show nothing"


@pytest.mark.parametrize(("name", "choices"), [("snli", 1), ("piqa", 2), ("swag", 4), ("swag", 1)])
def test_logits_are_in_the_order_of_the_examples(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, name: str, choices: int
) -> None:
    monkeypatch.setitem(evaluate.POSITIONS_PER_BATCH, "cpu", 120 * choices)  # so that there are several batches
    task = find_task(name)
    draw = np.random.default_rng(5)
    words = ("das", "haus", "ein", "ist")

    def text() -> str:
        return " ".join(draw.choice(words, draw.integers(1, 9)))

    examples = [Example(str(i), tuple((text(), text()) for _ in range(choices)), None) for i in range(24)]
    data = SplitData(examples=examples, index=encode_examples(tokenizer, examples, task, 32))
    torch.manual_seed(0)
    config = tiny.config("bert", num_labels=1 if task.head == "choice" else 3, initializer_range=0.5)
    model = HEADS[task.head].from_config(config).eval()
    expected = []
    for example in examples:
        pairs = [list(part) for part in zip(*example.texts, strict=True)]
        inputs = tokenizer(*pairs, truncation=True, max_length=32, padding=True, return_tensors="pt")
        with torch.no_grad():
            alone = {key: tensor[None] if task.head == "choice" else tensor for key, tensor in inputs.items()}
            expected.append(model(**alone).logits.numpy())
    given = example_logits(KReader(model, task.head), data, task, tokenizer)
    np.testing.assert_allclose(np.stack(given), np.stack(expected), rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.stack(expected).round(4), axis=0)) > 6, "all alike: this would show nothing"


@pytest.mark.parametrize(("name", "labels"), [("udpos", 17), ("snli", 3), ("piqa", 1)])
def test_a_logit_that_is_no_number_is_neither_a_word_without_a_token_nor_the_first_label(
    tokenizer: PreTrainedTokenizerFast, name: str, labels: int
) -> None:
    task = find_task(name)
    texts = {"udpos": (("ein", "haus"),), "snli": (("ein haus", "das"),), "piqa": (("ein", "haus"), ("ein", "das"))}
    examples = [Example("first", texts[name], None), Example("second", texts[name], None)]
    data = SplitData(examples=examples, index=encode_examples(tokenizer, examples, task, 32))
    reader = KReader(HEADS[task.head].from_config(tiny.config("bert", num_labels=labels)).eval(), task.head)
    assert len(predict(reader, data, task, tokenizer)) == 2
    with torch.no_grad():
        reader.model.classifier.bias[-1] = torch.nan
    with pytest.raises(TrainingError, match=r"nan or inf for example '(first|second)'"):
        predict(reader, data, task, tokenizer)


def test_a_label_of_unknown_logit_is_never_the_most_likely() -> None:
    piqa = find_task("piqa")
    assert predictions([np.array([[np.nan, -9.0]]), np.array([[2.0, 1.0]]), np.array([[0.0, 0.5]])], piqa) == [1, 0, 1]
    assert predictions([], TASK) == predictions([], piqa) == []
