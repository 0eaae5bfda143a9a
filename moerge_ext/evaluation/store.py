"""Answers on disk as they come, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files.atomic import write_atomically


class Answers:
    """The answers of one run on one task: a JSON lines file, its first line the settings they depend on.

    Answers that depend on other settings lie in another file, whose name has the digest of the settings: nothing that
    is stale is read, and nothing is replaced. `folder` None keeps them in memory. `reused`: how many were there.
    ValueError when the file is damaged.
    """

    def __init__(self, folder: Path | None, label: str, settings: dict[str, Any]):
        self.path, self.items = None, []
        if folder is not None:
            header = json.dumps({"settings": settings}, sort_keys=True)
            digest = hashlib.sha256(header.encode()).hexdigest()[:8]
            self.path = folder / f"{file_stem(label)}.{digest}.jsonl"
            self.items = self._read(header) if self.path.is_file() else []
            folder.mkdir(parents=True, exist_ok=True)
            whole = "".join(line + "\n" for line in (header, *map(json.dumps, self.items)))
            write_atomically(self.path, lambda file: file.write_text(whole, encoding="utf-8"))
        self.reused = len(self.items)

    def _read(self, header: str) -> list[dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8").split("\n")
        try:
            items = [json.loads(line) for line in lines[1:-1]]  # what follows the last line end was cut off by a kill
            numbers = [item["row"] for item in items]
        except (ValueError, KeyError, TypeError):
            numbers = None
        if lines[0] != header or numbers != list(range(len(lines[1:-1]))):
            raise ValueError(
                f"{self.path} is damaged: expected its settings and then the answers to rows 0, 1, 2, ... in this "
                "order; delete it, and its answers are made again"
            )
        return items

    def add(self, items: list[dict[str, Any]]) -> None:
        """Keep the answers to the next rows."""
        items = [{"row": row, **item} for row, item in enumerate(items, len(self.items))]
        self.items += items
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(item) + "\n" for item in items))


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """A block in which no other process evaluates into `folder`; ValueError when one does."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another evaluation is writing into {folder}: wait until it is done, or choose another output folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def file_stem(label: str) -> str:
    """A run's label as the beginning of a file name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", label)
