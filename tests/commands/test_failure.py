"""Errors that no module foresees, in words."""

from __future__ import annotations

import torch

from kr2cache.commands.failure import explain


def test_memory_that_runs_out_anywhere_is_said_in_our_words() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    ):
        said = explain(error)
        assert (said.kind, said.code) == ("DeviceMemoryError", 1)
        assert str(error).splitlines()[0] in said.message
        assert "--device cpu" in said.remedy
    other = explain(RuntimeError("shapes differ"))
    assert other.kind == "RuntimeError"
    assert "not expected" in other.remedy
