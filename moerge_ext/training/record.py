"""What a finished run notes in what it writes, by which it is known again: a safetensors header, or a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

RECORD_KEY = "moerge_training"


def record_text(settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """The entry of a safetensors header or JSON file: the settings of a run, and facts of what came of it."""
    return {RECORD_KEY: json.dumps({"settings": settings, **facts})}


def read_record(file: Path) -> dict[str, Any] | None:
    """What `record_text` noted in `file`, its settings among it; None where there is no file, or nothing noted."""
    if not file.is_file():
        return None
    try:
        content = json.loads(_header(file)[RECORD_KEY])
        return content if isinstance(content["settings"], dict) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def differences(saved: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What is not alike in the settings of two runs, those of the first as they were read."""
    here = json.loads(json.dumps(settings))
    found = [key for key in sorted(saved.keys() | here.keys()) if saved.get(key) != here.get(key)]
    return [
        "data: the rows, or how they are put and cut (prompt, max_length), are others"
        if key == "data"
        else f"{key}: saved with {saved.get(key)!r}, now {here.get(key)!r}"
        for key in found
    ]


def _header(file: Path) -> dict[str, str]:
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}
