"""`moerge doctor`: what was built, whether it fits this machine, what to do if not; which way a model's layers take."""

from __future__ import annotations

import argparse

from ..native.health import examine
from .expert_options import add_experts, add_gates, add_placing, add_selection, gates_of, load_bank, placing_of
from .fits import check_fits
from .model_options import add_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add_model(parser, required=False, more=": also say which way its layers take, and why not a faster one")
    add_experts(parser, required=False)
    add_gates(parser)
    add("--method", default="arrow", help="with --model (default: %(default)s, which needs no gates)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add_selection(parser)
    add_placing(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 when all fits, 1 otherwise. ValueError for arguments that do not go together."""
    if bool(args.model) != bool(args.experts):
        raise ValueError("--model and --experts go together: the layers that experts name are those that are explained")
    gates_of(args)
    report = examine()
    width = max(len(name) for name, _ in report.lines)
    for name, value in report.lines:
        print(f"{name:<{width}}  {value}")
    print()
    for problem, mend in report.problems:
        print(f"PROBLEM: {problem}\n{mend}\n")
    if not report.ok:
        return 1
    print("All fits.")
    if args.model:
        print(f"\n{ways(args)}")
    return 0


def ways(args: argparse.Namespace) -> str:
    """Which way every kind of layer takes. By module: `moerge doctor` alone imports nothing of all this."""
    from ..models.pretrained import load_model, usable_device
    from ..routing.patch import patch

    experts = load_bank(args)
    options = {"top_k": min(4, len(experts))} if args.method == "arrow" else {}
    check_fits(args, experts, args.method, options)
    model = load_model(args.model, dtype=args.dtype, device=usable_device(args.device))
    return str(patch(model, experts, args.method, **placing_of(args), **options).explain())
