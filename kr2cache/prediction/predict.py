"""A trained reader labels new text.

>>> predictor = Predictor.load("runs/udpos-de/kr2-xlm-r-gottbert-last4-6b1d0f42/seed-1")      # doctest: +SKIP
>>> predictor(texts.read_lines(predictor.task, ["Das ist ein Haus ."]))[0].predicted          # doctest: +SKIP
['PRON', 'AUX', 'DET', 'NOUN', 'PUNCT']

There is no cache here. The resource computes its states for each batch with the forward pass of stage one, and only the
fusion's layers are kept. A cache rounds states to its dtype, so the logits differ from those of a cached run by that
rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.errors import CacheError, DataError, KR2CacheError, error_text
from kr2cache.models.encode import MissingWords, check_token_ids, encode_examples, missing_words
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.load import vocabulary
from kr2cache.models.registry import trained_spec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.prediction.online import OnlineFeatures, OnlineResource, load_resource
from kr2cache.system.device import choose_device
from kr2cache.system.process import process_unchanged
from kr2cache.tasks import Example, Task, find_task
from kr2cache.training.admission import check_reader
from kr2cache.training.batches import SplitData
from kr2cache.training.evaluate import example_logits, most_likely
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder, finished_seeds


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A reader's prediction for one example."""

    id: str
    predicted: list[str | None] | str
    """The label. For tagging, one label per word; None for a word without a token."""
    scores: dict[str, float] | None
    """The probability of every label; None for tagging."""

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Predictor:
    """A trained reader, with its resource if it has one. Call it with examples."""

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
            max_length: The longest sequence of the reader, in tokens.
            resource: Required if the reader has a fusion.
        """
        self.task = task
        self.reader = reader
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.resource = resource

    @classmethod
    @process_unchanged()
    def load(cls, folder: str | Path, models: Mapping[str, Mapping[str, Any]] = {}, device: str = "auto") -> Predictor:
        """Load the reader of a finished run. This needs its resource, but neither its data nor its caches.

        Args:
            folder: ``runs/TASK/.../seed-N``. The folder may have moved since the run.
            models: ``[models]`` of ``kr2cache.toml``: where the resource is, if it moved since the run.

        Raises:
            CacheError: If this is no run folder, its reader is missing or damaged, or another version wrote it.
            CacheMismatchError: If the resource is not the model that the reader was trained with.
            ModelUnavailableError: If the resource is not on this machine and cannot be downloaded.
        """
        run = RunFolder(Path(folder).expanduser())
        config, origin = _read_run(run)
        task = find_task(config["task"])
        if not run.reader.is_dir():
            raise CacheError(
                f"{run.path} holds no trained reader: the folder {run.reader.name}/ is missing.",
                f"{run.why_no_reader()} To get a trained reader, remove {run.path} and train again.",
            )
        chosen_device = choose_device(device)
        name = str(config["reader"]["name"])
        spec = trained_spec(name, run.reader, models)
        tokenizer = load_tokenizer(spec, words=task.words)
        reader = _load_reader(run.reader, task, trust_remote_code=spec.trust_remote_code)
        if (reader.resource is None) != ("resource" not in config):
            raise CacheError(
                f"{run.reader} is not the reader that {run.config_file} describes: only one of the two has a resource.",
                "Restore the folder, or train the run again.",
            )
        resource = None
        if "resource" in config:
            resource = load_resource(run.path, config["resource"], origin, models, task, chosen_device)
        reader.to(chosen_device)
        return cls(
            task=task,
            reader=reader,
            tokenizer=tokenizer,
            max_length=int(config["reader"]["max_length"]),
            resource=resource,
        )

    def __call__(self, examples: Sequence[Example]) -> list[Predicted]:
        """Label the examples. Their gold labels, if any, are ignored.

        Returns:
            One prediction per example, in the order of ``examples``.

        Raises:
            DataError: If an example does not fit the task.
        """
        labels = self.task.labels
        predictions = []
        logits = self.logits(examples)
        for example, own, best in zip(examples, logits, most_likely(logits, self.task), strict=True):
            if isinstance(best, list):
                tags = [None if number is None else labels[number] for number in best]
                predictions.append(Predicted(id=example.id, predicted=tags, scores=None))
            else:
                scores = dict(zip(labels, softmax(own[0].astype(np.float64)).tolist(), strict=True))
                predictions.append(Predicted(id=example.id, predicted=labels[best], scores=scores))
        return predictions

    def logits(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """``evaluate.example_logits`` of these examples. The resource's states are computed now."""
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
        """The states that the reader's fusion uses. Each batch is computed on request."""
        part = self.reader.resource
        assert part is not None, "a reader without a fusion has no resource"
        weights = part.weights.detach() if part.is_weighted_sum else None
        return OnlineFeatures(resource, index, part.fusion.layers, weights)

    def _resource_index(self, resource: OnlineResource, examples: Sequence[Example]) -> SequenceIndex:
        index = encode_examples(resource.tokenizer, examples, self.task, resource.max_length)
        check_token_ids(index, vocabulary(resource.encoder.config), repr(resource.name))
        return index


READER_FIELDS = {"name", "max_length"}
RESOURCE_FIELDS = {"name", "weights", "config", "max_length", "compute_dtype"}


def _read_run(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the settings that decided the run, where its resource was)"""
    seeds = [seed.path.name for seed in finished_seeds(run.path)]
    if seeds and not run.config_file.is_file():
        raise CacheError(f"{run.path} holds several runs, one per seed.", f"Choose one of them: {', '.join(seeds)}.")
    content = run.read_config()
    config = content["config"]
    needed = {"reader": READER_FIELDS} | ({"resource": RESOURCE_FIELDS} if "resource" in config else {})
    for part, fields in needed.items():
        missing = sorted(fields - set(config[part] or ()))
        if missing:
            raise CacheError(
                f"{run.config_file} was not written by this version of kr2cache: its {part} lacks "
                f"{', '.join(missing)}.",
                "Train the run again.",
            )
    return config, (content["recorded"].get("model") or {}).get("resource") or {}


def _load_reader(folder: Path, task: Task, *, trust_remote_code: bool) -> KReader:
    try:
        reader = KReader.load(folder, trust_remote_code=trust_remote_code)
    except KR2CacheError:
        raise
    except Exception as error:  # a damaged file makes transformers, safetensors and torch raise almost anything
        reason = error_text(error)
        raise CacheError(
            f"The reader in {folder} cannot be loaded: {reason}",
            f"It is incomplete or damaged. Remove {folder.parent} and train it again.",
        ) from error
    reader.check_task(task, folder)
    if reader.resource is not None:
        check_reader(reader, f"The reader in {folder}")  # another transformers may have trained it
    return reader


def _check_shape(task: Task, example: Example) -> None:
    texts = len(task.labels) if task.head == "choice" else 1
    if len(example.texts) != texts or not all(example.texts):
        raise DataError(
            f"Example {example.id!r} has {len(example.texts)} texts, with {[len(text) for text in example.texts]} "
            f"parts; {task.name} takes {texts}, each with at least one part.",
            "Read examples with read_lines, read_file or the task's own reader.",
        )
