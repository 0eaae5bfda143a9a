"""Results of language and embedding models on disk, found again by the hash of what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from ..files.cache import default_folder
from ..files.hub import may_be_model_id

_WARNED: set[Path] = set()  # folders of which it was said that they cannot be written


class TextCache:
    """JSON values by content: `parts` (strings) say what a value was made from; their SHA-256 names its file."""

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = default_folder() if folder is None else Path(folder)

    def get(self, *parts: str) -> Any | None:
        """The value made from `parts`, or None when there is none (a damaged file counts as none)."""
        try:
            return json.loads(self._path(parts).read_text(encoding="utf-8"))["value"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, value: Any, *parts: str) -> None:
        """Keep `value`; a reader sees all of it or nothing. Where nothing can be written a warning says so, once."""
        path = self._path(parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write_text(json.dumps({"value": value}), encoding="utf-8"))
        except OSError as error:
            if self.folder not in _WARNED:
                _WARNED.add(self.folder)
                warnings.warn(
                    f"the cache {self.folder} cannot be written ({error.strerror}): nothing is kept there; "
                    "$MOERGE_CACHE names another folder",
                    stacklevel=2,
                )

    def _path(self, parts: tuple[str, ...]) -> Path:
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"


def model_identity(path: str | os.PathLike) -> str:
    """What a cache key says of a model: a hub id with its commit, a folder with its files' names, sizes and times.

    A folder that is trained on or replaced is another model; the weights need not be read to see it. Of a hub id that
    was not loaded the commit is not known.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path)
    if not folder.is_dir():
        known = try_to_load_from_cache(str(path), "config.json") if may_be_model_id(str(path)) else None
        return f"{path}@{Path(known).parent.name}" if isinstance(known, str) else str(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    facts = [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return f"{folder.resolve()}#{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def model_name(path: str | os.PathLike) -> str:
    """The last part of a hub id or folder: "sentence-transformers/all-MiniLM-L6-v2" -> "all-MiniLM-L6-v2"."""
    return str(path).rstrip("/").rpartition("/")[2]
