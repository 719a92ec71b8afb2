"""Whether the model hub can be reached: asked once, where its library asks for file by file, each six times."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 5.0
_PORTS = {"https": 443, "http": 80}


def look_here_without_hub(name: str, offline: bool = False) -> None:
    """Lets the hub's library look on this machine alone, from here on, where the hub cannot be reached.

    Args:
        name: Hub id or folder; for a folder nothing is asked.
        offline: Whoever loads it never reaches for the network: nothing is asked either.
    """
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE or Path(name).is_dir() or _is_reached(constants.ENDPOINT):
        return
    constants.HF_HUB_OFFLINE = True
    # For the processes that are started from here, and for libraries that are imported later.
    os.environ["HF_HUB_OFFLINE"] = "1"


@cache
def _is_reached(endpoint: str) -> bool:
    """Says whether something listens there, or a proxy stands between."""
    url = urlsplit(endpoint)
    if url.hostname is None or url.scheme in getproxies():
        return True
    try:
        with socket.create_connection((url.hostname, url.port or _PORTS.get(url.scheme, 443)), _SECONDS):
            return True
    except OSError:
        return False
