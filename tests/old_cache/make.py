"""Make ``world.tar.xz``: models, corpus, caches and a run, as the code of commit 0485b90 writes them.

    git worktree add /tmp/then 0485b90
    cd /tmp/then && PYTHONPATH=. python .../tests/old_cache/make.py /tmp/world.tar.xz

It refuses the package of another commit: newer code must not write what shows that newer code reads older files.
"""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

import kr2cache

COMMIT = "0485b90"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""In RoBERTa's order: its position counting expects the padding id 1."""
LETTERS = "abdefghilmnorstuwäü."
VOCABULARY = (*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "das", "##en")
SENTENCES = {
    "train": (
        "das/DET haus/NOUN steht/VERB ./PUNCT",
        "das/DET tier/NOUN ruht/VERB da/ADV ./PUNCT",
        "die/DET hunde/NOUN bellen/VERB nun/ADV ./PUNCT",
        "wir/PRON reden/VERB ./PUNCT",
        "über/ADP das/DET haus/NOUN reden/VERB wir/PRON nun/ADV ./PUNCT",
        "da/ADV steht/VERB das/DET tier/NOUN ./PUNCT",
    ),
    "dev": ("das/DET tier/NOUN steht/VERB ./PUNCT", "da/ADV reden/VERB die/DET hunde/NOUN ./PUNCT"),
    "test": ("die/DET hunde/NOUN ruhen/VERB da/ADV ./PUNCT", "nun/ADV steht/VERB das/DET haus/NOUN ./PUNCT"),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over letters, so that words have several tokens."""
    numbers = {piece: number for number, piece in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(numbers, unk_token="<unk>", max_input_chars_per_word=100))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def save_models(folder: Path) -> None:
    """A BERT of two layers of width 8, and an XLM-R of another width."""
    common = {
        "vocab_size": len(VOCABULARY),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 132,
        "initializer_range": 0.4,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(7)
    for name, model in (
        ("res", BertModel(BertConfig(hidden_size=8, intermediate_size=16, **common), add_pooling_layer=False)),
        ("reader", XLMRobertaModel(XLMRobertaConfig(hidden_size=12, intermediate_size=16, **common))),
    ):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)


def save_corpus(folder: Path) -> None:
    folder.mkdir()
    for split, sentences in SENTENCES.items():
        lines = []
        for number, sentence in enumerate(sentences, 1):
            lines.append(f"# sent_id = {split}-{number}")
            for place, word in enumerate(sentence.split(), 1):
                form, tag = word.split("/")
                lines.append(f"{place}\t{form}\t_\t{tag}\t_\t_\t_\t_\t_\t_")
            lines.append("")
        (folder / f"{split}.conllu").write_text("\n".join(lines) + "\n", "utf-8")


TOML = """\
[defaults]
task = "udpos"
data = "corpus"
resource = "res"
reader = "reader"
device = "cpu"

[models.res]
path = "models/res"
[models.reader]
path = "models/reader"
"""


CLI = "import platform; platform.platform = lambda *_: 'Linux'; from kr2cache.cli import main; main()"
"""The command line; which kernel made the world is nobody's business."""


def kr2cache_run(*arguments: str) -> None:
    command = [sys.executable, "-c", CLI, *arguments, "--cache-dir", "caches", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def last_change(repository: Path, commit: str) -> str:
    """The last commit up to ``commit`` that changed the package."""
    command = ["git", "-C", str(repository), "log", "-1", "--format=%h", commit, "--", "kr2cache"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def make(world: Path) -> None:
    world.mkdir()
    os.chdir(world)
    save_models(Path("models"))
    save_corpus(Path("corpus"))
    Path("kr2cache.toml").write_text(TOML, "utf-8")
    for split in SENTENCES:
        kr2cache_run("extract", "--split", split)
    for dtype in ("float32", "bfloat16", "int8"):
        kr2cache_run("extract", "--split", "train", "--dtype", dtype)
    kr2cache_run("extract", "--split", "train", "--max-length", "16", "--shard-gb", "0.000002")
    (test,) = (folder for folder in Path("caches/udpos/test").iterdir() if folder.is_dir())
    kr2cache_run("cache", "slice", test.name, "--layers", "1")
    kr2cache_run("cache", "fuse", test.name, "--fusion", "all")
    training = {"--fusion": "last2", "--seeds": "1", "--epochs": "40", "--batch-size": "2", "--learning-rate": "1e-2"}
    kr2cache_run("train", *itertools.chain(*training.items()), "--run-dir", "runs")


def pack(world: Path, archive: Path) -> None:
    """Everything but locks, in order and without times: the shards are mostly zeros, and shrink to a tenth."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(world.rglob("*")):
            if path.is_file() and path.suffix != ".lock":
                content = path.read_bytes()
                member = tarfile.TarInfo(path.relative_to(world).as_posix())
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main(archive: Path) -> None:
    package = Path(kr2cache.__file__).parents[1]
    there, then = last_change(package, "HEAD"), last_change(package, COMMIT)
    if there != then:
        raise SystemExit(f"The package in {package} is that of {there}, not of {COMMIT}.")
    os.environ["PYTHONPATH"] = str(package)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "world")
        pack(Path(folder) / "world", archive)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
