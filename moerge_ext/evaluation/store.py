"""Answers on disk as they come, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically


class Answers:
    """The answers of one run on one task: a JSON lines file, its first line the settings they depend on.

    `path` None keeps them in memory. ValueError when the file is of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.items = path, []
        if path is None:
            return
        header = json.dumps({"settings": settings}, sort_keys=True)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            if lines[0] != header:
                raise ValueError(
                    f"{path} belongs to another evaluation ({_difference(lines[0], settings)}): "
                    "choose another output folder or delete this one"
                )
            # what follows the last line end was cut off by a kill
            self.items = [json.loads(line) for line in lines[1:-1]]
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(line + "\n" for line in (header, *map(json.dumps, self.items)))
        write_atomically(path, lambda file: file.write_text(whole, encoding="utf-8"))

    def add(self, items: list[dict[str, Any]]) -> None:
        self.items += items
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(item) + "\n" for item in items))


def _difference(header: str, settings: dict[str, Any]) -> str:
    """What its first line says otherwise than `settings`."""
    try:
        before = json.loads(header)["settings"]
        keys = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    except (ValueError, KeyError, TypeError):
        return "its first line does not tell which"
    return "; ".join(f"{key}: {before.get(key)!r:.200}, now {settings.get(key)!r:.200}" for key in keys)


def file_name(label: str) -> str:
    """A run's label as a file name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", label) + ".jsonl"
