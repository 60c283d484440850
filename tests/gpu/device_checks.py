"""Checks of results on a device. Each compares with an independent computation."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from device_processes import PATIENCE_S, kill_in_the_middle, only_cache, same_bytes, start_extract
from device_scene import Scene
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel

from kr2cache.cache.reader import FeatureCache
from kr2cache.errors import DeviceMemoryError
from kr2cache.experiment import prepare as prepare_module
from kr2cache.experiment.pipeline import train
from kr2cache.experiment.prepare import prepare
from kr2cache.experiment.shared import Shared
from kr2cache.extraction.packing import Packer
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.extraction.repair import repair
from kr2cache.extraction.rerun import RerunConfig
from kr2cache.fusion import parse_fusion
from kr2cache.models.stack import load_encoder
from kr2cache.models.states import hidden_states
from kr2cache.prediction.predict import Predictor
from kr2cache.training.batches import SplitData
from kr2cache.training.evaluate import example_logits
from kr2cache.training.features import DeviceFeatures, ResourceFeatures, joined

ROUNDING = {"float32": 2e-5, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
"""Compute dtype to the largest allowed rounding error, relative to the largest state of the layer. On a CPU, with
BERT-base's shape, the error was 1.1e-6 (float32), 1.5e-2 (bfloat16) and 1.5e-3 (float16)."""
NO_KERNEL = ("No available kernel", "No viable backend")
"""Parts of torch's error for a backend that this device or this dtype does not have."""
STORED = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Seen:
    """One result of a check."""

    what: str
    passed: bool | None
    """None if this machine cannot check it; ``seen`` gives the reason."""
    seen: str
    limit: str = ""


def run_checks(scene: Scene) -> Iterator[tuple[str, Seen, float]]:
    """Run all checks. A check that raises an error has failed.

    Yields:
        Title of the check, one of its results, and the seconds since the result before.
    """
    for check in CHECKS:
        since = time.perf_counter()
        try:
            for seen in check(scene):
                yield _title(check), seen, time.perf_counter() - since
                since = time.perf_counter()
        except Exception as error:  # any error: the other checks should still run
            if not isinstance(error, AssertionError):
                sys.excepthook(type(error), error, error.__traceback__)
            lines = str(error).strip().splitlines() or [""]
            yield _title(check), Seen("error in the check", False, f"{type(error).__name__}: {lines[-1]}"), 0.0


def _title(check: Callable[[Scene], Iterator[Seen]]) -> str:
    return (check.__doc__ or "").splitlines()[0].rstrip(".")


# Stage one -----------------------------------------------------------------------------------------------------------


def states(scene: Scene) -> Iterator[Seen]:
    """All layers equal those of transformers on the CPU."""
    plan = scene.plan()
    batch = _mixed_batch(plan)
    expected = _reference(scene, plan, batch)
    encoder = load_encoder(plan.spec).to(scene.device)  # type: ignore[arg-type]  # transformers' annotation
    for name, limit in ROUNDING.items():
        compute_dtype = "float32" if name == "tf32" else name
        with matmul_precision("high" if name == "tf32" else "highest"):
            layers = hidden_states(encoder, plan.index, batch, pad_id=plan.pad_id, compute_dtype=compute_dtype)
        yield _compare(f"{len(layers)} layers in {name}", layers, expected, plan.index.n_tokens[batch], limit)


def backends(scene: Scene) -> Iterator[Seen]:
    """SDPA's backends agree within rounding."""
    plan = scene.plan()
    lengths = plan.index.n_tokens
    length = int(np.bincount(lengths).argmax())
    batch = np.flatnonzero(lengths == length)[:8]  # of equal lengths, because flash attention takes no mask
    expected = _reference(scene, plan, batch)
    encoder = load_encoder(plan.spec).to(scene.device)  # type: ignore[arg-type]
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
        for compute_dtype in ("float32", "bfloat16"):
            what = f"{backend.name.lower()} in {compute_dtype}"
            try:
                with sdpa_kernel(backend):
                    layers = hidden_states(encoder, plan.index, batch, pad_id=plan.pad_id, compute_dtype=compute_dtype)
            except RuntimeError as error:
                if not any(part in str(error) for part in NO_KERNEL):
                    raise
                yield Seen(what, None, "not available here")
                continue
            yield _compare(what, layers, expected, lengths[batch], ROUNDING[compute_dtype])


def packing(scene: Scene) -> Iterator[Seen]:
    """States packed on the device equal those that NumPy cuts and rounds, bit for bit."""
    plan = scene.plan()
    batch = _mixed_batch(plan)
    encoder = load_encoder(plan.spec).to(scene.device)  # type: ignore[arg-type]
    layers = hidden_states(encoder, plan.index, batch, pad_id=plan.pad_id, compute_dtype="float32")
    padded = np.stack([layer.cpu().numpy() for layer in layers], axis=1)
    rows = np.concatenate(
        [padded[i, :, :length].reshape(-1, plan.width) for i, length in enumerate(plan.index.n_tokens[batch])]
    )
    for dtype in ("float16", "float32", "bfloat16", "int8"):
        pack = Packer(plan.index, plan.layers, dtype, scene.device)
        (packed,) = [*pack(batch, layers), *pack.flush()]
        values, scale = _rounded(rows, dtype)
        wrong = int((packed.raw.view(values.dtype) != values).sum())
        if scale is not None:
            assert packed.scale is not None
            wrong += int((packed.scale != scale).sum())
        yield Seen(f"{values.size:,} values in {dtype}", wrong == 0, f"{wrong:,} differ", "0")


def processes(scene: Scene) -> Iterator[Seen]:
    """Three processes share the device: one is killed and continues. A damaged cache is repaired."""
    own = {split: scene.extract(split=split).cache for split in scene.scale.sentences}
    elsewhere = scene.folder / "processes"
    jobs = {split: start_extract(scene, split, elsewhere) for split in own}
    complete = kill_in_the_middle(jobs.pop("train"), elsewhere)
    for split, job in jobs.items():
        yield _finished(f"{split} extracted beside other processes", job, own[split], elsewhere, split)
    yield Seen(
        "killed with SIGKILL in the middle",
        0 < complete < 1,
        f"{complete:.1%} complete",
        "more than 0 %, less than 100 %",
    )
    yield _finished(
        "the killed extraction continues", start_extract(scene, "train", elsewhere), own["train"], elsewhere, "train"
    )
    train_cache = only_cache(elsewhere, "train")
    shard = next(train_cache.glob("*.h5"))
    cache = FeatureCache.open(train_cache)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        old = file.read(1_000)
        file.seek(-len(old), os.SEEK_CUR)
        file.write(bytes(255 - byte for byte in old))
    result = repair(RerunConfig(folder=train_cache, resource=str(scene.resource), device=str(scene.device)))
    same = same_bytes(own["train"], train_cache)
    damaged = 0 < len(result.damaged) < len(cache.n_tokens)
    yield Seen(
        "1,000 bytes damaged, repaired", damaged and same, f"{len(result.damaged)} damaged, bytes {_alike(same)}",
        "the same",
    )  # fmt: skip


def memory(scene: Scene) -> Iterator[Seen]:
    """Too little device memory: an extraction halves its budget, a training gives advice."""
    if scene.device.type != "cuda":
        yield Seen(
            "a GPU's memory",
            None,
            "no GPU here; tests/extraction/test_budget.py and tests/training/test_trial.py simulate it",
        )
        return
    whole = FeatureCache.open(scene.extract(split="dev").cache)
    encoder = load_encoder(scene.plan(split="dev").spec)
    states_bytes = 4 * (scene.scale.resource["layers"] + 1) * scene.scale.resource["width"]
    room = sum(parameter.nbytes for parameter in encoder.parameters()) + 12_000 * states_bytes
    del encoder
    with _memory_limited(scene.device, room):
        # The whole split (4,600 tokens) does not fit as one batch.
        result = scene.extract(split="dev", tokens_per_batch=16_384, cache_dir=scene.folder / "scarce")
    cache = FeatureCache.open(result.cache)
    budget = FeatureCache.open(result.cache).batch_plan["tokens_per_batch"]
    yield Seen("the budget of 16,384 positions is halved", budget < 16_384, f"{budget:,}", "less")
    error = max(_relative(cache[name], whole[name]) for name in whole.ids)
    yield Seen("with a halved budget, the states are the same", error < 2e-3, f"{error:.1e}", "2e-3")
    with _memory_limited(scene.device, 2**29):
        try:
            train(scene.training(batch_size=4_096, limit=4_096, method="kreader", run_dir=scene.folder / "scarce-runs"))
        except DeviceMemoryError as refused:
            yield Seen("a training that is too large is refused", True, str(refused).splitlines()[0])
        else:
            yield Seen("a training that is too large is refused", False, "it was not refused")


# Stage two -----------------------------------------------------------------------------------------------------------


def features(scene: Scene) -> Iterator[Seen]:
    """States on the device, from the mapped file and from pinned memory are the same."""
    ids, picks = None, np.random.default_rng(0)
    for dtype in ("float16", "int8"):
        cache = FeatureCache.open(scene.extract(split="dev", dtype=dtype).cache)
        ids = cache.ids
        for name in ("fuse", "last2", "layer1"):
            fusion = parse_fusion(name, cache.model_layers)
            mapped = ResourceFeatures(cache, ids, fusion, keep_layers=False)
            there = DeviceFeatures(mapped, scene.device)
            on_gpu = scene.device.type == "cuda"
            pinned = ResourceFeatures(cache, ids, fusion, keep_layers=False, pinned=on_gpu)
            chosen = [picks.permutation(len(ids))[:16].tolist() for _ in range(20)]
            # In quick succession: no batch may overwrite memory from which another batch is still being copied.
            moved = [
                torch.from_numpy(pinned.batch(numbers)[0]).to(scene.device, non_blocking=True) for numbers in chosen
            ]
            wrong = 0
            for numbers, from_pinned in zip(chosen, moved, strict=True):
                here, mask = mapped.batch(numbers)
                gathered, same_mask = there.batch(numbers)
                wrong += int((gathered.cpu().numpy() != here).sum()) + int((mask != same_mask).sum())
                wrong += int((from_pinned != gathered).sum())
            yield Seen(f"{name} of {dtype}", wrong == 0, f"{wrong} values differ", "0")
    yield _two_places(scene, cache)


def _two_places(scene: Scene, cache: FeatureCache) -> Seen:
    """Of two resources, the states of one are on the device, those of the other in pinned memory."""
    one, other = (parse_fusion(name, cache.model_layers) for name in ("layer1", "fuse"))
    mapped = [ResourceFeatures(cache, cache.ids, fusion, keep_layers=False) for fusion in (one, other)]
    on_gpu = scene.device.type == "cuda"
    pinned = ResourceFeatures(cache, cache.ids, other, keep_layers=False, pinned=on_gpu)
    both = joined([DeviceFeatures(mapped[0], scene.device), pinned])
    chosen = [np.random.default_rng(seed).permutation(len(cache.ids))[:16].tolist() for seed in range(20)]
    moved, wrong, elsewhere = [both.batch(numbers) for numbers in chosen], 0, 0
    for numbers, (found, mask) in zip(chosen, moved, strict=True):
        expected = [part.batch(numbers) for part in mapped]
        for states, (here, _) in zip(map(torch.as_tensor, found), expected, strict=True):
            wrong += states.shape != here.shape or int((states.cpu().numpy() != here).sum())
            elsewhere += states.device.type != scene.device.type
        wrong += int((mask != np.concatenate([own for _, own in expected], axis=1)).sum())
    what = "two resources, one of them in memory"
    return Seen(what, wrong == elsewhere == 0, f"{wrong} values differ, {elsewhere} not on the device", "0")


def training(scene: Scene) -> Iterator[Seen]:
    """Short trainings reach the same losses as on the CPU."""
    for method in ("kr2", "kreader", "kd"):
        settings: dict[str, Any] = {"method": method, "teacher": "reader" if method == "kd" else None}
        on_cpu = _losses(scene, "cpu", device="cpu", **settings)
        there = _losses(scene, "there", **settings)
        error = max(abs(one / other - 1) for one, other in zip(there, on_cpu, strict=True))
        yield Seen(f"{method} in float32", error < 2e-3, f"{error:.1e} of the loss", "2e-3")
        short = _losses(scene, "bf16", training={"bf16": True}, **settings)
        error = max(abs(one / other - 1) for one, other in zip(short, on_cpu, strict=True))
        yield Seen(f"{method} in bfloat16", error < 2e-2, f"{error:.1e} of the loss", "2e-2")


def several(scene: Scene) -> Iterator[Seen]:
    """Trainings with two resources reach the CPU's losses, wherever their states are."""
    for fusion in ("softmax", "mix"):
        settings = _two_resources(scene, fusion)
        on_cpu = _losses(scene, "cpu", device="cpu", **settings)
        there = _losses(scene, "there", **settings)
        job = prepare(scene.training(device="cpu", **settings), Shared()).job
        inputs = [split.features for split in job.splits.values()]
        room = sum(states.parts[0].nbytes for states in inputs)  # type: ignore[union-attr]  # ResourceFeatures
        with mock.patch.object(prepare_module, "room_on", return_value=room):
            apart = _losses(scene, "apart", **settings)
        for where, losses in (("on the device", there), ("one on the device, one in memory", apart)):
            error = max(abs(one / other - 1) for one, other in zip(losses, on_cpu, strict=True))
            yield Seen(f"{fusion}, states {where}", error < 2e-3, f"{error:.1e} of the loss", "2e-3")


def _two_resources(scene: Scene, fusion: str) -> dict[str, Any]:
    resources = [str(scene.second), str(scene.resource)]
    return {"resource": resources, "fusion": fusion, "fusion_learning_rate": 1e-2}


def prediction(scene: Scene) -> Iterator[Seen]:
    """Predictions with the resource running equal predictions from cached states."""
    for what, settings in (("one resource", {}), ("two resources", _two_resources(scene, "mix"))):
        config = scene.training(run_dir=scene.folder / "predicted", **settings)
        run = train(config).runs[0]
        predictor = Predictor.load(run.folder, config.models, device=str(scene.device))
        job = prepare(config, Shared()).job
        data: SplitData = job.splits["test"]
        cached = np.concatenate(example_logits(predictor.reader, data, job.task, job.tokenizer))
        online = np.concatenate(predictor.logits([replace(example, label=None) for example in data.examples]))
        error = _relative(online, cached)
        yield Seen(f"{what}: {online.size:,} logits", error < 1e-2, f"{error:.1e}", "1e-2")
        lines = (run.folder / "predictions-test.jsonl").read_text("utf-8").splitlines()
        then = [label for line in lines for label in json.loads(line)["predicted"]]
        now = [label for one in predictor(data.examples) for label in one.predicted]
        alike = float(np.mean([one == other for one, other in zip(then, now, strict=True)]))
        yield Seen(f"{what}: labels", alike > 0.999, f"{alike:.2%} alike", "99.9%")


def given_back(scene: Scene) -> Iterator[Seen]:
    """Device memory is freed."""
    gc.collect()
    if scene.device.type != "cuda":
        yield Seen("a GPU's memory", None, "no GPU here")
        return
    # cuBLAS keeps 32 MiB for every stream that used it. These hold no states.
    torch._C._cuda_clearCublasWorkspaces()
    left = torch.cuda.memory_allocated(scene.device)
    yield Seen("memory in use after all checks", left < 2**24, f"{left / 2**20:.1f} MiB", "16 MiB")


CHECKS: tuple[Callable[[Scene], Iterator[Seen]], ...] = (
    states, packing, backends, features, processes, training, several, prediction, memory, given_back,
)  # fmt: skip


# Independent computations --------------------------------------------------------------------------------------------


def _mixed_batch(plan: ExtractPlan) -> NDArray[np.intp]:
    """Twelve sequences from the shortest to the longest, so that there is padding."""
    order = np.argsort(plan.index.n_tokens, kind="stable")
    return order[np.linspace(0, len(order) - 1, 12).astype(np.intp)]


def _reference(scene: Scene, plan: ExtractPlan, batch: NDArray[np.intp]) -> list[NDArray[np.float32]]:
    """States by transformers on the CPU in float32, one sequence at a time: shape (L, T, D) each."""
    model = _on_cpu(scene.resource)
    first = plan.index.first_token
    found = []
    for i in batch:
        tokens = torch.from_numpy(plan.index.input_id[first[i] : first[i + 1]].astype(np.int64))[None]
        with torch.inference_mode():
            output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True)
        found.append(torch.cat(output.hidden_states).numpy())
    return found


@functools.cache
def _on_cpu(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def _compare(
    what: str,
    layers: tuple[torch.Tensor, ...],
    expected: list[NDArray[np.float32]],
    lengths: NDArray[Any],
    limit: float,
) -> Seen:
    stacked = torch.stack([layer.float() for layer in layers], dim=1).cpu().numpy()
    error = 0.0
    for row, one, length in zip(stacked, expected, lengths.tolist(), strict=True):
        difference = np.abs(row[:, :length] - one).max(axis=(1, 2))
        error = max(error, float((difference / np.abs(one).max(axis=(1, 2))).max()))
    return Seen(what, error < limit, f"{error:.1e} of the largest", f"{limit:.0e}")


def _relative(one: NDArray[Any], other: NDArray[Any]) -> float:
    other = other.astype(np.float32)
    return float(np.abs(one.astype(np.float32) - other).max() / np.abs(other).max())


def _rounded(rows: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Values and scales as in the cache format, computed only by NumPy."""
    if dtype in STORED:
        return rows.astype(STORED[dtype]), None
    if dtype == "bfloat16":  # to the nearest, ties to even
        bits = np.ascontiguousarray(rows).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16), None
    scale = np.abs(rows).max(axis=1) / np.float32(127)
    return np.rint(rows / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8), scale


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _memory_limited(device: torch.device, room: int) -> Iterator[None]:
    """Inside the block, only ``room`` bytes more than now can be used, as on a smaller GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + room) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _losses(scene: Scene, name: str, **settings: Any) -> list[float]:
    """The training loss of each epoch."""
    result = train(scene.training(run_dir=scene.folder / f"runs-{name}", **settings))
    history = json.loads((result.runs[0].folder / "history.json").read_text("utf-8"))["epochs"]
    return [entry["loss"] for entry in history if "loss" in entry]


# Processes -----------------------------------------------------------------------------------------------------------


def _finished(what: str, job: subprocess.Popen[bytes], expected: Path, cache_dir: Path, split: str) -> Seen:
    """Whether the process succeeded and its cache has the bytes of ``expected``."""
    lines = job.communicate(timeout=PATIENCE_S)[1].decode("utf-8", "replace").strip().splitlines()
    if job.returncode:
        return Seen(what, False, f"exit code {job.returncode}: {lines[-1] if lines else 'no message'}", "exit code 0")
    same = same_bytes(expected, only_cache(cache_dir, split))
    return Seen(what, same, f"bytes {_alike(same)}", "the same")


def _alike(same: bool) -> str:
    return "the same" if same else "DIFFERENT"
