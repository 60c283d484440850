"""Which device the work runs on."""

from __future__ import annotations

import gc
import os
import re
from typing import TYPE_CHECKING

from kr2cache.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import torch


def check_device_name(name: str) -> None:
    """Raise ``ConfigError`` for a name that is not a device on any machine. Does not import torch."""
    if not re.fullmatch(r"auto|mps|(cpu|cuda)(:[0-9]+)?", name):
        raise ConfigError(f"--device {name!r} is not a device.", "Give auto, cpu, cuda, cuda:1 or mps.")


DEVICE_MAPS = ("auto",)


def check_device_map(device_map: str | None, device: str) -> None:
    """Raise an error unless ``--device-map`` exists and goes together with ``--device``. Does not import torch."""
    if device_map is None:
        return
    if device_map not in DEVICE_MAPS:
        raise unknown_name("device map", device_map, DEVICE_MAPS)
    if device != "auto":
        raise ConfigError(
            f"--device-map {device_map} chooses devices by itself, so --device {device} has no meaning.",
            "Leave out one of the two; CUDA_VISIBLE_DEVICES says which GPUs may be used.",
        )


def choose_device(name: str) -> torch.device:
    """``auto`` is the current CUDA GPU, else Apple's GPU, else the CPU. Other names are those of torch.

    Raises:
        ConfigError: If the device does not exist here.
    """
    check_device_name(name)
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if name == "cuda" and torch.cuda.is_available():  # tensors on the GPU name their device with its number
        device = torch.device("cuda", torch.cuda.current_device())
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ConfigError(f"--device {name}: there is no such device on this machine.", "Give --device auto or cpu.")
    return device


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, each in the form of ``CUDA_VISIBLE_DEVICES``."""
    import torch

    count = torch.cuda.device_count()
    named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return named[:count] if named else list(map(str, range(count)))


def wait_for_gpu() -> None:
    """Wait until a GPU has done its work; return at once if no GPU is in use."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


OUT_OF_MEMORY = (
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",  # from the system, when a file of weights is mapped
)
"""Parts of messages of errors for which torch and safetensors have no class."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the computer had too little memory for a tensor."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, torch.OutOfMemoryError)
        or bool(should_reduce_batch_size(error))
        or any(part in str(error) for part in OUT_OF_MEMORY)
    )


def freeing(device: torch.device) -> str:
    """How to free this device's memory, as the start of a sentence."""
    if device.type == "cuda":
        return "Free the GPU's memory (nvidia-smi shows who uses it)"
    return "Close other programs"


def memory_advice(device: torch.device, *others: str) -> str:
    """What to do if something does not fit into a device's memory.

    Args:
        others: More advice, such as "give a smaller --max-length".
    """
    elsewhere = [] if device.type == "cpu" else ["give --device cpu"]
    return f"{', or '.join([freeing(device), *others, *elsewhere])}."


def drop_unused_memory() -> None:
    """Free unused objects, and the blocks of a GPU's memory that torch keeps for later."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def device_name(device: torch.device) -> str:
    """``cpu``, or the GPU's own name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
