"""`moerge new-expert`: an untrained LoRA, where joint training of expert and gates starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from .model_options import add_placed_model
from .progress import add_progress
from .train_expert import check_named, targets_of
from .training_options import add_overwrite, check_finished, defaults, range_problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..training.experts import new_expert

    default = defaults(new_expert)
    add = parser.add_argument
    add_placed_model(parser)
    add("--output", type=Path, required=True, metavar="DIR", help="the expert's folder, to be made")
    add("--rank", type=int, default=default["rank"], help="of the LoRA (default: %(default)s)")
    add("--alpha", type=float, default=default["alpha"], help="its scale is alpha / rank (default: %(default)g)")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help=f"names of linear layers, or one regular expression (default: {default['target_modules']})",
    )
    add("--seed", type=int, default=default["seed"], help="of its A; B is zero (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add_overwrite(parser)
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    if problems := range_problems(args):
        raise ValueError("; ".join(problems))

    from ..files.atomic import check_writable
    from ..models.pretrained import load_model, usable_device
    from ..training.experts import WEIGHTS, check_no_model, new_expert

    check_no_model(args.output)
    check_finished(args, args.output / WEIGHTS)
    check_named(args)
    check_writable(args.output)
    options = {"rank": args.rank, "alpha": args.alpha, "seed": args.seed, "overwrite": args.overwrite}
    if args.target_modules:
        options["target_modules"] = targets_of(args.target_modules)
    model = load_model(args.model, dtype=args.dtype, device=usable_device("cpu"))
    path = new_expert(model, args.output, **options)
    print(f"wrote {path}, untrained: train it with its gates by")
    print(f"moerge train-gates {args.model} {path} --joint --output {path}-joint --data FILE")
    return 0
