"""Tokenizers of today's models: the components of their published tokenizer.json, trained on a little text.

Each takes some hundredths of a second. The vocabulary is small; how words, spaces, digits and bytes are handled does
not depend on its size.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    DebertaV2Tokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    LukeTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
)

from kr2cache.tasks.udpos import read_conllu

EVERYDAY = Path(__file__).parents[1] / "data" / "everyday"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "ud"
"""Real treebanks, where they lie beside the checkout."""

KOREAN = """\
오늘 아침 에는 비 가 많이 왔습니다 .
저는 매일 학교 에 갑니다 .
우리 가족 은 서울 에서 12 년 동안 살았다 .
그 책 은 정말 재미있어요 !
2024년 3월 5일 에 새로운 도서관 이 문을 열었다 .
내일 은 날씨 가 좋을 것 같아요 .
그녀 는 커피 와 빵 을 샀다 .
어디 에서 기차 를 탈 수 있습니까 ?
고양이 가 창문 옆 에서 자고 있다 .
선생님 은 학생들 에게 한국어 를 가르친다 .
이 문장 은 ( 아마 ) 조금 길고 , 단어 가 많다 .
'안녕하세요' 라고 그가 말했다 .
"""
"""Written for these tests; words and punctuation stand apart."""

Sentences = list[tuple[str, ...]]


def sentences(language: str, limit: int = 100) -> Sentences:
    """Words of some sentences in ``en``, ``de`` or ``ko``: of a real treebank if there is one, else of our own text."""
    treebank = SHARED / language / "test.conllu"
    return list(itertools.islice(_words_in(treebank), limit)) if treebank.is_file() else own_sentences(language)[:limit]


def own_sentences(language: str) -> Sentences:
    if language == "ko":
        return [tuple(line.split()) for line in KOREAN.splitlines()]
    return everyday("train", language)


def everyday(split: str, language: str) -> Sentences:
    return list(_words_in(EVERYDAY / split / f"{language}.conllu"))


def _words_in(path: Path) -> Iterator[tuple[str, ...]]:
    return (tuple(forms) for _, _, forms, _ in read_conllu(path))


def texts() -> list[str]:
    """What the tokenizers are trained on: the same on every machine."""
    return [" ".join(words) for language in ("en", "de", "ko") for words in own_sentences(language)]


# Byte-level BPE ------------------------------------------------------------------------------------------------------

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text before bytes are merged."""


def _byte_level(special: Sequence[str], *, split: str | None = None, size: int = 900) -> Tokenizer:
    """A byte-level BPE without its special tokens around a text; cut as GPT-2 does, or by ``split``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    return backend


def modernbert() -> PreTrainedTokenizerFast:
    """answerdotai/ModernBERT-base: the generic class."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    backend = _byte_level(special)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken(token, normalized=True) for token in ("|||IP_ADDRESS|||", "  ", "   ")])
    backend.add_special_tokens([AddedToken("[MASK]", lstrip=True, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token=AddedToken("[MASK]", lstrip=True),
        model_input_names=["input_ids", "attention_mask"],
    )


def llama3() -> PreTrainedTokenizerFast:
    """meta-llama/Llama-3.1-8B: the generic class, the text cut by an expression."""
    return _like_llama3("<|begin_of_text|> $A")


def eurobert() -> PreTrainedTokenizerFast:
    """EuroBERT/EuroBERT-210m: Llama 3's, with an end of the text and a mask."""
    return _like_llama3("<|begin_of_text|> $A <|end_of_text|>", mask_token="<|mask|>")


def _like_llama3(single: str, **more: str) -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|mask|>"]
    backend = _byte_level(special, split=LLAMA3_SPLIT)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=single, pair=f"{single} $B", special_tokens=[(name, i) for i, name in enumerate(special[:2])]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        model_input_names=["input_ids", "attention_mask"],
        **more,
    )


def qwen3() -> Qwen2Tokenizer:
    """Qwen/Qwen3-0.6B: a class of its own, which puts a space before every digit if told to put one before words."""
    vocabulary, merges = _parts(_byte_level(["<|endoftext|>", "<|im_start|>"], split=LLAMA3_SPLIT.replace("{1,3}", "")))
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges)


def roberta() -> RobertaTokenizer:
    """FacebookAI/roberta-base: it takes ``add_prefix_space``."""
    vocabulary, merges = _parts(_byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    return RobertaTokenizer(vocab=vocabulary, merges=merges)


def luke() -> LukeTokenizer:
    """studio-ousia/luke-base: RoBERTa's, in a class whose call takes a list of word lists for pairs of texts."""
    vocabulary, merges = _parts(_byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    return LukeTokenizer(vocab=vocabulary, merges=merges)


def _parts(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    content = json.loads(backend.to_str())["model"]
    return content["vocab"], [tuple(pair) for pair in content["merges"]]


# SentencePiece -------------------------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _sentencepiece_bpe(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE over characters and ▁, with tokens for the bytes of unknown characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=1_400, special_tokens=[*special, *BYTES], limit_alphabet=500, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    return _parts(backend)


def gemma() -> GemmaTokenizer:
    """google/gemma-3-1b: ▁ stands for the spaces of the text, and no space is added."""
    vocabulary, merges = _sentencepiece_bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def llama2() -> LlamaTokenizer:
    """meta-llama/Llama-2-7b: ▁ before every word, also a given one."""
    vocabulary, merges = _sentencepiece_bpe(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, pad_token="</s>")


def _unigram(special: Sequence[str], unknown: str) -> list[tuple[str, float]]:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=list(special), unk_token=unknown, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    return [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]


def deberta_v3() -> DebertaV2Tokenizer:
    """microsoft/deberta-v3-base."""
    return DebertaV2Tokenizer(vocab=_unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], "[UNK]"), unk_id=3)


def t5() -> T5Tokenizer:
    """google-t5/t5-small."""
    return T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"], "<unk>"), extra_ids=0)


TOKENIZERS: dict[str, tuple[str, Callable[[], PreTrainedTokenizerFast]]] = {
    "modernbert": ("modernbert", modernbert),
    "eurobert": ("eurobert", eurobert),
    "llama3": ("llama", llama3),
    "qwen3": ("qwen3", qwen3),
    "roberta": ("roberta", roberta),
    "luke": ("luke", luke),
    "gemma": ("gemma3_text", gemma),
    "llama2": ("llama", llama2),
    "deberta-v3": ("deberta-v2", deberta_v3),
    "t5": ("t5", t5),
}
"""The architecture of the model, and what makes its tokenizer."""


def save(name: str, folder: Path) -> Path:
    """The tokenizer in a folder, with a configuration of the architecture: what ``load_tokenizer`` needs."""
    model_type, make = TOKENIZERS[name]
    tokenizer = make()
    tokenizer.save_pretrained(folder)
    AutoConfig.for_model(model_type, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def save_model(name: str, folder: Path) -> Path:
    """A tiny model with random weights, with its tokenizer."""
    model_type, make = TOKENIZERS[name]
    tokenizer = make()
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    tiny.save_model(folder, model_type, vocab_size=len(tokenizer), **special)
    tokenizer.save_pretrained(folder)
    return folder
