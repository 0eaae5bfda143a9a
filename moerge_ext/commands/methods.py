"""`moerge methods`: the routing methods, their options and their papers."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("-v", "--verbose", action="store_true", help="also the survey's taxonomy, options and papers")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns the exit status."""
    from rich.console import Console

    from ..methods import table

    table.render(Console() if sys.stdout.isatty() else Console(width=160), verbose=args.verbose)
    return 0
