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


def read_record(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `record_text` noted in `file`; None where there is no file, nothing noted, or a run of other settings."""
    if not file.is_file():
        return None
    try:
        content = json.loads(_header(file)[RECORD_KEY])
        return content if content["settings"] == json.loads(json.dumps(settings)) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _header(file: Path) -> dict[str, str]:
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}
