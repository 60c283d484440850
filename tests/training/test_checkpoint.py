"""The head of an earlier training: not used unless it is asked for, and then put in the order of the task's labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer
from world import World, predictions

from kr2cache.errors import ConfigError
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import Shared
from kr2cache.experiment.suitability import PLAIN, suitability
from kr2cache.models.digests import config_digest, known_digests
from kr2cache.models.load import load_config
from kr2cache.models.registry import find_model
from kr2cache.models.stack import load_encoder
from kr2cache.tasks.base import Head
from kr2cache.tasks.udpos import UPOS, UdPos
from kr2cache.training.checkpoint import TaskCheckpoint
from kr2cache.training.kreader import HEADS

LABELS = tuple(f"L{number}" for number in range(16))
"""As many as the models are wide: a matrix of width x width must not pass for one of labels."""
SHUFFLED = tuple(LABELS[(7 * number + 3) % 16].lower() for number in range(16))


def trained(folder: Path, head: Head, model_type: str = "bert", names: tuple[str, ...] = SHUFFLED, **more: Any) -> Any:
    """A fine-tuned model, saved as transformers saves it."""
    torch.manual_seed(3)
    config = tiny.config(model_type, initializer_range=0.4, **more)
    if head != "choice":
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    model = HEADS[head].from_config(config).eval()
    model.save_pretrained(folder)
    return model


def kept(folder: Path, head: Head, labels: tuple[str, ...] = LABELS) -> TaskCheckpoint:
    return TaskCheckpoint(find_model(str(folder), {}), head, labels, keep_head=True)


def logits(model: Any, head: Head) -> Tensor:
    tokens = torch.randint(5, 40, (2, 3, 6) if head == "choice" else (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found: Tensor = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found


@pytest.mark.parametrize("head", ["token", "sequence"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_a_kept_head_gives_each_label_the_logit_it_had(tmp_path: Path, model_type: str, head: Head) -> None:
    model = trained(tmp_path, head, model_type)
    checkpoint = kept(tmp_path, head)
    theirs = logits(model, head)
    expected = torch.stack([theirs[..., SHUFFLED.index(label.lower())] for label in LABELS], dim=-1)
    torch.manual_seed(9)
    found = checkpoint.task_model()
    torch.testing.assert_close(logits(found, head), expected, rtol=1e-5, atol=1e-5)
    assert (expected - theirs).abs().max() > 0.1, "in their own order they are other logits"
    assert found.config.id2label == dict(enumerate(LABELS))
    assert checkpoint.head_note is not None
    assert checkpoint.head_note.endswith("It is kept, as --keep-head asks.")


def test_a_kept_head_of_choices(tmp_path: Path) -> None:
    model = trained(tmp_path, "choice")
    torch.testing.assert_close(logits(kept(tmp_path, "choice").task_model(), "choice"), logits(model, "choice"))


@pytest.mark.parametrize(
    ("head", "names", "message"),
    [
        ("sequence", (*SHUFFLED[:-1], "other"), r"its labels are l3, .*\(16\), those of the task L0, L1, L2, L3"),
        ("sequence", SHUFFLED[:-1], r"its labels are l3, .*\(15\), those"),
        ("sequence", ("LABEL_0", "LABEL_1"), "its labels are LABEL_0, LABEL_1, those of the task"),
        ("token", SHUFFLED, "it is of a BertForTokenClassification, the task needs a BertForSequenceClassification"),
    ],
)
def test_a_head_of_another_training_is_not_kept(
    tmp_path: Path, head: Head, names: tuple[str, ...], message: str
) -> None:
    trained(tmp_path, head, names=names)
    with pytest.raises(ConfigError, match=message) as caught:
        kept(tmp_path, "sequence").task_model()
    assert "Leave out --keep-head" in caught.value.remedy


@pytest.mark.parametrize("head", ["sequence", "choice"])
def test_a_checkpoint_without_a_head_has_none_to_keep(tmp_path: Path, head: Head) -> None:
    trained(tmp_path, head).base_model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text("utf-8"))
    content["architectures"] = [type(HEADS[head].from_config(tiny.config("bert"))).__name__]
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ConfigError, match=r"cannot keep the head of .*: it lacks classifier\.bias, classifier\.weight"):
        kept(tmp_path, head).task_model()


# Whole trainings -----------------------------------------------------------------------------------------------------


def tagger(folder: Path, names: tuple[str, ...] = UPOS[::-1]) -> Any:
    """Give the model in ``folder`` the head of an earlier training."""
    torch.manual_seed(0)
    known = dict(enumerate(names))
    model = AutoModelForTokenClassification.from_pretrained(folder, id2label=known)
    model.config.label2id = {name: number for number, name in known.items()}
    with torch.no_grad():
        model.classifier.weight.normal_(std=2.0)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("method", ["kreader", "kresource", "kd", "kr2"])
def test_a_new_training_has_a_new_head(
    world: World, make: Callable[[Path], World], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tagger trains as its checkpoint without a head does, and one note says so."""
    model = "res" if method in ("kresource", "kd") else "reader"
    other = make(tmp_path / "other")
    tagger(other.folder / "models" / model)

    def train(where: World) -> tuple[Any, str]:
        capsys.readouterr()
        teacher = {"teacher": str(where.resource)} if method == "kd" else {}
        result = where.train(method=method, epochs=1.0, **teacher)
        return result, " ".join([*capsys.readouterr().out.split(), *result.notes])

    (expected, before), (found, said) = train(world), train(other)
    assert predictions(found.runs[0].folder, "test") == predictions(expected.runs[0].folder, "test")
    assert found.runs[0].metrics == expected.runs[0].metrics
    text = f"{model} has the head of an earlier training (classifier, labels X, VERB"
    assert (before.count(text), said.count(text)) == (0, 1)
    assert "a new training draws a new head" in said


def test_a_kept_head_is_another_run(world: World) -> None:
    """With a learning rate of almost nothing, the run tags as the checkpoint does."""
    folder = world.folder / "models" / "reader"
    model, tokenizer = tagger(folder), AutoTokenizer.from_pretrained(folder)
    settings: dict[str, Any] = {"method": "kreader", "learning_rate": 1e-12, "epochs": 1.0}
    new, result = world.train(**settings), world.train(**settings, keep_head=True)
    assert result.runs[0].folder.parent != new.runs[0].folder.parent
    for row, example in zip(
        predictions(result.runs[0].folder, "test"), UdPos(None).read("test", str(world.data)), strict=True
    ):
        encoded = tokenizer(list(example.texts[0]), is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            best = model(**encoded).logits[0].argmax(dim=-1).tolist()
        words = encoded.word_ids(0)
        assert row["predicted"] == [model.config.id2label[best[words.index(i)]] for i in range(len(row["gold"]))]
    decided = [json.loads((one.runs[0].folder / "config.json").read_text())["config"] for one in (new, result)]
    assert [one.get("keep_head") for one in decided] == [None, True], "runs made before the option keep their names"
    (said,) = [text for text in result.notes if "earlier training" in text]
    assert said.endswith("It is kept, as --keep-head asks.")


def test_a_head_that_cannot_be_kept_is_refused_before_anything_is_made(world: World) -> None:
    folder = world.folder / "models" / "reader"
    with pytest.raises(ConfigError, match="its labels are LABEL_0, LABEL_1, those of the task ADJ, ADP"):
        world.train(keep_head=True)
    tagger(folder)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ConfigError, match="cannot keep the head of 'reader'"):
        world.train(keep_head=True)
    assert not world.caches.exists()
    assert not (world.folder / "runs").exists()


def test_the_head_of_the_teacher_is_not_the_students(world: World) -> None:
    """The option is about the model that is trained in the end."""
    tagger(world.folder / "models" / "reader")
    result = world.train(method="kd", teacher=str(world.resource), keep_head=True, epochs=1.0)
    assert len(result.runs) == 1
    teacher = next((world.folder / "runs" / "udpos").glob("kresource-*"))
    assert "keep_head" not in json.loads((teacher / "seed-1" / "config.json").read_text())["config"]


def test_both_ways_in_one_process(world: World) -> None:
    """What is loaded for one is not taken for the other."""
    tagger(world.folder / "models" / "reader")
    shared = Shared()
    drawn = []
    for keep_head in (False, True, False):
        job = prepare(world.config(method="kreader", keep_head=keep_head), shared).job
        torch.manual_seed(1)
        drawn.append(job.new_reader().model.classifier.weight)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


# Padding --------------------------------------------------------------------------------------------------------------


def test_a_decoder_without_a_padding_token_in_its_configuration_takes_that_of_its_tokenizer(tmp_path: Path) -> None:
    """As Qwen3. It scores the last token that is no padding, so it has to know it."""
    folder = tiny.save_model(
        tmp_path / "m", "qwen3", num_key_value_heads=1, head_dim=8, pad_token_id=None, initializer_range=0.4
    )
    spec = find_model(str(folder), {})
    assert load_config(spec).pad_token_id is None
    model = TaskCheckpoint(spec, "sequence", ("a", "b", "c")).task_model().eval()
    texts = ["das haus", "das haus und ich und das haus"]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    lengths = tokens["attention_mask"].sum(dim=1).tolist()
    with torch.inference_mode():
        together = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
        for row, length in enumerate(lengths):
            states = model.base_model(input_ids=tokens["input_ids"][row : row + 1, :length]).last_hidden_state
            torch.testing.assert_close(together[row], model.score(states[0, -1]))
    assert lengths[0] < lengths[1]
    recorded = known_digests(spec)
    assert recorded is not None
    assert recorded.config == config_digest(load_encoder(spec).config), "of the file, however it was loaded"


def test_a_decoder_without_any_padding_token_is_refused_with_what_to_do(world: World) -> None:
    model = tiny.save_model(world.folder / "gpt", "gpt2", pad_token_id=None)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    plain = next(
        one for one in suitability(find_model(str(model), {})).answers if (one.role, one.head) == (PLAIN, "sequence")
    )
    assert plain.able is False
    assert "Give its tokenizer a padding token (pad_token in tokenizer_config.json)" in str(plain.remedy)
