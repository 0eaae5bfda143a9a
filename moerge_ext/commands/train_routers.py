"""`moerge train-routers`: the routers of a method over frozen experts, from files of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..methods.option_text import parse_option
from .expert_options import add_experts, add_gates, add_selection, gates_of, load_bank, pairs
from .model_options import add_placed_model
from .needs import describing
from .resuming import check_resumed
from .training_options import Training, add_data, add_training, check_finished, defaults, load

OBJECTIVE = ("balance", "z", "dropout", "sparsity", "train_experts")  # what only `train_routers` takes


def _defaults(method: str | None = None) -> dict[str, Any]:
    from ..methods import METHODS
    from ..training.routers.train import DEFAULTS, train_routers

    made = defaults(train_routers) | DEFAULTS
    return made | dict(METHODS[method].learned.training) if method is not None else made


def of_methods(name: str) -> str:
    """The default of an option that is its method's own: "250 for a; 400 for b, c; else 1000"."""
    from ..methods import METHODS

    values: dict[Any, list[str]] = {}
    for method, row in METHODS.items():
        if row.learned is not None:
            values.setdefault(_defaults(method)[name], []).append(method)
    usual = max(values, key=lambda value: len(values[value]))
    said = [f"{value:g} for {', '.join(methods)}" for value, methods in sorted(values.items()) if value != usual]
    return "; ".join([*said, f"else {usual:g}" if said else f"{usual:g}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..methods import METHODS

    default = _defaults()
    add = parser.add_argument
    add_placed_model(parser)
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
    add_data(parser, default | {"batch_size": None}, required=False, batch_size=of_methods("batch_size"))
    add(
        "--expert-data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="the data of one expert, as --data: all of them for pwe_moe, and for pi_tuning to find the nearest",
    )
    own = {name: of_methods(name) for name in ("steps", "lr")}
    more = add_training(parser, default | own, kept="routers").add_argument
    for name, what in (
        ("balance", "coefficient of the loss that keeps all experts in use"),
        ("z", "coefficient of the loss that keeps scores small"),
        ("sparsity", "coefficient of the loss that prefers experts whose outputs are the layer's own"),
        ("dropout", "share of experts that sits out a step"),
    ):
        more(f"--{name}", type=float, help=f"{what} (default: {of_methods(name)})")
    add_selection(parser)
    more("--train-experts", action="store_true", help="train A and B too; the file keeps them, the folders stay")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    gates_of(args)
    options = dict(parse_option(text) for text in args.option)
    own_files = pairs(args.expert_data, "--expert-data", "FILE")
    check(args, options)
    what = Training(args, *OBJECTIVE)

    from ..experts.routers import ROUTERS_FILE
    from ..files.atomic import check_writable
    from ..methods import get_method
    from ..training.routers.data import check_data
    from ..training.routers.run import NUMBERS, STATE_FILE
    from ..training.routers.train import CHECKPOINT_FOLDER, train_routers

    own = {name: what.read(Path(file)) for name, file in own_files.items()}
    check_finished(args, args.output / ROUTERS_FILE)
    default, learned = _defaults(args.method), get_method(args.method).learned
    settings = {name: what.training.get(name, default[name]) for name in NUMBERS}
    settings |= {"method": args.method, "joint": what.training.get("train_experts", learned.experts)}
    settings |= {} if learned.own_data else {"options": {name: str(value) for name, value in options.items()}}
    state = args.output / CHECKPOINT_FOLDER / STATE_FILE
    check_resumed(what, default, state, args.output / ROUTERS_FILE, **settings)
    check_writable(args.output)
    experts = load_bank(args)
    check_data(get_method(args.method), experts.names, what.rows, own or None)
    check_prompts(args, experts, options)
    model, tokenizer = load(what)
    shared = {"default": default, "examples": max(map(len, [what.rows or [], *own.values()]))}
    shared |= {"method": args.method, "expert_data": own or None, "options": options, **what.shared(tokenizer)}
    result = what.go(train_routers, model, experts, what.rows, args.output, **shared)
    if what.ranks.first:
        print(f"use it with --methods {args.method} --routers {result.path} (moerge eval; generate: --method)")
    return 0


def check_prompts(args: argparse.Namespace, experts: Any, options: dict[str, Any]) -> None:
    """ValueError with all that a method lacks which reads what the task and the experts are for."""
    from ..experts.kinds import INSTRUCTION
    from ..methods import get_method

    if get_method(args.method).learned.common is None:
        return
    problems = []
    if not options.get("description"):
        problems.append('--option description="...", a sentence of what the task asks for')
    facts = experts.global_metadata.get(INSTRUCTION, {})
    if lost := [name for name in experts.names if not facts.get(name, {}).get("instruction")]:
        problems.append(f"an instruction of {', '.join(lost)}: `{describing(args)} --instruction TEXT`")
    if problems:
        raise ValueError(f"method '{args.method}' cannot be trained yet; it needs:\n- " + "\n- ".join(problems))


def check(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """ValueError for options that the method does not take."""
    from ..methods import get_method

    if args.batch_size is None:
        args.batch_size = _defaults(args.method)["batch_size"]
    if "routers" in options:
        raise ValueError("--option routers=...: this command makes them")
    get_method(args.method).configure(**options)
