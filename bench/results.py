"""The results files: one JSON row per candidate and cell, appended, never rewritten."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .timing import Settings

FOLDER = Path(__file__).resolve().parent / "results"
# what a row is about
IDENTITY = ("suite", "mode", "D", "O", "E", "K", "R", "T", "dtype", "popularity", "cache", "size", "candidate")
# a cell measured under the same values of these is not measured again
STATE = ("machine", "device", "threads", "commit", "build", "torch", "settings")

Row = dict[str, Any]


def identity(row: Row) -> tuple:
    """What tells a row from others of its run; one cell of `model` has a row per phase."""
    return tuple(row.get(key) for key in (*IDENTITY, "phase"))


def cell_key(row: Row) -> str:
    """The cell (without the candidate) and everything that would change its numbers."""
    names = (*IDENTITY[:-1], *STATE)
    return json.dumps([row.get(name) for name in names])


def read(path: Path) -> Iterator[Row]:
    """Rows of one file, in the order they were written; a torn last line (a killed run) is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read_all(folder: Path) -> list[Row]:
    """The rows of every machine; the folder holds other results (of bench/quality) too."""
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read(path) if "machine" in row]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of each machine, thread count and cell that were written last, all of one commit."""
    cells: dict[tuple, tuple[Any, dict[tuple, Row]]] = {}
    for row in rows:
        *cell, candidate, phase = identity(row)
        key = (row["machine"], row["threads"], *cell)
        commit, found = cells.pop(key, (None, {}))
        if commit != row.get("commit"):
            found = {}
        found.pop((candidate, phase), None)
        found[candidate, phase] = row
        cells[key] = (row.get("commit"), found)
    return [row for _, found in cells.values() for row in found.values()]


class Recorder:
    """Appends rows to <folder>/<machine>.jsonl and knows which cells are there already."""

    def __init__(self, folder: Path, environment: Row, settings: Settings):
        self.path = folder / f"{environment['machine']}.jsonl"
        self.common = environment | {"settings": settings.identity(), "cache": "cold" if settings.cold else "warm"}
        self.done = {cell_key(row) for row in read(self.path)}

    def has(self, cell: Row) -> bool:
        return cell_key(self.common | cell) in self.done

    def add(self, cell: Row, rows: Iterable[Row]) -> None:
        """All rows of one cell in one write: a killed run leaves whole cells."""
        stamp = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        lines = [json.dumps(cell | row | self.common | stamp) + "\n" for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(lines))
        self.done.add(cell_key(self.common | cell))
