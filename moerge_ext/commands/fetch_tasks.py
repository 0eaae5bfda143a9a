"""`moerge fetch-tasks`: the papers' own sets as task folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..published.collections import COLLECTIONS
from .progress import add_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("collection", nargs="?", choices=tuple(COLLECTIONS), help="which set; without one they are listed")
    add("--output", type=Path, metavar="DIR", help="where the task folders go")
    add("--tasks", nargs="+", action="extend", metavar="NAME", help="some of its tasks (default: all but the optional)")
    add(
        "--from",
        dest="copies",
        type=Path,
        metavar="DIR",
        help="folder with copies of the repositories, DIR/<user>/<name>, instead of the hub",
    )
    add("--train", type=int, default=10_000, metavar="N", help="training rows of a task at most (default: %(default)s)")
    add(
        "--validation",
        type=int,
        default=500,
        metavar="N",
        help="validation rows, cut from train (default: %(default)s)",
    )
    add("--test", type=int, default=1000, metavar="N", help="test rows (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    if args.collection is None:
        for name, row in COLLECTIONS.items():
            print(f"{name}: {row.summary}\n    {', '.join(row.tasks)}")
            if row.optional:
                print(f"    by name ({row.why}): {', '.join(row.optional)}")
        return 0
    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    problems = [
        f"--{name} must be at least {int(name == 'test')}, got {n}"
        for name, n in sizes.items()
        if n < int(name == "test")
    ]
    if args.output is None:
        problems.append("--output DIR is needed: where the task folders go")
    if problems:
        raise ValueError("; ".join(problems))

    from ..published.fetch import fetch

    options = {"tasks": args.tasks, "copies": args.copies, "sizes": sizes, "seed": args.seed}
    for made in fetch(args.collection, args.output, progress=not args.no_progress, **options):
        rows = ", ".join(f"{split} {count}" for split, count in made.rows.items())
        print(f"{made.folder}: {rows}{' (already there)' if made.already else ''}")
    return 0
