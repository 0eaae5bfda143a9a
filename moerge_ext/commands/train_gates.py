"""`moerge train-gates`: gates for one expert from a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..experts.kinds import AVERAGE_ACTIVATION, SIGMOID_GATE
from .model_options import add_placed_model
from .resuming import check_resumed
from .training_options import Training, add_data, add_training, check_finished, defaults, given, load

PAPER_BATCH = 1024  # sequences per step in PHATGOOSE, arXiv 2402.05859, section 4.1
SAMPLES = 1000  # of `average_activation`: section 4.2

BOTH = ("seed", "overwrite")  # options of the training that --kind average-activation takes as well


def _defaults() -> dict[str, Any]:
    from ..training.gates import train_gates

    return defaults(train_gates)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    default = _defaults()
    add = parser.add_argument
    add_placed_model(parser, "adapter")
    add(
        "adapter",
        metavar="ADAPTER",
        help="the expert's LoRA folder, or with --output its hub id (user/repo[/sub][@rev])",
    )
    add(
        "--kind",
        choices=(SIGMOID_GATE, AVERAGE_ACTIVATION),
        default=SIGMOID_GATE,
        help="train gates, or take every module's mean input (default: %(default)s)",
    )
    add(
        "--samples",
        type=int,
        metavar="N",
        help=f"of --kind {AVERAGE_ACTIVATION}: random rows of the data (default: {SAMPLES})",
    )
    add("--modules", metavar="PATTERN", help="only these modules of the adapter: a regular expression (default: all)")
    add("--output", type=Path, metavar="DIR", help="where to write (default: the adapter's folder)")
    add_data(parser, default)
    forwards = PAPER_BATCH // default["batch_size"]
    paper = f"; {forwards}, with --batch-size {default['batch_size']}, are the paper's {PAPER_BATCH} sequences per step"
    title = f"training, of --kind {SIGMOID_GATE}"
    group = add_training(parser, default, title=title, accumulate=paper, kept="gates", weight_decay=False)
    group.add_argument("--joint", action="store_true", help="train the LoRA as well; needs --output")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    check(args)
    what = Training(args, "joint")

    from ..experts.formats import inspect_adapter
    from ..experts.formats.peft import WEIGHTS_FILE
    from ..experts.gates import gates_file
    from ..experts.hub import find_adapter, output_folder
    from ..experts.selection import Selection
    from ..files.atomic import check_writable
    from ..training.activation import average_activation
    from ..training.gates import CHECKPOINT_FOLDER, STATE_FILE, train_gates

    name, folder = find_adapter(args.adapter)
    inspect_adapter(name, folder, args.model, keep=Selection(args.modules).keeps)
    target = output_folder(args.adapter, args.output)
    check_finished(args, gates_file(target, args.kind), *([target / WEIGHTS_FILE] if hasattr(args, "joint") else []))
    state, joint = target / CHECKPOINT_FOLDER / STATE_FILE, hasattr(args, "joint")
    check_resumed(what, _defaults(), state, gates_file(target, args.kind), joint=joint)
    check_writable(target)
    model, tokenizer = load(what)
    shared = {"output_dir": args.output, "modules": args.modules, **what.shared(tokenizer)}
    if args.kind == AVERAGE_ACTIVATION:
        shared |= {"samples": args.samples or SAMPLES, **what.training}
        path = average_activation(model, args.adapter, what.rows, **shared)
        if what.ranks.first:
            print(f"wrote {path}")
    else:
        shared |= {"default": _defaults(), "examples": len(what.rows)}
        what.go(train_gates, model, args.adapter, what.rows, **shared)
    if what.ranks.first and not hasattr(args, "joint"):
        say_where(name, folder, target)
    return 0


def say_where(name: str, folder: Path, target: Path) -> None:
    """How gates that do not lie beside their adapter are used."""
    if target.resolve() != folder.resolve():
        print(f"they are not beside the adapter: use them with --gates {name}={target}")


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that do not go together."""
    training = given(args, "joint")
    if args.kind != SIGMOID_GATE and (wrong := [name for name in training if name not in BOTH]):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ValueError(
            f"--kind {args.kind} trains nothing and takes no {named}; leave that out, or use --kind {SIGMOID_GATE}"
        )
    problems = []
    if args.samples is not None and args.kind != AVERAGE_ACTIVATION:
        problems.append(f"--samples is for --kind {AVERAGE_ACTIVATION}")
    if args.samples is not None and args.samples < 1:
        problems.append(f"--samples must be at least 1, got {args.samples}")
    if "joint" in training and args.modules is not None:
        problems.append("--joint writes a whole adapter: --modules cannot leave some out")
    if "joint" in training and args.output is None:
        problems.append("--joint changes the adapter's weights: pass --output DIR")
    if problems:
        raise ValueError("; ".join(problems))
