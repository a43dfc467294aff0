"""The hub of models and data, as far as one can tell without its library: is it there, and what of it is here already.

A machine without a network would wait a minute and a half for each name, while the hub's library tries again and again.
So whether the hub's address is known is asked once, before that library is loaded; where it is not, the library is told
to work from what was fetched earlier.
"""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

OFFLINE = "HF_HUB_OFFLINE"
NOT_HERE = "there is no such folder here, it was not fetched earlier, and the hub cannot be reached"


def reachable() -> bool:
    """Tells whether the hub may be there: not switched off, and its address known, or a proxy that would know it."""
    if os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def fetched(kind: str, name: str) -> bool:
    """Tells whether a model or a dataset (`kind`) was fetched earlier: whether the libraries keep a folder of it."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or home / "hub"
    tables = os.environ.get("HF_DATASETS_CACHE") or home / "datasets"
    places = [Path(hub) / f"{kind}s--{name.replace('/', '--')}", Path(tables) / name.replace("/", "___")]
    return any(place.expanduser().is_dir() for place in places)


def settle(kind: str, name: str) -> bool:
    """Tells whether a name can be had; where only an earlier fetch can give it, the hub's library is told so."""
    if reachable():
        return True
    os.environ[OFFLINE] = "1"
    return fetched(kind, name)
