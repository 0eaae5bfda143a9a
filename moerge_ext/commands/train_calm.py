"""`moerge train-calm`: an anchor and an augmenting model composed by trained cross attention (CALM)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .model_options import add_placed_model
from .resuming import check_resumed
from .training_options import Training, add_data, add_training, check_finished, defaults, load


def _defaults() -> dict[str, Any]:
    from ..training.composition import train_calm

    return defaults(train_calm)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..models.composition import compose_models

    default, composing = _defaults(), defaults(compose_models)
    add = parser.add_argument
    text = "folder or hub id of the model that answers, with its tokenizer"
    add_placed_model(parser, "augmenting", place="ANCHOR", text=text)
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
    add_training(parser, default, kept="weights", overwrite=False)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    what = Training(args)
    connections = connections_of(args.connections)

    from ..files.atomic import check_can_write
    from ..models.composition import compose_models
    from ..models.stored import MODEL_CONFIG, WEIGHTS
    from ..training.composition import CHECKPOINT_FOLDER, STATE_FILE, train_calm

    check_finished(args, args.output / MODEL_CONFIG, never=True)
    state = args.output / CHECKPOINT_FOLDER / STATE_FILE
    check_resumed(what, _defaults(), state, args.output / WEIGHTS, never=args.output / MODEL_CONFIG, text=False)
    check_can_write(args.output)

    def composed() -> Any:
        return compose_models(args.model, args.augmenting, connections=connections, heads=args.heads,
                              seed=what.training.get("seed", 0), dtype=args.dtype)  # fmt: skip

    model, tokenizer = load(what, composed)
    shared = {"default": _defaults(), "examples": len(what.rows), **what.shared(tokenizer)}
    result = what.go(train_calm, model, what.rows, args.output, **shared)
    if what.ranks.first:
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
