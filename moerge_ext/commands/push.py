"""`moerge push`: an adapter and what lies beside it to the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .progress import add_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the expert's PEFT folder")
    add("repo_id", metavar="REPO_ID", help="the repository, such as user/name; made when it is not there")
    add("--private", action="store_true", help="make it private; one that is there and public is refused")
    add("--revision", metavar="BRANCH", help="a branch, made when it is not there (default: main)")
    add("--base-model", metavar="ID", help="the base's id on the hub, where the adapter names a path of this machine")
    add("--dry-run", action="store_true", help="only print what would be sent; needs no network")
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Sends the files, or prints them; returns the exit status. ValueError for what the user can mend."""
    from ..exporting.push import README, pack, send

    parcel = pack(args.folder, args.repo_id, revision=args.revision, base_model=args.base_model)
    for note in parcel.notes:
        print(f"warning: {note}", file=sys.stderr)
    if args.dry_run:
        print(f"would be sent to {args.repo_id}{f'@{args.revision}' if args.revision else ''}:")
        for name in parcel.files:
            print(f"  {parcel.size(name):>12,} bytes  {name}")
        if parcel.generated:
            print(f"\n{README}, unless the repository has one:\n\n{parcel.files[README].decode()}")
        return 0
    url, names = send(parcel, private=args.private)
    kept = "" if README in names else f"; the {README} of the repository is kept"
    print(f"sent {', '.join(names)}{kept}\n{url}")
    return 0
