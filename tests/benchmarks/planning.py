"""How long does planning take, and how much memory?  It reads and tokenises, before the model runs.

python tests/benchmarks/planning.py --resource MODEL --data FOLDER --task udpos-en --sentences 100000 --processes 1 2

The sentences of one split are repeated with new ids until there are enough. Each measurement runs in a process of its
own. The peak is the memory that this process takes in addition to what it had before. Each helper process takes 0.4 GB
more for its libraries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kr2cache.system.console import bytes_text
from kr2cache.tasks import Example, find_task

CHILD = """
import itertools, json, os, sys, time
from pathlib import Path
import h5py, numpy, torch, transformers, kr2cache.extraction.extract
from kr2cache.config import ExtractConfig
from kr2cache.extraction.planning import plan_extraction
from kr2cache.store import provenance
from kr2cache.tasks import find_task

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))

if __name__ == "__main__":
    config = ExtractConfig(**json.loads(sys.argv[1]), cache_dir=Path(sys.argv[2]))
    first = itertools.islice(find_task(config.task).examples("train", config.data), 10)
    plan_extraction(config, list(first))  # imports and loads
    before, started = memory("VmRSS"), time.perf_counter()
    plan = plan_extraction(config)
    planned = time.perf_counter() - started
    peak = memory("VmHWM") - before
    provenance.found(plan.index, "", "", plan.template)
    digests = time.perf_counter() - started - planned
    index = plan.index
    started = time.perf_counter()
    plan_extraction(config)  # as a second process does; data of 16 MB or more is not tokenised again
    again = time.perf_counter() - started
    arrays = (index.ids, index.n_tokens, index.text_xxh3, index.input_id, index.word_index, index.segment_id)
    print(json.dumps({"sequences": len(index), "tokens": plan.tokens, "missing": plan.missing_words.total,
        "plan_s": planned, "again_s": again, "digests_s": digests,
        "index_bytes": sum(array.nbytes for array in arrays if array is not None), "peak_bytes": peak,
        "digest": provenance.texts_digest(index) + provenance.tokens_digest(index)}))
"""


def lines_of(example: Example, name: str) -> str:
    """An example in the format of its task's files."""
    (text,) = example.texts
    if isinstance(example.label, tuple):
        words = "".join(f"{i}\t{form}\t_\tX\t_\t_\t_\t_\t_\t_\n" for i, form in enumerate(text, 1))
        return f"# sent_id = {name}\n{words}\n"
    values = {"gold_label": "neutral", "sentence1": text[0], "sentence2": text[1], "pairID": name}
    return json.dumps(values) + "\n"


def make(folder: Path, task: str, data: str, split: str, sentences: int) -> None:
    """Write a training split with ``sentences`` sentences: those of ``data``, repeated with new ids."""
    examples = find_task(task).read(split, data)
    suffix = find_task(task).suffixes[0]
    with (folder / f"train{suffix}").open("w", encoding="utf-8") as file:
        for number, example in enumerate(itertools.islice(itertools.cycle(examples), sentences)):
            file.write(lines_of(example, f"{example.id}-{number}"))


def measure(settings: dict[str, Any], processes: int | None = None) -> dict[str, Any]:
    """Plan in a process of its own, and return its figures.

    Args:
        settings: The settings of the ``ExtractConfig``.
        processes: How many CPU cores it may use; None for all.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "child.py"
        script.write_text(CHILD, "utf-8")
        cores = sorted(os.sched_getaffinity(0))[:processes]
        child = subprocess.run(
            [sys.executable, str(script), json.dumps(settings), str(Path(folder) / "caches")],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    if child.returncode:
        raise RuntimeError(child.stderr)
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resource", required=True)
    parser.add_argument("--task", required=True, help="udpos-LANG or snli")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train", help="the split of --data whose sentences are repeated")
    parser.add_argument("--sentences", type=int, nargs="+", required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="CPU cores to measure with")
    parser.add_argument("--folder", type=Path, default=None, help="where the sentences are written")
    arguments = parser.parse_args()
    for sentences in arguments.sentences:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make(Path(folder), arguments.task, arguments.data, arguments.split, sentences)
            settings = {"resource": arguments.resource, "split": "train", "task": arguments.task, "data": folder}
            first: dict[str, Any] = {}
            for processes in arguments.processes:
                result = measure({**settings, "device": "cpu"}, processes)
                first = first or result
                if result["digest"] != first["digest"]:
                    raise RuntimeError(f"the index is another one with {processes} cores")
                print(
                    f"{sentences:,} sentences, {result['tokens']:,} tokens, {processes} cores: planned in "
                    f"{result['plan_s']:.1f} s ({result['plan_s'] / first['plan_s']:.2f} of the first), peak "
                    f"{bytes_text(result['peak_bytes'])} more, index {bytes_text(result['index_bytes'])}, digests "
                    f"{result['digests_s']:.2f} s, planned again in {result['again_s']:.1f} s"
                )


if __name__ == "__main__":
    main()
