"""What could make stage one's forward pass cheaper: every try beside the plain pass, taking turns.

python tests/benchmarks/forward.py --data FOLDER --task udpos-de [--compile]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from kr2cache import models, prepacked
from kr2cache.bench import race
from kr2cache.config import ExtractConfig
from kr2cache.encode import length_sorted_batches
from kr2cache.extract import hidden_states
from kr2cache.planning import plan_extraction
from kr2cache.prepacked import prepacked_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--resource", default="minilm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which needs a C++ compiler")
    arguments = parser.parse_args()
    config = ExtractConfig(
        resource=arguments.resource, split="test", task=arguments.task, data=arguments.data, device="cpu"
    )
    plan = plan_extraction(config)
    encoder, _ = models.open_encoder(plan.spec)
    threads = torch.get_num_threads()

    def forward(model: torch.nn.Module = encoder, budget: int = 1_024, compute_dtype: str = "float32") -> None:
        for batch in length_sorted_batches(plan.index.n_tokens, budget):
            hidden_states(model, plan.index, batch, pad_id=plan.pad_id, compute_dtype=compute_dtype)  # type: ignore[arg-type]

    def packed(budget: int = 1_024) -> None:
        with prepacked_weights(encoder, plan.tokens):
            forward(budget=budget)

    def packed_without_gelu() -> None:
        pairs, prepacked.PAIRS = prepacked.PAIRS, ()  # type: ignore[assignment]
        try:
            packed()
        finally:
            prepacked.PAIRS = pairs

    def one_thread() -> None:
        torch.set_num_threads(1)
        try:
            forward()
        finally:
            torch.set_num_threads(threads)

    tries: dict[str, Callable[[], object]] = {
        "plain, 1,024 positions a batch": forward,
        "oneDNN, weights prepacked, GELU inside": packed,
        "oneDNN, weights prepacked": packed_without_gelu,
        "plain, 512 positions a batch": lambda: forward(budget=512),
        "plain, 2,048": lambda: forward(budget=2_048),
        "plain, 4,096": lambda: forward(budget=4_096),
        "prepacked, 512": lambda: packed(512),
        "prepacked, 2,048": lambda: packed(2_048),
        "plain, one thread": one_thread,
        "plain, autocast to bfloat16 (other states)": lambda: forward(compute_dtype="bfloat16"),
    }
    if arguments.compile:
        compiled = torch.compile(encoder, dynamic=True)
        tries["torch.compile, dynamic shapes"] = lambda: forward(compiled)
    result = race("forward pass", "", tries, repeats=arguments.repeats, target=None)
    batches = length_sorted_batches(plan.index.n_tokens, 1_024)
    positions = sum(len(batch) * int(plan.index.n_tokens[batch].max()) for batch in batches)
    print(f"padding: {100 * (1 - plan.tokens / positions):.1f} % of positions; more than that no packing could save")
    first = next(iter(result.medians.values()))
    for name, median in result.medians.items():
        times = result.seconds[name]
        print(f"{name:46} {median / first:5.2f}  ({min(times) / first:.2f} to {max(times) / first:.2f})")


if __name__ == "__main__":
    main()
