"""A trained reader labels new text.

>>> predictor = Predictor.load("runs/udpos-de/kr2-xlm-r-gottbert-last4-6b1d0f42/seed-1")      # doctest: +SKIP
>>> predictor(texts.read_lines(predictor.task, ["Das ist ein Haus ."]))[0].predicted          # doctest: +SKIP
['PRON', 'AUX', 'DET', 'NOUN', 'PUNCT']

There is no cache here. The resource computes its states for each batch with the forward pass of stage one, and only the
fusion's layers are kept. A cache rounds states to its dtype, so the logits differ from those of a cached run by that
rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from transformers import PreTrainedTokenizerBase

from kr2cache.cache.format import SequenceIndex
from kr2cache.errors import CacheError, DataError, UnknownNameError
from kr2cache.models.configuration import vocabulary
from kr2cache.models.encode import MissingWords, check_token_ids, encode_examples, missing_words
from kr2cache.models.forward import cheaper_forward
from kr2cache.models.registry import trained_spec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.prediction.online import OnlineFeatures, OnlineResource, load_resource
from kr2cache.system.device import choose_device
from kr2cache.system.process import process_unchanged
from kr2cache.tasks import Example, Task, find_task
from kr2cache.tasks.declared import DeclaredTask
from kr2cache.training.admission import load_reader
from kr2cache.training.batches import SplitData
from kr2cache.training.evaluate import example_logits, predictions
from kr2cache.training.features import joined
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder, finished_seeds


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A reader's prediction for one example."""

    id: str
    predicted: list[str | None] | list[str] | str | float
    """The label. For tagging, one label per word; None for a word without a token. For multilabel, all labels with a
    probability of at least 0.5. For regression, the value."""
    scores: dict[str, float] | None
    """The probability of every label; None for tagging and regression."""

    def json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _task_of(config: Mapping[str, Any], tasks: Mapping[str, Any]) -> Task:
    """The task of a run, as the run recorded it. ``tasks`` has it if it did not; errors as for ``find_task``."""
    name, recorded = config["task"], config.get("declaration")
    if recorded is not None:
        given = tasks.get(name)
        return (type(given) if isinstance(given, DeclaredTask) else DeclaredTask).of_table(name, recorded)
    try:
        return find_task(name, tasks)
    except UnknownNameError as error:
        raise UnknownNameError(
            error.message,
            "The run was trained on a task of another package or a Task object of Python. Install the package; or in "
            f"Python, give the object: Predictor.load(RUN, tasks={{{name!r}: TASK}}).",
        ) from error


class Predictor:
    """A trained reader, with its resource if it has one. Call it with examples."""

    def __init__(
        self,
        *,
        task: Task,
        reader: KReader,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        resources: Sequence[OnlineResource] = (),
    ) -> None:
        """
        Args:
            max_length: The longest sequence of the reader, in tokens.
            resources: Those of the reader, in its order.
        """
        self.task = task
        self.reader = reader
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.resources = resources

    @classmethod
    @process_unchanged()
    def load(
        cls,
        folder: str | Path,
        models: Mapping[str, Mapping[str, Any]] = {},
        device: str = "auto",
        device_map: str | None = None,
        tasks: Mapping[str, Any] = {},
    ) -> Predictor:
        """Load the reader of a finished run. This needs its resource, but neither its data nor its caches.

        Args:
            folder: ``runs/TASK/.../seed-N``. The folder may have moved since the run.
            models: ``[models]`` of ``kr2cache.toml``: where the resource is, if it moved since the run.
            device: Of the reader, and of its resources without a device map.
            device_map: Of the resources, as in ``ExtractConfig``.
            tasks: ``Task`` objects by name, for a run on a task that neither a table declares nor a package brings.

        Raises:
            CacheError: If this is no run folder, its reader is missing or damaged, or another version wrote it.
            CacheMismatchError: If the resource is not the model that the reader was trained with.
            ModelUnavailableError: If the resource is not on this machine and cannot be downloaded.
        """
        run = RunFolder(Path(folder).expanduser())
        config, resources = _read_run(run)
        task = _task_of(config, tasks)
        if not run.reader.is_dir():
            raise CacheError(
                f"{run.path} holds no trained reader: the folder {run.reader.name}/ is missing.",
                f"{run.why_no_reader()} To get a trained reader, remove {run.path} and train again.",
            )
        chosen_device = choose_device(device)
        name = str(config["reader"]["name"])
        spec = trained_spec(name, run.reader, models)
        tokenizer = load_tokenizer(spec, words=task.words)
        reader = load_reader(run.reader, task, trust_remote_code=spec.trust_remote_code)
        if len(reader.resources) != len(resources):
            counts = f"{len(reader.resources)} and {len(resources)}"
            raise CacheError(
                f"{run.reader} is not the reader that {run.config_file} describes: they have {counts} resources.",
                "Restore the folder, or train the run again.",
            )
        online = [
            load_resource(run.path, own, origin, models, task, chosen_device, device_map) for own, origin in resources
        ]
        reader.to(chosen_device)
        return cls(
            task=task,
            reader=reader,
            tokenizer=tokenizer,
            max_length=int(config["reader"]["max_length"]),
            resources=online,
        )

    def __call__(self, examples: Sequence[Example]) -> list[Predicted]:
        """Label the examples. Their gold labels, if any, are ignored.

        Returns:
            One prediction per example, in the order of ``examples``.

        Raises:
            DataError: If an example does not fit the task.
        """
        logits = self.logits(examples)
        return [
            Predicted(id=example.id, predicted=self.task.named(one), scores=self._scores(own))
            for example, own, one in zip(examples, logits, predictions(logits, self.task), strict=True)
        ]

    def _scores(self, logits: NDArray[np.float32]) -> dict[str, float] | None:
        """``Predicted.scores`` of one example, from its logits (1, labels)."""
        if self.task.kind in ("tagging", "regression"):
            return None
        probabilities = (expit if self.task.kind == "multilabel" else softmax)(logits[0].astype(np.float64))
        return dict(zip(self.task.labels, probabilities.tolist(), strict=True))

    def logits(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """``evaluate.example_logits`` of these examples. The resource's states are computed now."""
        if not examples:
            return []
        for example in examples:
            _check_shape(self.task, example)
        index = encode_examples(self.tokenizer, examples, self.task, self.max_length)
        check_token_ids(index, vocabulary(self.reader.config), "the reader")
        if not self.resources:
            return example_logits(self.reader, SplitData(examples=examples, index=index), self.task, self.tokenizer)
        features = self.online_features([self._resource_index(one, examples) for one in self.resources])
        data = SplitData(examples=examples, index=index, features=joined(features))
        with contextlib.ExitStack() as cheaper:
            for one in features:
                cheaper.enter_context(cheaper_forward(one.resource.encoder, len(one.index.input_id)))
            return example_logits(self.reader, data, self.task, self.tokenizer)

    def missing_words(self, examples: Sequence[Example]) -> MissingWords:
        """How many words of these examples get no label, and why (tagging)."""
        index = encode_examples(self.tokenizer, examples, self.task, self.max_length)
        return missing_words(index, [example.texts[0] for example in examples], self.max_length, self.tokenizer)

    def online_features(self, indices: Sequence[SequenceIndex]) -> list[OnlineFeatures]:
        """Of each resource, the states that its fusion uses. Each batch is computed on request.

        Args:
            indices: The sequences, encoded with the tokenizer of each resource.
        """
        return [
            OnlineFeatures(
                resource,
                index,
                part.settings.fusion.layers,
                part.weights.detach() if part.is_weighted_sum else None,
            )
            for resource, index, part in zip(self.resources, indices, self.reader.resources, strict=True)
        ]

    def _resource_index(self, resource: OnlineResource, examples: Sequence[Example]) -> SequenceIndex:
        index = encode_examples(resource.tokenizer, examples, self.task, resource.max_length)
        check_token_ids(index, vocabulary(resource.encoder.config), repr(resource.name))
        return index


READER_FIELDS = {"name", "max_length"}
RESOURCE_FIELDS = {"name", "weights", "config", "max_length", "compute_dtype"}


def _read_run(run: RunFolder) -> tuple[dict[str, Any], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """(the settings that decided the run; of each resource, its settings and where it was)"""
    seeds = [seed.path.name for seed in finished_seeds(run.path)]
    if seeds and not run.config_file.is_file():
        raise CacheError(f"{run.path} holds several runs, one per seed.", f"Choose one of them: {', '.join(seeds)}.")
    content = run.read_config()
    config = content["config"]
    resources = [config["resource"], *(config.get("more_resources") or ())] if "resource" in config else []
    for part, fields, own in [
        ("reader", READER_FIELDS, config["reader"]),
        *(("resource", RESOURCE_FIELDS, one) for one in resources),
    ]:
        if missing := sorted(fields - set(own or ())):
            raise CacheError(
                f"{run.config_file} was not written by this version of kr2cache: its {part} lacks "
                f"{', '.join(missing)}.",
                "Train the run again.",
            )
    recorded = content["recorded"].get("model") or {}
    origins = [recorded.get("resource") or {}, *(recorded.get("more_resources") or ())]
    return config, list(zip(resources, [*origins, *({} for _ in resources)], strict=False))


def _check_shape(task: Task, example: Example) -> None:
    texts = len(task.labels) if task.head == "choice" else 1
    if len(example.texts) != texts or not all(example.texts):
        raise DataError(
            f"Example {example.id!r} has {len(example.texts)} texts, with {[len(text) for text in example.texts]} "
            f"parts; {task.name} takes {texts}, each with at least one part.",
            "Read examples with read_lines, read_file or the task's own reader.",
        )
