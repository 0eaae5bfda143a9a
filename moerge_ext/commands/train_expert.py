"""`moerge train-expert`: a LoRA expert from a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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

# what `train_expert` takes besides data and machine; one that is not given keeps the function's default
TRAINING = (
    "rank", "alpha", "target_modules", "steps", "lr", "warmup_ratio", "accumulate", "weight_decay", "validation",
    "eval_every", "checkpoint_every", "seed", "resume",
)  # fmt: skip


def _defaults() -> dict[str, Any]:
    from ..training.experts import train_expert

    return defaults(train_expert)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    default = _defaults()
    parser.add_argument("model", help="folder (or hub id) of the base model, with its tokenizer")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the expert's folder, to be made")
    add_data(parser, default)
    group = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    add = group.add_argument
    add("--rank", type=int, help=f"of the LoRA (default: {default['rank']})")
    add("--alpha", type=float, help=f"its scale is alpha / rank (default: {default['alpha']:g})")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help=f"names of linear layers, or one regular expression (default: {default['target_modules']})",
    )
    add_schedule(group, default, kept="weights")
    add("--weight-decay", type=float, help=f"AdamW's (default: {default['weight_decay']:g})")
    add("--checkpoint-every", type=int, help=f"steps between saved states (default: {default['checkpoint_every']})")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    if problems := range_problems(args):
        raise ValueError("; ".join(problems))
    training = {name: getattr(args, name) for name in TRAINING if hasattr(args, name)}
    if "target_modules" in training:
        training["target_modules"] = targets_of(training["target_modules"])

    from ..files.atomic import check_writable
    from ..training.experts import train_expert
    from ..training.ranks import current_ranks

    ranks, prompt = current_ranks(), prompt_of(args)
    rows = my_rows(args.data, ranks, prompt)
    if "validation" in training:
        training["validation"] = my_rows(training["validation"], ranks, prompt)
    check_writable(args.output)
    model, tokenizer = load(args)
    if ranks.first:
        print(plan(len(rows), _defaults(), batch_size=args.batch_size, ranks=ranks.size, **training), flush=True)
    with resumable(args):
        result = train_expert(
            model,
            rows,
            args.output,
            tokenizer=tokenizer,
            max_length=args.max_length,
            prompt=prompt,
            batch_size=args.batch_size,
            progress=not args.no_progress,
            **training,
        )
    if ranks.first:
        tell(result)
    return 0


def targets_of(words: list[str]) -> str | list[str]:
    """PEFT's target_modules from the words of --target-modules."""
    return words[0] if len(words) == 1 and _is_pattern(words[0]) else words


def _is_pattern(text: str) -> bool:
    """Whether one word of --target-modules is what PEFT takes as text: "all-linear", or a regular expression."""
    return text == "all-linear" or not text.replace("_", "").replace(".", "").isalnum() or ".*" in text
