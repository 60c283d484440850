"""The number of files that this process may hold open."""

from __future__ import annotations

from pathlib import Path

from kr2cache.errors import CacheError

OTHER_FILES = 256
"""How many other files the process may open later: of libraries, of data sets, and pipes to worker processes."""


def allow_open_files(files: int) -> None:
    """Raise the limit on the open files of this process, so that it can open ``files`` more. The usual limit is 1,024.

    Raises:
        CacheError: If the system does not allow a limit that is high enough.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    try:
        needed = len(list(Path("/dev/fd").iterdir())) + files + OTHER_FILES
    except OSError:  # not mounted, as in some containers
        needed = files + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise CacheError(
            f"{files:,} more open files are needed, one for each shard, but this process may open {hard:,} in all.",
            f"Raise the limit (as administrator: ulimit -n {needed}), or open fewer caches at once.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
