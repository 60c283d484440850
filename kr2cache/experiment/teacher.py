"""The teacher of a distillation: its logits for the training split, from an earlier call or computed now.

A teacher is a model, which is fine-tuned on the task first (a run like any other, seed 1), or the folder of a run. Its
logits are stored beside the resources' caches, for every student and seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kr2cache.cache.format import canonical_json
from kr2cache.config import TrainConfig
from kr2cache.errors import CacheError, ConfigError, KR2CacheError
from kr2cache.experiment.prepare import Prepared, prepare
from kr2cache.experiment.shared import Shared
from kr2cache.methods import PLAIN_METHODS
from kr2cache.models.encode import encode_examples
from kr2cache.models.registry import ModelSpec, trained_spec
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.store.folders import cache_folder
from kr2cache.system.console import count_text, note
from kr2cache.system.device import choose_device
from kr2cache.tasks import Task
from kr2cache.training.admission import load_reader
from kr2cache.training.batches import SplitData
from kr2cache.training.distill import TeacherLogits
from kr2cache.training.evaluate import example_logits
from kr2cache.training.kreader import KReader
from kr2cache.training.runs import RunFolder, finished_seeds

SEED = 1
"""The seed of a teacher that is given by its model. All students share this teacher."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The logits of a teacher for the training split, and facts about them."""

    logits: TeacherLogits
    name: str
    fingerprint: str
    """Digest of what decided the teacher's run, and of the examples."""
    computed: bool
    """Whether the logits were computed in this call."""
    recorded: dict[str, Any]
    """Number of words (or examples) that have logits, and of words that one of the two models has no token for."""

    @property
    def notes(self) -> list[str]:
        left_out = self.recorded["words_left_out"]
        if not left_out:
            return []
        return [
            f"{count_text(left_out, 'word')} of the training split are not taught: the teacher or the student has no "
            "token for them (cut off at the maximal length, or no token at all)."
        ]

    def given_to(self, student: Prepared) -> Prepared:
        """The student with the logits of its teacher, and with the notes and facts about them."""
        config = student.job.config
        train = dataclasses.replace(student.job.splits["train"], teacher=self.logits)
        job = dataclasses.replace(student.job, splits={**student.job.splits, "train": train})
        deciding = {
            **student.deciding,
            "teacher": {"name": self.name, "fingerprint": self.fingerprint},
            "temperature": config.temperature,
            "soft_weight": config.soft_weight,
        }
        notes = student.notes + self.notes
        return dataclasses.replace(student, job=job, deciding=deciding, notes=notes, distillation=self.recorded)


def teacher_config(config: TrainConfig) -> TrainConfig | None:
    """The training that makes the teacher of a distillation; None if the teacher is the folder of a run.

    Raises:
        ConfigError: For a folder that holds several runs.
    """
    assert config.teacher is not None, "checked with the settings"
    run = RunFolder(Path(config.teacher).expanduser())
    if seeds := finished_seeds(run.path):
        raise ConfigError(f"The teacher {run.path} holds runs, one a seed.", f"Give one of them: {seeds[0].path}.")
    if run.is_finished and run.config_file.is_file():
        return None
    changes: dict[str, Any] = {"method": "kresource", "resource": config.teacher, "more_resources": (), "teacher": None}
    # keep_head is about the student.
    return dataclasses.replace(config, **changes, seeds=(SEED,), keep_head=False)


def check_run(task: Task, config: TrainConfig, shared: Shared) -> None:
    """Check a teacher that is the folder of a run: its logits are stored, or its reader can give them.

    Args:
        task: Of the student.
        config: Of the student.

    Raises:
        CacheError: If there is neither, or the reader is damaged.
        ConfigError: If the run is of another task, or no plain model.
    """
    run = _run_of(config)
    decides = _decides(run, task)
    name = str(decides["reader"]["name"])
    _, path = _logits_of(name, decides, task, config, shared)
    if not path.is_file():
        if not run.reader.is_dir():
            raise _no_reader(run)
        spec = trained_spec(name, run.reader, config.models)
        load_reader(run.reader, task, trust_remote_code=spec.trust_remote_code)


def _run_of(config: TrainConfig) -> RunFolder:
    return RunFolder(Path(config.teacher or "").expanduser())


def _decides(run: RunFolder, task: Task) -> dict[str, Any]:
    """What decided the scores of this run.

    Raises:
        ConfigError: If it cannot be the teacher of a student of ``task``.
    """
    decides: dict[str, Any] = run.read_config()["config"]
    if decides["task"] != task.name:
        raise ConfigError(
            f"The teacher in {run.path} was trained on {decides['task']}, the student learns {task.name}.",
            "Give a teacher of the same task.",
        )
    if decides["method"] not in PLAIN_METHODS:
        raise ConfigError(
            f"The teacher in {run.path} is a run of method {decides['method']}; a teacher is a plain model.",
            f"Give a run of method {' or '.join(PLAIN_METHODS)}.",
        )
    return decides


def _logits_of(
    name: str, decides: Mapping[str, Any], task: Task, config: TrainConfig, shared: Shared
) -> tuple[str, Path]:
    """The fingerprint of a teacher's logits for the training split, and their file.

    Args:
        name: Of the teacher.
        decides: What decided the scores of its run.
    """
    examples = shared.corpus(task, config).splits["train"].digest
    text = canonical_json({"teacher": {**decides, "method": "plain"}, "examples": examples})
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    folder = cache_folder(config.cache_dir, task.name, "train", f"teacher-{name}", fingerprint)
    return fingerprint, folder / "logits.npz"


def _no_reader(run: RunFolder) -> CacheError:
    return CacheError(
        f"{run.path} holds no trained reader. {run.why_no_reader()}",
        f"Remove {run.path} and train it again, or give the teacher by its model.",
    )


class Teacher:
    """Finds the logits, the trained reader and the runs of a teacher, if they exist."""

    def __init__(self, student: Prepared, shared: Shared) -> None:
        """
        Raises:
            CacheError: For a run folder without a trained reader.
            ConfigError: For a teacher of another task, or a teacher that is not a plain model.
        """
        self.student = student
        config = student.job.config
        own = teacher_config(config)
        self.prepared: Prepared | None = None
        """The training that makes the teacher; None if the teacher is given as the folder of a run."""
        if own is None:
            run = _run_of(config)
            self.runs = [run]
            decides = _decides(run, student.job.task)
            self.name = str(decides["reader"]["name"])
        else:
            self.prepared = prepare(own, shared)
            decides = {**self.prepared.deciding, "seed": SEED}
            self.name = self.prepared.job.reader.name
            # The same training under the name of the other plain method serves as well.
            folders = (self.prepared.folder, self.prepared.folder_of("kreader"))
            self.runs = [RunFolder.of_seed(folder, SEED) for folder in folders]
        self.fingerprint, self.path = _logits_of(self.name, decides, student.job.task, config, shared)

    def kept(self) -> Lesson | None:
        """The stored logits of an earlier call, if there are any."""
        if not self.path.is_file():
            return None
        return self._lesson(TeacherLogits.load(self.path, self.fingerprint), computed=False)

    def from_reader(self) -> Lesson | None:
        """The logits by the trained reader that is kept with a run; None if there is no such reader.

        Raises:
            CacheError: If the teacher was given as a run and its reader is gone, or does not give the task's labels in
                their order.
        """
        for run in filter(lambda run: run.reader.is_dir(), self.runs):
            try:
                trusted = self._spec(run).trust_remote_code
                reader = load_reader(run.reader, self.student.job.task, trust_remote_code=trusted)
            except KR2CacheError:
                if run.reader.is_dir():
                    raise
                continue  # another sweep has dropped it meanwhile
            return self.from_trained(reader)
        if self.prepared is None:
            raise _no_reader(self.runs[0])
        return None

    def from_trained(self, reader: KReader) -> Lesson:
        """The logits by this trained teacher. They are stored for later calls."""
        job = self.student.job
        if self.prepared is not None:
            data, tokenizer = self.prepared.job.splits["train"], self.prepared.job.tokenizer
        else:
            tokenizer = load_tokenizer(self._spec(self.runs[0]), words=job.task.words)
            max_length = int(self.runs[0].read_config()["config"]["reader"]["max_length"])
            examples = job.splits["train"].examples
            data = SplitData(examples=examples, index=encode_examples(tokenizer, examples, job.task, max_length))
        reader.to(choose_device(job.config.device))
        logits = TeacherLogits(
            ids=tuple(example.id for example in data.examples),
            logits=example_logits(reader, data, job.task, tokenizer),
        )
        try:
            logits.save(self.path, self.fingerprint)
        except OSError as error:  # the student can learn now; the next student computes them again
            note(f"The teacher's logits are not stored: {self.path} cannot be written ({error.strerror or error}).")
        return self._lesson(logits, computed=True)

    def _spec(self, run: RunFolder) -> ModelSpec:
        """The trained reader of this run, as a model."""
        return trained_spec(self.name, run.reader, self.student.job.config.models)

    def _lesson(self, logits: TeacherLogits, *, computed: bool) -> Lesson:
        train = self.student.job.splits["train"]
        if logits.ids != tuple(example.id for example in train.examples):
            raise CacheError(f"{self.path} has the logits of other examples.", "Remove it; it will be made again.")
        total = sum(len(one) for one in logits.logits)
        taught = 0
        for i, one in enumerate(logits.logits):
            has_logits: NDArray[np.bool_] = np.isfinite(one[:, 0])
            if self.student.job.task.head == "token":
                _, words = train.first_subwords[i]
                has_logits = has_logits[words]
            taught += int(has_logits.sum())
        return Lesson(
            logits=logits,
            name=self.name,
            fingerprint=self.fingerprint,
            computed=computed,
            recorded={"logits": str(self.path), "words_taught": taught, "words_left_out": total - taught},
        )
