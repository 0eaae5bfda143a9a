"""`moerge train-mix`: the routers of a mixture of whole models, or all of it, from a file of examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .model_options import add_placed_model
from .resuming import check_resumed
from .training_options import Training, add_data, add_training, check_finished, defaults, load


def _defaults() -> dict[str, Any]:
    from ..training.mixture import train_mix

    return defaults(train_mix)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..training.mixture import RATES

    default = _defaults()
    add_placed_model(parser, text="folder or hub id of the mixture, as `moerge mix` writes it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the trained model is written")
    add_data(parser, default)
    parser.set_defaults(dtype="float32")
    rates = {"lr": ", ".join(f"{rate:g} for {what}" for what, rate in RATES.items())}
    add = add_training(parser, default | rates, kept="weights", overwrite=False).add_argument
    add("--train", choices=tuple(RATES), help=f"the routers alone or every weight (default: {default['train']})")
    add("--balance", type=float, help=f"of the loss that keeps all experts in use (default: {default['balance']})")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    what = Training(args, "train", "balance")

    from ..files.atomic import check_can_write
    from ..models.pretrained import load_config
    from ..models.stored import MIX_FILE, MODEL_CONFIG
    from ..training.mixture import CHECKPOINT_FOLDER, RATES, STATE_FILE, train_mix

    check_finished(args, args.output / MODEL_CONFIG, never=True)
    default = _defaults()
    own = {name: what.training.get(name, default[name]) for name in ("train", "balance")}
    state = args.output / CHECKPOINT_FOLDER / STATE_FILE
    check_resumed(
        what,
        default | {"lr": RATES[own["train"]]},
        state,
        args.output / MIX_FILE,
        never=args.output / MODEL_CONFIG,
        **own,
    )
    check_can_write(args.output)
    model, tokenizer = load(what)
    shared = {"default": default, "examples": len(what.rows), **what.shared(tokenizer)}
    shared["dtype"] = load_config(args.model).dtype
    result = what.go(train_mix, model, what.rows, args.output, **shared)
    if what.ranks.first:
        print(f"use it as any model: moerge eval --model {result.path}, vLLM, transformers")
    return 0
