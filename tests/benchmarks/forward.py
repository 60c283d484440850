"""Ways to make stage one's forward pass cheaper. Each alternates with the plain pass in short slices. They run in
groups, because a way that fills the processor's caches or the heap slows the others.

python tests/benchmarks/forward.py --data FOLDER --task udpos-de [--compile]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import nn

from kr2cache.config import ExtractConfig
from kr2cache.extraction.planning import ExtractPlan, plan_extraction
from kr2cache.models import forward
from kr2cache.models.encode import length_sorted_batches
from kr2cache.models.stack import open_encoder
from kr2cache.models.states import hidden_states
from kr2cache.system.allocator import keep_free_memory

SLICES = 10
"""A pass is divided into this number of slices with about the same number of tokens."""


@dataclass
class Try:
    """A way to run the model over the split."""

    name: str
    model: nn.Module
    positions_per_batch: int = 1_024
    compute_dtype: str = "float32"
    threads: int = field(default_factory=torch.get_num_threads)

    def slices(self, plan: ExtractPlan) -> Iterator[None]:
        """One pass, with a pause after each of ``SLICES`` slices."""
        seen, number = 0, 0
        for batch in length_sorted_batches(plan.index.n_tokens, self.positions_per_batch):
            while number <= SLICES * seen / plan.tokens:
                number += 1
                yield
            hidden_states(self.model, plan.index, batch, pad_id=plan.pad_id, compute_dtype=self.compute_dtype)  # type: ignore[arg-type]
            seen += int(plan.index.n_tokens[batch].sum())


def in_turns(tries: list[Try], plan: ExtractPlan) -> dict[str, float]:
    """Name to the seconds of one pass."""
    running = {one.name: one.slices(plan) for one in tries}
    spent = dict.fromkeys(running, 0.0)
    threads = torch.get_num_threads()
    for turn in range(SLICES + 1):
        for place in range(len(tries)):
            one = tries[(place + turn) % len(tries)]
            torch.set_num_threads(one.threads)
            started = time.perf_counter()
            next(running[one.name], None)
            spent[one.name] += time.perf_counter() - started
    torch.set_num_threads(threads)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--resource", default="minilm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler")
    arguments = parser.parse_args()
    config = ExtractConfig(
        resource=arguments.resource, split="test", task=arguments.task, data=arguments.data, device="cpu"
    )
    plan = plan_extraction(config)
    if plan.tokens < forward.WORTHWHILE:
        parser.error(f"{plan.tokens:,} tokens are too few: the cheaper ways need at least {forward.WORTHWHILE:,}.")
    encoder = open_encoder(plan.spec).encoder
    keep_free_memory()  # as the command line does
    with contextlib.ExitStack() as inside:

        def changed(*, pack: bool, in_place: bool) -> nn.Module:
            model = copy.deepcopy(encoder)
            with contextlib.ExitStack() as only:
                only.enter_context(mock.patch.object(forward, "packing_pays_here", lambda: pack))
                if not in_place:
                    only.enter_context(mock.patch.object(forward, "_compute_in_place", lambda *_: None))
                inside.enter_context(forward.cheaper_forward(model, plan.tokens))
            return model

        packed, in_place = changed(pack=True, in_place=False), changed(pack=False, in_place=True)
        both = changed(pack=True, in_place=True)
        plain = Try("plain, 1,024 positions per batch", encoder)
        groups = [
            [
                plain,
                Try("in place (used with AVX2)", in_place),
                Try("oneDNN, weights prepacked, GELU inside", packed),
                Try("prepacked and in place (used with AVX-512)", both),
            ],
            [
                plain,
                Try("plain, 512 positions per batch", encoder, 512),
                Try("plain, 2,048", encoder, 2_048),
                Try("plain, 4,096", encoder, 4_096),
                Try("prepacked and in place, 512", both, 512),
                Try("prepacked and in place, 2,048", both, 2_048),
            ],
            [
                plain,
                Try("plain, one thread", encoder, threads=1),
                Try("plain, autocast to bfloat16 (other states)", encoder, compute_dtype="bfloat16"),
            ],
        ]
        if arguments.compile:
            groups[2].append(Try("torch.compile, dynamic shapes", torch.compile(encoder, dynamic=True)))  # type: ignore[arg-type]
        for group in groups:
            _say(group, plan, arguments.repeats)
    batches = length_sorted_batches(plan.index.n_tokens, 1_024)
    positions = sum(len(batch) * int(plan.index.n_tokens[batch].max()) for batch in batches)
    print(f"padding: {100 * (1 - plan.tokens / positions):.1f} % of positions; packing sequences could not save more")


def _say(tries: list[Try], plan: ExtractPlan, repeats: int) -> None:
    in_turns(tries, plan)
    seconds = [in_turns(tries, plan) for _ in range(repeats)]
    for one in tries:
        ratios = [turn[one.name] / turn[tries[0].name] for turn in seconds]
        print(f"{one.name:46} {statistics.median(ratios):5.3f}  ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


if __name__ == "__main__":
    main()
