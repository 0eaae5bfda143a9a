"""`moerge train-gates`: gates for one expert from a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..experts.kinds import AVERAGE_ACTIVATION, SIGMOID_GATE
from .prompt_options import prompt_of
from .training_options import (
    add_data,
    add_schedule,
    defaults,
    load,
    my_rows,
    plan,
    range_problems,
    resumable,
    tell,
)

PAPER_BATCH = 1024  # sequences per step in PHATGOOSE, arXiv 2402.05859, section 4.1
SAMPLES = 1000  # of `average_activation`: section 4.2

# what only training takes; an option that is not given is absent from the arguments, so that train_gates's own
# defaults hold and --kind average-activation can refuse the rest
TRAINING = ("steps", "lr", "warmup_ratio", "accumulate", "eval_every", "validation", "joint", "resume")


def _defaults() -> dict[str, Any]:
    from ..training.gates import train_gates

    return defaults(train_gates)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    default = _defaults()
    add = parser.add_argument
    add("model", help="folder (or hub id) of the base model, with its tokenizer")
    add("adapter", help="the expert's LoRA folder, or with --output its hub id (user/repo[/sub][@rev])")
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
    add("--output", type=Path, metavar="DIR", help="where to write (default: the adapter's folder)")
    add_data(parser, default)
    group = parser.add_argument_group(f"training, of --kind {SIGMOID_GATE}", argument_default=argparse.SUPPRESS)
    forwards = PAPER_BATCH // default["batch_size"]
    paper = f"; {forwards}, with --batch-size {default['batch_size']}, are the paper's {PAPER_BATCH} sequences per step"
    add_schedule(group, default, accumulate=paper, kept="gates")
    group.add_argument("--joint", action="store_true", help="train the LoRA as well; needs --output")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    training = {name: getattr(args, name) for name in TRAINING if hasattr(args, name)}
    check(args, training)
    seed = {"seed": args.seed} if hasattr(args, "seed") else {}

    from ..experts.formats import inspect_adapter
    from ..experts.hub import find_adapter, output_folder
    from ..files.atomic import check_writable
    from ..training.activation import average_activation
    from ..training.gates import train_gates
    from ..training.ranks import current_ranks

    ranks, prompt = current_ranks(), prompt_of(args)
    rows = my_rows(args.data, ranks, prompt)
    if "validation" in training:
        training["validation"] = my_rows(training["validation"], ranks, prompt)
    name, folder = find_adapter(args.adapter)
    inspect_adapter(name, folder, args.model)
    target = output_folder(args.adapter, args.output)
    check_writable(target)
    model, tokenizer = load(args)
    common = {"tokenizer": tokenizer, "max_length": args.max_length, "prompt": prompt}
    common |= {"batch_size": args.batch_size, "output_dir": args.output, "progress": not args.no_progress}
    if args.kind == AVERAGE_ACTIVATION:
        path = average_activation(model, args.adapter, rows, samples=args.samples or SAMPLES, **seed, **common)
        if ranks.first:
            print(f"wrote {path}")
            say_where(name, folder, target)
        return 0
    if ranks.first:
        print(plan_of(len(rows), batch_size=args.batch_size, ranks=ranks.size, **training), flush=True)
    with resumable(args):
        result = train_gates(model, args.adapter, rows, **training, **seed, **common)
    if ranks.first:
        tell(result)
        if not hasattr(args, "joint"):
            say_where(name, folder, target)
    return 0


def say_where(name: str, folder: Path, target: Path) -> None:
    """How gates that do not lie beside their adapter are used."""
    if target.resolve() != folder.resolve():
        print(f"they are not beside the adapter: use them with --gates {name}={target}")


def check(args: argparse.Namespace, training: dict[str, Any]) -> None:
    """ValueError for arguments that are out of range or do not go together; `training`: those given of TRAINING."""
    if args.kind != SIGMOID_GATE and training:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in training)
        raise ValueError(
            f"--kind {args.kind} trains nothing and takes no {given}; leave that out, or use --kind {SIGMOID_GATE}"
        )
    problems = range_problems(args)
    if args.samples is not None and args.kind != AVERAGE_ACTIVATION:
        problems.append(f"--samples is for --kind {AVERAGE_ACTIVATION}")
    if args.samples is not None and args.samples < 1:
        problems.append(f"--samples must be at least 1, got {args.samples}")
    if "joint" in training and args.output is None:
        problems.append("--joint changes the adapter's weights: pass --output DIR")
    if problems:
        raise ValueError("; ".join(problems))


def plan_of(examples: int, *, batch_size: int, **training: Any) -> str:
    """One line that says how much data a run will see, before it starts."""
    return plan(examples, _defaults(), batch_size=batch_size, **training)
