"""`moerge list`: the adapters in folders, as a table."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from .terminal import console

if TYPE_CHECKING:
    from ..experts.catalogue import Entry

COLUMNS = ("name", "base model", "rank", "modules", "format", "size", "for routing", "trained with", "notes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "dirs", nargs="+", metavar="DIR", help="adapters (folders, GGUF files, hub ids), or folders of such folders"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, with whole paths and lists")


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 when at least one of its rows can be used, else 1."""
    from ..experts.catalogue import catalogue

    entries = catalogue(args.dirs)
    if args.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
    else:
        show(entries)
    return 0 if any(entry.problem is None for entry in entries) else 1


def show(entries: list[Entry]) -> None:
    """The table, and below it, one line each, why a folder cannot be used."""
    from rich.markup import escape
    from rich.table import Table

    screen = console(width=200)
    table = Table(*COLUMNS)
    for entry in entries:
        cells = _cells(entry)
        table.add_row(
            *(escape(_printable(cells[column])) for column in COLUMNS), style="red" if entry.problem else None
        )
    screen.print(table)
    for entry in entries:
        for text in filter(None, (entry.problem, *entry.notes)):
            screen.print(_printable(f"{entry.path}: {text}"), highlight=False, markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Without the control characters that a name in somebody's file may hold."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _cells(entry: Entry) -> dict[str, str]:
    """{column: text} of one row."""
    ranks = dict.fromkeys(map(str, (entry.ranks[0], entry.ranks[-1]))) if entry.ranks else ()
    layers = f" ({', '.join(entry.layers)})" if entry.layers else ""
    routing = [f"{kind} ({count})" if count else kind for kind, count in entry.gates.items()]
    routing += [f"examples by {embedder}" for embedder in entry.indices]
    notes = "cannot be used, see below" if entry.problem else "see below" if entry.notes else ""
    return {
        "name": entry.name,
        "base model": entry.base_model or "-",
        "rank": "-".join(ranks) or "-",
        "modules": f"{entry.modules}{layers}" if entry.modules else "-",
        "format": (entry.format or "-") + (f" for {entry.made_for}" if entry.made_for else ""),
        "size": _bytes(entry.size) if entry.size else "-",
        "for routing": ", ".join(routing) or "-",
        "trained with": ", ".join(entry.prompts) or "-",
        "notes": notes,
    }


def _bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"
