"""KR2's equations 1 to 3 in plain PyTorch, to compare scores: without code of kr2cache, cache or Trainer.

Part-of-speech tagging, word accuracy on the test split. The head and the order of examples use random numbers as
transformers does. So without dropout, a seed gives the same training as this seed of ``kr2cache train``. (With dropout
it does not, because the random numbers depend on the positions in a batch.)

python tests/benchmarks/reference.py --data FOLDER --reader FOLDER [--resource FOLDER] --limit 600 --epochs 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import conllu
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)

TAGS = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ")
TAGS += ("SYM", "VERB", "X")
LAST = 4
"""H^_res (eq. 1) is the average of this number of last layers."""

Sentence = tuple[list[str], list[int]]


def read(path: Path, limit: int | None) -> list[Sentence]:
    """Words and tag numbers of the first ``limit`` sentences of a CoNLL-U file."""
    with path.open(encoding="utf-8") as file:
        parsed = islice(conllu.parse_incr(file), limit)
        rows = [[token for token in sentence if isinstance(token["id"], int)] for sentence in parsed]
    return [([token["form"] for token in row], [TAGS.index(token["upos"]) for token in row]) for row in rows]


def encode(tokenizer: Any, words: list[str], max_length: int) -> tuple[Tensor, list[int | None]]:
    """Token ids, and for each token the number of its word, or None."""
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    return torch.tensor(encoded["input_ids"]), encoded.word_ids()


def first_subwords(word_of_token: list[int | None]) -> dict[int, int]:
    """Number of a word to the position of its first token."""
    places: dict[int, int] = {}
    for place, word in enumerate(word_of_token):
        if word is not None:
            places.setdefault(word, place)
    return places


def resource_states(folder: Path, sentences: Sequence[Sentence], max_length: int) -> list[Tensor]:
    """H^_res of each sentence, shape (l2, h2): the average of the last layers. Each sentence is run alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    states = []
    with torch.no_grad():
        for words, _ in sentences:
            tokens, _ = encode(tokenizer, words, max_length)
            layers = model(tokens[None], output_hidden_states=True).hidden_states
            states.append(torch.stack(layers[-LAST:]).mean(dim=0)[0])
    return states


class Reader:
    """The Hugging Face tagger. If there is a resource, G^0 = H^_res (h1 = h2) is appended to its embeddings."""

    def __init__(self, folder: Path, dropout: float | None) -> None:
        config = AutoConfig.from_pretrained(folder, num_labels=len(TAGS))
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        self.model = AutoModelForTokenClassification.from_pretrained(folder, config=config, dtype=torch.float32)
        self.model.base_model.embeddings.register_forward_hook(self._concat)
        self.appended: Tensor | None = None

    def _concat(self, module: Any, inputs: Any, embeddings: Tensor) -> Tensor:
        return embeddings if self.appended is None else torch.cat([embeddings, self.appended], dim=1)  # eq. 3

    def logits(self, tokens: list[Tensor], states: list[Tensor] | None) -> Tensor:
        """Shape (B, l1, number of tags)."""
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.model.config.pad_token_id)
        mask = pad_sequence([torch.ones(len(one)) for one in tokens], batch_first=True)
        if states is not None:
            self.appended = pad_sequence(states, batch_first=True)
            more = pad_sequence([torch.ones(len(one)) for one in states], batch_first=True)
            mask = torch.cat([mask, more], dim=1)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[:, : ids.shape[1]]


def train_tagger(
    data: Path,
    reader: Path,
    resource: Path | None,
    *,
    seed: int,
    limit: int | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 2e-5,
    dropout: float | None = None,
    max_length: int = 128,
) -> tuple[PreTrainedModel, float]:
    """Train on ``train.conllu``, score on ``test.conllu``.

    Args:
        resource: None for the reader alone.
        dropout: None for the checkpoint's own.

    Returns:
        The trained model, and its word accuracy: the fraction of right words. Words that are cut off are wrong.
    """
    train, test = (read(data / f"{split}.conllu", limit) for split in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(reader)
    encoded = {id(part): [encode(tokenizer, words, max_length) for words, _ in part] for part in (train, test)}
    states = {id(part): resource and resource_states(resource, part, max_length) for part in (train, test)}
    set_seed(seed)
    tagger = Reader(reader, dropout)
    optimizer = torch.optim.AdamW(tagger.model.parameters(), lr=learning_rate, weight_decay=0.0)
    steps = epochs * -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)  # linear, no warm-up

    def batch(part: list[Sentence], numbers: list[int]) -> tuple[Tensor, list[dict[int, int]]]:
        tokens = [encoded[id(part)][i][0] for i in numbers]
        own = states[id(part)] and [states[id(part)][i] for i in numbers]
        return tagger.logits(tokens, own), [first_subwords(encoded[id(part)][i][1]) for i in numbers]

    tagger.model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            logits, places = batch(train, numbers)
            rows = [
                (row, place, train[i][1][word]) for row, i in enumerate(numbers) for word, place in places[row].items()
            ]
            row, place, gold = torch.tensor(rows).T
            torch.nn.functional.cross_entropy(logits[row, place], gold).backward()
            torch.nn.utils.clip_grad_norm_(tagger.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    tagger.model.eval()
    right = 0
    with torch.no_grad():
        for i, (_, tags) in enumerate(test):
            logits, places = batch(test, [i])
            best = logits[0].argmax(dim=-1)
            right += sum(int(best[place]) == tags[word] for word, place in places[0].items())
    return tagger.model, right / sum(len(words) for words, _ in test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.conllu and test.conllu")
    parser.add_argument("--reader", type=Path, required=True, help="folder of the model that is trained")
    parser.add_argument("--resource", type=Path, help="folder of the frozen model; by default, the reader alone")
    parser.add_argument("--limit", type=int, help="number of sentences of each split")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--dropout", type=float, help="instead of the checkpoint's own")
    parser.add_argument("--seeds", default="1,2,3")
    arguments = vars(parser.parse_args())
    seeds = [int(seed) for seed in arguments.pop("seeds").split(",")]
    scores = []
    for seed in seeds:
        scores.append(100 * train_tagger(**arguments, seed=seed)[1])
        print(f"seed {seed}: {scores[-1]:.2f}", flush=True)
    print(f"mean {sum(scores) / len(scores):.2f}")


if __name__ == "__main__":
    main()
