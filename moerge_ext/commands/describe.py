"""`moerge describe`: the global vector of one expert."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..experts.formats import inspect_adapter
from ..experts.gates import gates_file
from ..experts.hub import find_adapter, output_folder
from ..experts.kinds import INSTRUCTION
from ..files.atomic import check_can_write
from ..files.kept import check_replaced
from ..files.rows import read_rows
from ..queries.describe import EXAMPLES, describe, draw
from ..queries.embedder import Embedder
from ..queries.hidden import base_name
from ..queries.index import index_examples, index_file
from .needs import embedder_problems
from .options import add_embedder, add_writer, build_embedder, build_writer, check_writer
from .progress import add_progress
from .training_options import add_overwrite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("--adapter", required=True, metavar="DIR", help="the expert's LoRA folder, or with --output its hub id")
    add("--examples", type=Path, metavar="FILE", help='JSON lines {"input": ..., "target": ...} of its training data')
    add("--instruction", metavar="TEXT", help="the task in one sentence, instead of --examples and --writer")
    add("--index", type=int, metavar="N", help="embed up to N of --examples, for the retrieval methods (1000)")
    add(
        "--index-texts",
        action="store_true",
        help="with --index: keep the examples' texts in it, for all who get the adapter; a --writer sees those like a "
        "query (GLIDER's few-shot setting)",
    )
    add(
        "--hidden-layer",
        type=int,
        metavar="N",
        help="with --index: --embedder is the base model, and its hidden state N is averaged (-2: method dam)",
    )
    add("--count", type=int, default=EXAMPLES, help="examples shown to the language model (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    add("--output", type=Path, metavar="DIR", help="where to write (default: the adapter's folder)")
    add("--device", default="cpu", help="of the models (default: %(default)s)")
    add_overwrite(parser)
    add_writer(parser)
    add_embedder(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    check_writer(args)
    describing = args.instruction is not None or bool(args.writer)
    check(args, describing)
    inspect_adapter(*find_adapter(args.adapter))
    target = output_folder(args.adapter, args.output)
    check_can_write(target)
    if describing:
        check_replaced(gates_file(target, INSTRUCTION), overwrite=args.overwrite)
    rows = read_rows(args.examples, text=True) if args.examples is not None else []
    if args.writer:  # they are looked at before a model is read
        draw(rows, args.count, args.seed)
    embedder = build_embedder(args, args.device) if args.hidden_layer is None else base_embedder(args)
    if args.index is not None:
        check_replaced(target / index_file(embedder.name), overwrite=args.overwrite)
    if describing:
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
        drawn = {"samples": args.index, "seed": args.seed, "texts": args.index_texts}
        print(f"wrote {index_examples(args.adapter, rows, embedder, output_dir=args.output, **drawn)}")
    return 0


def check(args: argparse.Namespace, describing: bool) -> None:
    """ValueError for arguments that do not go together."""
    problems = embedder_problems(args) if args.hidden_layer is None else []
    if args.hidden_layer is not None and not args.embedder:
        problems.append("--embedder MODEL, which is the base model with --hidden-layer")
    if not describing and args.index is None:
        problems.append("--examples FILE and --writer MODEL, or --instruction TEXT, or --examples FILE and --index N")
    if problems:
        raise ValueError("pass " + "; and pass ".join(problems))
    if args.instruction is not None and (args.writer or (args.examples is not None and args.index is None)):
        raise ValueError("--instruction is used as it is: leave --writer out, and --examples unless there is --index")
    if args.index is not None and (args.index < 1 or args.examples is None):
        raise ValueError(f"--index takes the number of --examples to embed, at least 1; got {args.index}")
    if args.index_texts and args.index is None:
        raise ValueError("--index-texts is for --index N, which it makes keep the texts")
    if args.writer and args.examples is None:
        raise ValueError("--writer writes from examples: pass --examples FILE")
    if args.hidden_layer is not None and describing:
        raise ValueError("--hidden-layer is for --index alone: instructions are embedded by a model of texts")


def base_embedder(args: argparse.Namespace) -> Embedder:
    """The embedder of --hidden-layer."""
    from ..models.pretrained import load_model, load_tokenizer, usable_device

    model = load_model(args.embedder, dtype="float32", device=usable_device(args.device))
    name = args.embedder_name or base_name(args.embedder)
    return Embedder.from_hidden_states(model, load_tokenizer(args.embedder), layer=args.hidden_layer, name=name)
