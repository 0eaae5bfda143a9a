"""`moerge methods`: the routing methods, their options and their papers."""

from __future__ import annotations

import argparse

from .terminal import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="of these methods alone, with all there is to say")
    parser.add_argument("-v", "--verbose", action="store_true", help="also the survey's taxonomy, options and papers")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status. ValueError for names of no method."""
    from ..methods import table

    table.render(console(), verbose=args.verbose, names=args.names)
    return 0
