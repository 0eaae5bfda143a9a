"""moerge_manifest.json: the SHA-256 and size of every file of an expert, written when it is sent to the hub.

{"format": "moerge-manifest", "version": "1", "files": {name: {"sha256": hex, "size": bytes}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.safefile import file_inside

MANIFEST_FILE = "moerge_manifest.json"
FORMAT, VERSION = "moerge-manifest", "1"
MAX_BYTES = 1 << 20
MAX_LISTED = 3
_CHUNK = 1 << 20


def manifest_of(files: Mapping[str, Path | bytes], **facts: Any) -> bytes:
    """The manifest of {name: file, or its content}; `facts` are further entries."""
    rows = {}
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        rows[name] = {"sha256": _digest(content), "size": size}
    text = json.dumps({"format": FORMAT, "version": VERSION, **facts, "files": rows}, indent=2)
    return text.encode() + b"\n"


def manifest_problems(folder: Path) -> list[str]:
    """Which files of a folder are not what its manifest says; empty without a manifest."""
    folder = folder.resolve()
    if not (folder / MANIFEST_FILE).exists():
        return []
    try:
        with open(file_inside(folder, MANIFEST_FILE), "rb") as opened:
            manifest = json.loads(opened.read(MAX_BYTES).decode("utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            return [f"{MANIFEST_FILE} is of another version"]
        rows = [(name, row["sha256"]) for name, row in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"]
    wrong = []
    for name, expected in rows:
        try:
            same = Path(name).name == name and _digest(file_inside(folder, name)) == expected
        except (OSError, ValueError):
            same = False
        if not same:
            wrong.append(name)
    more = f" and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
    return [f"not as in {MANIFEST_FILE}: {', '.join(wrong[:MAX_LISTED])}{more}"] if wrong else []


def _digest(content: Path | bytes) -> str:
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
