"""meta.json: what is said of a whole task, in the folder of its rows."""

from __future__ import annotations

from pathlib import Path

from .examples import Example
from .rows import read_json, read_rows

META_FILE = "meta.json"
META = 'an object, with "choices", if any, a list of texts, and "instruction", if any, a text'


def read_meta(path: Path) -> dict:
    """The object in the file, empty where there is no file; ValueError for anything else."""
    if not path.is_file():
        return {}
    meta = read_json(path, META)
    choices = meta.get("choices", []) if isinstance(meta, dict) else None
    fine = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not fine or not isinstance(meta.get("instruction", ""), str):
        raise ValueError(f"{path} must hold {META}")
    return meta


def read_instructed_rows(path: Path, *, text: bool = False) -> list[Example]:
    """As `read_rows`; a row without "instruction" gets that of the meta.json beside the file, if it has one."""
    rows = read_rows(path, text=text)
    instruction = read_meta(path.parent / META_FILE).get("instruction")
    if instruction is not None:
        for row in rows:
            row.setdefault("instruction", instruction)
    return rows
