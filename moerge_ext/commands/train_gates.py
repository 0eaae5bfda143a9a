"""`moerge train-gates`: gates for one expert from a file of examples."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from ..experts.kinds import AVERAGE_ACTIVATION, SIGMOID_GATE
from ..files.rows import read_rows

PAPER_BATCH = 1024  # sequences per step in PHATGOOSE, arXiv 2402.05859, section 4

# what only training takes; an option that is not given is absent from the arguments, so that train_gates's own
# defaults hold and --kind average-activation can refuse the rest
TRAINING = ("steps", "lr", "warmup_ratio", "accumulate", "eval_every", "validation", "joint", "resume", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    default, absent = _defaults(), argparse.SUPPRESS
    add = parser.add_argument
    add("model", help="folder (or hub id) of the base model, with its tokenizer")
    add("adapter", type=Path, help="the expert's PEFT LoRA folder")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines: {"input": ..., "target": ...} (the loss is on the target) or {"text": ...}',
    )
    add(
        "--kind",
        choices=(SIGMOID_GATE, AVERAGE_ACTIVATION),
        default=SIGMOID_GATE,
        help="train gates, or take every module's mean input (default: %(default)s)",
    )
    add("--output", type=Path, metavar="DIR", help="where to write (default: the adapter's folder)")
    add(
        "--batch-size",
        type=int,
        default=default["batch_size"],
        help="sequences per forward (default: %(default)s)",
    )
    add("--max-length", type=int, default=512, help="tokens per sequence (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", help="such as cuda:0 or cpu (default: cuda when there is one)")
    add("--no-progress", action="store_true", help="no progress bar")

    add = parser.add_argument_group(f"training, of --kind {SIGMOID_GATE}", argument_default=absent).add_argument
    add("--steps", type=int, help=f"optimizer steps (default: {default['steps']})")
    add("--lr", type=float, help=f"AdamW's rate (default: {default['lr']})")
    add("--warmup-ratio", type=float, help=f"share of the steps (default: {default['warmup_ratio']})")
    forwards = PAPER_BATCH // default["batch_size"]
    add(
        "--accumulate",
        type=int,
        help=f"forwards per step (default: {default['accumulate']}); {forwards}, with --batch-size "
        f"{default['batch_size']}, are the paper's {PAPER_BATCH} sequences per step",
    )
    add("--validation", type=Path, metavar="FILE", help="as --data; the gates with the lowest loss are kept")
    add("--eval-every", type=int, help=f"steps between validations (default: {default['eval_every']})")
    add("--joint", action="store_true", help="train the LoRA as well; needs --output")
    add("--seed", type=int, help=f"of the shuffle and of dropout (default: {default['seed']})")
    add("--resume", action="store_true", help="go on where a killed run stopped")


def _defaults() -> dict[str, Any]:
    from ..training.gates import train_gates

    return {name: p.default for name, p in inspect.signature(train_gates).parameters.items()}


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError for what the user can mend."""
    training = {name: getattr(args, name) for name in TRAINING if hasattr(args, name)}
    check(args, training)
    rows = read_rows(args.data, text=True)
    held_out = read_rows(training["validation"], text=True) if "validation" in training else None

    # these take seconds to import, and `moerge --help` needs neither
    import torch

    from ..models.pretrained import is_seq2seq, load_model, load_tokenizer, usable_device
    from ..training.encoding import collator, encode

    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=args.dtype, device=device)

    def encoded(rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
        return [encode(row, tokenizer, args.max_length, seq2seq=is_seq2seq(model.config)) for row in rows]

    features = encoded(rows)
    common = {"collate_fn": collator(tokenizer), "batch_size": args.batch_size, "output_dir": args.output}
    common["progress"] = not args.no_progress
    if args.kind == AVERAGE_ACTIVATION:
        from ..training.activation import average_activation

        print(f"wrote {average_activation(model, args.adapter, features, **common)}")
        return 0

    from ..training.gates import train_gates

    print(plan_of(len(rows), batch_size=args.batch_size, **training), flush=True)
    if held_out is not None:
        training["validation"] = encoded(held_out)
    result = train_gates(model, args.adapter, features, **training, **common)
    print(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} in {result.steps} steps")
    if result.validation:
        print(f"validation loss {result.validation[result.best_step]:.4f} at step {result.best_step}, kept")
    print(f"wrote {result.path}")
    return 0


def check(args: argparse.Namespace, training: dict[str, Any]) -> None:
    """ValueError for arguments that are out of range or do not go together; `training`: those given of TRAINING."""
    if args.kind != SIGMOID_GATE and training:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in training)
        raise ValueError(
            f"--kind {args.kind} trains nothing and takes no {given}; leave that out, or use --kind {SIGMOID_GATE}"
        )
    low = {"max_length": 2, "batch_size": 1, "steps": 1, "accumulate": 1, "eval_every": 1}
    problems = [
        f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
        for name, least in low.items()
        if getattr(args, name, least) < least
    ]
    if "joint" in training and args.output is None:
        problems.append("--joint changes the adapter's weights: pass --output DIR")
    if problems:
        raise ValueError("; ".join(problems))


def plan_of(examples: int, *, batch_size: int, **training: Any) -> str:
    """One line that says how much data a run will see, before it starts."""
    steps, accumulate = (training.get(name, _defaults()[name]) for name in ("steps", "accumulate"))
    passes, rest = divmod(steps * accumulate, -(-examples // batch_size))  # the last batch of a pass may be smaller
    total = passes * examples + min(examples, rest * batch_size)
    return (
        f"{steps} steps of up to {min(batch_size, examples) * accumulate} sequences (batch size {batch_size}, "
        f"accumulate {accumulate}): {total} sequences in all, from {examples} examples"
    )
