"""`moerge train-calm`: an anchor and an augmenting model composed by trained cross attention (CALM)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .prompt_options import prompt_of
from .training_options import add_data, add_schedule, defaults, load, my_rows, plan, range_problems, resumable, tell

TRAINING = (
    "steps", "lr", "warmup_ratio", "accumulate", "weight_decay", "eval_every", "checkpoint_every", "seed", "resume",
)  # fmt: skip


def _defaults() -> dict[str, Any]:
    from ..training.composition import train_calm

    return defaults(train_calm)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..models.composition import compose_models

    default, composing = _defaults(), defaults(compose_models)
    add = parser.add_argument
    add("model", metavar="ANCHOR", help="folder or hub id of the model that answers, with its tokenizer")
    add("augmenting", metavar="AUGMENTING", help="folder or hub id of the model that it attends to, of the same tokens")
    add("--output", type=Path, required=True, metavar="DIR", help="where the composition is written")
    add(
        "--connections",
        nargs="+",
        default=[str(composing["connections"])],
        metavar="N | A:B",
        help="how many, evenly over the layers, or pairs of anchor's and augmenting's layer, from 0 (default: "
        f"{composing['connections']})",
    )
    add("--heads", type=int, default=composing["heads"], help="of every connection (default: %(default)s)")
    add_data(parser, default)
    group = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    add_schedule(group, default, kept="weights")
    more = group.add_argument
    more("--weight-decay", type=float, help=f"AdamW's (default: {default['weight_decay']:g})")
    more("--checkpoint-every", type=int, help=f"steps between saved states (default: {default['checkpoint_every']})")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    if problems := range_problems(args):
        raise ValueError("; ".join(problems))
    connections = connections_of(args.connections)

    from ..files.atomic import check_can_write
    from ..models.composition import compose_models
    from ..training.composition import train_calm
    from ..training.ranks import current_ranks

    ranks, prompt = current_ranks(), prompt_of(args)
    rows = my_rows(args.data, ranks, prompt)
    training = {name: getattr(args, name) for name in TRAINING if hasattr(args, name)}
    if hasattr(args, "validation"):
        training["validation"] = my_rows(args.validation, ranks, prompt)
    check_can_write(args.output)

    def composed() -> Any:
        return compose_models(args.model, args.augmenting, connections=connections, heads=args.heads,
                              seed=training.get("seed", 0), dtype=args.dtype)  # fmt: skip

    model, tokenizer = load(args, composed)
    if ranks.first:
        print(plan(len(rows), _defaults(), batch_size=args.batch_size, ranks=ranks.size, **training), flush=True)
    with resumable(args):
        result = train_calm(
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
        print(f"ask it: moerge eval --model {result.path} --tasks DIR --methods base")
    return 0


def connections_of(words: list[str]) -> int | list[tuple[int, int]]:
    """What `compose_models` takes, from the words of --connections."""
    try:
        if len(words) == 1 and ":" not in words[0]:
            return int(words[0])
        return [(int(anchor), int(augmenting)) for anchor, augmenting in (word.split(":") for word in words)]
    except ValueError:
        raise ValueError(f"--connections takes a number, or pairs such as 3:1 7:3, got {' '.join(words)}") from None
