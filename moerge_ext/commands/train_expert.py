"""`moerge train-expert`: a LoRA expert from a file of examples."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from .model_options import add_placed_model
from .resuming import check_resumed
from .training_options import Training, add_data, add_training, check_finished, defaults, load

LORA = ("rank", "alpha", "target_modules")  # what only `train_expert` takes


def _defaults() -> dict[str, Any]:
    from ..training.experts import train_expert

    return defaults(train_expert)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    default = _defaults()
    add_placed_model(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the expert's folder, to be made")
    add_data(parser, default)
    add = add_training(parser, default, kept="weights").add_argument
    add("--rank", type=int, help=f"of the LoRA (default: {default['rank']})")
    add("--alpha", type=float, help=f"its scale is alpha / rank (default: {default['alpha']:g})")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help=f"names of linear layers, or one regular expression (default: {default['target_modules']})",
    )


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    what = Training(args, *LORA)
    if "target_modules" in what.training:
        what.training["target_modules"] = targets_of(what.training["target_modules"])

    from ..files.atomic import check_writable
    from ..training.experts import CHECKPOINT_FOLDER, STATE_FILE, WEIGHTS, check_no_model, train_expert

    check_no_model(args.output)
    check_finished(args, args.output / WEIGHTS)
    default, folder = _defaults(), args.output / CHECKPOINT_FOLDER
    lora = {name: what.training.get(name, default[name]) for name in LORA}
    if not isinstance(lora["target_modules"], str):
        lora["target_modules"] = sorted(lora["target_modules"])
    check_resumed(what, default, folder / STATE_FILE, args.output / WEIGHTS, **lora)
    check_named(args)
    check_writable(args.output)
    model, tokenizer = load(what)
    shared = {"default": default, "examples": len(what.rows), **what.shared(tokenizer)}
    what.go(train_expert, model, what.rows, args.output, **shared)
    return 0


def check_named(args: argparse.Namespace) -> None:
    """ValueError for --target-modules that name no layer of the model, before its weights are read."""
    if not (words := getattr(args, "target_modules", None)):
        return
    from ..models.linear import skeleton_to_train
    from ..training.experts import check_targets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is warned of is warned of again, of the model
        if (model := skeleton_to_train(args.model)) is not None:
            check_targets(model, targets_of(words))


def targets_of(words: list[str]) -> str | list[str]:
    """PEFT's target_modules from the words of --target-modules."""
    return words[0] if len(words) == 1 and _is_pattern(words[0]) else words


def _is_pattern(text: str) -> bool:
    """Whether one word of --target-modules is what PEFT takes as text: "all-linear", or a regular expression."""
    return text == "all-linear" or not text.replace("_", "").replace(".", "").isalnum() or ".*" in text
