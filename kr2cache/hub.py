"""Can the Hugging Face hub be asked at all?"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit


def unreachable() -> str | None:
    """Why the hub cannot be asked, without the half minute of retries that a download would take to find out."""
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


def stay_offline() -> None:
    """Spare the libraries their retries for the rest of this process."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
