"""`moerge mix`: whole models as the experts of one (Branch-Train-Mix)."""

from __future__ import annotations

import argparse
from pathlib import Path

from .named_dirs import named_dirs
from .progress import add_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add(
        "--models",
        required=True,
        nargs="+",
        action="extend",
        metavar="[NAME=]DIR",
        help="folders or hub ids of two or more fine-tuned copies of one model; the first one's tokenizer is kept",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write: empty, or not there yet")
    add("--top-k", type=int, default=2, metavar="K", help="experts per token (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the routers' start (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of what is written (default: as stored)")
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the folder and says what is in it; returns the exit status. ValueError for what the user can mend."""
    from ..exporting.mix import last_part, mix_models

    models = named_dirs(args.models, "--models", last_part)
    mix = mix_models(
        models, args.output, top_k=args.top_k, seed=args.seed, dtype=args.dtype, progress=not args.no_progress
    )
    print(
        f"wrote {mix.path}: {mix.architecture}, experts {', '.join(mix.names)}, {mix.top_k} per token; "
        f"{mix.parameters:,} weights, {mix.active:,} of them for one token; the averaged weights agree by "
        f"{mix.agreement:.4f} (1: equal models)"
    )
    print(f"its routers are random: moerge train-mix {mix.path} --data FILE --output DIR")
    return 0
