"""What arguments mean, whatever way they were typed: where their paths lead, and what is the default anyway."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..ensemble.questions import named_file
from ..evaluation.runs import PELMO, WHOLE, split_methods, with_top_k
from ..experts.routers import ROUTERS_FILE
from ..queries.cache import model_name
from ..queries.hidden import base_name
from ..queries.similar import SHOWN
from .named_dirs import split_name

PLACES = (
    "model", "experts", "tasks", "routers", "query_router", "calibrate", "multitask", "embedder", "writer",
    "writer_template", "solved", "results", "prompts", "router", "single_label_router", "judge_model",
)  # fmt: skip
NAMED_PLACES = ("gates", "data")  # NAME=DIR


def meant(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with absolute paths without links, and without those that are the defaults anyway."""
    found = placed(asked, _absolute)
    if isinstance(data := found.get("data"), list):  # a dataset may be called as its file or folder
        named = zip(map(named_file, asked["data"]), data, strict=True)
        found["data"] = [f"{name}={text.rpartition('=')[2]}" for (name, _), text in named]
    methods = found.get("methods") or []
    for key, value in (
        ("embedder_name", model_name(found.get("embedder") or "")),
        ("base_name", base_name(asked.get("model") or "")),
        ("similar", SHOWN if found.get("solved") else None),
        ("top_k", found.get("top_k") if methods and with_top_k(methods, found.get("top_k")) == methods else None),
    ):
        if key in found and found[key] == value:
            found[key] = None  # what the command takes by itself
    return found


def relative(means: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What `meant` gives, with paths as they lead from a folder: the same where both were moved together."""
    return placed(means, lambda text: os.path.relpath(text, folder) if os.path.isabs(text) else text)


def placed(asked: Mapping[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    """The arguments with `place` of every path in them; "a,b" of --methods as a list."""
    found = dict(asked)
    for key in PLACES:
        if found.get(key):
            value = found[key]
            if key == "experts":
                found[key] = [_named(text, place) for text in value]
                continue
            found[key] = place(value) if isinstance(value, str) else [place(text) for text in value]
    for key in NAMED_PLACES:
        if found.get(key):
            split = [text.rpartition("=") for text in found[key]]
            found[key] = [f"{name}{equals}{place(path)}" for name, equals, path in split]
    if (methods := found.get("methods")) is not None:
        rows = split_methods(methods) if isinstance(methods, str) else methods
        found["methods"] = [_method(text, place) for text in rows]
    return found


def _named(text: str, place: Callable[[str], str]) -> str:
    name, folder = split_name(text)
    return place(folder) if name is None else f"{name}={place(folder)}"


def _method(text: str, place: Callable[[str], str]) -> str:
    for prefix in (WHOLE, PELMO):
        if text.startswith(prefix):
            return prefix + place(text.removeprefix(prefix))
    return text


def _absolute(text: str) -> str:
    """Where a path leads, of a folder of routers to their file; a hub id is what it is."""
    try:
        path = Path(text)
        if not path.exists():
            return text
        return str((path / ROUTERS_FILE if (path / ROUTERS_FILE).is_file() else path).resolve())
    except (OSError, ValueError):  # too long for a name
        return text
