"""How much memory there is: a job or a container may take less than the computer has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kr2cache import memory

MIB = 2**20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup, and a computer with 1,000 MiB, of which 600 are free."""
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_memory_of_computer", lambda: 1_000 * MIB)
    monkeypatch.setattr(memory, "_free_memory_of_computer", lambda: 600 * MIB)
    return tmp_path / "cgroup"


def version_2(folder: Path, limit: int | str, used: int, files: int, **more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile {9 * files}\ninactive_file {files - 7}\nactive_file 7\n")
    for name, text in more.items():
        (folder / f"memory.{name}").write_text(text)


def version_1(folder: Path, limit: int, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"inactive_file 0\nactive_file 0\ntotal_inactive_file {files - 7}\ntotal_active_file 7\n"
    )


def member_of(groups: Path, text: str) -> None:
    groups.with_name("membership").write_text(text)


def free_and_total() -> tuple[float, float]:
    return memory.free_memory() / MIB, memory.total_memory() / MIB


def test_without_control_groups_it_is_the_computers(groups: Path) -> None:
    assert free_and_total() == (600, 1_000)
    member_of(groups, "0::/\n")  # the root, which has no limit
    assert free_and_total() == (600, 1_000)


def test_a_jobs_limit_counts_and_pages_of_files_count_as_free(groups: Path) -> None:
    member_of(groups, "0::/slurm/job_7/step_0\n")
    version_2(groups / "slurm" / "job_7" / "step_0", "max", 90 * MIB, 10 * MIB)
    version_2(groups / "slurm" / "job_7", 300 * MIB, 250 * MIB, 150 * MIB)
    version_2(groups / "slurm", "max", 500 * MIB, 10 * MIB)
    assert free_and_total() == (200, 300)


def test_of_several_limits_the_narrowest_counts(groups: Path) -> None:
    member_of(groups, "0::/outer/inner\n")
    version_2(groups / "outer", 200 * MIB, 150 * MIB, 10 * MIB)
    version_2(groups / "outer" / "inner", 300 * MIB, 20 * MIB, 10 * MIB)
    assert free_and_total() == (60, 200)
    version_2(groups / "outer" / "inner", 300 * MIB, 20 * MIB, 10 * MIB, high=f"{50 * MIB}\n")
    assert free_and_total() == (40, 50), "where it is slowed down counts as well"


def test_a_container_sees_its_own_group_at_the_root(groups: Path) -> None:
    member_of(groups, "0::/docker/abc\n")
    version_2(groups, 400 * MIB, 100 * MIB, 50 * MIB)
    assert free_and_total() == (350, 400)
    member_of(groups, "0::/../..\n")  # of a group outside of the container
    assert free_and_total() == (350, 400)


def test_version_1(groups: Path) -> None:
    member_of(groups, "9:pids:/x\n4:cpu,memory:/job\n1:name=systemd:/y\n0::/\n")
    version_1(groups / "memory", 2**63 - 4096, 700 * MIB, 100 * MIB)
    version_1(groups / "memory" / "job", 500 * MIB, 450 * MIB, 50 * MIB)
    version_1(groups / "memory" / "x", 1, 1, 7)  # another, in which it is for its number of processes alone
    assert free_and_total() == (100, 500)


def test_both_versions_beside_each_other(groups: Path) -> None:
    """The second one may have a folder of its own, and count memory there."""
    version_1(groups / "memory" / "job", 500 * MIB, 450 * MIB, 50 * MIB)
    (groups / "unified").mkdir()
    member_of(groups, "0::/memory/job\n")
    assert free_and_total() == (600, 1_000), "a group of version 1 that this process is not in"
    version_2(groups / "unified" / "memory" / "job", 300 * MIB, 100 * MIB, 20 * MIB)
    assert free_and_total() == (220, 300)


@pytest.mark.parametrize(
    "text", [b"", b"junk\n", b"0:\n\n", b"0::/\xff\n", "0::/a\u2028b\n".encode(), b"\x85:x:\x0b\n"]
)
def test_odd_names_of_groups_are_no_error(groups: Path, text: bytes) -> None:
    version_2(groups, 400 * MIB, 100 * MIB, 50 * MIB)
    groups.with_name("membership").write_bytes(text)
    assert free_and_total() == ((350, 400) if text.startswith(b"0::/") else (600, 1_000))


def test_what_the_kernel_keeps_of_files_is_given_up_too(groups: Path) -> None:
    member_of(groups, "0::/job\n")
    version_2(groups / "job", 300 * MIB, 250 * MIB, 50 * MIB)
    with (groups / "job" / "memory.stat").open("a") as file:
        file.write(f"slab_reclaimable {30 * MIB}\nslab_unreclaimable {40 * MIB}\n")
    assert free_and_total() == (130, 300)


def test_a_group_that_is_full_leaves_nothing(groups: Path) -> None:
    member_of(groups, "0::/job\n")
    version_2(groups / "job", 100 * MIB, 120 * MIB, 7)
    assert free_and_total() == (0, 100)


@pytest.mark.parametrize("stat", ["", "anon 1\n", "inactive_file x\nactive_file 7\n", "1 2 3\n"])
def test_of_a_group_that_does_not_say_what_it_holds_all_counts_as_used(groups: Path, stat: str) -> None:
    member_of(groups, "0::/job\n")
    version_2(groups / "job", 100 * MIB, 50 * MIB, 7)
    (groups / "job" / "memory.stat").write_text(stat)
    assert free_and_total() == (50, 100)
    (groups / "job" / "memory.stat").unlink()
    assert free_and_total() == (50, 100)
    (groups / "job" / "memory.current").unlink()
    assert free_and_total() == (100, 100), "the limit counts all the same"


def test_of_this_computer() -> None:
    """Whatever limits it."""
    assert 0 <= memory.free_memory() <= memory.total_memory()
    assert 0 < memory.total_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
