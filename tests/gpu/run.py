"""Checks and measures kr2cache on this machine's GPU, or in small sizes on its CPU. Exit code 1 if a check fails.

make gpu          checks, then measures
make gpu-check    only checks

Wheels in .wheels (make gpu-wheels) are unpacked for this run; nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

LIBRARIES = (
    "torch", "transformers", "accelerate", "huggingface-hub", "datasets", "tokenizers", "safetensors", "h5py", "numpy",
    "scipy", "scikit-learn", "seqeval", "jinja2", "matplotlib", "rich", "typer", "xxhash",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="do not measure")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder for report.json and report.md")
    parser.add_argument("--disk", type=Path, help="folder on the disk to measure (default: the system's temporary one)")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.disk, prefix="kr2cache-gpu-") as folder:
        _unpack_wheels(Path(folder) / "site")
        return _run(chosen, Path(folder))


def _unpack_wheels(site: Path) -> None:
    """Install the wheels of ``.wheels`` into ``site``, for this process and the processes that it starts."""
    wheels = [str(path) for path in (ROOT / ".wheels").glob("*.whl")]
    if wheels and sys.version_info[:2] == (3, 12):  # the version that they were collected for
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(site), *wheels], check=True)
        sys.path.insert(0, str(site))
    # Processes that this one starts should find the same modules.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _run(chosen: argparse.Namespace, folder: Path) -> int:
    versions = _versions()
    missing = [name for name in LIBRARIES if versions[name] is None]
    if missing:
        print(f"Missing: {', '.join(missing)}. make gpu-wheels collects them for a machine without a network.")
        return 2
    import device_checks as checks
    import device_measure as measure
    import torch
    from device_scene import FULL, SMALL, Scene

    from kr2cache.system.console import console
    from kr2cache.system.device import choose_device

    device = choose_device(chosen.device)
    started = time.perf_counter()

    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "hardware": measure.hardware(device),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **versions},
        "checks": [],
        "measured": [],
    }
    scene = Scene(folder, device, FULL if device.type == "cuda" else SMALL)

    def save() -> None:
        """Write the report so far, in case the machine stops before the end."""
        report["seconds"] = round(time.perf_counter() - started, 1)
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            (chosen.out / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
            (chosen.out / "report.md").write_text(as_markdown(report), "utf-8")

    console.quiet = True
    try:
        for check, seen, seconds in checks.run_checks(scene):
            report["checks"].append({"check": check, **vars(seen), "seconds": round(seconds, 2)})
            mark = {True: "ok", False: "FAILED", None: "skipped"}[seen.passed]
            print(f"{time.perf_counter() - started:6.1f} s  {mark:8}  {check}: {seen.what}: {seen.seen}", flush=True)
        report["checks_seconds"] = round(time.perf_counter() - started, 1)
        failed = sum(entry["passed"] is False for entry in report["checks"])
        save()
        if not chosen.check_only:
            for measured in measure.run_measurements(scene):
                report["measured"].append(
                    {**measured.race.json(), "rates": measured.rates, "notes": list(measured.notes)}
                )
                one = measured.race
                print(
                    f"{time.perf_counter() - started:6.1f} s  {one.title}: {one.ratio:.2f} times the limit", flush=True
                )
                save()
    finally:
        console.quiet = False
    print("\n" + as_markdown(report))
    if device.type == "cuda":
        print(f"Memory in use on the device: {torch.cuda.memory_allocated(device) / 2**20:.1f} MiB")
    return 1 if failed else 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str:
    """``COMMIT`` from the environment (for a copy without ``.git``), else the checkout's commit."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return os.environ.get("COMMIT") or commit or "unknown"


def as_markdown(report: dict[str, Any]) -> str:
    """The report as one page: machine and versions, checks, measurements."""
    about = report["hardware"]
    card = about.get("card", f"no GPU ({platform.processor() or platform.machine()}, {about.get('capability')})")
    lines = [
        f"# {card}, {report['date']}",
        "",
        f"Commit {report['commit']}. "
        + ", ".join(f"{name} {value}" for name, value in about.items() if name != "card"),
        f"({report['platform']}).",
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".",
        "",
        f"## Checks, {report.get('checks_seconds', report['seconds'])} s",
        "",
        "| check | part | result | limit | |",
        "|---|---|---|---|---|",
    ]
    for entry in report["checks"]:
        mark = {True: "ok", False: "**FAILED**", None: "skipped"}[entry["passed"]]
        lines.append(f"| {entry['check']} | {entry['what']} | {entry['seen']} | {entry['limit']} | {mark} |")
    if report["measured"]:
        lines += [
            "",
            "## Measurements",
            "",
            "| part | median | ratio to the limit | target | rates |",
            "|---|--:|--:|--:|---|",
        ]
    for entry in report["measured"]:
        lines.append(f"| **{entry['title']}**: {entry['unit']} | | | | |")
        for place, (name, median) in enumerate(entry["medians"].items()):
            ours = place == entry["limits"]
            ratio = entry["ratio"] if ours else median / entry["limit"]
            target = (
                f"{entry['target']:.2f} {'met' if entry['met'] else '**missed**'}" if ours and entry["target"] else ""
            )
            rates = ", ".join(f"{value:,.0f} {unit}" for unit, value in entry["rates"].items()) if ours else ""
            lines.append(f"| {name} | {1000 * median:,.1f} ms | {ratio:.2f} | {target} | {rates} |")
    for entry in report["measured"]:
        if entry["notes"]:
            lines += ["", f"{entry['title']}:", "", *[f"- {note}" for note in entry["notes"]]]
    lines += ["", f"{report['seconds']} s in all."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
