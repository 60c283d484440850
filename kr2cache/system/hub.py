"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit


def unreachable() -> str | None:
    """Why the hub cannot be reached; None if it can. A failing download would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set."
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")):
        return None
    parts = urlsplit(constants.ENDPOINT)
    host = parts.hostname or ""
    try:
        socket.getaddrinfo(host, parts.port or 443)
    except OSError:
        return f"no network (cannot find {host})."
    return None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Inside the block the libraries do not contact the hub: cached files load, other files fail at once."""
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
