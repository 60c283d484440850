"""Part-of-speech tagging: what is read is what the ``conllu`` package reads, the scores are XTREME's."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

import conllu
import datasets
import pytest
import tiny
import xtreme
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from kr2cache.errors import ConfigError, DataError, MissingSplitError, UnknownNameError
from kr2cache.tasks import find_task, split_name, task_names
from kr2cache.tasks.ready import READY
from kr2cache.tasks.udpos import LANGUAGES, UPOS, UdPos, read_conllu

ROOT = Path(__file__).parents[2]
EVERYDAY = ROOT / "data" / "everyday"
UD = ROOT.parent / "shared" / "data" / "ud"
EVERYDAY_FILES = sorted(EVERYDAY.glob("*/*.conllu"))
UD_FILES = sorted(UD.glob("*/*.conllu"))
UD_LINES = 20_000
"""Of each large file; the conllu package is slow."""


def word(number: object, form: str, tag: str = "NOUN") -> str:
    return "\t".join((str(number), form, "_", tag, *"______")) + "\n"


def sentence(*forms: str, name: str | None = None, tag: str = "NOUN") -> str:
    head = f"# sent_id = {name}\n" if name else ""
    return head + "".join(word(i, form, tag) for i, form in enumerate(forms, 1)) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "corpus"
    path.mkdir()
    return path


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


def by_conllu_package(text: str) -> list[tuple[str | None, list[str], list[str]]]:
    """(sent_id, forms, tags) of plain integer ids, by the ``conllu`` package."""
    result = []
    for tokens in conllu.parse(text):
        words = [token for token in tokens if isinstance(token["id"], int)]
        result.append(
            (tokens.metadata.get("sent_id"), [token["form"] for token in words], [token["upos"] for token in words])
        )
    return result


# Agreement with the conllu package -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERYDAY_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_own_corpus_reads_as_the_conllu_package_reads_it(path: Path) -> None:
    assert [(name, forms, tags) for _, name, forms, tags in read_conllu(path)] == by_conllu_package(
        path.read_text("utf-8")
    )


@pytest.mark.long
@pytest.mark.skipif(not UD_FILES, reason="no treebanks beside the checkout")
@pytest.mark.parametrize("path", UD_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_treebanks_read_as_the_conllu_package_reads_them(path: Path, tmp_path: Path) -> None:
    lines = path.read_text("utf-8").splitlines(keepends=True)[:UD_LINES]
    while lines[-1].strip():
        lines.pop()
    part = write(tmp_path / path.name, "".join(lines))
    ours = [(name, forms, tags) for _, name, forms, tags in read_conllu(part)]
    assert ours == by_conllu_package("".join(lines))
    assert len(ours) > 500


@pytest.mark.long
@pytest.mark.skipif(not UD_FILES, reason="no treebanks beside the checkout")
@pytest.mark.parametrize(
    ("name", "sentences", "words"),
    [
        ("en/dev", 2_001, 25_147),
        ("en/test", 2_077, 25_094),
        ("de/dev", 799, 12_480),
        ("de/test", 977, 16_499),
        ("ko/dev", 950, 11_958),
        ("ko/test", 989, 11_677),
    ],
)
def test_treebanks_have_their_published_counts(name: str, sentences: int, words: int) -> None:
    language, split = name.split("/")
    examples = UdPos(language).read(split, str(UD / language))
    assert (len(examples), sum(len(example.texts[0]) for example in examples)) == (sentences, words)


FORMS = st.text("aä中 -'", min_size=1, max_size=5).filter(lambda form: form.strip() == form and "  " not in form)
"""Without two spaces in a row, which the conllu package takes for a tab."""
WORDS = st.tuples(FORMS, st.sampled_from(UPOS))


@given(sentences=st.lists(st.lists(WORDS, min_size=1, max_size=5), min_size=1, max_size=5), data=st.data())
def test_ranges_and_empty_nodes_anywhere_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[list[tuple[str, str]]], data: st.DataObject
) -> None:
    text = ""
    for words in sentences:
        for number, (form, tag) in enumerate(words, 1):
            if data.draw(st.booleans()):
                text += word(f"{number}-{number + 1}", form + "range", "_")
            text += word(number, form, tag)
            if data.draw(st.booleans()):
                text += word(f"{number}.1", "empty", "VERB")  # an empty node has a real tag
        text += "\n"
    path = write(tmp_path_factory.mktemp("conllu") / "train.conllu", text)
    ours = [(forms, tags) for _, _, forms, tags in read_conllu(path)]
    assert ours == [([form for form, _ in words], [tag for _, tag in words]) for words in sentences]
    assert ours == [(forms, tags) for _, forms, tags in by_conllu_package(text)]


# Shapes of a file ----------------------------------------------------------------------------------------------------


def test_a_form_may_contain_a_space(folder: Path) -> None:
    write(folder / "train.conllu", sentence("10 000", "vingt et un"))
    assert UdPos(None).read("train", str(folder))[0].texts == (("10 000", "vingt et un"),)


def test_without_sent_id_ids_count_every_sentence_from_0(folder: Path) -> None:
    write(folder / "dev.conllu", sentence("a") + sentence("b", name="named") + sentence("c"))
    assert [example.id for example in UdPos(None).read("dev", str(folder))] == ["dev-0", "named", "dev-2"]


def test_a_sent_id_belongs_to_its_own_sentence_alone(folder: Path) -> None:
    write(folder / "dev.conllu", "# sent_id = x\n# text = a\n" + sentence("a") + "# newdoc\n" + sentence("b"))
    assert [example.id for example in UdPos(None).read("dev", str(folder))] == ["x", "dev-1"]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff# sent_id = s1\n" + sentence("ä", "b") + sentence("c", name="s2"),
        ("# sent_id = s1\n" + sentence("ä", "b") + sentence("c", name="s2")).replace("\n", "\r\n"),
        ("# sent_id = s1\n" + sentence("ä", "b") + sentence("c", name="s2")).rstrip("\n"),
        "\n\n# sent_id = s1\n" + sentence("ä", "b") + "\n\n\n" + sentence("c", name="s2") + "\n\n",
        "# sent_id=s1\n" + sentence("ä", "b") + "#sent_id =   s2  \n" + sentence("c"),
    ],
    ids=["byte order mark", "CRLF", "no final line end", "more blank lines", "sent_id spelled otherwise"],
)
def test_every_way_to_write_the_same_file_gives_the_same_examples(folder: Path, text: str) -> None:
    write(folder / "test.conllu", text)
    examples = UdPos(None).read("test", str(folder))
    noun = UPOS.index("NOUN")
    assert [(e.id, e.texts, e.label) for e in examples] == [
        ("s1", (("ä", "b"),), (noun, noun)),
        ("s2", (("c",),), (noun,)),
    ]


def test_labels_are_numbers_of_the_seventeen_tags(folder: Path) -> None:
    text = "".join(word(i, tag.lower(), tag) for i, tag in enumerate(UPOS, 1)) + "\n"
    write(folder / "train.conllu", text)
    assert UdPos(None).read("train", str(folder))[0].label == tuple(range(17))
    universal = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
    assert " ".join(UPOS) == universal


def test_a_sentence_without_any_tag_is_unlabelled(folder: Path) -> None:
    write(folder / "test.conllu", sentence("a", "b", tag="_") + sentence("c"))
    assert [example.label for example in UdPos(None).read("test", str(folder))] == [None, (UPOS.index("NOUN"),)]


def test_limit_takes_the_first(folder: Path) -> None:
    write(folder / "train.conllu", "".join(sentence("a", name=f"s{i}") for i in range(9)))
    assert [example.id for example in UdPos(None).read("train", str(folder), 3)] == ["s0", "s1", "s2"]


# Text that is withheld ------------------------------------------------------------------------------------------------


def xtreme_keeps(forms: Sequence[str]) -> bool:
    """What XTREME's preprocessing keeps: no ``_``, or at least two words that are something else."""
    return "_" not in forms or sum(form != "_" for form in forms) > 1


WITHHELD = [
    ["_"],
    ["_", "_", "_"],
    ["_", "."],
    ["_", "_", "x"],
    ["_", "x", "y"],
    ["x", "y"],
    ["_", "_", "x", "y"],
    ["x"],
]


def test_sentences_without_text_are_left_out_as_xtreme_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "train.conllu", "".join(sentence(*forms) for forms in WITHHELD))
    kept = [(f"train-{number}", (tuple(forms),)) for number, forms in enumerate(WITHHELD) if xtreme_keeps(forms)]
    assert [(one.id, one.texts) for one in UdPos(None).read("train", str(folder))] == kept, "ids count every sentence"
    assert 0 < len(kept) < len(WITHHELD)
    said = capsys.readouterr().out
    assert (
        f"train.conllu: {len(WITHHELD) - len(kept)} of {len(WITHHELD)} sentences have _ in place of their words" in said
    )
    assert [(one.id, one.texts) for one in UdPos(None).read("train", str(folder), 2)] == kept[:2], (
        "the limit is of those"
    )
    assert len(UdPos(None).read_unlabelled(folder / "train.conllu", "new")) == len(WITHHELD), "predict labels all"


def test_a_treebank_without_any_text_has_no_example(folder: Path) -> None:
    write(folder / "train.conllu", sentence("_", "_", tag="_") + sentence("_", "_", "_"))
    with pytest.raises(DataError, match=r"train split of corpus holds no example.\n.*text is withheld"):
        UdPos(None).read("train", str(folder))


# What is wrong with a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (sentence("a", name="s1") + sentence("b") + sentence("c", name="s1"), r"'s1'.*conllu:2 and .*conllu:7"),
        (sentence("a") + "1\tb\t_\tNOUN\n\n", r"train\.conllu:3: 4 columns, but CoNLL-U has 10"),
        (sentence("a") + "1 b _ NOUN _ _ _ _ _ _\n\n", r"train\.conllu:3: 1 columns"),
        (sentence("a", "b").replace("\n", "\t_\n", 1), r"train\.conllu:1: 11 columns"),
        (sentence("a", "b") + sentence("c", tag="NOUNS"), r"train\.conllu.*line 4, word 1: unknown tag 'NOUNS'"),
        (word(1, "a") + word(2, "b", "_") + "\n", r"train\.conllu.*word 2: unknown tag '_'"),
        (word("1a", "a") + "\n", r"train\.conllu:1: '1a' is not a CoNLL-U id"),
        (word("1-", "a") + "\n", r"train\.conllu:1: '1-' is not a CoNLL-U id"),
        (word(1, "") + "\n", r"train\.conllu:1: word 1 has no form"),
        (word("1.1", "a") + "\n" + sentence("b"), r"train\.conllu:1: a sentence without words"),
        (sentence("a").encode() + sentence("größe").encode("latin-1"), r"train\.conllu:3: not UTF-8"),
        ("", r"train split of corpus holds no example"),
        ("\n\n# only a comment\n\n", r"train split of corpus holds no example"),
    ],
)
def test_malformed_files_are_refused_with_file_and_line(folder: Path, text: str | bytes, message: str) -> None:
    write(folder / "train.conllu", text)
    with pytest.raises(DataError, match=message):
        UdPos(None).read("train", str(folder))


def test_unknown_tag_lists_the_tags(folder: Path) -> None:
    write(folder / "train.conllu", sentence("a", tag="N"))
    with pytest.raises(DataError) as caught:
        UdPos(None).read("train", str(folder))
    assert " ".join(UPOS) in caught.value.remedy


# Where a split lies --------------------------------------------------------------------------------------------------


def test_missing_split_says_what_it_looked_for_and_what_is_there(folder: Path) -> None:
    write(folder / "train.conllu", sentence("a"))
    with pytest.raises(MissingSplitError) as caught:
        UdPos(None).read("dev", str(folder))
    for text in (str(folder), "dev.conllu", "valid.conllu", "validation.conllu", "*-ud-dev.conllu", "train.conllu"):
        assert text in caught.value.message


@pytest.mark.parametrize("name", ["dev", "valid", "validation"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_dev_goes_by_three_names(folder: Path, name: str, as_folder: bool) -> None:
    write(folder / name / "a.conllu" if as_folder else folder / f"{name}.conllu", sentence("x", name="s1"))
    assert split_name(name) == "dev"
    ids = [example.id for example in UdPos(None).read(split_name(name), str(folder))]
    assert ids == (["a.conllu/s1"] if as_folder else ["s1"])


def test_unknown_split_names_the_three() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown split 'trian'\. Did you mean 'train'") as caught:
        split_name("trian")
    assert "dev, test, train" in caught.value.remedy


def test_a_folder_of_files_is_joined_and_ids_carry_the_file(folder: Path) -> None:
    write(folder / "train" / "b.conllu", sentence("x", name="s1") + sentence("y"))
    write(folder / "train" / "a.conllu", sentence("z", name="s1"))
    write(folder / "train" / "README.txt", "not data")
    examples = UdPos(None).read("train", str(folder))
    assert [(e.id, e.texts[0]) for e in examples] == [
        ("a.conllu/s1", ("z",)),
        ("b.conllu/s1", ("x",)),
        ("b.conllu/train-1", ("y",)),
    ]


def test_files_named_as_ud_releases_name_them(folder: Path) -> None:
    write(folder / "de_gsd-ud-dev.conllu", sentence("x", name="s1"))
    write(folder / "de_gsd-ud-train.conllu", sentence("y", name="s2"))
    assert [e.texts[0] for e in UdPos(None).read("dev", str(folder))] == [("x",)]
    assert [e.texts[0] for e in UdPos(None).read("train", str(folder))] == [("y",)]
    write(folder / "de_hdt-ud-dev.conllu", sentence("z", name="s1"))
    assert [e.id for e in UdPos(None).read("dev", str(folder))] == [
        "de_gsd-ud-dev.conllu/s1",
        "de_hdt-ud-dev.conllu/s1",
    ]


HDT = ("de_hdt-ud-train-a-1.conllu", "de_hdt-ud-train-a-2.conllu", "de_hdt-ud-train-b-1.conllu")


@pytest.mark.parametrize("beside", [("de_gsd-ud-train.conllu",), ()], ids=["beside another treebank", "alone"])
def test_a_treebank_whose_train_split_is_cut_into_files(
    folder: Path, beside: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate((*HDT, *beside, "de_hdt-ud-dev.conllu", "de_hdt-ud-test.conllu")):
        write(folder / name, sentence("x", name=f"s{number}") + sentence("y", name=f"t{number}"))
    examples = UdPos("de").read("train", str(folder))
    assert [one.id for one in examples] == [
        f"{name}/{one}" for name in sorted((*beside, *HDT)) for _, one, _, _ in read_conllu(folder / name)
    ]
    assert len(examples) == 2 * len(HDT + beside)
    assert [one.id for one in UdPos("de").read("dev", str(folder))] == [
        f"s{len(HDT + beside)}",
        f"t{len(HDT + beside)}",
    ]
    assert capsys.readouterr().out == "", "nothing is left over"


def test_parts_of_a_treebank_that_is_there_whole_are_not_read_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "cs_pdt-ud-train.conllu", sentence("x", name="s1"))
    write(folder / "cs_pdt-ud-train-l.conllu", sentence("x", name="s1"))
    assert [one.id for one in UdPos(None).read("train", str(folder))] == ["s1"]
    said = capsys.readouterr().out
    assert "read cs_pdt-ud-train.conllu. Did not read cs_pdt-ud-train-l.conllu." in said


@pytest.mark.parametrize(
    ("files", "split", "said"),
    [
        (("train.conllu", "train-2.conllu"), "train", "read train.conllu. Did not read train-2.conllu."),
        (("train.conllu", "train-2.conllu", "test.conllu"), "test", ""),
        (("dev.conllu", "valid.conllu"), "dev", "read dev.conllu. Did not read valid.conllu."),
        (("train.conllu", "train/a.conllu"), "train", "read train.conllu. Did not read train/a.conllu."),
        (("train/a.conllu", "train/more/b.conllu"), "train", "read train/a.conllu. Did not read train/more/b.conllu."),
        (("train.conllu", "x_y-ud-train.conllu"), "train", "Did not read x_y-ud-train.conllu."),
        (("train.conllu", "train_full.conllu.gz"), "train", "Did not read train_full.conllu.gz."),
        (("train.conllu", "TRAIN2.CONLLU"), "train", "read train.conllu. "),  # train2: of the first split
        (("dev.conllu", "test.conllu", "extra.conllu"), "dev", "Did not read extra.conllu."),
        (("dev.conllu", "test.conllu", "extra.conllu"), "test", ""),
        (("train.conllu", "README.txt", "train.conllu.gz", "._train.conllu", "notes/b.conllu"), "train", ""),
    ],
)
def test_data_files_that_no_split_reads_are_named_once(
    folder: Path, files: tuple[str, ...], split: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        write(folder / name, sentence("x", name="s1"))
    UdPos(None).read(split, str(folder))
    out = capsys.readouterr().out
    assert said in out
    assert bool(said) == bool(out)


def test_a_missing_split_names_the_files_that_may_be_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "train.conllu", sentence("x"))
    for name in ("dev_1.conllu", "dev_2.conllu"):
        write(folder / name, sentence("y"))
    with pytest.raises(MissingSplitError, match=r"files may be the dev split: dev_1\.conllu, dev_2\.conllu"):
        UdPos(None).read("dev", str(folder))  # a training goes on without it
    assert "dev split: read nothing. Did not read dev_1.conllu, dev_2.conllu." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dev.conllu.gz", "DEV.CONLLU", "dev/DEV.CONLLU", "dev/more/dev.conllu"])
def test_the_advice_for_files_that_are_not_read_works(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = sentence("x", name="s1")
    write(folder / name, "")
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(MissingSplitError):
        UdPos(None).read("dev", str(folder))
    advice = f"put all its files into {folder}/dev/ itself, unpacked, with names that end in .conllu."
    assert f"Did not read {name}. If they belong to this split, {advice}" in capsys.readouterr().out
    (folder / name).unlink()
    write(folder / "dev" / "a.conllu", text)
    assert [one.id for one in UdPos(None).read("dev", str(folder))] == ["a.conllu/s1"]


def test_examples_that_stand_in_two_files_are_counted_aloud(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "train" / "a.conllu", sentence("x", name="s1") + sentence("y", name="s2") + sentence("z"))
    write(folder / "train" / "b.conllu", sentence("other", name="s1") + sentence("y", name="s2"))
    assert len(UdPos(None).read("train", str(folder))) == 5
    assert "1 example with the same id and text in two files (first: 's2' in a.conllu and" in capsys.readouterr().out


def test_a_duplicate_in_one_file_of_several_is_still_an_error(folder: Path) -> None:
    write(folder / "train" / "a.conllu", sentence("z", name="s1") + sentence("y", name="s1"))
    with pytest.raises(DataError, match=r"a\.conllu:2 and .*a\.conllu:5"):
        UdPos(None).read("train", str(folder))


def test_a_file_given_as_data_is_its_split(folder: Path) -> None:
    path = write(folder / "my.conllu", sentence("a", name="s1") + sentence("b"))
    assert UdPos(None).read("train", str(path)) == UdPos(None).read("train", str(path.rename(folder / "train.conllu")))


@pytest.mark.parametrize("data", ["./nothing", "/nowhere/at/all", "a/b/c", "~/no-such-kr2cache-data"])
def test_a_data_folder_that_is_not_there(workdir: Path, data: str) -> None:
    with pytest.raises(DataError, match="There is no data folder or file"):
        UdPos("de").read("train", data)


def test_udpos_of_no_language_needs_data() -> None:
    with pytest.raises(ConfigError, match="needs --data"):
        UdPos(None).read("train", None)


# Tasks by name -------------------------------------------------------------------------------------------------------


def test_every_listed_task_is_found_and_knows_its_data() -> None:
    families = {"udpos", "snli", "swag", "piqa", "hellaswag", "text", "words"}
    assert {f"udpos-{language}" for language in LANGUAGES} | families == set(task_names()) - set(READY)
    for name in task_names():
        assert find_task(name).name == name
    assert find_task("udpos-de").default_data == "google/xtreme"
    assert find_task("udpos").default_data is None


def test_an_unknown_task_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'udpos-de'") as caught:
        find_task("udpos_de")
    assert "udpos-LANG" in caught.value.remedy
    assert "udpos-de" not in caught.value.remedy


# Score ---------------------------------------------------------------------------------------------------------------

TAG = st.integers(0, len(UPOS) - 1)


def numbers(tags: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
    return [[None if tag is None else UPOS.index(tag) for tag in row] for row in tags]


def drawn(draw: random.Random, pool: Sequence[str]) -> tuple[list[list[str]], list[list[str | None]]]:
    """Gold and predicted tags of some sentences, a few of them empty, three words in five right."""
    gold = [[draw.choice(pool) for _ in range(draw.randint(0, 8))] for _ in range(draw.randint(1, 6))]
    return gold, [[tag if draw.random() < 0.6 else draw.choice((*pool, None)) for tag in row] for row in gold]


@pytest.mark.parametrize(
    "pool",
    [
        UPOS,
        ("CCONJ", "SCONJ", "NOUN"),
        ("PROPN", "PRON", "PART", "PUNCT"),
        ("SYM", "SCONJ", "INTJ", "X"),  # S and I are marks of IOBES, and of X nothing is left behind its first letter
        ("ADJ", "ADP", "ADV", "AUX", "X"),
    ],
    ids=" ".join,
)
def test_scores_are_xtremes_f1_and_word_accuracy(pool: Sequence[str]) -> None:
    draw = random.Random(7)
    for _ in range(100):
        gold, predicted = drawn(draw, pool)
        score = UdPos("de").score([tuple(map(UPOS.index, row)) for row in gold], numbers(predicted))
        assert score["f1"] == pytest.approx(xtreme.f1(gold, predicted), abs=1e-12)
        flat = [[tag or "cut off" for row in side for tag in row] for side in (gold, predicted)]
        assert score["accuracy"] == pytest.approx(accuracy_score(*flat) if flat[0] else 0.0, abs=1e-12)
        assert score["cut_off_words"] == flat[1].count("cut off")
        assert set(score) == {"accuracy", "f1", "cut_off_words"}


@pytest.mark.parametrize(
    ("gold", "predicted", "f1"),
    [
        ("CCONJ SCONJ NOUN", "SCONJ CCONJ NOUN", 1 / 3),
        ("CCONJ SCONJ", "CCONJ CCONJ", 0.0),
        ("NOUN X . X", "NOUN NOUN . X", 0.4),
        ("SCONJ SCONJ", "SCONJ SYM", 0.5),
        ("SYM SYM INTJ INTJ", "SYM X INTJ INTJ", 2 / 3),
        ("PROPN PRON PART PUNCT", "PRON PRON PART PROPN", 2 / 7),
        ("NOUN NOUN VERB", "NOUN - VERB", 0.5),
        ("NOUN NOUN VERB", "NOUN VERB VERB", 0.0),
        ("X", "-", 0.0),
        ("", "", 0.0),
    ],
)
def test_f1_is_the_number_that_seqeval_0_0_12_gave(gold: str, predicted: str, f1: float) -> None:
    """Sentences are split by ``.``; ``-`` is a word that was cut off."""
    sides = [
        [[None if tag == "-" else tag for tag in part.split()] for part in side.split(".")]
        for side in (gold, predicted)
    ]
    assert UdPos("de").score(*map(numbers, sides))["f1"] == pytest.approx(f1)


@given(st.lists(st.lists(TAG, min_size=1, max_size=8), min_size=1, max_size=6), st.data())
def test_cutting_words_off_a_perfect_prediction_loses_exactly_their_share(
    gold: list[list[int]], data: st.DataObject
) -> None:
    cut = [[None if data.draw(st.booleans()) else a for a in row] for row in gold]
    lost = sum(tag is None for row in cut for tag in row)
    score = UdPos(None).score(gold, cut)
    assert score["accuracy"] == pytest.approx(1 - lost / sum(map(len, gold)))
    assert (score["f1"] < 1) == (lost > 0)


# Hub -----------------------------------------------------------------------------------------------------------------

ORDER_ON_HUB = tuple(reversed(UPOS))
"""Not ours, so that taking numbers for labels would show."""
ROWS = [
    (["Das", "Haus", "."], ["DET", "NOUN", "PUNCT"]),
    (["_", "_"], ["DET", "NOUN"]),  # text that is withheld
    (["ja"], ["INTJ"]),
    (["10 000", "Euro"], ["NUM", "NOUN"]),
]


def hub_rows(named: bool = True) -> datasets.Dataset:
    """Rows with XTREME's columns; tags as class labels, as on the hub, or as plain text."""
    tag = datasets.ClassLabel(names=list(ORDER_ON_HUB)) if named else datasets.Value("string")
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "pos_tags": datasets.List(tag)})
    rows = {
        "tokens": [words for words, _ in ROWS],
        "pos_tags": [[ORDER_ON_HUB.index(name) if named else name for name in tags] for _, tags in ROWS],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """google/xtreme, udpos.German, as the datasets library leaves it in its cache: train and validation."""
    repository = tmp_path / "repository" / "google" / "xtreme"
    for split in ("train", "validation"):
        path = repository / "udpos.German" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        hub_rows().to_parquet(path)
    cache = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    builder = datasets.load_dataset_builder(
        "parquet",
        data_files={
            split: str(repository / "udpos.German" / f"{split}-*.parquet") for split in ("train", "validation")
        },
    )
    revision = "ec5f1f46e9af79639a90684a7a70a956c4998f84"
    builder.download_and_prepare(str(cache / "google___xtreme" / "udpos.German" / "0.0.0" / revision))
    made = cache / "google___xtreme" / "udpos.German" / "0.0.0" / revision
    for path in made.glob("parquet-*.arrow"):
        path.rename(path.with_name(path.name.replace("parquet-", "xtreme-")))
    info = made / "dataset_info.json"
    text = info.read_text("utf-8")
    info.write_text(
        text.replace(f'"config_name": "{builder.config.name}"', '"config_name": "udpos.German"').replace(
            '"dataset_name": "parquet"', '"dataset_name": "xtreme"'
        ),
        "utf-8",
    )
    return cache


def expected_hub_examples(split: str) -> list[tuple[str, tuple[tuple[str, ...], ...], tuple[int, ...]]]:
    return [
        (f"{split}-{i}", (tuple(words),), tuple(UPOS.index(tag) for tag in tags))
        for i, (words, tags) in enumerate(ROWS)
        if words != ["_", "_"]
    ]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_xtreme_is_read_from_the_offline_cache_with_labels_by_name(hub_cache: Path, workdir: Path, split: str) -> None:
    examples = UdPos("de").read(split, None)
    assert [(e.id, e.texts, e.label) for e in examples] == expected_hub_examples(split)
    assert UdPos("de").corpus(None) == "google/xtreme"


def test_a_split_that_the_hub_data_lacks_is_missing(hub_cache: Path, workdir: Path) -> None:
    with pytest.raises(MissingSplitError, match="google/xtreme has no test split"):
        UdPos("de").read("test", None)


def test_another_language_than_the_one_cached_is_not_taken_for_it(hub_cache: Path, workdir: Path) -> None:
    with pytest.raises(DataError, match=r"google/xtreme, configuration udpos\.Spanish, split train"):
        UdPos("es").read("train", None)


def test_tags_as_text_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    made = tmp_path / "datasets-cache" / "me___pos" / "default" / "0.0.0" / ("0" * 40)
    parquet = tmp_path / "train.parquet"
    hub_rows(named=False).to_parquet(parquet)
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(parquet)})
    builder.download_and_prepare(str(made))
    for path in made.glob("parquet-*.arrow"):
        path.rename(path.with_name(path.name.replace("parquet-", "pos-")))
    monkeypatch.chdir(tmp_path)
    (made / "dataset_info.json").write_text(
        (made / "dataset_info.json")
        .read_text("utf-8")
        .replace(f'"config_name": "{builder.config.name}"', '"config_name": "default"')
        .replace('"dataset_name": "parquet"', '"dataset_name": "pos"'),
        "utf-8",
    )
    examples = UdPos(None).read("train", "me/pos")
    assert [(e.id, e.texts, e.label) for e in examples] == expected_hub_examples("train")


def test_hub_data_that_is_not_here_says_so_without_a_look_at_the_network(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, looked_up: list[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", workdir / "empty")
    with pytest.raises(DataError) as caught:
        UdPos("de").read("train", None)
    assert looked_up == []
    assert "google/xtreme" in caught.value.message
    assert "udpos.German" in caught.value.message
    assert "HF_HOME" in caught.value.remedy
    assert "--data" in caught.value.remedy


# The project's own corpus --------------------------------------------------------------------------------------------


def test_own_corpus_is_large_enough_bilingual_and_unique() -> None:
    task = UdPos(None)
    splits = {split: task.read(split, str(EVERYDAY)) for split in ("train", "dev", "test")}
    examples = [example for part in splits.values() for example in part]
    assert len(examples) >= 240
    for part in splits.values():
        assert {example.id.split("/")[0] for example in part} == {"de.conllu", "en.conllu"}
    ids = [example.id for example in examples]
    assert len(set(ids)) == len(ids)
    texts = [example.texts for example in examples]
    assert len(set(texts)) == len(texts), "no sentence is in two splits"


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_own_corpus_shows_all_tags_in_every_split(split: str) -> None:
    seen = {tag for example in UdPos(None).read(split, str(EVERYDAY)) for tag in example.label or ()}
    assert {UPOS[tag] for tag in seen} == set(UPOS)


@pytest.mark.parametrize("path", EVERYDAY_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_own_corpus_forms_give_its_text(path: Path) -> None:
    for tokens in conllu.parse(path.read_text("utf-8")):
        text, covered = "", 0
        for token in tokens:
            if isinstance(token["id"], tuple):
                if token["id"][1] == ".":
                    continue  # an empty node is not written
                covered = token["id"][2]  # a range is written as one word: im for in dem
            elif token["id"] <= covered:
                continue
            glued = (token["misc"] or {}).get("SpaceAfter") == "No"
            text += token["form"] + ("" if glued else " ")
        assert text.strip() == tokens.metadata["text"], tokens.metadata["sent_id"]


def test_tiny_corpora_are_what_other_tests_take_them_for(tmp_path: Path) -> None:
    examples = UdPos(None).read("train", str(tiny.save_corpus(tmp_path / "corpus")))
    expected = tiny.sentences(12, seed=0)
    assert [example.texts[0] for example in examples] == [tuple(form for form, _ in words) for words in expected]
    assert [example.label for example in examples] == [tuple(UPOS.index(tag) for _, tag in words) for words in expected]


@pytest.mark.parametrize("ids", [True, False])
def test_sentences_that_no_blank_line_parts_are_an_error(tmp_path: Path, ids: bool) -> None:
    text = tiny.conllu(tiny.sentences(3), prefix="s" if ids else None).replace("\n\n", "\n")
    path = tmp_path / "train.conllu"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=rf"{path.name}:\d+: .*(middle of a sentence|word 1, but)"):
        list(read_conllu(path))
