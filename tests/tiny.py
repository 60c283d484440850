"""Tiny models, tokenizers and corpora, made in memory or in a test's own folder; nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kr2cache.models.files import local_folder
from kr2cache.models.registry import REGISTRY
from kr2cache.tasks.udpos import UPOS


def minilm() -> Path:
    """The folder of a real model that the extra ``demo`` brings; the test is skipped where it is not installed."""
    folder = local_folder(REGISTRY["minilm"])
    if folder is None:
        pytest.skip("the extra demo is not installed")
    return folder


SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""In RoBERTa's order, so that the padding id is 1 as its position counting expects."""
PAD_ID = 1
PIECES = (*"abcdefghijklmnopqrstuvwxyzäöüß.,!?0123456789", "th", "er", "en", "ein", "das", "ich", "und", "the")
VOCABULARY = SPECIAL + PIECES + tuple(f"##{piece}" for piece in PIECES)


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over letters and a few longer pieces, ``<s> ... </s>`` around a text."""
    numbers = {piece: number for number, piece in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(numbers, unk_token="<unk>", max_input_chars_per_word=200))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def config(model_type: str, *, layers: int = 2, width: int = 16, positions: int = 600, **more: Any) -> PretrainedConfig:
    """A tiny configuration of any BERT-like architecture."""
    values: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": positions,
        "pad_token_id": PAD_ID,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if model_type == "electra":
        values["embedding_size"] = width
    if model_type == "distilbert":
        values |= {"n_layers": layers, "dim": width, "n_heads": 2, "hidden_dim": 2 * width}
    return AutoConfig.for_model(model_type, **(values | more))


READERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "distilbert", "electra")},
    **{name: {} for name in ("ernie", "megatron-bert", "mpnet", "nomic_bert", "jina_embeddings_v3", "roformer")},
    "electra-narrow": {"model_type": "electra", "embedding_size": 8},
    "deberta": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "deberta-v2": {  # as DeBERTa-v3
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "modernbert-mean": {
        "model_type": "modernbert",
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "classifier_pooling": "mean",
    },
    "eurobert": {"num_key_value_heads": 1},
    "albert": {"embedding_size": 8},
    "rembert": {"input_embedding_size": 8},
    "esm": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 48},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 8},
    "xmod": {"languages": ["de_DE", "en_XX"], "default_language": "en_XX"},
}
"""Architectures that can be readers of method kr2, with settings as their real models have them, in small."""


REFORMER: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "attention_head_size": 8,
    "axial_pos_embds": False,
    "feed_forward_size": 32,
    "is_decoder": False,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_buckets": 4,
    "num_hashes": 1,
    "hash_seed": None,
}
"""Settings of an architecture that draws random numbers for every text, because it has no seed."""


def reader_config(name: str, **more: Any) -> PretrainedConfig:
    """The tiny configuration of ``READERS[name]``."""
    return config(**({"model_type": name} | READERS[name] | more))


def save_model(folder: Path, model_type: str = "bert", *, seed: int = 0, **settings: Any) -> Path:
    """A tiny model with random weights and its tokenizer, as a folder that transformers loads."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModel.from_config(config(model_type, **settings))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


WORDS = ("das", "ich", "und", "ein", "haus", "the", "dog", "ran", "über", "schön", "zwölf", "7", "nebenan", "there")


def sentences(count: int, *, seed: int = 0, longest: int = 12) -> list[list[tuple[str, str]]]:
    """Random sentences of (form, tag); the tag depends on the form, so there is something to learn."""
    draw = random.Random(seed)
    tags = {word: UPOS[number % len(UPOS)] for number, word in enumerate(WORDS)}
    return [
        [(word, tags[word]) for word in draw.choices(WORDS, k=draw.randint(1, longest))] + [(".", "PUNCT")]
        for _ in range(count)
    ]


def conllu(words: Sequence[Sequence[tuple[str, str]]], *, prefix: str | None = "s") -> str:
    """CoNLL-U text; sentence ids ``s1``, ``s2``, ... or none."""
    blocks = []
    for number, sentence in enumerate(words, 1):
        lines = [f"# sent_id = {prefix}{number}"] if prefix is not None else []
        lines += [f"{i}\t{form}\t_\t{tag}\t_\t_\t_\t_\t_\t_" for i, (form, tag) in enumerate(sentence, 1)]
        blocks.append("\n".join(lines) + "\n\n")
    return "".join(blocks)


def save_corpus(folder: Path, *, train: int = 12, dev: int = 5, test: int = 6) -> Path:
    """A folder with train.conllu, dev.conllu and test.conllu; a count of 0 leaves the file out."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate({"train": train, "dev": dev, "test": test}.items()):
        if count:
            text = conllu(sentences(count, seed=seed), prefix=f"{split}-s")
            (folder / f"{split}.conllu").write_text(text, "utf-8")
    return folder


CODE_TOKENIZER = '''\
import os

from transformers import PreTrainedTokenizer


class {name}(PreTrainedTokenizer):
    """A token is a letter."""

    vocab_files_names = {{"vocab_file": "letters.txt"}}

    def __init__(self, vocab_file, **settings):
        with open(vocab_file, encoding="utf-8") as file:
            self.letters = file.read().split("\\n")
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {{letter: number for number, letter in enumerate(self.letters)}}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token) if token in self.letters else self.letters.index("<unk>")

    def _convert_id_to_token(self, number):
        return self.letters[number]

    def save_vocabulary(self, save_directory{prefix}):
        path = os.path.join(save_directory, "letters.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\\n".join({saved}))
        return (path,)
'''
PREFIX = ", filename_prefix=None"
"""What transformers 5 gives to ``save_vocabulary``. KoBERT's tokenizer does not take it."""


def use_code_tokenizer(
    folder: Path,
    reference: str = "tokenization_letters.LettersTokenizer",
    *,
    prefix: str = PREFIX,
    saved: str = "self.letters",
    auto_map: Any = None,
) -> Path:
    """Give the model in ``folder`` a tokenizer that is code, as KoBERT has.

    Args:
        reference: Module and class of the code.
        saved: The letters that ``save_vocabulary`` writes.
        auto_map: Of tokenizer_config.json; by default what the hub's models have.
    """
    module, _, name = reference.partition(".")
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / f"{module}.py").write_text(CODE_TOKENIZER.format(name=name, prefix=prefix, saved=saved), "utf-8")
    (folder / "letters.txt").write_text("\n".join(VOCABULARY), "utf-8")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    settings = {"auto_map": auto_map or {"AutoTokenizer": [reference, None]}, "tokenizer_class": name, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder
