"""The Hugging Face hub: what may be an id there, and whether it can be reached, found out in seconds.

The hub's client asks a hub that cannot be reached again and again, file by file, for minutes. One request goes first
here, by the client's own session, so that proxies, certificates and HF_ENDPOINT are the client's. Whoever takes the
connection is left to the client, however slow the answer and whatever it says; where nobody does, the client is told to
go by its cache alone.
"""

from __future__ import annotations

import re
import threading
import time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

NAMED = 5  # folders that are named
KEPT = 60.0  # seconds for which what was found out holds
NOT_TAKEN = {"ConnectError", "ConnectTimeout", "ProxyError"}  # of httpx: no connection was made
PARTS = 3  # HF_HUB_ETAG_TIMEOUT, in seconds: half of it for one address of the hub, three times it for all
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_MODEL_ID = re.compile(rf"{_PART}(/{_PART})?", re.A)
_lock = threading.Lock()
_known: dict[str, tuple[float, str | None]] = {}  # {endpoint: (when, why it cannot be reached)}


def may_be_model_id(text: str) -> bool:
    """Whether a text has the form of a model's id on the hub: name, or user/name."""
    return _MODEL_ID.fullmatch(text) is not None and ".." not in text


def is_offline() -> bool:
    """Whether the client was told to ask nobody (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def unreached() -> str | None:
    """Why the hub cannot be reached; None where it can, and where the client was told not to ask."""
    from huggingface_hub import constants

    if is_offline():
        return None
    endpoint = constants.ENDPOINT
    with _lock:
        when, reason = _known.get(endpoint, (-KEPT, None))
        if time.monotonic() - when >= KEPT:
            reason = _asked(endpoint, float(constants.HF_HUB_ETAG_TIMEOUT))
            _known[endpoint] = time.monotonic(), reason
        return reason


def only_cached() -> dict[str, Any]:
    """What the client, and whoever calls it, is passed: where the hub cannot be reached, to ask the cache alone."""
    return {} if unreached() is None else {"local_files_only": True}


def model_options(path: str) -> dict[str, Any]:
    """`only_cached` for the id of a model, nothing for a path that is there; ValueError for what is neither."""
    if _is_there(path):
        return {}
    if not may_be_model_id(path):
        raise ValueError(no_folder(path))
    return only_cached()


def not_there(what: str, reason: str) -> str:
    """The part of an error that says what the hub has to do with `what` not being found; reason: the client's."""
    from huggingface_hub import constants

    cache = f"the hub's cache ({constants.HF_HUB_CACHE})"
    elsewhere = "pass a folder, or fetch it where there is a network (`hf download ID`)"
    if is_offline():
        return f"{cache} has no such {what}, and HF_HUB_OFFLINE is set, so that the hub is not asked: {elsewhere}"
    if (why := unreached()) is not None:
        return (
            f"{cache} has no such {what}, and the hub {constants.ENDPOINT} cannot be reached ({why}): {elsewhere}; "
            "HF_HUB_OFFLINE=1 goes by the cache at once, HF_ENDPOINT names another hub"
        )
    return f"the hub has no such {what} for you ({reason}): check the path, or the id, the network and your access"


def no_folder(path: str) -> str:
    """What to say of a path that is not there and no id on the hub: which part of it is there, and what lies in it."""
    lost = there = Path(path)
    while not _is_there(str(lost.parent)):
        lost = lost.parent
    more = f": {str(lost)!r} is not there" if lost != there else beside(path)
    return f"there is no folder {path!r}{more}"


def beside(path: str) -> str:
    """What lies where a path leads that is not there: the folder that may be meant, or those that there are."""
    lost = there = Path(path)
    while not _is_there(str(lost.parent)):
        lost = lost.parent
    names = _folders(lost.parent)
    near = [lost.parent / name / there.relative_to(lost) for name in get_close_matches(lost.name, names, 1)]
    if near and _is_there(str(near[0])):
        return f" (did you mean {str(near[0])!r}?)"
    if not names or "/" not in path or lost != there:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" ({str(there.parent)!r} holds {', '.join(names[:NAMED])}{more})"


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, a null byte
        return False


def _folders(folder: Path) -> list[str]:
    try:
        return sorted(inside.name for inside in folder.iterdir() if inside.is_dir() and inside.name[:1] != ".")
    except (OSError, ValueError):
        return []


def _asked(endpoint: str, patience: float) -> str | None:
    """Why nobody takes a connection at `endpoint`. In a thread, as the name server has its own patience."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_refused(endpoint, patience / 2)), daemon=True)
    thread.start()
    thread.join(PARTS * patience)
    return (
        found[0] if found else f"nobody has answered for {PARTS * patience:g} s; HF_HUB_ETAG_TIMEOUT is a third of it"
    )


def _refused(endpoint: str, patience: float) -> str | None:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=patience, follow_redirects=False)
    except Exception as error:  # its transports have types of their own, which change with its version
        if NOT_TAKEN.isdisjoint(kind.__name__ for kind in type(error).__mro__):
            return None
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}{said and f': {said[:200]}'}"
    return None
