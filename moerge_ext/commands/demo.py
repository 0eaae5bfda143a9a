"""`moerge demo`: the embedded model and its experts."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("--samples", type=int, default=25, help="conversations per row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the heatmap")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status. ValueError for arguments that make no sense."""
    if args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}")
    from ..demo.run import show

    show(args.samples, args.out, args.json)
    return 0
