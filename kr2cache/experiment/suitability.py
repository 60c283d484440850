"""What a model can serve as, and why not. The checks are those that ``extract`` and ``train`` run before they start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kr2cache.cache.dtypes import DTYPES
from kr2cache.cache.format import SequenceIndex
from kr2cache.config import DEFAULT_MAX_LENGTH, DEFAULT_WEIGHTS_DTYPE, ExtractConfig
from kr2cache.errors import (
    DataError,
    DeviceMemoryError,
    KR2CacheError,
    ModelUnavailableError,
    UnsupportedModelError,
)
from kr2cache.experiment.shared import Shared
from kr2cache.extraction import trial
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.configuration import encoder_shape, max_positions, vocabulary
from kr2cache.models.encode import MissingWords, check_token_ids, encode_examples, missing_words
from kr2cache.models.files import check_complete, fault_of, model_folder
from kr2cache.models.load import load_config
from kr2cache.models.registry import ModelSpec, control
from kr2cache.models.stack import WEIGHT_BYTES, Stack, check_room, find_stack, load_encoder
from kr2cache.models.tokenizers import load_tokenizer, pad_id
from kr2cache.system.console import bytes_text, waiting
from kr2cache.system.device import drop_unused_memory
from kr2cache.system.memory import free_memory
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.base import Head
from kr2cache.training.batches import Batcher, SplitData
from kr2cache.training.checkpoint import TaskCheckpoint

RESOURCE, READER, PLAIN = "resource", "reader with a resource", "reader alone"
ROLES = (RESOURCE, READER, PLAIN)
Found = TypeVar("Found")
TASKS: dict[Head, str] = {"token": "udpos", "sequence": "snli", "choice": "swag"}
"""A task of each head. Its data is not read."""
SHORT, LONG = "A dog ran home .", "It is half past ten , and the old house by the river is still dark . " * 30
"""Two texts: a short one, and one that is longer than ``DEFAULT_MAX_LENGTH`` tokens."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Whether a model can serve in one role for tasks with one head."""

    role: str
    """One of ``ROLES``."""
    head: Head
    able: bool | None
    """None if it could not be tried here: its weights are not complete, or memory is too small."""
    why: str | None = None
    """Why not."""
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Suitability:
    """A model: its sizes, and what it can serve as."""

    spec: ModelSpec
    folder: Path
    """Where its files lie."""
    architecture: str
    layers: int | None
    """With the embedding output; None if its configuration does not give it."""
    width: int | None
    positions: int | None
    """Tokens of the longest text, special tokens included; None without a limit, or if its configuration does not give
    it (``positions_fault``)."""
    positions_fault: str | None
    """Why its configuration does not give the positions; None if it does."""
    parameters: int | None
    """How many numbers the weights of its layers are; None if no model can be built from its configuration."""
    tokenizer: dict[str, Any]
    """Class, whether it is fast, number of tokens, and whether it aligns words (if not, why)."""
    answers: tuple[Answer, ...]
    tried_length: int
    """Tokens of the longest text of the checks."""

    @property
    def token_bytes(self) -> dict[str, int]:
        """Bytes of one token in all layers, by dtype; empty without layers and width."""
        if self.layers is None or self.width is None:
            return {}
        return {name: self.layers * dtype.row_bytes(self.width) for name, dtype in DTYPES.items()}

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights in memory, by dtype; empty if they are not known."""
        return {} if self.parameters is None else {name: self.parameters * size for name, size in WEIGHT_BYTES.items()}

    def json(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "hub_id": self.spec.hub_id,
            "folder": str(self.folder),
            "architecture": self.architecture,
            "layers": self.layers,
            "width": self.width,
            "positions": self.positions,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "bytes_per_token": self.token_bytes,
            "tokenizer": self.tokenizer,
            "tried_length": self.tried_length,
            "serves": [asdict(answer) for answer in self.answers],
            **control(self.spec),
        }


def suitability(spec: ModelSpec, weights_dtype: str = DEFAULT_WEIGHTS_DTYPE) -> Suitability:
    """Try a model in every role, on two short texts and on this computer's processor. A role for which memory is too
    small is not tried.

    Args:
        weights_dtype: The dtype of the weights of a resource, as for ``extract``. A reader is trained in float32.

    Raises:
        KR2CacheError: If the model is not on this machine, or its configuration cannot be loaded.
    """
    folder = model_folder(spec)
    whole = load_config(spec)
    stack = _or_none(lambda: find_stack(spec, whole))  # if no part reads text, the trial says so
    config = whole if stack is None else stack.config
    shape = _or_none(lambda: encoder_shape(config))
    positions, fault = None, None
    try:
        positions = max_positions(config)
    except UnsupportedModelError as error:
        fault = error.message
    length = min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    tokenizers = {words: _tokenizer(spec, config, words=words) for words in (False, True)}
    trials = _Trials(
        spec, config, stack, length, tokenizers, weights_dtype, free_memory(), fault_of(spec, folder) is None
    )
    return Suitability(
        spec=spec,
        folder=folder,
        architecture=whole.model_type,
        layers=shape and shape[0],
        width=shape and shape[1],
        positions=positions,
        positions_fault=fault,
        parameters=stack and stack.numbers,
        tokenizer=_about(tokenizers),
        answers=tuple(trials.answers()),
        tried_length=length,
    )


Loaded = PreTrainedTokenizerBase | KR2CacheError
"""A tokenizer, or why it cannot be used."""


def _tokenizer(spec: ModelSpec, config: PretrainedConfig, *, words: bool) -> Loaded:
    """The tokenizer, if it gives each word of a text its tokens and no ids that the model does not know."""
    task = find_task(TASKS["token" if words else "sequence"])
    try:
        tokenizer = load_tokenizer(spec, words=words)
        examples = list(_examples(task))[:1]
        index = encode_examples(tokenizer, examples, task, DEFAULT_MAX_LENGTH)
        check_token_ids(index, vocabulary(config), repr(spec.name))
        if words and (lost := missing_words(index, [one.texts[0] for one in examples], DEFAULT_MAX_LENGTH).total):
            raise DataError(
                f"The tokenizer of {spec.name!r} gives {lost} of the {len(SHORT.split())} words of {SHORT!r} no token.",
                "Choose another model for tasks on words.",
            )
    except KR2CacheError as error:
        return error
    return tokenizer


def _about(tokenizers: dict[bool, Loaded]) -> dict[str, Any]:
    words = tokenizers[True]
    known = next((one for one in tokenizers.values() if isinstance(one, PreTrainedTokenizerBase)), None)
    about: dict[str, Any] = {"class": None, "fast": None, "tokens": None, "padding": None}
    if known is not None:
        about = {
            "class": type(known).__name__,
            "fast": known.is_fast,
            "tokens": len(known),
            "padding": known.pad_token,
        }
    refused = isinstance(words, KR2CacheError)
    return {**about, "aligns_words": not refused, "why": words.message if refused else None}


def _examples(task: Task) -> Iterator[Example]:
    """A short and a long example, without labels."""
    for number, text in enumerate((SHORT, LONG)):
        if task.words:
            texts: tuple[tuple[str, ...], ...] = (tuple(text.split()),)
        else:
            texts = ((text, SHORT),) * (len(task.labels) if task.head == "choice" else 1)
        yield Example(id=f"text {number + 1}", texts=texts, label=None)


@dataclass(frozen=True)
class _Trials:
    """Runs the checks of each role."""

    spec: ModelSpec
    config: PretrainedConfig
    stack: Stack | None
    """None if no model can be built, or none that reads text."""
    length: int
    """Longer texts are cut."""
    tokenizers: dict[bool, Loaded]
    """By whether texts are lists of words."""
    weights_dtype: str
    free: int
    """Bytes of free memory before the trials."""
    complete: bool
    """Whether its files are all there. If not, only what its configuration and tokenizer tell is known."""

    def answers(self) -> Iterator[Answer]:
        """An answer for each role and head. The weights are read once, or once in each of two dtypes."""
        with waiting(f"Trying {self.spec.name} as resource"):
            refused, encoder = self._try_resource()
        for head in TASKS:
            yield self._answer(RESOURCE, head, refused or _refusal(partial(self._index, head)))
        if self.weights_dtype != DEFAULT_WEIGHTS_DTYPE:
            encoder = None
        found: dict[str, list[Answer]] = {READER: [], PLAIN: []}
        for head in TASKS:
            drop_unused_memory()
            with waiting(f"Trying {self.spec.name} as reader ({head})"):
                encoder = encoder or self._encoder_of_readers()
                plain, beside = self._try_reader(head, encoder)
            found[READER].append(self._answer(READER, head, plain or beside))
            found[PLAIN].append(self._answer(PLAIN, head, plain))
        yield from found[READER]
        yield from found[PLAIN]

    def _index(self, head: Head) -> tuple[Task, PreTrainedTokenizerBase, list[Example], SequenceIndex]:
        task = find_task(TASKS[head])
        tokenizer = self.tokenizers[task.words]
        if isinstance(tokenizer, KR2CacheError):
            raise tokenizer
        examples = list(_examples(task))
        return task, tokenizer, examples, encode_examples(tokenizer, examples, task, self.length)

    def _try_resource(self) -> tuple[KR2CacheError | None, PreTrainedModel | None]:
        """What is wrong with it as resource, and the loaded model; None if it was not loaded."""
        encoder = None
        try:
            plan = self._plan()
            check_complete(self.spec)
            self._check_room(RESOURCE)
            encoder = load_encoder(self.spec, self.weights_dtype)
            trial.check_states(plan, encoder)
        except KR2CacheError as error:
            return error, encoder
        return None, encoder

    def _plan(self) -> ExtractPlan:
        layers, width = encoder_shape(self.config)
        words = isinstance(self.tokenizers[False], KR2CacheError)
        task, tokenizer, _, index = self._index("token" if words else "sequence")
        return ExtractPlan(
            config=ExtractConfig(
                resource=self.spec.name,
                split="test",
                task=task.name,
                dtype="float32",  # some --dtype holds every finite state
                weights_dtype=self.weights_dtype,  # type: ignore[arg-type]  # the command checks it
                device="cpu",
            ),
            spec=self.spec,
            index=index,
            layers=tuple(range(layers)),
            model_layers=layers,
            width=width,
            pad_id=pad_id(tokenizer),
            template=task.template,
            corpus="",
            missing_words=MissingWords(0, 0),
        )

    def _check_room(self, role: str) -> None:
        """Raise ``DeviceMemoryError`` if memory is too small for the weights of a resource, or for those of a reader
        and the ones that it starts from. Mapped files of weights would count as free memory later on, so it was
        measured before anything was loaded.
        """
        if self.stack is None:
            return
        if role == RESOURCE:
            check_room(self.spec, self.stack, self.weights_dtype, self.free)
            return
        needed = 2 * self.stack.numbers * WEIGHT_BYTES[DEFAULT_WEIGHTS_DTYPE]
        if needed > self.free:
            raise DeviceMemoryError(
                f"{self.spec.name!r} needs {bytes_text(needed)} for its weights in {DEFAULT_WEIGHTS_DTYPE}, twice: a "
                f"training keeps those that it starts from. {bytes_text(self.free)} of memory are free.",
                "Ask on a machine with more memory.",
            )

    def _encoder_of_readers(self) -> PreTrainedModel | None:
        """The model in float32, which the readers of all heads start from; None if it cannot be loaded."""
        if self.stack is None or self.stack.path or not self.complete:
            return None
        try:
            self._check_room(READER)
            return load_encoder(self.spec)
        except KR2CacheError:  # each reader finds the reason by itself
            return None

    def _try_reader(
        self, head: Head, encoder: PreTrainedModel | None
    ) -> tuple[KR2CacheError | None, KR2CacheError | None]:
        """What is wrong with the reader alone, and with the reader with a resource. The second is not tried after a
        failure of the first."""
        shared = Shared()
        try:
            task, tokenizer, examples, index = self._index(head)
            inputs = Batcher(SplitData(examples=examples, index=index), task, tokenizer).inputs(range(len(examples)))
            if self.complete and not (self.stack and self.stack.path):  # else its checkpoint says what is wrong
                self._check_room(READER)
            checkpoint = TaskCheckpoint(self.spec, head, task.labels, encoder=encoder)
            shared.check_reader(checkpoint, inputs, positions=None)
        except KR2CacheError as error:
            return error, None
        return None, _refusal(lambda: shared.check_reader(checkpoint, None, positions=2 * self.length))

    def _answer(self, role: str, head: Head, refused: KR2CacheError | None) -> Answer:
        if refused is None:
            return Answer(role=role, head=head, able=True)
        untried = isinstance(refused, DeviceMemoryError) or (
            not self.complete and isinstance(refused, ModelUnavailableError)
        )
        return Answer(
            role=role,
            head=head,
            able=None if untried else False,
            why=refused.message,
            remedy=refused.remedy or None,
        )


def _refusal(check: Callable[[], object]) -> KR2CacheError | None:
    try:
        check()
    except KR2CacheError as error:
        return error
    return None


def reasons(answers: Iterable[Answer]) -> dict[tuple[str, str | None], list[Answer]]:
    """The answers that are not yes, by reason and remedy."""
    result: dict[tuple[str, str | None], list[Answer]] = {}
    for answer in answers:
        if answer.why is not None:
            result.setdefault((answer.why, answer.remedy), []).append(answer)
    return result


def _or_none(ask: Callable[[], Found]) -> Found | None:
    """What the configuration gives, or None if it does not: the trials then say what is wrong with it."""
    try:
        return ask()
    except UnsupportedModelError:
        return None
