"""`moerge train-routers`: the routers of a method over frozen experts, from files of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..methods.option_text import parse_option
from .expert_options import add_experts, add_gates, gates_of, load_bank, pairs
from .prompt_options import prompt_of
from .training_options import add_data, add_schedule, defaults, load, my_rows, plan, range_problems, resumable, tell

# an option that is not given is absent from the arguments, so that the method's own numbers hold
NUMBERS = ("steps", "lr", "warmup_ratio", "accumulate", "eval_every", "seed", "balance", "z", "dropout", "sparsity")


def _defaults(method: str | None = None) -> dict[str, Any]:
    from ..methods import METHODS
    from ..training.routers.train import DEFAULTS, train_routers

    made = defaults(train_routers) | DEFAULTS
    return made | dict(METHODS[method].learned.training) if method is not None else made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..methods import METHODS

    default = _defaults()
    add = parser.add_argument
    add("model", help="folder (or hub id) of the base model, with its tokenizer")
    add_experts(parser)
    add_gates(parser)
    add(
        "--method",
        required=True,
        choices=[name for name, row in METHODS.items() if row.learned is not None],
        help="whose routers; see `moerge methods`",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="where moerge_routers.safetensors is written")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, repeatable")
    add_data(parser, default | {"batch_size": None}, required=False)
    add(
        "--expert-data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="the data of one expert, as --data: all of them for pwe_moe, and for pi_tuning to find the nearest",
    )
    group = parser.add_argument_group(
        "training (None or not given: the method's own)", argument_default=argparse.SUPPRESS
    )
    add_schedule(group, default | dict.fromkeys(("steps", "lr"), "the method's"), kept="routers")
    more = group.add_argument
    more("--balance", type=float, help="coefficient of the loss that keeps all experts in use (default: the method's)")
    more("--z", type=float, help="coefficient of the loss that keeps scores small (default: the method's)")
    more(
        "--sparsity",
        type=float,
        help="coefficient of the loss that prefers experts whose outputs are the layer's own (default: the method's)",
    )
    more("--dropout", type=float, help="share of experts that sits out a step (default: the method's)")
    more("--train-experts", action="store_true", help="train A and B too; the file keeps them, the folders stay")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    gates_of(args)
    options = dict(parse_option(text) for text in args.option)
    own_files = pairs(args.expert_data, "--expert-data", "FILE")
    check(args, options)

    from ..files.atomic import check_writable
    from ..methods import get_method
    from ..training.ranks import current_ranks
    from ..training.routers.data import check_data
    from ..training.routers.train import train_routers

    ranks, prompt = current_ranks(), prompt_of(args)
    rows = None if args.data is None else my_rows(args.data, ranks, prompt)
    own = {name: my_rows(Path(file), ranks, prompt) for name, file in own_files.items()}
    training = {name: getattr(args, name) for name in (*NUMBERS, "train_experts", "resume") if hasattr(args, name)}
    if hasattr(args, "validation"):
        training["validation"] = my_rows(args.validation, ranks, prompt)
    check_writable(args.output)
    experts = load_bank(args)
    check_data(get_method(args.method), experts.names, rows, own or None)
    model, tokenizer = load(args)
    if ranks.first:
        print(plan_of(max(map(len, [rows or [], *own.values()])), args, ranks=ranks.size), flush=True)
    with resumable(args):
        result = train_routers(
            model,
            experts,
            rows,
            args.output,
            method=args.method,
            expert_data=own or None,
            options=options,
            batch_size=args.batch_size,
            tokenizer=tokenizer,
            max_length=args.max_length,
            prompt=prompt,
            progress=not args.no_progress,
            **training,
        )
    if ranks.first:
        tell(result)
        print(f"use it with --methods {args.method} --routers {result.path} (moerge eval)")
    return 0


def check(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """ValueError for numbers out of range and options that the method does not take."""
    from ..methods import get_method

    if args.batch_size is None:
        args.batch_size = _defaults(args.method)["batch_size"]
    if problems := range_problems(args):
        raise ValueError("; ".join(problems))
    if "routers" in options:
        raise ValueError("--option routers=...: this command makes them")
    get_method(args.method).configure(**options)


def plan_of(examples: int, args: argparse.Namespace, *, ranks: int = 1) -> str:
    """One line that says how much data a run will see, before it starts."""
    given = {name: getattr(args, name) for name in ("steps", "accumulate") if hasattr(args, name)}
    return plan(examples, _defaults(args.method), batch_size=args.batch_size, ranks=ranks, **given)
