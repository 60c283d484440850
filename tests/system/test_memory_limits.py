"""How much memory there is: a job or a container may take less than the computer has; and where arrays begin."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kr2cache.system import memory

MIB = 2**20


class World:
    """A computer with 1,000 MiB, of which 600 are free, and its control groups."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "mounts").write_text("31 23 0:28 / /sys rw,relatime shared:7 - sysfs sysfs rw\nodd line\n\n")

    def member_of(self, lines: str | bytes) -> None:
        (self.folder / "membership").write_bytes(lines if isinstance(lines, bytes) else lines.encode())

    def mount(self, version: int, top: str = "/") -> Path:
        """Where the groups below ``top`` lie."""
        at = self.folder / f"version-{version}"
        kind = "shared:9 - cgroup2 cgroup2 rw,nsdelegate" if version == 2 else "- cgroup cgroup rw,cpu,memory"
        with (self.folder / "mounts").open("a") as file:
            file.write(f"41 31 0:38 {top} {at} rw,relatime {kind}\n")
        return at


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(memory, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_memory_of_computer", lambda: 1_000 * MIB)
    monkeypatch.setattr(memory, "_free_memory_of_computer", lambda: 600 * MIB)
    return World(tmp_path)


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


def free_and_total() -> tuple[float, float]:
    return memory.free_memory() / MIB, memory.total_memory() / MIB


def test_without_control_groups_it_is_the_computers(world: World) -> None:
    assert free_and_total() == (600, 1_000)
    world.member_of("0::/\n")
    assert free_and_total() == (600, 1_000)
    world.mount(2)  # the root, which has no limit
    assert free_and_total() == (600, 1_000)


def test_a_jobs_limit_counts_and_pages_of_files_count_as_free(world: World) -> None:
    world.member_of("0::/slurm/job_7/step_0\n")
    root = world.mount(2)
    version_2(root / "slurm" / "job_7" / "step_0", "max", 90 * MIB, 10 * MIB)
    version_2(root / "slurm" / "job_7", 300 * MIB, 250 * MIB, 150 * MIB)
    version_2(root / "slurm", "max", 500 * MIB, 10 * MIB)
    assert free_and_total() == (200, 300)


def test_of_several_limits_the_narrowest_counts(world: World) -> None:
    world.member_of("0::/outer/inner\n")
    root = world.mount(2)
    version_2(root / "outer", 200 * MIB, 150 * MIB, 10 * MIB)
    version_2(root / "outer" / "inner", 300 * MIB, 20 * MIB, 10 * MIB)
    assert free_and_total() == (60, 200)
    version_2(root / "outer" / "inner", 300 * MIB, 20 * MIB, 10 * MIB, high=f"{50 * MIB}\n")
    assert free_and_total() == (40, 50), "where it is slowed down counts as well"


@pytest.mark.parametrize(
    ("name", "top"),
    [("/", "/"), ("/docker/abc", "/docker/abc"), ("/docker/abc", "/elsewhere"), ("/../..", "/"), ("/", "/../..")],
)
def test_a_container_sees_its_own_group_at_the_root(world: World, name: str, top: str) -> None:
    world.member_of(f"0::{name}\n")
    version_2(world.mount(2, top), 400 * MIB, 100 * MIB, 50 * MIB)
    assert free_and_total() == (350, 400)


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_that_was_made_inside_a_container_counts(world: World, version: int) -> None:
    world.member_of("4:memory:/docker/abc/job\n" if version == 1 else "0::/docker/abc/job\n")
    root = world.mount(version, "/docker/abc")
    made = version_1 if version == 1 else version_2
    made(root, 400 * MIB, 100 * MIB, 50 * MIB)
    made(root / "job", 300 * MIB, 100 * MIB, 50 * MIB)
    assert free_and_total() == (250, 300)


def test_version_1(world: World) -> None:
    world.member_of("9:pids:/x\n4:cpu,memory:/job\n1:name=systemd:/y\n0::/\n")
    root = world.mount(1)
    version_1(root, 2**63 - 4096, 700 * MIB, 100 * MIB)
    version_1(root / "job", 500 * MIB, 450 * MIB, 50 * MIB)
    version_1(root / "x", 1, 1, 7)  # another, in which it is for its number of processes alone
    assert free_and_total() == (100, 500)


def test_groups_of_something_else_are_left_out(world: World) -> None:
    world.member_of("4:memory:/job\n")
    with (world.folder / "mounts").open("a") as file:
        file.write(f"39 31 0:36 / {world.folder / 'pids'} rw,relatime - cgroup cgroup rw,pids\n")
    version_1(world.folder / "pids" / "job", 1, 1, 7)
    assert free_and_total() == (600, 1_000)


def test_what_lies_outside_of_the_mounted_folder_is_left_out(world: World) -> None:
    world.member_of("0::/docker/abc\n")
    version_2(world.mount(2, "/elsewhere"), 400 * MIB, 100 * MIB, 50 * MIB)
    version_2(world.folder / "docker" / "abc", 1, 1, 7)
    assert free_and_total() == (350, 400)


def test_both_versions_beside_each_other(world: World) -> None:
    world.member_of("4:cpu,memory:/one\n0::/two\n")
    version_2(world.mount(2) / "two", 300 * MIB, 100 * MIB, 20 * MIB)
    first = world.mount(1)
    version_1(first / "one", 500 * MIB, 450 * MIB, 100 * MIB)
    version_1(first / "two", 1, 1, 7)
    assert free_and_total() == (150, 300), "each by its own name: 220 are left of the one, 150 of the other"


@pytest.mark.parametrize(
    "text", [b"", b"junk\n", b"0:\n\n", b"0::\n", b"4:memory:\n", b"\x85:memory:\x0b\n", b"4:cpuset,memory_x:/\n"]
)
def test_what_names_no_group_is_no_error(world: World, text: bytes) -> None:
    for version, made in ((1, version_1), (2, version_2)):
        made(world.mount(version), 400 * MIB, 100 * MIB, 50 * MIB)
    world.member_of(text)
    assert free_and_total() == (600, 1_000)


@pytest.mark.parametrize("name", ["job", "\u2028", "a\x85b", "a:b", "a b"])
def test_a_group_may_have_any_name(world: World, name: str) -> None:
    world.member_of(f"0::/{name}\n")
    version_2(world.mount(2) / name, 400 * MIB, 100 * MIB, 50 * MIB)
    assert free_and_total() == (350, 400)


def test_a_name_that_is_no_text_is_no_error(world: World) -> None:
    world.member_of(b"0::/\xff\n")
    version_2(world.mount(2), 400 * MIB, 100 * MIB, 50 * MIB)
    assert free_and_total() == (350, 400)


def test_what_the_kernel_keeps_of_files_is_given_up_too(world: World) -> None:
    world.member_of("0::/job\n")
    job = world.mount(2) / "job"
    version_2(job, 300 * MIB, 250 * MIB, 50 * MIB)
    with (job / "memory.stat").open("a") as file:
        file.write(f"slab_reclaimable {30 * MIB}\nslab_unreclaimable {40 * MIB}\n")
    assert free_and_total() == (130, 300)


def test_a_group_that_is_full_leaves_nothing(world: World) -> None:
    world.member_of("0::/job\n")
    version_2(world.mount(2) / "job", 100 * MIB, 120 * MIB, 7)
    assert free_and_total() == (0, 100)


@pytest.mark.parametrize("stat", ["", "anon 1\n", "inactive_file x\nactive_file 7\n", "1 2 3\n"])
def test_of_a_group_that_does_not_say_what_it_holds_all_counts_as_used(world: World, stat: str) -> None:
    world.member_of("0::/job\n")
    job = world.mount(2) / "job"
    version_2(job, 100 * MIB, 50 * MIB, 7)
    (job / "memory.stat").write_text(stat)
    assert free_and_total() == (50, 100)
    (job / "memory.stat").unlink()
    assert free_and_total() == (50, 100)
    (job / "memory.current").unlink()
    assert free_and_total() == (100, 100), "the limit counts all the same"


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (1,), (7, 5), (2, 3, 1_000)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_an_array_begins_with_a_cache_line(shape: tuple[int, ...], dtype: str) -> None:
    arrays = [memory.aligned_empty(shape, np.dtype(dtype)) for _ in range(20)]
    for number, array in enumerate(arrays):
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert array.size == 0 or array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array[...] = number
    for number, array in enumerate(arrays):
        assert (array == number).all(), "each has its own memory"


def test_of_this_computer() -> None:
    """Whatever limits it."""
    assert 0 <= memory.free_memory() <= memory.total_memory()
    assert 0 < memory.total_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
