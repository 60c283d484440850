"""Collects wheels of the libraries that a GPU machine may lack. It has no network, but has torch and transformers.

python tests/gpu/wheels.py .wheels
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".wheels"
PYTHON = "3.12"
READY = (
    "datasets", "dill", "multiprocess", "pydantic", "pydantic_core", "annotated-types", "typing-inspection",
    "h5py", "typer", "xxhash",
)  # fmt: skip
"""Libraries with wheels. The last four are small and are included although the machine may have older versions.
typer needs pydantic."""
TO_BUILD = ("seqeval",)
"""Libraries without wheels."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)] + ["manylinux2014_x86_64"]
MOST_BYTES = 40 * 10**6


def main(folder: Path) -> int:
    """Returns the exit code."""
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    here = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    here += [word for platform in PLATFORMS for word in ("--platform", platform)]
    ready = [f"{name}=={tested[name]}" for name in READY]
    subprocess.run([*pip, "download", "--no-deps", *here, "--dest", str(folder), *ready], check=True)
    built = [f"{name}=={tested[name]}" for name in TO_BUILD]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), *built], check=True)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 1e6:6.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:6.1f} MB in total, of at most {MOST_BYTES / 1e6:.0f}")
    return 0 if len(sizes) == len(ready) + len(built) and sum(sizes.values()) <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else WHEELS))
