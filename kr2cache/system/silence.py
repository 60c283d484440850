"""Whether the holder of a claim is silent: it no longer touches the claim."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

ABANDONED_S = 3600.0
"""A holder counts as silent at once if its last touch was so many seconds before this process started."""


@dataclass
class _Watch:
    """When this process saw that a claim was touched."""

    touched: int
    """Time of the last touch, ns."""
    looked: float
    unchanged: float = 0.0
    """For how many seconds this process saw no touch."""


_watches: dict[Path, _Watch] = {}
_BEGAN = time.time()


def is_silent(claim: Path, timeout_s: float, between_s: float) -> bool:
    """Whether nobody touched the claim for so many seconds while this process watched it. Only the clock of this
    process counts: clocks of other machines and of file systems differ. Time in which this process was stopped is not
    counted, because the holder may have been stopped too.

    Args:
        between_s: If more seconds passed since the last look, only so many count.
    """
    try:
        try:
            # A network file system asks the server for the time of a file only when the file is opened.
            with (claim / "alive").open("rb") as file:
                touched = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:  # a request
            touched = claim.stat().st_mtime_ns
    except OSError as error:
        if not is_gone(error):
            raise
        _watches.pop(claim, None)
        return False  # the caller looks again
    if touched / 1e9 < _BEGAN - ABANDONED_S:
        return True
    now, watch = time.monotonic(), _watches.get(claim)
    if watch is None or watch.touched != touched:
        for old in [claim for claim, watch in _watches.items() if now - watch.looked > 10 * timeout_s]:
            _watches.pop(old, None)
        watch = _watches[claim] = _Watch(touched, now)
    watch.unchanged += min(now - watch.looked, between_s)
    watch.looked = now
    return watch.unchanged > timeout_s


def is_gone(error: OSError) -> bool:
    return error.errno in (errno.ENOENT, errno.ESTALE)
