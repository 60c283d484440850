"""A trained reader at work: from a run folder to labels for new text.

>>> predictor = Predictor.load("runs/udpos-de/kr2-xlm-r-gottbert-last4-6b1d0f42/seed-1")      # doctest: +SKIP
>>> predictor(texts.read_lines(predictor.task, ["Das ist ein Haus ."]))[0].predicted          # doctest: +SKIP
['PRON', 'AUX', 'DET', 'NOUN', 'PUNCT']

There is no cache here: the resource computes its states for each batch, by stage one's forward pass, and only the
fusion's layers are kept. A cache rounds the states to its dtype, so logits agree with those of a cache within that
rounding.

Shape letters: B sequences, T positions of the resource (padded), L layers that reach the reader, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.errors import (
    CacheError,
    CacheMismatchError,
    DataError,
    KR2CacheError,
    ModelUnavailableError,
    UnknownNameError,
)
from kr2cache.models.digests import config_digest, weights_digest
from kr2cache.models.encode import MissingWords, check_token_ids, encode, encode_examples, missing_words
from kr2cache.models.files import local_folder
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.load import encoder_shape, load_encoder, vocabulary
from kr2cache.models.registry import ModelSpec, find_model, trained_spec
from kr2cache.models.repeatable import check_repeatable
from kr2cache.models.states import hidden_states, padding_is_harmless
from kr2cache.models.tokenizers import load_tokenizer, pad_id
from kr2cache.system.device import choose_device
from kr2cache.system.process import process_unchanged
from kr2cache.tasks import Example, Task, find_task
from kr2cache.training import runs
from kr2cache.training.batches import SplitData
from kr2cache.training.evaluate import example_logits, most_likely
from kr2cache.training.kreader import KReader


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a reader says of one example."""

    id: str
    predicted: list[str | None] | str
    """The label; for tagging one a word, None for a word without a token."""
    scores: dict[str, float] | None
    """The probability of every label; None for tagging."""

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# The reader and its resource -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OnlineResource:
    """The frozen model of a run."""

    name: str
    encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    compute_dtype: str
    padded: bool
    """Whether sequences of different lengths may run together."""


class Predictor:
    """A trained reader, with its resource where it has one; call it with examples."""

    def __init__(
        self,
        *,
        task: Task,
        reader: KReader,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        resource: OnlineResource | None = None,
    ) -> None:
        """
        Args:
            max_length: Of the reader's sequences.
            resource: Wherever the reader has a fusion.
        """
        self.task = task
        self.reader = reader
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.resource = resource

    @classmethod
    @process_unchanged()
    def load(cls, folder: str | Path, models: Mapping[str, Mapping[str, Any]] = {}, device: str = "auto") -> Predictor:
        """The reader of a finished run. Neither its data nor its caches are needed, but its resource is.

        Args:
            folder: ``runs/TASK/.../seed-N``, wherever it lies now.
            models: ``[models]`` of ``kr2cache.toml``: where the resource is, if it moved since.

        Raises:
            CacheError: If this is no run folder, its reader is gone or damaged, or another version wrote it.
            CacheMismatchError: If the resource is not the one that the reader was trained with.
            ModelUnavailableError: If the resource is neither on this machine nor to be had.
        """
        folder = Path(folder).expanduser()
        config, origin = _read_run(folder)
        task = find_task(config["task"])
        if not (folder / runs.READER).is_dir():
            raise CacheError(
                f"{folder} holds no trained reader: there is no {runs.READER}/ in it.",
                f"{runs.why_no_reader(folder)} To have one, remove {folder} and train again.",
            )
        chosen_device = choose_device(device)
        name = str(config["reader"]["name"])
        spec = trained_spec(name, folder / runs.READER, models)
        tokenizer = load_tokenizer(spec, words=task.words)
        reader = _load_reader(folder / runs.READER, task, trust_remote_code=spec.trust_remote_code)
        if (reader.fusion is None) != ("resource" not in config):
            raise CacheError(
                f"{folder / runs.READER} is not the reader that {folder}/config.json describes: only one of them has a "
                "resource.",
                "Restore the folder, or train the run again.",
            )
        resource = None
        if "resource" in config:
            resource = _load_resource(folder, config["resource"], origin, models, task, chosen_device)
        reader.to(chosen_device)
        return cls(
            task=task,
            reader=reader,
            tokenizer=tokenizer,
            max_length=int(config["reader"]["max_length"]),
            resource=resource,
        )

    def __call__(self, examples: Sequence[Example]) -> list[Predicted]:
        """Label the examples; gold labels that they have are not looked at.

        Returns:
            In the order of ``examples``.

        Raises:
            DataError: For an example that is not one of this task.
        """
        labels = self.task.labels
        predictions = []
        logits = self.logits(examples)
        for example, own, best in zip(examples, logits, most_likely(logits, self.task), strict=True):
            if isinstance(best, list):
                tags = [None if number is None else labels[number] for number in best]
                predictions.append(Predicted(id=example.id, predicted=tags, scores=None))
            else:
                scores = dict(zip(labels, _softmax(own[0]).tolist(), strict=True))
                predictions.append(Predicted(id=example.id, predicted=labels[best], scores=scores))
        return predictions

    def logits(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """``evaluate.example_logits`` of these examples, with states that are computed now."""
        if not examples:
            return []
        for example in examples:
            _check_shape(self.task, example)
        index = encode_examples(self.tokenizer, examples, self.task, self.max_length)
        check_token_ids(index, vocabulary(self.reader.config), "the reader")
        if self.resource is None:
            return example_logits(self.reader, SplitData(examples=examples, index=index), self.task, self.tokenizer)
        features = self.online_features(self.resource, self._resource_index(self.resource, examples))
        data = SplitData(examples=examples, index=index, features=features)
        with cheaper_forward(self.resource.encoder, len(features.index.input_id)):
            return example_logits(self.reader, data, self.task, self.tokenizer)

    def missing_words(self, examples: Sequence[Example]) -> MissingWords:
        """How many words of these examples get no label, and why (tagging)."""
        index = encode_examples(self.tokenizer, examples, self.task, self.max_length)
        return missing_words(index, [example.texts[0] for example in examples], self.max_length, self.tokenizer)

    def online_features(self, resource: OnlineResource, index: SequenceIndex) -> OnlineFeatures:
        """The states that the reader's fusion takes, to be computed."""
        fusion = self.reader.fusion
        assert fusion is not None, "a reader without a fusion has no resource"
        keeps_layers = self.reader.projection_kind == "direct"
        weights = None if keeps_layers else self.reader.fusion_weights.detach()
        return OnlineFeatures(resource, index, fusion.layers, weights)

    def _resource_index(self, resource: OnlineResource, examples: Sequence[Example]) -> SequenceIndex:
        index = encode_examples(resource.tokenizer, examples, self.task, resource.max_length)
        check_token_ids(index, vocabulary(resource.encoder.config), repr(resource.name))
        return index


class OnlineFeatures:
    """What ``features.ResourceFeatures`` reads from a cache, computed when it is asked for.

    A fusion with trained weights may be applied here too (``ResourceFeatures`` leaves it to the reader), so one layer
    goes to the reader instead of all; only the direct projection wants them side by side.
    """

    def __init__(
        self, resource: OnlineResource, index: SequenceIndex, layers: tuple[int, ...], weights: Tensor | None
    ) -> None:
        """
        Args:
            index: The sequences by the resource's tokenizer.
            layers: Of the fusion.
            weights: (len(layers),) by which they are averaged; None to keep them apart.
        """
        self.resource = resource
        self.index = index
        self.n_tokens = index.n_tokens
        self.device = resource.encoder.device
        self.layers = layers
        self.weights = None if weights is None else weights.to(self.device)
        self.width = encoder_shape(resource.encoder.config)[1]
        self.sequences_read = 0
        """How many sequences went through the resource."""

    def batch(self, sequences: Sequence[int]) -> tuple[Tensor, NDArray[np.int64]]:
        """States and mask of some sequences.

        Returns:
            States float32 (B, L, T, D) on the resource's device, zeros where padded, L = 1 unless for the direct
            projection; mask (B, T), 1 for states.
        """
        self.sequences_read += len(sequences)
        numbers = np.asarray(sequences)
        lengths = self.n_tokens[numbers]
        mask = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        layers = len(self.layers) if self.weights is None else 1
        states_BLTD = torch.zeros(len(numbers), layers, mask.shape[1], self.width, device=self.device)
        together = [np.arange(len(numbers))]
        if not self.resource.padded:
            together = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        for rows in together:
            states_BLTD[torch.from_numpy(rows), :, : int(lengths[rows].max())] = self._states(numbers[rows])
        padding = torch.from_numpy(~mask)[:, None, :, None].to(self.device)
        return states_BLTD.masked_fill_(padding, 0), mask.astype(np.int64)

    def _states(self, sequences: NDArray[np.intp]) -> Tensor:
        """(B, L, T, D), padded positions included."""
        states = _hidden_states(self.resource, self.index, sequences)
        states_BLTD = torch.stack([states[layer].float() for layer in self.layers], dim=1)
        if self.weights is None:
            return states_BLTD
        return torch.einsum("l,bltd->btd", self.weights, states_BLTD)[:, None]


def _hidden_states(
    resource: OnlineResource, index: SequenceIndex, sequences: Sequence[int] | NDArray[np.intp]
) -> tuple[Tensor, ...]:
    return hidden_states(
        resource.encoder,
        index,
        sequences,
        pad_id=pad_id(resource.tokenizer),
        compute_dtype=resource.compute_dtype,
    )


READER_FIELDS = {"name", "max_length"}
RESOURCE_FIELDS = {"name", "weights", "config", "max_length", "compute_dtype"}


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what decided the run, where its resource lay)"""
    seeds = sorted(path.name for path in folder.glob("seed-*") if runs.is_finished(path))
    if seeds and not (folder / "config.json").is_file():
        raise CacheError(f"{folder} holds runs, one a seed.", f"Give one of them: {', '.join(seeds)}.")
    content = runs.read_config(folder)
    config = content["config"]
    needed = {"reader": READER_FIELDS} | ({"resource": RESOURCE_FIELDS} if "resource" in config else {})
    for part, fields in needed.items():
        missing = sorted(fields - set(config[part] or ()))
        if missing:
            raise CacheError(
                f"{folder}/config.json was not written by this version of kr2cache: its {part} lacks "
                f"{', '.join(missing)}.",
                "Train the run anew.",
            )
    return config, (content["recorded"].get("model") or {}).get("resource") or {}


def _load_reader(folder: Path, task: Task, *, trust_remote_code: bool) -> KReader:
    try:
        reader = KReader.load(folder, trust_remote_code=trust_remote_code)
    except KR2CacheError:
        raise
    except Exception as error:  # a damaged file makes transformers, safetensors and torch raise almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CacheError(
            f"The reader in {folder} cannot be loaded: {reason}",
            f"It is incomplete or damaged: remove {folder.parent} and train it again.",
        ) from error
    reader.check_task(task, folder)
    return reader


def _load_resource(
    run: Path,
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any]],
    task: Task,
    device: torch.device,
) -> OnlineResource:
    """The resource that a run was trained with, checked to be that one.

    Args:
        config: What decided the run of it.
        origin: Where it lay then, as ``models.origin`` recorded it.
    """
    name = str(config["name"])
    spec = _find_resource(name, origin, overrides)
    encoder = load_encoder(spec)
    weights = weights_digest(encoder)
    where = local_folder(spec)
    differs = None
    if weights not in config["weights"]:
        then = ", ".join(digest[:8] for digest in config["weights"])
        differs = f"other weights (digest {then} then, {weights[:8]} now)"
    elif config_digest(encoder.config) not in config["config"]:
        differs = "another configuration (config.json)"
    if differs is not None:
        raise CacheMismatchError(
            f"The resource {name} of {run} had {differs}; the model is that in {where}.",
            f'Name the folder of the one it was trained with, path = "..." under [models.{name}] in kr2cache.toml, or '
            "train the run anew with this one.",
        )
    encoder.to(device)  # type: ignore[arg-type]  # transformers annotates it for itself alone
    resource = OnlineResource(
        name=name,
        encoder=encoder,
        tokenizer=load_tokenizer(spec, words=task.words),
        max_length=int(config["max_length"]),
        compute_dtype=str(config["compute_dtype"]),
        padded=False,
    )
    _check_history(resource, words=task.words)
    return dataclasses.replace(resource, padded=_may_be_padded(resource, words=task.words))


def _find_resource(name: str, origin: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """The resource called ``name`` where it is on this machine; else where it was for the run; else on the hub."""
    try:
        named = find_model(name, overrides)
    except (UnknownNameError, ModelUnavailableError):  # a folder of that name, or a hub id, is known to the run alone
        named = ModelSpec(name=name)
    path = origin.get("path")
    recorded = dataclasses.replace(
        named,
        hub_id=origin.get("hub_id"),
        revision=origin.get("revision"),
        path=Path(path) if path else None,
        package=origin.get("package"),
        layers=origin.get("layers"),
        model_type=origin.get("model_type"),
    )
    on_hub = [dataclasses.replace(spec, path=None) for spec in (named, recorded) if spec.hub_id is not None]
    for spec in (named, recorded, *on_hub):
        if local_folder(spec) is not None:
            return spec
    if on_hub:
        return on_hub[0]  # whoever loads it downloads it, or says what can be done
    raise ModelUnavailableError(
        f"The run's resource, {name}, is not on this machine{f': it was in {path}' if path else ''}.",
        f'Name its folder: path = "..." under [models.{name}] in kr2cache.toml.',
    )


def _check_history(resource: OnlineResource, *, words: bool) -> None:
    """Raise ``UnsupportedModelError`` if the resource's states depend on what ran before, at any length it may get."""
    longest = tuple(str(number % 10) for number in range(resource.max_length))
    texts = [longest[:1], longest[: len(longest) // 2], longest]
    if not words:
        texts = [(" ".join(text),) for text in texts]
    index = encode(resource.tokenizer, ["a", "b", "c"], texts, words=words, max_length=resource.max_length)

    def run(model: PreTrainedModel, sequence: int) -> tuple[Tensor, ...]:
        return _hidden_states(dataclasses.replace(resource, encoder=model, compute_dtype="float32"), index, [sequence])

    check_repeatable(resource.encoder, index.n_tokens, run, repr(resource.name))


def _may_be_padded(resource: OnlineResource, *, words: bool) -> bool:
    """Whether a short text has the same states beside a long one as alone; some architectures let padding in."""
    texts = [("1",), ("1", "2", "3", "4", "5", "6", "7", "8") if words else ("1 2 3 4 5 6 7 8",)]
    index = encode(resource.tokenizer, ["short", "long"], texts, words=words, max_length=resource.max_length)
    T, longer = index.n_tokens.tolist()
    if longer <= T:
        return False
    alone, beside = _hidden_states(resource, index, [0]), _hidden_states(resource, index, [0, 1])
    return padding_is_harmless(alone, beside, resource.compute_dtype)


def _check_shape(task: Task, example: Example) -> None:
    texts = len(task.labels) if task.head == "choice" else 1
    if len(example.texts) != texts or not all(example.texts):
        raise DataError(
            f"Example {example.id!r} has {len(example.texts)} texts, {[len(text) for text in example.texts]} parts in "
            f"them; {task.name} takes {texts}, each with something in it.",
            "Read examples with read_lines, read_file or the task's own reader.",
        )


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities
