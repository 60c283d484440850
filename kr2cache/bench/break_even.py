"""How much training pays for a cache, and how much disk the cache takes."""

from __future__ import annotations

import math
from typing import Any

from kr2cache.bench import BenchConfig
from kr2cache.bench.race import Race
from kr2cache.bench.stage_one import OURS
from kr2cache.bench.training import CACHED, ONLINE, STEPS
from kr2cache.cache.dtypes import DTYPES
from kr2cache.extraction.planning import ExtractPlan
from kr2cache.models.encode import encode_examples
from kr2cache.models.registry import find_model
from kr2cache.models.tokenizers import load_tokenizer
from kr2cache.system.console import bytes_text
from kr2cache.tasks import find_task


def of(extracted: Race, plan: ExtractPlan, trained: Race, config: BenchConfig) -> dict[str, Any]:
    """Computed from the medians of both stages: stage one's time per token, divided by the time that a cache saves per
    use of an example.

    Loading the resource and tokenising are not counted: a run without a cache does both too.
    """
    training = config.training
    task = find_task(training.task, training.tasks)
    examples = task.read("train", training.data, training.limit)
    tokenizer = load_tokenizer(find_model(training.resource or "", training.models), words=task.words)
    tokens = int(encode_examples(tokenizer, examples, task, training.max_length).n_tokens.sum())
    once = extracted.medians[OURS] / plan.tokens * tokens
    used = min(STEPS, max(1, len(examples) // training.batch_size)) * min(training.batch_size, len(examples))
    saved = (trained.medians[ONLINE] - trained.medians[CACHED]) / used * len(examples)
    epochs = once / saved if saved > 0 else math.inf
    disk = tokens * plan.model_layers * DTYPES["float16"].row_bytes(plan.width)
    about = (
        f"{len(examples):,} training examples ({tokens:,} tokens): extracting them takes {once:.1f} s and "
        f"{bytes_text(disk)} of disk; each epoch of each run saves {saved:.1f} s"
    )
    paid = f"paid for after {epochs:.1f} epochs x runs" if saved > 0 else "not measurable here"
    paper = (
        f" The paper's ablation, 10 epochs x 3 seeds x 9 fusions, is 270 of them: {270 * saved - once:,.0f} s saved."
    )
    return {
        "examples": len(examples),
        "tokens": tokens,
        "stage_one_seconds": once,
        "saved_seconds_per_epoch": saved,
        "epochs_times_runs": epochs if saved > 0 else None,
        "disk_bytes": disk,
        "text": f"Break-even, {about}: {paid}.{paper if saved > 0 else ''}",
    }
