"""How much room a disk has, and that it holds what was written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from kr2cache.errors import DiskSpaceError


def free_bytes(path: Path) -> int:
    """Free disk where ``path``, a file or a folder, is or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raise ``DiskSpaceError`` if the disk of ``folder`` has fewer than ``needed`` bytes free.

    Args:
        what: Needs them, as the beginning of a sentence.
    """
    free = free_bytes(folder)
    if free < needed:
        raise DiskSpaceError(f"{what} needs {needed:,} bytes in {folder}, {free:,} are free.", remedy)


def reserve(descriptor: int, size: int) -> bool:
    """Reserve space where the platform can; elsewhere (False) a full disk is noticed when it is written to."""
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
    """``pwrite`` all of it; returns how many bytes."""
    view = memoryview(data).cast("B")
    count = len(view)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
    return count


def sync(descriptor: int) -> None:
    """The bytes on disk; macOS knows no fdatasync."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path, needed: int) -> Exception:
    """``error`` as the project's own where it says that the disk is full, else itself.

    Args:
        path: What there was no room for.
        needed: Bytes that had yet to be found room for.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = free_bytes(path)
        limit = "" if free < needed else " and a quota or limit of this process allows no more"
        return DiskSpaceError(
            f"No space left for {path}: it needs {needed:,} more bytes, {free:,} are free{limit}.",
            "Make room (or give another --cache-dir) and run the same command again: what is complete is kept.",
        )
    return error
