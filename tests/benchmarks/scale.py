"""How fast are opening and look-ups with millions of sequences?  The files are sparse (no states), the index is real.

python tests/benchmarks/scale.py --sequences 5000000 --folder /somewhere/with/few/GB
python tests/benchmarks/scale.py --sequences 100000000 --parts 100 --folder /somewhere/with/10/GB
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kr2cache.cache import create
from kr2cache.cache.format import SequenceIndex, ShardHeader, encode_ids
from kr2cache.cache.shard import open_shard, shard_paths
from kr2cache.system.console import bytes_text

LAYERS, WIDTH = 13, 768
"""Layers (L + 1) and width of BERT-base."""
MEAN_TOKENS = 27
"""Mean number of tokens of an SNLI pair, including special tokens."""
SHARD_BYTES = 16 * 2**30

CHILD = """
import json, sys, time
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))
from kr2cache import FeatureCache
import numpy as np
before, started, cpu = memory("RssAnon"), time.perf_counter(), time.process_time()
cache = FeatureCache.open(sys.argv[1:])
opened, opened_cpu = time.perf_counter() - started, time.process_time() - cpu
own_opened = memory("RssAnon") - before
draw = np.random.default_rng(0)
n = len(cache.complete)
started, cpu = time.perf_counter(), time.process_time()
cache.positions(["train-0"])
first, first_cpu = time.perf_counter() - started, time.process_time() - cpu
own_index, own_peak = memory("RssAnon") - before, memory("VmHWM")
names = [f"train-{i}" for i in draw.integers(0, n, 100_000)]
started = time.perf_counter()
found = cache.positions(names)
looked_up = time.perf_counter() - started
assert found.tolist() == [int(name[6:]) for name in names]
started = time.perf_counter()
for name in names[:20_000]:
    cache.positions([name])
one = (time.perf_counter() - started) / 20_000
picks = [names[start : start + 32] for start in range(0, 32 * 200, 32)]
started = time.perf_counter()
for pick in picks:
    cache.positions(pick)
of_a_batch = time.perf_counter() - started
started = time.perf_counter()
read = sum(cache.batch(pick, layers=(9, 10, 11, 12)).states.nbytes for pick in picks)
sampled = time.perf_counter() - started
print(json.dumps({"sequences": n, "open_s": opened, "open_cpu_s": opened_cpu,
    "first_lookup_s": first, "first_lookup_cpu_s": first_cpu, "lookup_100k_s": looked_up,
    "lookup_one_us": 1e6 * one, "lookup_batch_us": 1e6 * of_a_batch / len(picks), "opened_bytes": own_opened,
    "index_bytes": own_index, "peak_bytes": own_peak, "files_bytes": memory("RssFile"),
    "batches_per_s": len(picks) / sampled, "read_bytes_per_s": read / sampled}))
"""


def described(first: int, stop: int) -> tuple[ShardHeader, SequenceIndex]:
    """Header and index of the sequences from ``first`` to before ``stop``: float16, the shape of BERT-base, random
    lengths as in SNLI.
    """
    sequences = stop - first
    lengths = np.clip(np.random.default_rng(first).poisson(MEAN_TOKENS, sequences), 5, 128).astype(np.int32)
    tokens = int(lengths.sum(dtype=np.int64))
    index = SequenceIndex(
        ids=encode_ids([f"train-{i}" for i in range(first, stop)]),
        n_tokens=lengths,
        text_xxh3=np.arange(first, stop, dtype=np.uint64),
        input_id=np.zeros(tokens, dtype=np.int32),
        word_index=np.zeros(tokens, dtype=np.int32),
    )
    header = ShardHeader(
        dtype="float16",
        layers=tuple(range(LAYERS)),
        model_layers=LAYERS,
        width=WIDTH,
        fingerprint=f"{first:064}",
        provenance={"chosen": {"resource": "simulated"}, "found": {"weights": "0" * 32, "sequences": sequences}},
        batch_plan={},
    )
    return header, index


def make(folder: Path, first: int, stop: int) -> None:
    """Make the shards. Every sequence is marked complete, but no states are written."""
    header, index = described(first, stop)
    create.reserve = lambda *_: False  # reserve no space: the disk has no terabytes
    create.free_bytes = lambda *_: 2**60
    folder.mkdir(exist_ok=True)
    for part in create.shard_parts(folder, header, index, SHARD_BYTES):
        create.create_shard(part.path, header, index.part(part.start, part.stop), folder)
    for path in shard_paths(folder):
        shard = open_shard(path)
        with path.open("r+b") as file:
            file.seek(shard.array_offset("examples/complete"))
            file.write(b"\1" * len(shard.ids))
        # These are all zeros. They have five times as many bytes as the rest of the index, so they become sparse too.
        for name in ("tokens/input_id", "tokens/word_index"):
            place = ("--offset", str(shard.array_offset(name)), "--length", str(shard.layout.datasets[name].nbytes))
            subprocess.run(["fallocate", "--punch-hole", *place, path], check=True)


def measure(folders: list[Path]) -> dict[str, float]:
    """Times of opening, looking up and sampling, measured in a new process."""
    child = subprocess.run([sys.executable, "-c", CHILD, *folders], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(child.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, action="append", required=True, help="may be given several times")
    parser.add_argument("--parts", type=int, default=1, help="the number of caches that are opened as one")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    for sequences in arguments.sequences:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            started = time.perf_counter()
            parts = [Path(folder) / f"part-{number:04}" for number in range(arguments.parts)]
            for number, part in enumerate(parts):
                bounds = (sequences * at // len(parts) for at in (number, number + 1))
                make(part, *bounds)
            made = time.perf_counter() - started
            files = list(Path(folder).glob("*/*.h5"))
            size = sum(path.stat().st_size for path in files)
            on_disk = sum(512 * path.stat().st_blocks for path in files)
            print(
                f"{sequences:,} sequences, {len(parts)} folders, {len(files)} shards, {bytes_text(size)}, "
                f"{bytes_text(on_disk)} on disk, made in {made:.0f} s"
            )
            for name, value in measure(parts).items():
                print(f"  {name:20} {value:,.4g}")


if __name__ == "__main__":
    main()
