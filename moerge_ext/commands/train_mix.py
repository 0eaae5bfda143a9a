"""`moerge train-mix`: the routers of a mixture of whole models, or all of it, from a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .prompt_options import prompt_of
from .training_options import add_data, add_schedule, defaults, load, my_rows, plan, range_problems, resumable, tell

# an option that is not given is absent from the arguments, so that the function's default holds
TRAINING = (
    "train", "balance", "steps", "lr", "warmup_ratio", "accumulate", "weight_decay", "eval_every", "checkpoint_every",
    "seed", "resume",
)  # fmt: skip


def _defaults() -> dict[str, Any]:
    from ..training.mixture import train_mix

    return defaults(train_mix)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..training.mixture import RATES

    default = _defaults()
    parser.add_argument("model", help="folder (or hub id) of the mixture, as `moerge mix` writes it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the trained model is written")
    add_data(parser, default)
    parser.set_defaults(dtype="float32")
    group = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    add = group.add_argument
    add("--train", choices=tuple(RATES), help=f"the routers alone or every weight (default: {default['train']})")
    add("--balance", type=float, help=f"of the loss that keeps all experts in use (default: {default['balance']})")
    add_schedule(
        group, default | {"lr": ", ".join(f"{rate:g} for {what}" for what, rate in RATES.items())}, kept="weights"
    )
    add("--weight-decay", type=float, help=f"AdamW's (default: {default['weight_decay']:g})")
    add("--checkpoint-every", type=int, help=f"steps between saved states (default: {default['checkpoint_every']})")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    if problems := range_problems(args):
        raise ValueError("; ".join(problems))

    from ..files.atomic import check_can_write
    from ..models.pretrained import load_config
    from ..training.mixture import train_mix
    from ..training.ranks import current_ranks

    ranks, prompt = current_ranks(), prompt_of(args)
    rows = my_rows(args.data, ranks, prompt)
    training = {name: getattr(args, name) for name in TRAINING if hasattr(args, name)}
    if hasattr(args, "validation"):
        training["validation"] = my_rows(args.validation, ranks, prompt)
    check_can_write(args.output)
    model, tokenizer = load(args)
    if ranks.first:
        print(plan(len(rows), _defaults(), batch_size=args.batch_size, ranks=ranks.size, **training), flush=True)
    with resumable(args):
        result = train_mix(
            model,
            rows,
            args.output,
            tokenizer=tokenizer,
            max_length=args.max_length,
            prompt=prompt,
            batch_size=args.batch_size,
            dtype=load_config(args.model).dtype,
            progress=not args.no_progress,
            **training,
        )
    if ranks.first:
        tell(result)
        print(f"use it as any model: moerge eval --model {result.path}, vLLM, transformers")
    return 0
