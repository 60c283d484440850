"""Free disk space, and writing that is complete and durable."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from kr2cache.errors import ConfigError, DiskSpaceError


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where ``path`` (a file or a folder) is or will be."""
    return shutil.disk_usage(_there(path)).free


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether both paths are or will be on the same disk."""
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def check_writable(folder: Path, option: str) -> None:
    """Raise ``ConfigError`` if ``folder`` cannot be made or written to. Leaves no file behind."""
    there = _there(folder)
    if not there.is_dir():
        raise ConfigError(f"{option} {folder}: {there} is a file.", "Give a folder.")
    try:  # permissions are not enough: root has them in /proc too
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # a full disk has its own error, and repair in place needs no space
        reason = error.strerror or str(error)
        raise ConfigError(f"{option} {folder}: {there} is not writable ({reason}).", "Give another folder.") from None


MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = ("tmpfs", "ramfs")
"""File systems in memory."""


def is_in_memory(folder: Path) -> bool:
    """Whether ``folder`` is in memory and not on a disk, as /tmp on many Linux systems."""
    with contextlib.suppress(OSError):
        device = folder.stat().st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in MOUNTS.read_text("utf-8", "surrogateescape").splitlines():
            place, _, kind = line.partition(" - ")
            if number in place.split()[2:3]:
                return kind.split(" ")[0] in IN_MEMORY
    return False


def temporary_file(size: int, beside: Path) -> tuple[BinaryIO, Path] | None:
    """A file of ``size`` bytes without a name, with its space reserved. It is in ``beside``; if that folder is not
    writable or full, in the system's folder for temporary files (``$TMPDIR``), unless that folder is in memory.

    Returns:
        The file and its folder; None if neither folder can be used.
    """
    folders = [beside]
    with contextlib.suppress(OSError):  # there is no such folder
        folders += [folder] if not is_in_memory(folder := Path(tempfile.gettempdir())) else []
    for folder in folders:
        if free_bytes(folder) < size:
            continue
        try:
            file = tempfile.TemporaryFile(dir=folder, prefix="kr2cache-")  # noqa: SIM115 (the caller closes it)
        except OSError:  # the folder is not writable
            continue
        try:
            if not reserve(file.fileno(), size):
                file.truncate(size)
        except OSError:
            file.close()
            continue
        return file, folder
    return None


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raise ``DiskSpaceError`` if the disk of ``folder`` has fewer than ``needed`` bytes free.

    Args:
        what: What needs them, as the start of a sentence.
    """
    free = free_bytes(folder)
    if free < needed:
        raise DiskSpaceError(f"{what} needs {needed:,} bytes in {folder}, {free:,} are free.", remedy)


def reserve(descriptor: int, size: int) -> bool:
    """Reserve space. Returns False if the platform cannot; then a full disk is noticed when it is written to."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    return True


def write_whole(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """``pwrite`` all of ``data``; returns its number of bytes."""
    view = memoryview(data).cast("B")
    count = len(view)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
    return count


def sync(descriptor: int) -> None:
    """Wait until the bytes are on disk. macOS has no fdatasync."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path, needed: int) -> Exception:
    """A ``DiskSpaceError`` if ``error`` says that the disk is full, else ``error``.

    Args:
        path: The file that did not fit.
        needed: Bytes that are still to be written.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = free_bytes(path)
        limit = "" if free < needed else " and a quota or limit of this process allows no more"
        return DiskSpaceError(
            f"No space left for {path}: it needs {needed:,} more bytes, {free:,} are free{limit}.",
            "Make room (or give another --cache-dir) and run the same command again: what is complete is kept.",
        )
    return error
