"""`moerge describe`: the global vector of one expert."""

from __future__ import annotations

import argparse
from pathlib import Path

from .describe import EXAMPLES, describe
from .index import index_examples
from .options import add_embedder, add_writer, build_embedder, build_writer, check_writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("--adapter", type=Path, required=True, metavar="DIR", help="the expert's PEFT LoRA folder")
    add("--examples", type=Path, metavar="FILE", help='JSON lines {"input": ..., "target": ...} of its training data')
    add("--instruction", metavar="TEXT", help="the task in one sentence, instead of --examples and --writer")
    add("--index", type=int, metavar="N", help="also embed up to N of --examples, for the retrieval methods (1000)")
    add("--count", type=int, default=EXAMPLES, help="examples shown to the language model (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add("--output", type=Path, metavar="DIR", help="where to write (default: the adapter's folder)")
    add("--device", default="cpu", help="of the models (default: %(default)s)")
    add_writer(parser)
    add_embedder(parser, required=True)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    from ..training.cli import read_rows

    check_writer(args)
    if args.instruction is None and (args.examples is None or not args.writer):
        raise ValueError("pass --examples FILE and --writer MODEL, or --instruction TEXT")
    if args.instruction is not None and (args.writer or (args.examples is not None and args.index is None)):
        raise ValueError("--instruction is used as it is: leave --writer out, and --examples unless there is --index")
    if args.index is not None and (args.index < 1 or args.examples is None):
        raise ValueError(f"--index takes the number of --examples to embed, at least 1; got {args.index}")
    rows = read_rows(args.examples) if args.examples is not None else []
    embedder = build_embedder(args, args.device)
    made = describe(
        args.adapter,
        rows,
        embedder,
        build_writer(args, args.device),
        instruction=args.instruction,
        count=args.count,
        seed=args.seed,
        output_dir=args.output,
    )
    print(f"instruction: {made.instruction}\nwrote {made.path}")
    if args.index is not None:
        print(f"wrote {index_examples(args.adapter, rows, embedder, samples=args.index, seed=args.seed)}")
    return 0
