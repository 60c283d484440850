"""The options that set a field of ``ExtractConfig`` or ``TrainConfig``.

Here is what ``--help`` says about each. Type and default come from the field, so a new option needs a field and a line
in ``EXTRACT`` or ``TRAIN``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from kr2cache.cache.dtypes import DTYPES
from kr2cache.config import COMPUTE_DTYPES, POOLS, ExtractConfig, TrainConfig
from kr2cache.methods import METHODS
from kr2cache.tasks import ROW_TASKS
from kr2cache.toml import KIND_NAMES


@dataclass(frozen=True)
class Setting:
    """What ``--help`` says about an option."""

    help: str
    default: str = ""
    """The default in words; empty to show the field's own default."""


ROW_TASK_NAMES = ", ".join(task.name for task in ROW_TASKS)
TASK = Setting(
    f"udpos-LANG, udpos, {ROW_TASK_NAMES}, GLUE's and more (kr2cache tasks), or a name under "
    "\\[tasks] in kr2cache.toml. Default: from the resource's language."
)
DATA = Setting(
    "Folder with train, dev and test in the task's format, one such file, or a hub data set. Default: the task's own "
    "data."
)
LIMIT = Setting("Only the first N examples of each split.", default="all")
DEVICE = Setting("Where models run: auto, cpu, cuda, cuda:1 or mps.")
WEIGHTS_DTYPE = Setting(
    f"Dtype of the resource's weights in memory: {', '.join(COMPUTE_DTYPES)}. The 16-bit ones take half of the memory."
)
POOL = Setting(f"One state for each token (none), or their mean for each word or sequence: {', '.join(POOLS)}.")
DEVICE_MAP = Setting(
    "auto: spread the resource's layers over all GPUs, and what does not fit over the computer's memory.",
    default="one device",
)
CACHE_DIR = Setting("Where caches are.", default="$KR2CACHE_DIR, else .kr2cache")

EXTRACT = {
    "resource": Setting("The frozen model: a name (kr2cache models), hub id or folder."),
    "split": Setting("train, dev or test.", default="train; of one file, the split in its name"),
    "task": TASK,
    "data": dataclasses.replace(DATA, help=f"{DATA.help} - is standard input."),
    "max_length": Setting("Maximum number of tokens in a sequence, special tokens included."),
    "layers": Setting("all, lastN (last4), or a list: 0,3,5. Layer 0 is the embeddings."),
    "dtype": Setting(f"Dtype on disk: {', '.join(DTYPES)}."),
    "pool": POOL,
    "compute_dtype": Setting(f"Dtype of the forward pass: {', '.join(COMPUTE_DTYPES)} (autocast)."),
    "weights_dtype": WEIGHTS_DTYPE,
    "device": DEVICE,
    "device_map": DEVICE_MAP,
    "tokens_per_batch": Setting(
        "Maximum number of positions in one forward pass.", default="1024 on CPU, 16384 on CUDA"
    ),
    "shard_gb": Setting("Maximum GiB of states in one file.", default="16; less if several processes share the work"),
    "limit": LIMIT,
    "cache_dir": CACHE_DIR,
    "workers": Setting("Processes that share the work. They divide the CPU cores, or take one GPU each."),
    "engine": Setting("What starts the workers: local (on this machine) or ray (on a Ray cluster)."),
    "gpus_per_worker": Setting(
        "For --engine ray: GPUs of each worker, also a part of one.", default="1 if there are GPUs"
    ),
}
"""Options of ``extract``, in the order of its ``--help``."""

TRAIN = {
    "reader": Setting("The model to train: a name, hub id or folder."),
    "resource": Setting(
        "The frozen model whose states the reader gets; several if given again. Default: the one resource that has "
        "caches."
    ),
    "task": TASK,
    "data": DATA,
    "fusion": Setting(
        "fuse (trainable weights), softmax (trainable, sum 1), mix (ELMo's scalar mix), all or lastN (averages), or "
        "layerN (layer0: embeddings)."
    ),
    "method": Setting("; ".join(f"{method.name} ({method.summary})" for method in METHODS.values()) + "."),
    "projection": Setting("How states are brought to the reader's width: auto, none, mlp or direct."),
    "keep_head": Setting(
        "Keep the head that the model has from an earlier training. Its label names must be the task's, in any order."
    ),
    "seeds": Setting("One run for each seed."),
    "epochs": Setting("How often the reader sees the train split."),
    "batch_size": Setting("Examples in one training step."),
    "learning_rate": Setting("Learning rate of the reader and the projection."),
    "fusion_learning_rate": Setting("Learning rate of the trainable weights of the fusion.", default="the same"),
    "max_length": Setting("Maximum number of tokens in the reader's sequences."),
    "resource_max_length": Setting(
        "Maximum number of tokens in the resource's sequences.", default="the cache's, else 128"
    ),
    "teacher": Setting("For kd: a model, which is fine-tuned first, or the folder of a run."),
    "temperature": Setting("For kd: temperature of the soft labels."),
    "soft_weight": Setting("For kd: weight of the teacher's loss; the loss on the labels has weight 1."),
    "limit": LIMIT,
    "train_limit": Setting("Use only the first N examples of the train split.", default="all"),
    "pool": dataclasses.replace(POOL, default="the cache's, else none"),
    "weights_dtype": dataclasses.replace(WEIGHTS_DTYPE, default="the cache's, else float32"),
    "device": DEVICE,
    "device_map": DEVICE_MAP,
    "run_dir": Setting("Where runs go."),
    "cache_dir": CACHE_DIR,
    "check_states": Setting("Compare cached states with their checksums when they are first read."),
}
"""Options of ``train``, in the order of its ``--help``."""

THE_GRID_S = "the grid's"
SWEEP = {
    "seeds": TRAIN["seeds"],
    "epochs": dataclasses.replace(TRAIN["epochs"], default=THE_GRID_S),
    "limit": dataclasses.replace(LIMIT, default=THE_GRID_S),
    "device": DEVICE,
    "run_dir": TRAIN["run_dir"],
    "cache_dir": CACHE_DIR,
}
"""Options of ``sweep``, in the order of its ``--help``."""


def kind(config: type, name: str) -> type:
    """The type in which the command line takes a field: text for choices and for lists."""
    hint: Any = get_type_hints(config)[name]
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint if hint in KIND_NAMES else str


def default_text(config: type, name: str) -> str:
    """The default of a field in words: ``1,2,3``, ``2e-5``; empty if there is none."""
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    if default in (None, dataclasses.MISSING) or isinstance(default, bool):
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)


def _option_name(field: str) -> str:
    return field.replace("_", "-")


OPTIONS = {
    _option_name(name): kind(config, name)
    for config, settings in ((ExtractConfig, EXTRACT), (TrainConfig, TRAIN))
    for name in settings
}
"""What ``[defaults]`` of ``kr2cache.toml`` may set: long names of options, without dashes in front, and their types."""
TRAIN_OPTIONS = {
    name: kind
    for name, kind in OPTIONS.items()
    if name in {_option_name(field.name) for field in dataclasses.fields(TrainConfig)}
}
"""The options that concern a training: what the settings of a grid may be."""
