"""Answers on disk as they come, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files.atomic import disk_error, write_atomically

LARGE = 2**20  # bytes of answers that are compressed when they are complete
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Answers:
    """The answers of one run on one task: a JSON lines file, its first line the settings they depend on.

    Answers that depend on other settings lie in another file, whose name has the digest of the settings: nothing that
    is stale is read, and nothing is replaced. `folder` None keeps them in memory; so does, with a warning, a folder
    that cannot be written. `reused`: how many were there. ValueError when the file is damaged; nothing is written
    before the first `add`.
    """

    def __init__(self, folder: Path | None, label: str, settings: dict[str, Any]):
        self.path, self.items, self._whole = None, [], False
        if folder is not None:
            self._header = json.dumps({"settings": settings}, sort_keys=True)
            digest = hashlib.sha256(self._header.encode()).hexdigest()[:8]
            self.path = folder / f"{file_stem(label)}.{digest}.jsonl"
            self.items = self._read()
        self.reused = len(self.items)

    @property
    def packed(self) -> Path:
        """The file's name when it is compressed."""
        return self.path.with_name(self.path.name + ".gz")

    def _read(self) -> list[dict[str, Any]]:
        path = next((path for path in (self.path, self.packed) if path.is_file()), None)
        if path is None:
            return []
        try:
            raw = path.read_bytes()
            lines = (gzip.decompress(raw) if path == self.packed else raw).decode().split("\n")
            items = [json.loads(line) for line in lines[1:-1]]  # what follows the last line end was cut off by a kill
            numbers = [item["row"] for item in items]
        except (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile):
            lines, numbers = [""], None
        if lines[0] != self._header or numbers != list(range(len(lines[1:-1]))):
            raise ValueError(
                f"{path} is damaged: expected its settings and then the answers to rows 0, 1, 2, ... in this "
                "order; delete it, and its answers are made again"
            )
        return items

    def add(self, items: list[dict[str, Any]]) -> None:
        """Keep the answers to the next rows. OSError, naming the file, when the disk is full."""
        items = [{"row": row, **item} for row, item in enumerate(items, len(self.items))]
        self.items += items
        if self.path is None:
            return
        try:
            if not self._whole:  # the first time: what was cut off by a kill goes
                self._write(self.path, self._lines().encode())
                self._whole = True
                return
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(item) + "\n" for item in items))
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """Compress the answers, which are complete, where they are large."""
        if self.path is None or not self.path.is_file() or self.path.stat().st_size < LARGE:
            return
        try:
            self._write(self.packed, gzip.compress(self._lines().encode(), mtime=0))
            self.path.unlink()
        except OSError as error:
            self._give_up(error)

    def _lines(self) -> str:
        return "".join(line + "\n" for line in (self._header, *map(json.dumps, self.items)))

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write_bytes(content))

    def _give_up(self, error: OSError) -> None:
        """Go on in memory where nothing can be written; raise for all else."""
        if error.errno not in READ_ONLY:
            raise disk_error(error, self.path) from error
        warnings.warn(f"{self.path.parent} cannot be written ({error.strerror}): answers are not stored", stacklevel=4)
        self.path = None


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """A block in which no other process evaluates into `folder`; ValueError when one does."""
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another evaluation is writing into {folder}: wait until it is done, or choose another output folder"
        ) from None
    except OSError as error:
        raise disk_error(error, folder) from error
    try:
        yield
    finally:
        lock.release()


def file_stem(label: str) -> str:
    """A run's label as the beginning of a file name."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "_", label)
